"""What a provider is: five functions that together are the forward and backward of adapted linear layers.

Layers that read the same ``x [M, k]`` are one *group*. Of sibling ``i``, ``W_i [n_i, k]`` is frozen, and its adapters,
one beside the other, are ``left_i [n_i, R_i]`` and ``R_i`` rows of ``right [R, k]`` (``R`` is the sum of ``R_i``), in
the order of the siblings. With ``D_j`` the dropout of adapter ``j`` (its own mask, kept elements over 1 - p):

    s   = D(x) right^T                                  down            [M, R]
    y_i = gain_i * (x W_i^T) + s_i left_i^T + b_i       up              [M, n_i]

    ds_i = dy_i left_i      dleft_i = dy_i^T s_i        grad_up
    dx   = sum_i (gain_i * dy_i) W_i + D(ds right)      grad_x          [M, k]
    dright = ds^T D(x)                                  grad_right      [R, k]

The contraction through ``s`` keeps what is read and written at one pass over ``x``, ``y``, ``dy`` and ``dx`` each
(RunLoRA, arXiv 2312.03415; LoRAFusion, arXiv 2510.00206, splits at ``s`` too). Sums are accumulated in float32 or
better.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

#: Activations that a provider may differentiate in one pass: ``x`` from ``h``, or from ``g`` and ``u``.
ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "gelu_mul", "gelu_tanh_mul", "silu_mul")


@dataclass(frozen=True)
class Call:
    """What is known of a group before it runs: enough to say who can serve it."""

    device: torch.device
    dtype: torch.dtype
    in_features: int
    out_features: tuple[int, ...]
    r: int


@dataclass(frozen=True)
class Dropout:
    """Which columns of ``s`` see ``x`` through which dropout: ``ranks`` of each adapter, and its ``p``."""

    ranks: tuple[int, ...]
    p: tuple[float, ...]

    @property
    def drops(self) -> bool:
        """Whether anything is dropped."""
        return any(p > 0.0 for p in self.p)


@dataclass(frozen=True)
class GradUp:
    """What :meth:`Provider.grad_up` gives.

    ``base [M, n]`` is ``gain * dy`` (``dy`` itself without gain), ``total [n]`` the sum of ``dy`` over M, and
    ``dot [n]`` that of ``dy * y``, both in float32 or better; from these the gradients of bias and gain follow.
    """

    ds: Tensor
    dleft: Tensor
    base: Tensor
    total: Tensor | None = None
    dot: Tensor | None = None


class Provider(ABC):
    """One way to compute the five functions.

    Unless said otherwise tensors are 2-D (vectors: 1-D), on one device, of one dtype.
    ``left``, ``right``, ``gain`` and gradients of them may be wider than ``x`` (float32 adapters beside bfloat16
    activations): the small side is cast. ``s`` and ``ds`` are in whatever dtype the provider likes.
    """

    name: ClassVar[str]

    @abstractmethod
    def unavailable(self) -> str | None:
        """Why it cannot run on this machine, or None."""

    @abstractmethod
    def rejects(self, call: Call) -> str | None:
        """Why it does not serve this call, or None."""

    def random(self, x: Tensor, dropout: Dropout) -> Tensor:
        """What the masks of one call are made of, from torch's generator: a seed (int64, one element).

        So that a seed set by the user, and a checkpoint that computes the call again, give the same masks.
        """
        return torch.empty(1, dtype=torch.int64, device=x.device).random_()

    @abstractmethod
    def down(self, x: Tensor, right: Tensor, dropout: Dropout, seed: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``s``, and what the gradients need to drop the same elements again (None without dropout).

        ``seed`` is what :meth:`random` drew: all that the masks depend on beside their place.
        """

    @abstractmethod
    def up(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, left: Tensor, gain: Tensor | None
    ) -> Tensor:
        """``y [M, n]`` of one sibling, bit for bit that of the frozen layer where gain is 1 and ``left`` 0.

        For that, ``x [..., k]`` is as the layer has it: a product of a strided input has its own way of adding a bias.
        ``s [M, R_i]`` may be a view with a larger row stride.
        """

    @abstractmethod
    def grad_up(
        self, dy: Tensor, s: Tensor, left: Tensor, gain: Tensor | None, y: Tensor | None, needs_total: bool
    ) -> GradUp:
        """The gradients of one sibling's own tensors; ``dot`` where ``y`` is given, ``total`` where asked for."""

    @abstractmethod
    def grad_x(
        self,
        bases: Sequence[Tensor],
        weights: Sequence[Tensor],
        ds: Tensor,
        right: Tensor,
        dropout: Dropout,
        kept: Tensor | None,
    ) -> Tensor:
        """``dx [M, k]``, in memory of its own; ``kept`` is what :meth:`down` gave."""

    @abstractmethod
    def grad_right(self, x: Tensor, ds: Tensor, dropout: Dropout, kept: Tensor | None) -> Tensor:
        """``dright [R, k]``."""

    #: The activations (:data:`ACTIVATIONS`) for which it has :meth:`grad_activation`.
    activations: ClassVar[frozenset[str]] = frozenset()

    def grad_activation(self, name: str, sources: Sequence[Tensor], dx: Tensor) -> tuple[Tensor, list[Tensor]]:
        """``x`` again, and the gradients of what it was computed from; may write over ``dx [M, k]``."""
        raise NotImplementedError(name)


def split(tensor: Tensor, sizes: Sequence[int], dim: int = 0) -> Sequence[Tensor]:
    """Views of these sizes along a dimension."""
    found: Sequence[Tensor] = torch.split_with_sizes(tensor, sizes, dim)
    return found
