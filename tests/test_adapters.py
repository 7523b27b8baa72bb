"""The life of adapters on one graph: adding, switching, summing, rows apart, merging in place, and taking away."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorafx
from conftest import Zoo, leaves, same
from lorafx import AdapterError, LoraSpec, MatchError, MergeError, PassError
from lorafx.demo.model import load_model
from lorafx.graph import CapturedModule
from lorafx.ir import Stage, adapters, format_graph, stage
from tolerances import assert_close
from zoo import FAMILIES, Family

IDS = torch.arange(12).reshape(3, 4) % 9


class Model(nn.Module):
    """One of each: an embedding, layers that adapters share or don't, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(9, 6), nn.Linear(6, 10), nn.Linear(10, 6)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 5)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.down(torch.relu(self.up(self.embed(ids))))))
        return logits


SPECS: dict[str, LoraSpec] = {
    "default": LoraSpec(r=3, target_modules=["up", "down", "embed"]),
    "small": LoraSpec(r=1, alpha=3, rslora=True, target_modules=["down"]),
    "dora": LoraSpec(r=2, variant="dora", target_modules=["up", "down"]),
    "vera": LoraSpec(r=4, variant="vera", dropout=0.2),
    "head": LoraSpec(r=2, target_modules=["up"], modules_to_save=["head"], bias="lora_only"),
    "bias": LoraSpec(r=2, variant="lora_bias", target_modules=["down"]),
    "adalora": LoraSpec(r=2, variant="adalora", target_modules=["up"]),
}


def filled(gm: CapturedModule, scale: float = 0.3) -> CapturedModule:
    """Every parameter of every adapter anywhere."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for adapter in adapters(gm).values():
            for name in adapter.parameter_names:
                tensor = gm.state_dict()[name]
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    return gm


def build() -> tuple[nn.Module, CapturedModule]:
    model = Model().eval()
    gm = lorafx.apply(model, SPECS["default"], (IDS,), seed=0).eval()
    for name, spec in SPECS.items():
        if name != "default":
            lorafx.add_adapter(gm, spec, name, seed=1)
    return model, filled(gm)


@pytest.fixture
def several() -> tuple[nn.Module, CapturedModule]:
    return build()


def through(gm: CapturedModule, *names: str) -> Tensor:
    lorafx.set_adapter(gm, names)
    result: Tensor = gm(IDS).detach()
    return result


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
    assert_close("model", through(gm, *names), through(gm, *reversed(names)))


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


# each row through its own adapter


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "mixtral", "vit", "distilbert"])
def test_rows_of_a_batch_equal_rows_apart(zoo: Zoo, name: str) -> None:
    family = FAMILIES[name]
    gm = zoo.adapted(family, LoraSpec(r=2)).eval()
    for index, variant in enumerate(("dora", "vera", "adalora")):
        lorafx.add_adapter(gm, LoraSpec(r=3 + index, variant=variant), variant, seed=index)
    filled(gm, 0.2)
    one = {n: t[:1] for n, t in family.inputs().items()}
    rows = ["vera", None, "default", "dora", "adalora", "__base__", "vera"]
    batch = {n: t.repeat(len(rows), *[1] * (t.dim() - 1)) for n, t in one.items()}

    def logits(inputs: dict[str, Tensor]) -> Tensor:
        found: Tensor = leaves(gm(**inputs))[0].detach()
        return found

    lorafx.set_adapter_names(gm, rows)
    mixed = logits(batch)
    text = format_graph(gm)
    lorafx.set_adapter_names(gm, rows[::-1])
    assert format_graph(gm) == text, "other names of the same adapters are no rewrite"
    assert_close("model", logits(batch), mixed.flip(0))
    for row, adapter in zip(mixed, rows, strict=True):
        if adapter in (None, "__base__"):
            with lorafx.disable_adapters(gm):
                apart = logits(one)
        else:
            lorafx.set_adapter(gm, str(adapter))
            apart = logits(one)
        assert_close("model", row[None], apart)
        lorafx.set_adapter_names(gm, rows)


class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(0, 1)).transpose(0, 1)  # type: ignore[no-any-return]


def test_rows_are_refused_where_they_cannot_be_told_apart(several: tuple[nn.Module, CapturedModule]) -> None:
    _, gm = several
    before = through(gm, "dora")
    with pytest.raises(AdapterError, match=r"adapter 'head' has its own version of 'head.weight'"):
        lorafx.set_adapter_names(gm, ["dora", "head", None])
    with pytest.raises(AdapterError, match=r"there is no adapter 'dorra'.*did you mean 'dora'"):
        lorafx.set_adapter_names(gm, ["dorra"])
    with pytest.raises(AdapterError, match="adapter_names is empty"):
        lorafx.set_adapter_names(gm, [])
    assert torch.equal(gm(IDS), before)
    x = torch.randn(3, 5, 4)
    turned = lorafx.apply(SequenceFirst(), LoraSpec(r=2, target_modules=["inner"]), (x,))
    with pytest.raises(AdapterError, match=r"site 'inner': the first dimension of its input is not the batch"):
        lorafx.set_adapter_names(turned, ["default", None, None])
    traced = lorafx.apply(nn.Sequential(nn.Linear(4, 4)), LoraSpec(r=2, target_modules=["0"]))
    with pytest.raises(AdapterError, match=r"site '0': the graph was captured without inputs"):
        lorafx.set_adapter_names(traced, ["default"])


@pytest.mark.parametrize("names", [["default"], ["default", "vera"], ["default"] * 6], ids=len)
def test_a_batch_of_another_size_than_the_names_is_refused(
    several: tuple[nn.Module, CapturedModule], names: list[str]
) -> None:
    _, gm = several
    lorafx.set_adapter_names(gm, names)
    with pytest.raises(AdapterError, match=f"adapter_names has {len(names)} names, and the batch 3 rows"):
        gm(IDS)


def test_flattened_rows_of_another_batch_are_refused(zoo: Zoo) -> None:
    """GPT-2's layers see batch times sequence rows, of which any number of names may be a divisor."""
    family = FAMILIES["gpt2"]
    gm = zoo.adapted(family, LoraSpec(r=2)).eval()
    lorafx.set_adapter_names(gm, ["default"])
    with pytest.raises(AdapterError, match="adapter_names has 1 names, and the batch 2 rows"):
        gm(**family.inputs())


