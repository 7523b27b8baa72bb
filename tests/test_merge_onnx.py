"""Adapters folded straight into ONNX files: which initializer is which layer, the values, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import peft
import pytest
import torch
from onnx import TensorProto, helper
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.transformers.optimizer import optimize_model
from torch import Tensor, nn

import lorafx
from conftest import randomize
from lorafx.export.diff import graph_difference
from lorafx.export.onnx_file import read_onnx
from onnx_files import LAYERS, chain, delta, lora, refused, save, save_adapter, weights
from tolerances import assert_close
from zoo import FAMILIES

pytestmark = pytest.mark.filterwarnings("ignore")  # exporters' and PEFT's; lorafx's own are tested elsewhere


def run_onnx(path: Path, inputs: dict[str, Tensor]) -> Tensor:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = {i.name for i in session.get_inputs()}
    return torch.from_numpy(session.run(None, {n: t.numpy() for n, t in inputs.items() if n in names})[0])


# Other exporters' files, against PEFT's own merge.


class Logits(nn.Module):
    """What an exporter takes: tensors in, one tensor out; and a name before all others."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        extra = {} if "bert" in type(self.inner).__name__.lower() else {"use_cache": False}
        logits: Tensor = self.inner(input_ids=input_ids, attention_mask=attention_mask, **extra).logits
        return logits


ADAPTERS: dict[str, dict[str, Any]] = {
    "bert": {
        "target_modules": ["query", "value", "dense", "word_embeddings"],
        "use_rslora": True,
        "bias": "lora_only",
        "rank_pattern": {"value": 2},
        "alpha_pattern": {"query": 5},
        "modules_to_save": ["classifier"],
    },
    "llama": {"target_modules": ["q_proj", "k_proj", "down_proj"], "use_dora": True, "modules_to_save": ["lm_head"]},
    "gpt2": {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    "convnet": {"target_modules": ["features.0", "features.3", "hidden"], "use_dora": True},
}


@dataclasses.dataclass(frozen=True)
class Trained:
    """A base, PEFT's merge of an adapter into it, and where the adapter is."""

    base: nn.Module
    merged: nn.Module
    adapter: Path
    inputs: dict[str, Tensor]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    @cache
    def make(name: str) -> Trained:
        family, folder = FAMILIES[name], tmp_path_factory.mktemp(name)
        base = family.build().eval()
        model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, lora_alpha=6, **ADAPTERS[name]))
        torch.manual_seed(0)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if parameter.requires_grad and "magnitude" in key:
                    parameter.mul_(1.1)
                elif parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        inputs = {k: v for k, v in family.inputs().items() if k != "token_type_ids"}
        return Trained(base, model.merge_and_unload().eval(), folder, inputs)

    return make


def export(model: nn.Module, inputs: dict[str, Tensor], path: Path, by: str) -> Path:
    wrapped = Logits(model).eval() if "input_ids" in inputs else model  # the older exporter restores the mode
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if by == "older":
            names = list(inputs)
            torch.onnx.export(wrapped, (), path, kwargs=inputs, dynamo=False, opset_version=17, input_names=names)
        else:
            torch.onnx.export(wrapped, (), path, kwargs=inputs, dynamo=True, optimize=by == "optimized", verbose=False)
    return path


@pytest.mark.parametrize(
    ("name", "by"),
    [
        ("bert", "optimized"), ("bert", "plain"), ("bert", "older"),
        ("llama", "older"), ("gpt2", "older"), ("convnet", "plain"),
    ],
)  # fmt: skip
def test_an_exporters_file_merges_to_what_peft_merges(
    trained: Callable[[str], Trained], tmp_path: Path, name: str, by: str
) -> None:
    found = trained(name)
    base = export(found.base, found.inputs, tmp_path / "base.onnx", by)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    report = lorafx.merge_onnx(base, found.adapter, tmp_path / "merged.onnx")
    with torch.no_grad():
        model = Logits(found.merged) if "input_ids" in found.inputs else found.merged
        expected = model(**found.inputs)
    assert_close("peft", run_onnx(tmp_path / "merged.onnx", found.inputs), expected)
    assert report.proof is not None
    assert report.proof.passed
    assert {p: (tmp_path / p).read_bytes() for p in before} == before
    if name == "bert" and by != "plain":
        assert {t.found for t in report.tensors} >= {"name", "module scope"}


