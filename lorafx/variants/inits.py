"""First values of the factors ``A [r, in]`` and ``B [out, r]``: one function and one line in ``INITS`` each.

Those that start from the weight itself return the base that is left, ``W - s B A``, so that the layer's
output is unchanged. Values are drawn on the CPU in float32: a seed means the same on every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from lorafx.variants.base import StartRequest


@dataclass(frozen=True)
class Factors:
    """A and B in float32 or better, and the base that goes with them where it is not the weight itself."""

    a: Tensor
    b: Tensor
    base: Tensor | None = None


Init = Callable[[StartRequest], Factors]


def _one_random(request: StartRequest, fill: Callable[[Tensor], Tensor]) -> Factors:
    """One factor as ``fill`` draws it and the other one zero."""
    out_features, in_features = request.weight.shape
    drawn_on = "meta" if request.weight.is_meta else "cpu"
    a = torch.empty((request.r, in_features), dtype=torch.float32, device=drawn_on)
    b = torch.empty((out_features, request.r), dtype=torch.float32, device=drawn_on)
    drawn, zero = (b, a) if request.sparse else (a, b)
    fill(drawn)
    zero.zero_()
    return Factors(a, b)


def kaiming(request: StartRequest) -> Factors:
    """Uniform in +-1/sqrt(in) (Kaiming with a = sqrt(5), as in the authors' code for arXiv 2106.09685)."""
    if request.sparse:
        return _one_random(request, lambda t: nn.init.normal_(t, generator=request.generator))
    return _one_random(request, lambda t: nn.init.kaiming_uniform_(t, a=math.sqrt(5), generator=request.generator))


def gaussian(request: StartRequest) -> Factors:
    """Normal with deviation 1/r."""
    return _one_random(request, lambda t: nn.init.normal_(t, std=1.0 / request.r, generator=request.generator))


#: By the name that ``LoraSpec.init`` selects it by.
INITS: Mapping[str, Init] = MappingProxyType({"kaiming": kaiming, "gaussian": gaussian})
