"""VeRA: two frozen random matrices for all layers, two trained vectors for each (arXiv 2310.11454, eq. 2)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lorafx import checks
from lorafx.variants.base import Option, Start, StartRequest, Update, Variant

_OPTIONS: Mapping[str, Option] = MappingProxyType(
    {
        "projection_prng_key": Option(0, checks.integer),
        "save_projection": Option(True, checks.flag),
        "d_initial": Option(0.1, checks.number),
    }
)


class Vera(Variant):
    """``W' = W + s diag(b) B diag(d) A``: ``vera_lambda_b [out]`` starts at zero, ``vera_lambda_d [r]`` at 0.1.

    ``vera_A [r, largest in]`` and ``vera_B [largest out, r]`` come from a seed, as PEFT draws them, and each
    site takes the part that it needs. Options: ``projection_prng_key`` (the seed), ``save_projection``
    (write them to disk too), ``d_initial``.
    """

    name = "vera"
    parameters = ("vera_lambda_b", "vera_lambda_d")
    shared = ("vera_A", "vera_B")
    inits = ("kaiming",)
    options = _OPTIONS

    def default_alpha(self, r: int) -> float:
        """r, so that there is no scaling, as in the paper."""
        return r

    def shapes(self, out_features: int, in_features: int, r: int) -> Mapping[str, tuple[int, ...]]:
        """``vera_lambda_b [out]`` and ``vera_lambda_d [r]``."""
        return {"vera_lambda_b": (out_features,), "vera_lambda_d": (r,)}

    def share(
        self, sizes: Sequence[tuple[int, int]], r: int, options: Mapping[str, Any], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """A, then B, from one generator: uniform in +-sqrt(6 / fan_in)."""
        generator = torch.Generator().manual_seed(options["projection_prng_key"])
        out_features, in_features = (max(s[i] for s in sizes) for i in (0, 1))
        drawn = {}
        for name, shape in (("vera_A", (r, in_features)), ("vera_B", (out_features, r))):
            bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
            drawn[name] = torch.empty(shape).uniform_(-bound, bound, generator=generator).to(dtype)
        return drawn

    def start(self, request: StartRequest) -> Start:
        """b zero, d the same everywhere."""
        kwargs: dict[str, Any] = {"dtype": request.dtype, "device": request.weight.device}
        b = torch.zeros(request.weight.shape[0], **kwargs)
        d = torch.full((request.r,), request.options["d_initial"], **kwargs)
        return Start({"vera_lambda_b": b, "vera_lambda_d": d})

    def update(self, weight: Tensor, tensors: Mapping[str, Tensor], scaling: float) -> Update:
        """``left = diag(b) B diag(d)``, ``right = A``, with this layer's part of A and B.

        d is at the side that has a gradient anyway: b's and d's both come of ``left``'s, and A, which never
        trains, needs none.
        """
        b, d = tensors["vera_lambda_b"], tensors["vera_lambda_d"]
        out_features, in_features, r = weight.shape[-2], weight.shape[-1], d.shape[-1]
        left = tensors["vera_B"][:out_features, :r] * (b.unsqueeze(-1) * d.unsqueeze(-2))
        return Update(left, tensors["vera_A"][:r, :in_features], scaling=scaling)
