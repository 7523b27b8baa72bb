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
from lorafx.memory import memory_of, written
from lorafx.ops import ADAPTED, ADAPTER_ARGUMENTS, LAYERS
from lorafx.passes.layers import arguments_of, find_operands
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

    @property
    def is_copied(self) -> bool:
        """Whether it hands on a copy: the gradient of a gain reads the result again, which somebody may have changed.

        Whoever called the graph may as well: ``gm(x).div_(temperature)``. A copy costs less than another product.
        """
        scales = self.adapters is not None and any(VARIANTS[v].scales_rows for v in self.adapters[1])
        return scales and _may_change(self.node)


def find_groups(graph: Graph) -> list[list[Member]]:
    """The groups of a graph with adapted calls, in order; each has at least one call with adapters.

    A group is one stretch of the graph in which nothing is written in place, so that its calls may all run where
    the first one does; and lies in one layer of the model, which activation checkpointing runs again as a whole.
    """
    groups: list[list[Member]] = []
    current: dict[tuple[Node, str], list[Member]] = {}
    for node in graph.nodes:
        if written(node):
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
    pure = node.target is by_mode or (isinstance(node.target, OpOverload) and not written(node))
    return node.op == "call_function" and pure and all(map(is_fixed, node.all_input_nodes))


def fixed_inputs(node: Node) -> Iterator[Node]:
    """The fixed nodes that a call needs, each after what it needs itself."""
    for source in node.all_input_nodes:
        if is_fixed(source):
            yield from fixed_inputs(source)
            yield source


def _may_change(node: Node) -> bool:
    """Whether something may write to a result, in the graph or outside."""
    found, pending = {node}, [node]  # what lies in its memory
    while pending:
        value = pending.pop()
        for user in value.users:
            if user.op == "output" or value in written(user):
                return True
            if user not in found and value in memory_of(user):
                found.add(user)
                pending.append(user)
    return False
