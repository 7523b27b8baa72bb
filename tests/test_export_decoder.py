"""Decoders with a cache: the file generates, token by token, what torch's own cached generation does."""

from __future__ import annotations

import dataclasses
import gc
import pickle
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import peft
import pytest
import torch
import transformers as hf
from torch import nn

import lorafx
from conftest import Zoo, randomize
from generation import of_file, of_torch, prompts
from lorafx.api import captured
from lorafx.bases.tensor import QuantizedTensor
from lorafx.errors import CaptureError, ExportError, ParityError
from lorafx.export.decoder import STEPS, check_generation, make_prompts
from lorafx.export.parity import TOLERANCES
from lorafx.graph import CapturedModule
from lorafx.passes.decoder import capture_decoder
from lorafx.passes.inference import inference
from lorafx.passes.original import Original
from zoo import _TEXT, FAMILIES

DECODERS = ["llama", "qwen3", "gemma", "phi"]
SPEC = lorafx.LoraSpec(r=3, alpha=6)


def adapted(zoo: Zoo, name: str, spec: lorafx.LoraSpec = SPEC, scale: float = 0.3) -> CapturedModule:
    """A family's graph with adapters far from their first values."""
    gm = zoo.adapted(FAMILIES[name], spec).eval()
    randomize(gm, scale)
    return gm


@dataclass(frozen=True)
class Pair:
    """The base and the merged model in two files, whose weights are in files of one name."""

    gm: CapturedModule
    base: lorafx.ExportReport
    merged: lorafx.ExportReport

    @property
    def path(self) -> Path:
        return Path(self.merged.path)


