"""A model of three layers, and what goes into it."""

from __future__ import annotations

import torch
from torch import nn


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 3))


X = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