@pytest.fixture(scope="module")
def optimized(trained: Callable[[str], Trained], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ONNX Runtime's optimizer of transformers makes of the older exporter's file: optimum's and Olive's does."""
    found, folder = trained("bert"), tmp_path_factory.mktemp("optimized")
    model = copy.deepcopy(found.base)
    model.set_attn_implementation("eager")  # the one it knows
    base = export(model, found.inputs, folder / "base.onnx", "older")
    config = model.config
    made = optimize_model(
        str(base), "bert", num_heads=config.num_attention_heads, hidden_size=config.hidden_size, opt_level=0
    )
    assert "Attention" in {n.op_type for n in made.model.graph.node}
    made.save_model_to_file(str(folder / "optimized.onnx"))
    return folder / "optimized.onnx"


def test_a_file_with_fused_operators(trained: Callable[[str], Trained], optimized: Path, tmp_path: Path) -> None:
    """What is a matrix of its own still is merged; queries are no more, and the advice says why."""
    found = trained("bert")
    paths = [n for n, m in found.base.named_modules() if isinstance(m, nn.Linear) and n.endswith("output.dense")]
    tensors: dict[str, Tensor] = {}
    model = copy.deepcopy(found.base)
    for path in paths:
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        tensors |= lora([path], linear.out_features, linear.in_features)
        with torch.no_grad():
            linear.weight.add_(delta(tensors, path).float())
    lorafx.merge_onnx(optimized, save_adapter(tmp_path / "adapter", tensors), tmp_path / "merged.onnx")
    with torch.no_grad():
        expected = Logits(model)(**found.inputs)
    assert_close("model", run_onnx(tmp_path / "merged.onnx", found.inputs), expected)
    with pytest.raises(lorafx.AdapterError, match=r"no weight of .*query'.*Attention .* are one matrix: merge into"):
        lorafx.merge_onnx(optimized, found.adapter, tmp_path / "other.onnx")


def test_a_file_quantized_for_dynamic_ranges_is_refused(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    found = trained("bert")
    base = export(found.base, found.inputs, tmp_path / "base.onnx", "older")
    quantize_dynamic(base, tmp_path / "quantized.onnx")
    with pytest.raises(lorafx.AdapterError, match=r"quantized \(\w*MatMulInteger\w* .*quantize the result"):
        lorafx.merge_onnx(tmp_path / "quantized.onnx", found.adapter, tmp_path / "merged.onnx")


def test_equal_parameters_that_the_older_exporter_copies_are_refused(tmp_path: Path) -> None:
    """It stores one and makes the others by Identity, under their names."""
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU()).eval()
    for linear in (model[0], model[2]):
        nn.init.zeros_(linear.bias)  # type: ignore[arg-type]
    torch.onnx.export(model, (torch.randn(2, 3, 6),), tmp_path / "base.onnx", dynamo=False, opset_version=17)
    base = onnx.load(tmp_path / "base.onnx")
    copies = [n for n in base.graph.node if n.op_type == "Identity" and n.output[0].endswith(".bias")]
    assert len(copies) == 1
    biases = {f"{i}.bias": torch.ones(6) for i in (0, 2)}
    message = r"is shared: (.|\n)*is a copy of another parameter"
    refused(tmp_path, base, lora(["0", "2"]) | dict(reversed(biases.items())), message, bias="lora_only")
    (tmp_path / "base.onnx").unlink()
    tensors = lora(["0", "2"]) | {f"{i}.lora_B.bias": torch.ones(6) for i in (0, 2)}
    refused(tmp_path, base, tensors, "is a copy of another parameter", lora_bias=True)


def test_a_kernel_with_a_normalisation_folded_into_it_is_refused(
    trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    found = trained("convnet")
    base = export(found.base, found.inputs, tmp_path / "base.onnx", "optimized")
    with pytest.raises(lorafx.AdapterError, match=r"features\.0\.weight' is read by Conv .* of module 'features\.1'"):
        lorafx.merge_onnx(base, found.adapter, tmp_path / "merged.onnx")
    assert not (tmp_path / "merged.onnx").exists()


def test_a_file_in_float16_merges_to_what_peft_merges(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    found = trained("gpt2")
    base = export(copy.deepcopy(found.base).half(), found.inputs, tmp_path / "base.onnx", "plain")
    lorafx.merge_onnx(base, found.adapter, tmp_path / "merged.onnx")
    with torch.no_grad():
        expected = Logits(found.merged)(**found.inputs)
    assert_close("model", run_onnx(tmp_path / "merged.onnx", found.inputs), expected.half())


# Our own files: the bits of merge_and_export.


class Toy(nn.Module):
    """An embedding, square and other linear layers, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 12, 3, padding=1)
        self.norm = nn.LayerNorm(12)
        self.square = nn.Linear(12, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.norm(self.conv(self.embed(tokens).mT).mT)
        logits: Tensor = self.head(torch.tanh(self.square(hidden)))
        return logits


TARGETS = ("embed", "conv", "square", "head")
SPECS: dict[str, dict[str, Any]] = {
    "rslora": {"rslora": True, "rank_pattern": {"conv": 3}, "alpha_pattern": {"square": 7}},
    "dora": {"variant": "dora"},
    "lora_bias": {"variant": "lora_bias", "target_modules": ("square", "conv")},
    "vera": {"variant": "vera", "target_modules": ("square", "head"), "options": {"save_projection": False}},
    "adalora": {"variant": "adalora"},
    "whole": {"bias": "all", "modules_to_save": ("norm", "head"), "target_modules": ("square",)},
}


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("lora_bias", torch.float32), ("vera", torch.float32), ("adalora", torch.float32), ("whole", torch.float32),
        ("rslora", torch.bfloat16), ("dora", torch.bfloat16),
    ],
)  # fmt: skip
def test_merging_into_our_export_gives_the_bits_of_merge_and_export(
    tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = Toy().to(dtype).eval()
    spec = lorafx.LoraSpec(**{"r": 2, "alpha": 4, "target_modules": TARGETS, **SPECS[kind]})
    gm = lorafx.apply(model, spec, (torch.randint(0, 11, (2, 7)),))
    randomize(gm)
    lorafx.save_adapter(gm, tmp_path / "adapter")
    for folder in ("base", "exported", "merged"):
        (tmp_path / folder).mkdir()
    options: dict[str, Any] = {"external_data": True, "data_name": "weights.data"}
    lorafx.export_base(gm, tmp_path / "base" / "m.onnx", verify=False, **options)
    exported = lorafx.merge_and_export(gm, tmp_path / "exported" / "m.onnx", verify=False, **options)
    report = lorafx.merge_onnx(
        tmp_path / "base" / "m.onnx", tmp_path / "adapter", tmp_path / "merged" / "m.onnx", data_name="weights.data"
    )
    for name in ("m.onnx", "weights.data"):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "exported" / name).read_bytes(), name
    if kind == "whole":
        assert (
            report.provenance["adapters"]["default"]["sha256"] == exported.provenance["adapters"]["default"]["sha256"]
        )
    assert len(report.tensors) == len(lorafx.sites(gm)) + {"lora_bias": 2, "whole": 6}.get(kind, 0)


