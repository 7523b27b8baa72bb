"""The provider: which calls it serves, and its five functions on the kernels of this package.

Triton is imported by the first call, not by this module: asking why the provider is unavailable costs nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import ClassVar

import torch
from torch import Tensor

from lorafx.kernels.base import Adapters, Call, GradUp, Layer, Provider, Upstream, like, split

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TritonProvider(Provider):
    """Fused kernels in Triton, for CUDA devices (and AMD's, which PyTorch calls by that name too).

    ``s`` and ``ds`` are in x's dtype. Masks are drawn anew in backward from the seed, which is all that
    :meth:`down` hands on. The large products are Triton's for half types, and for float32 the vendor's GEMM with
    the rest added in one pass over its output (``Config.library``); under ``LORAFX_AUTOTUNE=1`` whichever is
    the faster of the two. The same inputs give the same bits, and where the vendor's GEMM is used an adapter that
    changes nothing leaves the frozen layer's; Triton's product differs from that in its last bits.
    """

    name: ClassVar[str] = "triton"

    def unavailable(self) -> str | None:
        """Without Triton, or without a GPU. (Triton's interpreter, ``TRITON_INTERPRET=1``, is for tests.)"""
        if find_spec("triton") is None:
            return "Triton is not installed"
        if not torch.cuda.is_available() and not _interpreted():
            return "there is no CUDA device"
        return None

    def rejects(self, call: Call) -> str | None:
        """It serves float32, bfloat16 and float16 on CUDA."""
        if call.device.type != "cuda" and not (_interpreted() and call.device.type == "cpu"):
            return f"it runs on CUDA devices, not on {call.device.type}"
        if call.dtype not in DTYPES:
            return f"it computes in float32, bfloat16 and float16, not in {str(call.dtype).removeprefix('torch.')}"
        if call.r == 0:
            return "there are no ranks"
        return None

    def down(
        self, x: Tensor, rights: Sequence[Tensor], adapters: Adapters, seed: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """``s`` by one kernel (two where the sum over k is split), and the seed: all that the masks depend on."""
        from lorafx.kernels.triton.down import down
        from lorafx.kernels.triton.dropout import plan

        kept = seed.to(x.device) if seed is not None and adapters.drops else None
        return down(x, torch.cat(list(rights)), plan(adapters), kept), kept

    def up(self, x: Tensor, s: Tensor, layers: Sequence[Layer], adapters: Adapters) -> list[Tensor]:
        """One kernel a layer."""
        from lorafx.kernels.triton.up import up

        rows = x.reshape(-1, x.shape[-1])
        return [
            up(rows, layer.weight, layer.bias, s[:, layer.columns(adapters)], layer.left(adapters), layer.gain)
            for layer in layers
        ]

    def grad_up(
        self, upstream: Sequence[Upstream], s: Tensor, layers: Sequence[Layer], adapters: Adapters
    ) -> tuple[Tensor, list[GradUp | None]]:
        """One kernel a layer, and one that adds up its parts."""
        from lorafx.kernels.triton.grad_up import grad_up

        ds, ups = torch.empty_like(s), list[GradUp | None]()
        for layer, above in zip(layers, upstream, strict=True):
            columns = layer.columns(adapters)
            if above.dy is None:
                ds[:, columns] = 0
                ups.append(None)
                continue
            low, dleft, base, total, dot = grad_up(
                above.dy, s[:, columns], layer.left(adapters), layer.gain, above.y, above.needs_total
            )
            ds[:, columns] = low
            ups.append(GradUp(layer.dlefts(dleft, adapters), base, total, dot))
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
        """One kernel."""
        from lorafx.kernels.triton.dropout import plan
        from lorafx.kernels.triton.grad_down import grad_x

        return grad_x(bases, weights, ds, torch.cat(list(rights)), plan(adapters), kept)

    def grad_right(
        self, x: Tensor, ds: Tensor, rights: Sequence[Tensor], adapters: Adapters, kept: Tensor | None
    ) -> list[Tensor]:
        """One kernel, and one that adds up its parts; in float32."""
        from lorafx.kernels.triton.dropout import plan
        from lorafx.kernels.triton.grad_down import grad_right

        return like(split(grad_right(ds, x, plan(adapters), kept, torch.float32), adapters.ranks), rights)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
