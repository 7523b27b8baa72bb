"""What makes up for a quantized base and what is made of it; whether an original is the one; how far merges are off."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorafx
from conftest import randomize
from lorafx import AdapterError, LoraSpec, MergeError, QuantizationError
from lorafx.bases import FORMATS
from lorafx.bases.tensor import as_dense
from lorafx.graph import CapturedModule
from tolerances import error

X = torch.randn(4, 96, generator=torch.Generator().manual_seed(0))
T: dict[str, Any] = {"r": 4, "base": "nf4", "target_modules": ["0", "2"]}
NF4 = FORMATS["nf4"]


def model(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(96, 80), nn.Tanh(), nn.Linear(80, 33)).to(dtype).eval()


def adapted(dtype: torch.dtype = torch.float32, **fields: Any) -> CapturedModule:
    return lorafx.apply(model(dtype=dtype), LoraSpec(**{**T, **fields}), (X.to(dtype),), seed=0).eval()


def off(gm: CapturedModule, other: nn.Module) -> float:
    pairs = ((gm.get_parameter(n), other.get_parameter(n)) for n in ("0.weight", "2.weight"))
    return max(error(as_dense(a), as_dense(b), by_norm=True) for a, b in pairs)


# LoftQ's mark

Make = Callable[[CapturedModule], object]

MADE: dict[str, Make] = {
    "default": lambda gm: lorafx.rename_adapter(gm, "default", "new"),
    "converted": lambda gm: lorafx.convert(gm, "default", "new"),
    "cut": lambda gm: lorafx.convert(gm, "default", "new", rank=2),
    "twice": lambda gm: (lorafx.convert(gm, "default", "cv"), lorafx.convert(gm, "cv", "new")),
    "cat": lambda gm: lorafx.combine_adapters(gm, ["default", "other"], [1.0, 1.0], "cat", "new"),
    "the other first": lambda gm: lorafx.combine_adapters(gm, ["other", "default"], [0.5, -0.25], "svd", "new"),
    "ties": lambda gm: lorafx.combine_adapters(gm, ["default", "other"], [1.0, 1.0], "ties", "new", density=0.5),
}


def with_other(**fields: Any) -> CapturedModule:
    gm = adapted(**fields)
    lorafx.add_adapter(gm, LoraSpec(**T), "other", seed=1)
    return gm


CASES = [(made, variant) for made in MADE for variant in ("lora", "lora_bias", "dora")]
CASES.remove(("cat", "dora"))  # whose changes have no factors to put side by side


@pytest.mark.parametrize(("made", "variant"), CASES)
def test_what_is_made_of_loftq_is_loftq(made: str, variant: str, tmp_path: Path) -> None:
    gm = with_other(init="loftq", variant=variant)
    randomize(gm)
    MADE[made](gm)
    lorafx.set_adapter(gm, "new")
    with pytest.raises(MergeError, match=r"site '0': init='loftq' put into adapter 'new'.* would be added twice"):
        lorafx.merge(gm, base="original", original=model())
    lorafx.save_adapter(gm, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["init_lora_weights"], config["loftq_config"]["loftq_bits"]) == ("loftq", 4)
    again = lorafx.apply(model(), tmp_path, X).eval()
    lorafx.load_adapter(again, tmp_path)
    assert torch.equal(again(X), gm(X))
    with pytest.raises(AdapterError, match="relative to the weight itself in the graph, and to the base that init="):
        lorafx.load_adapter(lorafx.apply(model(), replace(LoraSpec.from_json(tmp_path), init=None), X), tmp_path)


def test_beside_it_another_adapter_may_be_merged_into_the_original() -> None:
    """Alone, also on the base that many rounds have stored, which is further off; but not in a sum with LoftQ's."""
    for init, r in (("loftq", 4), ("loftq_5", 4), ("loftq_5", 32)):
        gm = with_other(init=init, r=r)
        assert 0.08 < off(lorafx.unadapted(gm), model()) < 0.15
        lorafx.set_adapter(gm, "other")
        assert off(lorafx.merge(gm, base="original", original=model()), model()) == 0
        lorafx.set_adapter(gm, ["other", "default"])
        with pytest.raises(MergeError, match="adapter 'default'"):
            lorafx.merge(gm, base="original", original=model())


def test_sites_are_told_apart() -> None:
    """A spec without LoftQ, of the same variant, has other sites."""
    specs = [LoraSpec(r=4, base="nf4", target_modules=["0"]), LoraSpec(**{**T, "target_modules": ["2"]}, init="loftq")]
    gm = lorafx.apply(model(), specs, (X,), seed=0).eval()
    randomize(gm)
    lorafx.convert(gm, "default", "cv")
    for name in ("default", "cv"):
        lorafx.set_adapter(gm, name)
        with pytest.raises(MergeError, match=r"^site '2': init='loftq'"):
            lorafx.merge(gm, base="original", original=model())
    assert {s.target_modules: s.init for s in gm.meta["adapters"]["cv"].specs} == {("0",): "kaiming", ("2",): "loftq"}


def test_a_file_for_all_sites_does_not_go_into_a_graph_with_some(tmp_path: Path) -> None:
    gm = adapted(init="loftq")
    lorafx.save_adapter(gm, tmp_path)
    specs = [LoraSpec(r=4, base="nf4", target_modules=["0"]), LoraSpec(**{**T, "target_modules": ["2"]}, init="loftq")]
    some = lorafx.apply(model(), specs, (X,), seed=0)
    with pytest.raises(AdapterError, match=r"site '0': the adapter is relative to the weight itself") as refused:
        lorafx.load_adapter(some, tmp_path)
    assert "site '2'" not in str(refused.value)


def test_after_several_rounds_the_rank_and_the_scaling_count(tmp_path: Path) -> None:
    gm = with_other(init="loftq_3", alpha=4)
    randomize(gm)
    lorafx.convert(gm, "default", "same")
    lorafx.save_adapter(gm, tmp_path, "same")
    again = lorafx.apply(model(), tmp_path, X).eval()
    lorafx.load_adapter(again, tmp_path)
    assert torch.equal(again(X), gm(X))
    lorafx.combine_adapters(gm, ["default", "other"], [1.0, 1.0], "cat", "wider")
    scaled = adapted(init="loftq_3", alpha=8)
    lorafx.convert(scaled, "default", "scaled")
    for graph, name, had, has in ((gm, "wider", "r=4 .*1", "r=8 .*1"), (scaled, "scaled", "r=4 .*2", "r=4 .*1")):
        with pytest.raises(
            AdapterError, match=rf"site '0' .*init='loftq_3' stored at {had}, and has {has}.* another base"
        ):
            lorafx.save_adapter(graph, tmp_path / "none", name)
        assert not (tmp_path / "none").exists()
        with pytest.raises(MergeError, match="init='loftq_3'"):
            lorafx.merge(graph, name, base="original", original=model())


# Whether it is the original


@pytest.mark.parametrize(("form", "lost"), [("nf4", ("0.34", "0.34")), ("int8", ("0.038", "0.035"))])
def test_the_weights_of_another_model_are_refused(form: str, lost: tuple[str, str]) -> None:
    gm = adapted(base=form)
    state = model().state_dict()
    other = model(seed=5).state_dict()
    message = rf"its '{{}}\.weight' and what the graph has as {form} differ by 1\.4 of its norm, .* at most {{}}\."
    one = {**state, "2.weight": other["2.weight"]}
    for name, most, original in (("0", lost[0], other), ("2", lost[1], one)):
        with pytest.raises(MergeError, match=message.format(name, most)):
            lorafx.merge(gm, base="original", original=original)
    moved = {n: t + 0.3 * t.std() * torch.randn_like(t) for n, t in state.items()}  # trained on since
    lorafx.merge(gm, base="original", original=moved)
    zero = {**state, "0.weight": torch.zeros(80, 96)}
    with pytest.raises(MergeError, match="differ by inf of its norm"):
        lorafx.merge(gm, base="original", original=zero)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_original_with_values_that_are_none_is_refused(value: float, tmp_path: Path) -> None:
    """Also of a weight without an adapter, and by an export."""
    gm = adapted(target_modules=["0"])
    lorafx.quantize(gm, "nf4", ["2"])
    original = model()
    with torch.no_grad():
        original.get_parameter("2.weight")[-1, 7] = value
    with pytest.raises(MergeError, match=r"original: '2\.weight' holds NaN or Inf"):
        lorafx.merge(gm, base="original", original=original)
    with pytest.raises(MergeError, match=r"'2\.weight' holds NaN or Inf"):
        lorafx.merge_and_export(gm, tmp_path / "m.onnx", base="original", original=original)
    assert not list(tmp_path.iterdir())


def test_an_empty_original() -> None:
    with pytest.raises(MergeError, match=r"no '0\.weight'; no '2\.weight'.* \(here there are none\)"):
        lorafx.merge(adapted(), base="original", original={})


@pytest.mark.parametrize(("form", "size"), [("nf4", 32), ("nf4", 64), ("nf4", 4096), ("int8", 96), ("int8", 4096)])
def test_a_format_loses_no_more_than_it_says(form: str, size: int) -> None:
    """It comes to that where one value has the scale and the rest just reads as zero."""
    width, base = max(size, 64), FORMATS[form]
    edge = 0.04551 if form == "nf4" else 0.5 / 127 * 0.9999
    settings: dict[str, Any] = {"block_size": size, "double_quant": False} if form == "nf4" else {}
    worst = torch.full((4, width), -edge)
    worst.view(-1, size)[:, 0] = 1

    def loss(weight: Tensor) -> float:
        return error(base.dequantize(base.quantize(weight, **settings)), weight, by_norm=True)

    limit = base.largest_loss(base.quantize(worst, **settings))
    assert limit == pytest.approx(loss(worst), rel=1e-3)
    generator = torch.Generator().manual_seed(0)
    for scale in torch.linspace(0.005, 1, 60):
        tried = torch.rand(4, width, generator=generator) * scale
        tried.view(-1, size)[:, 0] = 1
        assert loss(tried) <= limit
        assert loss(torch.full_like(worst, -scale.item()).where(worst < 0, 1.0)) <= limit * (1 + 1e-6)