# What does not fit.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder.0.proj.lora_A.weight": torch.ones(2, 7)}, r"of \[6, 6\], and the adapter is for one of \[6, 7\]"),
        ({"encoder.0.proj.lora_A.weight": torch.ones(3, 6)}, "lora_B is .* does not go with"),
        ({"other.weight": torch.ones(2)}, "other.weight: the graph has no initializer 'other.weight'"),
        ({"encoder.0.proj.bias": torch.ones(6)}, "no initializer 'encoder.0.proj.bias', though .*optimize=False"),
        ({"encoder.0.proj.lora_B.bias": torch.ones(6)}, "has its lora_B_bias, which lora has not"),
        ({"encoder.0.proj.lora_B.weight": torch.full((6, 2), torch.nan)}, "lora_B holds NaN"),
        ({"encoder.0.proj.lora_B.weight": torch.full((6, 2), 1e38)}, "does not fit in torch.float32"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Tensor], message: str) -> None:
    tensors = {**lora(LAYERS), **change}
    if "1e38" in message or "does not fit in" in message:
        tensors["encoder.0.proj.lora_A.weight"] = torch.full((2, 6), 1e38)
    refused(tmp_path, chain(LAYERS), tensors, message)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 4}, "its tensors have rank 2, and adapter_config.json says 4"),
        ({"init_lora_weights": "pissa"}, "relative to what that left of the weights"),
        ({"target_parameters": ["encoder.0.proj.weight"]}, "adapts parameters of a module"),
        ({"use_dora": True}, "the file lacks its lora_magnitude_vector"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    refused(tmp_path, chain(LAYERS), lora(LAYERS), message, **config)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"target_modules": ["0.proj", "2.proj"]}, True),
        ({"target_modules": r".*\.[02]\.proj"}, True),
        ({"exclude_modules": ["1.proj"]}, True),
        ({"target_modules": ["proj"], "layers_to_transform": [0, 2], "layers_pattern": "encoder"}, True),
        ({"target_modules": "all-linear"}, False),
    ],
)
def test_what_the_settings_do_not_name_is_refused(config: dict[str, Any], names: bool, tmp_path: Path) -> None:
    """As lorafx.load_adapter does; PEFT leaves it out without a word. A proof holds to the same."""
    base = save(chain(LAYERS), tmp_path / "base.onnx")
    merged = tmp_path / "merged.onnx"
    lorafx.merge_onnx(base, save_adapter(tmp_path / "all", lora(LAYERS)), merged)
    adapter = save_adapter(tmp_path / "adapter", lora(LAYERS), **config)
    if not names:
        assert lorafx.verify_onnx(merged, base, adapter).passed
        return
    message = "not of this graph's adapter: site 'encoder.1.proj', which adapter_config.json does not name"
    with pytest.raises(lorafx.AdapterError, match=message):
        lorafx.verify_onnx(merged, base, adapter)
    with pytest.raises(lorafx.AdapterError, match=message) as refusal:
        lorafx.merge_onnx(base, adapter, tmp_path / "other.onnx")
    assert str(refusal.value).count("not of this") == 1
    assert not (tmp_path / "other.onnx").exists()


