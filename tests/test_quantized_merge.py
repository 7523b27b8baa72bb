"""What adapters on a quantized base are merged into: the values it reads as, the original weights, the format again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorafx
from conftest import randomize, same
from kinds import Experts
from lorafx import CheckpointError, LoraSpec, MergeError
from lorafx.bases import FORMATS
from lorafx.bases.ops import packed_rows
from lorafx.bases.tensor import QuantizedTensor
from lorafx.graph import CapturedModule
from lorafx.ir import format_graph
from lowered import Model, X
from tolerances import assert_close

SETTINGS: list[dict[str, Any]] = [
    {"base": "nf4"},
    {"base": "nf4", "double_quant": False, "block_size": 32},
    {"base": "int8"},
]
TARGETS = ["v", "o", "gate", "down"]


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return Model(1).to(dtype).eval()


def adapted(module: nn.Module, example: Tensor | None = None, **options: Any) -> CapturedModule:
    """An adapted graph with adapters far from their start, the same ones whatever the base is.

    Without an example it is traced symbolically, which is fast.
    """
    gm = start(module, example, **options)
    torch.manual_seed(1)
    randomize(gm)
    return gm


def start(module: nn.Module, example: Tensor | None = None, **options: Any) -> CapturedModule:
    spec = LoraSpec(**{"r": 3, "alpha": 5, "target_modules": TARGETS, **options})
    inputs = None if example is None else (example,)
    return lorafx.apply(module, spec, inputs, seed=0, backend="reference").eval()


def dense(gm: CapturedModule) -> CapturedModule:
    """The same graph over the values that its weights are read as."""
    result = copy.deepcopy(gm)
    for module in result.modules():
        for name, weight in module._parameters.items():
            if isinstance(weight, QuantizedTensor):
                module._parameters[name] = nn.Parameter(weight.dequantize(), requires_grad=False)
    result.meta["samples"] = {}
    return result


def parts(gm: CapturedModule, site: lorafx.Site) -> tuple[Tensor, Tensor, Tensor]:
    """W_q, the scaled product of A and B, and the row norms of their sum, in float64."""
    a, b = (site.parameters(gm)[name].detach().double() for name in ("lora_A", "lora_B"))
    weight = gm.get_parameter(site.weight)
    assert isinstance(weight, QuantizedTensor)
    base, update = weight.dequantize().double(), site.scaling * b @ a
    return base, update, (base + update).norm(dim=-1, keepdim=True)


# Into the original weights


def as_folder(base: nn.Module, folder: Path) -> Path:
    save_file({n: p.detach() for n, p in base.named_parameters()}, folder / "model.safetensors")
    return folder


GIVEN: dict[str, Callable[[nn.Module, Path], Any]] = {
    "module": lambda base, folder: base,
    "mapping": lambda base, folder: {**base.state_dict(), "of another": None},
    "folder": as_folder,
    "path as text": lambda base, folder: str(as_folder(base, folder)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"variant": "vera"}, {"variant": "adalora"}, {"rslora": True}], ids=str)
def test_into_the_original_is_the_merge_on_the_dense_model(options: dict[str, Any], dtype: torch.dtype) -> None:
    base = model(dtype)
    packed, plain = adapted(base, base="nf4", **options), adapted(base, **options)
    expected = lorafx.merge(plain)
    found = lorafx.merge(packed, base="original", original=base)
    assert format_graph(found) == format_graph(expected)
    assert same(dict(found.state_dict()), dict(expected.state_dict()))
    assert not any(isinstance(p, QuantizedTensor) for p in found.parameters())


@pytest.mark.parametrize("given", GIVEN)
def test_an_original_of_each_kind(given: str, tmp_path: Path) -> None:
    base = model()
    packed = adapted(base, base="int8")
    lorafx.quantize(packed, "nf4", ["q", "k", "up"])  # without adapters
    found = lorafx.merge(packed, base="original", original=GIVEN[given](base, tmp_path))
    assert same(dict(found.state_dict()), dict(lorafx.merge(adapted(base)).state_dict()))
    for name in ("q", "k", "up"):
        mine, theirs = (m.get_parameter(f"layers.0.{name}.weight") for m in (found, base))
        assert given not in ("module", "mapping") or mine.data_ptr() == theirs.data_ptr(), "what is unchanged is shared"


def test_an_original_in_another_dtype_is_rounded_once() -> None:
    """The graph's dtype stays: float64 weights are summed as they are, and so are those of layers without adapters."""
    base = model(torch.bfloat16)
    wide = copy.deepcopy(base).double()
    with torch.no_grad():
        for parameter in wide.parameters():
            parameter.mul_(1 + 1e-3)
    gm = adapted(base, base="nf4", target_modules=["v"])
    lorafx.quantize(gm, "nf4", ["q"])
    found = lorafx.merge(gm, base="original", original=wide)
    (site,) = lorafx.sites(gm)
    _, update, _ = parts(gm, site)
    assert torch.equal(found.get_parameter(site.weight), (wide.get_parameter(site.weight) + update).bfloat16())
    name = "layers.0.q.weight"
    assert torch.equal(found.get_parameter(name), wide.get_parameter(name).bfloat16())


