"""The provider for CPUs: the large products are the library's, what adapters add is compiled."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import ClassVar

from torch import Tensor

from lorafx.kernels.base import ACTIVATIONS, Adapters, Call, Gradients, Kept, Operands, Provider
from lorafx.kernels.cpu import build, ops


class Cpu(Provider):
    """float32 and bfloat16. Masks are one bit an element, kept for backward."""

    name: ClassVar[str] = "cpu"
    activations = frozenset(ACTIVATIONS)

    def unavailable(self) -> str | None:
        return _unavailable()

    def rejects(self, call: Call) -> str | None:
        if call.device.type != "cpu":
            return f"it is for CPUs, and the layer is on {call.device}"
        if call.dtype not in ops.DTYPES:
            return f"it computes in float32 and bfloat16, and the layer is {call.dtype}"
        return self.unavailable()  # where this graph was lowered there may have been a compiler

    def forward(
        self, x: Tensor, operands: Operands, adapters: Adapters, seed: Tensor | None
    ) -> tuple[list[Tensor], Kept]:
        """One operator."""
        weights = ops.Weights.of(operands.weights, x.dtype)
        s, bits, *ys = ops.cpu_group(x, *weights, *operands[1:], adapters.counts, adapters.p, adapters.scales, seed)
        return ys, Kept(s, None if seed is None else bits)

    def backward(
        self,
        dys: Sequence[Tensor | None],
        ys: Sequence[Tensor | None],
        kept: Kept,
        inputs: Sequence[Tensor],
        activation: str,
        operands: Operands,
        adapters: Adapters,
        needed: Sequence[bool],
    ) -> Gradients:
        """One operator."""
        weights = ops.Weights.of(operands.weights, kept.s.dtype)
        static = (adapters.counts, adapters.p, adapters.scales, needed)
        found = ops.cpu_group_backward(dys, ys, *kept, inputs, activation, *weights, *operands[1:], *static)
        end = len(inputs) if activation else 1
        if any(dy is None for dy in dys):
            needed = ops.alive(needed, dys, adapters.counts)
        own = [g if wanted else None for g, wanted in zip(found[end:], needed[1:], strict=True)]
        return Gradients(None, found[:end], own) if activation else Gradients(found[0] if needed[0] else None, (), own)


@cache
def _unavailable() -> str | None:
    try:
        build.load()
    except build.BuildError as error:
        return str(error)
    return None
