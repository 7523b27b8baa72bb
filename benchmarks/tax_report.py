"""The table and the picture of what `benchmarks/tax.py` measured."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch

matplotlib.use("agg")
from matplotlib import pyplot as plt

#: What a row of the table is compared by; the rest of a measurement is in the JSON.
COLUMNS = ("frozen, again", "captured", "lorafx", "lorafx, torch provider", "lorafx, reference", "peft", "full")

#: What a step of lorafx's is to cost at most, over the frozen model's: time and memory, by dtype, rank and adapters.
GOALS = {
    ("fp32", 16): {"lora": (1.06, 1.10), "dropout": (1.15, 1.20), "dora": (1.12, 1.20)},
    ("bf16", 16): {"lora": (1.08, 1.10), "dropout": (1.18, 1.20), "dora": (1.15, 1.20)},
    ("bf16", 64): {"lora": (1.12, 1.15), "dropout": (1.22, 1.25), "dora": (1.18, 1.25)},
}


def write(
    rows: Sequence[dict[str, Any]], calls: Sequence[dict[str, Any]], folder: Path, name: str, command: str
) -> None:
    """``name.json``, ``name.md`` and ``name.png`` in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"steps": rows, "calls": calls}, indent=1) + "\n")
    (folder / f"{name}.md").write_text(markdown(rows, calls, name, command))
    picture(rows, folder / f"{name}.png")


def markdown(rows: Sequence[dict[str, Any]], calls: Sequence[dict[str, Any]], name: str, command: str) -> str:
    ways = [c for c in COLUMNS if any(c in row["ways"] for row in rows)]
    lines = [
        "# What adapters cost",
        "",
        f"`{command}`, with {torch.get_num_threads()} threads, torch {torch.__version__}, on",
        *(f"- {name}" for name in dict.fromkeys(row["processor"] for row in rows)),
        "",
        "Models of so many layers, without embeddings and heads. "
        "A step (forward and backward) over the frozen model's in the same mode: median of the rounds, and quartiles.",
        "*frozen, again* is the frozen model over a copy of itself, so what it is off 1 is noise; *captured* the graph",
        "without adapters. Where noise was above 2 %, a case was measured *again*, three times at most (quick: two);",
        "*noisy*: it stayed above; *goal* is lorafx's. Memory is the peak of a step, of a process each.",
        "",
        f"![the tax as bars]({name}.png)",
        "",
        "| model | layers | dtype | r | adapters | mode | vectors | rounds | goal | " + " | ".join(ways) + " |",
        "| --- | ---: | --- | ---: | --- | --- | --- | ---: | ---: |" + " ---: |" * len(ways),
    ]
    for row in rows:
        case = row["case"]
        cells = (_cell(row, way) for way in ways)
        head = f"| {case['model']} | {row['layers']} | {case['dtype']} | {case['r']} | {case['method']} |"
        lines.append(
            f"{head} {row['mode']}{mark(row)} | {vectors(row)} | {row.get('rounds', '')} | {_goal(row)} | "
            + " | ".join(cells)
            + " |"
        )
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


def mark(row: Mapping[str, Any]) -> str:
    """Whether a case was measured again, or is noisy still."""
    if row["mode"] == "memory":
        return ""
    return ", noisy" if not row["steady"] else ", again" if row["runs"] > 1 else ""


def vectors(row: Mapping[str, Any]) -> str:
    """The last that :func:`processor` says, which tells more than a name of many."""
    return str(row["processor"]).rpartition(", ")[2]


def _ratio(row: Mapping[str, Any], way: str) -> float | None:
    """Time or memory over the frozen model's."""
    found = row["ways"].get(way)
    if found is None:
        return None
    return float(found / row["ways"]["frozen"] if row["mode"] == "memory" else found["ratio"])


def _goal(row: Mapping[str, Any]) -> str:
    case = row["case"]
    found = GOALS.get((case["dtype"], case["r"]), {}).get(case["method"])
    return "" if found is None else f"{found[row['mode'] == 'memory']:.2f}"


def _cell(row: Mapping[str, Any], way: str) -> str:
    ratio = _ratio(row, way)
    if ratio is None:
        return ""
    spread = "" if row["mode"] == "memory" else " ({low:.2f}, {high:.2f})".format_map(row["ways"][way])
    return f"{ratio:.2f}{spread}"


def picture(rows: Sequence[dict[str, Any]], path: Path) -> None:
    shown = ("lorafx", "lorafx, torch provider", "peft", "full")
    ways = [way for way in shown if any(way in row["ways"] for row in rows)]
    figure, axes = plt.subplots(figsize=(8.0, max(3.0, 0.3 * len(rows))), layout="constrained")
    width = 0.8 / max(1, len(ways))
    for i, way in enumerate(ways):
        there = {x + i * width: ratio for x, row in enumerate(rows) if (ratio := _ratio(row, way)) is not None}
        axes.barh(list(there), list(there.values()), width, label=way)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(
        [x + 0.4 - width / 2 for x in range(len(rows))],
        ["{model} {dtype} r={r} {method}, ".format_map(row["case"]) + f"{row['mode']} {vectors(row)}" for row in rows],
        fontsize=7,
    )
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlabel("step over the frozen model's")
    axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def processor() -> str:
    """The processor's name, where the system tells it, and what vectors torch uses there."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or "an unknown processor"
    return f"{name} ({os.cpu_count()} cores), {torch.backends.cpu.get_cpu_capability()}"
