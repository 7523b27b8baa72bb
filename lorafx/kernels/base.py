"""What a provider is: five functions that together are the forward and backward of adapted linear layers.

Layers that read the same ``x [M, k]`` are one *group*. Of layer ``i``, ``W_i [n_i, k]`` is frozen; its adapters ``j``
are ``left_j [n_i, r_j]`` and ``right_j [r_j, k]`` with a factor ``scale_j``. ``R`` is the sum of all ``r_j``, and ``s``
has one column for each, in the order of layers and adapters. With ``D_j`` the dropout of adapter ``j`` (its own mask,
kept elements over 1 - p):

    s_j = scale_j D_j(x) right_j^T                              down            [M, R]
    y_i = gain_i * (x W_i^T) + sum_j s_j left_j^T + b_i         up              [M, n_i]

    ds_j = scale_j dy_i left_j      dleft_j = dy_i^T s_j        grad_up
    dx   = sum_i (gain_i * dy_i) W_i + sum_j D_j(ds_j right_j)  grad_x          [M, k]
    dright_j = ds_j^T D_j(x)                                    grad_right      [r_j, k]

The contraction through ``s`` keeps what is read and written at one pass over ``x``, ``y``, ``dy`` and ``dx`` each
(RunLoRA, arXiv 2312.03415; LoRAFusion, arXiv 2510.00206, splits at ``s`` too). Sums are accumulated in float32 or
better. Whether ``scale`` is in ``s`` and ``ds``, or at ``left``, is the provider's choice. It may have a sixth
function, ``grad_sources``, for an ``x`` that is an activation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import ClassVar, NamedTuple

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
    """What of a group's adapters is no tensor: of each its rank, dropout's ``p`` (:func:`quantised`), and its scale."""

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
        return tuple(slice(a, b) for a, b in pairwise(accumulate(self.ranks, initial=0)))


class Layer(NamedTuple):
    """One layer with adapters, whose numbers in the group are ``adapters``: at least one."""

    weight: Tensor
    bias: Tensor | None
    gain: Tensor | None
    lefts: Sequence[Tensor]
    adapters: slice

    def columns(self, adapters: Adapters) -> slice:
        """The columns of ``s`` that are its own."""
        mine = adapters.columns[self.adapters]
        return slice(mine[0].start, mine[-1].stop)

    def left(self, adapters: Adapters) -> Tensor:
        """``[n, R_i]``: ``scale_j left_j``, one beside the other."""
        mine = [t if c == 1.0 else t * c for t, c in zip(self.lefts, adapters.scales[self.adapters], strict=True)]
        return mine[0] if len(mine) == 1 else torch.cat(mine, 1)

    def dlefts(self, grad: Tensor, adapters: Adapters) -> list[Tensor]:
        """The gradient of each of ``lefts``, from that of :meth:`left`."""
        parts = like(split(grad, adapters.ranks[self.adapters], 1), self.lefts)
        return [t if c == 1.0 else t * c for t, c in zip(parts, adapters.scales[self.adapters], strict=True)]


@dataclass(slots=True)
class Layers:
    """The layers of a group that have adapters; ``counts`` and ``places`` say how many and which of ``lefts``."""

    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    gains: Sequence[Tensor | None]
    lefts: Sequence[Tensor]
    counts: Sequence[int]
    places: Sequence[slice]

    def __iter__(self) -> Iterator[Layer]:
        for weight, bias, gain, place in zip(self.weights, self.biases, self.gains, self.places, strict=True):
            yield Layer(weight, bias, gain, self.lefts[place], place)


class Upstream(NamedTuple):
    """What comes back to a layer: ``dy [M, n]``, None where nothing reads its output; and what is asked for.

    With ``y`` the sums that the gradient of the gain needs, with ``needs_total`` that of the bias.
    """

    dy: Tensor | None
    y: Tensor | None = None
    needs_total: bool = False


@dataclass(slots=True)
class Upstreams:
    """:class:`Upstream` of all layers."""

    dys: Sequence[Tensor | None]
    ys: Sequence[Tensor | None]
    needs_total: Sequence[bool]

    def __iter__(self) -> Iterator[Upstream]:
        return map(Upstream, self.dys, self.ys, self.needs_total)


class GradUp(NamedTuple):
    """What :meth:`Provider.grad_up` gives of one layer.

    ``dlefts`` are like the layer's ``lefts``, ``base [M, n]`` is ``gain * dy`` (``dy`` itself without gain),
    ``total [n]`` the sum of ``dy`` over M, and ``dot [n]`` that of ``dy * y``, both in float32 or better; from these
    the gradients of bias and gain follow.
    """

    dlefts: Sequence[Tensor]
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

    def random(self, x: Tensor, adapters: Adapters) -> Tensor:
        """What the masks of one call are made of, from torch's generator: a seed (int64, one element).

        So that a seed set by the user, and a checkpoint that computes the call again, give the same masks.
        """
        return torch.empty(1, dtype=torch.int64, device=x.device).random_()

    @abstractmethod
    def down(
        self, x: Tensor, rights: Sequence[Tensor], adapters: Adapters, seed: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """``s``, and what the gradients need to drop the same elements again (None without dropout).

        ``seed`` is what :meth:`random` drew: all that the masks depend on beside their place.
        """

    @abstractmethod
    def up(self, x: Tensor, s: Tensor, layers: Layers, adapters: Adapters) -> list[Tensor]:
        """``y [M, n]`` of each layer, bit for bit that of the frozen layer where gain is 1 and ``left`` 0.

        For that, ``x [..., k]`` is as the layer has it: a product of a strided input has its own way of adding a bias.
        """

    @abstractmethod
    def grad_up(
        self, upstream: Upstreams, s: Tensor, layers: Layers, adapters: Adapters
    ) -> tuple[Tensor, list[GradUp | None]]:
        """``ds [M, R]``, and the gradients of each layer's own tensors; zeros and None where there is no ``dy``."""

    @abstractmethod
    def grad_x(
        self,
        bases: Sequence[Tensor],
        weights: Sequence[Tensor],
        ds: Tensor,
        rights: Sequence[Tensor],
        adapters: Adapters,
        kept: Tensor | None,
    ) -> Tensor:
        """``dx [M, k]``, in memory of its own; ``kept`` is what :meth:`down` gave."""

    @abstractmethod
    def grad_right(
        self, x: Tensor, ds: Tensor, rights: Sequence[Tensor], adapters: Adapters, kept: Tensor | None
    ) -> list[Tensor]:
        """The gradient of each of ``rights``, like it."""

    #: The activations (:data:`ACTIVATIONS`) for which it has :meth:`grad_sources`.
    activations: ClassVar[frozenset[str]] = frozenset()

    def grad_sources(
        self,
        bases: Sequence[Tensor],
        weights: Sequence[Tensor],
        ds: Tensor,
        rights: Sequence[Tensor],
        adapters: Adapters,
        kept: Tensor | None,
        activation: str,
        sources: Sequence[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """Instead of :meth:`grad_x`, where ``x`` is an activation: ``x`` again, and its sources' gradients."""
        raise NotImplementedError(activation)


def quantised(p: float) -> float:
    """``p`` as masks of 16 random bits an element have it: a multiple of 2^-16, below 1. What is kept is over 1 - p."""
    return min(round(p * 65536), 65535) / 65536


def split(tensor: Tensor, sizes: Sequence[int], dim: int = 0) -> Sequence[Tensor]:
    """Views of these sizes along a dimension."""
    found: Sequence[Tensor] = torch.split_with_sizes(tensor, sizes, dim)
    return found


def like(gradients: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Gradients in the dtypes of what they are gradients of."""
    return [
        grad if grad.dtype is tensor.dtype else grad.to(tensor.dtype)
        for grad, tensor in zip(gradients, tensors, strict=True)
    ]
