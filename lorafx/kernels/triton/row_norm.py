"""DoRA's gain without forming ``W + left right``: one read of W, the change of it kept in registers tile by tile.

With ``d = left right`` (the scaling in ``left``), row by row,

    ||w + d||^2  =  ||w||^2  +  sum over columns of d (2 w + d)

The first term is the base's alone and given, so a change of zero gives the base's norm bit for bit. The sum is the
factored formula of :mod:`lorafx.variants.row_norm` taken column by column: ``2 b.(A w) + b (A A^T) b^T``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from lorafx.kernels.triton.config import Config, choose
from lorafx.kernels.triton.device import Device, device_of, precision
from lorafx.kernels.triton.tiles import MAX_ADDED_RANKS, cdiv, dot_dtype, is_aligned, jit, launch, on_device, rank_block


@dataclass(frozen=True)
class RowGain:
    """``norm [n]`` and ``gain [n]`` (the magnitude over it) in float32, and ``left [n, R]`` = gain * left."""

    norm: Tensor
    gain: Tensor
    left: Tensor


@jit
def add_change(
    change: tl.tensor, left: tl.tensor, right: tl.tensor, start: tl.tensor, rows: tl.tensor, columns: tl.tensor,
    N: tl.tensor, K: tl.tensor, R: tl.tensor,
    stride_rr: tl.tensor, stride_rk: tl.tensor, stride_ln: tl.tensor, stride_lr: tl.tensor,
    BLOCK_R: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """``change`` + what the ranks from ``start`` on add to it."""
    ranks = start + tl.arange(0, BLOCK_R)
    at_left = left + rows[:, None].to(tl.int64) * stride_ln + ranks[None, :] * stride_lr
    at_right = right + ranks[:, None].to(tl.int64) * stride_rr + columns[None, :] * stride_rk
    a = tl.load(at_left, mask=(rows[:, None] < N) & (ranks[None, :] < R), other=0.0)
    b = tl.load(at_right, mask=(ranks[:, None] < R) & (columns[None, :] < K), other=0.0)
    return tl.dot(a.to(DOT), b.to(DOT), change, input_precision=PRECISION)


@jit
def row_gain_kernel(
    weight: tl.tensor, right: tl.tensor, left: tl.tensor, squares: tl.tensor, magnitude: tl.tensor,
    norm: tl.tensor, gain: tl.tensor, scaled: tl.tensor,
    N: tl.tensor, K: tl.tensor, R: tl.tensor,
    stride_wn: tl.tensor, stride_wk: tl.tensor, stride_rr: tl.tensor, stride_rk: tl.tensor,
    stride_ln: tl.tensor, stride_lr: tl.tensor,
    ONE_BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """A block of rows: their norms, gains, and rows of ``scaled [N, R]``, contiguous."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    far = rows.to(tl.int64)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for first in range(0, K, BLOCK_K):
        columns = (first + depth).to(tl.int64)
        inside = (rows[:, None] < N) & (columns[None, :] < K)
        w = tl.load(weight + far[:, None] * stride_wn + columns[None, :] * stride_wk, mask=inside, other=0.0)
        change = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        if ONE_BLOCK:  # apart, since only a loop without another inside it is pipelined
            change = add_change(
                change, left, right, 0, rows, columns, N, K, R, stride_rr, stride_rk, stride_ln, stride_lr,
                BLOCK_R, DOT, PRECISION,
            )  # fmt: skip
        else:
            for start in tl.range(0, R, BLOCK_R, num_stages=1):
                change = add_change(
                    change, left, right, start, rows, columns, N, K, R, stride_rr, stride_rk, stride_ln, stride_lr,
                    BLOCK_R, DOT, PRECISION,
                )  # fmt: skip
        acc += change * (2 * w.to(tl.float32) + change)
    square = tl.load(squares + rows, mask=rows < N, other=1.0).to(tl.float64) + tl.sum(acc, axis=1).to(tl.float64)
    length = tl.sqrt(tl.maximum(square, 0.0)).to(tl.float32)
    ratio = tl.load(magnitude + rows, mask=rows < N, other=0.0).to(tl.float32) / tl.where(length > 0.0, length, 1.0)
    tl.store(norm + rows, length, mask=rows < N)
    tl.store(gain + rows, ratio, mask=rows < N)
    for start in range(0, R, BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R)
        valid = (rows[:, None] < N) & (ranks[None, :] < R)
        a = tl.load(left + far[:, None] * stride_ln + ranks[None, :] * stride_lr, mask=valid, other=0.0)
        scaled_rows = (a.to(tl.float32) * ratio[:, None]).to(scaled.dtype.element_ty)
        tl.store(scaled + far[:, None] * R + ranks[None, :], scaled_rows, mask=valid)


def row_gain(weight: Tensor, right: Tensor, left: Tensor, squares: Tensor, magnitude: Tensor) -> RowGain:
    """The gain of each row of ``weight [n, k]``, from ``right [R, k]``, ``left [n, R]`` (the scaling included),
    ``squares [n]`` (float64, :func:`lorafx.variants.row_norm.compute_squares`) and ``magnitude [n]``.

    A row of zeros has the magnitude itself as its gain. Factors of one half type are multiplied exactly, wider ones
    in float32; the sum is of float32 products, added to ``squares`` in float64.
    """  # fmt: skip
    (n, k), r = weight.shape, right.shape[0]
    norm, gain = (torch.empty(n, dtype=torch.float32, device=weight.device) for _ in range(2))
    found = RowGain(norm, gain, torch.empty(n, r, dtype=left.dtype, device=weight.device))
    device, aligned = device_of(weight.device), is_aligned(weight, right)
    factors = torch.promote_types(left.dtype, right.dtype)

    def run(config: Config) -> RowGain:
        launch(row_gain_kernel, (cdiv(n, config.rows),),
            weight, right, left, squares.contiguous(), magnitude.contiguous(), norm, gain, found.left, n, k, r,
            *weight.stride(), *right.stride(), *left.stride(), r <= config.depth, config.rows,
            config.columns, config.depth, dot_dtype(factors), precision(factors, device, exact=True),
            **config.options,
        )  # fmt: skip
        return found

    if n == 0:
        return found
    with on_device(weight):
        return choose(
            ("row_gain", device, weight.dtype, factors, n, k, r, aligned), row_gain_configs(r, device, aligned), run
        )


def row_gain_configs(r: int, device: Device, aligned: bool) -> list[Config]:
    """Few rows a program, so that there are as many programs as processors; W goes through in wide blocks.

    ``depth`` is the block of ranks.
    """
    if not aligned:
        return [Config(16, 64, rank_block(r, MAX_ADDED_RANKS), 4, 2)]
    stages = 3 if device.shared >= 96 * 1024 else 2
    if r > MAX_ADDED_RANKS:
        return [Config(32, 64, rank_block(r), 4, stages), Config(16, 64, rank_block(r), 4, stages)]
    return [Config(rows, columns, rank_block(r), 4, stages) for rows, columns in ((32, 128), (16, 128), (32, 64))]
