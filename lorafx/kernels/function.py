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

from lorafx.kernels.base import Dropout, GradUp, Provider, split
from lorafx.kernels.recipe import recompute
from lorafx.ops import LIBRARY
from lorafx.variants.base import full_precision

aten = torch.ops.aten

#: Below this, the gradient of a gain is not taken from the layer's output, of which its share is too small.
_SMALL_GAIN = 1 / 16


@dataclass(frozen=True)
class Group:
    """What of a group is no tensor: ``counts`` of adapters of each sibling, and all adapters' ``dropout``."""

    provider: Provider
    counts: tuple[int, ...]
    dropout: Dropout
    recipe: str = ""
    activation: str = ""

    @cached_property
    def adapters(self) -> list[slice]:
        """The adapters of each sibling."""
        return _slices(self.counts)

    @cached_property
    def columns(self) -> list[slice]:
        """The columns of ``s`` of each sibling."""
        return _slices([sum(self.dropout.ranks[mine]) for mine in self.adapters])

    @cached_property
    def places(self) -> list[slice]:
        """Where :class:`Operands` have what, flattened."""
        n, count = len(self.counts), sum(self.counts)
        return _slices((n, n, n, count, count))

    @property
    def operands(self) -> int:
        """How many operands there are."""
        return 3 * len(self.counts) + 2 * sum(self.counts)


@cache
def make_group(provider: Provider, counts: tuple[int, ...], dropout: Dropout, recipe: str, activation: str) -> Group:
    """The one group like this, so that what follows from it is computed once."""
    return Group(provider, counts, dropout, recipe, activation)


@dataclass
class Operands:
    """The tensors of a group, or one thing for each of them.

    Of the siblings ``W``, ``b`` and ``gain``; of the adapters their factors.
    """

    weights: list[Any]
    biases: list[Any]
    gains: list[Any]
    lefts: list[Any]
    rights: list[Any]

    @classmethod
    def unflatten(cls, group: Group, values: Sequence[Any]) -> Operands:
        """From the order in which the function takes them."""
        return cls(*(list(values[place]) for place in group.places))

    @classmethod
    def nothing(cls, group: Group) -> Operands:
        """None for each."""
        return cls.unflatten(group, [None] * group.operands)

    def flatten(self) -> tuple[Any, ...]:
        """The inverse of :meth:`unflatten`."""
        return (*self.weights, *self.biases, *self.gains, *self.lefts, *self.rights)

    def left(self, mine: slice) -> Tensor:
        """``[n, R_i]`` of the adapters of one sibling."""
        parts = self.lefts[mine]
        found: Tensor = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return found


