"""Models whose own forward enters autocast: the graph has the casts as nodes, and eager is the oracle."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lorafx
from conftest import same
from lorafx import LoraSpec
from lorafx.api import captured
from lorafx.errors import CaptureError, MatchError
from lorafx.ir import format_graph
from tolerances import assert_close

BF16 = torch.bfloat16
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Mixed(nn.Module):
    """Operators that autocast runs in its dtype, in float32, in the widest of their operands', or as they come."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.inner, self.second, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.norm, self.drop = nn.LayerNorm(8), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.first(x)
        with torch.autocast("cpu", dtype=BF16):
            y = self.drop(self.inner(h))
            y = F.scaled_dot_product_attention(y[None], y[None], h[None])[0] + self.norm(self.second(y))
            with torch.autocast("cpu", enabled=False):
                y = y + self.norm(y.float()).to(BF16)
            y = torch.cat([self.second(self.inner(y)), h], 1)[:, 4:12]
            loss = F.mse_loss(y, h)
        return self.out(y.float()), loss


class Kept(nn.Module):
    """A region that is kept whole: autocast is off in it, or it is inside of an operator that is on no list."""

    def __init__(self, enabled: bool) -> None:
        super().__init__()
        self.first, self.inner, self.enabled = nn.Linear(8, 8), nn.Linear(8, 8), enabled

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        with torch.autocast("cpu", dtype=BF16, enabled=self.enabled):
            h = h.float()
            h = self.inner(torch.einsum("ij,kj->ik", h, h) @ h)
        return h.float()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("around", [False, True], ids=["", "autocast around the call"])
def test_outputs_and_gradients_are_eagers(training: bool, around: bool) -> None:
    model = Mixed().train(training)
    gm = captured(model, (X,), None)
    gm.requires_grad_(True)
    found = []
    for module in (model, gm):
        torch.manual_seed(1)
        with torch.autocast("cpu", BF16) if around else nullcontext():
            y, loss = module(X)
        (y.float().square().mean() + loss).backward()
        found.append(([y, loss], {n: p.grad for n, p in module.named_parameters()}))
    assert same(found[1][0], found[0][0])
    if not around:
        assert same(found[1][1], found[0][1])
    for name, gradient in found[0][1].items():  # where the call's autocast hands over less, captured casts are wider
        assert gradient is not None
        assert_close("autocast", found[1][1][name], gradient)


def test_its_layers_are_sites() -> None:
    """Adapted, trained ones mean the updated weight under autocast; merging gives the captured graph back."""
    model = Mixed().eval()
    text = format_graph(captured(model, (X,), None))
    gm = lorafx.apply(model, LoraSpec(r=2, alpha=4, target_modules=["inner", "second"]), (X,))
    assert same(gm.eval()(X), model(X))
    with torch.no_grad():
        for name in ("inner", "second"):
            a, b = (gm.get_parameter(f"{name}.lora_{f}.default") for f in "AB")
            b.normal_(std=0.3)
            model.get_parameter(f"{name}.weight").add_(0)  # the model's own stays
            model.get_submodule(name).weight = nn.Parameter(model.get_parameter(f"{name}.weight") + 2.0 * b @ a)
    outputs, expected = gm(X), model(X)
    assert_close("gradient", outputs[0].to(BF16), expected[0].to(BF16))
    sum(o.sum() for o in outputs).backward()
    assert gm.get_parameter("inner.lora_A.default").grad is not None
    compiled = torch.compile(gm, fullgraph=True, backend="aot_eager")
    assert same(compiled(X), outputs)
    merged = lorafx.merge(gm)
    assert same(merged(X), expected)
    assert format_graph(merged) == text


@pytest.mark.parametrize("enabled", [False, True])
def test_a_region_that_is_kept_runs_as_in_eager(enabled: bool) -> None:
    model = Kept(enabled)
    gm = lorafx.apply(model, LoraSpec(r=2, target_modules="all-linear", exclude_modules=["inner"]), (X,))
    for dtype in (None, BF16, torch.float16):
        with nullcontext() if dtype is None else torch.autocast("cpu", dtype):
            assert same(gm(X), model(X))


@pytest.mark.parametrize("targets", ["all-linear", ["inner"], ".*inner"])
@pytest.mark.parametrize(("enabled", "said"), [(False, "enabled=False"), (True, "torch.bfloat16")])
def test_a_layer_in_it_is_refused(enabled: bool, said: str, targets: str | list[str]) -> None:
    with pytest.raises(MatchError, match=rf"'inner' is called under torch.autocast\('cpu', {said}\).*Take the context"):
        lorafx.apply(Kept(enabled), LoraSpec(r=2, target_modules=targets), (X,))


@pytest.mark.parametrize("enabled", [False, True])
def test_autocast_needs_example_inputs(enabled: bool) -> None:
    with pytest.raises(CaptureError, match=r"test_regions.py:\d+ .*own torch.autocast.*give example_inputs"):
        captured(Kept(enabled), None, None)
