"""Files that keep an nf4 base in 4 bits, or requantize it to int4: what they hold, and what ONNX Runtime computes."""

from __future__ import annotations

import weakref
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorafx
from conftest import randomize
from lorafx import LoraSpec
from lorafx.bases.nf4 import Nf4
from lorafx.bases.tensor import QuantizedTensor
from lorafx.errors import AdapterError, ExportError
from lorafx.export.int4 import dequantize_int4, quantize_int4
from lorafx.export.report import ExportReport
from lorafx.graph import CapturedModule
from several import filled

WIDTH = 40  # blocks of 64 run over the ends of rows
X = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(0))
OPERATORS = {"bnb4": "MatMulBnb4", "nbits": "MatMulNBits"}
#: The measured errors are 1e-7 to 1e-6 of the largest output; what ONNX Runtime does differently is the order of sums.
CLOSE = 1e-5


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 97, bias=False), nn.Linear(97, WIDTH)
        self.turned = Conv1D(WIDTH, WIDTH)  # as GPT-2 stores weights: [in, out]

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        h = self.turned(self.down(torch.tanh(self.up(h))) * torch.sigmoid(self.q(h)))
        result: Tensor = x + self.q(h)  # a second call of the same layer
        return result


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(x)
        return logits


@cache
def adapted(
    dtype: torch.dtype = torch.float32, rank: int = 3, base: str | None = "nf4", **options: Any
) -> CapturedModule:
    torch.manual_seed(0)
    x = (X if rank == 3 else X[0]).to(dtype)
    spec = LoraSpec(r=2, target_modules=["q", "turned"], base=base, modules_to_save=["head"])
    gm = lorafx.apply(Model().to(dtype), spec, (x,), seed=0)
    if base is not None:
        lorafx.quantize(gm, base, exclude_modules=["head"], **options)
    randomize(gm, 0.1)
    return gm.eval()


def packed(gm: CapturedModule) -> dict[str, QuantizedTensor]:
    return {n: p for n, p in gm.named_parameters() if isinstance(p, QuantizedTensor)}


def operators(path: Path | str) -> list[str]:
    return [node.op_type for node in ir.load(path).graph if node.domain == "com.microsoft"]


def assert_same_bytes(model: ir.Model, held: dict[str, QuantizedTensor]) -> None:
    for name, weight in held.items():
        codes, absmax = (model.graph.initializers[n].const_value for n in (name, f"{name}.absmax"))
        assert codes is not None
        assert absmax is not None
        assert codes.tobytes() == weight.packed.tensors["codes"].numpy().tobytes()
        assert absmax.tobytes() == Nf4().scales(weight.packed).numpy().tobytes()


def assert_measured(report: ExportReport, reference: str) -> None:
    rows = [row for row in report.parity if row.reference.startswith(reference)]
    assert len(rows) >= 3
    if report.precision == "float32":
        assert max(o.relative for row in rows for o in row.outputs) < CLOSE
    assert all(row.passed for row in rows)


