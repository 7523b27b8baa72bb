"""A small model with one of each that can be adapted, and its adapters filled with values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import lorafx
from lorafx.graph import CapturedModule, get_path
from lorafx.ir import adapters


class Experts(nn.Module):
    """A stack of weights ``[experts, out, in]``, and code that multiplies by it."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 5, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bsi,eoi->bse", x, self.stack)


class Kinds(nn.Module):
    """An embedding, a convolution with groups, an attention, a stack of experts, linear layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.conv = nn.Conv2d(4, 6, 3, groups=2, padding=1)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.experts = Experts()
        self.up = nn.Linear(8, 10)
        self.down = nn.Linear(10, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, ids: Tensor, image: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.attn(x, x, x, need_weights=False)[0]
        x = x + self.down(torch.tanh(self.up(x)))
        pooled = self.experts(x).mean() + self.conv(image).mean()
        logits: Tensor = self.head(x) + pooled
        return logits


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.arange(12).reshape(3, 4) % 11, torch.randn(3, 4, 5, 5, generator=generator).to(dtype)


def build(dtype: torch.dtype = torch.float64) -> Kinds:
    torch.manual_seed(0)
    return Kinds().to(dtype).eval()


def fill(gm: CapturedModule, scale: float = 0.3) -> CapturedModule:
    """Give every parameter of every adapter some value."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for adapter in adapters(gm).values():
            for name in adapter.parameter_names:
                tensor = get_path(gm, name)
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * scale)
    return gm


def deltas(gm: CapturedModule, *names: str) -> dict[str, Tensor]:
    """What merging these adapters changes, by the tensor's name in the base."""
    base, merged = (g.state_dict() for g in (lorafx.unadapted(gm), lorafx.merge(gm, names)))
    return {n: merged[n] - base[n] for n in base if not torch.equal(merged[n], base[n])}
