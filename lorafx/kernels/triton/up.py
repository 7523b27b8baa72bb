"""``y = gain * (x W^T) + s left^T + b`` in one pass over the library's ``x W^T + b``, or in one kernel with it.

In the one kernel the low-rank term is in the GEMM's accumulator, and gain and bias are in its epilogue.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from lorafx.kernels.triton.config import Config, choose, gemm_configs, power_class
from lorafx.kernels.triton.device import device_of, precision
from lorafx.kernels.triton.tiles import (
    GROUP_ROWS,
    MAX_ADDED_RANKS,
    MIN_ADDED_RANKS,
    cdiv,
    dot_dtype,
    is_aligned,
    jit,
    launch,
    on_device,
    rank_block,
    tile_order,
)
from lorafx.kernels.triton.weights import Stored, dense, fusion, scales_table, strides, weight_tile


@jit
def up_kernel(
    x: tl.tensor, weight: tl.tensor, nested_table: tl.tensor, bias: tl.tensor,
    s: tl.tensor, left: tl.tensor, gain: tl.tensor, y: tl.tensor,
    M: tl.tensor, N: tl.tensor, K: tl.tensor, R: tl.tensor,
    stride_xm: tl.tensor, stride_xk: tl.tensor, weight_strides: tl.tensor,
    stride_sm: tl.tensor, stride_sr: tl.tensor, stride_ln: tl.tensor, stride_lr: tl.tensor,
    BLOCK_SIZE: tl.constexpr, WHOLE: tl.constexpr, BASE_GIVEN: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, GROUP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of ``y [M, N]``, contiguous; with ``BASE_GIVEN`` that is where ``x W^T + b`` is already."""
    tile_m, tile_n = tile_order(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    far_rows, far_columns = rows.to(tl.int64), columns.to(tl.int64)
    at_y = y + far_rows[:, None] * N + columns[None, :]
    valid = (rows[:, None] < M) & (columns[None, :] < N)
    if BASE_GIVEN:
        acc = tl.load(at_y, mask=valid, other=0.0).to(tl.float32)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        depth = tl.arange(0, BLOCK_K)
        at_x = x + far_rows[:, None] * stride_xm + depth[None, :] * stride_xk
        for first in range(0, K, BLOCK_K):
            if EVEN_K:
                a = tl.load(at_x, mask=rows[:, None] < M, other=0.0)
            else:
                a = tl.load(at_x, mask=(rows[:, None] < M) & (depth[None, :] < K - first), other=0.0)
            b = weight_tile(
                weight, weight_strides, nested_table, tile_n * BLOCK_N, first, N, K,
                BLOCK_SIZE, WHOLE, BLOCK_N, BLOCK_K, True, not EVEN_K, True, x.dtype.element_ty,
            )  # fmt: skip
            acc = tl.dot(a.to(DOT), b.to(DOT), acc, input_precision=PRECISION)
            at_x += BLOCK_K * stride_xk
    if gain is not None:
        factor = tl.load(gain + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
        if BASE_GIVEN:  # in this form a gain of 1 changes no bit
            unbiased = acc
            if bias is not None:
                unbiased = acc - tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
            acc += (factor - 1.0) * unbiased
        else:
            acc *= factor
    if s is not None:
        for first in tl.range(0, R, BLOCK_R, num_stages=1):
            ranks = first + tl.arange(0, BLOCK_R)
            at_s = s + far_rows[:, None] * stride_sm + ranks[None, :] * stride_sr
            at_left = left + far_columns[None, :] * stride_ln + ranks[:, None] * stride_lr
            low = tl.load(at_s, mask=(rows[:, None] < M) & (ranks[None, :] < R), other=0.0)
            side = tl.load(at_left, mask=(columns[None, :] < N) & (ranks[:, None] < R), other=0.0)
            acc = tl.dot(low.to(DOT), side.to(s.dtype.element_ty).to(DOT), acc, input_precision=PRECISION)
    if bias is not None and not BASE_GIVEN:
        acc += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    tl.store(at_y, acc.to(y.dtype.element_ty), mask=valid)


def up(
    x: Tensor, weight: Stored, bias: Tensor | None, s: Tensor | None = None, left: Tensor | None = None,
    gain: Tensor | None = None, fused: bool | None = None,
) -> Tensor:  # fmt: skip
    """``y [M, n]`` in x's dtype, contiguous; ``x [..., k]``, ``weight [n, k]``, ``s [M, R]``, ``left [n, R]``.

    The large product is the library's, of ``x`` as it is, so that a gain of 1 and a ``left`` of 0 give the frozen
    layer's bits. With ``fused``, or where tuning finds it to be faster, it is this kernel's, which sums in an order
    of its own: then they are equal to rounding. With a weight in NF4 it is this kernel's too, unless tuning finds that
    the library is the faster even with the weight to dequantise first; and so is the frozen layer's, without ``s``.
    """
    k, n = x.shape[-1], weight.shape[0]
    device, rows = device_of(x.device), x.reshape(-1, k)
    m, r = rows.shape[0], 0 if s is None else s.shape[1]
    packed = weight.block_size > 0
    fused = packed if fused is None else fused
    bias, gain = (None if v is None else v.contiguous() for v in (bias, gain))

    aligned = is_aligned(rows) and weight.aligned
    even = s is None or left is None or is_aligned(s, left)  # otherwise an address in a register for each element
    block_r = rank_block(r, MAX_ADDED_RANKS if aligned and even else MIN_ADDED_RANKS)

    def run(config: Config) -> Tensor:
        if config.library:
            y = F.linear(x, dense(weight, x.dtype), bias).reshape(m, n).contiguous()
        else:
            y = torch.empty(m, n, dtype=x.dtype, device=x.device)
        grid = (cdiv(m, config.rows) * cdiv(n, config.columns),)
        launch(up_kernel, grid,
            rows, weight.tensors, scales_table([weight]), bias, s, left, gain, y, m, n, k, r,
            *rows.stride(), weight.strides, *strides(s), *strides(left),
            *weight.kind, config.library, k % config.depth == 0,
            config.rows, config.columns, config.depth, block_r, GROUP_ROWS,
            dot_dtype(x.dtype), precision(x.dtype, device), **config.options, **fusion([weight]),
        )  # fmt: skip
        return y

    if m == 0 or n == 0:
        return torch.empty(m, n, dtype=x.dtype, device=x.device)
    factors = None if left is None else left.dtype
    key = ("up", device, x.dtype, factors, power_class(m), n, k, r, aligned, fused, weight.kind, len(weight.tensors))
    with on_device(x):
        return choose(key, gemm_configs(m, n, x.dtype.itemsize, device, aligned, fused, packed), run)
