"""What the demo found, as data and as one page of tables."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table


@dataclass(frozen=True)
class Accuracy:
    """Shares of texts given their right area; ``validation`` is None where only the test was run."""

    validation: float | None
    test: float


@dataclass(frozen=True)
class DemoResult:
    """Everything that the demo measured.

    ``probe``: the frozen base with a converged linear head. ``adapted``: the adapted, unmerged graph in torch.
    ``exported``: the merged ONNX file in ONNX Runtime. ``gained``, ``lost``: test texts that only the adapted
    model, or only the probe, got right. ``max_difference``: between the logits of the unmerged graph and of the
    ONNX file, over the whole test split. ``seconds``: wall time by part. ``export``: the ExportReport's dict.
    """

    seed: int
    steps: int
    areas: tuple[str, ...]
    texts: dict[str, int]
    sites: int
    trainable: int
    parameters: int
    probe: Accuracy
    adapted: Accuracy
    exported: Accuracy
    gained: int
    lost: int
    max_difference: float
    path: Path
    file_bytes: int
    adapter_bytes: int
    seconds: dict[str, float]
    export: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, as :meth:`save` writes them."""
        return {**asdict(self), "areas": list(self.areas), "path": str(self.path)}

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Group(self._accuracies(), self._facts())

    def _accuracies(self) -> Table:
        table = Table(
            title=f"Which of {len(self.areas)} areas of the standard library is it about?",
            caption=f"{self.texts['test']:,} test texts, none seen in training. Of these, {self.gained} are right only "
            f"with adapters and {self.lost} only without: {100 * (self.adapted.test - self.probe.test):+.1f} points.",
        )
        table.add_column("model")
        table.add_column("run by")
        table.add_column("validation", justify="right")
        table.add_column("test", justify="right")
        for name, runtime, accuracy in (
            ("frozen MiniLM, linear head", "torch", self.probe),
            ("with adapters", "torch", self.adapted),
            ("merged and exported", "ONNX Runtime", self.exported),
        ):
            validation = "" if accuracy.validation is None else f"{accuracy.validation:.1%}"
            table.add_row(name, runtime, validation, f"{accuracy.test:.1%}")
        return table

    def _facts(self) -> Table:
        table = Table(show_header=False)
        table.add_column(style="bold")
        table.add_column()
        table.add_row("adapted layers", f"{self.sites}")
        table.add_row(
            "trained", f"{self.trainable:,} of {self.parameters:,} parameters ({self.trainable / self.parameters:.2%})"
        )
        table.add_row("largest difference", f"{self.max_difference:.1e} (logits, unmerged torch and merged ONNX)")
        table.add_row("ONNX file", f"{self.path} ({_mebibytes(self.file_bytes)})")
        table.add_row("adapters alone", _mebibytes(self.adapter_bytes))
        total = sum(self.seconds.values())
        table.add_row("time", f"{total:.0f} s: " + ", ".join(f"{k} {v:.0f} s" for k, v in self.seconds.items()))
        return table


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
