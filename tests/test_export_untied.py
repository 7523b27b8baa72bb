"""An adapted head whose weight is the embedding's too (``tied="untie"``), through every way into a file."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

import lorafx
from conftest import randomize
from lorafx import LoraSpec, MatchError
from lorafx.graph import CapturedModule

CONFIG = hf.LlamaConfig(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
    tie_word_embeddings=True,
    architectures=["LlamaForCausalLM"],
    pad_token_id=0,
)
IDS = {"input_ids": torch.arange(12).reshape(2, 6)}


@cache
def model() -> hf.PreTrainedModel:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(CONFIG).eval()


def adapted(base: str | None = None) -> CapturedModule:
    spec = LoraSpec(r=2, target_modules=["q_proj", "lm_head"], tied="untie")
    gm = lorafx.apply(model(), spec, IDS, seed=0).eval()
    if base is not None:
        lorafx.quantize(gm, base, exclude_modules=["lm_head"])
    randomize(gm, 0.1)
    return gm


@pytest.mark.parametrize(
    ("base", "options"),
    [
        (None, {}),
        (None, {"dtype": "fp16"}),
        (None, {"kv_cache": True, "dtype": "fp16"}),
        ("nf4", {}),
        ("int8", {}),
    ],
    ids=str,
)
def test_base_and_merged_are_one_graph(base: str | None, options: dict[str, Any], tmp_path: Path) -> None:
    gm = adapted(base)
    for folder in ("merged", "base"):
        (tmp_path / folder).mkdir()
    named: dict[str, Any] = {"data_name": "w", "external_data": True, **options}
    report = lorafx.merge_and_export(gm, tmp_path / "merged" / "m.onnx", **named)
    assert len(report.parity) >= 3
    assert all(row.passed for row in report.parity)
    plain = lorafx.export_base(gm, tmp_path / "base" / "m.onnx", verify=False, **named)
    assert report.onnx_sha256 == plain.onnx_sha256
    assert report.data_bytes == plain.data_bytes


def test_from_a_checkpoint_it_is_asked_for(tmp_path: Path) -> None:
    gm = adapted()
    model().save_pretrained(tmp_path / "base")
    lorafx.save_adapter(gm, tmp_path / "adapter")
    places = (CONFIG, tmp_path / "base", tmp_path / "adapter", tmp_path / "c.onnx")
    with pytest.raises(MatchError, match='or set tied="untie"'):
        lorafx.export_checkpoint(*places, example_inputs=IDS)
    found = lorafx.export_checkpoint(*places, example_inputs=IDS, tied="untie")
    wanted = lorafx.merge_and_export(gm, tmp_path / "m.onnx", example_inputs=IDS)
    assert found.onnx_sha256 == wanted.onnx_sha256


def test_tasks_leave_the_embedding_alone(tmp_path: Path) -> None:
    gm = adapted()
    report = lorafx.export_multi(gm, tmp_path / "m.onnx")
    session = lorafx.AdapterSession(tmp_path / "m.onnx")
    given = {name: np.ones((2, 6), np.int64) for name in report.inputs} | {"input_ids": IDS["input_ids"].numpy()}
    with torch.no_grad():
        wanted = gm(**IDS).logits.numpy()
        with lorafx.disable_adapters(gm):
            plain = gm(**IDS).logits.numpy()
    np.testing.assert_allclose(session.run(given, adapter="default")["logits"], wanted, atol=1e-4)
    np.testing.assert_allclose(session.run(given)["logits"], plain, atol=1e-4)
    assert abs(wanted - plain).max() > 0.1