def test_a_whole_tensor_that_the_settings_do_not_name_is_the_bases(tmp_path: Path) -> None:
    base = save(chain(LAYERS), tmp_path / "base.onnx")
    kept = weights(base)["encoder.2.proj.weight.T"].mT
    whole: dict[str, Any] = {"modules_to_save": ["2.proj"]}
    for extra, config, passes in ((kept, {}, True), (kept + 1, whole, True), (kept + 1, {}, False)):
        tensors = lora(LAYERS[:2]) | {"encoder.2.proj.weight": extra}
        adapter = save_adapter(tmp_path / "adapter", tensors, **config)
        if passes:
            lorafx.merge_onnx(base, adapter, tmp_path / "merged.onnx")
            assert torch.equal(weights(tmp_path / "merged.onnx")["encoder.2.proj.weight.T"].mT, extra)
        else:
            with pytest.raises(lorafx.AdapterError, match=r"or adapter_config\.json does not name what it trains"):
                lorafx.merge_onnx(base, adapter, tmp_path / "merged.onnx")


def test_the_folder_of_a_named_adapter_is_said(tmp_path: Path) -> None:
    """PEFT puts an adapter that is not called default into a folder below."""
    base = save(chain(LAYERS), tmp_path / "base.onnx")
    (tmp_path / "saved").mkdir()
    inner = save_adapter(tmp_path / "saved" / "fr", lora(LAYERS))
    with pytest.raises(lorafx.AdapterError, match=r"saved: it holds no adapter itself, but in .*saved/fr, where PEFT"):
        lorafx.merge_onnx(base, tmp_path / "saved", tmp_path / "merged.onnx")
    lorafx.merge_onnx(base, inner, tmp_path / "merged.onnx")


def test_the_base_is_never_overwritten(tmp_path: Path) -> None:
    base = save(chain(LAYERS), tmp_path / "base.onnx")
    with pytest.raises(lorafx.ExportError, match="is the base, which would be lost"):
        lorafx.merge_onnx(base, save_adapter(tmp_path / "adapter", lora(LAYERS)), base)


