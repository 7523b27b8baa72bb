"""``dx = sum_i (gain_i dy_i) W_i + D(ds right)`` in one kernel, and ``dright = ds^T D(x)``, the masks drawn again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from lorafx.kernels.triton.config import (
    Config,
    choose,
    gemm_configs,
    power_class,
    splits,
    stream_configs,
)
from lorafx.kernels.triton.device import device_of, precision
from lorafx.kernels.triton.dropout import MAX_COLUMNS, Plan, keep, share, table
from lorafx.kernels.triton.reduce import Sums
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
    zeros,
)
from lorafx.kernels.triton.weights import Stored, dense, fusion, scales_table, strides, weight_tile


@jit
def add_product(
    acc: tl.tensor, ds: tl.tensor, right: tl.tensor, start: tl.tensor, stop: tl.tensor,
    rows: tl.tensor, columns: tl.tensor, M: tl.tensor, K: tl.tensor,
    stride_sm: tl.tensor, stride_sr: tl.tensor, stride_rr: tl.tensor, stride_rk: tl.tensor,
    BLOCK_R: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """``acc`` + the product of columns ``start`` to ``stop`` of ``ds`` and those rows of ``right``."""
    for first in tl.range(start, stop, BLOCK_R, num_stages=1):
        ranks = first + tl.arange(0, BLOCK_R)
        at_ds = ds + rows[:, None] * stride_sm + ranks[None, :] * stride_sr
        at_right = right + ranks[:, None] * stride_rr + columns[None, :] * stride_rk
        grad = tl.load(at_ds, mask=(rows[:, None] < M) & (ranks[None, :] < stop), other=0.0)
        factor = tl.load(at_right, mask=(ranks[:, None] < stop) & (columns[None, :] < K), other=0.0)
        acc = tl.dot(grad.to(DOT), factor.to(grad.dtype).to(DOT), acc, input_precision=PRECISION)
    return acc


@jit
def dx_kernel(
    bases: tl.tensor, weights: tl.tensor, nested_table: tl.tensor,
    ds: tl.tensor, right: tl.tensor, seed: tl.tensor, dx: tl.tensor,
    M: tl.tensor, K: tl.tensor, widths: tl.tensor, base_strides: tl.tensor, weight_strides: tl.tensor,
    stride_sm: tl.tensor, stride_sr: tl.tensor, stride_rr: tl.tensor, stride_rk: tl.tensor,
    pieces: tl.tensor, PIECES: tl.tensor, BLOCK_R: tl.constexpr,
    BLOCK_SIZES: tl.constexpr, WHOLE: tl.constexpr, BASE_GIVEN: tl.constexpr, EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of ``dx [M, K]``, contiguous; with ``BASE_GIVEN`` that is where the sum over siblings is already.

    ``bases[i] [M, widths[i]]`` and ``weights[i] [widths[i], K]``; a pair of strides each. ``pieces`` is the table of
    the plan's pieces (:func:`~lorafx.kernels.triton.dropout.table`), None if there are none.
    """
    tile_m, tile_k = tile_order(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K), GROUP)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    first_column = tile_k * BLOCK_K
    columns = first_column + tl.arange(0, BLOCK_K)
    far_rows, far_columns = rows.to(tl.int64), columns.to(tl.int64)
    if seed is not None:
        key = tl.load(seed)
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    if pieces is not None:
        for piece in tl.range(0, PIECES, num_stages=1):  # a loop, not unrolled: one piece's registers at a time
            start, stop = tl.load(pieces + 4 * piece), tl.load(pieces + 4 * piece + 1)
            if seed is None:
                acc = add_product(
                    acc, ds, right, start, stop, far_rows, far_columns, M, K,
                    stride_sm, stride_sr, stride_rr, stride_rk, BLOCK_R, DOT, PRECISION,
                )  # fmt: skip
            else:
                low = add_product(
                    zeros(BLOCK_M, BLOCK_K), ds, right, start, stop, far_rows, far_columns, M, K,
                    stride_sm, stride_sr, stride_rr, stride_rk, BLOCK_R, DOT, PRECISION,
                )  # fmt: skip
                drop = tl.load(pieces + 4 * piece + 3)
                low *= tl.where(drop < 65536, 65536.0 / tl.maximum(65536 - drop, 1).to(tl.float32), 0.0)
                if drop > 0:
                    kept = keep(key, tl.load(pieces + 4 * piece + 2), rows, first_column, BLOCK_K, drop)
                    low = tl.where(kept, low, 0.0)
                acc += low
    at_dx = dx + far_rows[:, None] * K + columns[None, :]
    valid = (rows[:, None] < M) & (columns[None, :] < K)
    if BASE_GIVEN:
        acc += tl.load(at_dx, mask=valid, other=0.0).to(tl.float32)
    else:
        for i in tl.static_range(len(bases)):
            depth = tl.arange(0, BLOCK_N)
            at_base = bases[i] + far_rows[:, None] * base_strides[i][0] + depth[None, :] * base_strides[i][1]
            for first in range(0, widths[i], BLOCK_N):
                if EVEN_N:
                    a = tl.load(at_base, mask=rows[:, None] < M, other=0.0)
                else:
                    a = tl.load(at_base, mask=(rows[:, None] < M) & (depth[None, :] < widths[i] - first), other=0.0)
                b = weight_tile(
                    weights[i], weight_strides[i], nested_table, first, first_column, widths[i], K,
                    BLOCK_SIZES[i], WHOLE[i], BLOCK_N, BLOCK_K, not EVEN_N, True, False, dx.dtype.element_ty,
                )  # fmt: skip
                acc = tl.dot(a.to(DOT), b.to(DOT), acc, input_precision=PRECISION)
                at_base += BLOCK_N * base_strides[i][1]
    tl.store(at_dx, acc.to(dx.dtype.element_ty), mask=valid)


