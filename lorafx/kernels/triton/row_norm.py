"""The row norms of ``W + scaling b a`` without forming it: one read of W, the change kept in registers tile by tile.

With ``d = scaling b a``, row by row,

    ||w + d||^2  =  ||w||^2  +  sum over columns of d (2 w + d)

The first term is the base's alone and given, so a change of zero gives the base's norm bit for bit. The sum is the
factored formula of :mod:`lorafx.variants.row_norm` taken column by column: ``2 b.(A w) + b (A A^T) b^T``.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from lorafx.kernels.triton.config import Config, choose, norm_configs
from lorafx.kernels.triton.device import device_of, precision
from lorafx.kernels.triton.tiles import cdiv, dot_dtype, is_aligned, jit, launch, on_device


@jit
def add_change(
    change: tl.tensor, b: tl.tensor, a: tl.tensor, start: tl.tensor, rows: tl.tensor, columns: tl.tensor,
    N: tl.tensor, K: tl.tensor, R: tl.tensor,
    stride_ar: tl.tensor, stride_ak: tl.tensor, stride_bn: tl.tensor, stride_br: tl.tensor,
    BLOCK_R: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """``change`` + what the ranks from ``start`` on add to it."""
    ranks = start + tl.arange(0, BLOCK_R)
    at_b = b + rows[:, None].to(tl.int64) * stride_bn + ranks[None, :] * stride_br
    at_a = a + ranks[:, None] * stride_ar + columns[None, :] * stride_ak
    left = tl.load(at_b, mask=(rows[:, None] < N) & (ranks[None, :] < R), other=0.0)
    right = tl.load(at_a, mask=(ranks[:, None] < R) & (columns[None, :] < K), other=0.0)
    return tl.dot(left.to(DOT), right.to(DOT), change, input_precision=PRECISION)


@jit
def row_norm_kernel(
    weight: tl.tensor, a: tl.tensor, b: tl.tensor, squares: tl.tensor, norm: tl.tensor,
    scaling: tl.tensor, N: tl.tensor, K: tl.tensor, R: tl.tensor,
    stride_wn: tl.tensor, stride_wk: tl.tensor, stride_ar: tl.tensor, stride_ak: tl.tensor,
    stride_bn: tl.tensor, stride_br: tl.tensor,
    ONE_BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """The norms of a block of rows."""
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
                change, b, a, 0, rows, columns, N, K, R, stride_ar, stride_ak, stride_bn, stride_br,
                BLOCK_R, DOT, PRECISION,
            )  # fmt: skip
        else:
            for start in tl.range(0, R, BLOCK_R, num_stages=1):
                change = add_change(
                    change, b, a, start, rows, columns, N, K, R, stride_ar, stride_ak, stride_bn, stride_br,
                    BLOCK_R, DOT, PRECISION,
                )  # fmt: skip
        change *= scaling
        acc += change * (2 * w.to(tl.float32) + change)
    square = tl.load(squares + rows, mask=rows < N, other=1.0).to(tl.float64) + tl.sum(acc, axis=1).to(tl.float64)
    tl.store(norm + rows, tl.sqrt(tl.maximum(square, 0.0)).to(tl.float32), mask=rows < N)


def row_norm(weight: Tensor, a: Tensor, b: Tensor, squares: Tensor, scaling: float) -> Tensor:
    """The norm of each row of ``weight [n, k] + scaling b [n, r] a [r, k]``: float32 ``[n]``.

    ``squares [n]`` is the base's term (float64, :func:`lorafx.variants.row_norm.compute_squares`). Factors of one half
    type are multiplied exactly, wider ones in float32; the sum is of float32 products, added to ``squares`` in float64.
    """
    (n, k), r = weight.shape, a.shape[0]
    norm = torch.empty(n, dtype=torch.float32, device=weight.device)
    device, aligned = device_of(weight.device), is_aligned(weight, a)
    factors = torch.promote_types(a.dtype, b.dtype)

    def run(config: Config) -> Tensor:
        launch(row_norm_kernel, (cdiv(n, config.rows),),
            weight, a, b, squares.contiguous(), norm, scaling, n, k, r,
            *weight.stride(), *a.stride(), *b.stride(), r <= config.depth, config.rows,
            config.columns, config.depth, dot_dtype(factors), precision(factors, device, exact=True),
            **config.options,
        )  # fmt: skip
        return norm

    if n == 0:
        return norm
    key = ("row_norm", device, weight.dtype, a.dtype, b.dtype, n, k, r, aligned)
    with on_device(weight):
        return choose(key, norm_configs(r, factors.itemsize, device, aligned), run)
