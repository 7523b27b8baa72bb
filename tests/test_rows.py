"""Each row of a batch through its own adapter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lorafx
from conftest import Zoo, leaves
from lorafx import AdapterError, LoraSpec, MergeError
from lorafx.graph import CapturedModule
from lorafx.ir import adapters, format_graph
from several import IDS, SPECS, build, filled, through
from tolerances import assert_close
from zoo import FAMILIES


@pytest.fixture
def several() -> tuple[nn.Module, CapturedModule]:
    return build()


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
    with pytest.raises(AdapterError, match="expected a list of adapters' names, got 'dora'"):
        lorafx.set_adapter_names(gm, "dora")
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
