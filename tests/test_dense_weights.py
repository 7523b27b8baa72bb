"""Of packed weights at most one is dense at a time, whatever reads them: where kernels do not, too."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lorafx
from conftest import randomize
from dense_weights import most_dense
from lorafx import LoraSpec
from lorafx.bases import FORMATS
from lorafx.bases.tensor import QuantizedTensor, parts
from lorafx.graph import CapturedModule
from lorafx.kernels.gain import _grad_gain
from lorafx.ops import adapted_weight
from lowered import derived
from tolerances import assert_close

WIDTH = 1024
X = torch.randn(1, 2, WIDTH, generator=torch.Generator().manual_seed(0))


class Siblings(nn.Module):
    """Three layers that read one input, and one that reads theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.o(self.q(x) + self.k(x) * self.v(x))
        return out


def packed(dtype: torch.dtype) -> Siblings:
    torch.manual_seed(0)
    model = Siblings().to(dtype)
    for layer in model.children():
        assert isinstance(layer, nn.Linear)
        held = QuantizedTensor(FORMATS["nf4"].quantize(layer.weight))
        layer.weight = nn.Parameter(held, requires_grad=False)
    return model


def step(gm: CapturedModule, dtype: torch.dtype) -> Callable[[], None]:
    x = X.to(dtype).requires_grad_()
    return lambda: gm(x).float().sum().backward()


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_values_that_were_rounded_to_half_precision_read_in_full(variant: str) -> None:
    gm = lorafx.apply(packed(torch.bfloat16).float(), LoraSpec(r=2, variant=variant), (X,))
    assert derived(gm) == ["cpu"]
    randomize(gm)
    assert most_dense(step(gm, torch.float32), 4 * WIDTH**2) == 1


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_autocast_from_one_half_precision_to_the_other(backend: str) -> None:
    gm = lorafx.apply(packed(torch.float16), LoraSpec(r=2), (X.half(),), backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert most_dense(step(gm, torch.float16), 2 * WIDTH**2) == 1


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("form", [None, "nf4"])
def test_the_gradient_of_small_gains_without_the_compiled_kernels(form: str | None, every: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x, dy, dense = (torch.randn(*size, generator=generator) for size in ((2, WIDTH), (2, WIDTH), (WIDTH, WIDTH)))
    weight = dense if form is None else QuantizedTensor(FORMATS[form].quantize(dense))
    expected = (dy * F.linear(x, dense if form is None else weight.dequantize())).sum(0)
    gain = torch.where(torch.arange(WIDTH) % every == 0, 0.01, 2.0)
    sums = expected * gain, dy.sum(0)
    found: list[Tensor] = []
    call = partial(_grad_gain, *sums, [], [], None, gain, dy, x, *parts(weight))
    assert most_dense(lambda: found.append(call()), 4 * WIDTH**2) == 0
    assert_close("layer", found[0], expected)


class Stacks(nn.Module):
    """Layers with two experts each."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Stack() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(2, 512, 512) / 512)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = (x @ self.experts.flatten(0, 1).T).view(2, 2, 512).sum(1)
        return out


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_of_stacks_of_experts_one_is_dense(variant: str) -> None:
    """Whatever they have been adapted by; beside it there is its own gradient, which no more than one has."""
    x = torch.randn(2, 512, requires_grad=True)
    spec = LoraSpec(r=2, variant=variant, base="nf4", target_modules=(), target_parameters=["experts"])
    gm = lorafx.apply(Stacks(), spec, (x,)).train()
    size = 4 * 2 * 512**2

    def train() -> None:
        gm(x).sum().backward()

    with torch.no_grad():
        assert most_dense(lambda: [gm(x) for _ in range(5)], size) == 1
    assert most_dense(train, size) == 2
    with torch.autocast("cpu", torch.bfloat16):  # for a moment one in each dtype
        assert most_dense(train, size) <= 2
    for parameter in gm.parameters():
        parameter.requires_grad_(False)
    assert most_dense(train, size) == 1
    with lorafx.disable_adapters(gm):
        assert most_dense(train, size) == 1


def test_of_a_stack_only_the_experts_that_are_read_are_dense() -> None:
    stack = QuantizedTensor(FORMATS["nf4"].quantize(torch.randn(4, 1024, 512)))
    a, b = torch.randn(4, 2, 512), torch.randn(4, 1024, 2)
    x = torch.randn(2, 512, requires_grad=True)

    def read(weight: Tensor) -> None:
        sum((F.linear(x, weight[i]).sum() for i in (3, 1) * 10), start=torch.zeros(())).backward()

    for weight in (stack, adapted_weight(stack, [a, b], ["lora"], [1.0], "parameter", [None])):
        assert most_dense(partial(read, weight), 4 * 1024 * 512) == 1
