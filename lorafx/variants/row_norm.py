"""The norms of the rows of ``W + s B A``, without forming it, and not computed again while nothing changed.

    ||w + s b A||^2  =  ||w||^2  +  2 s b.(A w)  +  s^2 b (A A^T) b^T          for each row w of W and b of B

The first term is the base's alone, and kept for the memory it was computed from; the norm is kept for that of A. What
is kept is held weakly and checked at each use: the base by its version counter, its memory and some 64 of its values,
A and B by all of their values, which takes r (in + out) comparisons where the norm takes r in out products. (A base is
frozen. Only a write that no version counter sees, as through ``.data``, and that misses all 64 would go unseen.)

It is one operator, so that whatever traces a graph records a call, not what was kept, and compiled code keeps norms as
eager code does. What is kept goes by memory, since compiled code has tensor objects of its own over it.

Comparing values waits for the device, so elsewhere than on the CPU only the base's term is kept, and that of parameters
only: the version counter then has to see every write, which a compiler's temporary buffers do not tell it of.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakIdKeyDictionary

from lorafx.bases.base import PANEL_BYTES
from lorafx.bases.ops import describe, packed_rows, row_parts
from lorafx.bases.tensor import quantized
from lorafx.variants.base import full_precision

#: How a tensor lies in its storage: offset, shape, strides and dtype.
View = tuple[Any, tuple[int, ...], tuple[int, ...], torch.dtype]

#: About how many elements of a base are converted at once, on the CPU: a panel in float64, which stays in its caches.
_PART = PANEL_BYTES // 8


@dataclass(frozen=True)
class _Squares:
    """The squares of a base's row norms, and what the base was then."""

    state: tuple[int, int]  # version and address
    sample: Tensor | None
    values: Tensor


@dataclass(frozen=True)
class _Norm:
    """A norm, and what it was computed from."""

    squares: Tensor
    scaling: float
    a: Tensor
    b: Tensor
    values: Tensor


#: By storage. A storage's Python object lives as long as the storage, so that a new one at its address is another key.
_SQUARES: MutableMapping[torch.UntypedStorage, dict[View, _Squares]] = WeakIdKeyDictionary()
_NORMS: MutableMapping[torch.UntypedStorage, dict[View, _Norm]] = WeakIdKeyDictionary()


