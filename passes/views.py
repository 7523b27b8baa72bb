"""Views: operators whose result lies in the memory of their input."""

from __future__ import annotations

import operator

import torch
from torch._ops import OpOverload
from torch.fx import Node

aten = torch.ops.aten

#: Operators whose result lies in the memory of their first argument, as a rule.
ALIASES = frozenset(
    {
        aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints,
        aten.transpose.int, aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default,
        aten.contiguous.default, aten.alias.default, aten.detach.default, aten.t.default,
    }
)  # fmt: skip


def memory_of(node: Node) -> Node | None:
    """The argument in whose memory a result may lie, as the operator's schema says; None: in none."""
    if node.target is operator.getitem:
        return node.args[0] if isinstance(node.args[0], Node) else None
    if not isinstance(node.target, OpOverload):
        return None
    named = zip((a.name for a in node.target._schema.arguments), node.args, strict=False)
    given = {**dict(named), **node.kwargs}
    aliased = (given.get(a.name) for a in node.target._schema.arguments if a.alias_info is not None)
    return next((value for value in aliased if isinstance(value, Node)), None)


def written(node: Node) -> list[Node]:
    """The arguments that an operator writes to."""
    if not isinstance(node.target, OpOverload) or not node.target._schema.is_mutable:
        return []
    named = zip((a.name for a in node.target._schema.arguments), node.args, strict=False)
    given = {**dict(named), **node.kwargs}
    values = (given.get(a.name) for a in node.target._schema.arguments if a.is_write)
    return [value for value in values if isinstance(value, Node)]


_REGROUPED = frozenset({aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints})


def behind_views(x: Node, at_most: int = 100) -> Node:
    """What has the same elements in the same order, grouped otherwise: a product takes its rows out of either."""
    for _ in range(at_most):
        source = x.args[0] if x.target in _REGROUPED else None
        if not isinstance(source, Node):
            break
        x = source
    return x
