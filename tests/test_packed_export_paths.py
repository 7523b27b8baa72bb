"""Packed bases on less usual ways to a file: by torch.export, from shards, of several adapters, in little memory."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lorafx
from dense_weights import most_dense
from lorafx import LoraSpec, MergeError
from lorafx.bases import FORMATS
from lorafx.bases.tensor import QuantizedTensor
from lorafx.export.int4 import Int4Tensor, dequantize_int4, quantize_int4
from lorafx.export.report import ExportReport
from lorafx.graph import CapturedModule
from lorafx.shards import INDEX_NAME
from several import filled
from tolerances import assert_close
from zoo import FAMILIES

LLAMA = FAMILIES["llama"]
OPERATORS = {"dense": None, "bnb4": "MatMulBnb4", "nbits": "MatMulNBits"}


def mlp(width: int = 96) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 80), nn.Tanh(), nn.Linear(80, 33)).eval()


def operators(path: Path | str) -> list[str]:
    return [node.op_type for node in ir.load(path).graph if node.domain == "com.microsoft"]


def assert_close_to_torch(report: ExportReport) -> None:
    rows = [row for row in report.parity if row.reference != "unmerged" or not report.requantized]
    assert len(rows) >= 3
    assert max(o.relative for row in rows for o in row.outputs) < 1e-5


# Graphs that torch.export is asked to translate.


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(
    ("base", "weight_format"),
    [("nf4", "dense"), ("nf4", "bnb4"), ("nf4", "nbits"), ("int8", "dense"), ("int8", "nbits")],
)
def test_a_graph_that_was_traced_without_inputs(base: str, weight_format: Any, merged: bool, tmp_path: Path) -> None:
    gm = filled(lorafx.apply(mlp(), LoraSpec(r=4, base=base, target_modules=["0", "2"])), 0.1).eval()
    settings = {"example_inputs": (torch.randn(4, 96),), "weight_format": weight_format}
    if merged:
        report = lorafx.merge_and_export(gm, tmp_path / "m.onnx", requantize=weight_format == "bnb4", **settings)
    else:
        report = lorafx.export_base(gm, tmp_path / "m.onnx", **settings)
    assert_close_to_torch(report)
    assert operators(report.path) == [OPERATORS[weight_format]] * 2 * (weight_format != "dense")


@cache
def with_labels() -> CapturedModule:
    inputs = LLAMA.inputs()
    given = {**inputs, "labels": inputs["input_ids"]}
    return filled(lorafx.apply(LLAMA.build(), LoraSpec(r=4, base="nf4"), given), 0.1).eval()


@pytest.mark.parametrize(("weight_format", "requantize"), [("dense", False), ("bnb4", True), ("nbits", False)])
def test_a_file_with_the_loss(weight_format: Any, requantize: bool, tmp_path: Path) -> None:
    report = lorafx.merge_and_export(
        with_labels(), tmp_path / "m.onnx", keep_loss=True, weight_format=weight_format, requantize=requantize
    )
    assert "loss" in report.outputs
    assert_close_to_torch(report)
    assert set(operators(report.path)) == ({OPERATORS[weight_format]} if weight_format != "dense" else set())


# Checkpoints in several files.


@cache
def checkpoint(folder: Path) -> tuple[Path, Path, Path]:
    """The same quantized Llama in one file and in three, each layer's tensors spread over these; and an adapter."""
    model: Any = LLAMA.build()
    form, tensors = FORMATS["nf4"], dict[str, Tensor]()
    for name, tensor in model.state_dict().items():
        layer = name.removesuffix("weight")
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear) and not name.startswith("lm_head"):
            held = form.state_dict(form.quantize(tensor))
            tensors |= {layer + key: value.clone() for key, value in held.items()}
        else:
            tensors[name] = tensor
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    places = {name: f"model-{at % 3}.safetensors" for at, name in enumerate(sorted(tensors))}
    one, several, adapter = (folder / name for name in ("one", "several", "adapter"))
    model.config.architectures = [type(model).__name__]
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    for path in (one, several):
        model.config.save_pretrained(path)
    save_file(tensors, one / "model.safetensors")
    for file in set(places.values()):
        save_file({n: t for n, t in tensors.items() if places[n] == file}, several / file)
    (several / INDEX_NAME).write_text(json.dumps({"weight_map": places}))
    gm = lorafx.apply(lorafx.load_pretrained(one), LoraSpec(r=3), LLAMA.inputs(), seed=0)
    lorafx.save_adapter(filled(gm, 0.1), adapter)
    return one, several, adapter


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return checkpoint(tmp_path_factory.mktemp("checkpoint"))


