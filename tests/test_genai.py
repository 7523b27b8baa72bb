"""onnxruntime-genai loads what kv_cache=True writes, and generates torch's tokens.

docs/genai.md is the recipe; tests/test_guide.py runs it. Prompts of a batch are equally long here: of shorter ones
onnxruntime-genai 0.18 hands the padding to the model as if it were tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import lorafx
from lorafx.graph import CapturedModule

og = pytest.importorskip("onnxruntime_genai", reason="has no wheel for this platform, or was not installed")

EOS = 2
PROMPTS = [[3, 14, 15, 92], [31, 4, 15, 9], [5, 35, 8, 97]]
LENGTH = 16


def tuned(**options: Any) -> tuple[nn.Module, CapturedModule]:
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, eos_token_id=EOS, pad_token_id=0,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(config).eval()
    ids = torch.randint(3, 101, (2, 6))
    gm = lorafx.apply(model, {"r": 3, **options}, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, seed=0)
    with torch.no_grad():
        for name, parameter in gm.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    return model, gm.eval()


def configure(folder: Path, config: Any) -> None:
    ends = {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"}
    decoder = {
        "filename": "model.onnx",
        "session_options": {"provider_options": []},
        "hidden_size": config.hidden_size,
        "head_size": config.head_dim,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "inputs": {n: n for n in ("input_ids", "attention_mask", "position_ids")} | ends,
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    model = {"type": "qwen3", "decoder": decoder, "vocab_size": config.vocab_size, "context_length": 64}
    model |= {"bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": 0}
    settings = {"model": model, "search": {"past_present_share_buffer": False}}
    (folder / "genai_config.json").write_text(json.dumps(settings))


def generated(folder: Path, task: str | None = None) -> list[list[int]]:
    """What follows each of PROMPTS, up to the end of the sequence, generated as one batch."""
    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=LENGTH, do_sample=False, batch_size=len(PROMPTS))
    generator = og.Generator(model, parameters)
    if task is not None:
        adapters = og.Adapters(model)
        adapters.load(str(folder / f"{task}.onnx_adapter"), task)
        generator.set_active_adapter(adapters, task)
    generator.append_tokens(PROMPTS)
    while not generator.is_done():
        generator.generate_next_token()
    return [up_to_end(generator.get_sequence(row).tolist()[len(PROMPTS[0]) :]) for row in range(len(PROMPTS))]


def up_to_end(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(EOS)] if EOS in tokens else tokens


def expected(gm: CapturedModule) -> list[list[int]]:
    """Each prompt alone, without a cache."""
    rows = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(LENGTH - len(prompt)):
            ids = torch.tensor([tokens])
            with torch.no_grad():
                tokens.append(int(gm(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1].argmax()))
        rows.append(up_to_end(tokens[len(prompt) :]))
    return rows


@pytest.mark.parametrize("how", ["merged", "nf4"])
def test_a_merged_file(how: str, tmp_path: Path) -> None:
    model, gm = tuned(**({"base": "nf4"} if how == "nf4" else {}))
    lorafx.merge_and_export(gm, tmp_path / "model.onnx", kv_cache=True, external_data=True)
    configure(tmp_path, model.config)
    assert generated(tmp_path) == expected(gm)


def test_tasks_with_gains_under_lorafx_s_own_names(tmp_path: Path) -> None:
    model, gm = tuned()
    lorafx.add_adapter(gm, {"r": 2, "variant": "dora", "target_modules": ["q_proj", "o_proj"]}, "dora", seed=1)
    with torch.no_grad():
        for name, parameter in gm.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.5)
    lorafx.export_multi(gm, tmp_path / "model.onnx", {"plain": "default", "dora": "dora"}, kv_cache=True)
    configure(tmp_path, model.config)
    wanted = {"plain": expected(gm)}
    lorafx.set_adapter(gm, "dora")
    wanted["dora"] = expected(gm)
    with lorafx.disable_adapters(gm):
        assert generated(tmp_path) == expected(gm) not in wanted.values()
    assert {task: generated(tmp_path, task) for task in wanted} == wanted
