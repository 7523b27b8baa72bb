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


def alive(needed: Sequence[bool], dys: Sequence[Tensor | None], counts: Sequence[int]) -> list[bool]:
    """What is wanted, without the operands of layers whose output nothing reads."""
    lives = [dy is not None for dy in dys]
    factors = [life for life, count in zip(lives, counts, strict=True) for _ in range(count)]
    of = (True, *lives * 2, *factors * 3)
    return [wanted and life for wanted, life in zip(needed, of, strict=True)]


def _forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Any,
    gains: Any,
    lefts: Any,
    rights: Sequence[Tensor],
    counts: Any,
    p: Sequence[float],
    *others: Any,
) -> list[Tensor]:
    rows, words = math.prod(x.shape[:-1]), (x.shape[-1] + LANES - 1) // LANES
    s = x.new_empty(rows, sum(right.shape[0] for right in rights))
    bits = x.new_empty(sum(chance > 0.0 for chance in p), rows, words, dtype=torch.int16)
    return [s, bits, *[x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]]


def _backward(
    dys: Sequence[Tensor | None],
    ys: Any,
    s: Tensor,
    bits: Any,
    inputs: Sequence[Tensor],
    activation: str,
    *others: Any,
) -> list[Tensor]:
    *operands, counts, _, _, needed = others
    needed = alive(needed, dys, counts)
    given = next(dy for dy in dys if dy is not None)
    flat = [t for each in operands for t in each]
    own = [
        s.new_empty(t.shape if n else 0, dtype=t.dtype if n else None) for t, n in zip(flat, needed[1:], strict=True)
    ]
    if activation:
        return [*[torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs], *own]
    return [s.new_empty((*given.shape[:-1], operands[-1][0].shape[1]) if needed[0] else 0), *own]


def _define(name: str, schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, fake, "Meta")
    overload: Callable[..., Any] = getattr(torch.ops.lorafx, name).default
    return overload


_OPERANDS = "Tensor[] weights, Tensor?[] biases, Tensor?[] gains, Tensor[] lefts, Tensor[] rights"
_ADAPTERS = "int[] counts, float[] p, float[] scales"

#: ``s``; one bit an element of what was kept, int16 ``[adapters that drop, M, k / 16]``; and the layers' outputs.
cpu_forward = _define("cpu_forward", f"(Tensor x, {_OPERANDS}, {_ADAPTERS}, Tensor? seed) -> Tensor[]", _forward)
#: The gradient of ``x``, or instead of it those of an activation's sources, and of all operands: empty what is not
#: needed. See :meth:`lorafx.kernels.base.Provider.backward`.
cpu_backward = _define(
    "cpu_backward",
    "(Tensor?[] dys, Tensor?[] ys, Tensor s, Tensor? bits, Tensor[] inputs, str activation, "
    f"{_OPERANDS}, {_ADAPTERS}, bool[] needed) -> Tensor[]",
    _backward,
)
