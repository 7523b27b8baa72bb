"""Random small models through both front ends: whatever their shape, the laws of a graph hold."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn
from torch.nn import functional as F

import lorafx
from conftest import randomize, same, state_of
from lorafx import LoraSpec
from lorafx.ir import format_graph
from tolerances import assert_close

IN = 5


@dataclass(frozen=True)
class Step:
    """One step of a random model, from width to width.

    ``layer``: a new Linear; ``again``: an earlier Linear of fitting sizes once more; ``matrix``: F.linear on a
    parameter; ``residual``: x + Linear(x); ``branches``: the sum of two Linears; ``norm``, ``drop``: LayerNorm,
    Dropout; each followed by tanh.
    """

    kind: str
    width: int
    bias: bool


KINDS = ("layer", "again", "matrix", "residual", "branches", "norm", "drop")
STEPS = st.lists(st.builds(Step, st.sampled_from(KINDS), st.integers(1, 9), st.booleans()), min_size=1, max_size=6)


class Random(nn.Module):
    """The model that a list of steps describes."""

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.others = nn.ModuleList()
        self.matrices = nn.ParameterList()
        self.biases = nn.ParameterList()
        self.plan: list[tuple[str, tuple[int, ...]]] = []
        width = IN
        for step in steps:
            kind, into = step.kind, step.width
            fitting = [i for i, m in enumerate(self.layers) if (m.in_features, m.out_features) == (width, into)]
            if kind == "again" and not fitting:
                kind = "layer"
            if kind in ("residual", "norm", "drop"):
                into = width
            made: tuple[int, ...] = ()
            if kind == "again":
                made = (fitting[step.width % len(fitting)],)
            elif kind in ("layer", "residual", "branches"):
                count = 2 if kind == "branches" else 1
                made = tuple(range(len(self.layers), len(self.layers) + count))
                self.layers.extend(nn.Linear(width, into, bias=step.bias) for _ in made)
            elif kind == "matrix":
                made = (len(self.matrices), len(self.biases) if step.bias else -1)
                self.matrices.append(nn.Parameter(torch.randn(into, width) / width**0.5))
                if step.bias:
                    self.biases.append(nn.Parameter(torch.randn(into)))
            else:
                made = (len(self.others),)
                self.others.append(nn.LayerNorm(width) if kind == "norm" else nn.Dropout(0.3))
            self.plan.append((kind, made))
            width = into
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        for kind, made in self.plan:
            if kind in ("layer", "again"):
                x = self.layers[made[0]](x)
            elif kind == "residual":
                x = x + self.layers[made[0]](x)
            elif kind == "branches":
                x = self.layers[made[0]](x) + self.layers[made[1]](x)
            elif kind == "matrix":
                x = F.linear(x, self.matrices[made[0]], self.biases[made[1]] if made[1] >= 0 else None)
            else:
                x = self.others[made[0]](x)
            x = x.tanh()
        logits: Tensor = self.head(x)
        return logits


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(steps=STEPS, r=st.integers(1, 11), batch=st.integers(1, 4), rslora=st.booleans(), exported=st.booleans())
def test_random_graphs(steps: list[Step], r: int, batch: int, rslora: bool, exported: bool) -> None:
    torch.manual_seed(len(steps))
    model, x = Random(steps), torch.randn(batch, IN)
    before, sizes = state_of(model), (x, torch.randn(batch + 3, IN))
    spec = LoraSpec(r=r, alpha=2 * r, rslora=rslora, target_modules=".*", dropout=0.2)
    example = (x,) if exported else None
    captured = lorafx.api.captured(model, example, None)
    gm = lorafx.apply(model, spec, example, seed=0)

    calls = [kind for kind, _ in model.plan if kind not in ("norm", "drop")]
    expected = {f"layers.{i}" for i in range(len(model.layers))} | {"head"}
    expected |= {f"matrices.{i}" for i in range(len(model.matrices))}
    assert {s.name for s in lorafx.sites(gm)} == expected
    adapted = [n for n in gm.graph.nodes if getattr(n.target, "namespace", "") == "lorafx"]
    assert len(adapted) == len(calls) + calls.count("branches") + 1

    for training in (True, False):
        twin = copy.deepcopy(model).train(training)
        captured.train(training)
        for given_x in sizes:
            torch.manual_seed(1)
            wanted = twin(given_x)
            torch.manual_seed(1)
            assert torch.equal(captured(given_x), wanted)
    gm.eval()
    for given_x in sizes:
        assert torch.equal(gm(given_x), captured(given_x))

    randomize(gm)
    merged = lorafx.merge(gm)
    for given_x in sizes:
        assert_close("model", merged(given_x), gm(given_x))
    for result in (merged, lorafx.unadapted(gm)):
        assert format_graph(result) == format_graph(captured)
        assert result.code == captured.code
        assert list(result.state_dict()) == list(model.state_dict())
    assert torch.equal(lorafx.unadapted(gm)(x), captured(x))
    model_after = state_of(model)
    assert all(same(before[k], model_after[k]) for k in before if k != "random")
    loaded = copy.deepcopy(model).eval()
    loaded.load_state_dict(lorafx.merged_state_dict(gm))
    assert_close("model", loaded(x), gm(x))
