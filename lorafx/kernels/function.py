"""The gradient of a group of adapted linear layers, over any provider's five functions (:mod:`.base`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lorafx.kernels.base import Adapters, GradUp, Layers, Provider, Upstreams
from lorafx.kernels.gain import grad_gain
from lorafx.kernels.once import once_differentiable
from lorafx.kernels.recipe import recompute
from lorafx.variants.base import full_precision

aten = torch.ops.aten


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

    def of_adapted(self, each: Sequence[Any]) -> Sequence[Any]:
        """Of one thing for each sibling, those of the siblings that have adapters."""
        return each if len(self.adapted) == len(each) else [each[i] for i in self.adapted]

    @cached_property
    def places(self) -> tuple[slice, ...]:
        """Where :class:`Operands` have what, flattened."""
        n, count = len(self.counts), sum(self.counts)
        return _slices((n, n, n, count, count))


@lru_cache(maxsize=4096)
def make_group(provider: Provider, counts: tuple[int, ...], adapters: Adapters, recipe: str, activation: str) -> Group:
    """The one group like this, so that what follows from it is computed once."""
    return Group(provider, counts, adapters, recipe, activation)


class Operands(NamedTuple):
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

    def layers(self, group: Group) -> Layers:
        """Those of the siblings that have adapters."""
        weights, biases, gains, counts, places = map(
            group.of_adapted, (self.weights, self.biases, self.gains, group.counts, group.mine)
        )
        return Layers(weights, biases, gains, self.lefts, counts, places)


@dataclass(frozen=True)
class Needs:
    """What gradients are wanted: of ``x``, of any ``right``, and of which siblings' own tensors."""

    x: bool
    rights: bool
    weights: tuple[int, ...]
    biases: tuple[int, ...]
    gains: tuple[int, ...]
    totals: tuple[bool, ...]
    idle: tuple[int, ...]


@lru_cache(maxsize=4096)
def find_needs(group: Group, needed: tuple[bool, ...], sources: int) -> Needs:
    """From ``ctx.needs_input_grad``, once for all steps. ``idle`` are outputs that depend on nothing that trains."""
    x, own = needed[1], Operands.unflatten(group, needed[3 + sources :])
    weights, biases, gains = (tuple(i for i, one in enumerate(each) if one) for each in own[:3])
    idle = (i for i, count in enumerate(group.counts) if not (count or x or i in weights or i in biases))
    totals = tuple(i in biases or i in gains for i in range(len(group.counts)))
    return Needs(x, any(own.rights), weights, biases, gains, totals, tuple(idle))


