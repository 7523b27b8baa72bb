"""``s = D(x) right^T``: all adapters of all siblings in one launch and one read of ``x``, dropout inside."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from lorafx.kernels.triton.config import Config, choose, power_class, skinny_configs, splits
from lorafx.kernels.triton.device import device_of, precision
from lorafx.kernels.triton.dropout import Plan, keep, kept_share
from lorafx.kernels.triton.reduce import Sums
from lorafx.kernels.triton.tiles import cdiv, dot_dtype, jit, launch, on_device, rank_block


@jit
def down_kernel(
    x: tl.tensor, right: tl.tensor, seed: tl.tensor, out: tl.tensor,
    M: tl.tensor, K: tl.tensor, R: tl.tensor, CHUNK: tl.tensor,
    stride_xm: tl.tensor, stride_xk: tl.tensor, stride_rr: tl.tensor, stride_rk: tl.tensor,
    STARTS: tl.constexpr, DROPS: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """Programs: blocks of ranks (innermost, so that they share the read of ``x``), blocks of rows, parts of the sum.

    Each group of columns (see :class:`Plan`) takes its own columns of the product with its own mask of the one tile
    of ``x`` that is read for all. ``out`` is ``[parts, M, R]``, contiguous.
    """
    ranks = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(2)
    begin = part * CHUNK
    columns = tl.arange(0, BLOCK_K)
    at_x = x + rows[:, None].to(tl.int64) * stride_xm + (begin + columns[None, :]).to(tl.int64) * stride_xk
    at_right = right + ranks[None, :].to(tl.int64) * stride_rr + (begin + columns[:, None]).to(tl.int64) * stride_rk
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    if seed is not None:
        key = tl.load(seed)
    for first in range(begin, min(begin + CHUNK, K), BLOCK_K):
        if EVEN_K:
            tile = tl.load(at_x, mask=rows[:, None] < M, other=0.0)
            factor = tl.load(at_right, mask=ranks[None, :] < R, other=0.0)
        else:
            tile = tl.load(at_x, mask=(rows[:, None] < M) & (columns[None, :] < K - first), other=0.0)
            factor = tl.load(at_right, mask=(ranks[None, :] < R) & (columns[:, None] < K - first), other=0.0)
        factor = factor.to(tile.dtype).to(DOT)
        for g in tl.static_range(len(DROPS)):
            seen = tile
            if DROPS[g] > 0:
                seen = tl.where(keep(key, g, rows, first, BLOCK_K, DROPS[g]), tile, 0.0)
            sums = tl.dot(seen.to(DOT), factor, acc, input_precision=PRECISION)
            if len(DROPS) > 1:
                sums = tl.where(((ranks >= STARTS[g]) & (ranks < STARTS[g + 1]))[None, :], sums, acc)
            acc = sums
        at_x += BLOCK_K * stride_xk
        at_right += BLOCK_K * stride_rk
    acc *= kept_share(STARTS, DROPS, ranks)[None, :]
    at_out = out + (part * M + rows[:, None]).to(tl.int64) * R + ranks[None, :]
    tl.store(at_out, acc.to(out.dtype.element_ty), mask=(rows[:, None] < M) & (ranks[None, :] < R))


def parts(m: int, k: int, r: int, config: Config, processors: int) -> tuple[int, int]:
    """In how many parts the sum over k is taken, and how long each is (whole steps)."""
    steps = cdiv(k, config.depth)
    tiles = cdiv(m, config.rows) * cdiv(r, config.columns)
    chunk = cdiv(steps, splits(tiles, cdiv(steps, 4), processors)) * config.depth
    return cdiv(k, chunk), chunk


def down(x: Tensor, right: Tensor, plan: Plan, seed: Tensor | None) -> Tensor:
    """``s [M, R]`` in x's dtype, contiguous, from ``x [M, k]`` and ``right [R, k]``; ``seed`` where anything drops."""
    (m, k), r = x.shape, right.shape[0]
    s = torch.empty(m, r, dtype=x.dtype, device=x.device)
    if m == 0 or r == 0:
        return s
    part = device_of(x.device)

    def run(config: Config) -> Tensor:
        split, chunk = parts(m, k, r, config, part.processors)
        sums = Sums()
        grid = (cdiv(r, config.columns), cdiv(m, config.rows), split)
        launch(down_kernel, grid,
            x, right, seed, sums.target(s, split), m, k, r, chunk, *x.stride(), *right.stride(),
            plan.starts, plan.drops, k % config.depth == 0, config.rows, config.columns, config.depth,
            dot_dtype(x.dtype), precision(x.dtype, part), **config.options,
        )  # fmt: skip
        sums.finish()
        return s

    key = ("down", part, x.dtype, right.dtype, power_class(m), k, r, plan)
    with on_device(x):
        return choose(key, skinny_configs(m, x.dtype.itemsize, rank_block(r), part.shared), run)
