"""Checkpoints with a tensor for each expert, where the model has a stack: read as they lie in the files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorafx
from conftest import randomize
from lorafx import CheckpointError, LoraSpec, checkpoint_names
from lorafx.joined import JoinedTensor

SIZES: Mapping[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 24,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "num_experts_per_tok": 2,
}
MIXTURES: Mapping[str, Callable[[], hf.PreTrainedModel]] = {
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES, num_local_experts=3)),
    "qwen3-moe": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=8, head_dim=12)
    ),
}
IDS = {"input_ids": torch.arange(14).reshape(2, 7)}
SPEC = LoraSpec(r=2, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"])


def saved(name: str, folder: Path) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    model = MIXTURES[name]().eval()
    model.save_pretrained(folder, max_shard_size="20KB")  # experts of a layer in several files
    return model


def joined(model: torch.nn.Module) -> dict[str, JoinedTensor]:
    return {n: p for n, p in model.named_parameters() if isinstance(p, JoinedTensor)}


@pytest.mark.parametrize("name", MIXTURES)
def test_a_stack_is_read_from_its_experts(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path)
    loaded = lorafx.load_pretrained(tmp_path)
    stacks = joined(loaded)
    assert len(stacks) == 4
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key].add(0), tensor), key
    for stack in stacks.values():
        half = stack.parts[0].shape[0]
        assert stack[0, :half].dequantize().data_ptr() == stack.parts[0].data_ptr(), "a part is not copied"


def test_any_view_is_that_of_the_dense_stack() -> None:
    torch.manual_seed(0)
    parts = [torch.randn(2, 5) for _ in range(6)]
    stack, dense = JoinedTensor(parts, (3, 4, 5)), torch.cat(parts).view(3, 4, 5)
    views: list[Callable[[Tensor], Tensor]] = [
        lambda t: t,
        lambda t: t[1],
        lambda t: t[2, 3, 4:],
        lambda t: t[:, 1:3],
        lambda t: t.transpose(1, 2),
        lambda t: t.transpose(1, 2)[1:, :, 2],
        lambda t: t.reshape(-1)[7:33],
        lambda t: t.flatten(0, 1)[1:9:3],
        lambda t: t[3:],
        lambda t: t.unbind(0)[2].chunk(2)[1],
    ]
    for view in views:
        assert torch.equal(view(stack).add(0), view(dense))


def test_it_trains_as_the_dense_model(tmp_path: Path) -> None:
    model = saved("mixtral", tmp_path)
    found = []
    for given in (model, lorafx.load_pretrained(tmp_path)):
        gm = lorafx.apply(given, SPEC, IDS, seed=0).eval()
        torch.manual_seed(1)
        randomize(gm)
        gm(**IDS).logits.square().sum().backward()
        found.append({n: p.grad for n, p in gm.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    assert all(grad is not None and torch.equal(grad, found[1][n]) for n, grad in found[0].items())


def test_the_file_is_that_of_the_model_in_memory(tmp_path: Path) -> None:
    model = saved("mixtral", tmp_path / "base")
    gm = lorafx.apply(model, SPEC, seed=0).eval()  # with the inputs that a checkpoint is captured with
    randomize(gm, 0.1)
    lorafx.save_adapter(gm, tmp_path / "adapter")
    for folder in ("memory", "files"):
        (tmp_path / folder).mkdir()
    memory = lorafx.merge_and_export(gm, tmp_path / "memory" / "m.onnx", data_name="w", verify=False)
    files = lorafx.export_checkpoint(
        model.config, tmp_path / "base", tmp_path / "adapter", tmp_path / "files" / "m.onnx", data_name="w"
    )
    assert files.onnx_sha256 == memory.onnx_sha256
    assert (tmp_path / "files" / "w").read_bytes() == (tmp_path / "memory" / "w").read_bytes()
    assert files.provenance["base_sha256"] == memory.provenance["base_sha256"]


def without_one(tensors: dict[str, Tensor]) -> None:
    del tensors[next(n for n in tensors if "experts.1.w3" in n)]


def with_another_shape(tensors: dict[str, Tensor]) -> None:
    name = next(n for n in tensors if "experts.1.w3" in n)
    tensors[name] = tensors[name][:-1].contiguous()


def with_another_dtype(tensors: dict[str, Tensor]) -> None:
    name = next(n for n in tensors if "experts.1.w3" in n)
    tensors[name] = tensors[name].half()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_one, r"of the parts of .*gate_up_proj' there are 3 like .*w1.* and 2 like .*w3.*incomplete"),
        (
            with_another_shape,
            r"experts\.1\.w3\.weight' is torch\.float32 \[15, 24\], not torch\.float32 \[16, 24\] as .*experts\.0\.w3",
        ),
        (with_another_dtype, r"experts\.1\.w3\.weight' is torch\.float16"),
    ],
)
def test_parts_that_do_not_go_together_are_named(
    damage: Callable[[dict[str, Tensor]], None], message: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    MIXTURES["mixtral"]().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        lorafx.load_pretrained(tmp_path)


def test_what_would_need_a_copy_is_refused_with_a_way_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers' table does to tensors and is not known here; the way round is taken, too."""
    model = saved("mixtral", tmp_path / "experts")
    monkeypatch.setattr(checkpoint_names, "_LAZY", {})
    message = r"experts\.\d\.\S+' is a part of the model's .*MergeModulelist.*save_original_format=False"
    with pytest.raises(CheckpointError, match=message):
        lorafx.load_pretrained(tmp_path / "experts")
    model.save_pretrained(tmp_path / "stacks", save_original_format=False)
    loaded = lorafx.load_pretrained(tmp_path / "stacks").state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in model.state_dict().items())
