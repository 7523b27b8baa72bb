"""The gradient of a group of adapted linear layers, over any provider's five functions (:mod:`.base`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lorafx.kernels.base import Adapters, GradUp, Layer, Provider, Upstream, like
from lorafx.kernels.recipe import recompute
from lorafx.ops import LIBRARY
from lorafx.variants.base import full_precision

aten = torch.ops.aten

#: Below this, the gradient of a gain is not taken from the layer's output, of which its share is too small.
_SMALL_GAIN = 1 / 16


@dataclass(frozen=True)
class Group:
    """What of a group is no tensor: ``counts`` of adapters of each sibling, and all adapters'."""

    provider: Provider
    counts: tuple[int, ...]
    adapters: Adapters
    recipe: str = ""
    activation: str = ""

    @cached_property
    def mine(self) -> tuple[slice, ...]:
        """The adapters of each sibling."""
        return _slices(self.counts)

    @cached_property
    def adapted(self) -> tuple[int, ...]:
        """The siblings that have adapters."""
        return tuple(i for i, count in enumerate(self.counts) if count)

    @cached_property
    def places(self) -> tuple[slice, ...]:
        """Where :class:`Operands` have what, flattened."""
        n, count = len(self.counts), sum(self.counts)
        return _slices((n, n, n, count, count))


@cache
def make_group(provider: Provider, counts: tuple[int, ...], adapters: Adapters, recipe: str, activation: str) -> Group:
    """The one group like this, so that what follows from it is computed once."""
    return Group(provider, counts, adapters, recipe, activation)


@dataclass
class Operands:
    """The tensors of a group, or one thing for each of them.

    Of the siblings ``W``, ``b`` and ``gain``; of the adapters their factors.
    """

    weights: Sequence[Any]
    biases: Sequence[Any]
    gains: Sequence[Any]
    lefts: Sequence[Any]
    rights: Sequence[Any]

    @classmethod
    def unflatten(cls, group: Group, values: Sequence[Any]) -> Operands:
        """From the order in which the function takes them."""
        return cls(*[values[place] for place in group.places])

    def flatten(self) -> tuple[Any, ...]:
        """The inverse of :meth:`unflatten`."""
        return (*self.weights, *self.biases, *self.gains, *self.lefts, *self.rights)

    def layers(self, group: Group) -> list[Layer]:
        """Those of the siblings that have adapters."""
        return [
            Layer(self.weights[i], self.biases[i], self.gains[i], self.lefts[group.mine[i]], group.mine[i])
            for i in group.adapted
        ]


