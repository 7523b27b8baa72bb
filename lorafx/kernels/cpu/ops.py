"""The compiled kernels as operators, so that what traces a graph (torch.compile) sees one call and no pointers."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lorafx.kernels.aten import sum_of_products
from lorafx.kernels.cpu import build
from lorafx.ops import LIBRARY

#: Elements that share one word of a mask.
LANES = 16

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
DTYPES = frozenset(_NAMES)


def _call(name: str, dtype: torch.dtype, *arguments: Any) -> None:
    given = [a.value if isinstance(a, _Typed) else _pointer(a) for a in arguments]
    getattr(build.load(), f"{name}_{_NAMES[dtype]}")(*given, ctypes.c_int(torch.get_num_threads()))


class _Typed:
    """A number as the C function takes it."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _int(value: int) -> _Typed:
    return _Typed(ctypes.c_int64(value))


def _float(value: float) -> _Typed:
    return _Typed(ctypes.c_float(value))


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _rows(tensor: Tensor) -> Tensor:
    """The tensor with its rows in one piece each."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _small(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).contiguous()


def _narrow(
    x: Tensor, right: Tensor, s: Tensor, bits: Tensor | None, p: float, adapter: int, seed: int
) -> None:
    m, k = x.shape
    _call(
        "narrow", x.dtype, x, _int(x.stride(0)), _int(m), _int(k), right, _int(right.shape[0]), s, _int(s.stride(0)),
        bits, _float(p), _int(adapter), _Typed(ctypes.c_uint64(seed)),
    )  # fmt: skip


def _expand(
    y: Tensor, s: Tensor, right: Tensor, bits: Tensor | None = None, p: float = 0.0,
    gain: Tensor | None = None, bias: Tensor | None = None,
) -> None:  # fmt: skip
    m, n = y.shape
    _call(
        "expand", y.dtype, y, _int(y.stride(0)), _int(m), _int(n), s, _int(s.stride(0)), _int(s.shape[1]), right,
        _int(right.stride(0)), _int(right.stride(1)), bits, _float(p), gain, bias,
    )  # fmt: skip


def _outer(x: Tensor, s: Tensor, g: Tensor, bits: Tensor | None, p: float) -> None:
    m, k = x.shape
    _call(
        "outer", x.dtype, x, _int(x.stride(0)), _int(m), _int(k), bits, _float(p), s, _int(s.stride(0)),
        _int(s.shape[1]), g,
    )  # fmt: skip


def _down(
    x: Tensor, right: Tensor, ranks: Sequence[int], p: Sequence[float], seed: Tensor
) -> tuple[Tensor, Tensor]:
    """``D(x) right^T``, and one bit an element of what was kept: int16 ``[adapters that drop, M, k / 16]``."""
    x, right = _rows(x), _small(right, x.dtype)
    s, bits = _down_like(x, right, p)
    masks, number = iter(bits.unbind()), int(seed)
    columns = list(accumulate(ranks, initial=0))
    for i, (r, chance) in enumerate(zip(ranks, p, strict=True)):
        mine = slice(columns[i], columns[i] + r)
        _narrow(x, right[mine], s[:, mine], next(masks) if chance > 0.0 else None, chance, i, number)
    return s, bits


def _down_fake(x: Tensor, right: Tensor, ranks: Any, p: Sequence[float], seed: Tensor) -> tuple[Tensor, Tensor]:
    return _down_like(x, right, p)


def _down_like(x: Tensor, right: Tensor, p: Sequence[float]) -> tuple[Tensor, Tensor]:
    words = (x.shape[1] + LANES - 1) // LANES
    count = sum(chance > 0.0 for chance in p)
    return x.new_empty(x.shape[0], right.shape[0]), x.new_empty(count, x.shape[0], words, dtype=torch.int16)


def _up(x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, left: Tensor, gain: Tensor) -> Tensor:
    """``gain * (x W^T) + s left^T + b``."""
    y = F.linear(x, weight, bias).reshape(-1, weight.shape[0])
    wide = None if bias is None else _small(bias, torch.float32)
    _expand(y, _rows(s), left.to(x.dtype).t(), gain=_small(gain, torch.float32), bias=wide)
    return y


def _up_fake(x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, left: Tensor, gain: Tensor) -> Tensor:
    return x.new_empty(math.prod(x.shape[:-1]), weight.shape[0])


def _grad_up(
    dy: Tensor, s: Tensor, left: Tensor, gain: Tensor | None, y: Tensor | None, needs_total: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``ds``, ``dleft^T``, ``gain * dy``, the sums of ``dy`` and of ``dy * y``; empty what is not asked for."""
    dy, s, left, y = _rows(dy), _rows(s), _small(left, dy.dtype), None if y is None else _rows(y)
    ds, dleft, base, total, dot = _grad_up_like(dy, s, left, gain, y, needs_total)
    m, n = dy.shape
    _call(
        "grad_up", dy.dtype, dy, _int(dy.stride(0)), _int(m), _int(n), left, _int(left.shape[1]), s, _int(s.stride(0)),
        ds, _int(ds.stride(0)), dleft, None if gain is None else _small(gain, torch.float32),
        base if base.numel() else None, y, _int(0 if y is None else y.stride(0)), total if total.numel() else None,
        dot if dot.numel() else None,
    )  # fmt: skip
    return ds, dleft, base, total, dot