class LowRankLinear(torch.autograd.Function):
    """``y_i = gain_i * (x W_i^T) + s_i left_i^T + b_i``, with gradients for all that is handed over.

    Inputs after the group: ``x [..., k]``; how many and which tensors ``x`` can be computed from again; then the
    operands, :class:`Operands` flattened. ``W_i`` is ``[n_i, k]``, ``b_i`` and ``gain_i`` are ``[n_i]`` or None, an
    adapter's ``left`` is ``[n_i, r]`` and its ``right`` ``[r, k]``. Kept for backward are ``s``, and ``x`` or what it
    comes from. With an activation that the provider differentiates itself, the gradient goes to the sources, and
    none to ``x``.
    """

    @staticmethod
    def forward(ctx: Any, group: Group, x: Tensor, sources: int, *tensors: Any) -> tuple[Tensor, ...]:
        operands = Operands.unflatten(group, tensors[sources:])
        rows = x.reshape(-1, x.shape[-1])
        seed = group.provider.random(rows, group.dropout) if group.dropout.drops else None
        s, kept = group.provider.down(rows, torch.cat(operands.rights), group.dropout, seed)
        rows_of_y = []
        for i, (mine, columns) in enumerate(zip(group.adapters, group.columns, strict=True)):
            weight, bias, gain = operands.weights[i], operands.biases[i], operands.gains[i]
            if group.counts[i] == 0:
                rows_of_y.append(F.linear(x, weight, bias))
            else:
                rows_of_y.append(group.provider.up(x, weight, bias, s[:, columns], operands.left(mine), gain))
        # Not by view(): a view may not be written to, as an activation in place does.
        outputs = tuple(aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[-1])) for y in rows_of_y)
        if any(ctx.needs_input_grad):
            needs = Operands.unflatten(group, ctx.needs_input_grad[3 + sources :])
            ys = [y for y, needed in zip(outputs, needs.gains, strict=True) if needed]
            again = tensors[:sources] if sources else (x,)
            ctx.save_for_backward(*again, s, kept, *tensors[sources:], *ys)
            ctx.group, ctx.sources, ctx.shape = group, sources, x.shape
            ctx.set_materialize_grads(False)
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
        provider, dropout = group.provider, group.dropout
        saved, ends = ctx.saved_tensors, ctx.sources or 1
        again, (s, kept, *rest) = saved[:ends], saved[ends:]
        operands, ys = Operands.unflatten(group, rest), iter(rest[group.operands :])
        needs = Operands.unflatten(group, ctx.needs_input_grad[3 + ctx.sources :])
        grads = Operands.nothing(group)

        ds = torch.empty_like(s)
        ups: dict[int, GradUp] = {}
        for i, (dy, mine, columns) in enumerate(zip(dys, group.adapters, group.columns, strict=True)):
            y = next(ys) if needs.gains[i] else None
            if dy is None:  # nothing reads this sibling's output
                ds[:, columns] = 0
                continue
            dy = dy.reshape(-1, dy.shape[-1])
            if group.counts[i] == 0:
                ups[i] = GradUp(ds[:, columns], dy, dy, dy.sum(0) if needs.biases[i] else None)
                continue
            y = None if y is None else y.reshape(-1, y.shape[-1])
            left, needs_total = operands.left(mine), needs.biases[i] or y is not None
            up = ups[i] = provider.grad_up(dy, s[:, columns], left, operands.gains[i], y, needs_total)
            ds[:, columns] = up.ds
            grads.lefts[mine] = _like(split(up.dleft, dropout.ranks[mine], 1), operands.lefts[mine])

        dx: Tensor | None = None
        dsources: list[Tensor | None] = [None] * ctx.sources
        if ctx.needs_input_grad[1]:
            bases, weights = [up.base for up in ups.values()], [operands.weights[i] for i in ups]
            dx = provider.grad_x(bases, weights, ds, torch.cat(operands.rights), dropout, kept)
        if dx is not None and group.activation:
            x, found = provider.grad_activation(group.activation, again, dx)
            dx, dsources = None, [*found]
        elif any((*needs.rights, *needs.weights, *needs.gains)):
            x = recompute(group.recipe, again) if group.recipe else again[0]
        if any(needs.rights):
            dright = provider.grad_right(x.reshape(-1, ctx.shape[-1]), ds, dropout, kept)
            grads.rights = _like(split(dright, dropout.ranks, 0), operands.rights)
        for i, mine in enumerate(group.adapters):
            if i not in ups:
                grads.rights[mine] = [None] * group.counts[i]
        for i, up in ups.items():
            if needs.gains[i]:
                left = operands.left(group.adapters[i])
                dy = dys[i].reshape(up.base.shape)  # type: ignore[union-attr]
                rows = x.reshape(-1, ctx.shape[-1])
                grads.gains[i] = grad_gain(
                    up, rows, operands.weights[i], operands.biases[i], left, operands.gains[i], dy
                )
            if needs.biases[i]:
                (grads.biases[i],) = _like([up.total], [operands.biases[i]])
            if needs.weights[i]:
                grads.weights[i] = torch.mm(up.base.t(), x.reshape(-1, ctx.shape[-1]))
        dx = None if dx is None else dx.view(ctx.shape)
        return (None, dx, None, *dsources, *grads.flatten())


def grad_gain(
    up: GradUp, x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, gain: Tensor, dy: Tensor
) -> Tensor:
    """``sum_M dy * (x W^T)``, without that product where the output tells it: ``gain * x W^T = y - s left^T - b``."""
    assert up.dot is not None
    assert up.total is not None
    low = (up.dleft * left).sum(1)
    rest = up.dot - low
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


def _like(grads: Sequence[Any], tensors: Sequence[Tensor]) -> list[Tensor]:
    return [grad.to(tensor.dtype) for grad, tensor in zip(grads, tensors, strict=True)]


def _slices(sizes: Sequence[int]) -> list[slice]:
    return [slice(a, b) for a, b in pairwise(accumulate(sizes, initial=0))]
