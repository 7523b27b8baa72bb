"""Views: operators whose result lies in the memory of their input."""

from __future__ import annotations

import torch
from torch import Tensor
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

_ROW_VIEWS = frozenset({aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints})


def behind_row_views(x: Node) -> Node:
    """What has the same rows, grouped otherwise: a product with a matrix takes its rows one by one."""
    while x.target in _ROW_VIEWS and isinstance(source := x.args[0], Node):
        before, after = source.meta.get("val"), x.meta.get("val")
        if not isinstance(before, Tensor) or not isinstance(after, Tensor) or before.shape[-1] != after.shape[-1]:
            break
        x = source
    return x