@pytest.fixture(scope="module")
def llama(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folders = [tmp_path_factory.mktemp(name) / "model.onnx" for name in ("base", "merged")]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        gm = adapted(zoo, "llama")
    base = lorafx.export_base(gm, folders[0], kv_cache=True, data_name="weights.data", verify=False)
    return Pair(gm, base, lorafx.merge_and_export(gm, folders[1], kv_cache=True, data_name="weights.data"))


@pytest.mark.parametrize("name", DECODERS)
def test_the_tokens_are_those_of_the_merged_model(
    zoo: Zoo, name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if name == "llama":
        gm, report = request.getfixturevalue("llama").gm, request.getfixturevalue("llama").merged
    else:
        gm = adapted(zoo, name)
        report = lorafx.merge_and_export(gm, tmp_path / "model.onnx", kv_cache=True)
    count = 6 * STEPS
    assert report.checks["same tokens"] == f"{count} of {count} tokens generated with the cache are torch's without one"
    assert {p.reference for p in report.parity} == {"unmerged, no cache"}
    merged = FAMILIES[name].build()
    merged.load_state_dict(lorafx.merged_state_dict(gm))
    for lengths in ((7,), (4, 9), (17, 1)):
        ids, mask = prompts(*lengths)
        assert torch.equal(of_file(Path(report.path), ids, mask), of_torch(merged, ids, mask)), lengths


def test_the_tokens_are_those_that_peft_generates(llama: Pair, tmp_path: Path) -> None:
    lorafx.save_adapter(llama.gm, tmp_path)
    model = peft.PeftModel.from_pretrained(FAMILIES["llama"].build(), tmp_path).merge_and_unload()
    ids, mask = prompts(5, 8)
    assert torch.equal(of_file(llama.path, ids, mask), of_torch(model, ids, mask))


def test_layout(llama: Pair) -> None:
    """The names, order and shapes of optimum and onnxruntime-genai; a prompt may come in parts."""
    cache = [f"{i}.{kind}" for i in range(2) for kind in ("key", "value")]
    assert dict(llama.merged.inputs) == {
        "input_ids": "[batch,sequence]",
        "attention_mask": "[batch,total_sequence]",
        "position_ids": "[batch,sequence]",
        **{f"past_key_values.{name}": "[batch,2,past_sequence,10]" for name in cache},
    }
    shapes = {str(v.name): str(v.shape) for v in ir.load(llama.path).graph.outputs}
    assert shapes == {
        "logits": "[batch,sequence,90]",
        **{f"present.{name}": "[batch,2,total_sequence,10]" for name in cache},
    }
    ids, mask = prompts(6, 11)
    whole = of_file(llama.path, ids, mask)
    assert all(torch.equal(of_file(llama.path, ids, mask, chunk=size), whole) for size in (1, 4))


def test_base_and_merged_are_the_same_to_the_byte(llama: Pair) -> None:
    assert llama.path.read_bytes() == Path(llama.base.path).read_bytes()
    assert llama.merged.bytes_changed > 0
    names = {n.removesuffix(".T") for n in ir.load(llama.path).graph.initializers if "constant" not in n}
    assert names <= {n for n, _ in FAMILIES["llama"].build().named_parameters()} | {"model.rotary_emb.inv_freq"}


def test_a_sliding_window_keeps_all_of_the_past_and_hides_it(tmp_path: Path) -> None:
    config = hf.MistralConfig(**_TEXT, num_key_value_heads=2, sliding_window=6)
    model = hf.MistralForCausalLM(config).eval()
    ids, mask = prompts(5, 9)
    report = lorafx.export_base(captured(model, {"input_ids": ids}, None), tmp_path / "model.onnx", kv_cache=True)
    assert "same tokens" in report.checks
    assert torch.equal(of_file(tmp_path / "model.onnx", ids, mask), of_torch(model, ids, mask))
    full = hf.MistralForCausalLM(hf.MistralConfig(**_TEXT, num_key_value_heads=2, sliding_window=None)).eval()
    full.load_state_dict(model.state_dict())
    assert not torch.equal(of_torch(full, ids, mask), of_torch(model, ids, mask))


def test_bfloat16(zoo: Zoo, tmp_path: Path) -> None:
    """Its past is in bfloat16 too. ONNX Runtime runs the float32 twin."""
    gm = adapted(zoo, "llama", scale=0.05)
    report = lorafx.merge_and_export(gm, tmp_path / "model.onnx", kv_cache=True, dtype="bf16")
    assert len(report.parity) == 3
    kinds = {v.name: v.dtype for v in ir.load(tmp_path / "model.onnx").graph.inputs}
    assert {kind for name, kind in kinds.items() if str(name).startswith("past")} == {ir.DataType.BFLOAT16}


QUANTIZED: dict[str, tuple[dict[str, Any], int]] = {  # how it is merged and written, and how many layers stay in nf4
    "adapters folded, the others packed": ({"weight_format": "bnb4"}, 6),
    "all packed": ({"weight_format": "bnb4", "requantize": True}, 14),
    "all to int4": ({"weight_format": "nbits"}, 0),
    "the original": ({"base": "original"}, 0),
    "the original, packed": ({"base": "original", "weight_format": "bnb4", "requantize": True}, 14),
    "dense values of nf4": ({"requantize": True}, 0),
}


@pytest.mark.parametrize("how", QUANTIZED)
def test_a_quantized_base(zoo: Zoo, how: str, tmp_path: Path) -> None:
    """Whatever it is merged into, the tokens are those of that model; int4's are others, and the report says so."""
    options, kept = QUANTIZED[how]
    options = {**options}
    gm = adapted(zoo, "llama", dataclasses.replace(SPEC, target_modules=["q_proj", "v_proj", "o_proj", "up_proj"]))
    lorafx.quantize(gm, exclude_modules=["lm_head"])
    if options.get("base") == "original":
        options["original"] = FAMILIES["llama"].build()
    report = lorafx.merge_and_export(gm, tmp_path / "model.onnx", kv_cache=True, **options)
    kinds = [node.op_type for node in ir.load(tmp_path / "model.onnx").graph]
    assert (kinds.count("MatMulBnb4"), "MatMulNBits" in kinds) == (kept, how == "all to int4")
    if how == "all to int4":
        assert report.requantized
        return
    assert "same tokens" in report.checks
    merged = FAMILIES["llama"].build()
    choice = {name: value for name, value in options.items() if name != "weight_format"}
    state = lorafx.merge(gm, **choice).state_dict()
    merged.load_state_dict({n: t.dequantize() if isinstance(t, QuantizedTensor) else t for n, t in state.items()})
    ids, mask = prompts(4, 9)
    assert torch.equal(of_file(tmp_path / "model.onnx", ids, mask), of_torch(merged, ids, mask))


def test_a_tied_head_kept_apart(zoo: Zoo, tmp_path: Path) -> None:
    """The model's two names for one weight come to hold two."""
    spec = lorafx.LoraSpec(r=2, target_modules=["c_attn", "lm_head"], tied="untie")
    gm = adapted(zoo, "gpt2", spec)
    report = lorafx.merge_and_export(gm, tmp_path / "model.onnx", kv_cache=True)
    assert "kept apart as asked (lm_head)" in report.checks["same graph"]
    names = {n.removesuffix(".T") for n in ir.load(tmp_path / "model.onnx").graph.initializers}
    assert {"transformer.wte.weight", "lm_head.weight"} <= names
    merged: Any = FAMILIES["gpt2"].build()
    merged.lm_head.weight = nn.Parameter(torch.empty_like(merged.lm_head.weight))
    merged.load_state_dict(lorafx.merge(gm).state_dict())
    assert not torch.equal(merged.lm_head.weight, merged.transformer.wte.weight)
    ids, mask = prompts(4, 9)
    assert torch.equal(of_file(tmp_path / "model.onnx", ids, mask), of_torch(merged, ids, mask))


def test_other_logits_are_refused(llama: Pair) -> None:
    """The check sees adapters that the file has not."""
    batches = make_prompts(FAMILIES["llama"].inputs(), 48)
    with pytest.raises(
        ParityError, match=r"with its cache and the torch graph .* disagree on example batch=2 prompt=11"
    ):
        check_generation(
            Path(llama.base.path),
            inference(llama.gm),
            torch.float32,
            batches,
            TOLERANCES[torch.float32],
            lambda done: None,
        )


def test_prompts_fit_the_model() -> None:
    example = FAMILIES["llama"].inputs()
    assert [[len(row) for row in p.rows] for p in make_prompts(example, None)] == [[11, 9], [1], [23, 11, 1]]
    assert [[len(row) for row in p.rows] for p in make_prompts(example, 20)] == [[11, 9], [1], [12, 11, 1]]
    with pytest.raises(ExportError, match="takes 8 tokens, too few"):
        make_prompts(example, STEPS)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bert", "BertForSequenceClassification does not generate text"),
        ("whisper", "WhisperForConditionalGeneration is an encoder with a decoder"),
        ("mlp", "is no model of Hugging Face transformers"),
    ],
)
def test_what_is_no_decoder_is_refused(zoo: Zoo, name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=reason):
        lorafx.export_base(zoo.captured(FAMILIES[name]), tmp_path / "model.onnx", kv_cache=True)
    assert not list(tmp_path.iterdir())


