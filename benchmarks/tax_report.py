"""The table and the picture of what `benchmarks/tax.py` measured."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch

matplotlib.use("agg")
from matplotlib import pyplot as plt

#: What a row of the table is compared by; the rest of a measurement is in the JSON.
COLUMNS = ("frozen, again", "captured", "lorafx", "lorafx, torch provider", "lorafx, reference", "peft", "full")

MODES = ("eager", "compiled")


def write(
    rows: Sequence[dict[str, Any]], calls: Sequence[dict[str, Any]], folder: Path, name: str, command: str
) -> None:
    """``name.json``, ``name.md`` and ``name.png`` in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"steps": rows, "calls": calls}, indent=1) + "\n")
    (folder / f"{name}.md").write_text(markdown(rows, calls, name, command))
    picture(rows, folder / f"{name}.png")


def markdown(rows: Sequence[dict[str, Any]], calls: Sequence[dict[str, Any]], name: str, command: str) -> str:
    measured = [row[mode]["ways"] for row in rows for mode in MODES if mode in row]
    measured += [row["memory"] for row in rows if "memory" in row]
    ways = [c for c in COLUMNS if any(c in found for found in measured)]
    lines = [
        "# What adapters cost",
        "",
        f"`{command}`, with {torch.get_num_threads()} threads on {processor()}, torch {torch.__version__}.",
        f"Models of {' or '.join(sorted({str(row['layers']) for row in rows}))} layers, without embeddings and heads. "
        "A step (forward and backward) over the frozen model's in the same mode: median of the rounds, and quartiles.",
        "*frozen, again* is the frozen model over a copy of itself, so what it is off 1 is noise; *captured* the graph",
        "without adapters. Where noise was above 2 %, a case was measured *again*, three times at most (quick: two);",
        "*noisy*: it stayed above. Memory is the peak of a step, of a process each.",
        "",
        f"![the tax as bars]({name}.png)",
        "",
        "| model | dtype | r | adapters | mode | " + " | ".join(ways) + " |",
        "| --- | --- | ---: | --- | --- |" + " ---: |" * len(ways),
    ]
    for row in rows:
        case = row["case"]
        head = f"| {case['model']} | {case['dtype']} | {case['r']} | {case['method']} |"
        for mode in MODES:
            if mode in row:
                cells = " | ".join(_ratio(row[mode]["ways"].get(w)) for w in ways)
                lines.append(f"{head} {mode}{mark(row[mode])} | {cells} |")
        if "memory" in row:
            floor = row["memory"]["frozen"]
            shown = (f"{row['memory'][w] / floor:.2f}" if w in row["memory"] else "" for w in ways)
            lines.append(f"{head} memory | " + " | ".join(shown) + " |")
    if calls:
        lines += [
            "",
            "Calls, on a BERT of MiniLM's size (`python benchmarks/calls.py`), median ms. `apply` captures the graph,",
            "which PEFT has none of.",
            "",
            "| call | lorafx | PEFT | lorafx / PEFT |",
            "| --- | ---: | ---: | ---: |",
            *(f"| `{c['call']}` | {c['lorafx']:.1f} | {c['peft']:.1f} | {c['ratio']:.2f} |" for c in calls),
        ]
    return "\n".join(lines) + "\n"


def mark(found: dict[str, Any]) -> str:
    """Whether a case was measured again, or is noisy still."""
    return ", noisy" if not found["steady"] else ", again" if found["runs"] > 1 else ""


def _ratio(found: dict[str, float] | None) -> str:
    return "" if found is None else f"{found['ratio']:.2f} ({found['low']:.2f}, {found['high']:.2f})"


def picture(rows: Sequence[dict[str, Any]], path: Path) -> None:
    timed = [(row["case"], mode, row[mode]["ways"]) for row in rows for mode in MODES if mode in row]
    ways = [c for c in ("lorafx", "lorafx, torch provider", "peft", "full") if any(c in found for _, _, found in timed)]
    figure, axes = plt.subplots(figsize=(max(6.0, 1.1 * len(timed)), 4.0), layout="constrained")
    width = 0.8 / max(1, len(ways))
    for i, way in enumerate(ways):
        there = [(x, found[way]) for x, (_, _, found) in enumerate(timed) if way in found]
        axes.bar([x + i * width for x, _ in there], [f["ratio"] for _, f in there], width, label=way)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(
        [x + 0.4 - width / 2 for x in range(len(timed))],
        [f"{c['model']} {c['dtype']}\nr={c['r']} {c['method']}\n{mode}" for c, mode, _ in timed],
        fontsize=7,
    )
    axes.set_ylabel("step over the frozen model's")
    axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def processor() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or 'an unknown processor'} ({os.cpu_count()} cores)"
