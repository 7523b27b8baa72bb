"""The launches of a training step, recorded instead of run: what is compiled ahead of time and what traffic is of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from lorafx.bases import FORMATS
from lorafx.kernels.triton.device import Device, pretend
from lorafx.kernels.triton.down import down
from lorafx.kernels.triton.dropout import plan
from lorafx.kernels.triton.grad_down import grad_right, grad_x
from lorafx.kernels.triton.grad_up import grad_up
from lorafx.kernels.triton.row_norm import row_norm
from lorafx.kernels.triton.tiles import recorded
from lorafx.kernels.triton.up import up
from lorafx.kernels.triton.weights import Stored, dense


@dataclass(frozen=True)
class Launch:
    """A kernel's launch as it was asked for: the grid, the arguments and the compile-time options."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's, without ``_kernel``."""
        return str(self.kernel.__name__).removesuffix("_kernel")


def record(calls: Callable[[], object], device: Device) -> list[Launch]:
    """The launches of ``calls`` on a device like that. Nothing runs."""
    launches: list[Launch] = []
    with pretend(device), recorded(lambda *launch: launches.append(Launch(*launch))):
        calls()
    return launches


def step(
    device: Device, m: int, k: int, widths: Sequence[int], ranks: Sequence[int], dtype: torch.dtype,
    p: float = 0.1, dora: bool = False, aligned: bool = True, adapters: torch.dtype | None = None, bias: bool = True,
    fused: bool = False, block_size: int = 0,
) -> list[Launch]:  # fmt: skip
    """The launches of a training step of one group: siblings of ``widths`` with ``ranks``, M rows of k features.

    ``aligned`` tensors start at multiples of 16 bytes; otherwise each is a view with an odd offset and odd strides.
    ``adapters`` is the dtype of the factors, float32 unless given. ``bias``: whether the layers have one, trained.
    ``fused``: all large products in Triton, as tuning may choose. With ``block_size`` the weights are in NF4, with
    double quantisation.
    """
    wide = adapters or torch.float32

    def make(*shape: int, of: torch.dtype = dtype) -> Tensor:
        pad = 0 if aligned else 1 + shape[-1] % 2
        return torch.empty(*shape[:-1], shape[-1] + pad, dtype=of, device="meta")[..., pad:]

    def calls() -> None:
        seed = torch.empty(1, dtype=torch.int64, device="meta") if p > 0 else None
        columns = plan(tuple(ranks), (p,) * len(ranks))
        x, right = make(m, k), make(sum(ranks), k, of=wide)
        weights = [
            Stored(nf4_tensors(n, k, block_size, aligned) if block_size else (make(n, k),), (n, k), block_size)
            for n in widths
        ]
        s = down(x, right, columns, seed)
        bases, first = [], 0
        for weight, n, r in zip(weights, widths, ranks, strict=True):
            left, mine = make(n, r, of=wide), s[:, first : first + r]
            squares = make(n, of=torch.float64)
            norm = row_norm(dense(weight, dtype), right[first : first + r], left, squares, 2.0) if dora else None
            y = up(x, weight, make(n) if bias else None, mine, left, norm, fused or None)
            bases.append(grad_up(make(m, n), mine, left, norm, y if dora else None, bias)[2])
            first += r
        ds = make(m, sum(ranks))
        grad_x(bases, weights, ds, right, columns, seed, fused or None)
        grad_right(ds, x, columns, seed, wide)

    return record(calls, device)


def nf4_tensors(n: int, k: int, block_size: int, aligned: bool) -> tuple[Tensor, ...]:
    """The tensors of a weight ``[n, k]`` in NF4 with double quantisation; unaligned, they start at odd places."""
    layout = FORMATS["nf4"].layout((n, k), block_size, True)
    off = 0 if aligned else 1
    return tuple(
        torch.empty(prod(shape) + off, dtype=dtype, device="meta")[off:].view(shape) for shape, dtype in layout.values()
    )
