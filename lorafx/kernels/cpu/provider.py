"""The provider for CPUs: the large products are the library's, what adapters add is compiled."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import islice
from typing import ClassVar

from torch import Tensor

from lorafx.kernels.base import (
    ACTIVATIONS,
    Adapters,
    Call,
    GradUp,
    Layer,
    Provider,
    Upstream,
    like,
)
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

    def up(self, x: Tensor, s: Tensor, layers: Sequence[Layer], adapters: Adapters) -> list[Tensor]:
        ys: list[Tensor] = ops.cpu_up(
            x,
            s,
            [layer.weight for layer in layers],
            [layer.bias for layer in layers],
            [layer.gain for layer in layers],
            [left for layer in layers for left in layer.lefts],
            [len(layer.lefts) for layer in layers],
        )
        return ys

    def grad_up(
        self, upstream: Sequence[Upstream], s: Tensor, layers: Sequence[Layer], adapters: Adapters
    ) -> tuple[Tensor, list[GradUp | None]]:
        lefts = [left for layer in layers for left in layer.lefts]
        ds, *found = ops.cpu_grad_up(
            [above.dy for above in upstream],
            [above.y for above in upstream],
            [above.needs_total for above in upstream],
            s,
            [layer.gain for layer in layers],
            lefts,
            [len(layer.lefts) for layer in layers],
            adapters.scales,
        )
        dlefts, extras, ups = iter(like(found[: len(lefts)], lefts)), iter(found[len(lefts) :]), []
        for layer, above in zip(layers, upstream, strict=True):
            mine, (base, total, dot) = list(islice(dlefts, len(layer.lefts))), islice(extras, 3)
            if above.dy is None:
                ups.append(None)
                continue
            base = above.dy if layer.gain is None else base
            ups.append(GradUp(mine, base, total if above.needs_total else None, None if above.y is None else dot))
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
