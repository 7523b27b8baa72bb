"""DoRA: direction and length of each row apart, ``W' = m (W + s B A) / ||W + s B A||`` (arXiv 2402.09353, eq. 5)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lorafx.variants.base import Start, StartRequest, Update
from lorafx.variants.lora import Lora
from lorafx.variants.row_norm import row_norm


class Dora(Lora):
    """LoRA's factors, and ``lora_magnitude_vector [out]``, the length of each row, in float32 or better.

    The norm takes no gradient (section 4.3). Dropout is on the low-rank branch only, where the authors'
    code drops the frozen layer's share of the rescaled output as well, at the price of a second product.
    A row that is zero has no direction; its factor is then ``m``, which is zero too, and not ``0 / 0``.
    """

    name = "dora"
    parameters = ("lora_A", "lora_B", "lora_magnitude_vector")
    scales_rows = True

    def shapes(self, out_features: int, in_features: int, r: int) -> Mapping[str, tuple[int, ...]]:
        """LoRA's, and ``lora_magnitude_vector [out]``."""
        return {**super().shapes(out_features, in_features, r), "lora_magnitude_vector": (out_features,)}

    def start(self, request: StartRequest) -> Start:
        """LoRA's start, and the rows' lengths there: a gain of exactly 1."""
        begun = super().start(request)
        weight = request.weight if begun.base is None else begun.base
        norm = row_norm(weight, begun.parameters["lora_A"], begun.parameters["lora_B"], request.scaling)
        return Start({**begun.parameters, "lora_magnitude_vector": norm}, begun.base)

    def update(self, weight: Tensor, tensors: Mapping[str, Tensor], scaling: float) -> Update:
        """LoRA's, with the gain ``m / ||W + s B A||``."""
        a, b = tensors["lora_A"], tensors["lora_B"]
        norm = row_norm(weight, a, b, scaling)
        gain = tensors["lora_magnitude_vector"] / torch.where(norm > 0, norm, 1.0)
        return Update(b, a, gain=gain, scaling=scaling)
