"""Dropout masks that are computed where they are needed, forward and backward, and stored nowhere.

The random bits of element ``(row, column)`` of adapter ``g``'s input are 16 of the 128 that Philox4x32 (Salmon et al.,
SC 2011) gives for the key ``seed`` and the counter ``(column // 8, row, g, 0)``. So a mask depends on its seed and its
place alone, never on how a kernel is tiled. Seven rounds are the fewest that pass BigCrush there (table 2). An element
is dropped where its bits are below ``round(p * 2^16)``; what is kept is divided by exactly the share that is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton.language as tl
from torch import Tensor

from lorafx.kernels.triton.tiles import MAX_RANKS, cdiv, jit, launch, on_device, rank_block

#: Columns of ``s``, padded, that one launch takes at most; more are taken by several, each with its read of ``x``.
MAX_COLUMNS = 192


@dataclass(frozen=True)
class Plan:
    """Columns of ``s`` in pieces of at most ``MAX_RANKS``, each of one adapter or of neighbours without dropout.

    Piece ``i`` is columns ``starts[i]`` to ``stops[i]``, in a block of ``widths[i]``; its mask is that of
    ``branches[i]`` (the adapter's number) with the threshold ``drops[i]``, of 2^16.
    """

    starts: tuple[int, ...]
    stops: tuple[int, ...]
    widths: tuple[int, ...]
    branches: tuple[int, ...]
    drops: tuple[int, ...]

    @property
    def padded(self) -> int:
        """The widths of all blocks together."""
        return sum(self.widths)

    def packs(self, limit: int) -> list[Plan]:
        """Plans of at most ``limit`` padded columns (or one piece) each: what one launch can hold in registers."""
        found: list[list[int]] = []
        for i, width in enumerate(self.widths):
            if not found or sum(self.widths[j] for j in found[-1]) + width > limit:
                found.append([])
            found[-1].append(i)
        return [Plan(*(tuple(column[i] for i in pack) for column in self.columns)) for pack in found]

    @property
    def columns(self) -> tuple[tuple[int, ...], ...]:
        """As the kernels take it."""
        return self.starts, self.stops, self.widths, self.branches, self.drops


@lru_cache(maxsize=1024)
def plan(ranks: tuple[int, ...], p: tuple[float, ...]) -> Plan:
    """The pieces that dropout makes of the columns of adapters of these ranks."""
    groups: list[tuple[int, int, int, int]] = []  # start, stop, branch, drop
    at = 0
    for branch, (r, chance) in enumerate(zip(ranks, p, strict=True)):
        drop = round(chance * 65536)
        if groups and groups[-1][3] == drop == 0:
            groups[-1] = (groups[-1][0], at + r, groups[-1][2], 0)
        else:
            groups.append((at, at + r, branch, drop))
        at += r
    pieces = [
        (first, min(first + MAX_RANKS, stop), branch, drop)
        for start, stop, branch, drop in groups
        for first in range(start, stop, MAX_RANKS)
    ]
    starts, stops, branches, drops = (tuple(c) for c in zip(*pieces, strict=True)) if pieces else ((),) * 4
    return Plan(starts, stops, tuple(rank_block(b - a) for a, b in zip(starts, stops, strict=True)), branches, drops)


@lru_cache(maxsize=1024)
def table(plan: Plan, device: torch.device) -> Tensor:
    """The pieces of ``plan`` as int32 ``[pieces, 4]`` on ``device``: start, stop, branch, drop."""
    columns = (plan.starts, plan.stops, plan.branches, plan.drops)
    return torch.tensor(columns, dtype=torch.int32).mT.contiguous().to(device)


@jit
def keep(
    seed: tl.tensor, branch: tl.tensor, rows: tl.tensor, first: tl.tensor, WIDTH: tl.constexpr, drop: tl.tensor
) -> tl.tensor:
    """Which elements are kept, ``[rows, WIDTH]``, of the columns from ``first`` on (a multiple of 8)."""
    draws = (first // 8 + tl.arange(0, WIDTH // 8)).to(tl.uint32)
    zero = (rows[:, None] * 0).to(tl.uint32) + draws[None, :] * 0
    a, b, c, d = tl.philox(seed, zero + draws[None, :], zero + rows[:, None].to(tl.uint32), zero + branch, zero, 7)
    words = tl.join(tl.join(a, c), tl.join(b, d))
    bits = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(bits, [bits.shape[0], WIDTH]) >= drop


@jit
def share(DROP: tl.constexpr) -> tl.tensor:
    """What is kept is multiplied with this."""
    if DROP < 65536:
        return 65536.0 / (65536 - DROP)
    else:  # noqa: RET505 - a value of compile time needs both branches
        return 0.0


@jit
def mask_kernel(
    seed: tl.tensor, out: tl.tensor, M: tl.tensor, K: tl.tensor,
    BRANCH: tl.constexpr, DROP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
) -> None:  # fmt: skip
    """The mask of one adapter, written out."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_K
    columns = first + tl.arange(0, BLOCK_K)
    kept = keep(tl.load(seed), BRANCH, rows, first, BLOCK_K, DROP)
    at = out + rows[:, None].to(tl.int64) * K + columns[None, :]
    tl.store(at, kept.to(tl.int8), mask=(rows[:, None] < M) & (columns[None, :] < K))


def mask(seed: Tensor, branch: int, p: float, shape: tuple[int, int]) -> Tensor:
    """The mask ``[M, k]`` (bool: what is kept) that the kernels apply to the input of adapter ``branch``.

    For tests and for looking at: no kernel reads it.
    """
    m, k = shape
    out = torch.empty(m, k, dtype=torch.int8, device=seed.device)
    with on_device(seed):
        launch(
            mask_kernel, (cdiv(m, 32), cdiv(k, 128)), seed, out, m, k, branch, round(p * 65536), 32, 128, num_warps=4
        )
    return out.bool()