class LowRankLinear(torch.autograd.Function):
    """``y_i = gain_i * (x W_i^T) + sum_j s_j left_j^T + b_i``, with gradients for all that is handed over.

    Inputs after the group: ``x [..., k]``; how many and which tensors ``x`` can be computed from again; then the
    operands, :class:`Operands` flattened. ``W_i`` is ``[n_i, k]``, ``b_i`` and ``gain_i`` are ``[n_i]`` or None, an
    adapter's ``left`` is ``[n_i, r]`` and its ``right`` ``[r, k]``. Kept for backward are ``s``, and ``x`` or what it
    comes from. With an activation that the provider differentiates itself, the gradient goes to the sources, and
    none to ``x``.
    """

    @staticmethod
    def forward(ctx: Any, group: Group, x: Tensor, sources: int, *tensors: Any) -> tuple[Tensor, ...]:
        operands = Operands.unflatten(group, tensors[sources:])
        provider, adapters = group.provider, group.adapters
        rows = x.reshape(-1, x.shape[-1])
        seed = provider.random(rows, adapters) if adapters.drops else None
        s, kept = provider.down(rows, operands.rights, adapters, seed)
        found = iter(provider.up(x, s, operands.layers(group), adapters))
        ys = [
            next(found) if group.counts[i] else F.linear(x, weight, operands.biases[i])
            for i, weight in enumerate(operands.weights)
        ]
        # Not by view(): a view may not be written to, as an activation in place does.
        outputs = tuple(aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[-1])) for y in ys)
        if any(ctx.needs_input_grad):
            needs = Operands.unflatten(group, ctx.needs_input_grad[3 + sources :])
            kept_ys = [y for y, needed in zip(outputs, needs.gains, strict=True) if needed]
            again = tensors[:sources] if sources else (x,)
            ctx.save_for_backward(*again, s, kept, *tensors[sources:], *kept_ys)
            ctx.group, ctx.sources, ctx.shape = group, sources, x.shape
            ctx.set_materialize_grads(False)
            if len(group.adapted) < len(group.counts):
                idle = (
                    y
                    for i, y in enumerate(outputs)
                    if group.counts[i] == 0 and not (ctx.needs_input_grad[1] or needs.weights[i] or needs.biases[i])
                )
                ctx.mark_non_differentiable(*idle)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Any, ...]:
        given = next((dy for dy in dys if dy is not None), None)
        if given is None:
            return (None,) * len(ctx.needs_input_grad)
        with full_precision(given):  # whatever autocast says where backward is called
            return LowRankLinear._backward(ctx, *dys)

    @staticmethod
    def _backward(ctx: Any, *dys: Tensor | None) -> tuple[Any, ...]:
        group: Group = ctx.group
        provider, adapters = group.provider, group.adapters
        saved, ends = ctx.saved_tensors, ctx.sources or 1
        again, (s, kept, *rest) = saved[:ends], saved[ends:]
        count = group.places[-1].stop
        operands, ys = Operands.unflatten(group, rest[:count]), iter(rest[count:])
        needs = Operands.unflatten(group, ctx.needs_input_grad[3 + ctx.sources :])

        upstream = []
        for dy, trains_gain, trains_bias in zip(dys, needs.gains, needs.biases, strict=True):
            y = next(ys) if trains_gain else None
            flat = None if dy is None else dy.reshape(-1, dy.shape[-1])
            y = None if y is None else y.reshape(-1, y.shape[-1])
            upstream.append(Upstream(flat, y, trains_bias or trains_gain))
        layers = operands.layers(group)
        ds, ups = provider.grad_up([upstream[i] for i in group.adapted], s, layers, adapters)
        found: dict[int, GradUp] = {i: up for i, up in zip(group.adapted, ups, strict=True) if up is not None}
        for i, above in enumerate(upstream):
            if group.counts[i] == 0 and above.dy is not None:
                found[i] = GradUp((), above.dy, above.dy.sum(0) if needs.biases[i] else None)

        dx: Tensor | None = None
        dsources: list[Tensor | None] = [None] * ctx.sources
        if ctx.needs_input_grad[1]:
            bases, weights = [up.base for up in found.values()], [operands.weights[i] for i in found]
            dx = provider.grad_x(bases, weights, ds, operands.rights, adapters, kept)
        if dx is not None and group.activation:
            x, grads_of_sources = provider.grad_activation(group.activation, again, dx)
            dx, dsources = None, [*grads_of_sources]
        elif any((*needs.rights, *needs.weights, *needs.gains)):
            x = recompute(group.recipe, again) if group.recipe else again[0]

        grads = Operands(*([None] * (place.stop - place.start) for place in group.places))
        if any(needs.rights):
            grads.rights = provider.grad_right(x.reshape(-1, ctx.shape[-1]), ds, operands.rights, adapters, kept)
        for i, mine in enumerate(group.mine):
            up, above = found.get(i), upstream[i]
            if up is None:
                grads.rights[mine] = [None] * group.counts[i]
                continue
            grads.lefts[mine] = up.dlefts
            if needs.gains[i]:
                rows = x.reshape(-1, ctx.shape[-1])
                grads.gains[i] = grad_gain(
                    up, rows, operands.weights[i], operands.biases[i], operands.lefts[mine], operands.gains[i], above.dy
                )
            if needs.biases[i]:
                (grads.biases[i],) = like([up.total], [operands.biases[i]])
            if needs.weights[i]:
                grads.weights[i] = torch.mm(up.base.t(), x.reshape(-1, ctx.shape[-1]))
        dx = None if dx is None else dx.view(ctx.shape)
        return (None, dx, None, *dsources, *grads.flatten())


def grad_gain(
    up: GradUp,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lefts: Sequence[Tensor],
    gain: Tensor,
    dy: Tensor,
) -> Tensor:
    """``sum_M dy * (x W^T)``, without that product where the output tells it: ``gain * x W^T = y - s left^T - b``."""
    assert up.dot is not None
    assert up.total is not None
    rest = up.dot
    for dleft, left in zip(up.dlefts, lefts, strict=True):
        rest = rest - (dleft.to(rest.dtype) * left).sum(1)
    if bias is not None:
        rest = rest - bias * up.total
    found: Tensor = exact_where_small(rest, gain, dy, x, weight)
    return found.to(gain.dtype)


def _exact_where_small(rest: Tensor, gain: Tensor, dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """``rest / gain``; for rows whose gain is small, or 0, by the product of those rows instead.

    An operator, since which rows these are is known only when it runs.
    """
    small = gain.abs() < _SMALL_GAIN
    found = rest / torch.where(small, 1.0, gain)
    if bool(small.any()):
        exact = (dy[:, small] * F.linear(x, weight[small])).sum(0, dtype=rest.dtype)
        found[small] = exact
    return found


def _exact_fake(rest: Tensor, gain: Tensor, dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return rest.new_empty(rest.shape)


LIBRARY.define("exact_where_small(Tensor rest, Tensor gain, Tensor dy, Tensor x, Tensor weight) -> Tensor")
LIBRARY.impl("exact_where_small", _exact_where_small, "CompositeExplicitAutograd")
LIBRARY.impl("exact_where_small", _exact_fake, "Meta")
exact_where_small = torch.ops.lorafx.exact_where_small.default


def _slices(sizes: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a, b) for a, b in pairwise(accumulate(sizes, initial=0)))
