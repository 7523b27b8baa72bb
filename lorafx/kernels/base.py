"""What a provider is: the forward and the backward of adapted linear layers that read one input.

Layers that read the same ``x [M, k]`` are one *group*. Of layer ``i``, ``W_i [n_i, k]`` is frozen; its adapters ``j``
(there may be none) are ``left_j [n_i, r_j]`` and ``right_j [r_j, k]`` with a factor ``scale_j``, and those that scale
rows have ``gain_j [n_i]``. Each changes the frozen layer, so that the layer's gain is ``g_i = 1 + sum_j (gain_j - 1)``;
with ``l_j = gain_j * left_j``. ``R`` is the sum of all ``r_j``, and ``s`` has one column for each, in the order of
layers and adapters. With ``D_j`` the dropout of adapter ``j`` (its own mask, kept elements over 1 - p):

    s_j = scale_j D_j(x) right_j^T                           down            [M, R]
    y_i = g_i * (x W_i^T) + sum_j s_j l_j^T + b_i            up              [M, n_i]

    ds_j = scale_j dy_i l_j         dl_j = dy_i^T s_j        grad_up
    dx   = sum_i (g_i * dy_i) W_i + sum_j D_j(ds_j right_j)  grad_x          [M, k]
    dright_j = ds_j^T D_j(x)                                 grad_right      [r_j, k]
    dg_i = sum_M dy_i * (x W_i^T)                            grad_gain       [n_i]

    dleft_j = gain_j * dl_j         dgain_j = dg_i + sum_r dl_j * left_j

The contraction through ``s`` keeps what is read and written at one pass over ``x``, ``y``, ``dy`` and ``dx`` each
(RunLoRA, arXiv 2312.03415; LoRAFusion, arXiv 2510.00206, splits at ``s`` too). Sums are accumulated in float32 or
better. Whether ``scale`` is in ``s`` and ``ds``, or at ``left``, is the provider's choice. One that computes step by
step is below :class:`lorafx.kernels.steps.Stepwise`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

#: Activations that a provider may differentiate in one pass: ``x`` from ``h``, or from ``g`` and ``u``.
ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "gelu_mul", "gelu_tanh_mul", "silu_mul")


class Call(NamedTuple):
    """What is known of a group before it runs: enough to say who can serve it."""

    device: torch.device
    dtype: torch.dtype
    in_features: int
    out_features: tuple[int, ...]
    r: int


@dataclass(frozen=True)
class Adapters:
    """What of a group's adapters is no tensor: how many each layer has, and of each its rank, ``p`` and scale.

    ``p`` is that of dropout, :func:`quantised`.
    """

    counts: tuple[int, ...]
    ranks: tuple[int, ...]
    p: tuple[float, ...]
    scales: tuple[float, ...]

    @property
    def drops(self) -> bool:
        """Whether anything is dropped."""
        return any(p > 0.0 for p in self.p)

    @cached_property
    def columns(self) -> tuple[slice, ...]:
        """The columns of ``s`` of each."""
        return slices(self.ranks)

    @cached_property
    def places(self) -> tuple[slice, ...]:
        """The adapters of each layer."""
        return slices(self.counts)

    @cached_property
    def operands(self) -> tuple[slice, ...]:
        """Where :class:`Operands` have what, flattened."""
        n, count = len(self.counts), sum(self.counts)
        return slices((n, n, count, count, count))


class Operands(NamedTuple):
    """The tensors of a group, or one thing for each: of each layer ``W`` and ``b``, of each adapter the rest."""

    weights: Sequence[Any]
    biases: Sequence[Any]
    gains: Sequence[Any]
    lefts: Sequence[Any]
    rights: Sequence[Any]

    @classmethod
    def unflatten(cls, adapters: Adapters, values: Sequence[Any]) -> Operands:
        """From the order of the fields, one after the other."""
        return cls(*[values[place] for place in adapters.operands])

    def check(self, x: Tensor, adapters: Adapters) -> None:
        """Kernels read what sizes say, so these must fit together before anything is read.

        Raises:
            RuntimeError: they do not, as ``torch.nn.functional.linear`` raises it.
        """
        k = x.shape[-1]
        for weight, bias, place in zip(self.weights, self.biases, adapters.places, strict=True):
            n, width = weight.shape
            if width != k:
                raise RuntimeError(f"lorafx: an input of {k} features meets a weight [{n}, {width}]")
            if bias is not None and bias.shape != (n,):
                raise RuntimeError(f"lorafx: a bias {list(bias.shape)} at a weight [{n}, {width}]")
            for j in range(place.start, place.stop):
                left, right, gain, r = self.lefts[j], self.rights[j], self.gains[j], adapters.ranks[j]
                if left.shape != (n, r) or right.shape != (r, k) or (gain is not None and gain.shape != (n,)):
                    raise RuntimeError(
                        f"lorafx: an adapter's tensors make an update {list(left.shape)} times {list(right.shape)}, "
                        f"and the layer's weight is [{n}, {width}]"
                    )


class Provider(ABC):
    """One way to compute groups.

    Unless said otherwise tensors are on one device and of one dtype.
    ``left``, ``right``, ``gain`` and gradients of them may be wider than ``x`` (float32 adapters beside bfloat16
    activations): the small side is cast. ``s`` is in whatever dtype the provider likes.
    """

    name: ClassVar[str]
    #: The activations (:data:`ACTIVATIONS`) that it differentiates itself.
    activations: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def unavailable(self) -> str | None:
        """Why it cannot run on this machine, or None."""

    @abstractmethod
    def rejects(self, call: Call) -> str | None:
        """Why it does not serve this call, or None."""

    @abstractmethod
    def linear(
        self, x: Tensor, sources: Sequence[Tensor], recipe: str, activation: str, operands: Operands, adapters: Adapters
    ) -> Sequence[Tensor]:
        """``y [..., n]`` of each layer, with first derivatives for all tensors.

        Bit for bit the frozen layer's where gains are 1 and lefts 0; for that, ``x [..., k]`` is as the layer has it: a
        product of a strided input has its own way of adding a bias. No ``y`` is a view.

        Args:
            x: the input.
            sources, recipe: with a recipe, backward computes ``x`` from these again (:mod:`.recipe`).
            activation: one of :attr:`activations`, or empty: with it the gradient goes to the sources, none to ``x``.
            operands, adapters: what fits together (:meth:`Operands.check`).
        """


def quantised(p: float) -> float:
    """``p`` as masks of 16 random bits an element have it: a multiple of 2^-16, below 1. What is kept is over 1 - p."""
    return min(round(p * 65536), 65535) / 65536


def slices(sizes: Sequence[int]) -> tuple[slice, ...]:
    """Places of these sizes, one after the other."""
    return tuple(slice(a, b) for a, b in pairwise(accumulate(sizes, initial=0)))
