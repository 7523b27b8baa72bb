"""Casts to another precision that the model's code decides, sizes spelled out, and bases of modules and of untied
weights."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import lorafx
from conftest import randomize
from lorafx import ExportError, LoraSpec
from lorafx.export.export import export_base, merge_and_export
from lorafx.graph import CapturedModule


class Named(nn.Module):
    """Computes in a dtype that a variable names, and returns in one that another asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)
        self.b = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        acc = torch.float32
        asked = x.dtype
        h = self.a(x).to(acc)
        out: Tensor = self.b((h * ((h * h).mean(-1, keepdim=True) + 1).rsqrt()).to(asked))
        return out


class Held(Named):
    """Computes in a dtype that an attribute holds, which may be anything."""

    acc = torch.float32

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).to(self.acc)
        out: Tensor = self.b(h.square().to(x.dtype))
        return out


class Counted(Named):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x)) / x.numel()
        return out


SPEC = LoraSpec(r=2, target_modules=["a", "b"])


def adapt(model: nn.Module, dtype: torch.dtype = torch.float32) -> CapturedModule:
    torch.manual_seed(0)
    gm = lorafx.apply(model.eval().to(dtype), SPEC, torch.randn(3, 16).to(dtype), seed=0).eval()
    randomize(gm)
    return gm


def kinds(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def test_a_dtype_in_a_variable_is_what_the_function_assigns_to_it(tmp_path: Path) -> None:
    merge_and_export(adapt(Named()), tmp_path / "cast.onnx", dtype="fp16")
    export_base(adapt(Named(), torch.float16), tmp_path / "direct.onnx")
    assert kinds(tmp_path / "cast.onnx") == kinds(tmp_path / "direct.onnx")
    assert kinds(tmp_path / "cast.onnx").count("Cast") == 2


def test_a_dtype_that_nothing_tells_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"'h = self\.a\(x\)\.to\(self\.acc\)' casts to .*Convert the model"):
        merge_and_export(adapt(Held()), tmp_path / "model.onnx", dtype="fp16")


def test_values_used_as_they_are_and_cast_are_refused_with_advice(tmp_path: Path) -> None:
    config = hf.Gemma3TextConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    ids = {"input_ids": torch.arange(12).reshape(2, 6)}
    gm = lorafx.apply(hf.Gemma3ForCausalLM(config).eval(), LoraSpec(r=2, target_modules=["q_proj"]), ids).eval()
    with pytest.raises(ExportError, match=r"F\.linear.* multiplies torch\.float16 by torch\.float32 .*Convert the mod"):
        merge_and_export(gm, tmp_path / "model.onnx", dtype="fp16")


def test_the_number_of_elements_is_the_product_of_the_sizes(tmp_path: Path) -> None:
    assert len(merge_and_export(adapt(Counted()), tmp_path / "model.onnx").parity) >= 3


def test_base_of_a_module_is_that_of_the_adapted_one(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    model = Named().eval()
    plain = export_base(model, tmp_path / "a" / "m.onnx", example_inputs=torch.randn(3, 16), data_name="w")
    adapted = export_base(adapt(model), tmp_path / "b" / "m.onnx", data_name="w")
    assert plain.onnx_sha256 == adapted.onnx_sha256
    assert (tmp_path / "a" / "w").read_bytes() == (tmp_path / "b" / "w").read_bytes()
    assert len(plain.parity) >= 3


def test_a_base_keeps_apart_what_its_fine_tune_does(tmp_path: Path) -> None:
    config = hf.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    ids = {"input_ids": torch.arange(12).reshape(2, 6)}
    spec = LoraSpec(r=2, target_modules=["q_proj", "lm_head"], tied="untie")
    gm = lorafx.apply(hf.LlamaForCausalLM(config).eval(), spec, ids, seed=0).eval()
    randomize(gm)
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
    base = export_base(gm, tmp_path / "base" / "m.onnx", data_name="w")
    tuned = merge_and_export(gm, tmp_path / "tuned" / "m.onnx", data_name="w")
    assert base.onnx_sha256 == tuned.onnx_sha256
    assert len(base.parity) >= 3  # beside the tied graph's values


def test_models_without_one_input_embedding_are_adapted() -> None:
    config = hf.Wav2Vec2Config(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8, 8),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
        mask_time_prob=0.0,
        layerdrop=0.0,
    )
    x = torch.randn(2, 400)
    spec = LoraSpec(r=2, target_modules=["q_proj"])
    gm = lorafx.apply(hf.Wav2Vec2ForCTC(config).eval(), spec, {"input_values": x}, seed=0)
    gm(input_values=x).logits.square().mean().backward()
    assert all(p.grad is not None for p in gm.parameters() if p.requires_grad)
    randomize(gm)
    torch.testing.assert_close(lorafx.merge(gm.eval())(input_values=x).logits, gm(input_values=x).logits)