def test_a_layer_s_parts_may_be_in_several_files(shared: tuple[Path, Path, Path]) -> None:
    one, several, _ = shared
    places = json.loads((several / INDEX_NAME).read_text())["weight_map"]
    weight = "model.layers.0.mlp.up_proj.weight"
    assert len({file for name, file in places.items() if name.startswith(weight)}) > 1
    expected = dict(lorafx.load_pretrained(one).named_parameters())
    found = dict(lorafx.load_pretrained(several).named_parameters())
    assert found.keys() == expected.keys()
    assert sum(isinstance(p, QuantizedTensor) for p in found.values()) == 14
    for name, parameter in found.items():
        assert type(parameter) is type(expected[name])
        assert torch.equal(parameter, expected[name])


def test_an_export_of_several_files_is_that_of_one(shared: tuple[Path, Path, Path], tmp_path: Path) -> None:
    one, several, adapter = shared
    files = []
    for folder in (one, several):
        (tmp_path / folder.name).mkdir()
        path = tmp_path / folder.name / "m.onnx"
        report = lorafx.export_checkpoint(
            folder, folder, adapter, path, example_inputs=LLAMA.inputs(), data_name="w.data",
            weight_format="bnb4", requantize=True, verify=folder is several,
        )  # fmt: skip
        assert operators(path) == ["MatMulBnb4"] * 14
        files.append((report.onnx_sha256, path.with_name("w.data").read_bytes()))
    assert files[0] == files[1]
    assert report.base == "dequantized, requantized"
    assert report.deviation is not None
    assert 0.01 < report.deviation.largest < 0.2
    assert_close_to_torch(report)


def test_a_checkpoint_is_merged_into_its_original_weights(shared: tuple[Path, Path, Path], tmp_path: Path) -> None:
    one, _, adapter = shared
    original = LLAMA.build()
    report = lorafx.export_checkpoint(
        one, one, adapter, tmp_path / "m.onnx", example_inputs=LLAMA.inputs(), base="original", original=original
    )
    gm = lorafx.apply(lorafx.load_pretrained(one), LoraSpec(r=3), LLAMA.inputs())
    lorafx.load_adapter(gm, adapter)
    memory = lorafx.merge_and_export(
        gm.eval(), tmp_path / "n.onnx", base="original", original=original, verify=False, external_data=False
    )
    held = [ir.load(path).graph.initializers for path in (report.path, memory.path)]
    assert held[0].keys() == held[1].keys()
    for name, value in held[0].items():
        pair = value.const_value, held[1][name].const_value
        assert pair[0] is not None
        assert pair[1] is not None
        assert np.array_equal(pair[0].numpy(), pair[1].numpy())
    assert report.base == "original"
    with pytest.raises(MergeError, match="adapter_dir is None"):
        lorafx.export_checkpoint(one, one, None, tmp_path / "no.onnx", base="original", original=original)
    assert not (tmp_path / "no.onnx").exists()


# Several adapters.


def test_dora_and_pissa_on_a_packed_base(tmp_path: Path) -> None:
    """PiSSA's share of the weight is that of the base: what is in the file is the adapter beside the whole base."""
    x = torch.randn(3, 96)
    gm = lorafx.apply(mlp(), LoraSpec(r=2, target_modules=["0", "2"], base="nf4"), (x,))
    lorafx.add_adapter(gm, LoraSpec(r=3, variant="dora", target_modules=["0", "2"]), "dora")
    lorafx.add_adapter(gm, LoraSpec(r=4, target_modules=["2"], init="pissa"), "pissa")
    filled(gm, 0.3).eval()
    report = lorafx.export_multi(gm, tmp_path / "m.onnx", weight_format="bnb4")
    assert set(report.tasks) == {"default", "dora", "pissa"}
    assert operators(report.path) == ["MatMulBnb4"] * 2
    assert not any("dense" in warning for warning in report.warnings)
    session = lorafx.AdapterSession(tmp_path / "m.onnx")
    (name,) = report.inputs
    for task in report.tasks:
        lorafx.set_adapter(gm, task)
        (found,) = session.run({name: x.numpy()}, adapter=task).values()
        with torch.no_grad():
            assert_close("model", torch.from_numpy(found), gm(x))


