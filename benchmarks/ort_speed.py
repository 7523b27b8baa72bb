"""Whether ONNX Runtime runs our file as fast as the one of ``torch.onnx.export(dynamo=True)``, its optimizer included.

bert: 2 layers of BERT-base, 4 x 128 and 1 x 16 tokens; llama: a block as wide as that of a Llama of 1 B parameters
(hidden 2048), 1 x 64 tokens and one. Both files have the same dynamic dimensions and weights in float32. "ours, again"
is a copy of our file in a session of its own: how far it is from 1 is what the machine adds. Each turn runs all three,
in an order that goes round from turn to turn. Sessions of one file may differ by some percent for as long as they live
(by where their weights lie), so there are three of each, one after the other. Printed are medians of the ratios within
a turn, their quartiles, and the ratio of the fastest turns.

    python benchmarks/ort_speed.py [bert|llama|all] [--rounds 60] [--threads 2]
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
import transformers

import lorafx

#: A model, and the batch and length of the inputs to run it on.
Sized = tuple[torch.nn.Module, list[tuple[int, int]]]

OURS, AGAIN, TORCH = "ours", "ours, again", "torch.onnx.export"


def bert() -> Sized:
    config = transformers.BertConfig(num_hidden_layers=2, num_labels=2)
    return transformers.BertForSequenceClassification(config).eval(), [(4, 128), (1, 16)]


def llama() -> Sized:
    config = transformers.LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=1,
        num_attention_heads=16,
        num_key_value_heads=8,
        vocab_size=1000,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config).eval(), [(1, 64), (1, 1)]


def export(model: torch.nn.Module, folder: Path) -> dict[str, Path]:
    """The three files."""
    example = {name: torch.ones(2, 8, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    paths = {OURS: folder / "ours.onnx", AGAIN: folder / "again" / "ours.onnx", TORCH: folder / "torch.onnx"}
    gm = lorafx.apply(model, {"r": 16, "target_modules": "all-linear"}, example, seed=0).eval()
    lorafx.merge_and_export(gm, paths[OURS], verify=False, data_name="ours.data")
    paths[AGAIN].parent.mkdir()
    for name in ("ours.onnx", "ours.data"):
        shutil.copy(folder / name, paths[AGAIN].parent)
    dims = {name: {0: "batch", 1: "sequence"} for name in example}
    torch.onnx.export(
        model, (), paths[TORCH], kwargs=example, dynamo=True, dynamic_shapes=dims, external_data=True, verbose=False
    )
    return paths


def measure(name: str, make: Callable[[], Sized], rounds: int, threads: int) -> None:
    model, sizes = make()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # or one waits in the others' way
    with tempfile.TemporaryDirectory() as directory:
        paths = export(model, Path(directory))
        nodes = {what: len(onnx.load(path, load_external_data=False).graph.node) for what, path in paths.items()}
        times: dict[tuple[int, int], dict[str, list[float]]] = {size: {what: [] for what in paths} for size in sizes}
        for first in range(len(paths)):
            order = [*paths][first:] + [*paths][:first]
            sessions = {w: ort.InferenceSession(paths[w], options, providers=["CPUExecutionProvider"]) for w in order}
            for size in sizes:
                ids = np.random.default_rng(0).integers(0, 1000, size)
                feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
                found = {what: session.run(None, feed)[0] for what, session in sessions.items()}
                assert np.allclose(found[OURS], found[TORCH], atol=1e-4), "the files compute different things"
                runs = {w: lambda s=s, f=feed: s.run(None, f) for w, s in sessions.items()}
                for what, taken in take_turns(runs, -(-rounds // len(paths))).items():
                    times[size][what] += taken
        for (batch, length), taken in times.items():
            for what in (AGAIN, OURS):
                over = TORCH if what == OURS else OURS
                ratios = sorted(a / b for a, b in zip(taken[what], taken[over], strict=True))
                low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
                middle, each = statistics.median(ratios), statistics.median(taken[what]) * 1000
                fastest = min(taken[what]) / min(taken[over])
                print(
                    f"| {name} | {batch} x {length} | {what} / {over} | {middle:.3f} | {low:.3f} to {high:.3f} | "
                    f"{fastest:.3f} | {each:.2f} | {nodes[what]} / {nodes[over]} |"
                )


def take_turns(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, by turn; of quick runs several at once. The first turns warm up."""
    times: dict[str, list[float]] = {what: [] for what in runs}
    orders = itertools.cycle(itertools.permutations(runs))
    repeats = 1
    for turn in range(rounds + 2):
        for what in next(orders):
            start = time.perf_counter()
            for _ in range(repeats):
                runs[what]()
            taken = (time.perf_counter() - start) / repeats
            if turn > 1:
                times[what].append(taken)
        if turn == 1:
            repeats = max(1, int(0.04 / taken))
    return times


def main() -> None:
    models = {"bert": bert, "llama": llama}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="all", choices=[*models, "all"])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    print("| model | tokens | what | ratio | quartiles | fastest | ms | nodes |")
    print("| --- | --- | --- | ---: | --- | ---: | ---: | --- |")
    for name, make in models.items():
        if given.model in (name, "all"):
            measure(name, make, given.rounds, given.threads)


if __name__ == "__main__":
    main()
