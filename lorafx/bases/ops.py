"""The operators on packed weights; kernels implement them for their devices, and what is here is what they mean.

A packed matrix is handed over as its tensors (in the order of the format's layout), the format's name, and
``layout = [out, in, block_size, double_quant]``. Its values are those of :meth:`lorafx.bases.base.Format.rows`, in
``dtype``; ``x`` has that dtype too. A stack of matrices counts as one, its rows one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lorafx.bases import FORMATS
from lorafx.bases.base import PANEL_BYTES, Packed

_LIBRARY: Any = torch.library.Library("lorafx", "FRAGMENT")  # type: ignore[no-untyped-call]
_PACKED = "Tensor[] tensors, str format, int[] layout, ScalarType dtype"


def describe(packed: Packed) -> tuple[list[Tensor], str, list[int], torch.dtype]:
    """A packed weight as the operators take it."""
    layout = [packed.height, packed.width, packed.block_size, int(packed.double_quant)]
    return [*packed.tensors.values()], packed.format, layout, packed.dtype


def _packed(tensors: Sequence[Tensor], name: str, layout: Sequence[int], dtype: torch.dtype) -> Packed:
    height, width, block_size, double_quant = layout
    names = FORMATS[name].layout((height, width), block_size, bool(double_quant))
    return Packed(name, (height, width), dtype, block_size, bool(double_quant), dict(zip(names, tensors, strict=True)))


def _rows(
    tensors: Sequence[Tensor], name: str, layout: Sequence[int], dtype: torch.dtype, start: int, stop: int
) -> Tensor:
    packed = _packed(tensors, name, layout, dtype)
    found = torch.empty(stop - start, packed.width, dtype=dtype, device=tensors[0].device)
    for at, panel in FORMATS[name].panels(packed, start=start, stop=stop):
        found[at - start : at - start + len(panel)] = panel
    return found


def _fake_rows(tensors: Sequence[Tensor], name: str, layout: Any, dtype: torch.dtype, start: int, stop: int) -> Tensor:
    return tensors[0].new_empty(stop - start, layout[1], dtype=dtype)


def row_parts(height: int, width: int, dtype: torch.dtype) -> list[slice]:
    """The rows of a matrix in parts of a panel's size, so that never more of it need be dense."""
    step = max(1, PANEL_BYTES // (width * dtype.itemsize))
    return [slice(start, min(start + step, height)) for start in range(0, height, step)]


def _cast(tensors: Sequence[Tensor], name: str, layout: Sequence[int], dtype: torch.dtype, to: torch.dtype) -> Tensor:
    height, width, *_ = layout
    found = torch.empty(height, width, dtype=to, device=tensors[0].device)
    for part in row_parts(height, width, dtype):
        found[part] = packed_rows(tensors, name, layout, dtype, part.start, part.stop)
    return found


def _fake_cast(tensors: Sequence[Tensor], name: str, layout: Any, dtype: torch.dtype, to: torch.dtype) -> Tensor:
    return tensors[0].new_empty(layout[0], layout[1], dtype=to)


def _linear(x: Tensor, bias: Tensor | None, *packed: Any) -> Tensor:
    return F.linear(x, dense(*packed), bias)


def _fake_linear(x: Tensor, bias: Tensor | None, tensors: Any, name: str, layout: Sequence[int], dtype: Any) -> Tensor:
    return x.new_empty(x.shape[0], layout[0])


def _mm(x: Tensor, *packed: Any) -> Tensor:
    return x @ dense(*packed)


def _fake_mm(x: Tensor, tensors: Any, name: str, layout: Sequence[int], dtype: Any) -> Tensor:
    return x.new_empty(x.shape[0], layout[1])


def define_packed_op(
    name: str, arguments: str, returns: str, meaning: Callable[..., Any], fake: Callable[..., Any]
) -> Any:
    """Register an operator ``lorafx::name`` on a packed weight and whatever follows it."""
    return _define(name, f"{_PACKED}, {arguments}", meaning, fake, returns)


def _define(
    name: str, arguments: str, meaning: Callable[..., Any], fake: Callable[..., Any], returns: str = "Tensor"
) -> Any:
    _LIBRARY.define(f"{name}({arguments}) -> {returns}", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, meaning, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lorafx::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.lorafx, name).default


_SOME = f"{_PACKED}, int start, int stop"
#: Rows ``start`` to ``stop`` as the formats in Python read them: what kernels call for formats that they do not know.
packed_reference = _define("packed_reference", _SOME, _rows, _fake_rows)
#: Rows ``start`` to ``stop``.
packed_rows = _define("packed_rows", _SOME, _rows, _fake_rows)
#: All rows, cast to another dtype after they were rounded to their own, which they are in a panel at a time.
packed_cast = _define("packed_cast", f"{_PACKED}, ScalarType to", _cast, _fake_cast)
#: ``x [M, in] W^T + bias``.
packed_linear = _define("packed_linear", f"Tensor x, Tensor? bias, {_PACKED}", _linear, _fake_linear)
#: ``x [M, out] W``.
packed_mm = _define("packed_mm", f"Tensor x, {_PACKED}", _mm, _fake_mm)


def dense(tensors: Sequence[Tensor], name: str, layout: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The weight ``[out, in]``."""
    found: Tensor = packed_rows(tensors, name, layout, dtype, 0, layout[0])
    return found
