"""One model with an adapter of every kind, for the tests of what is done with several."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

import lorafx
from lorafx import LoraSpec
from lorafx.graph import CapturedModule
from lorafx.ir import adapters

IDS = torch.arange(12).reshape(3, 4) % 9


class Model(nn.Module):
    """One of each: an embedding, layers that adapters share or don't, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(9, 6), nn.Linear(6, 10), nn.Linear(10, 6)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 5)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.down(torch.relu(self.up(self.embed(ids))))))
        return logits


SPECS: dict[str, LoraSpec] = {
    "default": LoraSpec(r=3, target_modules=["up", "down", "embed"]),
    "small": LoraSpec(r=1, alpha=3, rslora=True, target_modules=["down"]),
    "dora": LoraSpec(r=2, variant="dora", target_modules=["up", "down"]),
    "vera": LoraSpec(r=4, variant="vera", dropout=0.2),
    "head": LoraSpec(r=2, target_modules=["up"], modules_to_save=["head"], bias="lora_only"),
    "bias": LoraSpec(r=2, variant="lora_bias", target_modules=["down"]),
    "adalora": LoraSpec(r=2, variant="adalora", target_modules=["up"]),
}


def filled(gm: CapturedModule, scale: float = 0.3) -> CapturedModule:
    """Every parameter of every adapter anywhere."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for adapter in adapters(gm).values():
            for name in adapter.parameter_names:
                tensor = gm.state_dict()[name]
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    return gm


def build() -> tuple[nn.Module, CapturedModule]:
    model = Model().eval()
    gm = lorafx.apply(model, SPECS["default"], (IDS,), seed=0).eval()
    for name, spec in SPECS.items():
        if name != "default":
            lorafx.add_adapter(gm, spec, name, seed=1)
    return model, filled(gm)


@cache
def several() -> CapturedModule:
    """Made once: for tests that leave it as it is, or copy it."""
    return build()[1]


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def through(gm: CapturedModule, *names: str) -> Tensor:
    lorafx.set_adapter(gm, names)
    result: Tensor = gm(IDS).detach()
    return result