def row_norm(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """The norm ``[..., out]`` of each row of ``weight [..., out, in] + scaling b [..., out, r] a [..., r, in]``.

    In float32 or better, and without gradient (arXiv 2402.09353, section 4.3). The base's term is summed in float64, so
    that it is the same in whatever order it is summed: where B is zero, the norm is the same bit for bit on any layout.
    """
    packed = quantized(weight)
    if packed is not None and not any(is_traceable_wrapper_subclass(t) for t in (a, b)):
        found: Tensor = torch.ops.lorafx.packed_row_norm.default(*describe(packed), a, b, scaling)
        return found.view(weight.shape[:-1])
    if any(is_traceable_wrapper_subclass(t) for t in (weight, a, b)):
        return _compute(weight, a, b, scaling)
    norm: Tensor = torch.ops.lorafx.row_norm.default(weight, a, b, scaling)
    return norm


def compute_squares(weight: Tensor) -> Tensor:
    """The square of each row's norm, in float64."""
    norms = [torch.linalg.vector_norm(part, dim=-1, dtype=torch.float64) for part in _parts(weight)]
    return torch.cat(norms, -1).square()


def compute_norm(squares: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """The formula above, with the base's term given. An operator, which kernels implement for their devices."""
    if any(is_traceable_wrapper_subclass(t) for t in (weight, a, b)):  # these know torch's operators, and not ours
        return factored_norm(squares, weight, a, b, scaling)
    norm: Tensor = torch.ops.lorafx.factored_norm.default(squares, weight, a, b, scaling)
    return norm


def factored_norm(squares: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """What the operator means. Beside a half-precision weight A is rounded to its dtype, as in the layer's products."""
    dtype = _result_dtype(weight, a)
    right, left = (a.to(weight.dtype) if weight.dtype.itemsize == 2 else a).to(dtype), (b * scaling).to(dtype)
    terms = 2 * _product(weight, right) + left @ (right @ right.mT)
    return (squares + (terms * left).sum(-1)).clamp_min(0).sqrt().to(dtype)


def _product(weight: Tensor, right: Tensor) -> Tensor:
    """``weight right^T`` in the dtype of ``right``."""
    if weight.dtype == right.dtype:
        return weight @ right.mT
    return torch.cat([part.to(right.dtype) @ right.mT for part in _parts(weight)], -2)


def _matrices(stack: Tensor) -> Sequence[Tensor]:
    return stack.flatten(0, -3).unbind() if stack.dim() > 2 else (stack,)


def _parts(weight: Tensor) -> Sequence[Tensor]:
    """All rows; on the CPU, where a copy in another dtype is made of them, so many that it stays small."""
    return weight.chunk(max(1, weight.numel() // _PART), -2) if weight.is_cpu else (weight,)


def _compute(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    with full_precision(weight):
        weight, a, b = weight.detach(), a.detach(), b.detach()
        return compute_norm(compute_squares(weight), weight, a, b, scaling)


def _result_dtype(weight: Tensor, a: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(weight.dtype, a.dtype), torch.float32)


# What is kept


def _kept_norm(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """The operator, for tensors with values. What it returns is the caller's: compiled code writes to its buffers."""
    if not _may_keep(weight):
        return _compute(weight, a, b, scaling)
    squares = _kept_squares(weight, lambda: compute_squares(weight.detach()))
    a, b = a.detach(), b.detach()
    return _kept_for(squares, a, b, scaling, lambda: compute_norm(squares, weight.detach(), a, b, scaling))


def _kept_packed_norm(
    tensors: Sequence[Tensor],
    name: str,
    layout: Sequence[int],
    dtype: torch.dtype,
    a: Tensor,
    b: Tensor,
    scaling: float,
) -> Tensor:
    """The same for a packed weight, some rows of which are dequantised at a time; what is kept goes by its codes.

    The matrices of a stack are one after the other, ``[n * out]``.
    """
    a, b = a.detach(), b.detach()
    height, width, *_ = layout
    factors = [*zip(_matrices(a), _matrices(b), strict=True)]
    out = height // len(factors)
    parts = row_parts(out, width, dtype)

    def rows(first: int, part: slice) -> Tensor:
        found: Tensor = packed_rows(tensors, name, layout, dtype, first + part.start, first + part.stop)
        return found

    def squares() -> Tensor:
        return torch.cat([compute_squares(rows(first, part)) for first in range(0, height, out) for part in parts])

    def norm() -> Tensor:
        return torch.cat(
            [
                compute_norm(known[part], rows(i * out, part), right, left[part], scaling)
                for i, ((right, left), known) in enumerate(zip(factors, term.view(-1, out), strict=True))
                for part in parts
            ]
        )

    if not _may_keep(tensors[0]):
        with full_precision(a):
            term = squares()
            return norm()
    term = _kept_squares(tensors[0], squares)
    return _kept_for(term, a, b, scaling, norm)


def _kept_for(squares: Tensor, a: Tensor, b: Tensor, scaling: float, compute: Callable[[], Tensor]) -> Tensor:
    """The norm with these squares, as it was computed last if nothing is new."""
    if not squares.is_cpu:
        with full_precision(a):
            return compute()
    views, view = _views(_NORMS, a), _view(a)
    known = views.get(view)
    if known is None or not _is_current(known, squares, scaling, a, b):
        with full_precision(a):
            norm = compute()
        known = views[view] = _Norm(squares, scaling, a.clone(), b.clone(), norm)
    return known.values.clone()


def _kept_squares(base: Tensor, compute: Callable[[], Tensor]) -> Tensor:
    """The squares of the base in this memory, as they were computed last if it is as it was."""
    state = base._version, base.data_ptr()  # not of a detached tensor: in inference mode its versions are its own
    base = base.detach()
    views, view = _views(_SQUARES, base), _view(base)
    known = views.get(view)
    sample = base.take(_places(base.numel())) if base.is_cpu else None
    if (
        known is None
        or known.state != state
        or not (sample is None or known.sample is None or torch.equal(sample, known.sample))
    ):
        with full_precision(base):
            squares = compute()
        known = views[view] = _Squares(state, sample, squares)
    return known.values


def _may_keep(weight: Tensor) -> bool:
    """Whether a change of this base would be seen, and what is kept is no part of a recorded CUDA graph."""
    if weight.is_inference():  # has no version counter
        return False
    if weight.is_cpu:
        return True
    base = weight if weight._base is None else weight._base
    return isinstance(base, nn.Parameter) and not (weight.is_cuda and torch.cuda.is_current_stream_capturing())


def _is_current(known: _Norm, squares: Tensor, scaling: float, a: Tensor, b: Tensor) -> bool:
    same = known.squares is squares and known.scaling == scaling and known.b.dtype == b.dtype
    return same and torch.equal(known.a, a) and torch.equal(known.b, b)


def _views(kept: MutableMapping[torch.UntypedStorage, dict[View, Any]], tensor: Tensor) -> dict[View, Any]:
    """What is kept of a tensor's storage, by view."""
    storage = tensor.untyped_storage()
    found = kept.get(storage)
    return kept.setdefault(storage, {}) if found is None else found


def _view(tensor: Tensor) -> View:
    return tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


@lru_cache(maxsize=256)
def _places(count: int) -> Tensor:
    """Where a matrix with so many elements is looked at: at an odd distance, so as not to stay in one column."""
    return torch.arange(0, count, max(1, count // 64) | 1, device="cpu")


# The operator


def _fake_norm(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    return weight.new_empty(weight.shape[:-1], dtype=_result_dtype(weight, a))


def _fake_packed_norm(
    tensors: Sequence[Tensor],
    name: str,
    layout: Sequence[int],
    dtype: torch.dtype,
    a: Tensor,
    b: Tensor,
    scaling: float,
) -> Tensor:
    wide = torch.promote_types(torch.promote_types(dtype, a.dtype), torch.float32)
    return a.new_empty(layout[0], dtype=wide)


def _batched_norm(info: Any, dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
    """Under ``torch.func.vmap``: the batch is one more dimension of the stack."""
    *tensors, scaling = arguments
    stacks = [
        t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
        for t, dim in zip(tensors, dims[:3], strict=True)
    ]
    return row_norm(stacks[0], stacks[1], stacks[2], scaling), 0


_LIBRARY: Any = torch.library.Library("lorafx", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("factored_norm(Tensor squares, Tensor weight, Tensor a, Tensor b, float scaling) -> Tensor")
_LIBRARY.impl("factored_norm", factored_norm, "CompositeExplicitAutograd")
_LIBRARY.define(
    "row_norm(Tensor weight, Tensor a, Tensor b, float scaling) -> Tensor",
    # A CUDA graph would take what is kept for its own, in memory that it uses again.
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe),
)
_LIBRARY.impl("row_norm", _kept_norm, "CompositeExplicitAutograd")
_LIBRARY.impl("row_norm", torch.library.fallthrough_kernel, "Autograd")  # it takes no gradient
torch.library.register_fake("lorafx::row_norm", _fake_norm, lib=_LIBRARY)
torch.library.register_vmap("lorafx::row_norm", _batched_norm, lib=_LIBRARY)
_LIBRARY.define(
    "packed_row_norm(Tensor[] tensors, str format, int[] layout, ScalarType dtype, Tensor a, Tensor b, float scaling) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe),
)
_LIBRARY.impl("packed_row_norm", _kept_packed_norm, "CompositeExplicitAutograd")
_LIBRARY.impl("packed_row_norm", torch.library.fallthrough_kernel, "Autograd")
torch.library.register_fake("lorafx::packed_row_norm", _fake_packed_norm, lib=_LIBRARY)
