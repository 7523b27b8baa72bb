"""What optional adapter inputs cost: the file of export_multi beside the plain one of export_base, in ONNX Runtime.

bert: BERT-base's layers (4 of them), 8 x 128 and 1 x 16 tokens; llama: blocks as wide as a Llama of 1 B parameters
(hidden 2048, 2 layers), 256 tokens and one. Adapters of rank 16 at all linear layers (but the head). All runs take
turns, in an order that is drawn for each turn; printed is the median over the turns of each time over the plain file's
in the same turn, with the middle half of the turns; of fewer than 64 tokens, ten times as many turns. Times themselves
say little across machines.

    python benchmarks/multi.py [bert|llama|all] [--turns 40] [--threads 2]
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
import transformers

import lorafx

#: A model, and the batch and length of the inputs to run it on.
Sized = tuple[torch.nn.Module, list[tuple[int, int]]]

SPEC = {"r": 16, "alpha": 32, "target_modules": "all-linear"}


def bert() -> Sized:
    config = transformers.BertConfig(num_hidden_layers=4, num_labels=2)
    return transformers.BertForSequenceClassification(config).eval(), [(8, 128), (1, 16)]


def llama() -> Sized:
    config = transformers.LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=8,
        vocab_size=1000,
    )
    return transformers.LlamaForCausalLM(config).eval(), [(1, 256), (1, 1)]


def randomize(gm: Any) -> None:
    with torch.no_grad():
        for name, parameter in gm.named_parameters():
            if ".lora_" in name and "magnitude" not in name:
                parameter.normal_(std=0.02)


def measure(name: str, make: Callable[[], Sized], turns: int, threads: int) -> None:
    model, sizes = make()
    ids = torch.ones(2, 8, dtype=torch.long)
    example = {"input_ids": ids, "attention_mask": ids}
    gm = lorafx.apply(model, SPEC, example, seed=0).eval()
    lorafx.add_adapter(gm, {**SPEC, "variant": "dora"}, "dora", seed=0)
    randomize(gm)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or the last one spins in the others' way
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        lorafx.export_base(gm, folder / "base.onnx", verify=False, external_data=True)
        (folder / "dora").mkdir()
        lorafx.export_multi(gm, folder / "lora.onnx", {"r16": "default"}, verify=False, external_data=True)
        lorafx.export_multi(gm, folder / "dora" / "dora.onnx", {"r16": "dora"}, verify=False, external_data=True)
        plain = ort.InferenceSession(folder / "base.onnx", options, providers=["CPUExecutionProvider"])
        lora = lorafx.AdapterSession(folder / "lora.onnx", session_options=options)
        dora = lorafx.AdapterSession(folder / "dora" / "dora.onnx", session_options=options)
        for batch, length in sizes:
            ids = np.ones((batch, length), np.int64)
            feed = {"input_ids": ids, "attention_mask": ids}
            runs: dict[str, Callable[[], Any]] = {
                "plain": lambda feed=feed: plain.run(None, feed),
                "base alone": lambda feed=feed: lora.run(feed),
                "LoRA r=16": lambda feed=feed: lora.run(feed, "r16"),
                "base alone, with gains": lambda feed=feed: dora.run(feed),
                "DoRA r=16": lambda feed=feed: dora.run(feed, "r16"),
            }
            count = turns * (10 if batch * length < 64 else 1)
            times = interleaved(runs, count)
            print(f"{name}, {batch} x {length} tokens, {threads} threads, {count} turns: time over the plain file's")
            for what, values in times.items():
                ratios = sorted(t / p for t, p in zip(values, times["plain"], strict=True))
                low, high = ratios[len(ratios) // 4], ratios[-len(ratios) // 4]
                middle = statistics.median(ratios)
                fastest = min(values) / min(times["plain"])
                print(f"  {what:<24}{middle:6.3f}  ({low:.3f} to {high:.3f}; fastest runs {fastest:.3f})")


def interleaved(runs: dict[str, Callable[[], Any]], turns: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    draw = random.Random(0)
    for turn in range(turns + 2):
        draw.shuffle(order)
        for name in order:
            start = time.perf_counter()
            runs[name]()
            if turn > 1:
                times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    models = {"bert": bert, "llama": llama}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="all", choices=[*models, "all"])
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    for name, make in models.items():
        if given.model in (name, "all"):
            measure(name, make, given.turns, given.threads)


if __name__ == "__main__":
    main()
