"""Insert: each matched layer's calls become calls of the variant's operator.

    before:  linear = aten.linear(x, <q.weight>, <q.bias>)
    after:   a, b   = <q.lora_A.default>, <q.lora_B.default>
             train  = by_mode(<q>, True, False)                       # only with dropout
             linear = lorafx.lora_linear(x, <q.weight>, <q.bias>, a, b, scaling, dropout, train)

Nodes are edited in place and keep their names, so that taking the adapters away gives the graph back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Node

from lorafx.errors import MatchError
from lorafx.graph import CapturedModule, Scope, annotate, by_mode, get_path, mark_own, rebind, set_tensor
from lorafx.ir import Site, Stage
from lorafx.passes.base import Pass, PassResult
from lorafx.passes.layers import find_operands
from lorafx.passes.match import Choice
from lorafx.passes.modes import scope_node
from lorafx.spec import LoraSpec, matches
from lorafx.variants import VARIANTS

aten = torch.ops.aten


@dataclass(frozen=True)
class Insert(Pass):
    """Adapt the chosen layers of a captured graph, in place.

    Options: ``choices`` from :func:`~lorafx.passes.match.match`; ``specs`` they were made with;
    ``generator`` for the initial values (None: torch's global one).

    After it, only the adapters, ``modules_to_save`` and the biases asked for require gradients.
    """

    choices: tuple[Choice, ...]
    specs: tuple[LoraSpec, ...]
    generator: torch.Generator | None = None

    name: ClassVar[str] = "insert"
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.CAPTURED})
    ensures: ClassVar[Stage] = Stage.INSERTED

    def run(self, gm: CapturedModule) -> PassResult:
        trained = trained_base(gm, self.choices, self.specs)
        skipped = []
        changed = 0
        for choice in self.choices:
            if choice.site is None or choice.spec is None:
                skipped.append((choice.candidate.name, choice.reason))
                continue
            self._add_parameters(gm, choice.site, choice.spec)
            _rewrite(gm, choice.candidate.nodes, choice.candidate.kind, choice.site)
            changed += 1
        gm.meta["original"] = {}
        gm.meta["samples"] = {c.site.weight: sample(get_path(gm, c.site.weight)) for c in self.choices if c.site}
        for name in trained:
            _make_trainable(gm, name)
        gm.meta["specs"] = self.specs
        return PassResult(gm, changed, tuple(skipped))

    def _add_parameters(self, gm: CapturedModule, site: Site, spec: LoraSpec) -> None:
        weight = get_path(gm, site.weight)
        matrix = weight.detach().t() if site.transposed else weight.detach()
        values = VARIANTS[site.variant].init(matrix, site.r, spec.init, spec.dtype_for(weight.dtype), self.generator)
        for name, value in values.items():
            parameter = nn.Parameter(value)
            mark_own(parameter)
            set_tensor(gm, site.parameter_name(name), parameter)


def _rewrite(gm: CapturedModule, nodes: Sequence[Node], kind: str, site: Site) -> None:
    graph, variant = gm.graph, VARIANTS[site.variant]
    parent, _, name = site.path.rpartition(".")
    if name not in get_path(gm, parent)._modules:
        gm.set_submodule(site.path, Scope())
    with graph.inserting_before(nodes[0]):
        parameters = [_made(graph.get_attr(n)) for n in site.parameter_names.values()]
    for node in nodes:
        match = find_operands(node)
        assert match is not None
        operands = match[1]
        training: Any = False
        weight = operands.weight
        if site.dropout > 0.0:
            scope = scope_node(graph, site.path)
            with graph.inserting_before(node):
                training = _made(graph.call_function(by_mode, (scope, True, False)))
        if site.transposed:
            with graph.inserting_before(node):
                weight = graph.call_function(aten.t.default, (weight,))
        node.target = variant.op
        node.args = (operands.x, weight, operands.bias, *parameters, site.scaling, site.dropout, training)
        node.kwargs = {}
        annotate(node, site=site.to_note(), kind=kind)


def _made(node: Node) -> Node:
    """Mark a node as the adapter's, to go when the adapter goes."""
    annotate(node, inserted=True)
    return node


def sample(weight: Tensor) -> Tensor:
    """Some 64 values of a weight, by which a merge tells that it is still the one that was adapted."""
    flat = weight.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // 64)].cpu().clone() if not weight.is_meta else flat[:0]


def trained_base(gm: CapturedModule, choices: Sequence[Choice], specs: Sequence[LoraSpec]) -> tuple[str, ...]:
    """Names of base parameters that train whole: ``modules_to_save`` and ``bias``."""
    names: dict[str, None] = {}
    parameters = dict(gm.named_parameters(remove_duplicate=False))
    modules = [n for n, _ in gm.named_modules(remove_duplicate=False) if n]
    for spec in specs:
        for module in modules:
            if matches(module, spec.trained_modules):
                names.update(dict.fromkeys(n for n in parameters if n.startswith(module + ".")))
        if spec.bias == "all":
            names.update(dict.fromkeys(n for n in parameters if n.rpartition(".")[2].endswith("bias")))
        if spec.bias == "lora_only":
            taken = (c.site.bias for c in choices if c.site is not None and c.spec is spec)
            names.update(dict.fromkeys(n for n in taken if n is not None))
    for name in names:
        aliases = [n for n, p in parameters.items() if p is parameters[name] and n not in names]
        if aliases:
            raise MatchError(
                f"'{name}' is to be trained whole (modules_to_save or bias), and is the same tensor as "
                f"'{aliases[0]}', which is not. Name both modules in modules_to_save, or leave both out"
            )
    return tuple(names)


def _make_trainable(gm: CapturedModule, name: str) -> None:
    """Give a base parameter storage of its own, keep the original aside, and let it train."""
    old = get_path(gm, name)
    if old.requires_grad:
        return
    gm.meta["original"][name] = old
    new = rebind(gm, old, old.detach().clone())
    new.requires_grad_(True)
