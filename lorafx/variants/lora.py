"""LoRA: ``W' = W + s B A`` (arXiv 2106.09685, eq. 3); rsLoRA is another scaling (arXiv 2312.03732)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lorafx.variants.base import Option, Start, StartRequest, Update
from lorafx.variants.inits import NAMES, find_init, less

NO_OPTIONS: Mapping[str, Option] = MappingProxyType({})


@dataclass(frozen=True)
class Lora:
    """Two factors: ``lora_A [r, in]`` starts at random, ``lora_B [out, r]`` at zero (:mod:`.inits`)."""

    name: str = "lora"
    parameters: tuple[str, ...] = ("lora_A", "lora_B")
    shared: tuple[str, ...] = ()
    inits: tuple[str, ...] = NAMES
    options: Mapping[str, Option] = field(default_factory=lambda: NO_OPTIONS)
    shifts_bias: bool = False
    scales_rows: bool = False
    shrinks: bool = False

    def has_init(self, name: str) -> bool:
        """Whether it is one of ``inits``, or another number of iterations of the fast PiSSA."""
        return find_init(name) is not None

    def misfit(self, init: str, kind: str, shape: tuple[int, ...], r: int, shared: bool) -> str | None:
        """What the initialisation has against it."""
        found = find_init(init)
        return None if found is None else found.misfit(init, kind, shape, r, shared)

    def default_alpha(self, r: int) -> float:
        """16, whatever r is."""
        return 16

    def scaling(self, alpha: float, r: int, rslora: bool) -> float:
        """alpha / r (arXiv 2106.09685, section 4.1), or alpha / sqrt(r) (arXiv 2312.03732, theorem 3.2)."""
        return alpha / (math.sqrt(r) if rslora else r)

    def shapes(self, out_features: int, in_features: int, r: int) -> Mapping[str, tuple[int, ...]]:
        """``lora_A [r, in]`` and ``lora_B [out, r]``."""
        return {"lora_A": (r, in_features), "lora_B": (out_features, r)}

    def share(
        self, sizes: Sequence[tuple[int, int]], r: int, options: Mapping[str, Any], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Nothing is shared."""
        return {}

    def start(self, request: StartRequest) -> Start:
        """The factors of the initialisation asked for, rounded to the adapter's dtype, and what they leave."""
        init = find_init(request.init)
        assert init is not None
        factors = init.factors(request) if request.factors is None else request.factors
        a, b = (t.to(device=request.weight.device, dtype=request.dtype) for t in factors)
        taken = init.changes_base and (request.factors is not None or not init.by_data)
        base = less(request.weight, a, b, request.scaling) if taken else None
        return Start({"lora_A": a, "lora_B": b}, base)

    def update(self, weight: Tensor, tensors: Mapping[str, Tensor], scaling: float) -> Update:
        """``left = s B``, ``right = A``."""
        return Update(tensors["lora_B"] * scaling, tensors["lora_A"])


@dataclass(frozen=True)
class LoraWithBias(Lora):
    """LoRA whose second factor is a layer with a bias: ``b' = b + s lora_B_bias`` (PEFT's ``lora_bias``)."""

    name: str = "lora_bias"
    parameters: tuple[str, ...] = ("lora_A", "lora_B", "lora_B_bias")
    shifts_bias: bool = True

    def shapes(self, out_features: int, in_features: int, r: int) -> Mapping[str, tuple[int, ...]]:
        """LoRA's, and ``lora_B_bias [out]``."""
        return {**super().shapes(out_features, in_features, r), "lora_B_bias": (out_features,)}

    def start(self, request: StartRequest) -> Start:
        """LoRA's, and a bias of zero."""
        begun = super().start(request)
        weight = request.weight
        bias = torch.zeros(weight.shape[0], dtype=request.dtype, device=weight.device)
        return Start({**begun.parameters, "lora_B_bias": bias}, begun.base)

    def update(self, weight: Tensor, tensors: Mapping[str, Tensor], scaling: float) -> Update:
        """LoRA's, and the shift of the bias."""
        return Update(tensors["lora_B"] * scaling, tensors["lora_A"], shift=tensors["lora_B_bias"] * scaling)
