"""Which layers a spec means: PEFT's grammar, shared and tied weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lorafx
from conftest import Zoo, randomize
from lorafx import LoraSpec, MatchError
from lorafx.errors import SpecError
from lorafx.passes.candidates import candidates
from lorafx.passes.match import LINEAR, match
from targets import Block, Model, X, adapted, graph
from tolerances import assert_close
from zoo import FAMILIES

FRONT_ENDS = pytest.mark.parametrize("exported", [True, False], ids=["export", "symbolic"])


def label(value: object) -> str:
    """A test's id from what it is given; sets print in any order and stay out."""
    return "" if isinstance(value, set) else str(value)


QS = {"blocks.0.q_proj", "blocks.1.q_proj"}
VS = {"blocks.0.v_proj", "blocks.1.v_proj"}


@FRONT_ENDS
@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj"], QS),
        (["proj"], {"proj"}),  # a dotted suffix, not any suffix: neither my_proj nor q_proj
        (["0.q_proj", "my_proj"], {"blocks.0.q_proj", "my_proj"}),
        (["blocks.1.v_proj"], {"blocks.1.v_proj"}),
        ([r"blocks.0.router"], {"blocks.0.router"}),
        (["head"], {"head"}),
        (r".*\.(q|v)_proj", QS | VS),
        ("proj", {"proj"}),  # a full match
        (r".*proj", QS | VS | {"my_proj", "proj"}),
        (r".*router", {"blocks.0.router", "blocks.1.router"}),
        ("all-linear", QS | VS | {"my_proj", "proj"}),
    ],
    ids=label,
)
def test_targets(targets: Any, expected: set[str], exported: bool) -> None:
    assert adapted(graph(exported=exported), target_modules=targets) == expected


@pytest.mark.parametrize(
    ("exclude", "expected"),
    [
        (["q_proj"], VS | {"my_proj", "proj"}),
        (["0.q_proj", "proj"], {"blocks.1.q_proj"} | VS | {"my_proj"}),
        (r"blocks\..*", {"my_proj", "proj"}),
        (["spare"], QS | VS | {"my_proj", "proj"}),  # a layer of the model, though not of the graph
    ],
    ids=label,
)
def test_exclude_wins_over_targets(exclude: Any, expected: set[str]) -> None:
    gm = graph()
    everything = [*QS, *VS, "my_proj", "proj"]
    assert adapted(gm, exclude_modules=exclude) == expected
    assert adapted(gm, target_modules=everything, exclude_modules=exclude) == expected
    reasons = {c.candidate.name: c.reason for c in match(gm, (LoraSpec(exclude_modules=exclude),))}
    assert all(reasons[n] == "excluded by exclude_modules" for n in {*everything} - expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"target_modules": ["q_proj", "v_prj"]},
            r"target_modules names 'v_prj', and the model has no such layer \(did you mean '.*v_proj'",
        ),
        ({"target_modules": ["q_proj", "wte"]}, r"target_modules names 'wte', .*\. Its layers end in: .*q_proj"),
        (
            {"target_modules": ["blocks"]},
            r"names 'blocks', which is the module 'blocks' but no layer .*; layers below it: blocks\.0",
        ),
        ({"target_modules": ["spare"]}, r"'spare' but no layer that this graph calls \(one that these inputs"),
        ({"exclude_modules": ["q_prj"]}, r"exclude_modules names 'q_prj', .*did you mean '.*q_proj'"),
        ({"modules_to_save": ["haed"]}, r"modules_to_save names 'haed', .*did you mean 'head'"),
        (
            {"target_modules": r"transformer\..*"},
            r"target_modules='transformer.*' leaves nothing to adapt among 9 layers: 9 not in target_modules",
        ),
        ({"exclude_modules": r".*"}, r"'all-linear' leaves nothing to adapt .*excluded by exclude_modules"),
        ({"modules_to_save": ["blocks", "proj", "my_proj", "head"]}, r"trained whole \(modules_to_save\)"),
    ],
    ids=label,
)
def test_what_matches_nothing_is_an_error(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(MatchError, match=message):
        lorafx.apply(Model(), LoraSpec(**fields), (X,))


def test_every_unmatched_entry_is_named() -> None:
    with pytest.raises(MatchError, match=r"(?s)aaa.*bbb|bbb.*aaa"):
        lorafx.apply(Model(), LoraSpec(target_modules=["q_proj", "aaa", "bbb"]), (X,))


def test_a_model_without_layers_is_an_error() -> None:
    with pytest.raises(MatchError, match="no layer on a parameter, so there is nothing to adapt"):
        lorafx.apply(nn.Sequential(nn.Tanh()), LoraSpec(), (X,))


def test_an_unknown_variant_is_an_error() -> None:
    with pytest.raises(SpecError, match=r"variant='lroa' is not allowed: .*'lora', .*\(did you mean 'lora'"):
        lorafx.apply(Model(), LoraSpec(variant="lroa"), (X,))


def test_patterns_give_ranks_and_alphas() -> None:
    spec = LoraSpec(
        r=2,
        alpha=3,
        target_modules=r".*proj",
        rank_pattern={"q_proj": 4, r"blocks\.\d\..*": 5},
        alpha_pattern={"1.q_proj": 8, "proj": 7},
    )
    sites = {s.name: (s.r, s.alpha, s.scaling) for s in lorafx.sites(lorafx.apply(Model(), spec, (X,)))}
    assert sites == {
        "blocks.0.q_proj": (4, 3, 3 / 4),
        "blocks.1.q_proj": (4, 8, 8 / 4),
        "blocks.0.v_proj": (5, 3, 3 / 5),
        "blocks.1.v_proj": (5, 3, 3 / 5),
        "my_proj": (2, 3, 3 / 2),
        "proj": (2, 7, 7 / 2),
    }


def test_of_several_specs_the_first_has_a_layer() -> None:
    specs = [
        LoraSpec(r=2, target_modules=["0.q_proj", "proj"], dropout=0.1),
        {"r": 3, "target_modules": ["q_proj"], "rslora": True},
        LoraSpec(r=4, exclude_modules=["my_proj"]),
    ]
    sites = {s.name: (s.r, s.dropout) for s in lorafx.sites(lorafx.apply(Model(), specs, (X,)))}
    expected = {"blocks.0.q_proj": (2, 0.1), "proj": (2, 0.1), "blocks.1.q_proj": (3, 0.0)}
    assert sites == expected | dict.fromkeys(VS, (4, 0.0))
    with pytest.raises(MatchError, match="'nothing'"):
        lorafx.apply(Model(), [specs[0], LoraSpec(target_modules=["nothing"])], (X,))


@FRONT_ENDS
def test_all_linear_leaves_the_output_layer_behind_shape_changes(exported: bool) -> None:
    class Shapes(Model):
        def forward(self, x: Tensor) -> Tensor:
            h = self.head(self.proj(self.my_proj(self.blocks(x)).tanh()))
            return h.unsqueeze(0).permute(0, 2, 1).reshape(-1).view(3, -1).double()

    assert adapted(graph(Shapes(), exported)) == QS | VS | {"my_proj", "proj"}


@FRONT_ENDS
def test_a_layer_whose_output_is_used_further_is_no_output_layer(exported: bool) -> None:
    class Normed(Model):
        def forward(self, x: Tensor) -> Tensor:
            return F.softmax(self.head(self.proj(self.my_proj(self.blocks(x)).tanh())), -1)

    assert adapted(graph(Normed(), exported)) == QS | VS | {"my_proj", "proj", "head"}


# One module called twice; two names for one module.


class Shared(nn.Module):
    """One layer under two names, called under each, the first twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.again = self.layer
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(self.layer(x).tanh()).tanh()
        out: Tensor = self.head(self.again(h).tanh())
        return out


class SharedBlock(nn.Module):
    """A block used twice under two names, as ALBERT's layers are."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block()])
        self.blocks.append(self.blocks[0])
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x)
        return out


@FRONT_ENDS
@pytest.mark.parametrize(
    ("build", "expected"),
    [(Shared, ["layer"]), (SharedBlock, ["blocks.0.q_proj", "blocks.0.v_proj"])],
    ids=["layer", "block"],
)
def test_a_shared_module_is_one_site(build: type[nn.Module], expected: list[str], exported: bool) -> None:
    model = build()
    gm = lorafx.apply(model, LoraSpec(r=2), (X,) if exported else None)
    assert [s.name for s in lorafx.sites(gm)] == expected
    randomize(gm)
    adapted_outputs = gm(X)
    assert_close("model", lorafx.merge(gm)(X), adapted_outputs)
    model.load_state_dict(lorafx.merged_state_dict(gm))
    assert_close("model", model(X), adapted_outputs)


# Forms of calls.


@FRONT_ENDS
def test_functional_calls_go_by_the_parameters_name(exported: bool) -> None:
    model = Model()
    gm = lorafx.apply(model, LoraSpec(r=2, target_modules=["router"]), (X,) if exported else None)
    assert [(s.name, s.weight, s.bias) for s in lorafx.sites(gm)] == [
        ("blocks.0.router", "blocks.0.router", None),
        ("blocks.1.router", "blocks.1.router", None),
    ]
    assert {*gm.state_dict()} - {*model.state_dict()} == {
        f"blocks.{i}.router_adapter.lora_{m}.default" for i in (0, 1) for m in "AB"
    }
    randomize(gm)
    merged = lorafx.merge(gm)
    assert_close("model", merged(X), gm(X))
    assert {*merged.state_dict()} == {*model.state_dict()}


