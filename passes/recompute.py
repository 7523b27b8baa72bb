"""Recompute: inputs that backward can compute again from values that are kept for it anyway.

An adapter's gradient needs its layer's input, which the frozen model does not keep. Most inputs are cheap functions of
something that is kept for another reason: the output of a norm of the norm's input, ``silu(gate) * up`` of its two
factors. The analysis says what other operators keep; what it gets wrong costs memory or time, never a value.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate

from lorafx.graph import CapturedModule, get_path
from lorafx.kernels.recipe import Value, write_recipe
from lorafx.memory import memory_of, written
from lorafx.passes.views import ALIASES, behind_views

aten = torch.ops.aten

#: Steps of a recipe at most: more would cost more than reading the input back.
_STEPS = 8

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
        memory: dict[Node, frozenset[Node]] = {}
        for node in graph.nodes:
            memory[node] = frozenset().union(*(memory[source] for source in memory_of(node))) or frozenset({node})
        self._memory = memory
        changed = (memory[value] for node in graph.nodes for value in written(node))
        self._written: frozenset[Node] = frozenset().union(*changed)
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
        x = behind_views(x)
        sources: dict[Node, None] = {}
        steps: dict[Node, None] = {}
        if self.keeps(x) or not self._collect(x, sources, steps) or all(n.op == "get_attr" for n in sources):
            return [], ""
        return _write(sources, steps)

    def recipe_from(self, x: Node, sources: Sequence[Node]) -> tuple[list[Node], str]:
        """As :meth:`recipe`, from just these values."""
        given, steps = dict.fromkeys(sources), dict[Node, None]()
        if any(self._is_written(node) for node in given):
            return [], ""
        return _write(given, steps) if self._collect(behind_views(x), given, steps, only=True) else ([], "")

    def _is_written(self, node: Node) -> bool:
        return not self._written.isdisjoint(self._memory[node])

    def _collect(self, node: Node, sources: dict[Node, None], steps: dict[Node, None], only: bool = False) -> bool:
        """Add a value to the sources, or what makes it to the steps; False if it cannot be computed again."""
        if node in sources or node in steps:
            return True
        if self._is_written(node):
            return False  # backward would read something else
        if not only and self.keeps(node):
            sources[node] = None
            return True
        if node.target not in _CHEAP or len(steps) >= _STEPS:
            return False
        if not all(self._collect(source, sources, steps, only) for source in node.all_input_nodes):
            return False
        steps[node] = None
        return True


def _write(sources: Mapping[Node, None], steps: Mapping[Node, None]) -> tuple[list[Node], str]:
    numbers = {node: Value(i) for i, node in enumerate((*sources, *steps))}

    def put(value: Any) -> Any:
        return numbers.get(value, value)

    written = write_recipe([(n.target, map_aggregate(n.args, put), map_aggregate(n.kwargs, put)) for n in steps])
    return ([], "") if written is None else (list(sources), written)


def trained_nodes(gm: CapturedModule, graph: Graph) -> list[Node]:
    """The ``get_attr`` nodes of tensors that train."""
    return [
        n
        for n in graph.find_nodes(op="get_attr")
        if getattr(get_path(gm, str(n.target)), "requires_grad", False) is True
    ]
