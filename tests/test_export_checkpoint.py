"""From a checkpoint's files to an ONNX file: what a model in memory gives, without one; damaged files are refused."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import lorafx
from generation import of_file, of_torch, prompts
from lorafx import AdapterError, CheckpointError, ExportError
from lorafx.deploy import export_checkpoint
from lorafx.pretrained import parameters_on_meta
from lorafx.shards import INDEX_NAME, read_shards, reading_ahead

CONFIG = hf.LlamaConfig(
    vocab_size=90,
    hidden_size=40,
    intermediate_size=52,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=48,
    tie_word_embeddings=True,
    architectures=["LlamaForCausalLM"],
    initializer_range=0.2,
    pad_token_id=0,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base``: a tied model in several shards; ``adapter``: what PEFT saves of a trained one."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(CONFIG)
    model.save_pretrained(folder / "base", max_shard_size="40KB")
    assert len(list((folder / "base").glob("*.safetensors"))) > 2
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    wrapped.save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def base(source: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to damage."""
    return Path(shutil.copytree(source / "base", tmp_path / "base"))


def shard(base: Path) -> Path:
    return sorted(base.glob("*.safetensors"))[1]


def test_it_is_the_file_of_the_model_in_memory(source: Path, tmp_path: Path) -> None:
    """To the byte, weights and graph; the base's graph too, and numbers are compared with torch."""
    for name in ("files", "memory", "base"):
        (tmp_path / name).mkdir()
    report = export_checkpoint(
        source / "base", source / "base", source / "adapter", tmp_path / "files" / "m.onnx", data_name="w.data"
    )
    model = hf.LlamaForCausalLM.from_pretrained(source / "base").eval()
    gm = lorafx.apply(model, source / "adapter")
    lorafx.load_adapter(gm, source / "adapter")
    memory = lorafx.merge_and_export(gm, tmp_path / "memory" / "m.onnx", data_name="w.data", verify=False)
    assert report.onnx_sha256 == memory.onnx_sha256
    assert (tmp_path / "files" / "w.data").read_bytes() == (tmp_path / "memory" / "w.data").read_bytes()
    assert (report.sites, len(report.parity)) == (4, len([p for p in report.parity if p.passed]))
    assert len(report.parity) >= 3
    assert report.provenance["base_sha256"]
    plain = export_checkpoint(
        CONFIG, source / "base", None, tmp_path / "base" / "m.onnx", data_name="w.data", verify=False
    )
    assert plain.onnx_sha256 == memory.onnx_sha256


def test_a_module_on_the_meta_device(source: Path, tmp_path: Path) -> None:
    with parameters_on_meta():
        model = hf.LlamaForCausalLM(CONFIG).eval()
    assert all(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())
    report = export_checkpoint(model, source / "base", source / "adapter", tmp_path / "m.onnx", verify=False)
    assert report.sites == 4
    assert all(p.is_meta for p in model.parameters()), "the module was changed"
    with torch.device("meta"):
        bare = hf.LlamaForCausalLM(CONFIG)
    with pytest.raises(
        CheckpointError, match=r"rotary_emb.inv_freq' is on the meta device and in no file: it is computed"
    ):
        export_checkpoint(bare, source / "base", None, tmp_path / "no.onnx")


def test_a_parameter_registered_twice_stays_one_on_meta() -> None:
    """Before it is read from a module too; and outside nothing is left of it."""

    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            shared = torch.nn.Parameter(torch.zeros(3))
            self.inner = torch.nn.Linear(3, 3)
            self.outer = shared
            self.inner.bias = shared
            self.register_buffer("computed", torch.arange(3.0))

    with parameters_on_meta():
        model = Tied()
    assert model.outer is model.inner.bias
    assert all(p.is_meta for p in model.parameters())
    assert model.computed.tolist() == [0.0, 1.0, 2.0]  # type: ignore[operator]
    assert not torch.nn.Linear(2, 2).weight.is_meta


def test_another_dtype_is_that_of_a_model_made_in_it(source: Path, tmp_path: Path) -> None:
    report = export_checkpoint(CONFIG, source / "base", source / "adapter", tmp_path / "m.onnx", dtype="fp16")
    assert (report.precision, len(report.parity) >= 3) == ("float16", True)
    assert {r.weight.rpartition(".")[0].rpartition(".")[2] for r in report.rounding} == {"q_proj", "down_proj"}


