"""What the kernels share: how they are launched, how tiles are walked, and in what a dot product is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: ``tl.dot`` wants at least 16 in each dimension: narrower ranks are padded to it with zeros, inside the kernel.
MIN_RANKS = 16
#: More ranks than this are taken in several blocks, where each has an accumulator of its own,
MAX_RANKS = 64
#: or where blocks are added one after the other to a large accumulator that leaves few registers.
MAX_ADDED_RANKS = 32
MIN_ADDED_RANKS = 16
#: Rows of tiles that are walked together, so that the columns' operand is still in the second-level cache.
GROUP_ROWS = 8

_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def jit(function: Callable[..., Any]) -> Any:
    """``triton.jit``, typed: the kernel, to be launched as ``kernel[grid](...)``."""
    return triton.jit(function)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of the CPU too (``TRITON_INTERPRET=1`` at its import)."""
    return bool(triton.knobs.runtime.interpret)


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up."""
    return -(-a // b)


def rank_block(ranks: int, most: int = MAX_RANKS) -> int:
    """The width of a block that holds ``ranks``, or as many as a block may."""
    return min(most, max(MIN_RANKS, 1 << max(ranks - 1, 0).bit_length()))


def is_aligned(*tensors: Tensor) -> bool:
    """Whether rows can be read 16 bytes at a time: Triton then builds another, leaner kernel, with larger tiles."""
    return all(
        t.data_ptr() % 16 == 0
        and all(n % 16 == 0 if step == 1 else step % 16 == 0 for n, step in zip(t.shape, t.stride(), strict=True))
        for t in tensors
    )


def dot_dtype(dtype: torch.dtype) -> Any:
    """In what the operands of a dot product are given: as stored, but the interpreter's bfloat16 is wrong."""
    return tl.float32 if interpreted() and dtype is torch.bfloat16 else _TRITON_DTYPES[dtype]


#: Takes a launch in the stead of the device: the kernel, its grid, its arguments and its options.
Recorder = Callable[[Any, Sequence[int], tuple[Any, ...], dict[str, Any]], None]
_RECORDER: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


def launch(kernel: Any, grid: Sequence[int], *args: Any, **options: Any) -> None:
    """Run ``kernel`` on ``grid``: the one place that launches anything."""
    recorder = _RECORDER.get()
    if recorder is None:
        kernel[tuple(grid)](*args, **options)
    else:
        recorder(kernel, grid, args, options)


@contextmanager
def recorded(recorder: Recorder) -> Iterator[None]:
    """Hand every launch to ``recorder``; nothing runs, so tensors may be on the meta device."""
    token = _RECORDER.set(recorder)
    try:
        yield
    finally:
        _RECORDER.reset(token)


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@jit
def tile_order(pid: tl.tensor, tiles_m: tl.tensor, tiles_n: tl.tensor, GROUP: tl.constexpr) -> tl.tensor:
    """The row and column of tile ``pid``: down ``GROUP`` rows of tiles before the next column."""
    per_group = GROUP * tiles_n
    group = pid // per_group
    height = min(tiles_m - group * GROUP, GROUP)
    return group * GROUP + (pid % per_group) % height, (pid % per_group) // height


@jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr) -> tl.tensor:
    """A float32 accumulator [ROWS, COLUMNS] of zeros."""
    return tl.zeros([ROWS, COLUMNS], tl.float32)
