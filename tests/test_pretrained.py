"""Checkpoints whose weights bitsandbytes quantized: read, trained and exported without it; damaged ones are refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import onnx
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import lorafx
import lorafx.pretrained
from conftest import loss_of, randomize
from generation import of_file, of_torch, prompts
from lorafx import CheckpointError, CheckpointWarning, LoraSpec, cli, load_pretrained
from lorafx.api import captured
from lorafx.bases import FORMATS
from lorafx.bases.nf4 import Nf4
from lorafx.bases.tensor import QuantizedTensor
from lorafx.ir import format_graph
from lorafx.pretrained import parameters_on_meta
from lorafx.shards import WEIGHTS_NAME, read_shards
from lorafx.sources import find_model
from tolerances import assert_close
from zoo import FAMILIES

LLAMA, GPT2 = FAMILIES["llama"], FAMILIES["gpt2"]
WEIGHT = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)


def write(model: Any, folder: Path, base: str, **settings: Any) -> nn.Module:
    """Save the model with its layers' weights quantized, and make theirs those that were saved."""
    form = FORMATS[base]
    tensors: dict[str, Tensor] = {}
    ties = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    for name, tensor in model.state_dict().items():
        layer = name.removesuffix("weight")
        owner = model.get_submodule(layer.rstrip(".")) if name.endswith("weight") else None
        turned = type(owner).__name__ == "Conv1D"
        if (isinstance(owner, nn.Linear) or turned) and not name.startswith("lm_head"):
            packed = form.quantize(tensor.T if turned else tensor, **settings)
            tensors |= {layer + key: value.clone() for key, value in form.state_dict(packed).items()}
            read = form.dequantize(packed, tensor.dtype)
            tensor.copy_(read.T if turned else read)
        elif name not in ties:
            tensors[name] = tensor
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", f"load_in_{8 if base == 'int8' else 4}bit": True}
    config["architectures"] = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / WEIGHTS_NAME)
    return model  # type: ignore[no-any-return]  # a module


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "nf4": ("nf4", {}),
    "nf4, plain scales": ("nf4", {"double_quant": False, "block_size": 32}),
    "int8": ("int8", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_dense_model_over_the_mapped_bytes(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, settings = CASES[case]
    dense = write(LLAMA.build(), tmp_path, base, **settings)
    files: dict[str, Tensor] = {}

    def recorded(folder: Path) -> dict[str, Tensor]:
        files.update(read_shards(folder))
        return dict(files)

    monkeypatch.setattr(lorafx.pretrained, "read_shards", recorded)
    model = load_pretrained(tmp_path)
    packed = {name: p for name, p in model.named_parameters() if isinstance(p, QuantizedTensor)}
    assert len(packed) == 14
    for name, weight in packed.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight.dequantize(), dense.get_parameter(name))
        scales = name.removesuffix("weight") + "SCB" if base == "int8" else f"{name}.absmax"
        for key, stored in (("codes", name), ("absmax", scales)):
            assert weight.packed.tensors[key].data_ptr() == files[stored].data_ptr()
    assert model.get_parameter("model.norm.weight").data_ptr() == files["model.norm.weight"].data_ptr()
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training
    gm = lorafx.apply(model, LoraSpec(r=3), LLAMA.inputs(), seed=0)
    oracle = lorafx.apply(dense, LoraSpec(r=3), LLAMA.inputs(), seed=0)
    assert format_graph(gm) == format_graph(oracle)
    assert_close("model", loss_of(gm, LLAMA), loss_of(oracle, LLAMA))
    loss_of(gm, LLAMA).backward()
    assert gm.get_parameter("model.layers.0.mlp.up_proj.lora_B.default").grad is not None


def test_conv1d_stores_the_weight_the_other_way_round(tmp_path: Path) -> None:
    """bitsandbytes' layers have it ``[out, in]``, also where it is square."""
    dense = write(GPT2.build(), tmp_path, "nf4")
    model = load_pretrained(tmp_path)
    square = "transformer.h.0.attn.c_proj.weight"
    assert isinstance(model.get_parameter(square), QuantizedTensor)
    assert torch.equal(model.get_parameter(square).dequantize(), dense.get_parameter(square))
    gm, oracle = (captured(m, GPT2.inputs(), None) for m in (model, dense))
    assert format_graph(gm) == format_graph(oracle)
    assert_close("model", loss_of(gm, GPT2), loss_of(oracle, GPT2))


def test_weights_are_read_in_the_dtype_of_the_model(tmp_path: Path) -> None:
    """The files': int8 weights do not tell theirs. A model of another dtype has them rounded to that one, once."""
    dense = LLAMA.build().to(torch.bfloat16)
    original = FORMATS["int8"].quantize(dense.get_parameter(WEIGHT))
    write(dense, tmp_path, "int8")
    found = load_pretrained(tmp_path).get_parameter(WEIGHT)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.dequantize(), dense.get_parameter(WEIGHT))
    with parameters_on_meta():
        wide = LLAMA.build()
    found = load_pretrained(tmp_path, wide).get_parameter(WEIGHT)
    assert torch.equal(found.dequantize(), FORMATS["int8"].dequantize(original, torch.float32))


