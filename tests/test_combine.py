"""Combining adapters: what each method makes of the true changes, against the formulas and against PEFT."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils
from torch import Tensor, nn

import kinds
import lorafx
from conftest import same
from lorafx import AdapterError, LoraSpec, SpecError, combine_adapters
from lorafx.api import captured
from lorafx.arithmetic.low_rank import Cut, factor, relative_error
from lorafx.arithmetic.methods import METHODS, Thinning, drop_and_rescale, merge
from lorafx.graph import CapturedModule
from lorafx.ir import adapters, format_graph
from tolerances import assert_close, error

pytestmark = pytest.mark.xdist_group("combine")

EVERYWHERE = ["embed", "conv", "attn.q", "attn.out_proj", "up", "down"]

#: Different variants, ranks, scalings and sites.
SPECS: dict[str, LoraSpec] = {
    "lora": LoraSpec(r=2, alpha=3, target_modules=EVERYWHERE, target_parameters=["stack"]),
    "rslora": LoraSpec(r=3, alpha=5, rslora=True, target_modules=["up", "conv", "attn.k"], rank_pattern={"conv": 4}),
    "experts": LoraSpec(r=1, alpha=2, target_modules=[], target_parameters=["stack"]),
    "vera": LoraSpec(r=4, alpha=6, variant="vera", target_modules=["down", "up"]),
    "adalora": LoraSpec(r=3, variant="adalora", target_modules=["up", "embed"]),
    "bias": LoraSpec(r=2, variant="lora_bias", target_modules=["up", "down"]),
    "dora": LoraSpec(r=2, variant="dora", target_modules=["up", "conv"]),
    "tokens": LoraSpec(r=2, target_modules=["up"], trainable_token_indices={"embed": [1, 5]}),
    "more tokens": LoraSpec(r=2, target_modules=["down"], trainable_token_indices={"embed": [5, 7]}),
    "attention": LoraSpec(r=2, target_modules=["attn"]),
    "head": LoraSpec(r=2, target_modules=["up"], modules_to_save=["head"], bias="lora_only"),
    "other head": LoraSpec(r=2, target_modules=["down"], modules_to_save=["head"]),
}
FACTORED = ["lora", "rslora", "experts", "vera", "adalora", "bias", "tokens", "head"]


def name_of(key: str) -> str:
    return key.replace(" ", "_")


@cache
def base(dtype: torch.dtype) -> CapturedModule:
    """The graph without adapters. Shared: copied before it is changed."""
    return captured(kinds.build(dtype), kinds.inputs(dtype), None)


def adapted(*keys: str, dtype: torch.dtype = torch.float64) -> CapturedModule:
    gm = copy.deepcopy(base(dtype))
    for key in keys:
        lorafx.add_adapter(gm, SPECS[key], name_of(key), seed=1)
    return kinds.fill(gm)


@cache
def everything(dtype: torch.dtype = torch.float64) -> CapturedModule:
    """All of them on one graph. What tests add is taken away again."""
    return adapted(*SPECS, dtype=dtype)


@pytest.fixture
def several() -> Iterator[CapturedModule]:
    """:func:`everything`, of which nothing may be left over."""
    gm = everything()
    yield gm
    for name in set(adapters(gm)) - {name_of(key) for key in SPECS}:
        lorafx.delete_adapter(gm, name)


def through(gm: CapturedModule, name: str) -> Tensor:
    lorafx.set_adapter(gm, name)
    dtype = next(gm.parameters()).dtype
    result: Tensor = gm(*kinds.inputs(dtype)).detach()
    return result


Changes = dict[str, Tensor]


def combined(gm: CapturedModule, names: list[str], weights: list[float], method: str, **options: Any) -> Changes:
    """The changes that the combined adapter makes; the graph is as before."""
    combine_adapters(gm, names, weights, method, "into", **options)
    found = kinds.deltas(gm, "into")
    lorafx.delete_adapter(gm, "into")
    return found


def weighted_sum(gm: CapturedModule, names: list[str], weights: list[float]) -> Changes:
    wanted: Changes = {}
    for name, weight in zip(names, weights, strict=True):
        for tensor, change in kinds.deltas(gm, name).items():
            wanted[tensor] = wanted.get(tensor, torch.zeros_like(change)) + weight * change
    return wanted


def assert_changes(found: Changes, wanted: Changes) -> None:
    assert found.keys() == wanted.keys()
    for name, change in wanted.items():
        assert_close("layer", found[name], change)


def assert_equal_numbers(found: float, wanted: float) -> None:
    assert_close("layer", torch.tensor(found, dtype=torch.float64), torch.tensor(wanted, dtype=torch.float64))


# The laws


@pytest.mark.parametrize("method", ["cat", "linear"])
@pytest.mark.parametrize("key", FACTORED)
def test_one_adapter_with_weight_one_is_that_adapter_bit_for_bit(key: str, method: str) -> None:
    gm = everything(torch.float32)
    combine_adapters(gm, [key], [1.0], method, "into")
    assert torch.equal(through(gm, "into"), through(gm, key))
    lorafx.delete_adapter(gm, "into")


@pytest.mark.parametrize("method", ["cat", "linear", "svd"])
def test_the_exact_methods_are_the_weighted_sum_of_the_changes(several: CapturedModule, method: str) -> None:
    names = ["lora", "rslora", "vera", "adalora", "bias", "experts"]
    weights = [0.7, -0.3, 1.4, 2.0, -1.0, 0.5]
    assert_changes(combined(several, names, weights, method), weighted_sum(several, names, weights))


@pytest.mark.parametrize("names", [["dora"], ["dora", "rslora", "bias"]])
def test_svd_takes_variants_without_factors(several: CapturedModule, names: list[str]) -> None:
    weights = [0.5, -2.0, 1.0][: len(names)]
    wanted = weighted_sum(several, names, weights)
    assert_changes(combined(several, names, weights, "svd", rank=99), wanted)


@given(
    st.dictionaries(
        st.sampled_from(["lora", "rslora", "vera", "adalora", "bias"]),
        st.floats(-3, 3).filter(lambda w: abs(w) > 0.1),
        min_size=1,
    ),
    st.sampled_from(["cat", "linear", "svd"]),
)
@settings(max_examples=15, deadline=None)
def test_any_adapters_with_any_weights(weights: dict[str, float], method: str) -> None:
    gm = everything()
    wanted = weighted_sum(gm, list(weights), list(weights.values()))
    assert_changes(combined(gm, list(weights), list(weights.values()), method), wanted)


def test_ranks_add_up_and_a_shared_a_is_counted_once(several: CapturedModule) -> None:
    report = combine_adapters(several, ["lora", "rslora", "adalora"], [1, 1, 1], "cat", "into")
    ranks = {s.site: s.rank for s in report.sites}
    assert ranks == {
        "embed": 5, "conv": 6, "attn.q": 2, "attn.out_proj": 2, "up": 8, "down": 2, "experts.stack": 2, "attn.k": 3,
    }  # fmt: skip

    gm = adapted("lora")
    combine_adapters(gm, ["lora"], [1.0], "cat", "twin")
    assert {s.rank for s in combine_adapters(gm, ["lora", "twin"], [0.5, 0.5], "linear", "mean").sites} == {2}
    assert {s.rank for s in combine_adapters(gm, ["lora", "twin"], [0.5, 0.5], "cat", "wide").sites} == {4}
    lora, mean, wide = (through(gm, n) for n in ("lora", "mean", "wide"))
    assert_close("layer", mean, lora)
    assert_close("layer", wide, lora)


def test_rows_of_embeddings_are_combined_as_rows(several: CapturedModule) -> None:
    names, weights = ["tokens", "more_tokens"], [0.5, -2.0]
    wanted = weighted_sum(several, names, weights)
    assert_changes(combined(several, names, weights, "cat"), wanted)
    combine_adapters(several, names, weights, "svd", "into")
    rows = next(s for s in adapters(several)["into"].sites if s.variant == "tokens")
    assert rows.rows == (1, 5, 7)


# What is kept, and what the report says


@pytest.mark.parametrize("names", [["lora", "rslora"], ["dora", "lora"]])
def test_a_lower_rank_is_the_nearest_one_and_its_error_is_stated(several: CapturedModule, names: list[str]) -> None:
    report = combine_adapters(several, names, [1.0, -0.5], "svd", "into", rank=2)
    wanted, found = weighted_sum(several, names, [1.0, -0.5]), kinds.deltas(several, "into")
    for site in adapters(several)["into"].sites:
        if site.kind in ("linear", "embedding", "conv2d"):
            said = next(s for s in report.sites if s.site == site.name)
            matrix = site.matrix(wanted[site.weight])
            values = torch.linalg.svdvals(matrix)
            assert said.rank == 2
            assert_equal_numbers(said.norm, float(values.norm()))
            assert_equal_numbers(1 + said.error, 1 + float(values[2:].norm() / values.norm()))
            left = float((matrix - site.matrix(found[site.weight])).norm() / matrix.norm())
            assert_equal_numbers(1 + said.error, 1 + left)
    assert "relative error" in str(report)
    assert report.error > 0.01


@pytest.mark.parametrize("energy", [0.5, 0.9, 1])
def test_energy_is_held_by_the_fewest_ranks(several: CapturedModule, energy: float) -> None:
    report = combine_adapters(several, ["lora", "rslora"], [1.0, 1.0], "svd", "into", energy=energy)
    wanted = weighted_sum(several, ["lora", "rslora"], [1.0, 1.0])
    for site in adapters(several)["into"].sites:
        if site.rows is None:
            squares = torch.linalg.svdvals(site.matrix(wanted[site.weight])).square().reshape(-1, min(site.shape[-2:]))
            share = squares.sum(0).cumsum(0) / squares.sum()
            assert site.r == 1 or float(share[site.r - 2]) < energy
            assert energy == 1 or float(share[site.r - 1]) >= energy
    assert {s.site: s.rank for s in report.sites} == {s.name: s.r for s in adapters(several)["into"].sites}
    assert report.error <= math.sqrt(1 - energy) or energy == 1


@pytest.mark.parametrize("shape", [(60, 50), (3, 40, 60)], ids=str)
def test_a_randomized_svd_is_near_the_exact_one(shape: tuple[int, ...]) -> None:
    (matrix,) = changes_of(shape, 1)
    exact = relative_error(factor(matrix, Cut(rank=3)), matrix)
    fast = relative_error(factor(matrix, Cut(rank=3, niter=4, generator=torch.Generator().manual_seed(0))), matrix)
    assert exact < fast < 1.01 * exact


def test_the_result_is_a_plain_adapter_that_is_not_active() -> None:
    gm = adapted("lora", "rslora", "vera")
    lorafx.set_adapter(gm, "rslora")
    gm.recompile()
    before, text, training = (
        gm(*kinds.inputs()),
        format_graph(gm),
        {n for n, p in gm.named_parameters() if p.requires_grad},
    )
    state = copy.deepcopy(gm.state_dict())
    combine_adapters(gm, ["lora", "vera"], [1.0, 2.0], "svd", "into", rank=2)
    assert torch.equal(gm(*kinds.inputs()), before)
    assert format_graph(gm) == text
    assert {n for n, p in gm.named_parameters() if p.requires_grad} == training
    assert same(dict(state), {n: t for n, t in gm.state_dict().items() if n in state})
    for site in adapters(gm)["into"].sites:
        assert (site.variant, site.scaling, site.alpha) == ("lora", 1.0, site.r)
    lorafx.set_adapter(gm, "into")
    gm(*kinds.inputs()).square().sum().backward()
    trained = {n for n, p in gm.named_parameters() if p.grad is not None}
    assert trained == set(adapters(gm)["into"].parameter_names)


def test_its_specs_mean_its_sites() -> None:
    """So that it can be saved and made anew: applied, they give the same sites, ranks and scalings."""
    gm = adapted("lora", "rslora", "adalora")
    combine_adapters(gm, ["lora", "rslora", "adalora"], [1.0, 2.0, 3.0], "cat", "into")
    into = adapters(gm)["into"]
    again = copy.deepcopy(base(torch.float64))
    lorafx.add_adapter(again, into.specs, "again")
    found = {(s.name, s.layer, s.rows, s.r, s.scaling) for s in adapters(again)["again"].sites}
    assert found == {(s.name, s.layer, s.rows, s.r, s.scaling) for s in into.sites}


def test_adapters_that_are_merged_in_place_are_combined_as_they_are() -> None:
    gm = adapted("lora", "dora")
    wanted = weighted_sum(gm, ["lora", "dora"], [1.0, 0.5])
    lorafx.merge(gm, "lora", inplace=True)
    combine_adapters(gm, ["lora", "dora"], [1.0, 0.5], "svd", "into", rank=99)
    lorafx.unmerge(gm)
    assert_changes(kinds.deltas(gm, "into"), wanted)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_that_took_from_the_weight_counts_from_the_original(init: str) -> None:
    gm = copy.deepcopy(base(torch.float64))
    lorafx.add_adapter(gm, LoraSpec(r=2, init=init, target_modules=["up", "conv"]), "default")
    with torch.no_grad():
        for site in adapters(gm)["default"].sites:
            for parameter in site.parameters(gm).values():
                parameter += 0.1 * torch.randn_like(parameter)
    report = combine_adapters(gm, ["default"], [1.0], "linear", "into")
    assert {s.rank for s in report.sites} == {4}
    assert_close("model", through(gm, "into"), through(gm, "default"))


# Heads


def test_heads_go_along_and_must_agree(several: CapturedModule) -> None:
    combine_adapters(several, ["head", "lora"], [1.0, 0.5], "cat", "into")
    into = adapters(several)["into"]
    assert {"head.weight", "head.bias", "up.bias", "down.bias"} <= set(into.trained)
    own = several.state_dict()
    assert torch.equal(own[into.own_name("head.weight")], own[adapters(several)["head"].own_name("head.weight")])
    assert torch.equal(own[into.own_name("down.bias")], own["down.bias"]), "what nobody trained is the base's"
    lorafx.delete_adapter(several, "into")

    with pytest.raises(AdapterError, match=r"'head' and 'other_head' each have their own 'head\.weight'.*heads='head'"):
        combine_adapters(several, ["head", "other_head"], [1.0, 1.0], "cat", "into")
    combine_adapters(several, ["head", "other_head"], [1.0, 1.0], "cat", "into", heads="other_head")
    into, chosen = adapters(several)["into"], adapters(several)["other_head"]
    own = several.state_dict()
    assert into.trained == chosen.trained
    assert torch.equal(own[into.own_name("head.weight")], own[chosen.own_name("head.weight")])


# Methods that work on elements


def changes_of(shape: tuple[int, ...], count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("majority_sign", ["total", "frequency"])
@pytest.mark.parametrize("method", ["ties", "magnitude_prune"])
def test_elements_are_combined_as_pefts_functions_do(method: str, majority_sign: str) -> None:
    changes, weights = changes_of((3, 7, 5), 4), [1.0, -0.5, 2.0, 0.3]
    arguments = (changes, torch.tensor(weights, dtype=torch.float64), 0.4)
    wanted = getattr(merge_utils, method)(*arguments, *([majority_sign] if method == "ties" else []))
    found = merge(METHODS[method], changes, weights, Thinning(0.4, majority_sign))
    assert_close("layer", found, wanted)


def test_ties_by_hand() -> None:
    """arXiv 2306.01708, figure 1, in four elements: trimmed, elected, and averaged over those that agree."""
    a = torch.tensor([4.0, -3.0, 0.1, 2.0])
    b = torch.tensor([2.0, 5.0, -0.2, 0.3])
    c = torch.tensor([-1.0, 4.0, 3.0, -0.1])
    found = merge(METHODS["ties"], [a, b, c], [1.0, 1.0, 1.0], Thinning(0.5))
    assert torch.equal(found, torch.tensor([3.0, 4.5, 3.0, 0.0]))


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_keeps_the_share_and_the_mean(method: str) -> None:
    change = torch.ones(200, 200, dtype=torch.float64)
    thinned = drop_and_rescale(change, 0.3, torch.Generator().manual_seed(0))
    assert set(thinned.unique().tolist()) == {0.0, 1 / 0.3}
    assert float(thinned.mean()) == pytest.approx(1.0, abs=0.03)
    both = merge(METHODS[method], [change], [2.0], Thinning(0.3, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(both, 2.0 * thinned)


@pytest.mark.parametrize("suffix", ["", "_svd"])
@pytest.mark.parametrize("method", ["ties", "magnitude_prune", "dare_linear", "dare_ties"])
def test_elementwise_methods_act_on_the_true_change(several: CapturedModule, method: str, suffix: str) -> None:
    """At full rank the result is the formula's, of what merging each of them changes."""
    names, weights = ["lora", "rslora", "dora"], [1.0, 0.5, -0.3]
    thinning = {"density": 0.6, "seed": 4}
    found = combined(several, names, weights, method + suffix, rank=99, **thinning)
    alone = [kinds.deltas(several, name) for name in names]
    generator = torch.Generator().manual_seed(4)
    combine_adapters(several, names, weights, method, "order", **thinning)
    order = [s.name for s in adapters(several)["order"].sites]
    places = {s.name: s for s in adapters(several)["order"].sites}
    lorafx.delete_adapter(several, "order")
    for name in order:  # dare draws for one site after the other
        site = places[name]
        there = [
            (site.matrix(change[site.weight]), weight)
            for key, change, weight in zip(names, alone, weights, strict=True)
            if any(s.name == name for s in adapters(several)[key].sites)
        ]
        wanted = merge(METHODS[method], [c for c, _ in there], [w for _, w in there], Thinning(0.6, "total", generator))
        assert_close("model", site.matrix(found[site.weight]), wanted)