ROUTE = ["default", None, "vera"]


def test_what_else_is_done_leaves_the_rows_their_adapters(several: tuple[nn.Module, CapturedModule]) -> None:
    _, gm = several
    lorafx.set_adapter_names(gm, ROUTE)
    before, text = gm(IDS), format_graph(gm)
    lorafx.delete_adapter(gm, "small")
    lorafx.add_adapter(gm, SPECS["small"], "new")
    lorafx.rename_adapter(gm, "vera", "other")
    with lorafx.disable_adapters(gm):
        assert not torch.equal(gm(IDS)[0], before[0])
    lorafx.rename_adapter(gm, "other", "vera")
    assert torch.equal(gm(IDS), before)
    assert format_graph(gm) == text
    for call, error in (
        (lambda: lorafx.set_adapter_names(gm, ["head", None, None]), AdapterError),
        (lambda: lorafx.delete_adapter(gm, "vera"), AdapterError),
        (lambda: lorafx.merge(gm, "dora", inplace=True), MergeError),
        (lambda: lorafx.merge(gm), MergeError),
    ):
        with pytest.raises(error):
            call()
        assert torch.equal(gm(IDS), before)
    assert_close("model", lorafx.merge(gm, ["dora"])(IDS), through(gm, "dora"))


def test_rows_train_their_own_adapters(several: tuple[nn.Module, CapturedModule]) -> None:
    _, gm = several
    lorafx.set_adapter(gm, "dora")
    lorafx.set_adapter_names(gm, ROUTE)
    gm(IDS).square().sum().backward()
    routed = {n: p.grad for n, p in gm.named_parameters() if p.grad is not None}
    assert set(routed) == {n for name in ("default", "vera") for n in adapters(gm)[name].parameter_names}
    for row, name in ((0, "default"), (2, "vera")):
        lorafx.set_adapter(gm, name)
        gm.zero_grad()
        gm(IDS[row : row + 1]).square().sum().backward()
        for parameter in adapters(gm)[name].parameter_names:
            grad = gm.get_parameter(parameter).grad
            assert grad is not None
            assert_close("layer", routed[parameter], grad)


def test_rows_without_an_adapter_are_not_those_of_a_merged_one(several: tuple[nn.Module, CapturedModule]) -> None:
    _, gm = several
    lorafx.merge(gm, "small", inplace=True)
    with pytest.raises(AdapterError, match=r"small is merged in place, for all rows: call unmerge"):
        lorafx.set_adapter_names(gm, ROUTE)


def test_a_mixed_batch_compiles(several: tuple[nn.Module, CapturedModule]) -> None:
    _, gm = several
    lorafx.set_adapter_names(gm, ["default", "dora", None])
    expected = gm(IDS)
    compiled = torch.compile(gm, backend="aot_eager", fullgraph=True)
    assert_close("model", compiled(IDS), expected)
    lorafx.set_adapter_names(gm, [None, "dora", "default"])
    assert_close("model", compiled(IDS), gm(IDS))


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
        (lambda gm: lorafx.add_adapter(gm, LoraSpec(), "dora"), AdapterError, "there is an adapter 'dora' already"),
        (lambda gm: lorafx.add_adapter(gm, LoraSpec(), "a.b"), AdapterError, "'a.b' cannot be an adapter's name"),
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


def test_a_list_tells_what_there_is(several: tuple[nn.Module, CapturedModule]) -> None:
    _, gm = several
    lorafx.set_adapter(gm, ["vera", "head"])
    listed = {a.name: a for a in lorafx.list_adapters(gm)}
    assert [n for n, a in listed.items() if a.active] == ["vera", "head"]
    assert listed["vera"].variants == ("vera",)
    assert listed["vera"].sites == 2
    assert listed["vera"].parameters == (10 + 4) + (6 + 4)
    assert listed["head"].parameters == 2 * (6 + 10) + (6 * 5 + 5) + 10


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
