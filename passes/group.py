"""Group: the calls that read the same value, which one operator can serve together.

    q = lorafx.linear(x, <q.weight>, ...)
    k = aten.linear(x, <k.weight>, <k.bias>)        ->        (q, k, v)
    v = lorafx.linear(x, <v.weight>, ...)

One read of ``x`` then makes all of their low-rank inputs, and one pass writes its gradient. A call without adapters
joins those that have some, since the gradient of ``x`` is a sum over all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch._ops import OpOverload
from torch.fx import Graph, Node

from lorafx.checkpointing import layer_of
from lorafx.graph import by_mode, notes
from lorafx.ops import ADAPTED, ADAPTER_ARGUMENTS, LAYERS
from lorafx.passes.layers import arguments_of, find_operands
from lorafx.passes.views import memory_of, written
from lorafx.variants import VARIANTS

#: The kinds that are a product with a matrix.
KINDS = ("linear", "addmm")

_TWINS: Mapping[Any, str] = {ADAPTED[kind]: kind for kind in KINDS}
_LAYERS: Mapping[Any, str] = {LAYERS[kind].target: kind for kind in KINDS}


@dataclass(frozen=True)
class Member:
    """One call of a group: its own arguments, and those of its adapters (None: it has none)."""

    node: Node
    kind: str
    arguments: tuple[Any, ...]
    adapters: tuple[Any, ...] | None

    @property
    def x(self) -> Node:
        """What it reads."""
        x: Node = self.arguments[LAYERS[self.kind].x]
        return x

    @property
    def weight(self) -> Node:
        """The weight as stored, perhaps through casts."""
        weight: Node = self.arguments[LAYERS[self.kind].weight]
        return weight

    @property
    def bias(self) -> Any:
        """A node or None."""
        place = LAYERS[self.kind].bias
        return None if place is None else self.arguments[place]


def find_groups(graph: Graph) -> list[list[Member]]:
    """The groups of a graph with adapted calls, in order; each has at least one call with adapters.

    A group is one stretch of the graph in which nothing is written in place, so that its calls may all run where
    the first one does; and lies in one layer of the model, which activation checkpointing runs again as a whole.
    """
    groups: list[list[Member]] = []
    current: dict[tuple[Node, str], list[Member]] = {}
    for node in graph.nodes:
        if _writes(node):
            current = {}
        elif (member := _member(node)) is not None:
            key = (member.x, layer_of(notes(node).get("scope", "")))
            if key not in current:
                current[key] = []
                groups.append(current[key])
            current[key].append(member)
    return [group for group in groups if any(m.adapters is not None for m in group)]


def _member(node: Node) -> Member | None:
    if node.op != "call_function":
        return None
    if (kind := _TWINS.get(node.target)) is not None:
        if why_left(node) is not None:
            return None
        return Member(node, kind, node.args[:-ADAPTER_ARGUMENTS], node.args[-ADAPTER_ARGUMENTS:])
    if (kind := _LAYERS.get(node.target)) is None or find_operands(node) is None:
        return None
    found = Member(node, kind, arguments_of(node) or (), None)
    return found if _computed_operand(node, found.x) is None else None


def why_left(node: Node) -> str | None:
    """Why a call with adapters is in no group, so that it is left to the reference; None: it is in one."""
    kind = _TWINS.get(node.target)
    if kind is None:
        return f"only {' and '.join(KINDS)} are lowered"
    adapters: tuple[Any, ...] = node.args[-ADAPTER_ARGUMENTS:]
    if adapters[-1] is not None:
        return "each row of a batch goes through its own adapter"
    if any(VARIANTS[v].scales_rows for v in adapters[1]) and _is_written(node):
        return f"%{node.name} is written to in place, and the gradient of its magnitudes would read it again"
    if (operand := _computed_operand(node, node.args[LAYERS[kind].x])) is not None:
        return f"its operand %{operand.name} is computed from the inputs"
    return None


def _computed_operand(node: Node, x: Any) -> Node | None:
    """What a call takes beside ``x`` that is not fixed."""
    return next((n for n in node.all_input_nodes if n is not x and not is_fixed(n)), None)


def is_fixed(node: Node) -> bool:
    """Whether a node depends on no input: a tensor of the graph's, a mode, or something made of these alone."""
    if node.op == "get_attr":
        return True
    pure = node.target is by_mode or (isinstance(node.target, OpOverload) and not node.target._schema.is_mutable)
    return node.op == "call_function" and pure and all(map(is_fixed, node.all_input_nodes))


def fixed_inputs(node: Node) -> Iterator[Node]:
    """The fixed nodes that a call needs, each after what it needs itself."""
    for source in node.all_input_nodes:
        if is_fixed(source):
            yield from fixed_inputs(source)
            yield source


def _is_written(node: Node) -> bool:
    """Whether something writes into a result, which the gradient of a gain reads again."""
    return any(node in written(user) or (memory_of(user) is node and _is_written(user)) for user in node.users)


def _writes(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable
