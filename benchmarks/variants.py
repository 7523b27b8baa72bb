"""What each variant reaches with how many parameters: the demo's task, with its splits, head and recipe.

Every run starts from the linear probe's head, trains the adapters and the head for the same number of steps on
the same batches (a seed sets their order and the adapters' first values), and is measured on held-out text. One
line of JSON a run goes to --log, and runs that are in it are not repeated; the table is Markdown.

    python benchmarks/variants.py --seeds 0 1 2 --steps 100 --log variants.jsonl
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafx import LoraSpec, RankScheduler, allocate_ranks, apply
from lorafx.demo.batches import Texts
from lorafx.demo.data import AREAS, load_corpus
from lorafx.demo.model import load_model, load_tokenizer
from lorafx.demo.train import LEARNING_RATE, accuracy, compute, fine_tune, fit_probe, make_optimizer
from lorafx.graph import CapturedModule
from lorafx.ir import find_adapter

HEAD = ("head",)
CALIBRATION_BATCHES = 4


@dataclass(frozen=True)
class Method:
    """A row of the table. ``rate`` is AdamW's; ``allocate`` spreads the spec's parameters over the layers first."""

    name: str
    spec: LoraSpec
    rate: float = LEARNING_RATE
    allocate: bool = False


def spec(**fields: Any) -> LoraSpec:
    return LoraSpec(target_modules="all-linear", dropout=0.1, modules_to_save=HEAD, **fields)


#: VeRA's few numbers take a larger step (the paper trains them at 4 to 10 times LoRA's rate; table 7 and 8 there).
METHODS = (
    *(Method(f"LoRA r={r}", spec(r=r, alpha=2 * r)) for r in (2, 4, 8, 16)),
    Method("rsLoRA r=16", spec(r=16, alpha=16, rslora=True)),
    Method("DoRA r=8", spec(r=8, alpha=16, variant="dora")),
    Method("VeRA r=256", spec(r=256, variant="vera"), rate=10 * LEARNING_RATE),
    Method("AdaLoRA r=6 to 4", spec(r=6, alpha=12, variant="adalora", options={"target_r": 4})),
    Method("allocated, mean r=4", spec(r=4, alpha=8), allocate=True),
)


@dataclass(frozen=True)
class Task:
    model: nn.Module
    train: Texts
    validation: Texts
    test: Texts
    probe: tuple[float, float]


def load_task() -> Task:
    corpus, tokenizer, model = load_corpus(), load_tokenizer(), load_model(len(AREAS))
    train, validation, test = (Texts(p, tokenizer) for p in (corpus.train, corpus.validation, corpus.test))
    width = model.head.in_features
    x, validation_x, test_x = (compute(model.embed, width, texts) for texts in (train, validation, test))
    probe = fit_probe((x, train.labels), (validation_x, validation.labels), len(AREAS))
    model.head.load_state_dict({"weight": probe.weight, "bias": probe.bias})
    found = (accuracy(probe.logits(validation_x), validation.labels), accuracy(probe.logits(test_x), test.labels))
    return Task(model, train, validation, test, found)


def run(task: Task, method: Method, seed: int, steps: int) -> dict[str, Any]:
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    example = task.train.batch(range(4)).inputs
    chosen = method.spec
    if method.allocate:
        batches = task.train.shuffled(32, torch.Generator().manual_seed(seed))
        some = [next(batches) for _ in range(CALIBRATION_BATCHES)]
        chosen = allocate_ranks(
            task.model,
            chosen,
            [{**b.inputs, "labels": b.labels} for b in some],
            budget=adapter_parameters(apply(task.model, chosen, example)),
            method="gradient",
            loss_fn=lambda outputs, batch: nn.functional.cross_entropy(outputs["logits"], batch["labels"]),
            example_inputs=example,
        ).spec
    gm = apply(task.model, chosen, example, seed=seed)
    started_with = adapter_parameters(gm)
    optimizer = make_optimizer(gm, method.rate)
    scheduler, penalty = None, None
    if chosen.variant == "adalora":
        scheduler = RankScheduler(gm, optimizer, total_steps=steps, tinit=steps // 10, tfinal=steps // 3)
        penalty = weighted(scheduler)
    for _ in fine_tune(gm, task.train, steps, generator, optimizer, penalty):
        if scheduler is not None:
            scheduler.step()
    gm.eval()
    found = {
        name: accuracy(compute(logits_of(gm), len(AREAS), texts), texts.labels)
        for name, texts in (("validation", task.validation), ("test", task.test))
    }
    return {
        "method": method.name,
        "seed": seed,
        "steps": steps,
        "started_with": started_with,
        "parameters": adapter_parameters(gm),
        **found,
        "seconds": round(time.perf_counter() - start, 1),
    }


def weighted(scheduler: RankScheduler) -> Callable[[], Tensor]:
    return lambda: scheduler.penalty()


def logits_of(gm: CapturedModule) -> Callable[..., Tensor]:
    def logits(**inputs: Tensor) -> Tensor:
        found: Tensor = gm(**inputs)["logits"]
        return found

    return logits


def adapter_parameters(gm: CapturedModule) -> int:
    """What the adapters train beside the head."""
    return sum(p.numel() for site in find_adapter(gm).sites for p in site.parameters(gm).values())


def table(task: Task, runs: list[dict[str, Any]]) -> str:
    lines = [
        "| method | trained beside the head | validation | test | test, each seed |",
        "| --- | ---: | ---: | ---: | --- |",
        f"| linear probe | 0 | {100 * task.probe[0]:.1f} | {100 * task.probe[1]:.1f} | |",
    ]
    for method in METHODS:
        own = [r for r in runs if r["method"] == method.name]
        if not own:
            continue
        count = f"{own[0]['parameters']:,}"
        if own[0]["started_with"] != own[0]["parameters"]:
            count = f"{own[0]['started_with']:,} to {count}"
        columns = []
        for split in ("validation", "test"):
            values = [100 * r[split] for r in own]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            columns.append(f"{statistics.mean(values):.1f}{spread}")
        each = ", ".join(f"{100 * r['test']:.1f}" for r in own)
        lines.append(f"| {method.name} | {count} | {' | '.join(columns)} | {each} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--methods", nargs="+", choices=[m.name for m in METHODS], default=[m.name for m in METHODS])
    parser.add_argument("--log", type=Path, default=Path("variants.jsonl"))
    options = parser.parse_args()
    runs = [json.loads(line) for line in options.log.read_text().splitlines()] if options.log.exists() else []
    runs = [r for r in runs if r["steps"] == options.steps]
    task = load_task()
    for seed in options.seeds:
        for method in METHODS:
            if method.name not in options.methods or any((r["method"], r["seed"]) == (method.name, seed) for r in runs):
                continue
            found = run(task, method, seed, options.steps)
            runs.append(found)
            print(json.dumps(found), file=sys.stderr, flush=True)
            with options.log.open("a") as log:
                log.write(json.dumps(found) + "\n")
    print(table(task, runs))


if __name__ == "__main__":
    main()