# docs/qlora.md.


def test_the_page_on_qlora_runs() -> None:
    text = (Path(__file__).parents[1] / "docs" / "qlora.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert blocks
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(block, namespace)
    plain, started, model, x = (namespace[name] for name in ("gm", "started", "model", "x"))
    for gm in (plain, started):
        assert sum(isinstance(p, QuantizedTensor) for p in gm.parameters()) == 2
    with torch.no_grad():
        off = [float((gm(x) - model(x)).norm()) for gm in (plain, started)]
    assert 0 < off[1] < off[0]


# Memory.


WIDTH = 1024
#: What weights are handled in, made small enough here that a tensor of a weight's size is one that is held whole.
PIECES = {"lorafx.export.weights.PIECE": 2**16, "lorafx.passes.fold.TILE": 64, "lorafx.passes.deviation.TILE": 64}


@cache
def wide() -> CapturedModule:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3)))
    gm = lorafx.apply(model, LoraSpec(r=2, base="nf4", target_modules=["0", "1"]), (torch.randn(2, 3, WIDTH),))
    lorafx.quantize(gm, "nf4")
    return filled(gm, 0.02).eval()


@cache
def requantized() -> CapturedModule:
    return lorafx.merge(wide(), requantize=True)


PATHS: dict[str, tuple[float, Callable[[Path], object]]] = {
    "dense": (1, lambda path: lorafx.merge_and_export(wide(), path, external_data=True)),
    "bnb4": (0, lambda path: lorafx.export_base(wide(), path, weight_format="bnb4")),
    "bnb4, requantized": (
        1,
        lambda path: lorafx.merge_and_export(wide(), path, weight_format="bnb4", requantize=True, verify=False),
    ),
    "bnb4, requantized and checked": (
        1,
        lambda path: lorafx.merge_and_export(wide(), path, weight_format="bnb4", requantize=True),
    ),
    "deviation": (0, lambda path: lorafx.merge_deviation(wide(), requantized())),
    "nbits": (1, lambda path: lorafx.merge_and_export(wide(), path, weight_format="nbits")),
    "nbits, unchecked": (0, lambda path: lorafx.merge_and_export(wide(), path, weight_format="nbits", verify=False)),
    "requantized in torch": (1, lambda path: lorafx.merge(wide(), requantize=True)),
}


@pytest.mark.parametrize("case", PATHS)
def test_at_most_one_weight_is_dense(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in PIECES.items():
        monkeypatch.setattr(name, size)
    limit, call = PATHS[case]
    requantized()
    assert most_dense(lambda: call(tmp_path / "m.onnx"), 4 * WIDTH**2) <= limit


def test_dense_weights_are_counted() -> None:
    assert most_dense(lambda: lorafx.merge(wide()), 4 * WIDTH**2) == 2


def test_int4_values() -> None:
    """Each is within a step of what it stands for; rows do not depend on each other; a graph's tensor is the same."""
    rows = torch.randn(5, 70)
    codes, scales, zeros = quantize_int4(rows, 32)
    assert (codes.shape, scales.shape, zeros.shape) == ((5, 3, 16), (5, 3), (5, 2))
    values = dequantize_int4(codes, scales, zeros, 70)
    steps = scales.repeat_interleave(32, 1)[:, :70]
    assert ((values - rows).abs() <= steps * 1.0001).all()  # half a step, and as much for a zero point that is rounded
    again = [torch.cat(parts) for parts in zip(quantize_int4(rows[:2], 32), quantize_int4(rows[2:], 32), strict=True)]
    assert all(torch.equal(one, other) for one, other in zip(again, (codes, scales, zeros), strict=True))
    x = torch.randn(4, 70)
    held, turned = (Int4Tensor((codes, scales, zeros), 70, flag) for flag in (False, True))
    assert torch.equal(nn.functional.linear(x, held), nn.functional.linear(x, values))
    assert torch.equal(x @ turned, x @ values.t())
    assert torch.equal(held.bfloat16().float().dequantize(), values)
