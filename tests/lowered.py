"""A small model with groups of layers, adapted and lowered; and what a step of it gives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lorafx
from conftest import randomize
from lorafx import LoraSpec
from lorafx.graph import CapturedModule
from lorafx.kernels import providers
from lorafx.kernels.base import Provider
from lorafx.kernels.grouped import Arguments
from tolerances import assert_close

WIDTH = 16
X = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(0))


class Layer(nn.Module):
    """A block with a group of three, one of two, and two alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=i > 0) for i in range(3))
        self.o = nn.Linear(WIDTH, WIDTH)
        self.gate, self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.drop(self.o(F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h))))
        h = self.norm2(x)
        result: Tensor = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return result


class Model(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(x)
        return logits


@cache
def inserted(dtype: torch.dtype, layers: int, options: tuple[tuple[str, Any], ...]) -> CapturedModule:
    """The model with adapters, as the reference. Shared: don't change it."""
    torch.manual_seed(0)
    spec = LoraSpec(**{"r": 3, **dict(options)})
    gm = lorafx.apply(Model(layers).to(dtype), spec, (X.to(dtype),), seed=0, backend="reference")
    randomize(gm)
    return gm


def applied(
    backend: str = "auto", *, dtype: torch.dtype = torch.float32, layers: int = 1, **options: Any
) -> CapturedModule:
    """What ``lorafx.apply`` returns, from a cached capture, its adapters filled."""
    gm = copy.deepcopy(inserted(dtype, layers, tuple(options.items())))
    lorafx.lower(gm, backend)
    return gm


def grads(gm: nn.Module) -> dict[str, Tensor]:
    return {n.removeprefix("_orig_mod."): p.grad.clone() for n, p in gm.named_parameters() if p.grad is not None}


def run(gm: nn.Module, x: Tensor = X, seed: int = 1) -> dict[str, Tensor]:
    """The output and all gradients, from this random state."""
    gm.zero_grad()
    torch.manual_seed(seed)
    y = gm(x)
    y.float().square().mean().backward()
    return {"output": y.detach(), **grads(gm)}


def assert_equal_results(found: dict[str, Tensor], expected: dict[str, Tensor], what: str = "model") -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(what, found[name], value)


def derived(gm: CapturedModule) -> list[str]:
    """The provider of each group that runs."""
    graph = gm.meta["lowering"].derive(gm, gm.graph)
    return [Arguments(*n.args).provider for n in graph.nodes if str(n.target) == "lorafx.grouped.default"]


@contextmanager
def replaced(name: str, make: Callable[[], Provider]) -> Iterator[None]:
    """With another provider in the place of the one of this name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(providers, "PROVIDERS", {**providers.PROVIDERS, name: make})
        providers.provider.cache_clear()
        yield
    providers.provider.cache_clear()
