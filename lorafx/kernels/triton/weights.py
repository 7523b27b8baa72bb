"""Where kernels read a frozen weight from: as it is, or from NF4, whose values exist for as long as a tile does.

A value of NF4 (:mod:`lorafx.bases.nf4`) is ``TABLE[code] * scale``, and a scale that is quantised too is
``NESTED_TABLE[absmax] * nested_absmax + offset``, each step rounded to float32. So that both are those bits, what reads
NF4 is launched with ``enable_fp_fusion`` off: a fused multiply-add would not round the product.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from lorafx.bases.nf4 import NESTED_BLOCK, NESTED_TABLE, TABLE
from lorafx.kernels.triton.tiles import cdiv, is_aligned, jit, launch, on_device

_VALUES = tl.constexpr(tuple(TABLE.tolist()))
_NESTED_BLOCK = tl.constexpr(NESTED_BLOCK)


class Stored(NamedTuple):
    """A frozen weight ``shape [out, in]``: the weight, or with a ``block_size`` the tensors of NF4, in their order."""

    tensors: tuple[Tensor, ...]
    shape: tuple[int, int]
    block_size: int = 0

    @property
    def whole(self) -> bool:
        """Whether each row of NF4 starts with a block: then a tile's bytes are read once, and its scales row by row."""
        return self.block_size > 0 and self.shape[1] % self.block_size == 0

    @property
    def aligned(self) -> bool:
        """See :func:`~lorafx.kernels.triton.tiles.is_aligned`."""
        return self.tensors[0].data_ptr() % 16 == 0 if self.whole else not self.block_size and is_aligned(*self.tensors)

    @property
    def strides(self) -> tuple[int, ...]:
        """From a row to the next one, and along it; NF4's follow from its width."""
        return () if self.block_size else self.tensors[0].stride()

    @property
    def kind(self) -> tuple[int, bool]:
        """What of it a kernel is compiled for."""
        return self.block_size, self.whole


def stored(tensors: Sequence[Tensor], layouts: Sequence[int]) -> list[Stored]:
    """From what operators take (:func:`lorafx.kernels.triton.ops.arguments`)."""
    found, rest = [], iter(tensors)
    for count, n, k, block_size in zip(*[iter(layouts)] * 4, strict=True):
        found.append(Stored(tuple(islice(rest, count)), (n, k), block_size))
    return found


@jit
def nf4_values(code: tl.tensor) -> tl.tensor:
    """``TABLE[code]``: of each pair of entries the one that a bit of the code says. Nothing is loaded."""
    bit = (code & 1) != 0
    eights: tl.tensor = ()
    for i in tl.static_range(8):
        eights = eights + (tl.where(bit, _VALUES[2 * i + 1], _VALUES[2 * i]),)  # noqa: RUF005 - no unpacking
    bit = (code & 2) != 0
    fours: tl.tensor = ()
    for i in tl.static_range(4):
        fours = fours + (tl.where(bit, eights[2 * i + 1], eights[2 * i]),)  # noqa: RUF005 - as above
    bit = (code & 4) != 0
    low, high = tl.where(bit, fours[1], fours[0]), tl.where(bit, fours[3], fours[2])
    return tl.where((code & 8) != 0, high, low)


