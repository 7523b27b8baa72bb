"""Insert and merge over the zoo: nothing changes at first, training helps, and merging takes it all back exactly."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorafx
from conftest import Zoo, leaves, loss_of, randomize, same
from lorafx import LoraSpec, MergeError, PassError
from lorafx.graph import CapturedModule
from lorafx.ir import Stage, format_graph, stage, verify
from lorafx.passes.insert import Insert
from lorafx.passes.match import match
from small import X, small
from tolerances import assert_close
from zoo import FAMILIES, Family

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def outputs(model: nn.Module, family: Family, seed: int = 3, **extra: Tensor) -> Any:
    torch.manual_seed(seed)
    return model(**family.inputs(), **extra)


def base_values(gm: nn.Module) -> dict[str, Tensor]:
    return {n: t for n, t in gm.state_dict().items() if "lora_" not in n}


@modes
def test_outputs_are_the_captured_graphs_at_first(zoo: Zoo, family: Family, training: bool) -> None:
    """Bit for bit: with the same seed also in train mode, where the base draws its own dropout first."""
    adapted = zoo.adapted(family, LoraSpec(r=4)).train(training)
    captured = zoo.captured(family).train(training)
    assert same(outputs(adapted, family), outputs(captured, family))
    if not training:
        dropping = zoo.adapted(family, LoraSpec(r=4, dropout=0.5)).eval()
        assert same(outputs(dropping, family), outputs(captured, family))


def test_only_adapters_train_and_the_base_is_shared(zoo: Zoo, family: Family) -> None:
    model = zoo.capture(family).model
    gm = zoo.adapted(family, LoraSpec(r=4))
    sites = lorafx.sites(gm)
    adapters = {n for s in sites for n in s.parameter_names.values()}
    assert {n for n, p in gm.named_parameters() if p.requires_grad} == adapters
    assert {*gm.state_dict()} - {*model.state_dict()} == adapters
    assert list(base_values(gm)) == list(model.state_dict())
    for site in sites:
        assert site.parameter_names == {p: f"{site.path}.{p}.default" for p in ("lora_A", "lora_B")}
        values = site.parameters(gm)
        assert not values["lora_B"].any()
        assert values["lora_A"].abs().max() <= 1 / site.in_features**0.5
        assert values["lora_A"].std() > 0


def test_a_site_is_one_node(zoo: Zoo, family: Family) -> None:
    gm = zoo.adapted(family, LoraSpec(r=4, dropout=0.1))
    called = [n for n in gm.graph.nodes if getattr(n.target, "namespace", "") == "lorafx"]
    assert (
        len(called)
        == len(lorafx.sites(gm))
        == len(match(zoo.capture(family).gm, (LoraSpec(),)))
        - sum(c.site is None for c in match(zoo.capture(family).gm, (LoraSpec(),)))
    )
    # Besides its one node a site has its two parameters and the switch of its dropout; no call is added otherwise.
    before = [n for n in zoo.capture(family).gm.graph.nodes if n.op == "call_function"]
    after = [n for n in gm.graph.nodes if n.op == "call_function"]
    assert len(after) == len(before) + len(called)
    verify(gm, Stage.INSERTED)


def test_training_lowers_the_loss_and_leaves_the_base(zoo: Zoo, family: Family) -> None:
    gm, losses = zoo.trained(family)
    assert losses[-1] < losses[0], losses
    captured = zoo.capture(family).gm
    buffers = dict(captured.named_buffers())
    values = {n: t for n, t in base_values(gm).items() if n not in buffers}
    assert same(values, {n: t for n, t in captured.state_dict().items() if n not in buffers})
    for site in lorafx.sites(gm):
        assert bool(site.parameters(gm)["lora_B"].any()), f"{site.name} got no gradient"


def test_merged_outputs_equal_unmerged(zoo: Zoo, family: Family) -> None:
    gm = zoo.trained(family)[0]
    merged, captured = lorafx.merge(gm), zoo.captured(family)
    captured.load_state_dict(base_values(gm))  # BatchNorm's statistics moved on
    for inputs in (family.inputs(), family.other_inputs()):
        found, expected, base = (leaves(m(**inputs)) for m in (merged.eval(), gm, captured.eval()))
        for a, e in zip(found, expected, strict=True):
            assert_close("model", a, e)
        assert not all(map(torch.equal, expected, base)), "training changed nothing: the comparison is empty"
    if family.task != "plain":
        assert_close("model", loss_of(merged, family), loss_of(gm, family))


def test_merging_and_taking_away_give_the_captured_graph(zoo: Zoo, family: Family) -> None:
    gm, captured = zoo.trained(family)[0], zoo.capture(family).gm
    before = (format_graph(gm), gm.code, copy.deepcopy(gm.state_dict()))
    for result in (lorafx.merge(gm), lorafx.unadapted(gm)):
        assert stage(result) is Stage.MERGED
        assert format_graph(result) == format_graph(captured)
        assert result.code == captured.code
        assert list(result.state_dict()) == list(captured.state_dict())
        assert [n for n, _ in result.named_modules()] == [n for n, _ in captured.named_modules()]
        assert not any(p.requires_grad for p in result.parameters())
        assert result.signature == captured.signature
        ties = [
            [[n for n, p in held if p is q] for _, q in held]
            for held in (list(m.named_parameters(remove_duplicate=False)) for m in (result, captured))
        ]
        assert ties[0] == ties[1]
    assert (format_graph(gm), gm.code) == before[:2]
    assert same(gm.state_dict(), before[2])
    assert stage(gm) is Stage.INSERTED


def test_taking_away_gives_the_captured_outputs(zoo: Zoo, family: Family) -> None:
    gm = zoo.adapted(family, LoraSpec(r=4, bias="all"))
    randomize(gm)
    for training in (True, False):
        bare, captured = lorafx.unadapted(gm).train(training), zoo.captured(family).train(training)
        assert same(outputs(bare, family), outputs(captured, family))


@modes
def test_a_merged_graph_follows_the_mode(zoo: Zoo, family: Family, training: bool) -> None:
    """As the model with the merged weights does, base dropout and BatchNorm included."""
    gm = zoo.trained(family)[0]
    merged, model = copy.deepcopy(lorafx.merge(gm)).train(training), zoo.eager(family).train(training)
    model.load_state_dict(lorafx.merged_state_dict(gm))
    assert same(outputs(merged, family), outputs(model, family))
    assert same(merged.state_dict(), model.state_dict())


def test_merged_weights_load_into_the_users_module(zoo: Zoo, family: Family) -> None:
    gm = zoo.trained(family)[0]
    values = lorafx.merged_state_dict(gm)
    model = zoo.eager(family)
    assert list(values) == list(model.state_dict())
    model.load_state_dict(values, strict=True)
    for a, e in zip(leaves(model(**family.inputs())), leaves(gm(**family.inputs())), strict=True):
        assert_close("model", a, e)
    fresh = family.build()
    fresh.load_state_dict(values, strict=True)
    assert same(fresh.state_dict(), model.state_dict())


@HALF
@pytest.mark.parametrize("name", ["distilbert", "llama", "gpt2", "convnet"])
def test_half_precision_bases(name: str, dtype: torch.dtype) -> None:
    """float32 adapters on a half base: identical at first, trained, merged in float32 and rounded once."""
    family = FAMILIES[name]
    model = family.build().to(dtype)
    inputs = {n: t.to(dtype) if t.is_floating_point() else t for n, t in family.inputs().items()}
    captured = lorafx.api.captured(model, inputs, None).eval()
    specs = (LoraSpec(r=4, alpha=4),)
    gm = copy.deepcopy(captured)
    Insert(match(gm, specs), specs)(gm)
    assert same(gm(**inputs), captured(**inputs))
    trained = [p for p in gm.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    leaves(gm(**inputs))[0].float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trained)
    randomize(gm, 0.05)
    merged = lorafx.merge(gm).eval()
    assert {n: t.dtype for n, t in merged.state_dict().items()} == {
        n: t.dtype for n, t in captured.state_dict().items()
    }
    assert format_graph(merged) == format_graph(captured)
    for a, e in zip(leaves(merged(**inputs)), leaves(gm(**inputs)), strict=True):
        assert_close("model", a, e)
    for site in lorafx.sites(gm):
        a, b = (p.detach().double() for p in site.parameters(gm).values())
        weight = gm.get_parameter(site.weight).detach().double()
        exact = weight + site.scaling * ((b @ a).T if site.transposed else b @ a)
        once = exact.to(dtype)
        found = merged.get_parameter(site.weight)
        # Computed in float32 and then rounded: off by a unit only where float32 stood at a tie.
        assert (found != once).float().mean() < 2e-3
        assert bool(((found.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps + 1e-6).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_adapters_in_a_dtype_of_their_own(dtype: torch.dtype) -> None:
    model, x = small(), torch.randn(5, 7)
    gm = lorafx.apply(model, LoraSpec(r=2, adapter_dtype=dtype), (x,))
    assert {p.dtype for p in gm.parameters() if p.requires_grad} == {dtype}
    assert torch.equal(gm(x), model(x))
    randomize(gm)
    gm(x).sum().backward()
    assert {p.grad.dtype for p in gm.parameters() if p.requires_grad} == {dtype}
    merged = lorafx.merge(gm)
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    scale = float(gm(x).abs().max())
    assert float((merged(x) - gm(x)).abs().max()) <= 8 * torch.finfo(dtype).eps * scale + 1e-5


def test_a_seed_makes_the_same_adapter_and_leaves_the_global_state() -> None:
    def values(**fields: Any) -> list[Tensor]:
        gm = lorafx.apply(small(), LoraSpec(r=3), (X,), **fields)
        return [p for s in lorafx.sites(gm) for p in s.parameters(gm).values()]

    before = torch.get_rng_state()
    first = values(seed=1)
    torch.manual_seed(99)
    runs = [first, values(seed=1), values(generator=torch.Generator().manual_seed(1))]
    assert all(all(map(torch.equal, a, b)) for a, b in itertools.pairwise(runs))
    assert not torch.equal(first[0], values(seed=2)[0])
    torch.set_rng_state(before)
    lorafx.apply(small_model := small(), LoraSpec(r=3), (X,), seed=1)
    after_building = torch.get_rng_state()
    lorafx.apply(small_model, LoraSpec(r=3), (X,), seed=1)
    assert torch.equal(after_building, torch.get_rng_state())
    torch.manual_seed(5)
    globally = [values_of(small_model) for _ in (1,)]
    torch.manual_seed(5)
    assert all(map(torch.equal, globally[0], values_of(small_model)))
    with pytest.raises(ValueError, match="give seed or generator, not both"):
        values(seed=1, generator=torch.Generator())


def values_of(model: nn.Module) -> list[Tensor]:
    gm = lorafx.apply(model, LoraSpec(r=3), (X,))
    return [p for s in lorafx.sites(gm) for p in s.parameters(gm).values()]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("parameter", ["lora_A", "lora_B"])
def test_nan_and_inf_are_refused_by_site(bad: float, parameter: str) -> None:
    gm = lorafx.apply(small(), LoraSpec(r=3), (X,))
    site = lorafx.sites(gm)[1]
    before = format_graph(gm)
    with torch.no_grad():
        site.parameters(gm)[parameter][0, 0] = bad
    for call in (lorafx.merge, lorafx.merged_state_dict):
        with pytest.raises(MergeError, match=rf"site '2': {parameter} holds NaN or Inf, so it cannot be folded"):
            call(gm)
    assert format_graph(gm) == before
    assert torch.isfinite(lorafx.unadapted(gm)(X)).all()


def test_a_merged_weight_that_overflows_its_dtype_is_refused() -> None:
    gm = lorafx.apply(small().half(), LoraSpec(r=3), (X.half(),))
    with torch.no_grad():
        for parameter in lorafx.sites(gm)[0].parameters(gm).values():
            parameter.fill_(1e3)
    with pytest.raises(MergeError, match=r"site '0': the merged weight does not fit in torch.float16"):
        lorafx.merge(gm)


def test_stages_are_held_to() -> None:
    gm = lorafx.apply(small(), LoraSpec(r=3), (X,))
    merged = lorafx.merge(gm)
    for call in (lorafx.merge, lorafx.merged_state_dict, lorafx.unadapted):
        with pytest.raises(PassError, match=r"merge: needs a graph that is adapted, this one is merged"):
            call(merged)
        with pytest.raises(
            PassError, match=r"expected a graph made by lorafx.apply, got Sequential; call lorafx.apply"
        ):
            call(small())
    assert lorafx.sites(merged) == ()


def test_merging_is_a_snapshot() -> None:
    """Training the adapted graph further changes nothing of what was merged before."""
    model = nn.Sequential(nn.Linear(7, 9), nn.BatchNorm1d(9), nn.Linear(9, 9), nn.Linear(9, 3))
    gm = lorafx.apply(model, LoraSpec(r=3, modules_to_save=["3"], bias="lora_only"), (X,))
    randomize(gm)
    merged, values, bare = lorafx.merge(gm).eval(), lorafx.merged_state_dict(gm), lorafx.unadapted(gm).eval()
    kept, first, base = copy.deepcopy(values), merged(X), bare(X)
    randomize(gm)
    gm.train()(X)
    assert torch.equal(merged(X), first)
    assert torch.equal(bare(X), base)
    assert same(values, kept)


def test_a_merged_graph_can_be_changed_without_the_adapted_one() -> None:
    gm = lorafx.apply(small(), LoraSpec(r=3, modules_to_save=["4"]), (X,))
    randomize(gm)
    before = gm(X)
    merged = lorafx.merge(gm)
    merged.load_state_dict({n: t + 1 for n, t in merged.state_dict().items()})
    assert torch.equal(gm(X), before)


# Copies of adapted graphs, and dropout of the adapters.


def test_adapted_copies_are_the_same(zoo: Zoo) -> None:
    family = FAMILIES["gpt2"]
    gm = zoo.adapted(family, LoraSpec(r=2, dropout=0.2, modules_to_save=["ln_f"]))
    randomize(gm)
    twin = copy.deepcopy(gm)
    assert lorafx.sites(twin) == lorafx.sites(gm)
    assert {n for n, p in twin.named_parameters() if p.requires_grad} == {
        n for n, p in gm.named_parameters() if p.requires_grad
    }
    for training in (True, False):
        assert same(outputs(twin.train(training), family), outputs(gm.train(training), family))
    values = copy.deepcopy(gm.state_dict())
    randomize(twin)
    assert same(gm.state_dict(), values)
    for call in (lorafx.merge, lorafx.unadapted):
        assert format_graph(call(twin)) == format_graph(zoo.capture(family).gm)
    assert same(outputs(lorafx.unadapted(twin).eval(), family), outputs(zoo.captured(family).eval(), family))


def test_adapter_dropout_follows_the_mode_of_its_layer() -> None:
    gm = lorafx.apply(small(), LoraSpec(r=3, dropout=0.5), (X,))
    randomize(gm)
    gm.eval()
    quiet = gm(X)
    assert torch.equal(quiet, gm(X))
    gm.train()
    assert not torch.equal(gm(X), gm(X))
    for name in ("0", "2"):
        gm.get_submodule(name).eval()
    assert torch.equal(gm(X), quiet)


def test_loading_adapters_writes_in_place(zoo: Zoo) -> None:
    """An optimizer that holds the adapter's tensors goes on working after load_state_dict."""
    gm = lorafx.apply(small(), LoraSpec(r=3), (X,))
    held = {n: p for n, p in gm.named_parameters() if p.requires_grad}
    values = copy.deepcopy(gm.state_dict())
    randomize(gm)
    gm.load_state_dict(values)
    assert all(gm.get_parameter(n) is p for n, p in held.items())
    assert same(dict(gm.state_dict()), dict(values))


