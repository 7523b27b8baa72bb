"""The second half of every split sum: partial sums added in a fixed order, all of a call in one launch.

Atomics would add them in the order in which programs happen to end; this way the same inputs give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from lorafx.kernels.triton.tiles import cdiv, jit, launch

BLOCK = 1024


@jit
def reduce_kernel(parts: tl.tensor, outs: tl.tensor, sizes: tl.tensor, splits: tl.tensor, BLOCK: tl.constexpr) -> None:
    """``outs[i] [sizes[i]]`` = the sum of the ``splits[i]`` rows of ``parts[i]``; i is the second program axis."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    for i in tl.static_range(len(parts)):
        if tl.program_id(1) == i:
            valid = at < sizes[i]
            total = tl.zeros([BLOCK], tl.float32)
            part = parts[i] + at
            for _ in range(splits[i]):
                total += tl.load(part, mask=valid, other=0.0)
                part += sizes[i]
            tl.store(outs[i] + at, total.to(outs[i].dtype.element_ty), mask=valid)


class Sums:
    """Outputs of a kernel that may be split: it writes what :meth:`target` gives, :meth:`finish` adds the parts."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._outs: list[Tensor] = []

    def target(self, out: Tensor, splits: int) -> Tensor:
        """Where to write ``splits`` parts of ``out`` (contiguous): float32 ``[splits, ...]``, or it itself if one."""
        if splits == 1:
            return out
        part = torch.empty(splits, *out.shape, dtype=torch.float32, device=out.device)
        self._parts.append(part)
        self._outs.append(out)
        return part

    def finish(self) -> None:
        """Add the parts up."""
        launch_reduce(self._parts, self._outs)


def launch_reduce(parts: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
    """``outs[i]`` = the sum over the first dimension of ``parts[i]``, each contiguous."""
    if not parts:
        return
    sizes = tuple(o.numel() for o in outs)
    splits = tuple(p.shape[0] for p in parts)
    grid = (cdiv(max(sizes), BLOCK), len(parts))
    launch(reduce_kernel, grid, tuple(parts), tuple(outs), sizes, splits, BLOCK, num_warps=4)