def test_a_decoder_with_its_cache(source: Path, tmp_path: Path) -> None:
    """The tokens are those of PEFT's merged model; in another dtype too the file is checked against torch."""
    arguments = (source / "base", source / "base", source / "adapter", tmp_path / "m.onnx")
    report = export_checkpoint(*arguments, kv_cache=True, verify=False)
    assert [n for n in report.inputs if n.startswith("past")] == [
        f"past_key_values.{i}.{kind}" for i in range(2) for kind in ("key", "value")
    ]
    base = hf.LlamaForCausalLM.from_pretrained(source / "base").eval()
    merged = peft.PeftModel.from_pretrained(base, source / "adapter").merge_and_unload()
    ids, mask = prompts(4, 9)
    assert torch.equal(of_file(tmp_path / "m.onnx", ids, mask), of_torch(merged, ids, mask))
    half = export_checkpoint(*arguments, kv_cache=True, dtype="fp16")
    assert (half.precision, len(half.parity), "same tokens" in half.checks) == ("float16", 3, True)


def test_numbers_that_do_not_fit_into_memory_are_not_compared(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafx.deploy._available_memory", lambda: 1000)
    report = export_checkpoint(CONFIG, source / "base", source / "adapter", tmp_path / "m.onnx")
    assert report.parity == ()
    assert report.checks["not checked"].startswith("numbers: running the model in torch and in ONNX Runtime takes some")
    assert "same weights" in report.checks
    assert "same graph" in report.checks


def test_reading_ahead_stops_at_its_limit_and_with_the_work(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is over when the block is, and what it cannot read is nothing to it."""
    monkeypatch.setattr("lorafx.shards._PIECE", 1000)
    (base / "zzz.safetensors").symlink_to(base / "none")
    pieces: list[int] = []
    read = io.FileIO.readinto

    class Counting(io.FileIO):
        def readinto(self, into: Any) -> int | None:
            pieces.append(read(self, into) or 0)
            return pieces[-1]

    monkeypatch.setattr(Path, "open", lambda self, *args, **kwargs: Counting(str(self)))
    before = threading.active_count()
    with reading_ahead(base, 2500):
        for thread in threading.enumerate():
            if thread.name == "lorafx-read-ahead":
                thread.join()
    assert pieces == [1000, 1000, 1000]
    with reading_ahead(base, 2**40):
        pass
    assert threading.active_count() == before


# Files that do not fit, or are damaged.


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def whole(base: Path) -> Path:
    """The checkpoint as one file."""
    tensors = {name: tensor.clone() for name, tensor in read_shards(base).items()}
    for path in base.glob("model*"):
        path.unlink()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    return base / "model.safetensors"


def test_what_does_not_fit_is_listed(base: Path, tmp_path: Path) -> None:
    def misfit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.other"] = tensors.pop("model.norm.weight")
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 40)
        tensors["lm_head.weight"] = torch.zeros(90, 40)

    edit(whole(base), misfit)
    with pytest.raises(CheckpointError) as caught:
        export_checkpoint(CONFIG, base, None, tmp_path / "m.onnx")
    text = str(caught.value)
    for part in (
        "missing: model.norm.weight [40]",
        "not of this model: model.norm.other",
        "model.layers.1.mlp.up_proj.weight: shape [3, 40], expected [52, 40]",
        "are one tensor in the model and differ in the files",
    ):
        assert part in text
    assert not (tmp_path / "m.onnx").exists()


def test_a_tied_tensor_may_be_there_under_each_name(base: Path, tmp_path: Path) -> None:
    edit(whole(base), lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert export_checkpoint(CONFIG, base, None, tmp_path / "m.onnx", verify=False).sites == 0


def test_a_few_tensors_in_another_dtype_are_converted(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(whole(base), lambda t: t.update({"model.norm.weight": t["model.norm.weight"].bfloat16()}))
    assert export_checkpoint(CONFIG, base, None, tmp_path / "m.onnx", verify=False).precision == "float32"
    monkeypatch.setattr("lorafx.fitting._CONVERTED_LIMIT", 8)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: torch.bfloat16, and torch.float32 in the model"):
        export_checkpoint(CONFIG, base, None, tmp_path / "m.onnx", verify=False)


def truncate(base: Path) -> None:
    data = shard(base).read_bytes()
    shard(base).write_bytes(data[:-100])


def cut_header(base: Path) -> None:
    shard(base).write_bytes(shard(base).read_bytes()[:50])


def flip(base: Path, at: int) -> None:
    data = bytearray(shard(base).read_bytes())
    data[at] ^= 0xFF
    shard(base).write_bytes(data)


def lie(base: Path) -> None:
    """A shape that needs more bytes than there are."""
    data = shard(base).read_bytes()
    shard(base).write_bytes(data.replace(b"[40,", b"[99,", 1).replace(b",40]", b",99]", 1))


def remove(base: Path) -> None:
    shard(base).unlink()


def index(base: Path, change: Callable[[dict[str, str]], object]) -> None:
    text = json.loads((base / INDEX_NAME).read_text())
    change(text["weight_map"])
    (base / INDEX_NAME).write_text(json.dumps(text))


def escape(base: Path, to: str) -> None:
    index(base, lambda places: places.update({next(iter(places)): to}))


def pickled(base: Path) -> None:
    for path in base.glob("model*"):
        path.unlink()
    (base / "pytorch_model.bin").write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "not a whole safetensors file .* cut off or damaged; copy it again"),
        (cut_header, "not a whole safetensors file"),
        (lambda base: flip(base, 2), "not a whole safetensors file"),
        (lambda base: flip(base, 7), "not a whole safetensors file"),
        (lambda base: flip(base, 12), "not a whole safetensors file"),
        (lie, "not a whole safetensors file"),
        (remove, "no such file. The checkpoint is incomplete"),
        (lambda base: escape(base, "../secret.safetensors"), "paths that lead out of it are not followed"),
        (lambda base: escape(base, "/etc/passwd"), "paths that lead out of it are not followed"),
        (lambda base: escape(base, ".."), "paths that lead out of it are not followed"),
        (
            lambda base: index(base, lambda p: p.pop(next(iter(p)))),
            r"besides, other than model\.safetensors\.index\.json says",
        ),
        (lambda base: (base / INDEX_NAME).write_text("{}"), "not an index of safetensors files"),
        (pickled, "pickles are not read; save_pretrained writes them"),
    ],
    ids=lambda value: getattr(value, "__name__", "") if callable(value) else "",
)
def test_damaged_files_are_refused(damage: Callable[[Path], object], message: str, base: Path, tmp_path: Path) -> None:
    damage(base)
    with pytest.raises(CheckpointError, match=message):
        export_checkpoint(CONFIG, base, None, tmp_path / "m.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_what_else_is_refused_first(source: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no such directory"):
        export_checkpoint(CONFIG, source / "base", tmp_path / "none", tmp_path / "m.onnx")
    with pytest.raises(CheckpointError, match="no such directory"):
        export_checkpoint(CONFIG, tmp_path / "none", None, tmp_path / "m.onnx")
    with pytest.raises(ExportError, match="max_shard_size='x' is no size"):
        export_checkpoint(CONFIG, source / "base", None, tmp_path / "m.onnx", max_shard_size="x")
    assert list(tmp_path.iterdir()) == []


_PEAK = """
import sys, json, torch, lorafx
from pathlib import Path
from safetensors.torch import save_file
sys.path.insert(0, sys.argv[2])
folder = Path(sys.argv[1])
def anonymous():
    fields = dict(l.split(":") for l in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(fields["RssAnon"].split()[0])
class Net(torch.nn.Sequential):
    pass
width, depth = 2048, 16
with lorafx.pretrained.parameters_on_meta():
    model = Net(*(torch.nn.Linear(width, width, bias=False) for _ in range(depth)))
places = {}
for i in range(depth):
    save_file({f"{i}.weight": torch.randn(width, width)}, folder / f"{i}.safetensors")
    places[f"{i}.weight"] = f"{i}.safetensors"
(folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
adapter = None
if sys.argv[3] == "adapted":
    adapter = folder / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": "[0-9]+"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    factors = {"A": (8, width), "B": (width, 8)}
    named = {f"base_model.model.{i}.lora_{f}.weight": torch.randn(s) for i in range(depth) for f, s in factors.items()}
    save_file(named, adapter / "adapter_model.safetensors")
    del named
import threading, time
small = lorafx.apply(torch.nn.Sequential(torch.nn.Linear(8, 8)).eval(), {"target_modules": ["0"]}, torch.randn(2, 8))
lorafx.merge_and_export(small, folder / "small.onnx")  # what is loaded once
most, running = [0], [True]
def watch():
    while running[0]:
        most[0] = max(most[0], anonymous())
        time.sleep(0.002)
start = anonymous()
threading.Thread(target=watch, daemon=True).start()
report = lorafx.export_checkpoint(model, folder, adapter, folder / "m.onnx", verify=False, external_data=True,
                                  example_inputs=torch.randn(2, width))
running[0] = False
assert report.sites == (0 if adapter is None else depth)
print(most[0] - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("kind", ["plain", "adapted"])
def test_a_checkpoint_is_never_in_memory(kind: str, tmp_path: Path) -> None:
    """268 MB of weights, folded or not: at most 3 times the largest tensor (17 MB) and 24 MiB."""
    environment = {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    command = [sys.executable, "-c", _PEAK, str(tmp_path), str(Path(__file__).parent), kind]
    ran = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert int(ran.stdout) <= 3 * 2048 * 2048 * 4 + 24 * 2**20
