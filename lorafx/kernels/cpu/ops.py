"""The compiled kernels as operators, so that what traces a graph (torch.compile) sees one call and no pointers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lorafx.kernels.aten import sum_of_products
from lorafx.kernels.cpu import job
from lorafx.ops import LIBRARY


def _down(
    x: Tensor, rights: Sequence[Tensor], p: Sequence[float], scales: Sequence[float], seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``s``, and one bit an element of what was kept: int16 ``[adapters that drop, M, k / 16]``."""
    x, rights = _rows(x), _smalls(rights, x)
    s, bits = _down_like(x, rights, p, scales, seed)
    adapters = [
        job.adapter(right, 0, mask, i, chance, scale)
        for i, (right, mask, chance, scale) in enumerate(zip(rights, _masks(bits, p), p, scales, strict=True))
    ]
    job.run(x.dtype, [job.narrow(x, s, adapters, 0 if seed is None else int(seed))])
    return s, bits


def _down_like(
    x: Tensor, rights: Sequence[Tensor], p: Sequence[float], scales: Sequence[float], seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    words, count = (x.shape[1] + job.LANES - 1) // job.LANES, sum(chance > 0.0 for chance in p)
    return x.new_empty(x.shape[0], _total(rights, 0)), x.new_empty(count, x.shape[0], words, dtype=torch.int16)


def _up(
    x: Tensor,
    s: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    gains: Sequence[Tensor | None],
    lefts: Sequence[Tensor],
    counts: Sequence[int],
) -> list[Tensor]:
    """The frozen layers' outputs; the rest is added to each in its memory, as soon as it is there."""
    ys, column = [], 0
    for weight, bias, gain, mine in zip(weights, biases, gains, _parts(_smalls(lefts, x), counts), strict=True):
        y = F.linear(x, weight, bias).reshape(-1, weight.shape[0])
        r = _total(mine, 1)
        plain = None if bias is None or gain is None else _wide(bias)
        adapters = [job.adapter(left, 1) for left in mine]
        job.run(y.dtype, [job.expand(y, s[:, column : column + r], adapters, _wide(gain), plain)])
        column += r
        ys.append(y)
    return ys


def _up_like(x: Tensor, s: Tensor, weights: Sequence[Tensor], *others: Any) -> list[Tensor]:
    return [x.new_empty(math.prod(x.shape[:-1]), weight.shape[0]) for weight in weights]


def _grad_up(
    dys: Sequence[Tensor | None],
    ys: Sequence[Tensor | None],
    needs_total: Sequence[bool],
    s: Tensor,
    gains: Sequence[Tensor | None],
    lefts: Sequence[Tensor],
    counts: Sequence[int],
    scales: Sequence[float],
) -> list[Tensor]:
    """``ds``; of each adapter ``dleft``; of each layer ``gain * dy``, the sums of ``dy`` and of ``dy * y``.

    What is not asked for is empty. It is one call, so that the threads share out all layers' rows and columns.
    """
    dys, ys = [_rows_if(dy) for dy in dys], [_rows_if(y) for y in ys]
    found = _grad_up_like(dys, ys, needs_total, s, gains, lefts, counts, scales)
    ds, dlefts = found[0], found[1 : 1 + len(lefts)]
    extras = _parts(found[1 + len(lefts) :], [3] * len(dys))
    smalls, gains = _smalls(lefts, s), [_wide(gain) for gain in gains]
    ways, jobs, column = iter(zip(smalls, dlefts, scales, strict=True)), [], 0
    for dy, y, gain, count, (base, total, dot) in zip(dys, ys, gains, counts, extras, strict=True):
        mine = list(islice(ways, count))
        place = slice(column, column + sum(left.shape[1] for left, _, _ in mine))
        column = place.stop
        if dy is None:
            ds[:, place] = 0
            continue
        adapters = [job.adapter(left, 1, factor=scale) for left, _, scale in mine]
        jobs.append(job.narrow(dy, ds[:, place], adapters))
        adapters = [job.adapter(dleft, 1) for _, dleft, _ in mine]
        jobs.append(job.outer(dy, s[:, place], adapters, gain, *map(_given, (base, y, total, dot))))
    job.run(s.dtype, jobs)
    return found


def _grad_up_like(
    dys: Sequence[Tensor | None],
    ys: Sequence[Tensor | None],
    needs_total: Sequence[bool],
    s: Tensor,
    gains: Sequence[Tensor | None],
    lefts: Sequence[Tensor],
    counts: Sequence[int],
    scales: Sequence[float],
) -> list[Tensor]:
    found = [s.new_empty(s.shape), *_gradients(lefts, s)]
    for dy, y, total, gain in zip(dys, ys, needs_total, gains, strict=True):
        n = 0 if dy is None else dy.shape[1]
        found.append(s.new_empty(0 if dy is None or gain is None else dy.shape))
        found.append(s.new_empty(n if total else 0, dtype=torch.float32))
        found.append(s.new_empty(n if y is not None else 0, dtype=torch.float32))
    return found


def _grad_x(
    bases: Sequence[Tensor],
    weights: Sequence[Tensor],
    ds: Tensor,
    rights: Sequence[Tensor],
    p: Sequence[float],
    bits: Tensor | None,
) -> Tensor:
    """``sum_i base_i W_i + sum_j D_j(ds_j right_j)``, through the masks that :func:`_down` gave."""
    dx, masks = sum_of_products(bases, weights), _masks(bits, p)
    smalls = _smalls(rights, ds)
    adapters = [job.adapter(r, 0, mask, p=chance) for r, mask, chance in zip(smalls, masks, p, strict=True)]
    job.run(dx.dtype, [job.expand(dx, ds, adapters)])
    return dx


def _grad_x_fake(
    bases: Sequence[Tensor], weights: Sequence[Tensor], ds: Tensor, rights: Sequence[Tensor], p: Any, bits: Any
) -> Tensor:
    return ds.new_empty(ds.shape[0], rights[0].shape[1])


def _grad_right(
    x: Tensor, ds: Tensor, rights: Sequence[Tensor], p: Sequence[float], bits: Tensor | None
) -> list[Tensor]:
    """``ds_j^T D_j(x)``, through the same masks."""
    x, found, masks = _rows(x), _gradients(rights, ds), _masks(bits, p)
    adapters = [job.adapter(g, 0, mask, p=chance) for g, mask, chance in zip(found, masks, p, strict=True)]
    job.run(x.dtype, [job.outer(x, ds, adapters)])
    return found


def _grad_right_fake(x: Tensor, ds: Tensor, rights: Sequence[Tensor], p: Any, bits: Any) -> list[Tensor]:
    return _gradients(rights, ds)


def _rows(tensor: Tensor) -> Tensor:
    """The tensor with its rows in one piece each."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _rows_if(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _rows(tensor)


def _given(tensor: Tensor | None) -> Tensor | None:
    """None for what is empty, which stands for what is not asked for."""
    return tensor if tensor is not None and tensor.numel() else None


def _wide(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.to(torch.float32).contiguous()


def _smalls(factors: Sequence[Tensor], x: Tensor) -> list[Tensor]:
    """Factors as the kernels take them: float32, or of x's dtype."""
    return [t if t.dtype in (torch.float32, x.dtype) else t.to(x.dtype) for t in factors]


def _gradients(factors: Sequence[Tensor], x: Tensor) -> list[Tensor]:
    """Memory for the gradients of factors, of dtypes that the kernels write."""
    return [x.new_empty(t.shape, dtype=t.dtype if t.dtype is x.dtype else torch.float32) for t in factors]


def _masks(bits: Tensor | None, p: Sequence[float]) -> list[Tensor | None]:
    """Of each adapter its part of ``bits``; None if it does not drop."""
    remaining = iter(()) if bits is None else iter(bits.unbind())
    return [next(remaining) if chance > 0.0 else None for chance in p]


def _parts(tensors: Sequence[Tensor], counts: Sequence[int]) -> list[list[Tensor]]:
    remaining = iter(tensors)
    return [list(islice(remaining, count)) for count in counts]


def _total(factors: Sequence[Tensor], rank: int) -> int:
    return sum(t.shape[rank] for t in factors)


def _grad_activation(name: str, sources: Sequence[Tensor], dx: Tensor) -> list[Tensor]:
    """``x``, and the gradients of the sources; one pass over all of them."""
    h, *factors = (t.contiguous() for t in sources)
    dx = dx.contiguous()
    x, dh, du = torch.empty_like(h), torch.empty_like(h), [torch.empty_like(u) for u in factors]
    u, grad_u = (factors[0], du[0]) if factors else (None, None)
    job.activation(name.removesuffix("_mul"), [h, u, dx, x, dh, grad_u], h.dtype, h.numel())
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
    "(Tensor x, Tensor[] rights, float[] p, float[] scales, Tensor? seed) -> (Tensor, Tensor)",
    _down, _down_like,
)  # fmt: skip
cpu_up = _define(
    "cpu_up",
    "(Tensor x, Tensor s, Tensor[] weights, Tensor?[] biases, Tensor?[] gains, Tensor[] lefts, int[] counts) "
    "-> Tensor[]",
    _up, _up_like,
)  # fmt: skip
cpu_grad_up = _define(
    "cpu_grad_up",
    "(Tensor?[] dys, Tensor?[] ys, bool[] needs_total, Tensor s, Tensor?[] gains, Tensor[] lefts, int[] counts, "
    "float[] scales) -> Tensor[]",
    _grad_up, _grad_up_like,
)  # fmt: skip
cpu_grad_x = _define(
    "cpu_grad_x",
    "(Tensor[] bases, Tensor[] weights, Tensor ds, Tensor[] rights, float[] p, Tensor? bits) -> Tensor",
    _grad_x, _grad_x_fake,
)  # fmt: skip
cpu_grad_right = _define(
    "cpu_grad_right",
    "(Tensor x, Tensor ds, Tensor[] rights, float[] p, Tensor? bits) -> Tensor[]",
    _grad_right, _grad_right_fake,
)  # fmt: skip
cpu_grad_activation = _define(
    "cpu_grad_activation",
    "(str name, Tensor[] sources, Tensor dx) -> Tensor[]",
    _grad_activation, _grad_activation_fake,
)  # fmt: skip
