"""The text of two adapted graphs, as files: what a site looks like, and a change of the graph's form in review.

Written anew with ``--update-golden``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lorafx
from lorafx import LoraSpec
from lorafx.ir import format_graph

Golden = Callable[[str, str], None]


class Attention(nn.Module):
    """One pre-norm block of self-attention over ``x [batch, sequence, 8]`` with two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8, bias=False)
        self.drop = nn.Dropout(0.1)
        self.gain = nn.Parameter(torch.ones(8, 8))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0.0)
        hidden = x + self.drop(self.out(attended.transpose(1, 2).flatten(2)))
        return {"hidden": hidden * F.linear(hidden, self.gain).sigmoid()}


def test_mlp(golden: Golden) -> None:
    model = nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Dropout(0.5), nn.Linear(9, 3))
    spec = LoraSpec(r=2, alpha=3, dropout=0.1, target_modules=["0", "3"])
    exported = lorafx.apply(model, spec, (torch.ones(2, 7),))
    golden("mlp_export.txt", format_graph(exported))
    golden("mlp_symbolic.txt", format_graph(lorafx.apply(model, spec)))
    golden("mlp_merged.txt", format_graph(lorafx.merge(exported)))


def test_attention(golden: Golden) -> None:
    spec = LoraSpec(r=2, alpha=4, target_modules=["qkv", "out", "gain"], rank_pattern={"out": 4}, rslora=True)
    golden("attention.txt", format_graph(lorafx.apply(Attention(), spec, {"x": torch.ones(2, 5, 8)})))
