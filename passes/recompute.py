"""Recompute: inputs that backward can compute again from values that are kept for it anyway.

An adapter's gradient needs its layer's input, which the frozen model does not keep. Most inputs are cheap functions of
something that is kept for another reason: the output of a norm of the norm's input, ``silu(gate) * up`` of its two
factors. The analysis says what other operators keep; what it gets wrong costs memory or time, never a value.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate

from lorafx.graph import CapturedModule, get_path
from lorafx.kernels.recipe import Value, write_recipe

aten = torch.ops.aten

#: Steps of a recipe at most: more would cost more than reading the input back.
_STEPS = 8

#: Operators whose result lies in the memory of their first argument, as a rule.
ALIASES = frozenset(
    {
        aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints,
        aten.transpose.int, aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default,
        aten.contiguous.default, aten.alias.default, aten.detach.default, aten.t.default,
    }
)  # fmt: skip

#: Views that leave the last dimension as it is, if its size stays: a product takes its rows one by one.
_ROW_VIEWS = frozenset(
    {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints}
)

#: Cheap operators without randomness or memory.
_CHEAP = frozenset(
    {
        aten.layer_norm.default, aten.rms_norm.default, aten.gelu.default, aten.silu.default, aten.relu.default,
        aten.tanh.default, aten.sigmoid.default, aten.neg.default, aten.pow.Tensor_Scalar, aten.rsqrt.default,
        aten.mean.dim, aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor, aten.mul.Scalar,
        aten.add.Scalar, aten.to.dtype, aten.alias.default, aten.detach.default,
    }
)  # fmt: skip


def _first(node: Node, grads: Collection[Node]) -> list[Any]:
    return [node.args[0]]


def _result(node: Node, grads: Collection[Node]) -> list[Any]:
    return [node]


def _factors(node: Node, grads: Collection[Node]) -> list[Any]:
    """Each factor is kept for the other one's gradient."""
    a, b = node.args[:2]
    return [one for one, other in ((a, b), (b, a)) if other in grads]


def _attention(node: Node, grads: Collection[Node]) -> list[Any]:
    return [*node.args[:3], node]


def _input_of_trained(node: Node, grads: Collection[Node]) -> list[Any]:
    return [node.args[0]] if node.args[1] in grads else []


#: What each operator keeps for its gradient. Others are taken to keep nothing.
_KEEPS: Mapping[Any, Callable[[Node, Collection[Node]], list[Any]]] = {
    aten.layer_norm.default: _first,
    aten.rms_norm.default: _first,
    aten.gelu.default: _first,
    aten.silu.default: _first,
    aten.pow.Tensor_Scalar: _first,
    aten.relu.default: _result,
    aten.tanh.default: _result,
    aten.sigmoid.default: _result,
    aten.rsqrt.default: _result,
    aten.softmax.int: _result,
    aten.exp.default: _result,
    aten.mul.Tensor: _factors,
    aten.matmul.default: _factors,
    aten.bmm.default: _factors,
    aten.linear.default: _input_of_trained,
    aten.scaled_dot_product_attention.default: _attention,
}


class Kept:
    """What is kept for backward in a graph, ``trained`` being the ``get_attr`` nodes of what trains."""

    def __init__(self, graph: Graph, trained: Collection[Node]) -> None:
        grads: dict[Node, None] = dict.fromkeys(trained)  # what depends on something that trains
        roots: dict[Node, Node] = {}
        for node in graph.nodes:
            if any(source in grads for source in node.all_input_nodes):
                grads[node] = None
            aliased = node.args[0] if node.target in ALIASES and node.args else None
            roots[node] = roots[aliased] if isinstance(aliased, Node) else node
        self._roots = roots
        self._kept = {
            roots[value]
            for node in grads
            if node.target in _KEEPS
            for value in _KEEPS[node.target](node, grads)
            if isinstance(value, Node)
        }

    def keeps(self, node: Node) -> bool:
        """Whether a value lives on until backward without us."""
        return node.op == "get_attr" or self._roots[node] in self._kept

    def recipe(self, x: Node) -> tuple[list[Node], str]:
        """The values to compute the rows of ``x`` from again and how; nothing and ``""`` if it is to be kept itself."""
        x = _rows_of(x)
        if self.keeps(x):
            return [], ""
        sources: dict[Node, None] = {}
        steps: dict[Node, None] = {}
        if not self._collect(x, sources, steps) or not any(n.op != "get_attr" for n in sources):
            return [], ""
        numbers = {node: Value(i) for i, node in enumerate((*sources, *steps))}
        written = write_recipe(
            [(n.target, *(map_aggregate(a, lambda v: numbers.get(v, v)) for a in (n.args, n.kwargs))) for n in steps]
        )
        return ([], "") if written is None else (list(sources), written)

    def _collect(self, node: Node, sources: dict[Node, None], steps: dict[Node, None]) -> bool:
        """Add a value to the sources, or what makes it to the steps; False if it cannot be computed again."""
        if node in sources or node in steps:
            return True
        if self.keeps(node):
            sources[node] = None
            return True
        if node.target not in _CHEAP or len(steps) >= _STEPS:
            return False
        if not all(self._collect(source, sources, steps) for source in node.all_input_nodes):
            return False
        steps[node] = None
        return True


def _rows_of(x: Node) -> Node:
    """Behind views that only group rows otherwise."""
    while x.target in _ROW_VIEWS and isinstance(source := x.args[0], Node):
        before, after = source.meta.get("val"), x.meta.get("val")
        if not isinstance(before, Tensor) or not isinstance(after, Tensor) or before.shape[-1] != after.shape[-1]:
            break
        x = source
    return x


def trained_nodes(gm: CapturedModule, graph: Graph) -> list[Node]:
    """The ``get_attr`` nodes of tensors that train."""
    return [n for n in graph.find_nodes(op="get_attr") if getattr(get_path(gm, str(n.target)), "requires_grad", False) is True]
