"""Which calls are served together: as text, and that what is computed stays the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lorafx
from conftest import leaves, randomize
from lorafx import LoraSpec
from lorafx.graph import CapturedModule
from lorafx.ir import format_graph
from lorafx.kernels.grouped import Arguments
from lorafx.passes.group import Member, find_groups
from tolerances import assert_close
from zoo import FAMILIES, Family

WIDTH = 8


def sample(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed))


def linear(out: int = WIDTH, bias: bool = True) -> nn.Linear:
    return nn.Linear(WIDTH, out, bias=bias)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q, self.k, self.v, self.o = (
            nn.LayerNorm(WIDTH),
            linear(),
            linear(4),
            linear(bias=False),
            linear(),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        mixed: Tensor = x + self.o(self.q(h) * self.k(h).repeat(1, 2) + self.v(h))
        return mixed


class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = linear(), linear(), linear()

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        mixed: Tensor = self.q(x) * self.k(memory) + self.v(memory)
        return mixed


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = linear(12, bias=False), linear(12, bias=False), nn.Linear(12, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return result


class Writes(nn.Module):
    """The value that both read is another one at the second reading."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = linear(), linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        h = x * 2.0
        first = self.a(h) + self.b(h)
        h += 1.0
        result: Tensor = first + self.c(h)
        return result


class WritesElsewhere(Writes):
    """A view of it is written through."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([x, x])
        first = self.a(h) + self.b(h)
        h[0].zero_()
        result: Tensor = first + self.c(h)
        return result


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.a(x) + self.b(x) * self.a(x) + self.a(torch.tanh(x))
        return result


class Layers(nn.Module):
    """Two numbered layers, which checkpointing runs again one by one, and a head; all read the input."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"a": linear(), "b": linear()}) for _ in range(2))
        self.skip = linear()

    def forward(self, x: Tensor) -> Tensor:
        total = self.skip(x)
        for layer in self.layers:
            total = total + layer["a"](x) * layer["b"](x)
        return total


class Computed(nn.Module):
    """A weight and a bias that come from an input stay apart; what is made of other weights alone may join."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.scale = linear(), linear(), linear(), nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        apart = F.linear(x, x.t() @ x) + F.linear(x, self.c.weight, x.mean(0))
        result: Tensor = apart + F.linear(x, torch.diag(self.scale)) + self.a(x)
        return result + F.linear(x, self.b.weight.t(), self.b.bias * 2) + F.linear(x, torch.full((3, WIDTH), 0.5)).sum()


class Views(nn.Module):
    """The same numbers in another shape are another value."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.a(x) + self.b(x.reshape(2, -1, WIDTH)).reshape(-1, WIDTH)
        return result


