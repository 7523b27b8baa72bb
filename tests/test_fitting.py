"""Checkpoints that hold more or less than the model: as transformers loads them, but that nothing stays random."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime as ort
import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import lorafx
from lorafx import CheckpointError, CheckpointWarning, load_pretrained

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 37}
BERT = hf.BertConfig(**SIZES, vocab_size=50, max_position_embeddings=24, num_labels=3)
LLAMA = hf.LlamaConfig(**SIZES, vocab_size=50)
GPT2 = hf.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=0)
IDS = {"input_ids": torch.arange(12).reshape(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def add(folder: Path, **tensors: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    save_file({**load_file(path), **tensors}, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("build", "buffer"),
    [
        (lambda: hf.LlamaForCausalLM(LLAMA), "model.layers.0.self_attn.rotary_emb.inv_freq"),
        (lambda: hf.BertModel(BERT), "embeddings.position_ids"),
        (lambda: hf.BertForMaskedLM(BERT), "bert.embeddings.position_ids"),
        (lambda: hf.GPT2LMHeadModel(GPT2), "transformer.h.0.attn.bias"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_buffers_of_older_releases_are_dropped_in_silence(
    build: Callable[[], Any], buffer: str, tmp_path: Path
) -> None:
    model = build()
    add(saved(model, tmp_path), **{buffer: torch.ones(3)})
    with warnings.catch_warnings():
        warnings.simplefilter("error", CheckpointWarning)
        found = load_pretrained(tmp_path).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[name], tensor), name


def test_a_buffer_that_newer_releases_added_keeps_its_value(tmp_path: Path) -> None:
    """By the model's own list: Bart's ``final_logits_bias`` may be absent."""
    config = hf.BartConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=50,
    )  # fmt: skip
    saved(hf.BartForConditionalGeneration(config), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors.pop("final_logits_bias").shape == (1, 50)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load_pretrained(tmp_path).state_dict()["final_logits_bias"].tolist() == [[0.0] * 50]


def test_a_head_that_the_model_lacks_is_left_and_listed(tmp_path: Path) -> None:
    """The prefix of the model inside is taken off, as transformers does."""
    model = hf.BertForPreTraining(BERT)
    saved(model, tmp_path)
    inner = hf.BertConfig(**{**BERT.to_dict(), "architectures": ["BertModel"]})
    with pytest.warns(CheckpointWarning, match=r"has no place for it: cls\.predictions\.bias, .*cls\.seq_relationship"):
        found = load_pretrained(tmp_path, inner).state_dict()
    for name, tensor in model.bert.state_dict().items():
        assert torch.equal(found[name], tensor), name


def test_what_the_model_needs_must_be_there(tmp_path: Path) -> None:
    """Which transformers would leave random; both sides are named. So is a checkpoint of another model refused."""
    saved(hf.BertForMaskedLM(BERT), tmp_path)
    classifier = hf.BertConfig(**{**BERT.to_dict(), "architectures": ["BertForSequenceClassification"]})
    with pytest.raises(CheckpointError) as caught:
        lorafx.export_checkpoint(classifier, tmp_path, None, tmp_path / "m.onnx")
    text = str(caught.value)
    for part in (
        "missing: bert.pooler.dense.weight [32, 32]",
        "missing: classifier.weight [3, 32]",
        "not of this model: cls.predictions.bias, ",
    ):
        assert part in text
    other = hf.LlamaConfig(**{**LLAMA.to_dict(), "architectures": ["LlamaForCausalLM"]})
    with pytest.raises(CheckpointError, match=r"missing: model\.embed_tokens[^~]*not of this model: .* and \d+ more"):
        load_pretrained(tmp_path, other)


def test_floats_of_one_byte_are_refused(tmp_path: Path) -> None:
    """They are weights with their scales only, which would be left as not of the model."""
    saved(hf.BertModel(BERT), tmp_path)
    name = "encoder.layer.0.output.dense.weight"
    add(tmp_path, **{name: torch.zeros(32, 37, dtype=torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1)})
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: '{name}' is stored as torch\.float8_e4m3fn"):
        load_pretrained(tmp_path)


def test_a_head_that_only_the_adapter_has(tmp_path: Path) -> None:
    """PEFT's SEQ_CLS trains it whole: the numbers are those of its merged model. The base alone has no such head."""
    torch.manual_seed(0)
    folder = saved(hf.BertForPreTraining(BERT), tmp_path / "base")
    model = hf.BertForSequenceClassification.from_pretrained(folder, num_labels=3)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query"]))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    wrapped.save_pretrained(tmp_path / "adapter")
    config = hf.BertConfig(**{**BERT.to_dict(), "architectures": ["BertForSequenceClassification"]})
    report = lorafx.export_checkpoint(config, folder, tmp_path / "adapter", tmp_path / "m.onnx")
    assert len(report.parity) >= 3
    assert "cls.predictions.bias" in report.warnings[0]
    assert "it has no classifier.bias, classifier.weight; the adapter's is written" in report.warnings[1]
    expected = wrapped.merge_and_unload().eval()(**IDS).logits
    session = ort.InferenceSession(tmp_path / "m.onnx")
    given = {i.name: IDS[i.name].numpy() for i in session.get_inputs() if i.name in IDS}
    given |= {i.name: torch.zeros(2, 6, dtype=torch.long).numpy() for i in session.get_inputs() if i.name not in IDS}
    (logits,) = session.run(["logits"], given)
    torch.testing.assert_close(torch.from_numpy(logits), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(CheckpointError, match=r"missing: classifier\.weight \[3, 32\]"):
        lorafx.export_checkpoint(config, folder, None, tmp_path / "no.onnx")
