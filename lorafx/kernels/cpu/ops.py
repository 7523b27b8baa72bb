"""The compiled kernels as operators, so that what traces a graph (torch.compile) sees one call and no pointers."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
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


def _narrow(x: Tensor, right: Tensor, s: Tensor, bits: Tensor | None, p: float, adapter: int, seed: int) -> None:
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


def _down(x: Tensor, right: Tensor, ranks: Sequence[int], p: Sequence[float], seed: Tensor) -> tuple[Tensor, Tensor]:
    """``D(x) right^T``, and one bit an element of what was kept: int16 ``[adapters that drop, M, k / 16]``."""
    x, right = _rows(x), _small(right, x.dtype)
    s, bits = _down_like(x, right, p)
    number = int(seed)
    for i, (mine, mask, chance) in enumerate(_adapters(ranks, p, bits)):
        _narrow(x, right[mine], s[:, mine], mask, chance, i, number)
    return s, bits


def _down_fake(x: Tensor, right: Tensor, ranks: Any, p: Sequence[float], seed: Tensor) -> tuple[Tensor, Tensor]:
    return _down_like(x, right, p)


def _down_like(x: Tensor, right: Tensor, p: Sequence[float]) -> tuple[Tensor, Tensor]:
    words = (x.shape[1] + LANES - 1) // LANES
    count = sum(chance > 0.0 for chance in p)
    return x.new_empty(x.shape[0], right.shape[0]), x.new_empty(count, x.shape[0], words, dtype=torch.int16)


def _up(x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, left: Tensor, gain: Tensor | None) -> Tensor:
    """``gain * (x W^T) + s left^T + b``, the second product added to the first in its memory."""
    y = F.linear(x, weight, bias).reshape(-1, weight.shape[0])
    if gain is None:
        return y.addmm_(s, left.to(y.dtype).t().contiguous())
    wide = None if bias is None else _small(bias, torch.float32)
    _expand(y, _rows(s), left.to(y.dtype).t(), gain=_small(gain, torch.float32), bias=wide)
    return y


def _up_fake(x: Tensor, weight: Tensor, bias: Any, s: Tensor, left: Tensor, gain: Any) -> Tensor:
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


def _grad_x(
    bases: Sequence[Tensor],
    weights: Sequence[Tensor],
    ds: Tensor,
    right: Tensor,
    ranks: Sequence[int],
    p: Sequence[float],
    bits: Tensor | None,
) -> Tensor:
    """``sum_i base_i W_i + D(ds right)``, through the masks that :func:`_down` gave."""
    dx, right = sum_of_products(bases, weights), _small(right, ds.dtype)
    if bits is None:
        return dx.addmm_(ds, right)
    for mine, mask, chance in _adapters(ranks, p, bits):
        _expand(dx, ds[:, mine], right[mine], mask, chance)
    return dx


def _grad_x_fake(
    bases: Sequence[Tensor], weights: Sequence[Tensor], ds: Tensor, right: Tensor, ranks: Any, p: Any, bits: Any
) -> Tensor:
    return ds.new_empty(ds.shape[0], right.shape[1])


def _grad_right(x: Tensor, ds: Tensor, ranks: Sequence[int], p: Sequence[float], bits: Tensor) -> Tensor:
    """``ds^T D(x)``, through the same masks."""
    x, dright = _rows(x), x.new_empty(ds.shape[1], x.shape[1], dtype=torch.float32)
    for mine, mask, chance in _adapters(ranks, p, bits):
        _outer(x, ds[:, mine], dright[mine], mask, chance)
    return dright


def _grad_right_fake(x: Tensor, ds: Tensor, ranks: Any, p: Any, bits: Tensor) -> Tensor:
    return x.new_empty(ds.shape[1], x.shape[1], dtype=torch.float32)


def _adapters(ranks: Sequence[int], p: Sequence[float], bits: Tensor) -> Iterator[tuple[slice, Tensor | None, float]]:
    """The columns of each adapter in ``s``, its mask if it drops, and its p."""
    masks, ends = iter(bits.unbind()), accumulate(ranks, initial=0)
    for (a, b), chance in zip(pairwise(ends), p, strict=True):
        yield slice(a, b), next(masks) if chance > 0.0 else None, chance


def _grad_activation(name: str, sources: Sequence[Tensor], dx: Tensor) -> list[Tensor]:
    """``x``, and the gradients of the sources; one pass over all of them."""
    h, *factors = (t.contiguous() for t in sources)
    dx = dx.contiguous()
    x, dh, du = torch.empty_like(h), torch.empty_like(h), [torch.empty_like(u) for u in factors]
    u, grad_u = (factors[0], du[0]) if factors else (None, None)
    _call(name.removesuffix("_mul"), h.dtype, h, u, dx, x, dh, grad_u, _int(h.numel()))
    return [x, dh, *du]


def _grad_activation_fake(name: str, sources: Sequence[Tensor], dx: Tensor) -> list[Tensor]:
    h = sources[0].contiguous()
    return [torch.empty_like(h), *(torch.empty_like(s.contiguous()) for s in sources)]


def _define(name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
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
    "(Tensor x, Tensor weight, Tensor? bias, Tensor s, Tensor left, Tensor? gain) -> Tensor",
    _up, _up_fake,
)  # fmt: skip
cpu_grad_up = _define(
    "cpu_grad_up",
    "(Tensor dy, Tensor s, Tensor left, Tensor? gain, Tensor? y, bool needs_total) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _grad_up, _grad_up_like,
)  # fmt: skip
cpu_grad_x = _define(
    "cpu_grad_x",
    "(Tensor[] bases, Tensor[] weights, Tensor ds, Tensor right, int[] ranks, float[] p, Tensor? bits) -> Tensor",
    _grad_x, _grad_x_fake,
)  # fmt: skip
cpu_grad_right = _define(
    "cpu_grad_right",
    "(Tensor x, Tensor ds, int[] ranks, float[] p, Tensor bits) -> Tensor",
    _grad_right, _grad_right_fake,
)  # fmt: skip
cpu_grad_activation = _define(
    "cpu_grad_activation",
    "(str name, Tensor[] sources, Tensor dx) -> Tensor[]",
    _grad_activation, _grad_activation_fake,
)  # fmt: skip
