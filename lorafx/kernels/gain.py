"""The gradient of a gain, from sums that other gradients need as well."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lorafx.bases.ops import row_parts
from lorafx.bases.tensor import some_rows
from lorafx.ops import LIBRARY


def smallest_gain(dtype: torch.dtype) -> float:
    """Below this, the gradient is not taken from the layer's output, of which the frozen layer's share is too small.

    What rounded the output is divided by the gain, and in half precision there is nothing to spare.
    """
    return 1 / 2 if dtype.itemsize == 2 else 1 / 16


def _grad_gain(
    dot: Tensor,
    total: Tensor,
    dlefts: Sequence[Tensor],
    lefts: Sequence[Tensor],
    bias: Tensor | None,
    gain: Tensor,
    dy: Tensor,
    x: Tensor,
    *weight: Any,
) -> Tensor:
    """``sum_M dy * (x W^T)``, without that product where the output tells it: ``gain * x W^T = y - s left^T - b``.

    For rows whose gain is small, or 0, by the product of those rows instead, some at a time. ``dot`` and ``total`` are
    the sums of ``dy * y`` and ``dy``, and ``weight`` its :func:`~lorafx.bases.tensor.parts`.
    """
    rest = dot
    for dleft, left in zip(dlefts, lefts, strict=True):
        rest = rest - (dleft.to(rest.dtype) * left).sum(1)
    if bias is not None:
        rest = rest - bias * total
    small = gain.abs() < smallest_gain(dy.dtype)
    found = rest / torch.where(small, 1.0, gain)
    for part in row_parts(len(gain), x.shape[-1], x.dtype) if bool(small.any()) else ():
        mine = small[part]
        if bool(mine.any()):
            products = dy[:, part][:, mine] * F.linear(x, some_rows(part, *weight)[mine])
            found[part][mine] = products.sum(0, dtype=found.dtype)
    return found.to(gain.dtype)


def _fake(*given: Any) -> Tensor:
    gain: Tensor = given[5]
    return gain.new_empty(gain.shape)


#: An operator, since which gains are small is known only when it runs; ops.cpp has it for CPUs.
LIBRARY.define(
    "gain_gradient(Tensor dot, Tensor total, Tensor[] dlefts, Tensor[] lefts, Tensor? bias, Tensor gain, Tensor dy, "
    "Tensor x, Tensor[] weight, str format, int[] layout, ScalarType dtype) -> Tensor"
)
LIBRARY.impl("gain_gradient", _grad_gain, "CompositeExplicitAutograd")
LIBRARY.impl("gain_gradient", _fake, "Meta")
grad_gain: Callable[..., Tensor] = torch.ops.lorafx.gain_gradient.default
