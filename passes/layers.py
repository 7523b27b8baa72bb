"""The kinds of calls that can be adapted, and how each is rewritten to a site's operands and back.

linear:   aten.linear(x, weight, bias?)        weight [out, in]
addmm:    aten.addmm(bias, x, weight)          weight [in, out]  (GPT-2's Conv1D)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch.fx import Node

aten = torch.ops.aten

#: Operators through which a weight may pass on its way to the call without becoming another matrix.
_CASTS = frozenset({aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.alias.default, aten.detach.default})


@dataclass(frozen=True)
class Operands:
    """What a call multiplies: ``x [..., in]`` by the matrix held by ``source`` (reached through "
    "``weight``)."""

    x: Node
    weight: Node
    bias: Node | None
    source: Node


class LayerKind(Protocol):
    """A form of call that computes ``x W^T + b``."""

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored ``[in, out]``."""
        ...

    def operands(self, node: Node) -> Operands | None:
        """The operands if the node is such a call on a parameter, else None."""
        ...

    def restore(self, node: Node, x: Any, weight: Any, bias: Any) -> None:
        """Turn a site's node into this call again."""
        ...


@dataclass(frozen=True)
class LinearCall:
    """``aten.linear``: what nn.Linear and F.linear are captured as."""

    transposed: bool = False

    def operands(self, node: Node) -> Operands | None:
        if node.target is not aten.linear.default:
            return None
        x, weight, *rest = node.args
        bias = node.kwargs.get("bias", rest[0] if rest else None)
        return _operands(x, weight, bias)

    def restore(self, node: Node, x: Any, weight: Any, bias: Any) -> None:
        node.target = aten.linear.default
        node.args = (x, weight) if bias is None else (x, weight, bias)


@dataclass(frozen=True)
class AddmmCall:
    """``aten.addmm`` with a stored ``[in, out]`` weight; the site reads it through ``aten.t``."""

    transposed: bool = True

    def operands(self, node: Node) -> Operands | None:
        if node.target is not aten.addmm.default or node.kwargs:
            return None
        bias, x, weight = node.args
        return _operands(x, weight, bias)

    def restore(self, node: Node, x: Any, weight: Any, bias: Any) -> None:
        node.target = aten.addmm.default
        stored = weight.args[0]
        node.args = (bias, x, stored)
        if not weight.users:
            weight.graph.erase_node(weight)


#: Each kind by the name under which a site's node notes what it was.
LAYER_KINDS: Mapping[str, LayerKind] = MappingProxyType({"linear": LinearCall(), "addmm": AddmmCall()})


def find_operands(node: Node) -> tuple[str, Operands] | None:
    """The kind and operands of a call that can be adapted, else None."""
    if node.op != "call_function":
        return None
    for name, kind in LAYER_KINDS.items():
        if (operands := kind.operands(node)) is not None:
            return name, operands
    return None


def _operands(x: Any, weight: Any, bias: Any) -> Operands | None:
    source = weight
    while isinstance(source, Node) and source.target in _CASTS:
        source = source.args[0]
    if not isinstance(x, Node) or not isinstance(source, Node) or source.op != "get_attr":
        return None
    return Operands(x, weight, bias if isinstance(bias, Node) else None, source)


def readers(source: Node) -> list[Node]:
    """The calls that read a ``get_attr`` node, seen through casts of it."""
    found = []
    for user in source.users:
        found += readers(user) if user.target in _CASTS or user.target is aten.t.default else [user]
    return found
