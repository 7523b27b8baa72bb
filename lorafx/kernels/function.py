"""The gradient of a group of adapted linear layers, over any provider (:mod:`.base`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lorafx.kernels.base import Adapters, Kept, Operands, Provider
from lorafx.kernels.once import once_differentiable
from lorafx.kernels.recipe import recompute
from lorafx.variants.base import full_precision


@dataclass(frozen=True)
class Group:
    """What of a group is no tensor."""

    provider: Provider
    adapters: Adapters
    recipe: str = ""
    activation: str = ""


@lru_cache(maxsize=4096)
def make_group(provider: Provider, adapters: Adapters, recipe: str, activation: str) -> Group:
    """The one group like this, so that what follows from it is found out once."""
    return Group(provider, adapters, recipe, activation)


@dataclass(frozen=True)
class Needs:
    """What gradients are wanted: ``needed`` is as :meth:`Provider.backward` takes it.

    ``gains`` are the layers of which a gain needs one, ``input`` says whether any depends on ``x``, and ``idle`` are
    the outputs that depend on nothing that trains.
    """

    needed: tuple[bool, ...]
    gains: tuple[int, ...]
    input: bool
    idle: tuple[int, ...]


@lru_cache(maxsize=4096)
def find_needs(group: Group, needed: tuple[bool, ...], sources: int) -> Needs:
    """From ``ctx.needs_input_grad``, once for all steps."""
    x, own = needed[1], needed[3 + sources :]
    wanted = Operands.unflatten(group.adapters, own)
    idle = [i for i, n in enumerate(group.adapters.counts) if not (n or x or wanted.weights[i] or wanted.biases[i])]
    return Needs(
        needed=(x, *own),
        gains=tuple(i for i, place in enumerate(group.adapters.places) if any(wanted.gains[place])),
        input=any((*wanted.rights, *wanted.weights, *wanted.gains)),
        idle=tuple(idle),
    )


class LowRankLinear(torch.autograd.Function):
    """A group's outputs, with gradients for all that is handed over.

    Inputs after the group: ``x [..., k]``; how many and which tensors ``x`` can be computed from again; then the
    operands, :class:`Operands` flattened. Kept for backward are ``s``, and ``x`` or what it
    comes from. With an activation that the provider differentiates itself, the gradient goes to the sources, and
    none to ``x``.

    Between two large products the caches hold nothing of the interpreter's: a line of Python costs ten times what it
    does in a loop, so what can be found out once is.
    """

    @staticmethod
    def forward(ctx: Any, group: Group, x: Tensor, sources: int, *tensors: Any) -> tuple[Tensor, ...]:
        provider, adapters, own = group.provider, group.adapters, tensors[sources:]
        seed = provider.random(x.reshape(-1, x.shape[-1]), adapters) if adapters.drops else None
        outputs, kept = provider.forward(x, Operands.unflatten(adapters, own), adapters, seed)
        if any(ctx.needs_input_grad):
            needs = find_needs(group, ctx.needs_input_grad, sources)
            again = tensors[:sources] if sources else (x,)
            ctx.save_for_backward(*again, *kept, *own, *[outputs[i] for i in needs.gains])
            ctx.group, ctx.sources, ctx.needs = group, sources, needs
            ctx.set_materialize_grads(False)
            if needs.idle:
                ctx.mark_non_differentiable(*[outputs[i] for i in needs.idle])
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Any, ...]:
        given = next((dy for dy in dys if dy is not None), None)
        if given is None:
            return (None,) * len(ctx.needs_input_grad)
        with full_precision(given):  # whatever autocast says where backward is called
            return LowRankLinear._backward(ctx, dys)

    @staticmethod
    def _backward(ctx: Any, dys: Sequence[Tensor | None]) -> tuple[Any, ...]:
        group: Group = ctx.group
        needs: Needs = ctx.needs
        adapters, saved, first = group.adapters, ctx.saved_tensors, ctx.sources or 1
        again, kept, end = saved[:first], Kept(*saved[first : first + 2]), first + 2 + adapters.operands[-1].stop
        ys: list[Tensor | None] = [None] * len(dys)
        for i, y in zip(needs.gains, saved[end:], strict=True):
            ys[i] = y
        activation = group.activation if needs.needed[0] else ""  # for its sources' sake only
        if group.recipe and not activation:
            again = (recompute(group.recipe, again),) if needs.input else ()
        operands = Operands.unflatten(adapters, saved[first + 2 : end])
        found = group.provider.backward(dys, ys, kept, again, activation, operands, adapters, needs.needed)
        sources = found.sources or (None,) * ctx.sources
        return (None, found.x, None, *sources, *found.operands)