def test_the_command_line_reads_it(tmp_path: Path) -> None:
    """For a plan no weights; to look at what an adapter does beside them, those, as everywhere."""
    folder, adapter = tmp_path / "base", tmp_path / "adapter"
    folder.mkdir()
    dense = write(LLAMA.build(), folder, "nf4")
    found, _ = find_model(str(folder), weights=True)
    assert isinstance(found.get_parameter(WEIGHT), QuantizedTensor)
    gm = lorafx.apply(found, LoraSpec(r=3, target_modules=["up_proj"]), LLAMA.inputs(), seed=0)
    randomize(gm)
    lorafx.save_adapter(gm, adapter)
    call = CliRunner().invoke
    shown = call(cli.app, ["inspect", str(adapter), "--base", str(folder), "--json"])
    share = json.loads(shown.output)["sites"][0]["share"]
    (expected,) = {s.share for s in lorafx.inspect_adapter(adapter, base=dense).sites if s.site == WEIGHT[:-7]}
    assert share == pytest.approx(expected, rel=1e-6)
    assert "14 layers adapted" in call(cli.app, ["plan", str(folder)]).output


def test_a_checkpoint_without_quantized_weights(tmp_path: Path) -> None:
    dense = LLAMA.build()
    cast("Any", dense).save_pretrained(tmp_path, max_shard_size="20KB")
    model = load_pretrained(tmp_path)
    assert all(torch.equal(p, dense.get_parameter(name)) for name, p in model.named_parameters())