@pytest.mark.parametrize(
    ("dtype", "rank"),
    [(torch.float32, 3), (torch.float32, 2), (torch.bfloat16, 3), (torch.float16, 2)],
    ids=["float32", "float32 Gemm", "bfloat16", "float16 Gemm"],
)
def test_a_file_has_the_bases_bytes(dtype: torch.dtype, rank: int, tmp_path: Path) -> None:
    gm = adapted(dtype, rank)
    dense = lorafx.export_base(gm, tmp_path / "dense.onnx", verify=False, external_data=True)
    report = lorafx.export_base(gm, tmp_path / "base.onnx", weight_format="bnb4", external_data=True)
    assert_measured(report, "unmerged")
    model, held = ir.load(tmp_path / "base.onnx"), packed(gm)
    assert len(held) == 16
    assert_same_bytes(model, held)
    nodes = [node for node in model.graph if node.op_type == "MatMulBnb4"]
    assert len(nodes) == 20  # q is called twice
    assert {"layers.0.q/MatMulBnb4", "layers.0.q/MatMulBnb4_1", "layers.3.down/MatMulBnb4"} <= {n.name for n in nodes}
    casts = {value.dtype for node in nodes for value in (node.inputs[0], node.outputs[0]) if value is not None}
    assert casts == {ir.DataType.FLOAT}
    sizes = {n: w.numel() for n, w in held.items()}
    saved = sum(count * dtype.itemsize for count in sizes.values()) - sum(
        -(-c // 2) + 4 * -(-c // 64) for c in sizes.values()
    )
    assert abs(dense.data_bytes - report.data_bytes - saved) < 64 * 2 * len(held)  # gaps between tensors
    assert "16 weights for MatMulBnb4" in str(report)


@pytest.mark.parametrize("weight_format", OPERATORS)
def test_what_is_merged_is_the_twin_of_the_base(weight_format: Any, tmp_path: Path) -> None:
    """To the byte, under a fixed name of the weights; and exporting again gives the same."""
    gm = adapted()
    requantize = {"requantize": True} if weight_format == "bnb4" else {}
    settings: dict[str, Any] = {"weight_format": weight_format, "data_name": "weights.data"}
    for folder in ("base", "tuned", "again"):
        (tmp_path / folder).mkdir()
    base = lorafx.export_base(gm, tmp_path / "base" / "m.onnx", **settings, verify=False)
    tuned = lorafx.merge_and_export(gm, tmp_path / "tuned" / "m.onnx", **settings, **requantize)
    again = lorafx.merge_and_export(gm, tmp_path / "again" / "m.onnx", **settings, **requantize, verify=False)
    assert base.onnx_sha256 == tuned.onnx_sha256 == again.onnx_sha256
    weights = [Path(r.data_paths[0]).read_bytes() for r in (base, tuned, again)]
    assert weights[0] != weights[1] == weights[2]
    assert set(operators(tuned.path)) == {OPERATORS[weight_format]}
    assert "in the base model's export" in tuned.checks["same graph"]
    found = lorafx.diff_onnx(base.path, tuned.path)
    assert found.same_structure
    changed = {t.name for t in found.tensors}
    assert {"layers.0.q.weight", "layers.3.turned.weight"} <= changed
    assert "layers.0.up.weight" not in changed


def test_a_sum_that_is_not_requantized_stays_dense(tmp_path: Path) -> None:
    report = lorafx.merge_and_export(adapted(), tmp_path / "m.onnx", weight_format="bnb4")
    assert_measured(report, "unmerged")
    assert len(operators(report.path)) == 8  # up and down
    (note,) = (w for w in report.warnings if "dense" in w)
    assert "layers.0.q.weight" in note
    assert "requantize=True" in note


def test_requantizing_to_int4_is_measured(tmp_path: Path) -> None:
    gm = adapted()
    report = lorafx.merge_and_export(gm, tmp_path / "m.onnx", weight_format="nbits")
    assert set(report.requantized) == set(packed(gm))
    assert all(0.04 < error < 0.12 for error in report.requantized.values())
    assert_measured(report, "requantized")
    away = [o.relative for row in report.parity if row.reference == "unmerged" for o in row.outputs]
    assert len(away) >= 3
    assert 1e-3 < max(away) < 0.5
    assert "to int4 in blocks of 32" in report.checks["requantized"]
    merged = lorafx.merge(gm)
    for name, error in report.requantized.items():
        weight = merged.get_parameter(name).dequantize() if name in packed(merged) else merged.get_parameter(name)
        matrix = weight.mT if ".turned." in name else weight
        matrix = matrix.detach().contiguous()
        values = dequantize_int4(*quantize_int4(matrix, 32), matrix.shape[1])
        assert float((values - matrix).norm() / matrix.norm()) == pytest.approx(error, rel=1e-4)


def test_a_file_in_another_precision(tmp_path: Path) -> None:
    """MatMulBnb4 does not round to bfloat16 what torch does: the tolerance is bfloat16's, and says so."""
    gm = adapted(torch.bfloat16)
    wide = lorafx.export_base(gm, tmp_path / "m.onnx", weight_format="bnb4", dtype="fp32")
    assert (wide.precision, wide.rtol) == ("float32", 5e-2)
    exact = lorafx.merge_and_export(gm, tmp_path / "n.onnx", weight_format="nbits", dtype="fp32")
    assert_measured(exact, "requantized")


@pytest.mark.parametrize(("dtype", "rank"), [(torch.float32, 3), (torch.float16, 2)], ids=["float32", "float16 Gemm"])
def test_tasks_share_the_packed_base(rank: int, dtype: torch.dtype, tmp_path: Path) -> None:
    gm = lorafx.apply(
        Model().to(dtype), LoraSpec(r=2, target_modules=["q"], base="nf4"), ((X if rank == 3 else X[0]).to(dtype),)
    )
    lorafx.quantize(gm, exclude_modules=["head"])
    lorafx.add_adapter(gm, LoraSpec(r=3, variant="dora", target_modules=["q", "down", "turned"]), "dora")
    lorafx.add_adapter(gm, LoraSpec(r=1, target_modules=["q"], modules_to_save=["layers.0.up"]), "whole")
    filled(gm, 0.3).eval()
    report = lorafx.export_multi(gm, tmp_path / "m.onnx", weight_format="bnb4")
    assert len(operators(report.path)) == 19  # all but layers.0.up
    shared = {n: w for n, w in packed(gm).items() if not n.startswith("layers.0.up.")}
    assert len(shared) == 15
    assert_same_bytes(ir.load(report.path), shared)
    assert any("layers.0.up.weight" in w and "an adapter has a version of its own" in w for w in report.warnings)
    assert {"default", "dora", "whole"} == set(report.tasks)
    if dtype is torch.float32:
        runs = [*report.base, *(p for task in report.tasks.values() for p in task.parity)]
        assert len(runs) >= 12
        assert max(o.relative for p in runs for o in p.outputs) < CLOSE
    x = (X if rank == 3 else X[0]).to(dtype)
    session = lorafx.AdapterSession(tmp_path / "m.onnx")
    (name,) = report.inputs
    outputs = [session.run({name: x.numpy()}, adapter=task)["output"] for task in (None, "dora", "whole", None)]
    assert (outputs[0] == outputs[3]).all()
    assert min(abs(outputs[0] - outputs[1]).max(), abs(outputs[1] - outputs[2]).max()) > 0.02  # twenty units of float16


def test_other_tools_on_packed_files(tmp_path: Path) -> None:
    gm = adapted()
    lorafx.save_adapter(gm, tmp_path / "adapter")
    base, merged = (tmp_path / n for n in ("base.onnx", "merged.onnx"))
    lorafx.export_base(gm, base, weight_format="bnb4", verify=False)
    lorafx.merge_and_export(gm, merged, weight_format="bnb4", requantize=True, verify=False)
    with pytest.raises(AdapterError, match=r"quantized \(MatMulBnb4 .*quantize the result"):
        lorafx.merge_onnx(base, tmp_path / "adapter", tmp_path / "new.onnx")
    with pytest.raises(AdapterError, match=r"quantized \(MatMulBnb4 "):
        lorafx.verify_onnx(merged, base, tmp_path / "adapter")
    assert not (tmp_path / "new.onnx").exists()


def test_weights_that_have_no_operator_stay_dense(tmp_path: Path) -> None:
    """Blocks that ONNX Runtime does not take, and int8: written dense, with a note, beside those that are packed."""
    torch.manual_seed(0)
    gm = lorafx.apply(Model(), LoraSpec(r=2, target_modules=["q"], base="nf4"), (X,)).eval()
    lorafx.quantize(gm, "nf4", target_modules=["up"], block_size=512)
    lorafx.quantize(gm, "int8", target_modules=["down"])
    report = lorafx.export_base(gm, tmp_path / "m.onnx", weight_format="bnb4")
    assert_measured(report, "unmerged")
    assert len(operators(report.path)) == 8
    assert any("layers.0.up.weight" in w and "blocks of 512" in w for w in report.warnings)
    assert any("layers.0.down.weight" in w and "stored as int8" in w for w in report.warnings)
    both = lorafx.export_base(gm, tmp_path / "n.onnx", weight_format="nbits")
    assert len(operators(both.path)) == 16


@pytest.mark.parametrize("base", [None, "int8"])
def test_nothing_to_pack(base: str | None, tmp_path: Path) -> None:
    gm = adapted(base=base)
    message = {
        None: r"no linear layer whose weight is stored as nf4\. Quantize the base \(LoraSpec\(base='nf4'\)",
        "int8": r"all would be dense \(.*: stored as int8, and MatMulBnb4 takes nf4\)",
    }[base]
    for export in (lorafx.export_base, lorafx.export_multi):
        with pytest.raises(ExportError, match=message):
            export(gm, tmp_path / "m.onnx", weight_format="bnb4")  # type: ignore[operator]
    if base is None:
        with pytest.raises(ExportError, match="no linear layer whose weight is quantized"):
            lorafx.merge_and_export(gm, tmp_path / "m.onnx", weight_format="nbits")
    assert not list(tmp_path.iterdir())


def test_all_merged_is_dense(tmp_path: Path) -> None:
    torch.manual_seed(0)
    gm = lorafx.apply(Model(), LoraSpec(r=2, base="nf4"), (X,)).eval()
    with pytest.raises(ExportError, match=r"all would be dense .*requantize=True stores it as nf4 again\): change"):
        lorafx.merge_and_export(gm, tmp_path / "m.onnx", weight_format="bnb4")
    assert not list(tmp_path.iterdir())


def test_formats_that_are_none(tmp_path: Path) -> None:
    gm = adapted()
    for export in (lorafx.export_base, lorafx.merge_and_export, lorafx.export_multi):
        with pytest.raises(ExportError, match="weight_format='int4' is none of 'dense', 'bnb4', 'nbits'"):
            export(gm, tmp_path / "m.onnx", weight_format="int4")  # type: ignore[operator]
    with pytest.raises(ExportError, match="to other values than those that adapters were trained on"):
        lorafx.export_multi(gm, tmp_path / "m.onnx", weight_format="nbits")
    assert not list(tmp_path.iterdir())


def test_a_dense_file_is_written_a_weight_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a packed base: a weight is dense while its pieces are written, of which three wait at most."""
    gm = adapted()
    alive: list[weakref.ref[Tensor]] = []
    most = [0]
    read = QuantizedTensor.dequantize

    def counted(weight: QuantizedTensor) -> Tensor:
        found = read(weight)
        alive[:] = [r for r in alive if r() is not None]
        alive.append(weakref.ref(found))
        most[0] = max(most[0], len(alive))
        return found

    monkeypatch.setattr(QuantizedTensor, "dequantize", counted)
    report = lorafx.export_base(gm, tmp_path / "m.onnx", external_data=True, verify=False)
    assert 0 < most[0] <= 4 < len(packed(gm))
    found = {t.name: t for t in onnx.load(report.path).graph.initializer}
    for name, weight in packed(gm).items():
        turned = name not in found
        values = torch.from_numpy(onnx.numpy_helper.to_array(found[f"{name}.T" if turned else name]).copy())
        assert torch.equal(values.mT if turned else values, read(weight))
