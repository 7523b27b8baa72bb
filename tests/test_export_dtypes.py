"""Casts to another precision that the model's code decides, sizes spelled out, and bases of modules and of untied
weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import lorafx
from conftest import randomize
from lorafx import ExportError, LoraSpec
from lorafx.api import captured
from lorafx.export.export import export_base, merge_and_export
from lorafx.export.report import ExportReport
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


class Wide(Named):
    """Uses a value as it is and in float32."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        mean = h.float().mean(-1, keepdim=True)
        out: Tensor = self.b(h * h * h) + mean
        return out


class Computed(Named):
    """Multiplies by a buffer that is not saved, and so not converted."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mix", torch.eye(16), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x) @ self.mix)
        return out


class Counted(Named):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x)) / x.numel()
        return out


class Regrouped(Named):
    """Leaves a size to be worked out of the number of elements, as Bloom's attention does."""

    def forward(self, x: Tensor) -> Tensor:
        heads = self.a(x).view(x.shape[0], 2, 2, 4).permute(1, 2, 0, 3)
        joined = heads.reshape(4, -1, 4)
        out: Tensor = self.b(joined.transpose(0, 1).flatten(1))
        return out


SPEC = LoraSpec(r=2, target_modules=["a", "b"])


def adapt(model: nn.Module, dtype: torch.dtype = torch.float32) -> CapturedModule:
    torch.manual_seed(0)
    gm = lorafx.apply(model.eval().to(dtype), SPEC, torch.randn(3, 16).to(dtype), seed=0).eval()
    randomize(gm)
    return gm


def same_graphs(folder: Path, *exports: Callable[[Path], ExportReport]) -> list[ExportReport]:
    """What exports report that write the same graph, each to a folder of its own."""
    reports = []
    for index, export in enumerate(exports):
        (folder / str(index)).mkdir()
        reports.append(export(folder / str(index) / "m.onnx"))
    assert len({report.onnx_sha256 for report in reports}) == 1
    return reports


def kinds(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def test_a_dtype_in_a_variable_is_what_the_function_assigns_to_it(tmp_path: Path) -> None:
    merge_and_export(adapt(Named()), tmp_path / "cast.onnx", dtype="fp16")
    export_base(adapt(Named(), torch.float16), tmp_path / "direct.onnx")
    assert kinds(tmp_path / "cast.onnx") == kinds(tmp_path / "direct.onnx")
    assert kinds(tmp_path / "cast.onnx").count("Cast") == 2


SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
IDS = {"input_ids": torch.arange(12).reshape(2, 6)}
DECODERS: dict[str, Callable[[], tuple[type[hf.PreTrainedModel], hf.PreTrainedConfig]]] = {
    "llama": lambda: (hf.LlamaForCausalLM, hf.LlamaConfig(**SIZES)),
    "gemma3": lambda: (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig(**SIZES, head_dim=8)),
}


@pytest.mark.parametrize("name", DECODERS)
def test_the_graph_is_that_of_the_converted_model(name: str, tmp_path: Path) -> None:
    """The residual stream too, which the norms of a float32 model cast to what it is: two values, not one."""
    made, config = DECODERS[name]()
    model = made(config).eval()
    gm = lorafx.apply(model, LoraSpec(r=2, target_modules=["q_proj"]), IDS, seed=0).eval()
    randomize(gm)
    half = copy.deepcopy(model)
    for parameter in half.parameters():  # what is computed and not saved stays in float32, as from_pretrained has it
        parameter.data = parameter.data.half()
    cast, _ = same_graphs(
        tmp_path,
        lambda path: merge_and_export(gm, path, dtype="fp16", data_name="w"),
        lambda path: export_base(half, path, example_inputs=IDS, data_name="w", verify=False),
    )
    assert len(cast.parity) >= 3


def test_products_of_what_is_and_is_not_converted_are_refused_with_advice(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"self\.mix.* multiplies torch\.float16 by torch\.float32 .*Convert the mod"):
        merge_and_export(adapt(Computed()), tmp_path / "model.onnx", dtype="fp16")


def test_autocast_casts_what_the_models_code_does() -> None:
    """A value that float32 code also casts is used as it is where the model uses it so."""
    model, x = Wide().eval(), torch.randn(3, 16)
    gm = captured(model, x, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gm(x), model(x))


@pytest.mark.parametrize("module", [Counted, Regrouped])
def test_the_number_of_elements_is_the_product_of_the_sizes(tmp_path: Path, module: type[Named]) -> None:
    assert len(merge_and_export(adapt(module()), tmp_path / "model.onnx").parity) >= 3


def test_base_of_a_module_is_that_of_the_adapted_one(tmp_path: Path) -> None:
    model = Named().eval()
    plain, _ = same_graphs(
        tmp_path,
        lambda path: export_base(model, path, example_inputs=torch.randn(3, 16), data_name="w"),
        lambda path: export_base(adapt(model), path, data_name="w"),
    )
    assert (tmp_path / "0" / "w").read_bytes() == (tmp_path / "1" / "w").read_bytes()
    assert len(plain.parity) >= 3


def test_base_of_a_module_has_the_dimensions_asked_for(tmp_path: Path) -> None:
    model, x, shapes = Named().eval(), torch.randn(3, 16), {"x": {0: "rows"}}
    report = export_base(model, tmp_path / "m.onnx", example_inputs=x, dynamic_shapes=shapes)
    assert report.inputs == {"x": "[rows,16]"}
    with pytest.raises(ExportError, match=r"dynamic_shapes is for a module .* give it to lorafx\.apply"):
        export_base(captured(model, x, shapes), tmp_path / "m.onnx", dynamic_shapes=shapes)


def test_a_base_keeps_apart_what_its_fine_tune_does(tmp_path: Path) -> None:
    spec = LoraSpec(r=2, target_modules=["q_proj", "lm_head"], tied="untie")
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, tie_word_embeddings=True)).eval()
    gm = lorafx.apply(model, spec, IDS, seed=0).eval()
    randomize(gm)
    base, _ = same_graphs(
        tmp_path,
        lambda path: export_base(gm, path, data_name="w"),
        lambda path: merge_and_export(gm, path, data_name="w"),
    )
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
