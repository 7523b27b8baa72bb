"""Exports in another precision are what the model, converted first, gives: wherever its code has its dtypes from."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import onnxruntime as ort
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import lorafx
from conftest import randomize
from lorafx import ExportError, LoraSpec
from lorafx.export.export import export_base, merge_and_export
from lorafx.graph import CapturedModule

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def widened(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).square()


class Casts(nn.Module):
    """Two layers, and casts between them."""

    acc = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def between(self, h: Tensor) -> Tensor:
        return h

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(self.between(self.one(x)))
        return out


class InHelper(Casts):
    """The dtype is an argument of a function that is no ``forward``."""

    def between(self, h: Tensor) -> Tensor:
        return widened(h, torch.float32).to(h.dtype) + widened(h, h.dtype)


class Held(Casts):
    """The dtype is an attribute, which may be anything."""

    def between(self, h: Tensor) -> Tensor:
        return h.to(self.acc).square().to(h.dtype)


class OneLine(Casts):
    """One line names a dtype and asks for one; a statement of several lines does."""

    def between(self, h: Tensor) -> Tensor:
        h = h.float().exp().to(h.dtype)
        return h.to(
            dtype=torch.float32,
        ).tanh().to(
            h.dtype,
        )  # fmt: skip


class TypeAs(Casts):
    def between(self, h: Tensor) -> Tensor:
        return h.float().square().type_as(h)


class AsWide(Casts):
    """The dtype asked for is that of a value which is in float32 by name."""

    def between(self, h: Tensor) -> Tensor:
        wide = h.float()
        return (wide * h.to(wide.dtype).exp()).to(h.dtype)


class Clamped(Casts):
    """Does more in float16, and has a constant which is the dtype's own."""

    def between(self, h: Tensor) -> Tensor:
        if h.dtype == torch.float16:
            h = h.clamp(max=1000.0)
        return torch.where(h > 0, h, torch.tensor(torch.finfo(h.dtype).min, dtype=h.dtype)).tanh()


class Looked(Casts):
    """What it does in float16 depends on values, as BART's clamp does: no graph has it."""

    def between(self, h: Tensor) -> Tensor:
        if h.dtype == torch.float16 and not torch.isfinite(h).all():
            h = h.clamp(-1000.0, 1000.0)
        return h.float().square().to(h.dtype).masked_fill(h > 1, torch.finfo(h.dtype).min).tanh()


def adapted(model: Casts) -> CapturedModule:
    gm = lorafx.apply(model.eval(), LoraSpec(r=2, target_modules=["one"]), (X,), seed=0).eval()
    randomize(gm)
    return gm


@pytest.mark.parametrize("kind", [InHelper, Held, OneLine, TypeAs, AsWide, Clamped])
def test_the_graph_is_that_of_the_converted_module(kind: type[Casts], tmp_path: Path) -> None:
    model = kind()
    half = copy.deepcopy(model).half()
    for folder in ("cast", "direct"):
        (tmp_path / folder).mkdir()
    cast = merge_and_export(adapted(model), tmp_path / "cast" / "m.onnx", dtype="fp16", data_name="w")
    direct = export_base(half, tmp_path / "direct" / "m.onnx", example_inputs=X.half(), data_name="w", verify=False)
    assert cast.onnx_sha256 == direct.onnx_sha256
    assert len(cast.parity) >= 3


def test_what_cannot_be_captured_in_float16_is_left_out(tmp_path: Path) -> None:
    report = merge_and_export(adapted(Looked()), tmp_path / "m.onnx", dtype="fp16")
    assert len(report.parity) >= 3
    assert any("in float16 only cannot be captured, and is left out" in w and "isfinite" in w for w in report.warnings)
    session = ort.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    assert {v.type for v in (*session.get_inputs(), *session.get_outputs())} == {"tensor(float16)"}


def test_a_family_that_casts_in_helpers(tmp_path: Path) -> None:
    """GPT-J's rotary embedding and attention are functions, which torch's traces do not name."""
    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4, "n_positions": 16}
    model = hf.GPTJForCausalLM(hf.GPTJConfig(**sizes)).eval()
    ids = {"input_ids": torch.arange(12).reshape(2, 6)}
    gm = lorafx.apply(model, LoraSpec(r=2, target_modules=["q_proj"]), ids, seed=0).eval()
    randomize(gm)
    for folder in ("cast", "direct"):
        (tmp_path / folder).mkdir()
    cast = merge_and_export(gm, tmp_path / "cast" / "m.onnx", dtype="fp16", data_name="w")
    half = copy.deepcopy(model)
    for parameter in half.parameters():
        parameter.data = parameter.data.half()
    direct = export_base(half, tmp_path / "direct" / "m.onnx", example_inputs=ids, data_name="w", verify=False)
    assert cast.onnx_sha256 == direct.onnx_sha256
    assert len(cast.parity) >= 3


def test_a_graph_without_its_code_is_refused(tmp_path: Path) -> None:
    again = pickle.loads(pickle.dumps(adapted(InHelper())))  # noqa: S301  # made here
    with pytest.raises(ExportError, match=r"dtype=torch\.float16 traces .* a pickle leaves it out\. Save the adapter"):
        merge_and_export(again, tmp_path / "m.onnx", dtype="fp16")


def test_a_graph_that_was_edited_is_refused(tmp_path: Path) -> None:
    """The code does not have the edit, and the file would not."""
    gm = lorafx.merge(adapted(InHelper()))
    (last,) = (n for n in gm.graph.output_node().all_input_nodes)
    with gm.graph.inserting_after(last):
        sin = gm.graph.call_function(torch.ops.aten.sin.default, (last,))
    last.replace_all_uses_with(sin, lambda user: user is not sin)
    gm.recompile()
    with pytest.raises(ExportError, match=r"'sin_?[a-z_0-9]*' has no counterpart"):
        export_base(gm, tmp_path / "m.onnx", dtype="fp16", verify=False)
    assert not [*tmp_path.iterdir()]
