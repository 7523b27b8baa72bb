"""``s = D(x) right^T``: all adapters of all siblings in one launch and one read of ``x``, dropout inside."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from lorafx.kernels.triton.config import Config, choose, power_class, skinny_configs, splits
from lorafx.kernels.triton.device import device_of, precision
from lorafx.kernels.triton.dropout import MAX_COLUMNS, Plan, keep, share
from lorafx.kernels.triton.reduce import Sums
from lorafx.kernels.triton.tiles import cdiv, dot_dtype, is_aligned, jit, launch, on_device, zeros


@jit
def down_kernel(
    x: tl.tensor, right: tl.tensor, seed: tl.tensor, out: tl.tensor,
    M: tl.tensor, K: tl.tensor, R: tl.tensor, CHUNK: tl.tensor,
    stride_xm: tl.tensor, stride_xk: tl.tensor, stride_rr: tl.tensor, stride_rk: tl.tensor,
    STARTS: tl.constexpr, STOPS: tl.constexpr, WIDTHS: tl.constexpr, BRANCHES: tl.constexpr, DROPS: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """Programs: blocks of rows, parts of the sum. Each tile of ``x`` is read once, and masked for each piece.

    ``out`` is ``[parts, M, R]``, contiguous.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(1)
    begin = part * CHUNK
    columns = tl.arange(0, BLOCK_K)
    at_x = x + rows[:, None].to(tl.int64) * stride_xm + (begin + columns[None, :]).to(tl.int64) * stride_xk
    at_right = right + (begin + columns[:, None]).to(tl.int64) * stride_rk
    if seed is not None:
        key = tl.load(seed)
    accs: tl.tensor = ()
    for i in tl.static_range(len(DROPS)):
        accs = accs + (zeros(BLOCK_M, WIDTHS[i]),)  # noqa: RUF005 - Triton has no unpacking
    for first in range(begin, min(begin + CHUNK, K), BLOCK_K):
        if EVEN_K:
            tile = tl.load(at_x, mask=rows[:, None] < M, other=0.0)
        else:
            tile = tl.load(at_x, mask=(rows[:, None] < M) & (columns[None, :] < K - first), other=0.0)
        sums: tl.tensor = ()
        for i in tl.static_range(len(DROPS)):
            ranks = STARTS[i] + tl.arange(0, WIDTHS[i])
            inside = ranks[None, :] < STOPS[i]
            if not EVEN_K:
                inside &= columns[:, None] < K - first
            factor = tl.load(at_right + ranks[None, :] * stride_rr, mask=inside, other=0.0)
            seen = tile
            if DROPS[i] > 0:
                seen = tl.where(keep(key, BRANCHES[i], rows, first, BLOCK_K, DROPS[i]), tile, 0.0)
            factor = factor.to(tile.dtype).to(DOT)
            sums = sums + (tl.dot(seen.to(DOT), factor, accs[i], input_precision=PRECISION),)  # noqa: RUF005 - as above
        accs = sums
        at_x += BLOCK_K * stride_xk
        at_right += BLOCK_K * stride_rk
    for i in tl.static_range(len(DROPS)):
        ranks = STARTS[i] + tl.arange(0, WIDTHS[i])
        at_out = out + (part * M + rows[:, None]).to(tl.int64) * R + ranks[None, :]
        total = (accs[i] * share(DROPS[i])).to(out.dtype.element_ty)
        tl.store(at_out, total, mask=(rows[:, None] < M) & (ranks[None, :] < STOPS[i]))


def parts(m: int, k: int, config: Config, processors: int) -> tuple[int, int]:
    """In how many parts the sum over k is taken, and how long each is (whole steps; at least four if there are)."""
    steps = cdiv(k, config.depth)
    chunk = cdiv(steps, splits(cdiv(m, config.rows), cdiv(steps, 4), processors)) * config.depth
    return cdiv(k, chunk), chunk


def down(x: Tensor, right: Tensor, plan: Plan, seed: Tensor | None) -> Tensor:
    """``s [M, R]`` in x's dtype, contiguous, from ``x [M, k]`` and ``right [R, k]``; ``seed`` where anything drops."""
    (m, k), r = x.shape, right.shape[0]
    s = torch.empty(m, r, dtype=x.dtype, device=x.device)
    if m == 0 or r == 0:
        return s
    device = device_of(x.device)
    aligned = is_aligned(x, right)

    def run(config: Config) -> Tensor:
        split, chunk = parts(m, k, config, device.processors)
        sums = Sums()
        out = sums.target(s, split)
        for pack in plan.packs(limit):
            launch(
                down_kernel, (cdiv(m, config.rows), split),
                x, right, seed, out, m, k, r, chunk, *x.stride(), *right.stride(), *pack.columns,
                k % config.depth == 0, config.rows, config.depth, dot_dtype(x.dtype), precision(x.dtype, device),
                **config.options,
            )  # fmt: skip
        sums.finish()
        return s

    masks = sum(drop > 0 for drop in plan.drops)
    limit = MAX_COLUMNS if masks < 2 or x.dtype.itemsize < 4 else MAX_COLUMNS // 2
    columns = min(plan.padded, limit)
    key = ("down", device, x.dtype, right.dtype, power_class(m), k, r, plan, aligned)
    with on_device(x):
        return choose(key, skinny_configs(m, x.dtype.itemsize, columns, device, aligned, masks), run)