def grad_x(
    bases: Sequence[Tensor], weights: Sequence[Stored], ds: Tensor | None = None, right: Tensor | None = None,
    plan: Plan | None = None, seed: Tensor | None = None, fused: bool | None = None,
) -> Tensor:  # fmt: skip
    """``dx [M, k]`` from ``bases[i] [M, n_i]``, ``weights[i] [n_i, k]``, ``ds [M, R]`` and ``right [R, k]``.

    Either of the two sums may be of nothing. By default the large products are this kernel's for half types, and
    wherever a weight is in NF4; for float32 they are the library's, whose GEMM keeps PyTorch's precision settings to
    the letter.
    """
    given = bases[0] if ds is None else ds
    m, k, dtype = given.shape[0], weights[0].shape[1] if right is None else right.shape[1], given.dtype
    packed = any(w.block_size for w in weights)
    fused = dtype.itemsize < 4 or packed or not weights if fused is None else fused
    device = device_of(given.device)
    widths = tuple(b.shape[1] for b in bases)

    aligned = is_aligned(*bases) and all(w.aligned for w in weights)
    widest = max(plan.widths) if plan else MIN_ADDED_RANKS
    block_r = rank_block(widest, MAX_ADDED_RANKS if aligned and seed is None else MIN_ADDED_RANKS)
    pieces = None if plan is None else table(plan, given.device)

    def run(config: Config) -> Tensor:
        if config.library:
            dx = bases[0] @ dense(weights[0], dtype)
            for base, weight in zip(bases[1:], weights[1:], strict=True):
                dx.addmm_(base, dense(weight, dtype))
        else:
            dx = torch.empty(m, k, dtype=dtype, device=given.device)
        launch(
            dx_kernel, (cdiv(m, config.rows) * cdiv(k, config.columns),),
            tuple(bases), tuple(w.tensors for w in weights), scales_table(weights), ds, right, seed, dx, m, k, widths,
            tuple(b.stride() for b in bases), tuple(w.strides for w in weights), *strides(ds), *strides(right),
            pieces, len(plan.drops) if plan else 0, block_r,
            tuple(w.block_size for w in weights), tuple(w.whole for w in weights), config.library,
            all(n % config.depth == 0 for n in widths),
            config.rows, config.columns, config.depth, GROUP_ROWS,
            dot_dtype(dtype), precision(dtype, device), **config.options, **fusion(weights),
        )  # fmt: skip
        return dx

    if m == 0 or k == 0:
        return torch.empty(m, k, dtype=dtype, device=given.device)
    factors = None if right is None else right.dtype
    kinds = tuple((w.kind, len(w.tensors)) for w in weights)
    key = ("grad_x", device, dtype, factors, power_class(m), k, widths, plan, aligned, fused, kinds)
    with on_device(given):
        return choose(key, gemm_configs(m, k, dtype.itemsize, device, aligned, fused, packed), run)


