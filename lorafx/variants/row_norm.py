"""The norms of the rows of ``W + s B A``, without forming it, and not computed again while nothing changed.

    ||w + s b A||^2  =  ||w||^2  +  2 s b.(A w)  +  s^2 b (A A^T) b^T          for each row w of W and b of B

The first term is the base's alone, and kept with the base; the norm is kept with A. What is kept is held
weakly and checked at each use: the base by its version counter, its memory and some 64 of its values, A and B
by all of their values, which takes r (in + out) comparisons where the norm takes r in out products. (A base is
frozen. Only a write through ``.data`` that misses all 64 would go unseen.)

Comparing values waits for the device, so the norm is kept on the CPU only, and the base's term elsewhere too.
Nothing is kept of tensors that are no plain parameters, nor while anything records what is computed.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.weak import WeakTensorKeyDictionary

from lorafx.variants.base import full_precision

#: How a tensor lies in the memory of a parameter: offset, shape and strides.
View = tuple[Any, tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class _Squares:
    """The squares of a base's row norms, and what the base was then."""

    version: int
    memory: int
    sample: Tensor
    values: Tensor


@dataclass(frozen=True)
class _Norm:
    """A norm, and what it was computed from."""

    squares: Tensor
    scaling: float
    a: Tensor
    b: Tensor
    values: Tensor


_SQUARES: MutableMapping[Tensor, dict[View, _Squares]] = WeakTensorKeyDictionary()
_NORMS: MutableMapping[Tensor, _Norm] = WeakTensorKeyDictionary()


def row_norm(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """The norm ``[..., out]`` of each row of ``weight [..., out, in] + scaling b [..., out, r] a [..., r, in]``.

    In float32 or better, and without gradient. The base's term is summed in float64, so that it is the same in
    whatever order it is summed: where B is zero, the norm is the same bit for bit on any layout.
    """
    base = weight if weight._base is None else weight._base
    with torch.inference_mode(False), torch.no_grad(), full_precision(weight):
        if not _may_keep(base) or is_in_torch_dispatch_mode():
            return compute_norm(compute_squares(weight), weight, a, b, scaling)
        squares = _squares(base, weight)
        if base.device.type != "cpu" or not (_may_keep(a) and _may_keep(b)):
            return compute_norm(squares, weight, a, b, scaling)
        known = _NORMS.get(a)
        if known is None or not _is_current(known, squares, scaling, a, b):
            norm = compute_norm(squares, weight, a, b, scaling)
            known = _NORMS[a] = _Norm(squares, scaling, a.detach().clone(), b.detach().clone(), norm)
        return known.values


def compute_squares(weight: Tensor) -> Tensor:
    """The square of each row's norm, in float64."""
    norm: Tensor = torch.linalg.vector_norm(weight, dim=-1, dtype=torch.float64)
    return norm.square()


def compute_norm(squares: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """The formula above, with the base's term given."""
    dtype = torch.promote_types(torch.promote_types(weight.dtype, a.dtype), torch.float32)
    right, left = a.to(dtype), (b * scaling).to(dtype)
    mixed = ((weight.to(dtype) @ right.mT) * left).sum(-1)
    quadratic = ((left @ (right @ right.mT)) * left).sum(-1)
    return (squares + 2 * mixed + quadratic).clamp_min(0).sqrt().to(dtype)


def _squares(base: Tensor, weight: Tensor) -> Tensor:
    """The base's term for ``weight``, a view of ``base`` (or it itself)."""
    views = _SQUARES.setdefault(base, {})
    view: View = (weight.storage_offset(), tuple(weight.shape), weight.stride())
    known = views.get(view)
    sample = _sample(base)
    if (
        known is None
        or (known.version, known.memory) != (base._version, base.data_ptr())
        or not torch.equal(sample, known.sample)
    ):
        known = views[view] = _Squares(base._version, base.data_ptr(), sample, compute_squares(weight))
    return known.values


def _is_current(known: _Norm, squares: Tensor, scaling: float, a: Tensor, b: Tensor) -> bool:
    same = known.squares is squares and known.scaling == scaling and _looks_like(known.a, a) and _looks_like(known.b, b)
    return same and torch.equal(known.a, a) and torch.equal(known.b, b)


def _looks_like(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device


def _sample(base: Tensor) -> Tensor:
    if base.device.type != "cpu":
        return torch.empty(0)
    count = base.numel()
    return base.detach().take(torch.arange(0, count, max(1, count // 64)))


def _may_keep(tensor: Tensor) -> bool:
    """Whether this is a parameter with values, seen as itself: not fake, wrapped or being traced."""
    return type(tensor) is nn.Parameter and not tensor.is_meta and not tensor.is_inference()
