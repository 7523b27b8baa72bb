"""``ds = dy left`` and ``dleft = dy^T s`` from one read of ``dy``, and whatever else wants that read.

A program owns a strip of columns and streams blocks of rows through it. ``dleft`` (and the sums over rows) stay in its
registers; ``ds`` is a sum over strips. Both are split sums, finished by :mod:`reduce` in a fixed order.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from lorafx.kernels.triton.config import Config, choose, power_class, splits, stream_configs
from lorafx.kernels.triton.device import device_of, precision
from lorafx.kernels.triton.reduce import Sums
from lorafx.kernels.triton.tiles import cdiv, dot_dtype, is_aligned, jit, launch, on_device, rank_block


@jit
def grad_up_kernel(
    dy: tl.tensor, y: tl.tensor, s: tl.tensor, left: tl.tensor, gain: tl.tensor,
    ds: tl.tensor, dleft: tl.tensor, base: tl.tensor, total: tl.tensor, dot: tl.tensor,
    M: tl.tensor, N: tl.tensor, R: tl.tensor, CHUNK: tl.tensor,
    stride_dm: tl.tensor, stride_dn: tl.tensor, stride_ym: tl.tensor, stride_yn: tl.tensor,
    stride_sm: tl.tensor, stride_sr: tl.tensor, stride_ln: tl.tensor, stride_lr: tl.tensor,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """Programs: blocks of ranks (innermost, so that they share the read of ``dy``), strips of columns, parts of M.

    ``ds [strips, M, R]``, ``dleft [parts, N, R]``, ``total`` and ``dot [parts, N]`` and ``base [M, N]`` are contiguous;
    what is None is not computed. What has no ranks is the first block's.
    """
    block, strip, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    ranks = block * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = strip * BLOCK_N + tl.arange(0, BLOCK_N)
    far = columns.to(tl.int64)
    factor = tl.load(
        left + far[:, None] * stride_ln + ranks[None, :] * stride_lr,
        mask=(columns[:, None] < N) & (ranks[None, :] < R), other=0.0,
    ).to(dy.dtype.element_ty).to(DOT)  # fmt: skip
    begin = part * CHUNK
    rows = begin + tl.arange(0, BLOCK_M)
    at_dy = dy + rows[:, None].to(tl.int64) * stride_dm + far[None, :] * stride_dn
    at_s = s + rows[:, None].to(tl.int64) * stride_sm + ranks[None, :] * stride_sr
    at_ds = ds + (strip * M + begin).to(tl.int64) * R
    of_ds = tl.arange(0, BLOCK_M)[:, None] * R + ranks[None, :]
    if y is not None:
        at_y = y + rows[:, None].to(tl.int64) * stride_ym + far[None, :] * stride_yn
        dots = tl.zeros([BLOCK_N], tl.float32)
    if gain is not None:
        at_base = base + begin.to(tl.int64) * N + strip * BLOCK_N
        of_base = tl.arange(0, BLOCK_M)[:, None] * N + tl.arange(0, BLOCK_N)[None, :]
        factors = tl.load(gain + columns, mask=columns < N, other=0.0).to(tl.float32)
    if total is not None:
        sums = tl.zeros([BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    end = min(begin + CHUNK, M)
    for first in range(begin, end, BLOCK_M):
        inside = rows[:, None] < M - (first - begin)
        whole = inside & (columns[None, :] < N)
        tile = tl.load(at_dy, mask=whole, other=0.0)
        low = tl.load(at_s, mask=inside & (ranks[None, :] < R), other=0.0)
        acc = tl.dot(tl.trans(tile).to(DOT), low.to(DOT), acc, input_precision=PRECISION)
        grad = tl.dot(tile.to(DOT), factor, input_precision=PRECISION)
        tl.store(at_ds + of_ds, grad.to(ds.dtype.element_ty), mask=inside & (ranks[None, :] < R))
        if block == 0:
            if total is not None:
                sums += tl.sum(tile.to(tl.float32), axis=0)
            if y is not None:
                dots += tl.sum(tile.to(tl.float32) * tl.load(at_y, mask=whole, other=0.0).to(tl.float32), axis=0)
            if gain is not None:
                scaled = tile.to(tl.float32) * factors[None, :]
                tl.store(at_base + of_base, scaled.to(base.dtype.element_ty), mask=whole)
        at_dy += BLOCK_M * stride_dm
        at_s += BLOCK_M * stride_sm
        at_ds += BLOCK_M * R
        if y is not None:
            at_y += BLOCK_M * stride_ym
        if gain is not None:
            at_base += BLOCK_M * N
    at_dleft = dleft + (part * N + far[:, None]) * R + ranks[None, :]
    # The bounds of ``factor``, in another form: those, kept, would fill registers during the loop.
    n_left, r_left = N - strip * BLOCK_N, R - block * BLOCK_R
    valid = (tl.arange(0, BLOCK_N)[:, None] < n_left) & (tl.arange(0, BLOCK_R)[None, :] < r_left)
    tl.store(at_dleft, acc.to(dleft.dtype.element_ty), mask=valid)
    if block == 0:
        if total is not None:
            tl.store(total + part * N + columns, sums, mask=columns < N)
        if y is not None:
            tl.store(dot + part * N + columns, dots, mask=columns < N)


Found = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def parts(m: int, n: int, r: int, config: Config, processors: int) -> tuple[int, int, int]:
    """Strips of columns, parts of M, and the rows of a part (whole blocks; at least eight of them if there are)."""
    strips, steps = cdiv(n, config.columns), cdiv(m, config.depth)
    tiles = strips * cdiv(r, config.rows)
    chunk = cdiv(steps, splits(tiles, cdiv(steps, 8), processors)) * config.depth
    return strips, cdiv(m, chunk), chunk


def grad_up(dy: Tensor, s: Tensor, left: Tensor, gain: Tensor | None, y: Tensor | None, needs_total: bool) -> Found:
    """``ds, dleft, base, total, dot`` of one layer, as :meth:`Provider.grad_up` has them.

    ``ds [M, R]`` is in dy's dtype, ``dleft [n, R]`` in left's, the sums in float32; ``base`` is dy itself without gain.
    """
    (m, n), r = dy.shape, s.shape[1]
    device, aligned, even = device_of(dy.device), is_aligned(dy), is_aligned(s, left)
    ds = torch.empty(m, r, dtype=dy.dtype, device=dy.device)
    dleft = torch.empty(n, r, dtype=left.dtype, device=dy.device)
    base = dy if gain is None else torch.empty(m, n, dtype=dy.dtype, device=dy.device)
    total = torch.empty(n, dtype=torch.float32, device=dy.device) if needs_total else None
    dot = None if y is None else torch.empty(n, dtype=torch.float32, device=dy.device)
    found = (ds, dleft, base, total, dot)
    if m == 0 or n == 0:
        for sum_over_nothing in (ds, dleft, total, dot):
            if sum_over_nothing is not None:
                sum_over_nothing.zero_()
        return found
    gain = None if gain is None else gain.contiguous()

    def run(config: Config) -> Found:
        strips, split, chunk = parts(m, n, r, config, device.processors)
        sums = Sums()
        launch(grad_up_kernel, (cdiv(r, config.rows), strips, split),
            dy, y, s, left, gain, sums.target(ds, strips), sums.target(dleft, split), base,
            None if total is None else sums.target(total, split), None if dot is None else sums.target(dot, split),
            m, n, r, chunk, *dy.stride(), *(dy if y is None else y).stride(), *s.stride(), *left.stride(),
            config.depth, config.columns, config.rows, dot_dtype(dy.dtype), precision(dy.dtype, device),
            **config.options,
        )  # fmt: skip
        sums.finish()
        return found

    operands = (dy.dtype, left.dtype, power_class(m), n, r, aligned, even)
    key = ("grad_up", device, *operands, gain is None, y is None, needs_total)
    with on_device(dy):
        return choose(key, stream_configs(n, dy.dtype.itemsize, rank_block(r), device, aligned, even), run)