# The file that is written.


@pytest.mark.parametrize("outside", [False, True], ids=["inside", "outside"])
def test_all_but_the_adapted_values_is_the_base_to_the_byte(tmp_path: Path, outside: bool) -> None:
    model = chain(LAYERS, dtype=torch.bfloat16)
    model.producer_name, model.doc_string = "someone", "kept"
    model.metadata_props.add(key="k", value="v")
    model.graph.node[0].metadata_props.add(key="scope", value="s")
    model.graph.initializer[1].doc_string = "of a tensor"
    model.graph.initializer.append(helper.make_tensor("unused", TensorProto.FLOAT, [2], [0.5, 2.0]))  # not raw
    base = save(model, tmp_path / "base.onnx", outside)
    tensors = lora(LAYERS[:2])
    lorafx.merge_onnx(base, save_adapter(tmp_path / "adapter", tensors), tmp_path / "merged.onnx")
    before, after = (onnx.load(p, load_external_data=False) for p in (base, tmp_path / "merged.onnx"))
    old, new = weights(base), weights(tmp_path / "merged.onnx")
    for index, path in enumerate(LAYERS):
        name = f"{path}.weight.T"
        exact = old[name].double() + (delta(tensors, path).mT if index < 2 else 0)
        assert torch.equal(new[name], exact.to(torch.bfloat16))
    for file in (before, after):
        for tensor in file.graph.initializer:
            if outside or tensor.name.startswith(LAYERS[:2]):
                for field in ("raw_data", "external_data", "data_location"):
                    tensor.ClearField(field)
    assert after.SerializeToString(deterministic=True) == before.SerializeToString(deterministic=True)
    data = [p.name for p in tmp_path.iterdir() if p.name.startswith("merged") and p.suffix == ".data"]
    assert len(data) == (1 if outside else 0)


def test_merging_twice_adds_both(tmp_path: Path) -> None:
    base = save(chain(LAYERS), tmp_path / "base.onnx")
    adapter = save_adapter(tmp_path / "adapter", lora(LAYERS))
    phases: list[tuple[str, float]] = []
    first = lorafx.merge_onnx(base, adapter, tmp_path / "1.onnx", progress=lambda *p: phases.append(p))
    lorafx.merge_onnx(tmp_path / "1.onnx", adapter, tmp_path / "2.onnx", verify=False)
    assert graph_difference(read_onnx(base), read_onnx(tmp_path / "2.onnx")) is None
    change = weights(tmp_path / "2.onnx")["encoder.0.proj.weight.T"] - weights(base)["encoder.0.proj.weight.T"]
    assert_close("fold", change, (2 * delta(lora(LAYERS), LAYERS[0]).mT).float())
    assert [p for p in phases if p[1] == 1.0 and p[0] != "write"][-1] == ("verify", 1.0)
    text = str(first)
    assert "merged       3 of 3 initializers" in text
    assert "encoder.1.proj.weight.T  name, transposed  [in, out]  6 x 6  float32  lora r=2, scaling 2" in text
    assert first.to_dict()["tensors"][0]["initializer"] == "encoder.0.proj.weight.T"