# How far a merge is off


@pytest.mark.parametrize("merged_first", [["default"], ["default", "second"], ["second"]], ids=str)
def test_what_is_merged_in_place_was_rounded_too(merged_first: list[str]) -> None:
    """The unmerged graph is the exact one, whatever of it is merged in place already."""
    gm = adapted(torch.bfloat16)
    lorafx.add_adapter(gm, LoraSpec(r=2, target_modules=["2"]), "second", seed=1)
    lorafx.set_adapter(gm, ["default", "second"])
    randomize(gm)
    choices: tuple[dict[str, Any], ...] = ({}, {"requantize": True})
    merges = [lorafx.merge(gm, **choice) for choice in choices]
    before = [lorafx.merge_deviation(gm, merged) for merged in merges]
    assert 1e-3 < before[0].largest < 3e-3 < 0.05 < before[1].largest < 0.15
    lorafx.merge(gm, merged_first, inplace=True)
    assert [lorafx.merge_deviation(gm, merged) for merged in merges] == before
    if merged_first == ["default", "second"]:
        assert lorafx.merge_deviation(gm, lorafx.merge(gm)) == before[0]
    assert lorafx.merge_deviation(gm, lorafx.merge(gm, requantize=True)) == before[1]
    assert gm.meta["merged"] == tuple(merged_first)
    lorafx.unmerge(gm)
    assert lorafx.merge_deviation(gm, merges[0]) == before[0]


# What stays dense


def test_what_trained_whole_is_not_told_to_be_requantized(tmp_path: Path) -> None:
    gm = adapted(target_modules=["0"])
    lorafx.quantize(gm, "nf4", ["2"])
    lorafx.add_adapter(gm, LoraSpec(r=2, target_modules=["0"], modules_to_save=["2"]), "whole", seed=0)
    lorafx.set_adapter(gm, "whole")
    report = lorafx.merge_and_export(gm, tmp_path / "m.onnx", weight_format="bnb4", requantize=True)
    (note,) = (w for w in report.warnings if "dense" in w)
    assert "2.weight" in note
    assert "what trained whole (modules_to_save) is dense" in note
    assert report.base == "dequantized, requantized"


# Corrupt JSON

CORRUPT: dict[str, tuple[dict[str, Any] | str, str]] = {
    "a list for a dtype": ({"dtype": ["bfloat16"]}, r"dtype=\['bfloat16'\]; expected one of float32"),
    "an object for a dtype": ({"dtype": {}}, "dtype={}; expected one of"),
    "a float for a size": ({"blocksize": 64.0}, r"blocksize=64\.0; expected one of"),
    "a list for a size": ({"blocksize": [64]}, r"blocksize=\[64\]; expected one of"),
    "true for a size": ({"nested_blocksize": True}, "nested_blocksize=True; expected an integer"),
    "a huge size": (
        {"nested_blocksize": 10**400},
        r"nested_blocksize=10+\.\.\. \(401 characters\); expected an integer",
    ),
    "a huge offset": ({"nested_offset": 10**400}, r"nested_offset=10+\.\.\. \(401 characters\); expected a finite"),
    "an offset beyond float32": ({"nested_offset": 1e39}, r"nested_offset=1e\+39; expected a finite"),
    "an offset below zero": ({"nested_offset": -0.5}, r"nested_offset=-0\.5; expected a finite number of at least 0"),
    "a huge shape": ({"shape": [10**400, 96]}, r"shape=\[10+\.\.\. .*; expected \[out, in\]"),
    "a shape of too many values": ({"shape": [2**40, 2**40]}, r"shape=.*; expected \[out, in\]"),
    "a depth": ("[" * 100_000, "is no JSON text"),
    "digits": ('{"shape": ' + "9" * 5000 + "}", "is no JSON text"),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_a_state_of_other_types_and_sizes_is_named(case: str) -> None:
    change, message = CORRUPT[case]
    state = {f"layer.{n}": t for n, t in NF4.state_dict(NF4.quantize(torch.randn(80, 96))).items()}
    key = f"layer.{NF4.mark}"
    text = change if isinstance(change, str) else json.dumps({**json.loads(bytes(state[key].tolist())), **change})
    state[key] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    with pytest.raises(QuantizationError, match=rf"^layer cannot be read as nf4: .*{message}") as refused:
        NF4.from_state_dict(state, "layer.")
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("key", ["weight", "weight.absmax", "weight.quant_map", "weight.nested_quant_map", NF4.mark])
@pytest.mark.parametrize("value", [torch.tensor(1), torch.zeros(0), torch.ones(2, 2).half(), torch.zeros(3).cfloat()])
def test_a_tensor_of_another_kind_is_named(key: str, value: Tensor) -> None:
    state = {f"layer.{n}": t for n, t in NF4.state_dict(NF4.quantize(torch.randn(80, 96))).items()}
    with pytest.raises(QuantizationError, match=r"^layer cannot be read as nf4"):
        NF4.from_state_dict({**state, f"layer.{key}": value}, "layer.")
