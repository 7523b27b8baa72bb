"""Affine int4, as ONNX Runtime's MatMulNBits reads it: ``value = (code - zero_point) * scale``.

    rows [n, in]  --quantize_int4-->  codes [n, blocks, size / 2], scales [n, blocks], zeros [n, (blocks + 1) / 2]

A block is of consecutive values of a row, the last one filled up. Its codes, 0 to 15, span its values and zero. Codes
and zero points lie two in a byte, the first in the low bits. Rows do not depend on each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lorafx.bases.view import ReadAsDense

aten = torch.ops.aten


def quantize_int4(rows: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zero points of ``rows [n, in]`` float32; see the module."""
    blocks = pad(rows, (0, -rows.shape[1] % block_size)).view(len(rows), -1, block_size)
    low, high = blocks.amin(2).clamp_max_(0), blocks.amax(2).clamp_min_(0)
    scales = (high - low) / 15
    steps = scales.where(scales > 0, 1.0)
    zeros = (-low / steps).round_()
    codes = (blocks / steps.unsqueeze(2)).round_().add_(zeros.unsqueeze(2)).clamp_(0, 15)
    return _pairs(codes), scales, _pairs(pad(zeros, (0, zeros.shape[1] % 2)))


def dequantize_int4(codes: Tensor, scales: Tensor, zeros: Tensor, width: int) -> Tensor:
    """The values ``[n, width]`` float32 that these stand for."""
    points = _singles(zeros)[:, : scales.shape[1]].float()
    values = _singles(codes).float().sub_(points.unsqueeze(2)).mul_(scales.unsqueeze(2))
    return values.view(len(codes), -1)[:, :width]


def _pairs(codes: Tensor) -> Tensor:
    bytes_ = codes.to(torch.uint8)
    return bytes_[..., 0::2] | bytes_[..., 1::2] << 4


def _singles(pairs: Tensor) -> Tensor:
    return torch.stack((pairs & 15, pairs >> 4), -1).flatten(-2)


class Int4Tensor(ReadAsDense):
    """A weight ``[out, width]`` in int4 for a graph to run with, ``turned`` its transpose: dense while it is read."""

    parts: tuple[Tensor, Tensor, Tensor]
    width: int
    turned: bool

    @staticmethod
    def __new__(
        cls, parts: tuple[Tensor, Tensor, Tensor], width: int, turned: bool, dtype: torch.dtype = torch.float32
    ) -> Int4Tensor:
        shape = (width, len(parts[0])) if turned else (len(parts[0]), width)
        made: Int4Tensor = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=parts[0].device)
        made.parts, made.width, made.turned = parts, width, turned
        return made

    def dequantize(self) -> Tensor:
        """The dense weight."""
        values = dequantize_int4(*self.parts, self.width).to(self.dtype)
        return values.t() if self.turned else values

    @property
    def origin(self) -> str:
        """What it is, for messages."""
        return f"a weight {list(self.shape)} that is stored as int4"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub lacks func
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (aten.detach.default, aten.alias.default, aten._to_copy.default):
            held: Int4Tensor = args[0]
            return held._again(kwargs.get("dtype"), kwargs.get("device"))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _again(self, dtype: torch.dtype | None, device: torch.device | None) -> Int4Tensor:
        codes, scales, zeros = (part.to(device or part.device) for part in self.parts)
        return Int4Tensor((codes, scales, zeros), self.width, self.turned, dtype or self.dtype)