def test_a_seed_makes_dare_reproducible(several: CapturedModule) -> None:
    first, again, other = (
        combined(several, ["lora", "rslora"], [1.0, 1.0], "dare_linear", density=0.5, rank=99, seed=seed)
        for seed in (1, 1, 2)
    )
    assert same(first, again)
    assert not torch.equal(first["up.weight"], other["up.weight"])


# Against PEFT


def peft_model(**fields: Any) -> peft.PeftModel:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(17, 19), nn.Tanh(), nn.Linear(19, 18))
    theirs = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0", "2"], **fields), adapter_name="one")
    theirs.add_adapter("two", peft.LoraConfig(target_modules=["0"], **fields))
    for name, parameter in theirs.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return theirs.eval()


def ours_of(theirs: peft.PeftModel, tmp_path: Any) -> CapturedModule:
    """Our graph with PEFT's adapters, as it saved them."""
    theirs.save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(17, 19), nn.Tanh(), nn.Linear(19, 18))
    gm = lorafx.apply(model, tmp_path / "one", (torch.zeros(2, 17),)).eval()
    lorafx.rename_adapter(gm, "default", "one")
    lorafx.add_adapter(gm, tmp_path / "two", "two")
    for name in ("one", "two"):
        lorafx.load_adapter(gm, tmp_path / name, name)
    return gm


