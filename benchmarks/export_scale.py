"""Exports of large models: time beside PEFT's merge with torch's exporter, time beside a plain copy, and memory.

small: a Llama of 0.9 B parameters (hidden 2048, 16 layers, bfloat16) in memory, with adapters of rank 16 at all linear
layers: merge_and_export without checks, and PEFT's merge_and_unload with torch.onnx.export(dynamo=True), each in a
process of its own, one after the other. Flushing to disk, which only ours does, is left out of the ratio and printed.

large: a checkpoint of --params parameters in shards of 4 GB, written here: export_checkpoint with an adapter, beside
copying the same bytes and flushing them, both with the files out of the system's cache first. All files are removed.

checked: a Llama of 0.6 B parameters in float32, 2.4 GB: merge_and_export with every check, ONNX Runtime's runs beside
torch's among them, and two sessions over the one file that run at the same time.

Memory is what belongs to the process (anonymous pages): mapped pages of the checkpoint can be dropped by the system. It
is sampled every 5 ms, and printed as growth over what there was when the export began. Prints ratios; absolute times
say little across machines.

    python benchmarks/export_scale.py [small|large|checked|all] [--params 7e9] [--rounds 1] [--folder DIRECTORY]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

import lorafx
from lorafx.pretrained import parameters_on_meta

SHARD = 4 * 10**9
MIB = 2**20
SPEC = {"r": 16, "alpha": 32, "target_modules": "all-linear"}


def memory(field: str = "RssAnon") -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


@contextmanager
def watched(found: dict[str, float]) -> Iterator[None]:
    """Wall time, and the largest growth of the process's own memory, of what is inside."""
    start, peak, running = memory(), [0], threading.Event()

    def watch() -> None:
        while not running.wait(0.005):
            peak[0] = max(peak[0], memory())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    clock = time.perf_counter()
    try:
        yield
    finally:
        found["seconds"] = time.perf_counter() - clock
        running.set()
        thread.join()
        found["growth"] = max(0, peak[0] - start)


def small_config(layers: int = 16) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        vocab_size=32000,
        use_cache=False,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )


def large_config(parameters: float) -> transformers.LlamaConfig:
    """Llama 2's shape, with as many layers as make about so many parameters."""
    width, inner, vocabulary = (4096, 11008, 32000) if parameters > 2e9 else (1024, 2816, 32000)
    layer = 4 * width**2 + 3 * width * inner
    return transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=max(1, round((parameters - 2 * width * vocabulary) / layer)),
        num_attention_heads=width // 128,
        vocab_size=vocabulary,
        use_cache=False,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def model_in_memory(layers: int = 16, dtype: torch.dtype = torch.bfloat16) -> transformers.PreTrainedModel:
    """Random weights; drawn once and repeated, which takes seconds where drawing all takes a minute."""
    config = small_config(layers)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(dtype)
    with parameters_on_meta():
        buffers = dict(transformers.LlamaForCausalLM(config).named_buffers())
    model.to_empty(device="cpu")
    block = (0.02 * torch.randn(2**22)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            flat = parameter.reshape(-1)
            for start in range(0, flat.numel(), block.numel()):
                flat[start : start + block.numel()] = block[: flat.numel() - start]
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    return model.eval()


def inputs() -> dict[str, torch.Tensor]:
    ids = torch.arange(32).reshape(2, 16)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def fill_adapters(model: torch.nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.01)


# Each of these runs in a process of its own and prints a line of JSON.


def run_ours(folder: Path) -> dict[str, Any]:
    model = model_in_memory()
    found: dict[str, Any] = {}
    with watched(applying := {}):
        gm = lorafx.apply(model, SPEC, inputs(), seed=0)
    fill_adapters(gm)
    with watched(found):
        report = lorafx.merge_and_export(gm, folder / "ours.onnx", verify=False)
    sync = report.seconds["sync"]
    lost = min(r.survived for r in report.rounding)
    return {**found, "phases": report.seconds, "sync": sync, "apply": applying["seconds"], "survived": lost}


def run_peft(folder: Path) -> dict[str, Any]:
    import peft

    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model_in_memory(), config)
    fill_adapters(model)
    found: dict[str, Any] = {}
    dims = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in inputs()}
    with watched(found):
        merged = model.merge_and_unload().eval()
        torch.onnx.export(
            merged, (), folder / "peft.onnx", kwargs=inputs(), dynamo=True, dynamic_shapes=dims, verbose=False
        )
    return found