@jit
def dright_kernel(
    ds: tl.tensor, x: tl.tensor, seed: tl.tensor, dright: tl.tensor,
    M: tl.tensor, K: tl.tensor, R: tl.tensor, CHUNK: tl.tensor,
    stride_sm: tl.tensor, stride_sr: tl.tensor, stride_xm: tl.tensor, stride_xk: tl.tensor,
    STARTS: tl.constexpr, STOPS: tl.constexpr, WIDTHS: tl.constexpr, BRANCHES: tl.constexpr, DROPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """Programs: strips of columns, parts of M. Each tile of ``x`` is read once, and masked for each piece.

    ``dright`` is ``[parts, R, K]``, contiguous.
    """
    first_column = tl.program_id(0) * BLOCK_K
    columns = first_column + tl.arange(0, BLOCK_K)
    part = tl.program_id(1)
    begin = part * CHUNK
    rows = begin + tl.arange(0, BLOCK_M)
    at_x = x + rows[:, None].to(tl.int64) * stride_xm + columns[None, :].to(tl.int64) * stride_xk
    at_ds = ds + rows[None, :].to(tl.int64) * stride_sm
    if seed is not None:
        key = tl.load(seed)
    accs: tl.tensor = ()
    for i in tl.static_range(len(DROPS)):
        accs = accs + (zeros(WIDTHS[i], BLOCK_K),)  # noqa: RUF005 - Triton has no unpacking
    end = min(begin + CHUNK, M)
    for first in range(begin, end, BLOCK_M):
        more = M - (first - begin)
        tile = tl.load(at_x, mask=(rows[:, None] < more) & (columns[None, :] < K), other=0.0)
        sums: tl.tensor = ()
        for i in tl.static_range(len(DROPS)):
            ranks = STARTS[i] + tl.arange(0, WIDTHS[i])
            inside = (ranks[:, None] < STOPS[i]) & (rows[None, :] < more)
            grad = tl.load(at_ds + ranks[:, None] * stride_sr, mask=inside, other=0.0)
            seen = tile
            if DROPS[i] > 0:
                kept = keep(key, BRANCHES[i], rows + (first - begin), first_column, BLOCK_K, DROPS[i])
                seen = tl.where(kept, tile, 0.0)
            sums = sums + (tl.dot(grad.to(DOT), seen.to(DOT), accs[i], input_precision=PRECISION),)  # noqa: RUF005
        accs = sums
        at_x += BLOCK_M * stride_xm
        at_ds += BLOCK_M * stride_sm
    for i in tl.static_range(len(DROPS)):
        ranks = STARTS[i] + tl.arange(0, WIDTHS[i])
        at_dright = dright + (part * R + ranks[:, None]).to(tl.int64) * K + columns[None, :]
        total = (accs[i] * share(DROPS[i])).to(dright.dtype.element_ty)
        tl.store(at_dright, total, mask=(ranks[:, None] < STOPS[i]) & (columns[None, :] < K))


def parts(m: int, k: int, config: Config, processors: int) -> tuple[int, int]:
    """Parts of M, and the rows of a part (whole blocks; at least eight of them if there are)."""
    steps = cdiv(m, config.depth)
    chunk = cdiv(steps, splits(cdiv(k, config.columns), cdiv(steps, 8), processors)) * config.depth
    return cdiv(m, chunk), chunk


def grad_right(ds: Tensor, x: Tensor, plan: Plan, seed: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``dright [R, k]`` in ``dtype``, contiguous, from ``ds [M, R]`` and ``x [M, k]``."""
    (m, k), r = x.shape, ds.shape[1]
    dright = torch.empty(r, k, dtype=dtype, device=x.device)
    if m == 0 or r == 0:
        return dright.zero_()
    device = device_of(x.device)
    aligned = is_aligned(x, ds)

    def run(config: Config) -> Tensor:
        split, chunk = parts(m, k, config, device.processors)
        sums = Sums()
        out = sums.target(dright, split)
        for pack in plan.packs(MAX_COLUMNS):
            launch(
                dright_kernel, (cdiv(k, config.columns), split),
                ds, x, seed, out, m, k, r, chunk, *ds.stride(), *x.stride(), *pack.columns,
                config.depth, config.columns, dot_dtype(x.dtype), precision(x.dtype, device), **config.options,
            )  # fmt: skip
        sums.finish()
        return dright

    columns = min(plan.padded, MAX_COLUMNS)
    key = ("grad_right", device, x.dtype, dtype, power_class(m), k, r, plan, aligned)
    with on_device(x):
        return choose(key, stream_configs(k, x.dtype.itemsize, columns, device, aligned), run)