@pytest.mark.parametrize("alpha", [4, 8])
@pytest.mark.parametrize("method", ["cat", "svd", "ties_svd", "magnitude_prune_svd"])
def test_the_result_is_pefts_where_peft_is_right(method: str, alpha: int, tmp_path: Any) -> None:
    """PEFT 0.21.2 is right in these, at alpha = r and elsewhere."""
    theirs = peft_model(r=4, lora_alpha=alpha)
    gm, x = ours_of(theirs, tmp_path), torch.randn(6, 17)
    density = {"density": 0.5} if METHODS[method].sparsify else {}
    rank = {} if method == "cat" else {"rank": 5}
    theirs.base_model.add_weighted_adapter(
        ["one", "two"], [0.7, -0.3], "into", method, **density, **{f"svd_{k}": v for k, v in rank.items()}
    )
    theirs.set_adapter("into")
    combine_adapters(gm, ["one", "two"], [0.7, -0.3], method, "into", **density, **rank)
    lorafx.set_adapter(gm, "into")
    assert_close("peft", gm(x), theirs(x))


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("linear", {"lora_alpha": 8}),  # sqrt(w) on A and on B: the product has cross terms
        ("cat", {"lora_alpha": 8, "use_rslora": True}),  # alpha = r, which rsLoRA scales by sqrt(r)
        ("svd", {"lora_alpha": 8, "use_rslora": True}),
        ("svd", {"lora_alpha": 8, "use_dora": True}),  # the magnitudes are lost
    ],
)
def test_ours_is_the_weighted_sum_where_pefts_is_not(method: str, fields: dict[str, Any], tmp_path: Any) -> None:
    """The mathematics: merged by PEFT itself, one by one, the changes add up to ours, and not to PEFT's own result."""
    theirs = peft_model(r=4, **fields)
    gm = ours_of(theirs, tmp_path)
    layer = theirs.base_model.model[0]
    base = layer.base_layer.weight.detach().clone()

    def merged(name: str) -> Tensor:
        alone = copy.deepcopy(theirs)
        alone.set_adapter(name)
        weight: Tensor = alone.merge_and_unload()[0].weight.detach()
        return weight - base

    wanted = 0.7 * merged("one") - 0.3 * merged("two")
    theirs.base_model.add_weighted_adapter(["one", "two"], [0.7, -0.3], "into", method, svd_rank=17)
    assert error(merged("into"), wanted) > 0.1
    rank = {} if method == "linear" or method == "cat" else {"rank": 17}
    combine_adapters(gm, ["one", "two"], [0.7, -0.3], method, "into", **rank)
    assert_close("layer", lorafx.merge(gm, "into").state_dict()["0.weight"] - base, wanted)


