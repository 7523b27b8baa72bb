"""Rounding to the dtype of a weight, once, and what that did."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafx.ops import LIBRARY


def round_once(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """To the nearest, ties to even, from float32 or float64.

    torch goes from float64 to half types by float32, and so rounds twice. Rounded to odd in between, a number keeps on
    which side of a tie it was (Boldo and Melquiond, "When double rounding is odd", 2005).
    """
    if exact.dtype is not torch.float64 or dtype.itemsize >= 4 or exact.is_meta:
        return exact.to(dtype)
    near = exact.float()
    gap = exact - near.double()
    outside = (gap.sign() * near.sign() < 0) & near.isfinite()  # near is further from zero than the number itself
    bits = near.view(torch.int32) - outside.int()
    odd = torch.where((gap != 0) & near.isfinite(), bits | 1, bits)
    return odd.view(torch.float32).to(dtype)


def all_finite(tensor: Tensor) -> bool:
    """Whether none of these numbers, of any floating dtype, is NaN or Inf: at the speed of the memory."""
    if not tensor.numel():
        return True
    ends = torch.aminmax(tensor if tensor.itemsize > 1 else tensor.float())  # which has no float8
    return all(math.isfinite(end) for end in ends)  # a NaN is both


def _round_into(out: Tensor, values: Tensor, base: Tensor, added: bool) -> Tensor:
    """Write ``values`` (float32 or float64), or where ``added`` ``base + values``, to ``out``, rounded once.

    ``base`` is the weight before it was changed, in any dtype. All are matrices of one shape. Returns the four numbers
    of :class:`Rounding`.
    """
    base = base.to(values.dtype)
    exact = base + values if added else values
    stored = round_once(exact, out.dtype)
    out.copy_(stored.contiguous() if out.stride(-1) == 1 else stored.mT.contiguous().mT)  # much the faster copies
    error = (stored.to(exact.dtype) - exact).reshape(-1)
    least, most = torch.aminmax(error)  # a norm of infinite order takes ten times as long
    change = (exact - base).reshape(-1)
    sums = (error.dot(error), change.dot(change), error.dot(change))
    return torch.stack([torch.maximum(-least, most), *sums]).double()


def _fake(out: Tensor, values: Tensor, base: Tensor, added: bool) -> Tensor:
    return values.new_empty(4, dtype=torch.float64)


#: ops.cpp has it for CPUs, in one pass, with the same bits in ``out``.
LIBRARY.define("round_into(Tensor(a!) out, Tensor values, Tensor base, bool added) -> Tensor")
LIBRARY.impl("round_into", _round_into, "CompositeExplicitAutograd")
LIBRARY.impl("round_into", _fake, "Meta")
round_into: Callable[..., Tensor] = torch.ops.lorafx.round_into.default


@dataclass
class Rounding:
    """What rounding to the stored dtype did to a fold: sums over the tiles of one pass over it.

    With ``D`` the change that the adapters make and ``e`` what rounding adds to it: ``largest`` is ``max |e|``, and the
    others are the sums of ``e^2``, ``D^2`` and ``e D``.
    """

    largest: float = 0.0
    error: float = 0.0
    change: float = 0.0
    along: float = 0.0

    @property
    def relative(self) -> float:
        """``|e| / |D|`` (Frobenius norms): 0 is no loss; from 1 on more was lost than the adapters change."""
        return math.sqrt(self.error / self.change) if self.change else 0.0

    @property
    def survived(self) -> float:
        """The share of the change that is in the stored weight: the length of ``D + e`` along ``D``, over ``|D|``."""
        return 1.0 + self.along / self.change if self.change else 1.0

    def round(self, out: Tensor, values: Tensor, base: Tensor, *, added: bool = False) -> bool:
        """Write exact values (in a wide dtype), or ``base`` with them ``added``, to ``out``, rounded once.

        What that did to the change is counted. False, and nothing is counted: what is stored is not finite.
        """
        found = Rounding(*round_into(out, values, base, added).tolist())
        if not math.isfinite(found.largest):
            return False
        self.include(found)
        return True

    def include(self, other: Rounding) -> None:
        """Count what another one counted."""
        self.largest = max(self.largest, other.largest)
        self.error += other.error
        self.change += other.change
        self.along += other.along
