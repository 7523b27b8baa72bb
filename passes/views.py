"""Views: operators whose result lies in the memory of their input."""

from __future__ import annotations

import torch
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


_REGROUPED = frozenset({aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints})


def behind_views(x: Node, at_most: int = 100) -> Node:
    """What has the same elements in the same order, grouped otherwise: a product takes its rows out of either."""
    for _ in range(at_most):
        source = x.args[0] if x.target in _REGROUPED else None
        if not isinstance(source, Node):
            break
        x = source
    return x
