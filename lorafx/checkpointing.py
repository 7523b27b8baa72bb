"""Activation checkpointing: a layer's part of the graph runs again in backward instead of being kept.

    graph:   q = linear(h0, <layers.0.q.weight>)        run:   w = <layers.0.q.weight>
             g = gelu(q)                                       m = <_mode>
             y = linear(g, <lm_head.weight>)                   g = recompute_layers_0(m, w, h0)
                                                               y = linear(g, <lm_head.weight>)

Only what a call executes is derived; the module's graph stays the flat one that passes work on.
Arithmetic and random draws keep their order, and a layer draws the same dropout masks when it runs
again, so gradients are those of the flat graph.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.utils.checkpoint import checkpoint

from lorafx.errors import PassError
from lorafx.memory import memory_of, written

#: A layer is what a dotted path names up to its first number: ``model.layers.3`` of ``model.layers.3.mlp``.
_LAYER = re.compile(r"(?:[^.]+\.)*?\d+(?=\.|$)")


@dataclass(frozen=True)
class Checkpointing:
    """Which layers are recomputed: every ``every_n_layers``-th, from the first one on.

    ``options`` are passed to :func:`torch.utils.checkpoint.checkpoint`, always the non-reentrant kind.

    Raises:
        ValueError: an option that changes what is computed, or is not supported.
    """

    every_n_layers: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.every_n_layers < 1:
            raise ValueError(f"every_n_layers={self.every_n_layers} must be 1 or more")
        if self.options.get("use_reentrant"):
            raise ValueError("use_reentrant=True loses the gradients of adapters below frozen layers; leave it out")
        kept = {k: v for k, v in self.options.items() if k != "use_reentrant"}
        object.__setattr__(self, "options", kept)


def checkpointed(graph: Graph, scopes: Mapping[Node, str], mode: str, choice: Checkpointing) -> Graph:
    """A graph that computes the same and, while training, recomputes its layers in backward.

    Args:
        graph: left as it is.
        scopes: the dotted path of the module whose code made each node, where known.
        mode: path of the module whose ``training`` flag is the root's.
        choice: which layers, and how.

    Raises:
        PassError: nothing in the graph is a layer that may run twice.
    """
    fixed = [n for n in graph.nodes if n.op in ("placeholder", "get_attr") or _is_switch(n)]
    fixed.sort(key=lambda n: n.op != "placeholder")  # neither depends on anything computed
    layers = dict.fromkeys(filter(None, map(layer_of, scopes.values())))
    chosen = frozenset(list(layers)[:: choice.every_n_layers])
    derived = Graph()
    derived.set_codegen(graph._codegen)
    made: dict[Node, Node] = {}
    for node in fixed:
        made[node] = derived.node_copy(node, made.__getitem__)
    mode_node = derived.get_attr(mode)
    count = 0
    for layer, nodes in _runs(graph, scopes, frozenset(fixed)):
        if layer not in chosen or not _may_run_twice(nodes):
            for node in nodes:
                made[node] = derived.node_copy(node, made.__getitem__)
            continue
        body, attributes, values, results = _cut(nodes)
        run = _recompute(body, len(attributes), layer, choice)
        call = derived.call_function(run, (mode_node, *(made[n] for n in (*attributes, *values))))
        for index, node in enumerate(results):
            made[node] = derived.call_function(operator.getitem, (call, index))
        count += 1
    if not count:
        raise PassError(
            "activation checkpointing: the graph has no numbered layers (such as model.layers.0) that may run "
            "twice. A layer may not write buffers, as BatchNorm does, nor its inputs in place; and the model must "
            "have been captured with example_inputs"
        )
    return derived


def _is_switch(node: Node) -> bool:
    """Whether a node reads a mode. Such stay outside: eval() between forward and backward changes nothing."""
    return (
        node.op == "call_function"
        and not isinstance(node.target, OpOverload)
        and bool(node.all_input_nodes)
        and all(n.op == "get_attr" for n in node.all_input_nodes)
    )


def layer_of(scope: str) -> str:
    """The numbered layer that a module path lies in (``""``: in none)."""
    found = _LAYER.match(scope)
    return found.group() if found else ""


def _runs(graph: Graph, scopes: Mapping[Node, str], fixed: frozenset[Node]) -> Sequence[tuple[str, tuple[Node, ...]]]:
    """Stretches of nodes of one layer (``""``: of none); a node without a scope goes with the one before."""
    labelled, layer = [], ""
    for node in graph.nodes:
        if node not in fixed:
            layer = layer_of(scopes[node]) if node in scopes else layer
            labelled.append((layer if node.op != "output" else "", node))
    return [(name, tuple(n for _, n in run)) for name, run in groupby(labelled, key=lambda pair: pair[0])]


def _may_run_twice(nodes: Sequence[Node]) -> bool:
    """Whether a second run changes nothing: whatever the nodes write in place, they have made themselves."""
    own: set[Node] = set()
    for node in nodes:
        # what is no operator is a size or one of several results; or the trace is symbolic, and calls modules
        if not isinstance(node.target, OpOverload) and getattr(node.target, "__module__", "") != "_operator":
            return False
        if not own.issuperset(written(node)):
            return False
        if own.issuperset(memory_of(node)):
            own.add(node)
    return True


def _cut(nodes: Sequence[Node]) -> tuple[GraphModule, list[Node], list[Node], list[Node]]:
    """The nodes as a graph of their own; the attributes and the values it reads; and the results it gives."""
    inside = frozenset(nodes)
    read = dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a not in inside)
    attributes = [n for n in read if n.op == "get_attr"]
    values = [n for n in read if n.op != "get_attr"]
    results = [n for n in nodes if any(user not in inside for user in n.users)]
    body = Graph()
    made: dict[Node, Node] = {n: body.placeholder(n.name) for n in (*attributes, *values)}
    for node in nodes:
        made[node] = body.node_copy(node, made.__getitem__)
    body.output(tuple(made[n] for n in results))
    return GraphModule(nn.Module(), body), attributes, values, results


def _recompute(body: GraphModule, attributes: int, layer: str, choice: Checkpointing) -> Callable[..., Any]:
    """What stands for a layer's nodes: ``(mode, *attributes, *values) -> results``."""

    def run(mode: nn.Module, *given: Any) -> Any:
        recompute = mode.training and torch.is_grad_enabled()
        if not (recompute and any(isinstance(g, Tensor) and g.requires_grad for g in given)):
            return body(*given)  # below the first adapter nothing is kept anyway
        # weights are held, not saved: an option that moves what is saved is meant for activations
        held, values = given[:attributes], given[attributes:]
        return checkpoint(lambda *v: body(*held, *v), *values, use_reentrant=False, **choice.options)

    run.__name__ = run.__qualname__ = "recompute_" + re.sub(r"\W", "_", layer)
    return run
