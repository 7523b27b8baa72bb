"""Every tolerance of the tests, in one table, each with its reason. Nothing else in the tests compares within one.

An error is measured as ``max|actual - expected| / max|expected|``, against PEFT as ``||actual - expected|| /
||expected||``: single small outputs of a sum that cancels have no accuracy of their own, so an element-wise
relative error would say nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """The largest allowed error, and why it is that; ``by_norm``: of the Euclidean norms."""

    error: float
    reason: str
    by_norm: bool = False


#: A sum of n products is off by about sqrt(n) * eps; n is at most a few hundred here.
_SUMS = "two orders of summation over at most a few hundred terms"

TOLERANCES: Mapping[tuple[str, torch.dtype], Tolerance] = MappingProxyType(
    {
        # One adapted layer against the linear layer with the merged weight.
        ("layer", torch.float64): Tolerance(1e-13, f"{_SUMS}: 450 eps"),
        ("layer", torch.float32): Tolerance(1e-5, f"{_SUMS}: 84 eps"),
        ("layer", torch.float16): Tolerance(4e-3, "4 eps: the weight and the output are each rounded once"),
        ("layer", torch.bfloat16): Tolerance(3e-2, "4 eps: the weight and the output are each rounded once"),
        # A whole merged model against the unmerged one. Layers and normalisations amplify what one layer has.
        ("model", torch.float64): Tolerance(1e-11, "100 times one layer's"),
        ("model", torch.float32): Tolerance(5e-5, "5 times one layer's: two blocks of up to 7 layers each"),
        ("model", torch.float16): Tolerance(2e-2, "5 times one layer's: two blocks of up to 7 layers each"),
        ("model", torch.bfloat16): Tolerance(1.5e-1, "5 times one layer's: two blocks of up to 7 layers each"),
        # The same computation by PEFT: the same products, summed in another order in places.
        ("peft", torch.float32): Tolerance(1e-5, f"{_SUMS}, through two blocks", by_norm=True),
        ("peft", torch.float64): Tolerance(1e-10, "20000 times what it is; float32 gives 1e-6", by_norm=True),
        # A merged weight of ours, rounded once from float64, against PEFT's sum in float32.
        ("fold", torch.float32): Tolerance(1e-6, "8 eps: r products of a few ranks, and one sum"),
        # A batch in parts (accumulated, or on several processes) against all of it at once.
        ("joint batch", torch.float64): Tolerance(1e-13, f"{_SUMS}: 450 eps"),
        # Outputs and gradients of a whole bfloat16 model against the same model in float64.
        ("gradient", torch.bfloat16): Tolerance(8e-2, "10 eps; plain torch's is up to 3e-2 away", by_norm=True),
        # Gradients under bfloat16 autocast, where the model's own casts are those it was captured with.
        ("autocast", torch.float32): Tolerance(1e-1, "autocast itself is up to 7e-2 away from float32 here"),
    }
)  # fmt: skip


def error(actual: Tensor, expected: Tensor, by_norm: bool = False) -> float:
    """``max|actual - expected| / max|expected|``, or of norms; in float64; infinite where NaN or Inf differ."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{actual.dtype} is not {expected.dtype}"
    a, e = actual.detach().double(), expected.detach().double()
    if not bool(torch.isfinite(a).all() and torch.isfinite(e).all()):
        return 0.0 if torch.equal(a, e) else float("inf")
    if a.numel() == 0:
        return 0.0
    tiny = torch.finfo(torch.float64).tiny
    if by_norm:
        return float((a - e).norm() / e.norm().clamp_min(tiny))
    return float((a - e).abs().max() / e.abs().max().clamp_min(tiny))


def assert_close(what: str, actual: Tensor, expected: Tensor) -> None:
    """Fail unless the error is within the table's tolerance for ``what`` and the tensors' dtype."""
    tolerance = TOLERANCES[what, expected.dtype]
    found = error(actual, expected, tolerance.by_norm)
    assert found <= tolerance.error, f"error {found:.3g} > {tolerance.error:.3g} ({tolerance.reason})"


def assert_rounded_once(actual: Tensor, exact: Tensor, base: Tensor, r: int) -> None:
    """Fail unless ``actual`` is ``exact`` (float64) rounded: half a unit in the last place, and what the wide sum lost.

    The sum is of the ``base`` weight and ``r`` products, in float32 for half types and otherwise in float64.
    """
    limits = torch.finfo(actual.dtype)
    exponent = torch.frexp(exact.abs().clamp_min(limits.tiny)).exponent - 1
    half_unit = torch.ldexp(torch.full_like(exact, limits.eps / 2), exponent)
    wide = torch.finfo(torch.float32 if actual.dtype.itemsize < 4 else torch.float64).eps
    lost = 4 * (r + 2) * wide * float(exact.abs().max() + base.abs().max())
    assert bool(((actual.double() - exact).abs() <= half_unit + lost).all())
