"""Adapters merged within their graph, and taken out again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import lorafx
from conftest import same
from lorafx import AdapterError, LoraSpec, MatchError, MergeError, PassError
from lorafx.graph import CapturedModule
from lorafx.ir import format_graph
from several import IDS, SPECS, Model, build, through
from tolerances import assert_close


@pytest.fixture
def several() -> tuple[nn.Module, CapturedModule]:
    return build()


# merging in place


@pytest.mark.parametrize("names", [("default",), ("dora",), ("head",), ("bias",), ("vera", "small")], ids=str)
def test_merging_in_place_and_back_is_exact(several: tuple[nn.Module, CapturedModule], names: tuple[str, ...]) -> None:
    model, gm = several
    state = copy.deepcopy(model.state_dict())
    before, text = through(gm, *names), format_graph(gm)
    optimized = [id(p) for p in gm.parameters()]
    assert lorafx.merge(gm, inplace=True) is gm
    assert lorafx.sites(gm) == ()
    assert [a.name for a in lorafx.list_adapters(gm) if a.merged] == sorted(names, key=list(SPECS).index)
    assert_close("model", gm(IDS), before)
    copied = lorafx.merge(gm)
    assert torch.equal(copied(IDS), gm(IDS)), "what is merged in place is merged"
    assert same(dict(model.state_dict()), dict(state)), "the user's model shares the base"
    assert torch.equal(lorafx.unadapted(gm)(IDS), model(IDS))
    lorafx.unmerge(gm)
    assert torch.equal(gm(IDS), before)
    assert format_graph(gm) == text
    assert [id(p) for p in gm.parameters()] == optimized


def test_merging_some_leaves_the_others_active(several: tuple[nn.Module, CapturedModule]) -> None:
    _, gm = several
    alone = through(gm, "dora")
    before = through(gm, "default", "small", "vera")
    lorafx.merge(gm, "small", inplace=True)
    assert_close("model", gm(IDS), before)
    lorafx.merge(gm, ["default"], inplace=True)
    assert_close("model", gm(IDS), before)
    assert gm.meta["active"] == ("vera",)
    lorafx.unmerge(gm, "small")
    assert gm.meta["active"] == ("small", "vera")
    assert_close("model", gm(IDS), before)
    assert_close("model", lorafx.merge(gm)(IDS), before)
    assert_close("model", lorafx.merge(gm, ["dora"])(IDS), alone)


def test_merging_adapters_that_are_not_active(several: tuple[nn.Module, CapturedModule]) -> None:
    _, gm = several
    expected = through(gm, "dora", "small")
    before, text = through(gm, "vera"), format_graph(gm)
    merged = lorafx.merge(gm, ["dora", "small"])
    assert_close("model", merged(IDS), expected)
    assert format_graph(gm) == text
    assert torch.equal(gm(IDS), before)


def merge_a_merged_one(gm: CapturedModule) -> None:
    lorafx.merge(gm, "small", inplace=True)
    lorafx.merge(gm, "small", inplace=True)


def activate_a_merged_one(gm: CapturedModule) -> None:
    lorafx.merge(gm, "small", inplace=True)
    lorafx.set_adapter(gm, "small")


def delete_a_merged_one(gm: CapturedModule) -> None:
    lorafx.merge(gm, "small", inplace=True)
    lorafx.delete_adapter(gm, "small")


def rescale_what_is_merged(gm: CapturedModule) -> None:
    lorafx.merge(gm, "small", inplace=True)
    lorafx.set_adapter(gm, "dora")


def merge_what_is_broken(gm: CapturedModule) -> None:
    with torch.no_grad():
        gm.get_parameter("down.lora_A.small")[0, 0] = float("nan")
    lorafx.merge(gm, "small", inplace=True)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda gm: lorafx.set_adapter(gm, "vere"), AdapterError, "there is no adapter 'vere' (did you mean 'vera'"),
        (lambda gm: lorafx.set_adapter(gm, ["vera", "vera"]), AdapterError, "adapter 'vera' is named twice"),
        (lambda gm: lorafx.set_adapter(gm, []), AdapterError, "disable_adapters"),
        (lambda gm: lorafx.set_adapter(gm, None), AdapterError, "expected a list of adapters' names, got None"),
        (lambda gm: lorafx.add_adapter(gm, LoraSpec(), "dora"), AdapterError, "there is an adapter 'dora' already"),
        (lambda gm: lorafx.add_adapter(gm, LoraSpec(), "a.b"), AdapterError, "'a.b' cannot be an adapter's name"),
        (
            lambda gm: lorafx.add_adapter(gm, LoraSpec(), "in"),
            AdapterError,
            "'in' cannot be an adapter's name: it is a keyword",
        ),
        (
            lambda gm: lorafx.add_adapter(gm, LoraSpec(), "train"),
            AdapterError,
            "modules have an attribute of that name",
        ),
        (lambda gm: lorafx.rename_adapter(gm, "vera", "eval"), AdapterError, "have an attribute of that name"),
        (lambda gm: lorafx.add_adapter(gm, LoraSpec(target_modules=["q"]), "x"), MatchError, "no such layer"),
        (lambda gm: lorafx.delete_adapter(gm, "x"), AdapterError, "there is no adapter 'x'"),
        (lambda gm: lorafx.rename_adapter(gm, "vera", "dora"), AdapterError, "there is an adapter 'dora' already"),
        (lambda gm: lorafx.rename_adapter(gm, "x", "y"), AdapterError, "there is no adapter 'x'"),
        (lambda gm: lorafx.unmerge(gm), MergeError, "merged are: none"),
        (merge_a_merged_one, MergeError, "adapter 'small' is merged in place already"),
        (activate_a_merged_one, AdapterError, "adapter 'small' is merged into the weights already"),
        (delete_a_merged_one, AdapterError, "call unmerge(gm, 'small') first"),
        (rescale_what_is_merged, AdapterError, "adapter 'dora' rescales the rows of 'down.weight'"),
        (merge_what_is_broken, MergeError, "site 'down': lora_A holds NaN or Inf"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_say_what_and_change_nothing(
    several: tuple[nn.Module, CapturedModule], call: Any, error: type[Exception], message: str
) -> None:
    _, gm = several
    lorafx.set_adapter(gm, "default")
    before = gm(IDS)
    with pytest.raises(error) as caught:
        call(gm)
    assert type(caught.value) is error
    assert message in str(caught.value)
    if gm.meta.get("merged"):
        lorafx.unmerge(gm)
        lorafx.set_adapter(gm, "default")
    assert torch.equal(gm(IDS), before)


def test_without_adapters_means_without_merged_ones(several: tuple[nn.Module, CapturedModule]) -> None:
    model, gm = several
    lorafx.set_adapter(gm, ["default", "vera"])
    lorafx.merge(gm, "vera", inplace=True)
    before = gm(IDS)
    with lorafx.disable_adapters(gm) as bare:
        assert torch.equal(bare(IDS), model(IDS))
        for call in (
            lambda: lorafx.set_adapter(gm, "dora"),
            lambda: lorafx.rename_adapter(gm, "dora", "x"),
            lambda: lorafx.unmerge(gm),
            lambda: lorafx.add_adapter(gm, LoraSpec(), "x"),
        ):
            with pytest.raises(AdapterError, match="adapters are disabled"):
                call()
    assert torch.equal(gm(IDS), before)
    lorafx.unmerge(gm)
    assert set(gm.meta["active"]) == {"default", "vera"}


def test_unmerging_in_parts_is_exact_too(several: tuple[nn.Module, CapturedModule]) -> None:
    """The sums are those of before, whatever the order of activation is by then."""
    _, gm = several
    before, text = through(gm, "default", "small", "bias"), format_graph(gm)
    for merged in (("small",), ("bias", "default"), ("bias",)):
        for name in merged:
            lorafx.merge(gm, name, inplace=True)
        for name in merged:
            lorafx.unmerge(gm, name)
        assert format_graph(gm) == text
        assert torch.equal(gm(IDS), before)


def test_unmerging_activates_only_what_was_active(several: tuple[nn.Module, CapturedModule]) -> None:
    _, gm = several
    before = through(gm, "default")
    lorafx.merge(gm, "vera", inplace=True)
    lorafx.unmerge(gm)
    assert gm.meta["active"] == ("default",)
    assert torch.equal(gm(IDS), before)


def test_adding_beside_a_merged_adapter(several: tuple[nn.Module, CapturedModule]) -> None:
    """An adapter that cannot be active now may still be added; what is merged stays."""
    _, gm = several
    lorafx.set_adapter(gm, "head")
    lorafx.merge(gm, inplace=True)
    before = gm(IDS)
    lorafx.add_adapter(gm, LoraSpec(variant="dora", target_modules=["up"], modules_to_save=["head"]), "more")
    assert torch.equal(gm(IDS), before)
    with pytest.raises(AdapterError, match="'more' cannot be active together with what is merged in place"):
        lorafx.set_adapter(gm, "more")
    lorafx.unmerge(gm)
    lorafx.set_adapter(gm, "more")


def test_a_failed_add_leaves_nothing(several: tuple[nn.Module, CapturedModule]) -> None:
    _, gm = several
    before, names = through(gm, "vera"), list(gm.state_dict())
    with torch.no_grad():
        kept = gm.get_parameter("down.weight").clone()
        gm.get_parameter("down.weight").fill_(float("nan"))
    with pytest.raises((MergeError, torch.linalg.LinAlgError)):
        lorafx.add_adapter(gm, LoraSpec(r=2, init="pissa", target_modules=["up", "down"]), "new")
    with torch.no_grad():
        gm.get_parameter("down.weight").copy_(kept)
    assert list(gm.state_dict()) == names
    assert torch.equal(gm(IDS), before)


def test_a_base_that_was_overwritten_takes_no_new_adapter(several: tuple[nn.Module, CapturedModule]) -> None:
    model, gm = several
    lorafx.set_adapter(gm, "default")
    model.load_state_dict(lorafx.merged_state_dict(gm))
    with pytest.raises(MergeError, match="was overwritten after apply"):
        lorafx.add_adapter(gm, LoraSpec(r=2, target_modules=["up"]), "late")


def test_loading_values_while_merged_is_refused(several: tuple[nn.Module, CapturedModule]) -> None:
    _, gm = several
    state = copy.deepcopy(gm.state_dict())
    lorafx.merge(gm, "vera", inplace=True)
    with pytest.raises(PassError, match=r"vera is merged in place.*unmerge"):
        gm.load_state_dict(state, strict=False)
    gm.load_state_dict(copy.deepcopy(gm.state_dict()))


def test_what_was_merged_in_inference_mode_trains_afterwards(several: tuple[nn.Module, CapturedModule]) -> None:
    _, gm = several
    lorafx.set_adapter(gm, ["default", "vera"])
    with torch.inference_mode():
        lorafx.merge(gm, "vera", inplace=True)
    gm(IDS).sum().backward()
    assert gm.get_parameter("up.lora_B.default").grad is not None


def test_vera_sites_of_one_adapter_share_one_projection() -> None:
    specs = [
        LoraSpec(variant="vera", target_modules=[n], options={"projection_prng_key": k})
        for n, k in (("up", 1), ("down", 2))
    ]
    with pytest.raises(MatchError, match="share their projections, and these specs want different ones"):
        lorafx.apply(Model(), specs, (IDS,))