def test_doras_gain_stays_the_trained_one() -> None:
    base = model()
    gm = adapted(base, base="nf4", variant="dora")
    found = lorafx.merge(gm, base="original", original=base)
    for site in lorafx.sites(gm):
        _, update, norm = parts(gm, site)
        gain = site.parameters(gm)["lora_magnitude_vector"].detach().double().unsqueeze(-1) / norm
        wanted = gain * (base.get_parameter(site.weight).detach().double() + update)
        assert_close("fold", found.get_parameter(site.weight), wanted.float())
    fresh = start(base, base="nf4", variant="dora")
    untrained = lorafx.merge(fresh, base="original", original=base)
    for site in lorafx.sites(fresh):
        assert_close("fold", untrained.get_parameter(site.weight), base.get_parameter(site.weight).detach())


def test_what_a_start_took_from_the_quantized_weight_is_not_taken_from_the_original() -> None:
    base = model()
    gm = start(base, base="nf4", init="pissa")
    starts = {s.name: [p.detach().double() for p in s.parameters(gm).values()] for s in lorafx.sites(gm)}
    randomize(gm)
    found = lorafx.merge(gm, base="original", original=base)
    for site in lorafx.sites(gm):
        _, update, _ = parts(gm, site)
        a0, b0 = starts[site.name]
        wanted = base.get_parameter(site.weight).detach().double() + update - site.scaling * b0 @ a0
        assert_close("fold", found.get_parameter(site.weight), wanted.float())


def test_an_adapter_that_makes_up_for_the_quantization_is_refused() -> None:
    base = model()
    gm = start(base, base="nf4", init="loftq", target_modules=["v"])
    with pytest.raises(MergeError, match=r"site 'layers\.0\.v': init='loftq' .* would be added twice"):
        lorafx.merge(gm, base="original", original=base)


def test_what_is_merged_in_place_is_merged_into_the_original_too() -> None:
    base = model()
    gm = adapted(base, base="nf4")
    lorafx.add_adapter(gm, LoraSpec(r=2, target_modules=["v"]), "second", seed=0)
    lorafx.set_adapter(gm, ["default", "second"])
    randomize(gm)
    expected = lorafx.merge(gm, base="original", original=base)
    only = lorafx.merge(gm, "second", base="original", original=base)
    lorafx.merge(gm, "default", inplace=True)
    assert same(dict(lorafx.merge(gm, base="original", original=base).state_dict()), dict(expected.state_dict()))
    assert same(dict(lorafx.merge(gm, "second", base="original", original=base).state_dict()), dict(only.state_dict()))


