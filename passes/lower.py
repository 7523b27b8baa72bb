"""Lower: exchange the calls of adapted linear layers for faster operators that mean the same.

    q = lorafx.linear(x, wq, bq, [a, b], ["lora"], [s], [p], train_q, None)
    k = aten.linear(x, wk, bk)
    ->
    group = lorafx.grouped(x, ["linear", "linear"], [wq, wk], [bq, bk], [1, 0], [train_q, False], [a, b], ["lora"],
                           [s], [p], "cpu", [h], "<x from h>")
    q = group[0]
    k = group[1]

The graph that passes work on stays as it is: only what a call executes is derived, whenever the graph is compiled. So
adapters can be switched, merged and exported without knowing of it, and nothing has to be undone.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from lorafx.checks import did_you_mean
from lorafx.errors import LoweringError
from lorafx.graph import CapturedModule, annotate, get_path, notes
from lorafx.ir import stage
from lorafx.kernels.base import Call
from lorafx.kernels.grouped import Arguments, grouped
from lorafx.kernels.providers import PROVIDERS, provider
from lorafx.ops import STORAGE, updates
from lorafx.passes.activation import find_activation
from lorafx.passes.group import Member, find_groups, fixed_inputs
from lorafx.passes.recompute import Kept, trained_nodes

aten = torch.ops.aten

#: What calls a site where nothing else does.
REFERENCE = "reference"

BACKENDS = ("auto", REFERENCE, *PROVIDERS)


@dataclass(frozen=True)
class Decision:
    """Who serves one group of calls, and why those that are liked better do not."""

    members: tuple[Member, ...]
    provider: str
    declined: Mapping[str, str]


@dataclass(frozen=True)
class Lowering:
    """How a graph is lowered: kept in ``gm.meta["lowering"]``, and applied whenever the graph is compiled."""

    backend: str = "auto"

    def derive(self, gm: CapturedModule, graph: Graph) -> Graph:
        """The graph that runs; ``graph`` itself, which stays as it is, where there is nothing to lower."""
        if self.backend == REFERENCE or not find_groups(graph):
            return graph
        derived = copy.deepcopy(graph)
        derived.owning_module = gm  # whose modules it calls
        decisions = decide(gm, derived, self.backend)
        kept = Kept(derived, trained_nodes(gm, derived))
        for decision in decisions:
            if decision.provider != REFERENCE:
                _rewrite(derived, decision, kept)
        for node in list(derived.find_nodes(op="get_attr")):
            if not node.users:
                derived.erase_node(node)
        return derived


def lower(gm: CapturedModule, backend: str = "auto") -> None:
    """Choose what computes the adapted layers of a graph, in place. ``apply`` lowers by ``"auto"`` already.

    Args:
        gm: a graph from :func:`lorafx.apply`.
        backend: ``"auto"``, for each group of layers the best provider that serves it; ``"reference"``, plain torch
            as autograd sees it, which ``torch.func`` and double backward need; or a provider by name: ``"triton"``,
            ``"cpu"``, ``"torch"``.

    Raises:
        LoweringError: there is no such backend; or the provider named is not available or declines a group of
            linear layers. Nothing is changed.
    """
    check_backend(backend)
    stage(gm)  # refuses what is no graph of lorafx's
    if backend in PROVIDERS:
        for decision in decide(gm, gm.graph, backend):
            if reason := decision.declined.get(backend):
                layers = [layer for m in decision.members for layer in notes(m.node).get("layers", ())]
                raise LoweringError(f"backend '{backend}' cannot serve '{layers[0]}': {reason}. Choose 'auto'")
        if reason := provider(backend).unavailable():  # though no layer needs it now, one added later would
            raise LoweringError(f"backend '{backend}' is not available: {reason}. Choose 'auto'")
    gm.meta["lowering"] = Lowering(backend)
    gm.recompile()


def check_backend(backend: str) -> None:
    """Raise :class:`LoweringError` unless this is the name of a backend."""
    if backend not in BACKENDS:
        near = did_you_mean(str(backend), BACKENDS)
        raise LoweringError(f"there is no backend {backend!r}{near}; choose one of {BACKENDS}")


def backend_of(gm: CapturedModule) -> str:
    """How a graph was asked to be lowered."""
    stage(gm)  # refuses what is no graph of lorafx's
    lowering: Lowering | None = gm.meta.get("lowering")
    return REFERENCE if lowering is None else lowering.backend


def decide(gm: CapturedModule, graph: Graph, backend: str) -> list[Decision]:
    """Who serves each group of a graph. With a provider by name, what it declines is left to the reference."""
    if backend == REFERENCE:
        return []
    names = tuple(PROVIDERS) if backend == "auto" else (backend,)
    return [_decide(gm, group, names) for group in find_groups(graph)]


def _decide(gm: CapturedModule, group: Sequence[Member], names: Sequence[str]) -> Decision:
    call = _call(gm, group)
    declined: dict[str, str] = {}
    for name in names:
        found = provider(name)
        reason = found.rejects(call) or found.unavailable()
        if reason is None:
            return Decision(tuple(group), name, declined)
        declined[name] = reason
    return Decision(tuple(group), REFERENCE, declined)


def _call(gm: CapturedModule, group: Sequence[Member]) -> Call:
    """What is known of a group: sizes from the weights, the dtype from the input where the capture tells it."""
    weights = [_weight(gm, member) for member in group]
    x = group[0].x.meta.get("val")
    return Call(
        weights[0].device,
        x.dtype if isinstance(x, Tensor) else weights[0].dtype,
        weights[0].shape[1],
        tuple(w.shape[0] for w in weights),
        sum(_rank(gm, member, weight) for member, weight in zip(group, weights, strict=True)),
    )


def _rank(gm: CapturedModule, member: Member, weight: Tensor) -> int:
    """The ranks of all adapters of a call."""
    if member.adapters is None:
        return 0
    nodes, variants, scaling = member.adapters[:3]
    tensors = [get_path(gm, node.target).to("meta") for node in nodes]
    return sum(int(update.right.shape[-2]) for update in updates(weight.to("meta"), tensors, variants, scaling))


def _weight(gm: CapturedModule, member: Member) -> Tensor:
    source = member.weight
    while source.op != "get_attr":
        source = source.all_input_nodes[0]
    found: Tensor = get_path(gm, str(source.target))
    return STORAGE[member.kind].matrix(found)


def _input(x: Node, name: str, kept: Kept) -> tuple[list[Node], str, str]:
    """What the input is computed from again, how, and the activation that the provider differentiates itself."""
    found = find_activation(x)
    if found is not None and found[0] in provider(name).activations:
        sources, recipe = kept.recipe_from(x, found[1])
        if recipe:
            return sources, recipe, found[0]
    return *kept.recipe(x), ""


def _rewrite(graph: Graph, decision: Decision, kept: Kept) -> None:
    members = decision.members
    first = members[0].node
    needed = dict.fromkeys(chain.from_iterable(fixed_inputs(m.node) for m in members))
    for node in needed:
        if first < node:  # another group may need it before
            first.prepend(node)
    adapters = [m.adapters for m in members if m.adapters is not None]
    tensors, variants, scaling, dropout = ([v for a in adapters for v in a[i]] for i in range(4))
    sources, recipe, activation = _input(members[0].x, decision.provider, kept)
    with graph.inserting_before(first):
        given: dict[str, Any] = {
            "x": members[0].x,
            "kinds": [m.kind for m in members],
            "weights": [m.weight for m in members],
            "biases": [m.bias for m in members],
            "counts": [0 if m.adapters is None else len(m.adapters[1]) for m in members],
            "training": [False if m.adapters is None else m.adapters[4] for m in members],
            "tensors": tensors,
            "variants": variants,
            "scaling": scaling,
            "dropout": dropout,
            "provider": decision.provider,
            "sources": sources,
            "recipe": recipe,
            "activation": activation,
        }
        group = graph.call_function(grouped, tuple(Arguments(**given)))
    if scope := notes(first).get("scope"):
        annotate(group, scope=scope)
    copied = [m.is_copied for m in members]
    for index, member in reversed(list(enumerate(members))):
        node = member.node
        group.append(node)
        node.target, node.args, node.kwargs = operator.getitem, (group, index), {}
        if copied[index]:
            with graph.inserting_before(node):
                result = graph.call_function(operator.getitem, (group, index))
            node.target, node.args = aten.clone.default, (result,)
