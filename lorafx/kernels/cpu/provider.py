"""The provider for CPUs: the large products are the library's, what adapters add is compiled."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import ClassVar

from torch import Tensor

from lorafx.kernels.base import ACTIVATIONS, Adapters, Call, Operands, Provider
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

    def linear(
        self, x: Tensor, sources: Sequence[Tensor], recipe: str, activation: str, operands: Operands, adapters: Adapters
    ) -> Sequence[Tensor]:
        """One operator, and one in backward."""
        weights = ops.Weights.of(operands.weights, x.dtype)
        static = (adapters.counts, adapters.p, adapters.scales)
        ys: list[Tensor] = ops.cpu_linear(x, sources, recipe, activation, *weights, *operands[1:], *static)
        return ys


@cache
def _unavailable() -> str | None:
    try:
        build.load()
    except build.BuildError as error:
        return str(error)
    return None
