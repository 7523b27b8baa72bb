"""What a variant is: its parameters, how they start, its operator, and how it folds into a weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch._ops import OpOverload


class Variant(Protocol):
    """One way to adapt a linear layer.

    The operator's schema is ``op(x, weight, bias, *parameters, scaling, dropout, training)`` with the
    parameters in the order of :attr:`parameters`.
    """

    @property
    def name(self) -> str:
        """The name that ``LoraSpec.variant`` selects it by."""
        ...

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the trainable tensors, as PEFT calls them."""
        ...

    @property
    def inits(self) -> tuple[str, ...]:
        """Values of ``LoraSpec.init`` that it knows."""
        ...

    @property
    def op(self) -> OpOverload:
        """The operator whose reference defines the variant."""
        ...

    def shapes(self, out_features: int, in_features: int, r: int) -> Mapping[str, tuple[int, ...]]:
        """The shape of each parameter at a layer of this size."""
        ...

    def init(
        self, weight: Tensor, r: int, init: str, dtype: torch.dtype, generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """Starting values, on the weight's device, for which the layer's output is unchanged."""
        ...

    def merge(self, weight: Tensor, parameters: Mapping[str, Tensor], scaling: float) -> Tensor:
        """The weight ``[out, in]`` whose plain linear layer equals the adapted one.

        Computed and returned in the dtype of ``weight``: the caller widens first and rounds after.
        """
        ...
