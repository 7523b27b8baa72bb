"""The last step of a fold, compiled and not: the same bits, and the same account of what rounding did."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lorafx.kernels.cpu import build
from lorafx.kernels.rounding import Rounding, _round_into, round_into, round_once

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SIZES = ((1, 1), (3, 5), (64, 64), (65, 130), (200, 17))


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """The suite is run where there is a compiler."""
    build.load()


def values(shape: tuple[int, int], wide: torch.dtype, base: torch.dtype) -> tuple[Tensor, Tensor]:
    """Before and after, with what is special in each dtype, and ties."""
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(shape, generator=generator).to(base)
    exact = before.to(wide) + 1e-2 * torch.randn(shape, generator=generator, dtype=wide)
    special = [0.0, -0.0, 1e-40, -3e-39, 6e-8, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 2**-8 + 2**-30, 65519.9, 3e38]
    exact.reshape(-1)[: len(special)] = torch.tensor(special, dtype=wide)[: exact.numel()]
    return before, exact


@pytest.mark.parametrize("out", DTYPES, ids=str)
@pytest.mark.parametrize("base", DTYPES, ids=str)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
def test_compiled_has_the_bits_of_torch(wide: torch.dtype, base: torch.dtype, out: torch.dtype) -> None:
    for shape, turned, by_columns, added in itertools.product(SIZES, *3 * [(False, True)]):
        before, exact = values(shape, wide, base)
        if by_columns:
            before, exact = before.t().contiguous().t(), exact.t().contiguous().t()
        height, width = shape
        memory = torch.zeros((2, width + 3, height + 3) if turned else (2, height + 3, width + 3), dtype=out)
        ours, theirs = (m.t() if turned else m for m in memory[:, : width if turned else height][..., :-3])
        found = round_into(ours, exact, before, added)
        wanted = _round_into(theirs, exact, before, added)
        assert torch.equal(memory[0].view(torch.uint8), memory[1].view(torch.uint8))
        assert torch.equal(theirs, round_once(before.to(wide) + exact if added else exact, out))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 1e39])
def test_what_is_not_finite_is_told_and_not_counted(bad: float) -> None:
    exact = torch.zeros(3, 20, dtype=torch.float64)
    exact[1, 17] = bad
    for function in (round_into, _round_into):
        assert not torch.isfinite(function(torch.empty(3, 20), exact, torch.zeros(3, 20), False))[0]
    rounding = Rounding()
    assert not rounding.round(torch.empty(3, 20), exact, torch.zeros(3, 20))
    assert rounding == Rounding()


def test_wrong_operands_are_refused() -> None:
    exact = torch.zeros(4, 6)
    with pytest.raises(RuntimeError, match="matrices of one shape"):
        round_into(torch.empty(4, 5), exact, exact, False)
    with pytest.raises(RuntimeError, match="gaps in both directions"):
        round_into(torch.empty(8, 12)[::2, ::2], exact, exact, False)
    with pytest.raises(RuntimeError, match="float32 or float64"):
        round_into(torch.empty(4, 6), exact.half(), exact, True)
