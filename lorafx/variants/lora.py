"""LoRA: ``W' = W + s B A`` (arXiv 2106.09685, eq. 3); rsLoRA is another scaling (arXiv 2312.03732)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from lorafx.variants.base import Start, StartRequest, Update, Variant
from lorafx.variants.inits import NAMES, find_init, less


class Lora(Variant):
    """Two factors: ``lora_A [r, in]`` starts at random, ``lora_B [out, r]`` at zero (:mod:`.inits`)."""

    name = "lora"
    parameters: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")
    inits = NAMES

    def has_init(self, name: str) -> bool:
        """Whether it is one of ``inits``, or another number of iterations of the fast PiSSA or of LoftQ's rounds."""
        return find_init(name) is not None

    def misfit(self, init: str, kind: str, shape: tuple[int, ...], r: int, shared: bool) -> str | None:
        """What the initialisation has against it."""
        found = find_init(init)
        return None if found is None else found.misfit(init, kind, shape, r, shared)

    def shapes(self, out_features: int, in_features: int, r: int) -> Mapping[str, tuple[int, ...]]:
        """``lora_A [r, in]`` and ``lora_B [out, r]``."""
        return {"lora_A": (r, in_features), "lora_B": (out_features, r)}

    def start(self, request: StartRequest) -> Start:
        """The factors of the initialisation asked for, rounded to the adapter's dtype, and what they leave."""
        init = find_init(request.init)
        assert init is not None
        factors = init.factors(request) if request.factors is None else request.factors
        a, b = (t.to(device=request.weight.device, dtype=request.dtype) for t in factors)
        taken = init.changes_base and not init.rounds and (request.factors is not None or not init.by_data)
        base = less(request.weight, a, b, request.scaling) if taken else None
        return Start({"lora_A": a, "lora_B": b}, base)

    def update(self, weight: Tensor, tensors: Mapping[str, Tensor], scaling: float) -> Update:
        """``left = s B``, ``right = A``."""
        return Update(tensors["lora_B"], tensors["lora_A"], scaling=scaling)


class LoraWithBias(Lora):
    """LoRA whose second factor is a layer with a bias: ``b' = b + s lora_B_bias`` (PEFT's ``lora_bias``)."""

    name = "lora_bias"
    parameters = ("lora_A", "lora_B", "lora_B_bias")
    shifts_bias = True

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
        return Update(tensors["lora_B"], tensors["lora_A"], shift=tensors["lora_B_bias"] * scaling, scaling=scaling)
