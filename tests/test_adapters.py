"""The life of adapters on one graph: adding, switching, summing, renaming, and taking away."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorafx
from conftest import Zoo, leaves, same
from lorafx import AdapterError, LoraSpec, PassError
from lorafx.demo.model import load_model
from lorafx.graph import CapturedModule
from lorafx.ir import Stage, adapters, format_graph, stage
from several import IDS, SPECS, Model, build, filled, through
from tolerances import assert_close
from zoo import Family


@pytest.fixture
def several() -> tuple[nn.Module, CapturedModule]:
    return build()


# switching


def test_an_adapter_that_is_added_changes_nothing() -> None:
    model = Model().eval()
    gm = lorafx.apply(model, SPECS["default"], (IDS,), seed=0).eval()
    filled(gm)
    text, before, state = format_graph(gm), gm(IDS), copy.deepcopy(gm.state_dict())
    training = {n for n, p in gm.named_parameters() if p.requires_grad}
    lorafx.add_adapter(gm, SPECS["vera"], "vera")
    assert format_graph(gm) == text
    assert torch.equal(gm(IDS), before)
    assert {n for n, p in gm.named_parameters() if p.requires_grad} == training
    assert same(dict(state), {n: t for n, t in gm.state_dict().items() if n in state})
    lorafx.set_adapter(gm, "vera")
    assert torch.equal(gm(IDS), model(IDS)), "a new adapter starts as nothing"


def test_inactive_adapters_have_no_node(several: tuple[nn.Module, CapturedModule]) -> None:
    model, gm = several
    for name, spec in SPECS.items():
        alone = lorafx.apply(model, spec, (IDS,)).eval()
        lorafx.set_adapter(gm, name)
        assert format_graph(gm) == format_graph(alone).replace(".default", f".{name}").replace(
            f"lorafx.linear.{name}", "lorafx.linear.default"
        ).replace("_default", f"_{name}").replace(f"aten.linear.{name}", "aten.linear.default").replace(
            f".{name}(", ".default("
        )


def test_what_the_user_froze_stays_frozen() -> None:
    """Of the active adapters, through everything that does not say which are active."""
    gm = lorafx.apply(Model().eval(), SPECS["default"], (IDS,))
    frozen = gm.get_parameter("up.lora_A.default").requires_grad_(False)
    thawed = gm.get_parameter("norm.weight").requires_grad_(True)
    training = {n for n, p in gm.named_parameters() if p.requires_grad}
    lorafx.add_adapter(gm, SPECS["head"], "new")
    with lorafx.disable_adapters(gm):
        pass
    lorafx.merge(gm, inplace=True)
    lorafx.unmerge(gm)
    lorafx.delete_adapter(gm, "new")
    assert {n for n, p in gm.named_parameters() if p.requires_grad} == training
    assert gm.get_parameter("up.lora_A.default") is frozen
    assert gm.get_parameter("norm.weight") is thawed
    lorafx.set_adapter(gm, "default")
    assert frozen.requires_grad, "which says what trains"


def test_switching_back_and_forth_is_exact(several: tuple[nn.Module, CapturedModule]) -> None:
    _, gm = several
    first = {name: (through(gm, name), format_graph(gm)) for name in SPECS}
    for _ in range(3):
        for name in reversed(SPECS):
            assert torch.equal(through(gm, name), first[name][0])
            assert format_graph(gm) == first[name][1]


def test_100_switches_of_4_adapters_on_minilm() -> None:
    model = load_model(classes=3)
    inputs = {
        "input_ids": torch.arange(5, 15)[None].repeat(2, 1),
        "attention_mask": torch.ones(2, 10, dtype=torch.long),
    }
    specs = {"default": LoraSpec(r=8), "dora": LoraSpec(r=4, variant="dora"), "vera": LoraSpec(r=16, variant="vera")}
    specs["head"] = LoraSpec(r=2, modules_to_save=["head"])
    gm = lorafx.apply(model, specs["default"], inputs).eval()
    for name in ("dora", "vera", "head"):
        lorafx.add_adapter(gm, specs[name], name)
    filled(gm, 0.05)
    names = list(specs)
    first = {}
    for count in range(100):
        name = names[(count * 7 + count // 4) % 4]
        lorafx.set_adapter(gm, name)
        if count < 12 or count >= 92:
            outputs = [t.detach() for t in leaves(gm(**inputs))]
            for known, now in zip(first.setdefault(name, outputs), outputs, strict=True):
                assert torch.equal(known, now)
    assert len(first) == 4
    assert len({float(outputs[0].sum()) for outputs in first.values()}) == 4


def test_several_active_adapters_sum(several: tuple[nn.Module, CapturedModule]) -> None:
    """At one layer each adds what it would add to the frozen layer alone, in whatever order."""
    _, gm = several
    layer, x = gm.get_submodule("down"), torch.randn(5, 10)

    def alone(*names: str) -> Tensor:
        lorafx.set_adapter(gm, names)
        merged = lorafx.merge(gm)
        weight, bias = merged.get_parameter("down.weight"), merged.get_parameter("down.bias")
        return nn.functional.linear(x, weight, bias) - nn.functional.linear(x, layer.weight, layer.bias)

    names = ("default", "small", "dora", "vera", "bias")
    assert_close("layer", alone(*names), sum(alone(name) for name in names))  # type: ignore[arg-type]
    assert torch.equal(through(gm, *names), through(gm, *reversed(names)))


def test_gradients_reach_the_active_adapters_and_no_others(several: tuple[nn.Module, CapturedModule]) -> None:
    model, gm = several
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(list(gm.parameters()), lr=0.1)  # also those that do not train now
    for names in (("dora",), ("default", "vera"), ("head",)):
        lorafx.set_adapter(gm, names)
        state = copy.deepcopy(gm.state_dict())
        gm.zero_grad()
        gm.train()(IDS).square().mean().backward()
        optimizer.step()
        changed = {n for n, t in gm.state_dict().items() if not torch.equal(t, state[n])}
        assert changed == {n for name in names for n in adapters(gm)[name].parameter_names}
    assert same(dict(model.state_dict()), dict(before))


def test_each_adapter_has_its_own_head(several: tuple[nn.Module, CapturedModule]) -> None:
    model, gm = several
    lorafx.add_adapter(gm, SPECS["head"], "other")
    with torch.no_grad():
        gm.get_parameter("_adapters.other.head.bias").add_(5)
    assert not torch.equal(through(gm, "head"), through(gm, "other"))
    assert torch.equal(gm.get_parameter("head.bias"), model.get_parameter("head.bias"))
    with pytest.raises(AdapterError, match=r"'other' cannot be active together with adapter 'head'.*'head.weight'"):
        lorafx.set_adapter(gm, ["head", "other"])
    assert gm.meta["active"] == ("other",), "nothing is changed"


def test_disabled_adapters_are_the_base_and_come_back(several: tuple[nn.Module, CapturedModule]) -> None:
    model, gm = several
    for names in (("dora", "vera"), ("head",)):
        before, text = through(gm, *names), format_graph(gm)
        trains = [p.requires_grad for p in gm.parameters()]
        with lorafx.disable_adapters(gm) as bare:
            assert torch.equal(bare(IDS), model(IDS))
            assert format_graph(bare) == gm.meta["captured"]
        assert torch.equal(gm(IDS), before)
        assert format_graph(gm) == text
        assert [p.requires_grad for p in gm.parameters()] == trains
        with pytest.raises(ZeroDivisionError), lorafx.disable_adapters(gm):
            _ = 1 / 0
        assert torch.equal(gm(IDS), before)


def test_switching_every_family(zoo: Zoo, family: Family) -> None:
    gm = zoo.adapted(family, LoraSpec(r=2)).eval()
    lorafx.add_adapter(gm, LoraSpec(r=3, variant="dora"), "dora", seed=0)
    filled(gm, 0.1)
    base = leaves(zoo.eager(family)(**family.inputs()))
    with lorafx.disable_adapters(gm):
        assert all(torch.equal(a, b) for a, b in zip(leaves(gm(**family.inputs())), base, strict=True))
    lorafx.set_adapter(gm, "dora")
    merged = lorafx.merge(gm)
    for actual, expected in zip(leaves(merged(**family.inputs())), leaves(gm(**family.inputs())), strict=True):
        assert_close("model", actual, expected)
    for name in ("dora", "default"):
        lorafx.delete_adapter(gm, name)
    assert format_graph(gm) == gm.meta["captured"]
    assert list(gm.state_dict()) == list(zoo.capture(family).gm.state_dict())


# renaming, deleting, copying


def test_a_renamed_adapter_is_the_same_one(several: tuple[nn.Module, CapturedModule]) -> None:
    _, gm = several
    for name in ("vera", "head"):
        before = through(gm, name)
        parameters = [gm.get_parameter(n) for n in adapters(gm)[name].parameter_names]
        lorafx.rename_adapter(gm, name, f"{name}-2")
        assert torch.equal(gm(IDS), before)
        assert [gm.get_parameter(n) for n in adapters(gm)[f"{name}-2"].parameter_names] == parameters
        assert not [n for n in gm.state_dict() if n.endswith(f".{name}") or n.startswith(f"_adapters.{name}.")]
    assert [a.name for a in lorafx.list_adapters(gm)] == [
        "default",
        "small",
        "dora",
        "vera-2",
        "head-2",
        "bias",
        "adalora",
    ]


def test_deleting_all_gives_the_captured_graph_back(several: tuple[nn.Module, CapturedModule]) -> None:
    model, gm = several
    lorafx.set_adapter(gm, ["dora", "vera"])
    expected = through(gm, "vera")
    lorafx.set_adapter(gm, ["dora", "vera"])
    lorafx.delete_adapter(gm, "dora")
    assert torch.equal(gm(IDS), expected), "the other one stays active"
    for name in [a.name for a in lorafx.list_adapters(gm)]:
        lorafx.delete_adapter(gm, name)
    assert stage(gm) is Stage.CAPTURED
    assert format_graph(gm) == gm.meta["captured"]
    assert same(dict(gm.state_dict()), dict(model.state_dict()))
    lorafx.add_adapter(gm, LoraSpec(r=1), "again")
    lorafx.set_adapter(gm, "again")
    assert torch.equal(gm(IDS), model(IDS))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda gm: pickle.loads(pickle.dumps(gm))], ids=["copy", "pickle"])  # noqa: S301  # our own bytes
def test_a_copy_lives_on_its_own(several: tuple[nn.Module, CapturedModule], how: Any) -> None:
    _, gm = several
    expected = {name: through(gm, name) for name in SPECS}
    lorafx.set_adapter(gm, ["small", "vera"])
    twin = how(gm)
    assert torch.equal(twin(IDS), gm(IDS))
    lorafx.delete_adapter(twin, "vera")
    lorafx.merge(twin, "small", inplace=True)
    for name in SPECS:
        assert torch.equal(through(gm, name), expected[name])
    assert [a.name for a in lorafx.list_adapters(twin)] == [n for n in SPECS if n != "vera"]


@pytest.mark.parametrize(
    "call",
    [
        lorafx.list_adapters,
        lorafx.unmerge,
        lambda gm: lorafx.add_adapter(gm, LoraSpec(), "x"),
        lambda gm: lorafx.set_adapter(gm, "x"),
        lambda gm: lorafx.set_adapter_names(gm, ["x"]),
        lambda gm: lorafx.disable_adapters(gm).__enter__(),
        lambda gm: lorafx.delete_adapter(gm, "x"),
        lambda gm: lorafx.rename_adapter(gm, "x", "y"),
        lambda gm: lorafx.merge(gm, inplace=True),
    ],
    ids=range(9),
)
def test_what_is_no_graph_is_refused(call: Any) -> None:
    """Most often the user's own model, or a wrapper around the graph."""
    with pytest.raises(PassError, match=r"^expected a graph made by lorafx\.apply, got Model; call lorafx\.apply"):
        call(Model())