class LowRankLinear(torch.autograd.Function):
    """``y_i = gain_i * (x W_i^T) + sum_j s_j left_j^T + b_i``, with gradients for all that is handed over.

    Inputs after the group: ``x [..., k]``; how many and which tensors ``x`` can be computed from again; then the
    operands, :class:`Operands` flattened. ``W_i`` is ``[n_i, k]``, ``b_i`` and ``gain_i`` are ``[n_i]`` or None, an
    adapter's ``left`` is ``[n_i, r]`` and its ``right`` ``[r, k]``. Kept for backward are ``s``, and ``x`` or what it
    comes from. With an activation that the provider differentiates itself, the gradient goes to the sources, and
    none to ``x``.

    Between two large products the caches hold nothing of the interpreter's: a line of Python costs ten times what it
    does in a loop, so what can be found out once is.
    """

    @staticmethod
    def forward(ctx: Any, group: Group, x: Tensor, sources: int, *tensors: Any) -> tuple[Tensor, ...]:
        operands = Operands.unflatten(group, tensors[sources:])
        provider, adapters = group.provider, group.adapters
        rows = x.reshape(-1, x.shape[-1])
        seed = provider.random(rows, adapters) if adapters.drops else None
        s, kept = provider.down(rows, operands.rights, adapters, seed)
        ys = provider.up(x, s, operands.layers(group), adapters)
        for i, count in enumerate(group.counts):
            if count == 0:
                ys.insert(i, F.linear(x, operands.weights[i], operands.biases[i]))
        # Not by view(): a view may not be written to, as an activation in place does.
        outputs = tuple([aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[-1])) for y in ys])
        if any(ctx.needs_input_grad):
            needs = find_needs(group, ctx.needs_input_grad, sources)
            again = tensors[:sources] if sources else (x,)
            ctx.save_for_backward(*again, s, kept, *tensors[sources:], *[outputs[i] for i in needs.gains])
            ctx.group, ctx.sources, ctx.shape, ctx.needs = group, sources, x.shape, needs
            ctx.set_materialize_grads(False)
            if needs.idle:
                ctx.mark_non_differentiable(*[outputs[i] for i in needs.idle])
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
        needs: Needs = ctx.needs
        provider, adapters, ends = group.provider, group.adapters, ctx.sources or 1
        saved, count = ctx.saved_tensors, group.places[-1].stop
        again, s, kept = saved[:ends], saved[ends], saved[ends + 1]
        operands = Operands.unflatten(group, saved[ends + 2 : ends + 2 + count])
        flat = [None if dy is None else dy.reshape(-1, dy.shape[-1]) for dy in dys]
        ys: list[Tensor | None] = [None] * len(flat)
        for i, y in zip(needs.gains, saved[ends + 2 + count :], strict=True):
            ys[i] = y.reshape(-1, y.shape[-1])

        upstream = Upstreams(*map(group.of_adapted, (flat, ys, needs.totals)))
        ds, ups = provider.grad_up(upstream, s, operands.layers(group), adapters)
        found: dict[int, GradUp] = {i: up for i, up in zip(group.adapted, ups, strict=True) if up is not None}
        for i, (of, dy) in enumerate(zip(group.counts, flat, strict=True)):
            if of == 0 and dy is not None:
                found[i] = GradUp((), dy, dy.sum(0) if i in needs.biases else None)

        dx: Tensor | None = None
        dsources: list[Tensor | None] = [None] * ctx.sources
        if needs.x:
            bases, weights = [up.base for up in found.values()], [operands.weights[i] for i in found]
            low = (ds, operands.rights, adapters, kept)
            if group.activation:
                x, of_sources = provider.grad_sources(bases, weights, *low, group.activation, again)
                dsources = [*of_sources]
            else:
                dx = provider.grad_x(bases, weights, *low).view(ctx.shape)
        if not (needs.x and group.activation) and (needs.rights or needs.weights or needs.gains):
            x = recompute(group.recipe, again) if group.recipe else again[0]

        grads: list[Any] = [None] * count
        of_weights, of_biases, of_gains, of_lefts, of_rights = (place.start for place in group.places)
        if needs.rights:
            rows = x.reshape(-1, ctx.shape[-1])
            grads[of_rights:] = provider.grad_right(rows, ds, operands.rights, adapters, kept)
        for i, mine in enumerate(group.mine):
            up = found.get(i)
            if up is not None:
                grads[of_lefts + mine.start : of_lefts + mine.stop] = up.dlefts
            else:
                grads[of_rights + mine.start : of_rights + mine.stop] = [None] * group.counts[i]
        for i in needs.gains:
            if i in found:
                up, rows, lefts = found[i], x.reshape(-1, ctx.shape[-1]), operands.lefts[group.mine[i]]
                sums = (up.dot, up.total, up.dlefts, lefts, operands.biases[i])
                grads[of_gains + i] = grad_gain(*sums, operands.gains[i], flat[i], rows, operands.weights[i])
        for i in needs.biases:
            if i in found:
                total = found[i].total
                grads[of_biases + i] = None if total is None else total.to(operands.biases[i].dtype)
        for i in needs.weights:
            if i in found:
                grads[of_weights + i] = torch.mm(found[i].base.t(), x.reshape(-1, ctx.shape[-1]))
        return (None, dx, None, *dsources, *grads)


def _slices(sizes: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a, b) for a, b in pairwise(accumulate(sizes, initial=0)))
