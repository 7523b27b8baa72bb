"""What could make lowered code differ from the reference without a word: writes, autocast, broadcasts, extremes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import lorafx
from lorafx.errors import PassError
from lorafx.graph import CapturedModule
from lorafx.kernels.base import Adapters, Operands, quantised
from lorafx.kernels.providers import provider
from tolerances import assert_close

BACKENDS = ("cpu", "torch")


class WrittenBefore(nn.Module):
    """What the input was computed from is another value by the time that the layer runs."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = x * 2
        g = F.gelu(h)
        h.add_(1)
        y: Tensor = self.a(g)
        return y


class WrittenAfter(WrittenBefore):
    def forward(self, x: Tensor) -> Tensor:
        h = x * 2
        y: Tensor = self.a(F.gelu(h))
        h.add_(1)
        return y


class PartWritten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x)
        y[..., :4].mul_(2)
        return y


class Siblings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.k = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.q(x), self.k(x)


class Broadcast(nn.Module):
    """GPT-2's layer, whose bias may be of any shape that broadcasts."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.a = Conv1D(8, 8)
        self.a.bias = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x)
        return y


def adapted(model: nn.Module, x: Tensor, backend: str, **spec: object) -> CapturedModule:
    gm = lorafx.apply(model, {"r": 3, "target_modules": ".*", **spec}, (x,), seed=0, backend=backend)
    generator = torch.Generator().manual_seed(1)
    for p in gm.parameters():
        if p.requires_grad:
            p.data += 0.3 * torch.randn(p.shape, generator=generator).to(p.dtype)
    return gm


def gradients(gm: CapturedModule, x: Tensor) -> dict[str, Tensor | None]:
    gm.zero_grad()
    out = gm(x)
    out.square().sum().backward()
    return {"out": out.detach(), **{n: p.grad for n, p in gm.named_parameters() if p.requires_grad}}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize(
    "build",
    [WrittenBefore, WrittenAfter, PartWritten, lambda: Broadcast(1), lambda: Broadcast(8), lambda: Broadcast(5, 1)],
    ids=["written before", "written after", "part written", "one bias", "a bias each", "a bias a row"],
)
def test_the_reference_is_what_is_computed(build: type[nn.Module], variant: str, backend: str) -> None:
    torch.manual_seed(0)
    model, x = build(), torch.randn(5, 8)
    wanted = gradients(adapted(copy.deepcopy(model), x, "reference", variant=variant), x)
    found = gradients(adapted(model, x, backend, variant=variant), x)
    for name, value in wanted.items():
        assert value is not None
        assert_close("layer", found[name], value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_backward_inside_autocast_computes_in_the_dtype_of_forward(backend: str, dropout: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 8, requires_grad=True)
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    gm = adapted(model, x.detach(), backend, dropout=dropout).train()

    def run(inside: bool) -> list[Tensor]:
        gm.zero_grad()
        torch.manual_seed(3)
        out = gm(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            out.backward(torch.ones_like(out))
        return [p.grad.clone() for p in gm.parameters() if p.grad is not None]

    outside, within = run(False), run(True)
    assert outside
    assert all(torch.equal(a, b) for a, b in zip(outside, within, strict=True))


def test_a_double_model_stays_one_under_autocast() -> None:
    x = torch.randn(5, 8, dtype=torch.float64)
    gm = adapted(PartWritten().double(), x, "auto")
    with torch.autocast("cpu", torch.bfloat16):
        assert gm(x).dtype is torch.float64


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_nothing_reads_gets_no_gradient(backend: str) -> None:
    x = torch.randn(5, 8)
    gm = adapted(Siblings(), x, backend)
    gm(x)[0].sum().backward()
    got = {n.partition(".")[0] for n, p in gm.named_parameters() if p.grad is not None}
    assert got == {"q"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sibling_that_does_not_train_requires_no_gradient(backend: str) -> None:
    x = torch.randn(5, 8)
    gm = adapted(Siblings(), x, backend, target_modules=["q"])
    q, k = gm(x)
    assert q.requires_grad
    assert not k.requires_grad
    q, k = gm(x.clone().requires_grad_())
    assert k.requires_grad


@pytest.mark.parametrize("name", BACKENDS)
def test_nearly_everything_may_be_dropped(name: str) -> None:
    dropout = Adapters((1,), (1,), (quantised(0.999995),), (1.0,))
    operands = Operands([torch.zeros(1, 64)], [None], [None], [torch.ones(1, 1)], [torch.ones(1, 64)])
    (y,) = provider(name).linear(torch.ones(40, 64), [], "", "", operands, dropout)
    assert int((y != 0).sum()) <= 4, "of 2560 elements, one in 65536 is kept at most"


def test_a_compilation_that_fails_leaves_the_graph() -> None:
    x = torch.randn(5, 8)
    gm = adapted(Siblings(), x, "auto")
    flat, wanted = gm.graph, gm(x)
    with pytest.raises(PassError, match="no numbered layers"):
        gm.activation_checkpointing_enable()
    gm.meta["checkpointing"] = None
    assert gm.graph is flat
    gm.recompile()
    assert torch.equal(gm(x)[0], wanted[0])


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu"])
def test_activations_have_torchs_slopes(name: str) -> None:
    f = {"gelu": F.gelu, "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"), "silu": F.silu}[name]
    h = torch.cat([torch.linspace(-40, 40, 2001), torch.tensor([0.0, 1e-30, -1e4, 1e4, -1e18, 1e18])])
    h, u, dx = (t[:, None] for t in (h, torch.randn_like(h), torch.randn_like(h)))
    wide = [h.double().requires_grad_(), u.double().requires_grad_()]
    slopes = torch.autograd.grad(f(wide[0]) * wide[1], wide, dx.double())
    # One column, through a layer whose weight is 1 and an adapter that is 0.
    operands = Operands([torch.ones(1, 1)], [None], [None], [torch.zeros(1, 1)], [torch.zeros(1, 1)])
    none, sources = Adapters((1,), (1,), (0.0,), (1.0,)), [h.requires_grad_(), u.requires_grad_()]
    x = f(h) * u
    (y,) = provider("cpu").linear(x, sources, "not run", f"{name}_mul", operands, none)
    for got, value in zip(torch.autograd.grad(y, sources, dx), slopes, strict=True):
        off = (got.double() - value).abs() / (1 + value.abs())
        assert off.max() < 4e-6  # float32; the slope is a sum of terms that nearly cancel