def test_an_adapter_is_folded_into_its_dequantised_weights(tmp_path: Path) -> None:
    folder, adapter, path = tmp_path / "base", tmp_path / "adapter", tmp_path / "model.onnx"
    folder.mkdir()
    write(LLAMA.build(), folder, "nf4")
    gm = lorafx.apply(load_pretrained(folder), LoraSpec(r=3), LLAMA.inputs(), seed=0)
    randomize(gm, 0.1)
    lorafx.save_adapter(gm, adapter)
    lorafx.export_checkpoint(folder, folder, adapter, path, example_inputs=LLAMA.inputs())
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = LLAMA.other_inputs()
    (found,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    assert_close("model", torch.from_numpy(found), gm.eval()(**inputs).logits.detach())


@pytest.mark.parametrize("kv_cache", [False, True])
def test_the_file_may_stay_at_4_bits(kv_cache: bool, tmp_path: Path) -> None:
    folder, path = tmp_path / "base", tmp_path / "model.onnx"
    folder.mkdir()
    model = write(LLAMA.build(), folder, "nf4").eval()
    inputs = None if kv_cache else LLAMA.inputs()
    report = lorafx.export_checkpoint(
        folder, folder, None, path, example_inputs=inputs, weight_format="bnb4", kv_cache=kv_cache
    )
    kinds = [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]
    assert kinds.count("MatMulBnb4") == sum(isinstance(m, nn.Linear) for m in model.modules()) - 1  # the head is dense
    assert ("same tokens" in report.checks) == kv_cache
    if kv_cache:
        ids, mask = prompts(4, 9)
        assert torch.equal(of_file(path, ids, mask), of_torch(model, ids, mask))


# What is refused. Nothing of bitsandbytes' own is needed to damage a file.


Tensors = dict[str, Tensor]
STATE = f"{WEIGHT}.quant_state.bitsandbytes__nf4"


def text(change: Callable[[dict[str, Any]], Any]) -> Callable[[Tensors], None]:
    """Change what the JSON text says."""

    def apply(tensors: Tensors) -> None:
        state = json.loads(bytes(tensors[STATE].tolist()))
        new = change(state)
        tensors[STATE] = torch.tensor(
            list(new if isinstance(new, bytes) else json.dumps(state).encode()), dtype=torch.uint8
        )

    return apply


def put(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({key: change(tensors[key]).clone()})


def lose(*keys: str) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        for key in keys:
            del tensors[key]

    return apply


def as_fp4(tensors: Tensors) -> None:
    tensors[STATE.replace("nf4", "fp4")] = tensors.pop(STATE)


SCALES = WEIGHT.removesuffix("weight") + "SCB"

DAMAGED: dict[str, tuple[str, Callable[[Tensors], None], str]] = {
    "no JSON": ("nf4", text(lambda state: b"{"), "up_proj .*is no JSON text"),
    "a shape that does not go with the codes": (
        "nf4",
        text(lambda state: state.update(shape=[4, 4])),
        r"up_proj .*codes is torch.uint8 \(\d+,\); for a weight of shape \(4, 4\) expected",
    ),
    "a shape that is not the layer's": (
        "nf4",
        text(lambda state: state.update(shape=state["shape"][::-1])),
        r"up_proj.weight: shape \[\d+, \d+\], expected",
    ),
    "a block size": ("nf4", text(lambda state: state.update(blocksize=48)), "up_proj .*blocksize=48"),
    "a dtype": ("nf4", text(lambda state: state.update(dtype="float64")), "up_proj .*dtype='float64'"),
    "short codes": ("nf4", put(WEIGHT, lambda t: t[:-1]), "up_proj .*codes is"),
    "short scales": ("nf4", put(f"{WEIGHT}.absmax", lambda t: t[:-1]), "up_proj .*absmax is"),
    "scales out of range": ("nf4", put(f"{WEIGHT}.nested_absmax", lambda t: -t), "up_proj .*negative, NaN or Inf"),
    "another table": ("nf4", put(f"{WEIGHT}.quant_map", lambda t: t * 2), "up_proj .*quant_map is not the table"),
    "a key is missing": ("nf4", lose(f"{WEIGHT}.nested_absmax"), "up_proj .*weight.nested_absmax is missing"),
    "no codes": ("nf4", lose(WEIGHT), "up_proj .*weight is missing"),
    "no state": ("nf4", lose(STATE), "up_proj .*quant_state.bitsandbytes__nf4 is missing"),
    "fp4": ("nf4", as_fp4, "up_proj.weight is stored as fp4.*bnb_4bit_quant_type='nf4'"),
    "int8 without scales": ("int8", lose(SCALES), "up_proj .*SCB is missing"),
    "int8, scales out of range": ("int8", put(SCALES, lambda t: t * float("nan")), "up_proj .*negative, NaN or Inf"),
    "int8 in another order": (
        "int8",
        put(SCALES.replace("SCB", "weight_format"), lambda t: t + 1),
        "up_proj .*weight_format is 1",
    ),
    "int8, codes of another dtype": ("int8", put(WEIGHT, lambda t: t.half()), "up_proj .*codes is torch.float16"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    for base in ("nf4", "int8"):
        (folder / base).mkdir()
        write(LLAMA.build(), folder / base, base)
    return folder


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_refused_and_named(case: str, whole: Path, tmp_path: Path) -> None:
    base, damage, message = DAMAGED[case]
    tensors = load_file(whole / base / WEIGHTS_NAME)
    damage(tensors)
    save_file(tensors, tmp_path / WEIGHTS_NAME)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_pretrained(tmp_path, whole / base)
    assert str(tmp_path) in str(caught.value)


def test_a_weight_that_the_model_has_no_place_for(whole: Path, tmp_path: Path) -> None:
    tensors = load_file(whole / "nf4" / WEIGHTS_NAME)
    tensors |= {f"model.other.{key}": t for key, t in Nf4().state_dict(Nf4().quantize(torch.randn(4, 64))).items()}
    save_file(tensors, tmp_path / WEIGHTS_NAME)
    with pytest.warns(CheckpointWarning, match=r"not read, for the model has no place for it: model\.other\.weight$"):
        load_pretrained(tmp_path, whole / "nf4")
