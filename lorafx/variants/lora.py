"""LoRA: ``W' = W + scaling * B A`` (arXiv 2106.09685); rsLoRA is another scaling (arXiv 2312.03732)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._ops import OpOverload

from lorafx import ops


@dataclass(frozen=True)
class Lora:
    """Two factors: ``lora_A [r, in]`` starts at random, ``lora_B [out, r]`` at zero."""

    name: str = "lora"
    parameters: tuple[str, ...] = ("lora_A", "lora_B")
    inits: tuple[str, ...] = ("kaiming", "gaussian")
    op: OpOverload = ops.lora_linear

    def shapes(self, out_features: int, in_features: int, r: int) -> Mapping[str, tuple[int, ...]]:
        """``lora_A [r, in]`` and ``lora_B [out, r]``."""
        return {"lora_A": (r, in_features), "lora_B": (out_features, r)}

    def init(
        self, weight: Tensor, r: int, init: str, dtype: torch.dtype, generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """A from ``kaiming`` uniform with a = sqrt(5), or from a ``gaussian`` of deviation 1/r; B zero.

        Values are drawn on the CPU in float32, so that a seed means the same on every device.
        """
        out_features, in_features = weight.shape
        drawn_on = "meta" if weight.is_meta else "cpu"
        a = torch.empty((r, in_features), dtype=torch.float32, device=drawn_on)
        if init == "gaussian":
            nn.init.normal_(a, std=1.0 / r, generator=generator)
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        b = torch.zeros((out_features, r), dtype=dtype, device=weight.device)
        return {"lora_A": a.to(device=weight.device, dtype=dtype), "lora_B": b}

    def merge(self, weight: Tensor, parameters: Mapping[str, Tensor], scaling: float) -> Tensor:
        """``W + scaling * B A`` in the dtype of ``weight``."""
        a, b = (parameters[n].to(weight.dtype) for n in self.parameters)
        return torch.addmm(weight, b, a, alpha=scaling)
