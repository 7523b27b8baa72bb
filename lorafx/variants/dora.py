"""DoRA: direction and length of each row apart, ``W' = m (W + s B A) / ||W + s B A||`` (arXiv 2402.09353, eq. 5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafx.variants.base import Start, StartRequest, Update
from lorafx.variants.lora import Lora


@dataclass(frozen=True)
class Dora(Lora):
    """LoRA's factors, and ``lora_magnitude_vector [out]``, the length of each row, in float32 or better.

    The norm takes no gradient (section 4.3). Dropout is on the low-rank branch only, where the authors'
    code drops the frozen layer's share of the rescaled output as well, at the price of a second product.
    """

    name: str = "dora"
    parameters: tuple[str, ...] = ("lora_A", "lora_B", "lora_magnitude_vector")
    scales_rows: bool = True

    def shapes(self, out_features: int, in_features: int, r: int) -> Mapping[str, tuple[int, ...]]:
        """LoRA's, and ``lora_magnitude_vector [out]``."""
        return {**super().shapes(out_features, in_features, r), "lora_magnitude_vector": (out_features,)}

    def start(self, request: StartRequest) -> Start:
        """LoRA's start, and the rows' lengths there: a gain of exactly 1."""
        begun = super().start(request)
        weight = request.weight if begun.base is None else begun.base.to(request.weight.dtype)
        left, right = begun.parameters["lora_B"] * request.scaling, begun.parameters["lora_A"]
        norm = row_norm(weight, left, right)
        return Start({**begun.parameters, "lora_magnitude_vector": norm}, begun.base)

    def update(self, weight: Tensor, tensors: Mapping[str, Tensor], scaling: float) -> Update:
        """LoRA's, with the gain ``m / ||W + left right||``."""
        left, right = tensors["lora_B"] * scaling, tensors["lora_A"]
        return Update(left, right, gain=tensors["lora_magnitude_vector"] / row_norm(weight, left, right))


def row_norm(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The norm of each row of ``weight [..., out, in] + left [..., out, r] right [..., r, in]``, without gradient.

    ``||w + l R||^2 = ||w||^2 + 2 l.(R w) + l (R R^T) l^T`` needs no matrix of the weight's size. It is
    computed in float32 or better; where it is called again with the same values it is not computed again.
    """
    weight, left, right = weight.detach(), left.detach(), right.detach()
    dtype = torch.promote_types(torch.promote_types(weight.dtype, left.dtype), torch.float32)
    with torch.autocast("cpu" if weight.is_meta else weight.device.type, enabled=False):
        left, right = left.to(dtype), right.to(dtype)
        projected = (weight.to(dtype) @ right.mT) * left
        quadratic = (left @ (right @ right.mT)) * left
        square = weight.to(dtype).square().sum(-1) + 2 * projected.sum(-1) + quadratic.sum(-1)
        return square.clamp_min(0).sqrt()
