"""The provider for CPUs: library products where they are as fast, compiled kernels for dropout and gains."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import ClassVar

from torch import Tensor

from lorafx.kernels.aten import Aten
from lorafx.kernels.base import ACTIVATIONS, Call, Dropout, GradUp, Provider
from lorafx.kernels.cpu import build, ops

#: Up to this rank one read of ``dy`` for two products is faster than a library product for each.
_NARROW = 32


class Cpu(Aten):
    """float32 and bfloat16. Masks are one bit an element, kept for backward."""

    name: ClassVar[str] = "cpu"

    def unavailable(self) -> str | None:
        return _unavailable()

    def rejects(self, call: Call) -> str | None:
        if call.device.type != "cpu":
            return f"it is for CPUs, and the layer is on {call.device}"
        if call.dtype not in ops.DTYPES:
            return f"it computes in float32 and bfloat16, and the layer is {call.dtype}"
        return None

    random = Provider.random

    def down(self, x: Tensor, right: Tensor, dropout: Dropout, seed: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if seed is None:
            return super().down(x, right, dropout, None)
        s, bits = ops.cpu_down(x, right, dropout.ranks, dropout.p, seed)
        return s, bits

    def up(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, left: Tensor, gain: Tensor | None
    ) -> Tensor:
        y: Tensor = ops.cpu_up(x, weight, bias, s, left, gain)
        return y

    def grad_up(
        self, dy: Tensor, s: Tensor, left: Tensor, gain: Tensor | None, y: Tensor | None, needs_total: bool
    ) -> GradUp:
        if s.shape[1] > _NARROW and gain is None and not needs_total:
            return super().grad_up(dy, s, left, gain, y, needs_total)
        ds, turned, base, total, dot = ops.cpu_grad_up(dy, s, left, gain, y, needs_total)
        return GradUp(
            ds, turned.t(), dy if gain is None else base, total if needs_total else None, None if y is None else dot
        )

    def grad_x(
        self,
        bases: Sequence[Tensor],
        weights: Sequence[Tensor],
        ds: Tensor,
        right: Tensor,
        dropout: Dropout,
        kept: Tensor | None,
    ) -> Tensor:
        dx: Tensor = ops.cpu_grad_x(bases, weights, ds, right, dropout.ranks, dropout.p, kept)
        return dx

    def grad_right(self, x: Tensor, ds: Tensor, dropout: Dropout, kept: Tensor | None) -> Tensor:
        if kept is None:
            return super().grad_right(x, ds, dropout, None)
        dright: Tensor = ops.cpu_grad_right(x, ds, dropout.ranks, dropout.p, kept)
        return dright

    activations = frozenset(ACTIVATIONS)

    def grad_activation(self, name: str, sources: Sequence[Tensor], dx: Tensor) -> tuple[Tensor, list[Tensor]]:
        x, *grads = ops.cpu_grad_activation(name, sources, dx)
        return x, grads


@cache
def _unavailable() -> str | None:
    try:
        build.load()
    except build.BuildError as error:
        return str(error)
    return None
