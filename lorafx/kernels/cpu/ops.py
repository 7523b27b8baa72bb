"""The operators of the compiled provider: their schemas, and their results' shapes for what traces a graph.

What computes them is ops.cpp, which :mod:`.build` compiles and loads. Lists have one entry an adapter (``rights``,
``lefts``, ``p``, ``scales``) or one a layer; ``counts`` says how many of the ``lefts`` each layer has.

A weight is the tensors that hold it, and its format's name: empty for a dense one, which is one tensor; otherwise
``layouts`` has five numbers for it, how many tensors, and ``layout`` as in :mod:`lorafx.bases.ops`. It is read in the
dtype of ``x``.

A schema that changes needs a new name: Inductor keeps compiled code on disk by its graph, which has the operators'
names and not their arguments' order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorafx.bases.tensor import parts
from lorafx.ops import LIBRARY

#: Elements that share one word of a mask.
WORD = 16
DTYPES = (torch.float32, torch.bfloat16)


def alive(needed: Sequence[bool], dys: Sequence[Tensor | None], counts: Sequence[int]) -> list[bool]:
    """What is wanted, without the operands of layers whose output nothing reads."""
    lives = [dy is not None for dy in dys]
    factors = [life for life, count in zip(lives, counts, strict=True) for _ in range(count)]
    of = (True, *lives * 2, *factors * 3)
    return [wanted and life for wanted, life in zip(needed, of, strict=True)]


class Weights(NamedTuple):
    """The weights of a group, as the operators take them."""

    tensors: list[Tensor]
    formats: list[str]
    layouts: list[int]

    @classmethod
    def of(cls, weights: Sequence[Tensor], dtype: torch.dtype) -> Weights:
        """What is packed and read in another dtype is handed over dense."""
        found = cls([], [], [])
        for weight in weights:
            tensors, name, layout, own = parts(weight)
            if name and own is not dtype:
                tensors, name = [weight], ""
            found.tensors.extend(tensors)
            found.formats.append(name)
            if name:
                found.layouts.extend((len(tensors), *layout))
        return found


def _sizes(tensors: Sequence[Tensor], formats: Sequence[str], layouts: Sequence[int]) -> list[tuple[int, int]]:
    """``out, in`` of each weight."""
    tensors, layouts, found = [*tensors], [*layouts], list[tuple[int, int]]()
    for name in formats:
        if name:
            count, height, width = layouts[:3]
            del tensors[:count], layouts[:5]
            found.append((height, width))
        else:
            height, width = tensors.pop(0).shape
            found.append((height, width))
    return found


def _forward(x: Tensor, tensors: Any, formats: Any, layouts: Any, *others: Any) -> list[Tensor]:
    _, _, _, rights, _, p, *_ = others
    rows, words = math.prod(x.shape[:-1]), (x.shape[-1] + WORD - 1) // WORD
    s = x.new_empty(rows, sum(right.shape[0] for right in rights))
    bits = x.new_empty(sum(chance > 0.0 for chance in p), rows, words, dtype=torch.int16)
    outs = [height for height, _ in _sizes(tensors, formats, layouts)]
    return [s, bits, *[x.new_empty(*x.shape[:-1], out) for out in outs]]


def _backward(
    dys: Sequence[Tensor | None],
    ys: Any,
    s: Tensor,
    bits: Any,
    inputs: Sequence[Tensor],
    activation: str,
    tensors: Any,
    formats: Any,
    layouts: Any,
    *others: Any,
) -> list[Tensor]:
    *operands, counts, _, _, needed = others
    needed = alive(needed, dys, counts)
    given = next(dy for dy in dys if dy is not None)
    shapes: list[Any] = [(size, s.dtype) for size in _sizes(tensors, formats, layouts)]
    shapes += [t if t is None else (t.shape, t.dtype) for each in operands for t in each]
    own = [
        s.new_empty(made[0], dtype=made[1]) if n else s.new_empty(0) for made, n in zip(shapes, needed[1:], strict=True)
    ]
    if activation:
        return [*[torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs], *own]
    return [s.new_empty((*given.shape[:-1], operands[-1][0].shape[1]) if needed[0] else 0), *own]


def _define(name: str, schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, fake, "Meta")
    overload: Callable[..., Any] = getattr(torch.ops.lorafx, name).default
    return overload


_OPERANDS = (
    "Tensor[] weights, str[] formats, int[] layouts, Tensor?[] biases, Tensor?[] gains, Tensor[] lefts, Tensor[] rights"
)
_ADAPTERS = "int[] counts, float[] p, float[] scales"

#: The layers' outputs, with gradients for all tensors; with ``sources``, ``recipe`` and ``activation`` as
#: :meth:`lorafx.kernels.base.Provider.linear` has them. It is made of the two operators below.
LIBRARY.define(
    f"cpu_linear(Tensor x, Tensor[] sources, str recipe, str activation, {_OPERANDS}, {_ADAPTERS}) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
cpu_linear = torch.ops.lorafx.cpu_linear.default
#: ``s``; one bit an element of what was kept, int16 ``[adapters that drop, M, k / 16]``; and the layers' outputs.
cpu_group = _define("cpu_group", f"(Tensor x, {_OPERANDS}, {_ADAPTERS}, Tensor? seed) -> Tensor[]", _forward)
#: The gradient of ``x``, or instead of it those of an activation's sources, and of all operands: empty what is not
#: needed. See :meth:`lorafx.kernels.base.Provider.backward`.
cpu_group_backward = _define(
    "cpu_group_backward",
    "(Tensor?[] dys, Tensor?[] ys, Tensor s, Tensor? bits, Tensor[] inputs, str activation, "
    f"{_OPERANDS}, {_ADAPTERS}, bool[] needed) -> Tensor[]",
    _backward,
)
