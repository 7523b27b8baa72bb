"""The provider for CPUs: the large products are the library's, what adapters add is compiled."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import ClassVar

from torch import Tensor

from lorafx.kernels.base import ACTIVATIONS, Adapters, Call, GradUp, Layers, Provider, Upstreams, like
from lorafx.kernels.cpu import build, ops


class Cpu(Provider):
    """float32 and bfloat16. Masks are one bit an element, kept for backward."""

    name: ClassVar[str] = "cpu"

    def unavailable(self) -> str | None:
        return _unavailable()

    def rejects(self, call: Call) -> str | None:
        if call.device.type != "cpu":
            return f"it is for CPUs, and the layer is on {call.device}"
        if call.dtype not in ops.DTYPES:
            return f"it computes in float32 and bfloat16, and the layer is {call.dtype}"
        return self.unavailable()  # where this graph was lowered there may have been a compiler

    def down(
        self, x: Tensor, rights: Sequence[Tensor], adapters: Adapters, seed: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        s, bits = ops.cpu_down(x, rights, adapters.p, adapters.scales, seed)
        return s, None if seed is None else bits

    def up(self, x: Tensor, s: Tensor, layers: Layers, adapters: Adapters) -> list[Tensor]:
        ys: list[Tensor] = ops.cpu_up(x, s, layers.weights, layers.biases, layers.gains, layers.lefts, layers.counts)
        return ys

    def grad_up(
        self, upstream: Upstreams, s: Tensor, layers: Layers, adapters: Adapters
    ) -> tuple[Tensor, list[GradUp | None]]:
        dys, ys, needs_total = upstream.dys, upstream.ys, upstream.needs_total
        lefts, gains = layers.lefts, layers.gains
        ds, *found = ops.cpu_grad_up(dys, ys, needs_total, s, gains, lefts, layers.counts, adapters.scales)
        dlefts, extras = like(found[: len(lefts)], lefts), found[len(lefts) :]
        ups: list[GradUp | None] = []
        for i, (dy, place) in enumerate(zip(dys, layers.places, strict=True)):
            if dy is None:
                ups.append(None)
                continue
            base, total, dot = extras[3 * i : 3 * i + 3]
            ups.append(
                GradUp(
                    dlefts[place],
                    dy if gains[i] is None else base,
                    total if needs_total[i] else None,
                    None if ys[i] is None else dot,
                )
            )
        return ds, ups

    def grad_x(
        self,
        bases: Sequence[Tensor],
        weights: Sequence[Tensor],
        ds: Tensor,
        rights: Sequence[Tensor],
        adapters: Adapters,
        kept: Tensor | None,
    ) -> Tensor:
        dx: Tensor = ops.cpu_grad_x(bases, weights, ds, rights, adapters.p, kept)
        return dx

    def grad_right(
        self, x: Tensor, ds: Tensor, rights: Sequence[Tensor], adapters: Adapters, kept: Tensor | None
    ) -> list[Tensor]:
        return like(ops.cpu_grad_right(x, ds, rights, adapters.p, kept), rights)

    activations = frozenset(ACTIVATIONS)

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
        x, *grads = ops.cpu_grad_sources(bases, weights, ds, rights, adapters.p, kept, activation, sources)
        return x, grads


@cache
def _unavailable() -> str | None:
    try:
        build.load()
    except build.BuildError as error:
        return str(error)
    return None