def test_the_report_says_where_the_file_comes_from(tmp_path: Path) -> None:
    """And not where it was made. The base's digest is that of its initializers, wherever the file keeps them."""
    model = chain(LAYERS)
    model.graph.initializer.append(helper.make_tensor("words", TensorProto.STRING, [2], [b"a", b"bc"]))
    inside = save(model, tmp_path / "base.onnx")
    model.graph.initializer.reverse()
    other = save(model, tmp_path / "other.onnx")
    adapter = save_adapter(tmp_path / "adapter", lora(LAYERS), base_model_name_or_path="/a/place/base")
    reports = [lorafx.merge_onnx(base, adapter, tmp_path / "merged.onnx") for base in (inside, other)]
    assert reports[0].provenance == reports[1].provenance
    origin = reports[0].provenance
    (spec,) = origin["adapters"]["default"]["specs"]
    assert (origin["lorafx"], spec["r"], spec["alpha"]) == (lorafx.__version__, 2, 4)
    reports[0].save_json(tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text()
    assert json.loads(text)["provenance"] == origin
    assert str(tmp_path) not in text
    assert "/a/place" not in text
    assert json.loads(text)["path"] == "merged.onnx"
    base = hashlib.sha256()
    for name, data in sorted((t.name, t) for t in onnx.load(inside).graph.initializer):
        words = b"".join(len(s).to_bytes(8, "little") + s for s in data.string_data)
        kind = TensorProto.DataType.Name(data.data_type)
        base.update(f"{name} {kind} {list(data.dims)}\n".encode() + (words or data.raw_data))
    assert origin["base_sha256"] == base.hexdigest()
    moved = save(chain(LAYERS, seed=1), tmp_path / "moved.onnx", outside=True)
    changed = lorafx.merge_onnx(moved, save_adapter(adapter, lora(LAYERS, seed=2)), tmp_path / "merged.onnx").provenance
    assert changed["base_sha256"] != origin["base_sha256"]
    assert changed["adapters"]["default"]["sha256"] != origin["adapters"]["default"]["sha256"]
    assert "base_sha256" not in lorafx.merge_onnx(moved, adapter, tmp_path / "m.onnx", verify=False).provenance


def test_weights_are_split_into_shards(tmp_path: Path) -> None:
    """A base of one file or of several becomes files of at most that size, with the same tensors."""
    base = save(chain(LAYERS, 32), tmp_path / "base.onnx", outside=True)  # 4 KiB a layer
    adapter = save_adapter(tmp_path / "adapter", lora(LAYERS, 32, 32))
    lorafx.merge_onnx(base, adapter, tmp_path / "one.onnx")
    report = lorafx.merge_onnx(base, adapter, tmp_path / "split.onnx", max_shard_size="5KiB")
    assert [Path(path).stat().st_size for path in report.data_paths] == [4096] * 3
    assert "of weights in 3 files)" in str(report)
    again = lorafx.merge_onnx(tmp_path / "split.onnx", adapter, tmp_path / "again.onnx", max_shard_size=2**14)
    assert len(again.data_paths) == 1
    one, split = weights(tmp_path / "one.onnx"), weights(tmp_path / "split.onnx")
    assert all(torch.equal(one[name], split[name]) for name in one)
    for options, message in (
        ({"max_shard_size": "some"}, "max_shard_size='some' is no size"),
        ({"max_shard_size": "5KiB", "data_name": "weights.data"}, "cannot all be called weights.data"),
        ({"max_shard_size": "5KiB", "external_data": False}, "leave out one of them"),
    ):
        with pytest.raises(lorafx.ExportError, match=message):
            lorafx.merge_onnx(base, adapter, tmp_path / "refused.onnx", **options)  # type: ignore[arg-type]
        assert not (tmp_path / "refused.onnx").exists()


_PEAK = """
import sys, threading, time
from pathlib import Path
import lorafx
def anonymous():
    text = Path("/proc/self/status").read_text()
    return 1024 * sum(int(l.split()[1]) for l in text.splitlines() if l.startswith(("RssAnon", "RssShmem")))
folder = Path(sys.argv[1])
lorafx.merge_onnx(folder / "small.onnx", folder / "small", folder / "first.onnx")  # loads what is loaded once
start, peak, running = anonymous(), [0], [True]
def watch():
    while running[0]:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
lorafx.merge_onnx(folder / "base.onnx", folder / "adapter", folder / "merged.onnx")
running[0] = False
print(peak[0] - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_a_merge_holds_a_few_pieces(tmp_path: Path) -> None:
    """Peak memory while 101 MB are merged and proved: at most 3 times the largest tensor and 24 MiB."""
    paths, width = [f"l.{i}" for i in range(6)], 2048
    for base, adapter, size in (("small.onnx", "small", 8), ("base.onnx", "adapter", width)):
        save(chain(paths, size), tmp_path / base, outside=True)
        magnitudes = {f"{path}.lora_magnitude_vector": torch.rand(size) for path in paths}
        save_adapter(tmp_path / adapter, lora(paths, size, size) | magnitudes, use_dora=True)
    environment = {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    command = [sys.executable, "-c", _PEAK, str(tmp_path)]
    ran = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert int(ran.stdout) <= 3 * width * width * 4 + 24 * 2**20
