"""Mixtures of experts as transformers computes them by default: rows that are sorted by expert, in ONNX a loop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.integrations import moe

import lorafx
from conftest import randomize
from lorafx import LoraSpec
from lorafx.export import repeat, translate
from lorafx.graph import CapturedModule
from lorafx.ir import Stage
from lorafx.passes.capture import capture

IDS = {"input_ids": torch.arange(24).reshape(2, 12) % 20}


def mixtral(layers: int) -> nn.Module:
    torch.manual_seed(0)
    config = hf.MixtralConfig(
        vocab_size=32,
        hidden_size=24,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=32,
    )
    assert config._experts_implementation in (None, "grouped_mm")
    return hf.MixtralForCausalLM(config).eval()


class Grouped(nn.Module):
    """The product alone: torch's in bfloat16, else that of transformers."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(5, 16, 8).to(dtype))

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        return moe._grouped_mm(rows, self.weights, offsets)


class Shared(Grouped):
    """Each expert has as many rows as the others."""

    def forward(self, rows: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(rows, (torch.arange(1, 6) * rows.shape[0] // 5).to(torch.int32))


def captured(model: nn.Module, **given: Tensor) -> CapturedModule:
    gm = capture(model.eval(), given, eval_only=True)
    gm.meta["stage"] = Stage.CAPTURED
    return gm


def test_rows_meet_their_experts(tmp_path: Path) -> None:
    """Experts without rows, and rows without expert, which give zeros, among them."""
    torch.manual_seed(0)
    rows, offsets = torch.randn(9, 16), torch.tensor([2, 4, 5, 6, 9], dtype=torch.int32)
    model = Grouped(torch.float32)
    gm = captured(model, rows=rows, offsets=offsets)
    lorafx.export_base(gm, tmp_path / "m.onnx", verify=False)  # which would take any number of rows with these offsets
    session = ort.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for stops in ([2, 4, 5, 6, 9], [0, 0, 9, 9, 9], [9, 9, 9, 9, 9], [0, 0, 0, 0, 0], [0, 3, 3, 7, 7]):
        (found,) = session.run(None, {"rows": rows.numpy(), "offsets": np.array(stops, np.int32)})
        expected, start = torch.zeros(9, 8, dtype=torch.float64), 0
        for weight, stop in zip(model.weights.detach().double(), stops, strict=True):
            expected[start:stop], start = rows[start:stop].double() @ weight, stop
        assert np.allclose(found, expected.numpy(), atol=1e-5)


def test_the_product_that_torch_has_for_bfloat16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    gm = captured(Shared(torch.bfloat16), rows=torch.randn(9, 16).bfloat16())
    assert any(node.target is torch.ops.aten._grouped_mm.default for node in gm.graph.nodes)
    report = lorafx.export_base(gm, tmp_path / "m.onnx")
    assert report.precision == "bfloat16"
    assert report.parity
    assert all(row.passed and row.refused is None for row in report.parity)


def test_a_mixture_goes_the_whole_way(tmp_path: Path) -> None:
    """Experts that were trained are merged; what a step of generation computes is compared, too."""
    spec = LoraSpec(r=2, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    gm = lorafx.apply(mixtral(2), spec, IDS, seed=0).eval()
    randomize(gm, 0.1)
    merged = lorafx.merge_and_export(gm, tmp_path / "m.onnx", data_name="m.data")
    assert len(merged.parity) >= 3
    assert "Loop" in {node.op_type for node in onnx.load(tmp_path / "m.onnx", load_external_data=False).graph.node}
    (tmp_path / "base").mkdir()
    base = lorafx.export_base(gm, tmp_path / "base" / "m.onnx", data_name="m.data")
    assert base.onnx_sha256 == merged.onnx_sha256
    step = lorafx.merge_and_export(gm, tmp_path / "step.onnx", kv_cache=True)
    assert "same tokens" in step.checks


def test_equal_layers_are_translated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And give the bytes that translating each of them gives."""
    gm = capture(mixtral(5), IDS, eval_only=True)
    gm.meta["stage"] = Stage.CAPTURED
    unrolled = []

    def unroll(*arguments: object) -> bool:
        unrolled.append(repeat.unroll(*arguments))  # type: ignore[arg-type]
        return unrolled[-1]

    monkeypatch.setattr(translate, "unroll", unroll)
    short = lorafx.export_base(gm, tmp_path / "m.onnx", verify=False)
    assert unrolled == [True]
    monkeypatch.setattr(translate, "find_repeats", lambda *arguments: [])
    assert lorafx.export_base(gm, tmp_path / "m.onnx", verify=False).onnx_sha256 == short.onnx_sha256
