"""A provider that has a forward and a backward, and what makes them one differentiable function."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorafx.kernels.base import Adapters, Operands, Provider
from lorafx.kernels.once import once_differentiable
from lorafx.kernels.recipe import recompute
from lorafx.variants.base import full_precision


class Kept(NamedTuple):
    """What a forward keeps for backward: ``s``, and what drops the same elements again (None without dropout)."""

    s: Tensor
    masks: Tensor | None


class Gradients(NamedTuple):
    """Of ``x`` (None: not wanted), and of :class:`Operands`, flattened."""

    x: Tensor | None
    operands: Sequence[Tensor | None]


class Differentiable(Provider):
    """Its two halves on tensors without gradients."""

    def linear(
        self, x: Tensor, sources: Sequence[Tensor], recipe: str, activation: str, operands: Operands, adapters: Adapters
    ) -> Sequence[Tensor]:
        """Their function; there are no activations."""
        assert not activation
        given = Group(self, adapters, recipe), x, [s.detach() for s in sources], *[t for each in operands for t in each]
        with full_precision(x):
            ys: Sequence[Tensor] = LowRankLinear.apply(*given)  # type: ignore[no-untyped-call]  # torch gives it no types
        return ys

    def random(self, x: Tensor, adapters: Adapters) -> Tensor:
        """What the masks of one call are made of, from torch's generator: a seed (int64, one element).

        So that a seed set by the user, and a checkpoint that computes the call again, give the same masks.
        """
        return torch.empty(1, dtype=torch.int64, device=x.device).random_()

    @abstractmethod
    def forward(
        self, x: Tensor, operands: Operands, adapters: Adapters, seed: Tensor | None
    ) -> tuple[list[Tensor], Kept]:
        """``y [..., n]`` of each layer, as :meth:`linear` has it; and what to keep.

        ``seed`` is what :meth:`random` drew, None without dropout.
        """

    @abstractmethod
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
        """All gradients.

        Args:
            dys: ``[..., n]`` of each layer, None where nothing reads its output; of one layer at least there is one.
            ys: the outputs of layers of which a gain needs a gradient; None of others.
            kept: what :meth:`forward` kept.
            x: ``[..., k]``, None if no gradient depends on it.
            operands, adapters: as forward had them.
            needed: whether a gradient is wanted: of ``x``, and of each of the operands.
        """


@dataclass(frozen=True)
class Group:
    """What of a group is no tensor."""

    provider: Differentiable
    adapters: Adapters
    recipe: str = ""


@dataclass(frozen=True)
class Needs:
    """What gradients are wanted: ``needed`` is as :meth:`Differentiable.backward` takes it.

    ``gains`` are the layers of which a gain needs one, ``input`` says whether any depends on ``x``, and ``idle`` are
    the outputs that depend on nothing that trains.
    """

    needed: tuple[bool, ...]
    gains: tuple[int, ...]
    input: bool
    idle: tuple[int, ...]


@lru_cache(maxsize=4096)
def find_needs(group: Group, needed: tuple[bool, ...]) -> Needs:
    """From ``ctx.needs_input_grad``, once for all steps."""
    x, own = needed[1], needed[3:]
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

    Inputs after the group: ``x [..., k]``; the tensors that ``x`` can be computed from again, which get no gradient;
    then the operands, :class:`Operands` flattened. Kept for backward are ``s``, and ``x`` or what it comes from.
    """

    @staticmethod
    def forward(ctx: Any, group: Group, x: Tensor, sources: Sequence[Tensor], *own: Any) -> tuple[Tensor, ...]:
        provider, adapters = group.provider, group.adapters
        seed = provider.random(x.reshape(-1, x.shape[-1]), adapters) if adapters.drops else None
        outputs, kept = provider.forward(x, Operands.unflatten(adapters, own), adapters, seed)
        if any(ctx.needs_input_grad):
            needs = find_needs(group, ctx.needs_input_grad)
            again = (sources or (x,)) if needs.input else ()
            ctx.save_for_backward(*kept, *own, *[outputs[i] for i in needs.gains], *again)
            ctx.group, ctx.needs = group, needs
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
        adapters, saved = group.adapters, ctx.saved_tensors
        kept, end = Kept(*saved[:2]), 2 + adapters.operands[-1].stop
        operands, rest = Operands.unflatten(adapters, saved[2:end]), iter(saved[end:])
        ys = [next(rest) if i in needs.gains else None for i in range(len(dys))]
        again = [*rest]
        x = (recompute(group.recipe, again) if group.recipe else again[0]) if needs.input else None
        found = group.provider.backward(dys, ys, kept, x, operands, adapters, needs.needed)
        return (None, found.x, None, *found.operands)