def test_peft_loads_what_was_combined(tmp_path: Any) -> None:
    theirs = peft_model(r=4, lora_alpha=8)
    gm, x = ours_of(theirs, tmp_path), torch.randn(6, 17)
    combine_adapters(gm, ["one", "two"], [0.7, -0.3], "cat", "into")
    lorafx.save_adapter(gm, tmp_path / "into", "into")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(17, 19), nn.Tanh(), nn.Linear(19, 18))
    loaded = peft.PeftModel.from_pretrained(model, str(tmp_path / "into")).eval()
    lorafx.set_adapter(gm, "into")
    assert_close("peft", gm(x), loaded(x))


# What is refused


def call(**changed: Any) -> Callable[[CapturedModule], object]:
    arguments: dict[str, Any] = {"names": ["lora", "rslora"], "weights": [1.0, 1.0], "method": "cat", "into": "into"}
    return lambda gm: combine_adapters(gm, **{**arguments, **changed})


@pytest.mark.parametrize(
    ("refused", "kind", "message"),
    [
        (call(names=["lora", "rs"]), AdapterError, r"there is no adapter 'rs'"),
        (call(names=["lora", "lora"]), AdapterError, r"adapter 'lora' is named twice.*sum of its weights"),
        (call(names="lora"), AdapterError, r"takes a list of names"),
        (call(names=[], weights=[]), AdapterError, r"takes a list of names"),
        (call(weights=1.0), AdapterError, r"takes a list of names and a list of weights, not 1\.0"),
        (call(weights=[1.0]), AdapterError, r"2 adapters and 1 weights"),
        (call(weights=[1.0, float("nan")]), SpecError, r"weights=nan is not allowed"),
        (call(into="vera"), AdapterError, r"there is an adapter 'vera' already"),
        (call(into="a.b"), AdapterError, r"cannot be an adapter's name"),
        (call(method="tie"), SpecError, r"method='tie' is not allowed.*did you mean 'ties'"),
        (call(method="ties"), SpecError, r"density=None is not allowed: ties needs a density"),
        (call(method="ties", density=0.0), SpecError, r"density=0\.0 is not allowed"),
        (call(method="ties", density=1.5), SpecError, r"density=1\.5 is not allowed"),
        (call(density=0.5), SpecError, r"cat has no density"),
        (call(method="ties", density=0.5, majority_sign="sum"), SpecError, r"majority_sign='sum'"),
        (call(rank=3), SpecError, r"method='cat' is not allowed: it keeps .* method='svd' does"),
        (call(method="svd", rank=0), SpecError, r"rank=0 is not allowed"),
        (call(method="svd", energy=2.0), SpecError, r"energy=2\.0 is not allowed"),
        (call(method="svd", energy=0.5, niter=2), SpecError, r"niter=2 is not allowed.*give rank"),
        (call(heads="vera"), AdapterError, r"heads='vera' is none of the adapters that are combined: lora, rslora"),
        (call(names=["lora", "dora"]), AdapterError, r"adapter 'dora', site 'up': dora rescales.*method='svd'"),
        (call(names=["attention", "rslora"]), AdapterError, r"unequal shapes.*'attn' \(linear, 24 x 8\).*'attn\.k'"),
        (call(names=["lora", "tokens"]), AdapterError, r"unequal shapes.*'embed\.weight' is adapted by 'lora'"),
    ],
)  # fmt: skip
def test_refused_before_anything_is_changed(
    several: CapturedModule, refused: Callable[[CapturedModule], object], kind: type[Exception], message: str
) -> None:
    before, text = dict(several.meta), format_graph(several)
    names = list(several.state_dict())
    with pytest.raises(kind, match=message):
        refused(several)
    assert several.meta == before
    assert format_graph(several) == text
    assert list(several.state_dict()) == names


def test_nan_is_named() -> None:
    gm = adapted("lora", "rslora")
    with torch.no_grad():
        gm.get_parameter("up.lora_A.rslora")[0, 0] = float("nan")
    with pytest.raises(AdapterError, match=r"adapter 'rslora', site 'up': lora_A holds NaN or Inf"):
        combine_adapters(gm, ["lora", "rslora"], [1.0, 1.0], "svd", "into")
    assert list(adapters(gm)) == ["lora", "rslora"]


def test_a_graph_without_adapters_is_refused() -> None:
    gm = lorafx.unadapted(adapted("lora"))
    with pytest.raises(AdapterError, match="has no adapters"):
        combine_adapters(gm, ["lora"], [1.0], "cat", "into")
