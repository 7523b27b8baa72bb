"""What a variant is: its tensors, how they start, and the update of a layer that they stand for."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lorafx.checks import Check


def full_precision(tensor: Tensor) -> AbstractContextManager[Any]:
    """No autocast for what is computed from this tensor (which may be on the meta device)."""
    device = "cpu" if tensor.is_meta else tensor.device.type
    if not torch.is_autocast_enabled(device):  # the context costs more than the question
        return nullcontext()
    found: AbstractContextManager[Any] = torch.autocast(device, enabled=False)
    return found


def is_transformed() -> bool:
    """Whether function transforms or forward-mode differentiation are at work, which are to see plain torch."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


@dataclass(frozen=True)
class Update:
    """What an adapter makes of a layer: ``W' = gain * (W + left right)`` and ``b' = b + shift``.

    ``left`` is ``[..., out, r]`` and ``right`` ``[..., r, in]``, the scaling included; ``gain`` (a factor for each row
    of the weight) and ``shift`` are ``[..., out]``. Leading dimensions are those of a stack of weights
    (experts). Every variant is of this form, so every kind of layer, the fold and the export take all of them.
    ``left`` is ``scaling * unscaled``: what computes with the factors can multiply where it is cheapest.
    """

    unscaled: Tensor
    right: Tensor
    gain: Tensor | None = None
    shift: Tensor | None = None
    scaling: float = 1.0

    @cached_property
    def left(self) -> Tensor:
        """See the class."""
        return self.unscaled if self.scaling == 1.0 else self.unscaled * self.scaling

    def fold(self, weight: Tensor) -> Tensor:
        """``W'`` for ``weight [..., out, in]``, in the dtype that the operands promote to."""
        folded = weight + self.left @ self.right
        return folded if self.gain is None else self.gain.unsqueeze(-1) * folded


@dataclass(frozen=True)
class Start:
    """First values: of the parameters, and of the base weight where the initialisation changes that too.

    ``base [out, in]`` has the weight's dtype and memory layout.
    """

    parameters: dict[str, Tensor]
    base: Tensor | None = None


@dataclass(frozen=True)
class Option:
    """A setting that one variant has (``LoraSpec.options``): its default, and the check of a value."""

    default: Any
    check: Check[Any]


@dataclass(frozen=True)
class StartRequest:
    """What first values are asked for.

    ``weight`` is ``[out, in]``. ``sparse`` says that the input picks single columns (an embedding's
    one-hot rows): then the side that the input meets starts at zero, so that only what is seen changes.
    ``factors`` are A and B where they are known: data has told them (:func:`lorafx.initialize`), or what a base format
    loses (:mod:`lorafx.passes.loftq`).
    """

    weight: Tensor
    r: int
    scaling: float
    init: str
    dtype: torch.dtype
    generator: torch.Generator | None
    options: Mapping[str, Any]
    sparse: bool = False
    factors: tuple[Tensor, Tensor] | None = None


class Variant(ABC):
    """One way to adapt a weight. Shapes are those of one matrix ``[out, in]``; a stack has them all in front.

    Attributes:
        name: what ``LoraSpec.variant`` selects it by.
        parameters: names of the trainable tensors of a site, as PEFT calls them.
        shared: names of the frozen tensors that all sites of an adapter have in common.
        inits: values of ``LoraSpec.init`` that it knows, the default first.
        options: the keys of ``LoraSpec.options`` that it has.
        shifts_bias: whether it adds to the layer's bias, so that the layer must have one.
        scales_rows: whether its updates have a gain.
        shrinks: whether training takes ranks away; the scaling stays that of the first one.
    """

    name: ClassVar[str]
    parameters: ClassVar[tuple[str, ...]]
    shared: ClassVar[tuple[str, ...]] = ()
    inits: ClassVar[tuple[str, ...]]
    options: ClassVar[Mapping[str, Option]] = MappingProxyType({})
    shifts_bias: ClassVar[bool] = False
    scales_rows: ClassVar[bool] = False
    shrinks: ClassVar[bool] = False

    def has_init(self, name: str) -> bool:
        """Whether it knows this value of ``LoraSpec.init``: one of ``inits``."""
        return name in self.inits

    def misfit(self, init: str, kind: str, shape: tuple[int, ...], r: int, shared: bool) -> str | None:
        """Why it cannot start by ``init`` at a layer of this kind, weight and rank, and what to do; None if it can.

        ``shared`` says that the weight has another use, which a start that changes the weight would change too.
        """
        return None

    def default_alpha(self, r: int) -> float:
        """alpha where the spec gives none: 16, whatever r is."""
        return 16

    def scaling(self, alpha: float, r: int, rslora: bool) -> float:
        """The factor of ``left right``: alpha / r (arXiv 2106.09685, section 4.1).

        With ``rslora`` alpha / sqrt(r) (arXiv 2312.03732, theorem 3.2).
        """
        return alpha / (math.sqrt(r) if rslora else r)

    @abstractmethod
    def shapes(self, out_features: int, in_features: int, r: int) -> Mapping[str, tuple[int, ...]]:
        """The shape of each parameter at a matrix of this size."""

    def share(
        self, sizes: Sequence[tuple[int, int]], r: int, options: Mapping[str, Any], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """The shared tensors for matrices of these ``(out, in)`` sizes, on the CPU."""
        return {}

    @abstractmethod
    def start(self, request: StartRequest) -> Start:
        """First values, on the weight's device, for which the layer's output is unchanged."""

    @abstractmethod
    def update(self, weight: Tensor, tensors: Mapping[str, Tensor], scaling: float) -> Update:
        """The update that ``tensors`` (parameters and shared) mean for ``weight [..., out, in]``."""