def as_graph(gm: Any) -> CapturedModule:
    assert isinstance(gm, CapturedModule)
    return gm


def test_everything_is_a_graph_module() -> None:
    gm = lorafx.apply(small(), LoraSpec(r=3), (X,))
    for result in (gm, lorafx.merge(gm), lorafx.unadapted(gm)):
        assert isinstance(as_graph(result), torch.fx.GraphModule)


def two_layers() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), torch.ones(2, 6)


def test_merged_weights_loaded_into_the_shared_model_are_not_adapted_again() -> None:
    """The model shares its weights with the graph: after loading, the graph would apply its adapter on top."""
    model, x = two_layers()
    gm = lorafx.apply(model, LoraSpec(r=2), (x,))
    randomize(gm)
    gm.eval()
    original = copy.deepcopy(model.state_dict())
    merged = merged_state_dict_of(gm)
    model.load_state_dict(merged)
    for stale in (gm, copy.deepcopy(gm)):
        with pytest.raises(MergeError, match=r"site '0': '0\.weight' was overwritten after apply.*into a copy"):
            lorafx.merge(stale)
    model.load_state_dict(original)
    assert_close("layer", lorafx.merge(gm)(x), gm(x))

    gm.load_state_dict({**gm.state_dict(), "0.weight": torch.ones(5, 6)})  # another base of the graph's own is meant
    assert_close("layer", lorafx.merge(gm)(x), gm(x))
    assert torch.equal(model.get_parameter("0.weight"), original["0.weight"])


def merged_state_dict_of(gm: CapturedModule) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in lorafx.merged_state_dict(gm).items()}


@pytest.mark.parametrize("of", [lambda gm: gm, lorafx.merge, lorafx.unadapted], ids=["adapted", "merged", "unadapted"])
def test_a_graph_is_not_adapted_again(of: Any) -> None:
    model, x = two_layers()
    with pytest.raises(
        lorafx.CaptureError, match=r"a graph of lorafx's already \((adapted|merged)\); apply the spec to"
    ):
        lorafx.apply(of(lorafx.apply(model, LoraSpec(r=2), (x,))), LoraSpec(r=2), (x,))


def test_adapters_made_in_inference_mode_train() -> None:
    model, x = two_layers()
    with torch.inference_mode():
        gm = lorafx.apply(model, LoraSpec(r=2), (x,))
    gm(x).sum().backward()
    assert all(p.grad is not None for p in gm.parameters() if p.requires_grad)
