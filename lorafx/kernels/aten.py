"""The provider that needs nothing but torch: library products, in the order that reads the least.

Products with a narrow side run at the speed of memory, and library routines reach it only for some layouts:
with ``right`` turned to ``[k, R]``, with ``left`` to ``[R, n]``, and ``x^T s`` rather than ``s^T x``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lorafx.kernels.base import Adapters, Call
from lorafx.kernels.steps import GradUp, Layer, Stepwise, Upstream, like, split

#: Random numbers are 16 bits an element, so that p is exact to 2^-16; one int64 has those of four elements.
_LEVELS = 1 << 16
_LOWEST = torch.iinfo(torch.int64).min


class Aten(Stepwise):
    """Any device and floating dtype."""

    name: ClassVar[str] = "torch"

    def unavailable(self) -> str | None:
        return None

    def rejects(self, call: Call) -> str | None:
        return None

    def random(self, x: Tensor, adapters: Adapters) -> Tensor:
        """The masks' random numbers themselves, one set an adapter that drops: int64 ``[adapters, M, k / 4]``."""
        count = sum(p > 0.0 for p in adapters.p)
        return torch.randint(_LOWEST, -_LOWEST - 1, (count, x.shape[0], (x.shape[1] + 3) // 4), device=x.device)

    def down(
        self, x: Tensor, rights: Sequence[Tensor], adapters: Adapters, seed: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if seed is None:
            return torch.mm(x, _turned(torch.cat(list(rights)), x.dtype)), None
        masks = _kept(seed, x, adapters)
        dropped = _dropped(x, adapters, masks)
        return torch.cat([torch.mm(d, _turned(r, x.dtype)) for d, r in zip(dropped, rights, strict=True)], 1), masks

    def up(self, x: Tensor, s: Tensor, layers: Sequence[Layer], adapters: Adapters) -> list[Tensor]:
        ys = []
        for layer in layers:
            gain, bias, left = layer.gain, layer.bias, layer.left(adapters)
            base = F.linear(x, layer.weight, bias).reshape(s.shape[0], layer.weight.shape[0])
            if gain is not None:  # in this form a gain of 1 changes no bit
                base = base + (gain - 1).to(x.dtype) * (base if bias is None else base - bias)
            ys.append(base.addmm_(s[:, layer.columns(adapters)], _turned(left, x.dtype)))
        return ys

    def grad_up(
        self, upstream: Sequence[Upstream], s: Tensor, layers: Sequence[Layer], adapters: Adapters
    ) -> tuple[Tensor, list[GradUp | None]]:
        ds = torch.empty_like(s)
        ups: list[GradUp | None] = []
        for layer, given in zip(layers, upstream, strict=True):
            columns, dy, y, gain = layer.columns(adapters), given.dy, given.y, layer.gain
            if dy is None:
                ds[:, columns] = 0
                ups.append(None)
                continue
            ds[:, columns] = torch.mm(dy, layer.left(adapters).to(dy.dtype))
            dlefts = layer.dlefts(torch.mm(dy.t(), s[:, columns]), adapters)
            base = dy if gain is None else dy * gain.to(dy.dtype)
            total, dot = _sum(dy) if given.needs_total else None, None if y is None else _sum(_wide(dy) * y)
            ups.append(GradUp(dlefts, base, total, dot))
        return ds, ups

    def grad_x(
        self,
        bases: Sequence[Tensor],
        weights: Sequence[Tensor],
        ds: Tensor,
        rights: Sequence[Tensor],
        adapters: Adapters,
        masks: Tensor | None,
    ) -> Tensor:
        dx, right = sum_of_products(bases, weights), torch.cat(list(rights)).to(ds.dtype)
        if masks is None:
            return dx.addmm_(ds, right)
        columns, parts = split(ds, adapters.ranks, 1), split(right, adapters.ranks)
        low = [torch.mm(c, p) for c, p in zip(columns, parts, strict=True)]
        for dropped in _dropped(low, adapters, masks):
            dx += dropped
        return dx

    def grad_right(
        self, x: Tensor, ds: Tensor, rights: Sequence[Tensor], adapters: Adapters, masks: Tensor | None
    ) -> list[Tensor]:
        if masks is None:
            return like(split(torch.mm(x.t(), ds).t(), adapters.ranks), rights)
        columns, dropped = split(ds, adapters.ranks, 1), _dropped(x, adapters, masks)
        return like([torch.mm(d.t(), c).t() for d, c in zip(dropped, columns, strict=True)], rights)


def sum_of_products(bases: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """``sum_i base_i [M, n_i] W_i [n_i, k]``, each product added to the sum as it is made."""
    first, *rest = zip(bases, weights, strict=True)
    dx = torch.mm(*first)
    for base, weight in rest:
        dx.addmm_(base, weight)
    return dx


def _turned(small: Tensor, dtype: torch.dtype) -> Tensor:
    return small.to(dtype).t().contiguous()


def _sum(values: Tensor) -> Tensor:
    return values.sum(0, dtype=torch.promote_types(values.dtype, torch.float32))


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _kept(numbers: Tensor, x: Tensor, adapters: Adapters) -> Tensor:
    """One mask an adapter that drops, bool ``[adapters, M, k]``."""
    bits = numbers.view(torch.int16)[..., : x.shape[1]]
    least = [round(p * _LEVELS) - _LEVELS // 2 for p in adapters.p if p > 0.0]
    return torch.stack([part >= low for part, low in zip(bits.unbind(), least, strict=True)])


def _dropped(x: Tensor | Sequence[Tensor], adapters: Adapters, kept: Tensor) -> list[Tensor]:
    """``x`` (or one tensor for each adapter) through each adapter's dropout."""
    masks = iter(kept.unbind())
    each = [x] * len(adapters.p) if isinstance(x, Tensor) else x
    return [
        part if p == 0.0 else part * next(masks) * (1.0 / (1.0 - p)) for part, p in zip(each, adapters.p, strict=True)
    ]
