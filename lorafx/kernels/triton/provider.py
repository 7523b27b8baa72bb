"""The provider: which calls it serves, and its five functions on the operators of this package.

Triton is imported by the first call, not by this module: asking why the provider is unavailable costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import compress
from typing import ClassVar

import torch
from torch import Tensor

from lorafx.kernels.base import Adapters, Call
from lorafx.kernels.steps import GradUp, Layer, Stepwise, Upstream, like, split
from lorafx.kernels.triton import ops


class TritonProvider(Stepwise):
    """Fused kernels in Triton, for CUDA devices (and AMD's, which PyTorch calls by that name too).

    ``s`` and ``ds`` are in x's dtype. Masks are drawn anew in backward from the seed, which is all that
    :meth:`down` hands on. The same inputs give the same bits.

    A weight in NF4 is read as it is stored, by the kernels of both large products; one in another base format is made
    dense for each product, and is gone after it.

    Forward's large product of a dense weight is the vendor's GEMM with the rest added in one pass over its output, so
    that an adapter that changes nothing leaves the frozen layer's bits. Backward's is Triton's for half types, with the
    rest in its accumulator, and again the vendor's for float32. Under ``LORAFX_AUTOTUNE=1`` each is whichever is the
    faster, and outputs equal the frozen layer's to rounding only.
    """

    name: ClassVar[str] = "triton"

    def unavailable(self) -> str | None:
        """Without Triton, or without a GPU. (Triton's interpreter, ``TRITON_INTERPRET=1``, is for tests.)"""
        if find_spec("triton") is None:
            return "Triton is not installed"
        if not torch.cuda.is_available() and not ops.interpreted():
            return "there is no CUDA device"
        return None

    def rejects(self, call: Call) -> str | None:
        """It serves float32, bfloat16 and float16 on CUDA."""
        if call.device.type != "cuda" and not (ops.interpreted() and call.device.type == "cpu"):
            return f"it runs on CUDA devices, not on {call.device.type}"
        if call.dtype not in ops.DTYPES:
            return f"it computes in float32, bfloat16 and float16, not in {str(call.dtype).removeprefix('torch.')}"
        if call.r == 0:
            return "there are no ranks"
        return None

    def down(
        self, x: Tensor, rights: Sequence[Tensor], adapters: Adapters, seed: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """``s`` by one kernel (two where the sum over k is split), and the seed: all that the masks depend on."""
        masks = seed.to(x.device) if seed is not None and adapters.drops else None
        return ops.triton_down(x, _beside(rights, 0), adapters.ranks, adapters.p, masks), masks

    def up(self, x: Tensor, s: Tensor, layers: Sequence[Layer], adapters: Adapters) -> list[Tensor]:
        """One kernel a layer, after the library's product, or with that of a weight in NF4."""
        ys = []
        for layer in layers:
            weight, mine = ops.arguments([layer.weight], x.dtype), s[:, layer.columns(adapters)]
            ys.append(ops.triton_up(x, *weight, layer.bias, mine, layer.left(adapters), layer.gain))
        return ys

    def grad_up(
        self, upstream: Sequence[Upstream], s: Tensor, layers: Sequence[Layer], adapters: Adapters
    ) -> tuple[Tensor, list[GradUp | None]]:
        """One kernel a layer, and one that adds up its parts."""
        parts: list[Tensor] = []
        ups: list[GradUp | None] = []
        for layer, above in zip(layers, upstream, strict=True):
            mine = s[:, layer.columns(adapters)]
            if above.dy is None:
                parts.append(torch.zeros_like(mine))
                ups.append(None)
                continue
            ds, dleft, base, total, dot = ops.triton_grad_up(
                above.dy, mine, layer.left(adapters), layer.gain, above.y, above.needs_total
            )
            parts.append(ds)
            base = above.dy if layer.gain is None else base
            dlefts = layer.dlefts(dleft, adapters)
            ups.append(GradUp(dlefts, base, total if above.needs_total else None, None if above.y is None else dot))
        return _beside(parts, 1), ups

    def grad_x(
        self,
        bases: Sequence[Tensor],
        weights: Sequence[Tensor],
        ds: Tensor,
        rights: Sequence[Tensor],
        adapters: Adapters,
        masks: Tensor | None,
    ) -> Tensor:
        """One kernel, for half types and NF4 the large products too; then the weights that have to be made dense."""
        read = [ops.reads(weight, ds.dtype) for weight in weights]
        own = ops.arguments([*compress(weights, read)], ds.dtype)
        right = _beside(rights, 0)
        dx: Tensor = ops.triton_grad_x([*compress(bases, read)], *own, ds, right, adapters.ranks, adapters.p, masks)
        for base, weight, done in zip(bases, weights, read, strict=True):
            if not done:
                dx.addmm_(base, weight)
        return dx

    def grad_right(
        self, x: Tensor, ds: Tensor, rights: Sequence[Tensor], adapters: Adapters, masks: Tensor | None
    ) -> list[Tensor]:
        """One kernel, and one that adds up its parts; in float32."""
        return like(split(ops.triton_grad_right(ds, x, adapters.ranks, adapters.p, masks), adapters.ranks), rights)


def _beside(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)
