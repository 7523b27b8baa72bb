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

from lorafx.kernels.base import Dropout
from lorafx.kernels.triton.tiles import cdiv, jit, launch, on_device

#: Elements that one draw of Philox serves: neighbours in a row.
PER_DRAW = 8


@dataclass(frozen=True)
class Plan:
    """Columns of ``s`` by what they see of ``x``, as the kernels take it.

    ``starts`` has the first column of each group and after them the number of columns, ``drops`` the threshold of
    each group of 2^16. Neighbours without dropout are one group: they see the same.
    """

    starts: tuple[int, ...]
    drops: tuple[int, ...]

    @property
    def widest(self) -> int:
        """Columns of the widest group."""
        return max(b - a for a, b in zip(self.starts, self.starts[1:], strict=False))


@lru_cache(maxsize=1024)
def plan(dropout: Dropout) -> Plan:
    """The groups of columns that ``dropout`` makes."""
    starts, drops, at = [0], [], 0
    for ranks, p in zip(dropout.ranks, dropout.p, strict=True):
        drop, at = round(p * 65536), at + ranks
        if drops and drops[-1] == drop == 0:
            starts[-1] = at
        else:
            starts.append(at)
            drops.append(drop)
    return Plan(tuple(starts), tuple(drops))


@jit
def keep(
    seed: tl.tensor, branch: tl.constexpr, rows: tl.tensor, first: tl.tensor, WIDTH: tl.constexpr, DROP: tl.constexpr
) -> tl.tensor:
    """Which elements are kept, ``[rows, WIDTH]``, of the columns from ``first`` on (a multiple of 8)."""
    draws = (first // 8 + tl.arange(0, WIDTH // 8)).to(tl.uint32)
    zero = (rows[:, None] * 0).to(tl.uint32) + draws[None, :] * 0
    a, b, c, d = tl.philox(seed, zero + draws[None, :], zero + rows[:, None].to(tl.uint32), zero + branch, zero, 7)
    words = tl.join(tl.join(a, c), tl.join(b, d))
    bits = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(bits, [bits.shape[0], WIDTH]) >= DROP


@jit
def kept_share(starts: tl.constexpr, drops: tl.constexpr, columns: tl.tensor) -> tl.tensor:
    """What each of the columns of ``s`` is multiplied with for its dropout."""
    scale = tl.full([columns.shape[0]], 0.0, tl.float32)
    for g in tl.static_range(len(drops)):
        mine = (columns >= starts[g]) & (columns < starts[g + 1])
        scale = tl.where(mine, 65536.0 / (65536 - drops[g]) if drops[g] < 65536 else 0.0, scale)
    return scale


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
    """The mask ``[M, k]`` (bool: what is kept) that the kernels apply to the input of group ``branch`` of a plan.

    For tests and for looking at: no kernel reads it.
    """
    m, k = shape
    out = torch.empty(m, k, dtype=torch.int8, device=seed.device)
    with on_device(seed):
        launch(
            mask_kernel, (cdiv(m, 32), cdiv(k, 128)), seed, out, m, k, branch, round(p * 65536), 32, 128, num_warps=4
        )
    return out.bool()
