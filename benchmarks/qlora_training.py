"""Whether adapters on a quantized base learn what they learn on the dense one, and what LoftQ takes off the start.

    python benchmarks/qlora_training.py --log qlora_training.jsonl

Three parts, of which --part picks some; each prints a table. Three seeds set adapters' first values and the batches.

- demo: MiniLM on the demo's task, with its splits, recipe and head (benchmarks/variants.py).
- text: a Llama over characters, trained in full on the docstrings of the standard library, then frozen; adapters learn
  the language reference (pydoc's topics), of which every tenth topic is held out.
- start: how far MiniLM's weights and embeddings are off before the first step, by rank.

One line of JSON a run goes to --log, and runs that are in it are not repeated.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import statistics
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from variants import Task, load_task, logits_of, spec

import lorafx
from lorafx import LoraSpec
from lorafx.demo.batches import Texts
from lorafx.demo.data import AREAS, DOCUMENTED, MODULES, load_corpus
from lorafx.demo.model import load_model, load_tokenizer
from lorafx.demo.train import accuracy, compute, fine_tune

#: What is compared: the spec's fields.
WAYS: Mapping[str, Mapping[str, Any]] = {
    "LoRA, dense": {},
    "QLoRA, nf4": {"base": "nf4", "double_quant": True},
    "QLoRA, int8": {"base": "int8"},
    "LoftQ, nf4": {"base": "nf4", "double_quant": True, "init": "loftq"},
}
Run = dict[str, Any]


# The demo's task


def on_demo(task: Task, way: str, seed: int, steps: int) -> Run:
    torch.manual_seed(seed)
    example = task.train.batch(range(4)).inputs
    gm = lorafx.apply(task.model, spec(r=16, alpha=32, **WAYS[way]), example, seed=seed).eval()
    for _ in fine_tune(gm, task.train, steps, torch.Generator().manual_seed(seed)):
        pass
    logits = compute(logits_of(gm), len(AREAS), task.test)
    return {"loss": float(cross_entropy(logits, task.test.labels)), "accuracy": accuracy(logits, task.test.labels)}


# Text

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
LENGTH, BATCH = 64, 16
WINDOWS = 448  # that are held out


def encode(texts: list[str]) -> Tensor:
    """Characters by number; those that are not in the alphabet are left out."""
    number = {c: i for i, c in enumerate(ALPHABET)}
    return torch.tensor([number[c] for text in texts for c in f"{text}\n\n" if c in number])


def docstrings() -> list[str]:
    library, found = Path(sysconfig.get_path("stdlib")), []
    for name in sorted(n for names in MODULES.values() for n in names):
        for path in sorted([library / f"{name}.py", *(library / name).rglob("*.py")]):
            if path.is_file():
                nodes = ast.walk(ast.parse(path.read_bytes()))
                found += [ast.get_docstring(n) or "" for n in nodes if isinstance(n, DOCUMENTED)]
    return [text for text in dict.fromkeys(found) if text]


def windows(text: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        starts = torch.randint(len(text) - LENGTH, (BATCH, 1), generator=generator)
        yield text[starts + torch.arange(LENGTH)]


def text_loss(model: Callable[..., Any], ids: Tensor) -> Tensor:
    logits = model(input_ids=ids)["logits"]
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def train_on(model: nn.Module, text: Tensor, steps: int, rate: float, seed: int) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min((n + 1) / (0.1 * steps), (steps - n) / steps))
    model.train()
    for _, ids in zip(range(steps), windows(text, torch.Generator().manual_seed(seed)), strict=False):
        optimizer.zero_grad()
        text_loss(model, ids).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


class Text:
    """The base, trained in full on docstrings, and the language reference."""

    def __init__(self, steps: int) -> None:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=len(ALPHABET), hidden_size=128, intermediate_size=352, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=LENGTH, use_cache=False,
        )  # fmt: skip
        self.model = transformers.LlamaForCausalLM(config)
        names = sorted(topics)
        self.train = encode([topics[n] for i, n in enumerate(names) if i % 10])
        self.held_out = encode([topics[n] for n in names[::10]])
        train_on(self.model, encode(docstrings()), steps, 3e-3, 0)
        self.model.requires_grad_(False)
        print(f"text: the base's loss on the language reference is {self.measured(self.model):.3f}", file=sys.stderr)

    @torch.no_grad()
    def measured(self, model: Callable[..., Any]) -> float:
        """Nats a character of held-out text, in windows one after the other."""
        ids = self.held_out[: WINDOWS * LENGTH].view(WINDOWS, LENGTH)
        return statistics.fmean(float(text_loss(model, part)) for part in ids.split(64))


def on_text(task: Text, way: str, seed: int, steps: int) -> Run:
    chosen = LoraSpec(r=16, alpha=32, **WAYS[way])
    gm = lorafx.apply(task.model, chosen, {"input_ids": task.train[:LENGTH].view(1, -1)}, seed=seed).eval()
    start = task.measured(gm)
    train_on(gm, task.train, steps, 3e-3, seed)
    return {"start": start, "loss": task.measured(gm)}


# The start


def start_table() -> str:
    """The relative error of weights (the mean over layers) and of the embeddings of 64 sentences, without training."""
    model = load_model(len(AREAS))
    batch = Texts(load_corpus().test[:64], load_tokenizer()).batch(range(64)).inputs
    started = copy.deepcopy(model)

    def off(found: Tensor, wanted: Tensor) -> float:
        return float(((found - wanted).norm() / wanted.norm()).detach())

    lines = ["| start | r | weights off | embeddings off |", "| --- | ---: | ---: | ---: |"]
    for init, ranks in (("kaiming", (8,)), ("loftq", (8, 16, 64)), ("loftq_5", (8, 16, 64))):
        for r in ranks:
            gm = lorafx.apply(model, LoraSpec(r=r, base="nf4", init=init, exclude_modules=["head"]), batch).eval()
            started.load_state_dict(lorafx.merged_state_dict(gm))
            names = [site.weight for site in lorafx.sites(gm)]
            weights = statistics.fmean(off(started.get_parameter(n), model.get_parameter(n)) for n in names)
            with torch.no_grad():
                embeddings = off(started.embed(**batch), model.embed(**batch))
            name, rank = ("nf4 alone", "") if init == "kaiming" else (init, str(r))
            lines.append(f"| {name} | {rank} | {weights:.4f} | {embeddings:.4f} |")
    return "\n".join(lines)


def table(runs: list[Run]) -> str:
    lines = ["| way | before | loss | each seed | over dense | accuracy |", "| --- | ---: | ---: | --- | ---: | ---: |"]

    def spread(values: list[float], digits: int) -> str:
        deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.{digits}f}{deviation}"

    for way in WAYS:
        own = sorted((r for r in runs if r["way"] == way), key=lambda r: r["seed"])
        if not own:
            continue
        dense = {r["seed"]: r["loss"] for r in runs if r["way"] == "LoRA, dense"}
        over = [r["loss"] - dense[r["seed"]] for r in own if r["seed"] in dense]
        losses, shares = [r["loss"] for r in own], [100 * r["accuracy"] for r in own if "accuracy" in r]
        columns = [
            way, f"{own[0]['start']:.3f}" if "start" in own[0] else "", spread(losses, 3),
            ", ".join(f"{loss:.3f}" for loss in losses),
            f"{statistics.fmean(over):+.3f}" if over else "", spread(shares, 1) if shares else "",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=["demo", "text", "start"], default=["demo", "text", "start"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--base-steps", type=int, default=400)
    parser.add_argument("--log", type=Path, default=Path("qlora_training.jsonl"))
    options = parser.parse_args()
    done = [json.loads(line) for line in options.log.read_text().splitlines()] if options.log.exists() else []
    for part in options.part:
        if part == "start":
            print(f"\nThe start\n\n{start_table()}", flush=True)
            continue
        keys = {"part": part, "steps": options.steps, "base_steps": options.base_steps if part == "text" else 0}
        runs = [r for r in done if all(r[k] == v for k, v in keys.items())]
        wanted = [(w, s) for s in options.seeds for w in WAYS if (w, s) not in {(r["way"], r["seed"]) for r in runs}]
        task: Any = (Text(options.base_steps) if part == "text" else load_task()) if wanted else None
        for way, seed in wanted:
            found = (on_text if part == "text" else on_demo)(task, way, seed, options.steps)
            runs.append({**keys, "way": way, "seed": seed, **found})
            print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
            with options.log.open("a") as log:
                log.write(json.dumps(runs[-1]) + "\n")
        print(f"\n{part}\n\n{table(runs)}", flush=True)


if __name__ == "__main__":
    main()