# In the format again


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("variant", ["lora", "dora", "vera", "adalora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_quantized_again_are_the_bytes_of_the_rounded_fold(
    dtype: torch.dtype, variant: str, settings: dict[str, Any]
) -> None:
    base = model(dtype)
    gm = adapted(base, variant=variant, **settings)
    plain, found = lorafx.merge(gm), lorafx.merge(gm, requantize=True)
    assert format_graph(found) == format_graph(plain)
    names = {s.weight for s in lorafx.sites(gm)}
    assert {n for n, p in found.named_parameters() if isinstance(p, QuantizedTensor)} == names
    for name in names:
        held, before = found.get_parameter(name), gm.get_parameter(name)
        assert isinstance(held, QuantizedTensor)
        assert held.is_like(before)
        assert not held.requires_grad
        again = FORMATS[settings["base"]].quantize(
            plain.get_parameter(name), block_size=held.packed.block_size, double_quant=held.packed.double_quant
        )
        assert same(dict(held.packed.tensors), dict(again.tensors))
    assert same({n: t for n, t in found.state_dict().items() if n not in names}, rest(plain, names))
    assert_close("model", found(X.to(dtype)), dense(found)(X.to(dtype)))


def rest(gm: CapturedModule, names: set[str]) -> dict[str, Tensor]:
    return {n: t for n, t in gm.state_dict().items() if n not in names}


def test_quantized_again_from_the_original() -> None:
    base = model()
    gm = adapted(base, base="nf4")
    lorafx.quantize(gm, "nf4", ["q"])
    found = lorafx.merge(gm, base="original", original=base, requantize=True)
    expected = lorafx.merge(gm, base="original", original=base)
    lorafx.quantize(expected, "nf4", [*TARGETS, "q"])
    assert same(dict(found.state_dict()), dict(expected.state_dict()))
    assert found.get_parameter("layers.0.q.weight") is gm.get_parameter("layers.0.q.weight")


class Transposed(nn.Module):
    """More than a tile on each side, one weight as [in, out] and one as [out, in]; rows end within a block."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = Conv1D(1100, 24), nn.Linear(1100, 600)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(self.up(x).relu())
        return result


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_weight_stored_transposed(variant: str) -> None:
    torch.manual_seed(0)
    base = Transposed()
    gm = adapted(base, torch.randn(2, 24), base="nf4", variant=variant, target_modules=["up", "down"])
    merged, again = lorafx.merge(gm), lorafx.merge(gm, requantize=True)
    into = lorafx.merge(gm, base="original", original=base)
    assert same(dict(merged.state_dict()), dict(lorafx.merge(dense(gm)).state_dict()))
    for name in ("up", "down"):
        held, fold = (m.get_parameter(f"{name}.weight") for m in (again, merged))
        assert isinstance(held, QuantizedTensor)
        assert held.turned == (name == "up")
        wanted = FORMATS["nf4"].quantize(fold.mT if held.turned else fold)
        assert same(dict(held.packed.tensors), dict(wanted.tensors))
    (up, _) = lorafx.sites(gm)
    assert up.name == "up"
    a, b = (up.parameters(gm)[n].detach().double() for n in ("lora_A", "lora_B"))
    weight = gm.get_parameter("up.weight")
    assert isinstance(weight, QuantizedTensor)
    gain = torch.ones(())
    if variant == "dora":
        norm = (weight.dequantize().mT.double() + up.scaling * b @ a).norm(dim=-1, keepdim=True)
        gain = up.parameters(gm)["lora_magnitude_vector"].detach().double().unsqueeze(-1) / norm
    exact = gain * (base.up.weight.detach().mT.double() + up.scaling * b @ a)
    assert_close("fold", into.get_parameter("up.weight"), exact.mT.float())


def test_a_stack_of_experts() -> None:
    base, x = Experts(), torch.randn(2, 4, 8)
    gm = lorafx.apply(base, LoraSpec(r=2, base="nf4", target_modules=[], target_parameters=["stack"]), (x,))
    randomize(gm)
    plain, again = lorafx.merge(gm).stack, lorafx.merge(gm, requantize=True).stack
    assert isinstance(again, QuantizedTensor)
    assert isinstance(plain, Tensor)
    assert torch.equal(plain, lorafx.merge(dense(gm)).stack)
    assert same(dict(again.packed.tensors), dict(FORMATS["nf4"].quantize(plain).tensors))
    (site,) = lorafx.sites(gm)
    _, update, _ = parts(gm, site)
    into = lorafx.merge(gm, base="original", original={"stack": base.stack.detach()}).stack
    assert_close("fold", into, (base.stack.detach().double() + update).float())


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_fold_reads_some_rows_at_a_time(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    example = torch.randn(2, 24)
    gm = adapted(Transposed(), example, base="nf4", variant=variant, target_modules=["up", "down"])
    rows: list[int] = []

    def counted(*arguments: Any) -> Tensor:
        rows.append(arguments[-1] - arguments[-2])
        found: Tensor = packed_rows(*arguments)
        return found

    def refuse(weight: QuantizedTensor) -> Tensor:
        raise AssertionError("the whole weight was dequantised")

    monkeypatch.setattr("lorafx.passes.fold.packed_rows", counted)
    monkeypatch.setattr(QuantizedTensor, "dequantize", refuse)
    for options in ({}, {"requantize": True}):
        lorafx.merge(gm, **options)
    assert max(rows) == 512


# How far it is from what was trained


def test_the_deviation_of_each_choice() -> None:
    base, x = model(torch.bfloat16), X.bfloat16()
    gm = adapted(base, x, base="nf4")
    lorafx.quantize(gm, "nf4", ["q"])
    choices: dict[str, dict[str, Any]] = {
        "dequantized": {},
        "original": {"base": "original", "original": base},
        "requantized": {"requantize": True},
    }
    found = {}
    for choice, options in choices.items():
        merged = lorafx.merge(gm, **options)
        deviation = found[choice] = lorafx.merge_deviation(gm, merged)
        assert set(deviation.weights) == {s.weight for s in lorafx.sites(gm)} | {"layers.0.q.weight"}
        for site in lorafx.sites(gm):
            weight, update, _ = parts(gm, site)
            held = merged.get_parameter(site.weight).detach()
            values = held.dequantize() if isinstance(held, QuantizedTensor) else held
            wanted = (values.double() - weight - update).norm() / (weight + update).norm()
            assert deviation.weights[site.weight] == pytest.approx(wanted.item(), rel=1e-9)
        expected = gm(x).double()
        off = (merged(x).double() - expected).norm() / expected.norm()
        assert deviation.outputs == {"output": pytest.approx(off.item())}
        assert deviation.largest == deviation.weights[deviation.worst_weight]
        assert f"{deviation.largest:.2g} of their norm at most ({deviation.worst_weight})" in str(deviation)
    assert found["dequantized"].largest < 2**-8 < 0.02 < found["original"].largest < 0.2
    assert 0.02 < found["requantized"].largest < 0.2
    assert found["dequantized"].weights["layers.0.q.weight"] == 0 != found["original"].weights["layers.0.q.weight"]
    other = lorafx.merge_deviation(gm, lorafx.merge(gm), (2 * x,))
    assert other.weights == found["dequantized"].weights
    with pytest.raises(MergeError, match=r"needs what lorafx\.merge returned; this graph is adapted"):
        lorafx.merge_deviation(gm, gm)
    with pytest.raises(MergeError, match=r"'layers\.0\.v\.weight' is not in the merged graph with shape \[16, 16\]"):
        lorafx.merge_deviation(gm, lorafx.merge(adapted(Small(), target_modules=["up"])))


EXPORTS: list[dict[str, Any]] = [
    {"base": "original"},
    {"requantize": True},
    {"base": "original", "dtype": "fp32"},
    {"requantize": True, "dtype": "fp32"},
]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(self.up(x).relu())
        return result


@pytest.mark.parametrize("options", EXPORTS, ids=str)
def test_an_export_is_held_to_the_merged_graph(options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Small().to(torch.float16 if "dtype" in options else torch.float32)
    x = X.to(base.up.weight.dtype)
    gm = adapted(base, x, base="nf4", variant="dora", target_modules=["up", "down"])
    before = gm(x)
    given = {"original": base} if "base" in options else {}
    report = lorafx.merge_and_export(gm, tmp_path / "m.onnx", **options, **given)
    choice = {k: v for k, v in options.items() if k != "dtype"}
    assert report.deviation == lorafx.merge_deviation(gm, lorafx.merge(gm, **choice, **given))
    assert report.base == ("original" if given else "dequantized, requantized")
    assert report.parity
    assert {p.reference for p in report.parity} == {"merged"}
    assert all(p.passed for p in report.parity)
    assert report.bytes_changed > 0
    assert f"merged into  {report.base}; by design, beside the unmerged graph: weights off by 0." in str(report)
    assert report.to_dict()["deviation"]["outputs"].keys() == {"output"}
    assert torch.equal(gm(x), before)
    plain = lorafx.merge_and_export(gm, tmp_path / "plain.onnx")
    assert (plain.base, plain.deviation) == ("dequantized", None)
    assert {p.reference for p in plain.parity} == {"unmerged"}


@pytest.mark.parametrize("choice", [{}, {"base": "original"}], ids=str)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_merged_file_may_be_in_half_precision(dtype: str, choice: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Small()
    gm = adapted(base, X, base="nf4", target_modules=["up", "down"])
    given = {**choice, "original": base} if choice else {}
    report = lorafx.merge_and_export(gm, tmp_path / "m.onnx", dtype=dtype, **given)
    assert report.parity
    assert all(p.passed for p in report.parity)
    file = onnx.load(tmp_path / "m.onnx")
    (held,) = (t for t in file.graph.initializer if t.name.startswith("up.weight"))
    assert held.data_type == {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[dtype]
    values = torch.from_numpy(onnx.numpy_helper.to_array(held).astype("float32"))
    merged = lorafx.merge(gm, **given).get_parameter("up.weight").detach()
    kept = values if values.shape == merged.shape else values.T
    torch.testing.assert_close(kept, merged, rtol=2**-11 if dtype == "fp16" else 2**-8, atol=1e-6)


def test_an_unchecked_export_says_so(tmp_path: Path) -> None:
    gm = adapted(Small(), X, base="nf4", target_modules=["up"])
    report = lorafx.merge_and_export(gm, tmp_path / "m.onnx", requantize=True, verify=False)
    assert report.deviation is None
    assert "beside the unmerged graph: not compared (verify=False)" in str(report)


# Errors


def with_value(base: nn.Module, value: object) -> dict[str, Any]:
    return {**base.state_dict(), "layers.0.v.weight": value}


WRONG: dict[str, tuple[Callable[[nn.Module], dict[str, Any]], str]] = {
    "no such base": (lambda m: {"base": "orginal"}, "base='orginal' is none of 'dequantized', 'original'"),
    "no original": (lambda m: {"base": "original"}, "give them as original="),
    "no base": (lambda m: {"original": m}, "base='dequantized' does not use it: say base='original'"),
    "no names": (
        lambda m: {"base": "original", "original": {"x.weight": X}},
        r"no 'layers\.0\.v\.weight'; .*by the graph's own names \(here they begin with 'x\.weight'\)",
    ),
    "a shape": (
        lambda m: {"base": "original", "original": with_value(m, X[0])},
        r"'layers\.0\.v\.weight' is torch\.float32 \[5, 16\], expected floating \[16, 16\]",
    ),
    "integers": (
        lambda m: {"base": "original", "original": with_value(m, torch.zeros(16, 16, dtype=torch.uint8))},
        r"is torch\.uint8 \[16, 16\]",
    ),
    "quantized": (
        lambda m: {"base": "original", "original": lorafx.unadapted(adapted(m, base="int8"))},
        "is stored as int8 itself",
    ),
    "meta": (
        lambda m: {"base": "original", "original": copy.deepcopy(m).to("meta")},
        "is on the meta device and has no values",
    ),
    "no tensor": (lambda m: {"base": "original", "original": with_value(m, 3)}, "is int, expected a tensor"),
    "another thing": (lambda m: {"base": "original", "original": 3}, "original is int: expected a folder"),
    "in place": (lambda m: {"inplace": True, "requantize": True}, r"inplace=True keeps the base.*are for merge\(gm\)"),
    "in place, original": (lambda m: {"inplace": True, "base": "original", "original": m}, "inplace=True keeps"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_and_changes_nothing(case: str, tmp_path: Path) -> None:
    options, message = WRONG[case][0](model()), WRONG[case][1]
    gm = adapted(model(), base="nf4")
    before = (format_graph(gm), copy.deepcopy(gm.state_dict()))
    with pytest.raises(MergeError, match=message):
        lorafx.merge(gm, **options)
    if "inplace" not in options:
        with pytest.raises(MergeError, match=message):
            lorafx.merge_and_export(gm, tmp_path / "m.onnx", **options)
        assert not list(tmp_path.iterdir())
    assert format_graph(gm) == before[0]
    assert same(gm.state_dict(), before[1])


@pytest.mark.parametrize("what", ["requantize=True", "base='original'"])
def test_nothing_is_quantized(what: str) -> None:
    base = model()
    gm = adapted(base)
    options: dict[str, Any] = {"requantize": True} if "re" in what else {"base": "original", "original": base}
    with pytest.raises(MergeError, match=f"{what} is for a quantized base, and no weight of this graph is quantized"):
        lorafx.merge(gm, **options)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds neither"):
        lorafx.merge(adapted(model(), base="nf4"), base="original", original=tmp_path)


@pytest.mark.parametrize("requantize", [False, True])
def test_a_fold_that_is_not_finite(requantize: bool) -> None:
    base = model(torch.float16)
    gm = adapted(base, base="nf4", target_modules=["v"])
    (site,) = lorafx.sites(gm)
    state = copy.deepcopy(gm.state_dict())
    parameters = site.parameters(gm)
    with torch.no_grad():
        parameters["lora_B"].fill_(1e6)
    for options in ({}, {"base": "original", "original": base}):
        with pytest.raises(MergeError, match=r"site 'layers\.0\.v': the merged weight does not fit in torch\.float16"):
            lorafx.merge(gm, **options, requantize=requantize)  # type: ignore[arg-type]
    with torch.no_grad():
        parameters["lora_B"][0, 0] = float("nan")
    with pytest.raises(MergeError, match=r"site 'layers\.0\.v': lora_B holds NaN or Inf"):
        lorafx.merge(gm, requantize=requantize)
    gm.load_state_dict(state)
    with torch.no_grad():
        base.get_parameter(site.weight)[0, 0] = float("nan")
    with pytest.raises(MergeError, match=r"original: 'layers\.0\.v\.weight' holds NaN or Inf"):
        lorafx.merge(gm, base="original", original=base, requantize=requantize)