def test_a_past_that_is_not_keys_and_values_is_refused() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 50, "conv_L_cache": 3, "intermediate_size": 40}
    config = hf.Lfm2Config(
        **sizes, num_attention_heads=4, num_key_value_heads=2, layer_types=["conv", "full_attention"]
    )
    gm = captured(hf.Lfm2ForCausalLM(config).eval(), None, None)
    with pytest.raises((ExportError, CaptureError), match="Lfm2ForCausalLM"):
        capture_decoder(gm)


def test_a_loss_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no labels"):
        lorafx.export_base(zoo.captured(FAMILIES["llama"]), tmp_path / "m.onnx", kv_cache=True, keep_loss=True)


def test_a_pickled_graph_no_longer_has_the_code(zoo: Zoo, tmp_path: Path) -> None:
    again = pickle.loads(pickle.dumps(zoo.captured(FAMILIES["llama"])))  # noqa: S301  # made here
    with pytest.raises(ExportError, match=r"lorafx\.save_adapter"):
        lorafx.export_base(again, tmp_path / "model.onnx", kv_cache=True)


def test_the_code_is_kept_without_weights() -> None:
    """Neither the model nor its tensors live on with a graph, which may have moved away from them."""
    model = FAMILIES["gpt2"].build()
    held = weakref.ref(model), weakref.ref(model.lm_head.weight), weakref.ref(model.transformer)  # type: ignore[union-attr, arg-type]
    names = [*model.state_dict()]
    original = Original(model)
    del model
    gc.collect()
    assert [ref() for ref in held] == [None] * 3
    assert {".".join((path, name)) for path, _, name in original.names()} >= {*names}
    assert original.module is not None
    assert not list(original.module.parameters())


def test_sessions_on_one_file(llama: Pair, tmp_path: Path) -> None:
    """Two processes and two threads read one file and its weights at once."""
    ids, mask = prompts(5, 8)
    feed = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    past = [n for n in llama.merged.inputs if n.startswith("past")]
    np.savez(
        tmp_path / "feed.npz",
        **{n: t.numpy() for n, t in feed.items()},
        **dict.fromkeys(past, np.zeros((2, 2, 0, 10), np.float32)),
    )
    program = (
        "import hashlib, sys; import numpy as np, onnxruntime as ort\n"
        "feed = dict(np.load(sys.argv[2]))\n"
        "for _ in range(10):\n"
        "    session = ort.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])\n"
        "    print(hashlib.sha256(session.run(['logits'], feed)[0].tobytes()).hexdigest())"
    )
    command = [sys.executable, "-c", program, str(llama.path), str(tmp_path / "feed.npz")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    with ThreadPoolExecutor(2) as threads:
        tokens = list(threads.map(lambda _: of_file(llama.path, ids, mask).tolist(), range(8)))
    assert tokens == [of_file(llama.path, ids, mask).tolist()] * 8
    digests = [p.communicate()[0].split() for p in processes]
    assert [len(d) for d in digests] == [10, 10]
    assert len({*digests[0], *digests[1]}) == 1