class InPlace(nn.Module):
    """What follows writes into the layers' outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = linear(), linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        first = F.relu(self.a(x), inplace=True)
        second = self.b(x)
        second += first
        result: Tensor = self.c(torch.tanh(second)).mul_(2.0)
        return result


@dataclass(frozen=True)
class Case:
    """A model, what of it is adapted, its groups: ``input: layer[adapters], ...``, one line each."""

    model: Callable[[], nn.Module]
    targets: tuple[str, ...]
    groups: str
    inputs: tuple[Tensor, ...] = (sample(6),)


CASES = {
    "q, k, v": Case(SelfAttention, ("q", "k", "v", "o"), "layer_norm: q[1], k[1], v[1]\nadd: o[1]"),
    "one of three": Case(SelfAttention, ("v",), "layer_norm: q[0], k[0], v[1]"),
    "what is alone and frozen is left": Case(SelfAttention, ("q", "k"), "layer_norm: q[1], k[1], v[0]"),
    "cross attention": Case(
        CrossAttention, ("q", "k", "v"), "x: q[1]\nmemory: k[1], v[1]", (sample(6), sample(6, seed=1))
    ),
    "cross attention on one value twice": Case(CrossAttention, ("k",), "memory: k[1], v[0]", (sample(6), sample(6))),
    "gate and up": Case(Gated, ("gate", "up", "down"), "x: gate[1], up[1]\nmul: down[1]"),
    "written in between": Case(Writes, ("a", "b", "c"), "mul: a[1], b[1]\nadd_: c[1]"),
    "written through a view": Case(WritesElsewhere, ("a", "c"), "cat: a[1], b[0]\ncat: c[1]"),
    "a layer called twice": Case(Twice, ("a", "b"), "x: a[1], b[1], a[1]\ntanh: a[1]"),
    "layers apart": Case(
        Layers, ("a", "b", "skip"), "x: skip[1]\nx: layers.0.a[1], layers.0.b[1]\nx: layers.1.a[1], layers.1.b[1]"
    ),
    "computed operands": Case(Computed, ("a",), "x: a[1]"),
    "another shape": Case(Views, ("a", "b"), "x: a[1]\nreshape: b[1]"),
    "written afterwards": Case(InPlace, ("a", "b", "c"), "x: a[1]\nx: b[1]\ntanh: c[1]"),
}

VARIANTS = ("lora", "dora")

#: No adapter could be trained here: what it needs for its gradient is written over.
SPOILT = ("written in between", "written through a view")


def text(groups: list[list[Member]]) -> str:
    lines = []
    for group in groups:
        assert len({m.x for m in group}) == 1
        parts = []
        for member in group:
            count = 0 if member.adapters is None else len(member.adapters[1])  # type: ignore[arg-type]
            source = member.weight
            while source.op != "get_attr" and source.all_input_nodes:
                (source,) = source.all_input_nodes
            name = str(source.target).removesuffix(".weight") if source.op == "get_attr" else source.name
            parts.append(f"{name}[{count}]")
        lines.append(f"{group[0].x.name}: {', '.join(parts)}")
    return "\n".join(lines)


def applied(case: Case, variant: str = "lora", backend: str = "auto") -> CapturedModule:
    spec = LoraSpec(r=3, alpha=5, variant=variant, target_modules=list(case.targets))
    torch.manual_seed(2)
    gm = lorafx.apply(case.model(), spec, case.inputs, seed=0, backend=backend)
    randomize(gm)
    return gm


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_groups(case: Case) -> None:
    assert text(find_groups(applied(case).graph)) == case.groups


def results(gm: CapturedModule, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The output and every gradient, also those of the inputs."""
    given = [x.clone().requires_grad_() for x in inputs]
    gm.zero_grad()
    y = gm(*given)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    found = {"output": y.detach()}
    found |= {f"input {i}": x.grad for i, x in enumerate(given) if x.grad is not None}
    return found | {n: p.grad.clone() for n, p in gm.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", [n for n in CASES if n not in SPOILT])
def test_groups_compute_what_the_reference_does(name: str, variant: str, backend: str) -> None:
    case = CASES[name]
    expected = results(applied(case, variant, "reference"), case.inputs)
    found = results(applied(case, variant, backend), case.inputs)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close("model", found[name], value)


@pytest.mark.parametrize("name", SPOILT)
def test_each_call_sees_the_value_before_or_after_a_write(name: str) -> None:
    case = CASES[name]
    with torch.no_grad():
        expected, found = (applied(case, backend=b)(*case.inputs) for b in ("reference", "auto"))
    assert_close("model", found, expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        results(applied(case), case.inputs)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_runs_is_derived_and_the_graph_stays(case: Case) -> None:
    gm = applied(case, backend="reference")
    before = format_graph(gm)
    lorafx.lower(gm)
    assert format_graph(gm) == before
    gm.check()
    derived = gm.meta["lowering"].derive(gm, gm.graph)
    derived.lint()
    assert format_graph(gm) == before
    served = [len(Arguments(*n.args).counts) for n in derived.nodes if str(n.target) == "lorafx.grouped.default"]
    assert served == [len(line.split(",")) for line in case.groups.splitlines()]


def test_only_calls_with_adapters_make_a_group() -> None:
    case = CASES["q, k, v"]
    gm = applied(case)
    with lorafx.disable_adapters(gm):
        assert find_groups(gm.graph) == []
    assert text(find_groups(gm.graph)) == case.groups
    assert find_groups(lorafx.merge(gm).graph) == []


def test_several_adapters_at_some_siblings() -> None:
    gm = applied(CASES["q, k, v"])
    lorafx.add_adapter(gm, LoraSpec(r=2, variant="dora", target_modules=["q", "v"]), "second", seed=1)
    lorafx.set_adapter(gm, ["default", "second"])
    assert text(find_groups(gm.graph)) == "layer_norm: q[2], k[1], v[2]\nadd: o[1]"
    lorafx.set_adapter(gm, "second")
    assert text(find_groups(gm.graph)) == "layer_norm: q[1], k[0], v[1]"


def test_other_kinds_of_layers_are_no_members() -> None:
    from kinds import build, fill, inputs

    gm = fill(lorafx.apply(build(), LoraSpec(r=2, target_modules="all-linear"), inputs(), seed=0))
    kinds = {m.kind for group in find_groups(gm.graph) for m in group}
    assert kinds == {"linear"}
    reference = copy.deepcopy(gm)
    lorafx.lower(reference, "reference")
    for actual, expected in zip(leaves(gm(*inputs())), leaves(reference(*inputs())), strict=True):
        assert_close("model", actual, expected)


#: The groups of a layer of each family, by the last part of the layers' names.
ZOO = {
    "bert": "query+key+value, dense, dense, dense",
    "distilbert": "q_lin+k_lin+v_lin, out_lin, lin1, lin2",
    "modernbert": "Wqkv, Wo, Wi, Wo",
    "llama": "q_proj+k_proj+v_proj, o_proj, gate_proj+up_proj, down_proj",
    "qwen3": "q_proj+k_proj+v_proj, o_proj, gate_proj+up_proj, down_proj",
    "gemma": "q_proj+k_proj+v_proj, o_proj, gate_proj+up_proj, down_proj",
    "phi": "q_proj+k_proj+v_proj+fc1, dense, fc2",
    "gpt2": "c_attn, c_proj, c_fc, c_proj",
    "vit": "q_proj+k_proj+v_proj, o_proj, fc1, fc2",
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.xdist_group(n)) for n in ZOO])
def test_the_groups_of_the_zoos_layers(zoo: Any, name: str) -> None:
    family: Family = FAMILIES[name]
    gm = zoo.adapted(family, LoraSpec(r=2))
    found = []
    for group in find_groups(gm.graph):
        names = [str(m.weight.target).removesuffix(".weight") for m in group]
        if any(".1." in n for n in names):
            assert all(".1." in n for n in names)
            found.append("+".join(n.rsplit(".", 1)[-1] for n in names))
    assert ", ".join(found) == ZOO[name]
