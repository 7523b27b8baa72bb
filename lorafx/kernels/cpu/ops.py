"""The operators of the compiled provider: their schemas, and their results' shapes for what traces a graph.

What computes them is ops.cpp, which :mod:`.build` compiles and loads. Lists have one entry an adapter (``rights``,
``lefts``, ``p``, ``scales``) or one a layer; ``counts`` says how many of the ``lefts`` each layer has.

A schema that changes needs a new name: Inductor keeps compiled code on disk by its graph, which has the operators'
names and not their arguments' order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lorafx.ops import LIBRARY

#: Elements that share one word of a mask.
LANES = 16
DTYPES = (torch.float32, torch.bfloat16)


def _down(x: Tensor, rights: Sequence[Tensor], p: Sequence[float], *others: Any) -> tuple[Tensor, Tensor]:
    words, count = (x.shape[1] + LANES - 1) // LANES, sum(chance > 0.0 for chance in p)
    ranks = sum(right.shape[0] for right in rights)
    return x.new_empty(x.shape[0], ranks), x.new_empty(count, x.shape[0], words, dtype=torch.int16)


def _up(x: Tensor, s: Tensor, weights: Sequence[Tensor], *others: Any) -> list[Tensor]:
    return [x.new_empty(math.prod(x.shape[:-1]), weight.shape[0]) for weight in weights]


def _grad_up(
    dys: Sequence[Tensor | None],
    ys: Sequence[Tensor | None],
    needs_total: Sequence[bool],
    s: Tensor,
    gains: Sequence[Tensor | None],
    lefts: Sequence[Tensor],
    *others: Any,
) -> list[Tensor]:
    found = [s.new_empty(s.shape), *_gradients(lefts, s)]
    for dy, y, total, gain in zip(dys, ys, needs_total, gains, strict=True):
        n = 0 if dy is None else dy.shape[1]
        found.append(s.new_empty(0 if dy is None or gain is None else dy.shape))
        found.append(s.new_empty(n if total else 0, dtype=torch.float32))
        found.append(s.new_empty(n if y is not None else 0, dtype=torch.float32))
    return found


def _grad_x(bases: Any, weights: Any, ds: Tensor, rights: Sequence[Tensor], *others: Any) -> Tensor:
    return ds.new_empty(ds.shape[0], rights[0].shape[1])


def _grad_right(x: Tensor, ds: Tensor, rights: Sequence[Tensor], *others: Any) -> list[Tensor]:
    return _gradients(rights, ds)


def _gradients(factors: Sequence[Tensor], x: Tensor) -> list[Tensor]:
    """Of the dtypes that the kernels write."""
    return [x.new_empty(t.shape, dtype=t.dtype if t.dtype is x.dtype else torch.float32) for t in factors]


def _grad_sources(*given: Any) -> list[Tensor]:
    h, *factors = (t.contiguous() for t in given[-1])
    return [torch.empty_like(h), torch.empty_like(h), *map(torch.empty_like, factors)]


def _define(name: str, schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, fake, "Meta")
    overload: Callable[..., Any] = getattr(torch.ops.lorafx, name).default
    return overload


#: ``s``, and one bit an element of what was kept: int16 ``[adapters that drop, M, k / 16]``.
cpu_down = _define(
    "cpu_down", "(Tensor x, Tensor[] rights, float[] p, float[] scales, Tensor? seed) -> (Tensor, Tensor)", _down
)
#: The layers' outputs. ``s`` has the scales already.
cpu_up = _define(
    "cpu_up",
    "(Tensor x, Tensor s, Tensor[] weights, Tensor?[] biases, Tensor?[] gains, Tensor[] lefts, int[] counts) "
    "-> Tensor[]",
    _up,
)
#: ``ds``; of each adapter ``dleft``; of each layer ``gain * dy``, and the sums of ``dy`` and of ``dy * y``: empty what
#: is not asked for. It is one call, so that the threads share out all layers' rows and columns.
cpu_grad_up = _define(
    "cpu_grad_up",
    "(Tensor?[] dys, Tensor?[] ys, bool[] needs_total, Tensor s, Tensor?[] gains, Tensor[] lefts, int[] counts, "
    "float[] scales) -> Tensor[]",
    _grad_up,
)
#: ``dx``, through the masks that ``cpu_down`` gave.
cpu_grad_x = _define(
    "cpu_grad_x",
    "(Tensor[] bases, Tensor[] weights, Tensor ds, Tensor[] rights, float[] p, Tensor? bits) -> Tensor",
    _grad_x,
)
#: The gradients of ``rights``, through the same masks.
cpu_grad_right = _define(
    "cpu_grad_right",
    "(Tensor x, Tensor ds, Tensor[] rights, float[] p, Tensor? bits) -> Tensor[]",
    _grad_right,
)
#: With dx the gradient of an activation: ``x`` again, and the gradients of its sources.
cpu_grad_sources = _define(
    "cpu_grad_sources",
    "(Tensor[] bases, Tensor[] weights, Tensor ds, Tensor[] rights, float[] p, Tensor? bits, str activation, "
    "Tensor[] sources) -> Tensor[]",
    _grad_sources,
)
