"""What the compiled kernels are asked to do: the structures of kernels.cpp, and the call.

The tensors of a job must outlive the call; dtypes and strides are what the structures say, so that nothing is copied
here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorafx.kernels.cpu import build

#: Elements that share one word of a mask.
LANES = 16

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
DTYPES = frozenset(_NAMES)
_NARROW, _EXPAND, _OUTER = range(3)
_INT, _POINTER = ctypes.c_int64, ctypes.c_void_p


class Adapter(ctypes.Structure):
    """One adapter's factor in a job, its mask and what it is multiplied with."""

    _fields_ = (
        ("small", _POINTER),
        ("along_rank", _INT),
        ("along_wide", _INT),
        ("is_float", _INT),
        ("r", _INT),
        ("bits", _POINTER),
        ("number", _INT),
        ("p", ctypes.c_double),
        ("factor", ctypes.c_double),
    )


class Job(ctypes.Structure):
    """One product of a large matrix with the factors of some adapters."""

    _fields_ = (
        ("kind", _INT),
        ("big", _POINTER),
        ("ld", _INT),
        ("rows", _INT),
        ("columns", _INT),
        ("s", _POINTER),
        ("lds", _INT),
        ("adapters", ctypes.POINTER(Adapter)),
        ("count", _INT),
        ("seed", ctypes.c_uint64),
        ("gain", _POINTER),
        ("bias", _POINTER),
        ("base", _POINTER),
        ("y", _POINTER),
        ("ldy", _INT),
        ("total", _POINTER),
        ("dot", _POINTER),
    )


def adapter(
    small: Tensor, rank: int, bits: Tensor | None = None, number: int = 0, p: float = 0.0, factor: float = 1.0
) -> Adapter:
    """``small`` is a factor, float32 or of the large matrix's dtype, its ranks along dimension ``rank``."""
    assert bits is None or bits.dtype is torch.int16
    return Adapter(
        small.data_ptr(), small.stride(rank), small.stride(1 - rank), small.dtype is torch.float32, small.shape[rank],
        None if bits is None else bits.data_ptr(), number, p, factor / (1.0 - p),
    )  # fmt: skip


def narrow(x: Tensor, s: Tensor, adapters: Sequence[Adapter], seed: int = 0) -> Job:
    """``s = factor * D(x) small`` for the adapters that have columns of ``s``, side by side; draws the masks."""
    return _job(_NARROW, x, s, adapters, seed)


def expand(
    y: Tensor, s: Tensor, adapters: Sequence[Adapter], gain: Tensor | None = None, bias: Tensor | None = None
) -> Job:
    """``y += (gain - 1) * (y - bias) + factor * D(s small)``; ``gain`` and ``bias`` are float32."""
    return _job(_EXPAND, y, s, adapters, 0, gain, bias)


def outer(
    x: Tensor,
    s: Tensor,
    adapters: Sequence[Adapter],
    gain: Tensor | None = None,
    base: Tensor | None = None,
    y: Tensor | None = None,
    total: Tensor | None = None,
    dot: Tensor | None = None,
) -> Job:
    """``small = factor * s^T D(x)``; where given also ``base = gain * x``, and the sums of ``x`` and of ``x * y``."""
    return _job(_OUTER, x, s, adapters, 0, gain, None, base, y, total, dot)


def _job(
    kind: int,
    big: Tensor,
    s: Tensor,
    adapters: Sequence[Adapter],
    seed: int,
    gain: Tensor | None = None,
    bias: Tensor | None = None,
    base: Tensor | None = None,
    y: Tensor | None = None,
    total: Tensor | None = None,
    dot: Tensor | None = None,
) -> Job:
    assert big.stride(1) == 1 or big.shape[1] == 1, "the elements of a row are neighbours"
    assert s.dtype is big.dtype
    assert s.shape == (big.shape[0], sum(a.r for a in adapters))
    return Job(
        kind, big.data_ptr(), big.stride(0), big.shape[0], big.shape[1], s.data_ptr(), s.stride(0),
        (Adapter * len(adapters))(*adapters), len(adapters), seed, _pointer(gain), _pointer(bias), _pointer(base),
        _pointer(y), 0 if y is None else y.stride(0), _pointer(total), _pointer(dot),
    )  # fmt: skip


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def run(dtype: torch.dtype, jobs: Sequence[Job]) -> None:
    """All jobs at once, on matrices of this dtype: they must not need one another's results."""
    call: Any = getattr(build.load(), f"run_{_NAMES[dtype]}")
    call((Job * len(jobs))(*jobs), _INT(len(jobs)), _INT(torch.get_num_threads()))


def activation(name: str, tensors: Sequence[Tensor | None], dtype: torch.dtype, n: int) -> None:
    """The activation ``name`` computed again and differentiated: ``h, u, dx, x, dh, du``, each of ``n`` in a row."""
    call: Any = getattr(build.load(), f"{name}_{_NAMES[dtype]}")
    call(*map(_POINTER, map(_pointer, tensors)), _INT(n), ctypes.c_int(torch.get_num_threads()))
