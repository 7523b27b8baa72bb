"""A provider in five functions, which read one after the other as the formulas do (:mod:`.base`)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lorafx.bases.tensor import parts
from lorafx.kernels.base import Adapters, Operands
from lorafx.kernels.function import Differentiable, Gradients, Kept
from lorafx.kernels.gain import grad_gain

aten = torch.ops.aten


class Layer(NamedTuple):
    """One layer with adapters, whose numbers in the group are ``adapters``: at least one.

    ``gain`` is that of the layer, ``g``, and ``lefts`` have their own gains, as ``l`` in the formulas.
    """

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


def adapted_layers(operands: Operands, adapters: Adapters) -> dict[int, Layer]:
    """The layers that have adapters, by their number in the group."""
    layers = {}
    for i, place in enumerate(adapters.places):
        if adapters.counts[i]:
            gains, lefts = operands.gains[place], operands.lefts[place]
            given = [gain for gain in gains if gain is not None]
            total = 1 + torch.stack([g - 1 for g in given]).sum(0) if len(given) > 1 else given[0] if given else None
            own = [left if g is None else g.unsqueeze(-1) * left for g, left in zip(gains, lefts, strict=True)]
            layers[i] = Layer(operands.weights[i], operands.biases[i], total, own, place)
    return layers


class Upstream(NamedTuple):
    """What comes back to a layer: ``dy [M, n]``, None where nothing reads its output; and what is asked for.

    With ``y`` the sums that the gradient of the gain needs, with ``needs_total`` that of the bias.
    """

    dy: Tensor | None
    y: Tensor | None = None
    needs_total: bool = False


class GradUp(NamedTuple):
    """What :meth:`Stepwise.grad_up` gives of one layer.

    ``dlefts`` are like the layer's ``lefts``, ``base [M, n]`` is ``gain * dy`` (``dy`` itself without gain),
    ``total [n]`` the sum of ``dy`` over M, and ``dot [n]`` that of ``dy * y``, both in float32 or better; from these
    the gradients of bias and gain follow.
    """

    dlefts: Sequence[Tensor]
    base: Tensor
    total: Tensor | None = None
    dot: Tensor | None = None


class Stepwise(Differentiable):
    """Five functions on 2-D tensors (vectors: 1-D); the layers that they are given have adapters."""

    @abstractmethod
    def down(
        self, x: Tensor, rights: Sequence[Tensor], adapters: Adapters, seed: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """``s``, and what the gradients need to drop the same elements again (None without dropout)."""

    @abstractmethod
    def up(self, x: Tensor, s: Tensor, layers: Sequence[Layer], adapters: Adapters) -> list[Tensor]:
        """``y [M, n]`` of each layer. ``x [..., k]`` is as :meth:`forward` has it."""

    @abstractmethod
    def grad_up(
        self, upstream: Sequence[Upstream], s: Tensor, layers: Sequence[Layer], adapters: Adapters
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
        masks: Tensor | None,
    ) -> Tensor:
        """``dx [M, k]``, in memory of its own; ``masks`` is what :meth:`down` gave."""

    @abstractmethod
    def grad_right(
        self, x: Tensor, ds: Tensor, rights: Sequence[Tensor], adapters: Adapters, masks: Tensor | None
    ) -> list[Tensor]:
        """The gradient of each of ``rights``, like it."""

    def forward(
        self, x: Tensor, operands: Operands, adapters: Adapters, seed: Tensor | None
    ) -> tuple[list[Tensor], Kept]:
        """``down``, and ``up`` for the layers with adapters."""
        s, masks = self.down(x.reshape(-1, x.shape[-1]), operands.rights, adapters, seed)
        layers = adapted_layers(operands, adapters)
        ups = dict(zip(layers, self.up(x, s, [*layers.values()], adapters), strict=True))
        # Not by view(): a view may not be written to, as an activation in place does.
        ys = [
            aten._unsafe_view.default(ups[i], (*x.shape[:-1], weight.shape[0]))
            if i in ups
            else F.linear(x, weight, bias)
            for i, (weight, bias) in enumerate(zip(operands.weights, operands.biases, strict=True))
        ]
        return ys, Kept(s, masks)

    def backward(
        self,
        dys: Sequence[Tensor | None],
        ys: Sequence[Tensor | None],
        kept: Kept,
        x: Tensor | None,
        operands: Operands,
        adapters: Adapters,
        needed: Sequence[bool],
    ) -> Gradients:
        """``grad_up`` for the layers with adapters, then the others."""
        wanted, layers = Operands.unflatten(adapters, needed[1:]), adapted_layers(operands, adapters)
        flat = [None if dy is None else dy.reshape(-1, dy.shape[-1]) for dy in dys]
        outputs = [None if y is None else y.reshape(-1, y.shape[-1]) for y in ys]
        totals = [bias or y is not None for bias, y in zip(wanted.biases, ys, strict=True)]
        rows: Any = None if x is None else x.reshape(-1, x.shape[-1])

        upstream = [Upstream(flat[i], outputs[i], totals[i]) for i in layers]
        ds, grads = self.grad_up(upstream, kept.s, [*layers.values()], adapters)
        ups = {i: up for i, up in zip(layers, grads, strict=True) if up is not None}
        for i, dy in enumerate(flat):
            if i not in layers and dy is not None:
                ups[i] = GradUp((), dy, dy.sum(0) if totals[i] else None)

        dx = None
        if needed[0]:
            bases, frozen = [up.base for up in ups.values()], [operands.weights[i] for i in ups]
            given = next(dy for dy in dys if dy is not None)
            dx = self.grad_x(bases, frozen, ds, operands.rights, adapters, kept.masks)
            dx = dx.view(*given.shape[:-1], dx.shape[-1])
        found: list[list[Any]] = [[None] * len(each) for each in operands]
        weights, biases, gains, lefts, rights = found
        if any(wanted.rights):
            rights[:] = self.grad_right(rows, ds, operands.rights, adapters, kept.masks)
        for i, place in enumerate(adapters.places):
            if i not in ups:
                rights[place] = [None] * adapters.counts[i]
                continue
            up, bias = ups[i], operands.biases[i]
            if wanted.biases[i] and up.total is not None:
                biases[i] = up.total.to(bias.dtype)
            if wanted.weights[i]:
                weights[i] = torch.mm(up.base.t(), rows)
            dgain = None
            if any(wanted.gains[place]):
                layer = layers[i]
                sums = (up.dot, up.total, up.dlefts, layer.lefts, bias, layer.gain)
                dgain = grad_gain(*sums, flat[i], rows, *parts(layer.weight))
            for j, dl in zip(range(place.start, place.stop), up.dlefts, strict=True):
                gain, left = operands.gains[j], operands.lefts[j]
                lefts[j] = dl if gain is None else (gain.unsqueeze(-1) * dl).to(left.dtype)
                if wanted.gains[j]:
                    gains[j] = (dgain + (dl * left).sum(1)).to(gain.dtype)
        return Gradients(dx, [gradient for each in found for gradient in each])


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
