"""int8 with a scale for each row, as bitsandbytes' ``Linear8bitLt`` stores weights (arXiv 2208.07339, section 2)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lorafx.bases.base import PANEL_BYTES, Format, Layout, Packed, damaged, loss_of_zeros, scales_damage, take
from lorafx.checks import refusal

#: Codes are symmetric: -128 is none.
LARGEST = 127

#: A row of smaller values than this reads back as zero: 127 over its largest is no float32 any more.
_SMALLEST = 1e-36


class Int8(Format):
    """``codes [..., out, in]`` int8 and ``absmax [..., out]`` float32; a value is ``codes * (absmax / 127)``.

    Codes are ``round(weight * (127 / absmax))``, halves to even, computed in float32. bitsandbytes rounds the weight to
    float16 first, so that its codes are these only for a weight that float16 holds.
    """

    name = "int8"
    mark = "SCB"

    def settings(self, width: int, block_size: int | None, double_quant: bool | None) -> tuple[int, bool]:
        """A block is a row, and its scale stays as it is."""
        if block_size not in (None, width):
            raise refusal("block_size", block_size, "int8 has one scale for each row; leave it out")
        if double_quant not in (None, False):
            raise refusal("double_quant", double_quant, "int8 keeps its scales as they are; leave it out")
        return width, False

    def layout(self, shape: tuple[int, ...], block_size: int, double_quant: bool) -> Layout:
        """See the class."""
        return {"codes": (shape, torch.int8), "absmax": (shape[:-1], torch.float32)}

    def pack(self, weight: Tensor, block_size: int, double_quant: bool) -> dict[str, Tensor]:
        """See the class."""
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        absmax = torch.empty(weight.shape[:-1], dtype=torch.float32, device=weight.device)
        by_row, scales = codes.view(-1, block_size), absmax.view(-1)
        step = max(1, PANEL_BYTES // 4 // block_size)
        rows = weight.reshape(-1, block_size)
        for start in range(0, len(by_row), step):
            values = rows[start : start + step].float()
            scale = values.abs().amax(1)
            factor = LARGEST / scale.where(scale >= _SMALLEST, torch.inf)
            scales[start : start + step] = scale
            by_row[start : start + step] = values.mul(factor.unsqueeze(1)).round_()
        return {"codes": codes, "absmax": absmax}

    def rows(self, packed: Packed, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """See :meth:`Format.rows`."""
        codes = packed.tensors["codes"].view(-1, packed.width)[start:stop]
        scale = packed.tensors["absmax"].view(-1)[start:stop] / LARGEST
        return codes.float().mul_(scale.unsqueeze(1)).to(dtype or packed.dtype)

    def largest_loss(self, packed: Packed) -> float:
        """See :meth:`Format.largest_loss`; 0.24 in rows of 4096, of which normal values lose 0.01."""
        return loss_of_zeros(packed.width, 0.5 / LARGEST)

    def damage(self, packed: Packed) -> str | None:
        """Scales that are none, or a code that the format does not have."""
        if int(packed.tensors["codes"].amin()) < -LARGEST:
            return f"codes holds -128; they go from {-LARGEST} to {LARGEST}"
        return scales_damage("absmax", packed.tensors["absmax"])

    def state_dict(self, packed: Packed) -> dict[str, Tensor]:
        """``Linear8bitLt``'s: ``weight``, ``SCB``, and ``weight_format`` 0, rows one after another."""
        codes, absmax = packed.tensors["codes"], packed.tensors["absmax"]
        return {"weight": codes, "SCB": absmax, "weight_format": torch.tensor(0, dtype=torch.uint8)}

    def from_state_dict(self, tensors: Mapping[str, Tensor], prefix: str = "") -> Packed:
        """See :meth:`Format.from_state_dict`. The keys tell no dtype; bitsandbytes goes through float16."""
        where = prefix.rstrip(".") or "the weight"
        codes, absmax = take(tensors, prefix, self.name, "weight"), take(tensors, prefix, self.name, "SCB")
        order = tensors.get(f"{prefix}weight_format")
        if order is not None and (order.numel() != 1 or int(order) != 0):
            raise damaged(self.name, where, f"weight_format is {order.tolist()}, and only 0, row by row, can be read")
        if codes.dim() < 2:
            raise damaged(self.name, where, f"weight has shape {tuple(codes.shape)}; expected [out, in]")
        found = {"codes": codes, "absmax": absmax}
        packed = Packed(self.name, tuple(codes.shape), torch.float16, codes.shape[-1], False, found)
        self.validate(packed, where)
        return packed
