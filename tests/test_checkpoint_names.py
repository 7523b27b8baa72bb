"""Checkpoints in whose files tensors have other names than in the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

import lorafx
from lorafx import load_pretrained

SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 37}


def vit(folder: Path) -> transformers.ViTForImageClassification:
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, image_size=16, patch_size=8)).eval()
    model.save_pretrained(folder)
    return model


def test_names_that_transformers_changed(tmp_path: Path) -> None:
    model = vit(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() - model.state_dict().keys()
    found = load_pretrained(tmp_path)
    assert found.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


def test_they_are_the_model_s_in_the_exported_file(tmp_path: Path) -> None:
    model = vit(tmp_path / "model")
    inputs = {"pixel_values": torch.randn(1, 3, 16, 16)}
    found, expected = tmp_path / "found.onnx", tmp_path / "expected.onnx"
    lorafx.export_checkpoint(model.config, tmp_path / "model", None, found, example_inputs=inputs)
    spec = lorafx.LoraSpec(r=1, target_modules=["q_proj"])
    lorafx.export_base(lorafx.apply(model, spec, inputs), expected, example_inputs=inputs)
    difference = lorafx.diff_onnx(found, expected)
    assert difference.same, difference