def run_checkpoint(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with watched(found):
        report = lorafx.export_checkpoint(
            folder / "base", folder / "base", folder / "adapter", folder / "out" / "model.onnx", verify=False
        )
    return {**found, "phases": report.seconds, "most": memory("VmHWM")}


def run_checked(folder: Path) -> dict[str, Any]:
    import onnxruntime as ort

    gm = lorafx.apply(model_in_memory(10, torch.float32), SPEC, inputs(), seed=0)
    fill_adapters(gm)
    with watched(found := {}):
        report = lorafx.merge_and_export(gm, folder / "checked.onnx")
    with torch.no_grad():
        largest = float(gm(**inputs())[0].abs().max())
    del gm
    feed = {name: value.numpy() for name, value in inputs().items()}
    sessions = [ort.InferenceSession(folder / "checked.onnx", providers=["CPUExecutionProvider"]) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda session: [session.run(None, feed)[0] for _ in range(3)], sessions)
    return {
        **found,
        "bytes": report.data_bytes,
        "runs": len(report.parity),
        "off": report.max_abs,
        "largest": largest,
        "equal": all((a == first[0]).all() for a in [*first, *second]),
    }


def in_process(worker: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", worker, "--folder", str(folder)]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    answer: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return answer


# What is printed of them.


def small(folder: Path, rounds: int) -> None:
    ratios = []
    for _ in range(rounds):
        theirs, ours = in_process("peft", folder), in_process("ours", folder)
        own = ours["seconds"] - ours["sync"]
        ratios.append(own / theirs["seconds"])
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in ours["phases"].items())
        print(f"PEFT and torch {theirs['seconds']:.1f} s, +{theirs['growth'] / MIB:.0f} MiB")
        print(
            f"ours           {own:.1f} s, +{ours['growth'] / MIB:.0f} MiB  ({phases}; apply took {ours['apply']:.1f})"
        )
        print(f"ratio          {ratios[-1]:.3f}; at least {ours['survived']:.1%} of each change survived bfloat16")
        for path in folder.iterdir():
            path.unlink()
    print(f"median of {rounds}: {statistics.median(ratios):.3f}")


def write_checkpoint(folder: Path, config: transformers.LlamaConfig) -> int:
    """Shards of random bfloat16 numbers, and an index; returns how many bytes of tensors there are."""
    folder.mkdir()
    config.save_pretrained(folder)
    with parameters_on_meta():
        state = transformers.LlamaForCausalLM(config).state_dict()
    shards: list[dict[str, torch.Size]] = [{}]
    size = 0
    for name, tensor in state.items():
        size += 2 * tensor.numel()
        if size > SHARD:
            shards.append({})
            size = 2 * tensor.numel()
        shards[-1][name] = tensor.shape
    block = memoryview((0.02 * torch.randn(2**24)).bfloat16().view(torch.uint8).numpy().data)
    places: dict[str, str] = {}
    total = 0
    for number, shapes in enumerate(shards):
        path = folder / f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        header: dict[str, Any] = {}
        at = 0
        for name, shape in shapes.items():
            end = at + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
            places[name], at = path.name, end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for start in range(0, at, len(block)):
                file.write(block[: at - start])
            os.fsync(file.fileno())
        total += at
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def write_adapter(folder: Path, config: transformers.LlamaConfig) -> None:
    with parameters_on_meta():
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    from safetensors.torch import save_file

    folder.mkdir()
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            path = f"base_model.model.{name}"
            tensors[f"{path}.lora_A.weight"] = 0.01 * torch.randn(16, module.in_features)
            tensors[f"{path}.lora_B.weight"] = 0.01 * torch.randn(module.out_features, 16)
    save_file(tensors, folder / "adapter_model.safetensors")
    names = sorted({n.split(".")[-3] for n in tensors})
    settings = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": names, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def forget(folder: Path) -> None:
    """Take files out of the system's cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(source: Path, target: Path) -> float:
    """Read, write and flush, 8 MiB at a time."""
    target.mkdir()
    start = time.perf_counter()
    for path in sorted(source.glob("*.safetensors")):
        with path.open("rb") as read, (target / path.name).open("wb") as write:
            while piece := read.read(8 * MIB):
                write.write(piece)
            write.flush()
            os.fsync(write.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def large(folder: Path, rounds: int, parameters: float) -> None:
    config = large_config(parameters)
    total = write_checkpoint(folder / "base", config)
    write_adapter(folder / "adapter", config)
    print(f"{total / 2e9:.2f} B parameters, {total / 1e9:.1f} GB")
    ratios = []
    for _ in range(rounds):
        forget(folder / "base")
        copied = copy(folder / "base", folder / "copy")
        forget(folder / "base")
        (folder / "out").mkdir()
        ours = in_process("checkpoint", folder)
        shutil.rmtree(folder / "out")
        ratios.append(ours["seconds"] / copied)
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in ours["phases"].items())
        print(f"copy {copied:.1f} s; export {ours['seconds']:.1f} s ({phases}), ratio {ratios[-1]:.2f}")
        print(f"memory: +{ours['growth'] / MIB:.0f} MiB; with mapped pages at most {ours['most'] / MIB:.0f} MiB in all")
    print(f"median of {rounds}: {statistics.median(ratios):.2f}")


def checked(folder: Path) -> None:
    found = in_process("checked", folder)
    print(f"weights of {found['bytes'] / 1e9:.2f} GB, exported and checked in {found['seconds']:.1f} s")
    print(f"{found['runs']} runs, off by at most {found['off']:.1e} where outputs reach {found['largest']:.1f}")
    print(f"two sessions at the same time, three runs each: {'equal' if found['equal'] else 'NOT equal'} to the bit")


WORKERS = {"ours": run_ours, "peft": run_peft, "checkpoint": run_checkpoint, "checked": run_checked}


#: What can be asked for, from a folder for the files and the command's options.
SECTIONS: Mapping[str, Callable[[Path, argparse.Namespace], None]] = {
    "small": lambda folder, options: small(folder, options.rounds),
    "large": lambda folder, options: large(folder, options.rounds, options.params),
    "checked": lambda folder, options: checked(folder),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=[*SECTIONS, "all"], default="all")
    parser.add_argument("--params", type=float, default=7e9)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--folder", type=Path, help="where to put the files, some 6 bytes a parameter; default: temporary"
    )
    parser.add_argument("--worker", choices=sorted(WORKERS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            answer = WORKERS[options.worker](options.folder)
        print(json.dumps(answer))
        return
    for name, section in SECTIONS.items():
        if options.what in (name, "all"):
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                section(Path(folder), options)


if __name__ == "__main__":
    main()