@jit
def nf4_scales(weight: tl.tensor, table: tl.tensor, first: tl.tensor, at: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """The scales of blocks ``first + at``, in float32."""
    scale = tl.load(weight[1] + first + at, mask=inside, other=0)
    if len(weight) > 2:
        above = ((first % _NESTED_BLOCK).to(tl.int32) + at) // _NESTED_BLOCK
        nested = tl.load(weight[2] + first // _NESTED_BLOCK + above, mask=inside, other=0.0)
        scale = tl.load(table + scale.to(tl.int32), mask=inside, other=0.0) * nested + tl.load(weight[3])
    return scale


@jit
def weight_tile(
    weight: tl.tensor, strides: tl.tensor, table: tl.tensor,
    row: tl.tensor, column: tl.tensor, N: tl.tensor, K: tl.tensor,
    BLOCK_SIZE: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CHECK_ROWS: tl.constexpr, CHECK_COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr, DTYPE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Rows from ``row`` and columns from ``column`` on, ``[ROWS, COLUMNS]``, of a weight ``[N, K]``; or transposed.

    ``column`` is a multiple of COLUMNS. What is past the end is 0, or of NF4 anything finite, where that is checked.
    """
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    far_row, far_column = tl.cast(row, tl.int64), tl.cast(column, tl.int64)
    if BLOCK_SIZE == 0:
        if TRANSPOSED:
            rows, columns = rows[None, :], columns[:, None]
        else:
            rows, columns = rows[:, None], columns[None, :]
        at = weight[0] + (far_row * strides[0] + far_column * strides[1]) + (rows * strides[0] + columns * strides[1])
        inside = rows < N - row if CHECK_ROWS else columns < K - column
        if CHECK_ROWS and CHECK_COLUMNS:
            inside &= columns < K - column
        return tl.load(at, mask=inside, other=0.0)
    else:  # noqa: RET505 - a value of compile time needs both branches
        rows = rows[:, None]
        if WHOLE:
            blocks = K // BLOCK_SIZE  # of a row; its bytes are then a multiple of 16
            width = blocks * (BLOCK_SIZE // 2)
            pairs, groups = tl.arange(0, COLUMNS // 2)[None, :], tl.arange(0, max(COLUMNS // BLOCK_SIZE, 1))[None, :]
            some_pairs, some_groups = 2 * pairs < K - column, groups * BLOCK_SIZE < K - column
            if CHECK_ROWS:
                some_pairs, some_groups = some_pairs & (rows < N - row), some_groups & (rows < N - row)
            at = weight[0] + (far_row * width + column // 2) + (rows * width + pairs)
            byte = tl.load(at, mask=some_pairs, other=0)
            value = nf4_values(tl.reshape(tl.join(byte >> 4, byte & 15), [ROWS, COLUMNS]))
            first = far_row * blocks + column // BLOCK_SIZE
            scale = nf4_scales(weight, table, first, rows * blocks + groups, some_groups)
            if COLUMNS > BLOCK_SIZE:
                value = tl.reshape(value, [ROWS, COLUMNS // BLOCK_SIZE, BLOCK_SIZE]) * scale[:, :, None]
                value = tl.reshape(value, [ROWS, COLUMNS])
            else:
                value = value * scale
        else:
            columns = columns[None, :]
            inside = (rows < N - row) & (columns < K - column)
            first, at = far_row * K + column, rows * K + columns  # only the place of the first value may be far
            odd = (first % 2).to(tl.int32) + at
            byte = tl.load(weight[0] + first // 2 + odd // 2, mask=inside, other=0)
            code = (byte >> (4 - 4 * (odd % 2)).to(tl.uint8)) & 15
            at = ((first % BLOCK_SIZE).to(tl.int32) + at) // BLOCK_SIZE
            value = nf4_values(code) * nf4_scales(weight, table, first // BLOCK_SIZE, at, inside)
        value = value.to(DTYPE)
        if TRANSPOSED:
            value = tl.trans(value)
        return value


@jit
def dequantize_kernel(
    weight: tl.tensor, strides: tl.tensor, table: tl.tensor, values: tl.tensor,
    START: tl.tensor, STOP: tl.tensor, K: tl.tensor,
    BLOCK_SIZE: tl.constexpr, WHOLE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of the rows from START to STOP, ``values [STOP - START, K]``, contiguous."""
    first, column = tl.program_id(0) * BLOCK_N, tl.program_id(1) * BLOCK_K
    row = START + first
    tile = weight_tile(
        weight, strides, table, row, column, STOP, K,
        BLOCK_SIZE, WHOLE, BLOCK_N, BLOCK_K, True, True, False, values.dtype.element_ty,
    )  # fmt: skip
    rows, columns = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_K)[None, :]
    at = values + (first.to(tl.int64) * K + column) + (rows * K + columns)
    tl.store(at, tile, mask=(rows < STOP - row) & (columns < K - column))


def dequantize(weight: Stored, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
    """Rows ``start`` to ``stop`` of a weight in NF4, in ``dtype``."""
    (n, k), codes = weight.shape, weight.tensors[0]
    stop = n if stop is None else stop
    values = torch.empty(stop - start, k, dtype=dtype, device=codes.device)
    rows, columns = (32, 128) if weight.whole else (16, 32)
    with on_device(codes):
        launch(
            dequantize_kernel, (cdiv(stop - start, rows), cdiv(k, columns)), weight.tensors, weight.strides,
            scales_table([weight]), values, start, stop, k, *weight.kind, rows, columns,
            num_warps=4, **fusion([weight]),
        )  # fmt: skip
    return values


def dense(weight: Stored, dtype: torch.dtype) -> Tensor:
    """The weight for the library's products: itself, or what NF4 makes of it."""
    return dequantize(weight, dtype) if weight.block_size else weight.tensors[0]


def scales_table(weights: Sequence[Stored]) -> Tensor | None:
    """What scales that are quantised are read with, if any is."""
    return next((_nested_table(w.tensors[0].device) for w in weights if len(w.tensors) > 2), None)


@lru_cache
def _nested_table(device: torch.device) -> Tensor:
    return NESTED_TABLE.to(device)


def fusion(weights: Sequence[Stored]) -> dict[str, Any]:
    """The option of a launch that reads these: see the module."""
    return {"enable_fp_fusion": False} if any(len(w.tensors) > 2 for w in weights) else {}


def strides(tensor: Tensor | None) -> tuple[int, ...]:
    """Of a matrix that may be missing."""
    return (0, 0) if tensor is None else tensor.stride()