def test_a_module_that_is_no_linear_layer_is_functional_though_it_holds_a_weight() -> None:
    """Routers of mixtures of experts are such: all-linear means Linear modules."""

    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight).sigmoid()

    model = nn.Sequential(nn.Linear(6, 6), Router(), nn.Linear(6, 2))
    for exported in (True, False):
        gm = graph(model, exported)
        assert adapted(gm) == {"0"}
        assert adapted(gm, target_modules=["1"]) == {"1"}


def test_a_subclass_of_linear_is_a_linear_layer() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    class Plain(nn.Linear):
        pass

    model = nn.Sequential(Scaled(6, 6), Plain(6, 6), nn.Linear(6, 2))
    for exported in (True, False):
        gm = lorafx.apply(model, LoraSpec(r=2), (X,) if exported else None)
        assert [s.name for s in lorafx.sites(gm)] == ["0", "1"]
        assert torch.equal(gm(X), model(X))
        randomize(gm)
        assert_close("model", lorafx.merge(gm)(X), gm(X))


def test_a_weight_behind_a_cast() -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(6, 6).to(torch.bfloat16)
            self.head = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = F.linear(x, self.one.weight.to(x.dtype), self.one.bias.to(x.dtype))
            out: Tensor = self.head(h.tanh())
            return out

    model = Cast()
    gm = lorafx.apply(model, LoraSpec(r=2, target_modules=["one"]), (X,))
    assert torch.equal(gm(X), model(X))
    randomize(gm)
    merged = lorafx.merge(gm)
    assert merged.one.weight.dtype == torch.bfloat16
    reference = copy.deepcopy(model)
    reference.load_state_dict(lorafx.merged_state_dict(gm))
    assert torch.equal(merged(X), reference(X))
    rounded = (merged(X) - gm(X)).abs().max() / gm(X).abs().max()
    assert rounded < 4 * torch.finfo(torch.bfloat16).eps  # W' is stored in bfloat16


def test_a_computed_bias_is_no_parameter_of_the_site() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(F.linear(x, self.one.weight, self.one.bias * 2).tanh())
            return out

    model = Computed()
    gm = lorafx.apply(model, LoraSpec(r=2, target_modules=["one"], bias="lora_only"), (X,))
    assert [s.bias for s in lorafx.sites(gm)] == [None]
    randomize(gm)
    assert_close("model", lorafx.merge(gm)(X), gm(X))


def test_layers_without_gradient_stay_so() -> None:
    """Inside torch.no_grad: adapted when asked, the same values, and no gradient reaches the adapter there."""

    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                h = self.one(x).tanh()
            out: Tensor = self.head(self.two(h))
            return out

    model = Detached()
    gm = lorafx.apply(model, LoraSpec(r=2), (X,))
    assert [s.name for s in lorafx.sites(gm)] == ["one", "two"]
    assert torch.equal(gm(X), model(X))
    randomize(gm)
    gm(X).sum().backward()
    with_gradient = {n for n, p in gm.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert with_gradient == {"two.lora_A.default", "two.lora_B.default"}
    assert_close("model", lorafx.merge(gm)(X), gm(X))


def test_conv1d_is_transposed_and_back(zoo: Zoo) -> None:
    family = FAMILIES["gpt2"]
    gm = zoo.adapted(family, LoraSpec(r=3, target_modules=["c_attn"]))
    randomize(gm)
    first = lorafx.sites(gm)[0]
    assert first.transposed
    assert gm.get_parameter(first.weight).shape == (first.in_features, first.out_features) == (36, 108)
    assert gm.get_parameter(first.parameter_name("lora_A")).shape == (3, 36)
    assert gm.get_parameter(first.parameter_name("lora_B")).shape == (108, 3)
    merged = lorafx.merge(gm).get_parameter(first.weight)
    a, b = (p.detach().double() for p in first.parameters(gm).values())
    exact = gm.get_parameter(first.weight).double() + first.scaling * (b @ a).T
    assert merged.is_contiguous()
    assert torch.equal(merged, exact.float())


def test_routers_by_name(zoo: Zoo) -> None:
    gm = zoo.capture(FAMILIES["mixtral"]).gm
    wanted = {f"model.layers.{i}.mlp.gate" for i in (0, 1)}
    assert adapted(gm, target_modules=["gate"]) == wanted
    assert {c.name for c in candidates(gm) if not c.module and c.kind in LINEAR} == wanted
