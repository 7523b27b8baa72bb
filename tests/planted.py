"""A task whose solution is known: twelve layers, of which two have been shifted by a matrix of low rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, DEPTH, RANK = 24, 12, 6
PLACES = ("layers.3", "layers.8")


class Net(nn.Module):
    """Linear layers with leaky ReLUs between them, and no way around: no other layer can stand in for one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.1)
        return x


@dataclass(frozen=True)
class Task:
    """The base model, and inputs ``[n, WIDTH]`` with what the shifted model makes of them."""

    base: nn.Module
    inputs: Tensor
    targets: Tensor

    def loss(self, model: nn.Module, rows: Tensor | slice = slice(None)) -> Tensor:
        return F.mse_loss(model(self.inputs[rows]), self.targets[rows])


def planted(seed: int = 0, examples: int = 1024) -> Task:
    """The task; the shifts have ``RANK`` singular values of 1 beside weights with 24 of 1.5."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base, shifted = Net(), Net()
        with torch.no_grad():
            for layer in base.layers:
                nn.init.orthogonal_(layer.get_parameter("weight"), 1.5)
            shifted.load_state_dict(base.state_dict())
            for place in PLACES:
                u, v = (torch.linalg.qr(torch.randn(WIDTH, RANK))[0] for _ in range(2))
                shifted.get_parameter(f"{place}.weight").add_(u @ v.T)
            inputs = torch.randn(examples, WIDTH)
            return Task(base, inputs, shifted(inputs))


class Fields(nn.Module):
    """Twelve layers beside each other, each for its own part of the input ``[n, DEPTH, WIDTH]``."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))
        self.out = nn.Linear(DEPTH * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden = [F.gelu(layer(x[:, i])) for i, layer in enumerate(self.layers)]
        out: Tensor = self.out(torch.cat(hidden, -1))
        return out


def planted_fields(examples: int = 1024) -> Task:
    """The same shifts; and what the shifted layers are given has its variance in ``RANK`` directions, equally large."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base, shifted = Fields(), Fields()
        with torch.no_grad():
            shifted.load_state_dict(base.state_dict())
            inputs = torch.randn(examples, DEPTH, WIDTH)
            for place in PLACES:
                u, v = (torch.linalg.qr(torch.randn(WIDTH, RANK))[0] for _ in range(2))
                shifted.get_parameter(f"{place}.weight").add_(u @ v.T)
                index = int(place.rpartition(".")[2])
                inputs[:, index] = 2.0 * inputs[:, index] @ v @ v.T + 0.05 * torch.randn(examples, WIDTH)
            return Task(base, inputs, shifted(inputs))