def _grad_up_like(
    dy: Tensor, s: Tensor, left: Tensor, gain: Tensor | None, y: Tensor | None, needs_total: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide, n = torch.float32, dy.shape[1]
    return (
        s.new_empty(s.shape),
        dy.new_empty(s.shape[1], n, dtype=wide),
        dy.new_empty(dy.shape if gain is not None else 0),
        dy.new_empty(n if needs_total else 0, dtype=wide),
        dy.new_empty(n if y is not None else 0, dtype=wide),
    )


def _grad_down(
    bases: Sequence[Tensor], weights: Sequence[Tensor], ds: Tensor, right: Tensor, x: Tensor, ranks: Sequence[int],
    p: Sequence[float], bits: Tensor, needs_x: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``dx`` (empty unless asked for) and ``dright``, through the masks that :func:`_down` gave."""
    x, right = _rows(x), _small(right, x.dtype)
    dx = sum_of_products(bases, weights) if needs_x else x.new_empty(0)
    dright = x.new_empty(right.shape, dtype=torch.float32)
    masks, columns = iter(bits.unbind()), list(accumulate(ranks, initial=0))
    for i, (r, chance) in enumerate(zip(ranks, p, strict=True)):
        mine, mask = slice(columns[i], columns[i] + r), next(masks) if chance > 0.0 else None
        _outer(x, ds[:, mine], dright[mine], mask, chance)
        if needs_x:
            _expand(dx, ds[:, mine], right[mine], mask, chance)
    return dx, dright


def _grad_down_fake(
    bases: Any, weights: Any, ds: Tensor, right: Tensor, x: Tensor, ranks: Any, p: Any, bits: Tensor, needs_x: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if needs_x else 0), right.new_empty(right.shape, dtype=torch.float32)


def _define(
    name: str, schema: str, kernel: Callable[..., tuple[Tensor, ...] | Tensor], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Register an operator for CPUs. ``torch.library.custom_op`` would do, at ten times the cost of a call."""
    LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, kernel, "CPU")
    LIBRARY.impl(name, fake, "Meta")
    overload: Callable[..., Any] = getattr(torch.ops.lorafx, name).default
    return overload


cpu_down = _define(
    "cpu_down",
    "(Tensor x, Tensor right, int[] ranks, float[] p, Tensor seed) -> (Tensor, Tensor)",
    _down, _down_fake,
)  # fmt: skip
cpu_up = _define(
    "cpu_up",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor s, Tensor left, Tensor gain) -> Tensor",
    _up, _up_fake,
)  # fmt: skip
cpu_grad_up = _define(
    "cpu_grad_up",
    "(Tensor dy, Tensor s, Tensor left, Tensor? gain, Tensor? y, bool needs_total) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _grad_up, _grad_up_like,
)  # fmt: skip
cpu_grad_down = _define(
    "cpu_grad_down",
    "(Tensor[] bases, Tensor[] weights, Tensor ds, Tensor right, Tensor x, int[] ranks, float[] p, Tensor bits, "
    "bool needs_x) -> (Tensor, Tensor)",
    _grad_down, _grad_down_fake,
)  # fmt: skip