def test_a_list_tells_what_there_is(several: tuple[nn.Module, CapturedModule]) -> None:
    _, gm = several
    lorafx.set_adapter(gm, ["vera", "head"])
    listed = {a.name: a for a in lorafx.list_adapters(gm)}
    assert [n for n, a in listed.items() if a.active] == ["vera", "head"]
    assert listed["vera"].variants == ("vera",)
    assert listed["vera"].sites == 2
    assert listed["vera"].parameters == (10 + 4) + (6 + 4)
    assert listed["head"].parameters == 2 * (6 + 10) + (6 * 5 + 5) + 10


def test_a_list_counts_a_tied_tensor_once() -> None:
    model = Model().eval()
    model.head = nn.Linear(6, 9, bias=False)
    model.head.weight = model.embed.weight
    spec = LoraSpec(r=2, target_modules=["up"], modules_to_save=["embed", "head"])
    (listed,) = lorafx.list_adapters(lorafx.apply(model, spec, (IDS,)))
    assert listed.parameters == 2 * (6 + 10) + 9 * 6


def test_a_merged_graph_takes_new_adapters(several: tuple[nn.Module, CapturedModule]) -> None:
    _, gm = several
    lorafx.set_adapter(gm, "dora")
    merged = lorafx.merge(gm)
    expected = merged(IDS)
    lorafx.add_adapter(merged, LoraSpec(r=2), "next")
    lorafx.set_adapter(merged, "next")
    assert torch.equal(merged(IDS), expected)
    filled(merged)
    assert_close("model", lorafx.merge(merged)(IDS), merged(IDS))
