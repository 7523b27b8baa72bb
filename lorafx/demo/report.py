"""What the demo found, as data and as one page of tables."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table

from lorafx.checks import format_bytes
from lorafx.export.report import ExportReport


@dataclass(frozen=True)
class Accuracy:
    """Shares of texts given their right area; ``validation`` is None where only the test was run."""

    validation: float | None
    test: float


@dataclass(frozen=True)
class DemoResult:
    """Everything that the demo measured.

    ``probe``: the frozen base with a converged linear head. ``adapted``: the unmerged graph in torch.
    ``exported``: the merged file in ONNX Runtime. ``gained``, ``lost``: test texts that only the adapted
    model, or only the probe, got right. ``max_difference``: of the logits of the unmerged graph and of the
    ONNX file over the test split. ``seconds``: wall time of each part. ``export``: what was written and checked.
    """

    seed: int
    steps: int
    areas: tuple[str, ...]
    texts: dict[str, int]
    trainable: int
    parameters: int
    probe: Accuracy
    adapted: Accuracy
    exported: Accuracy
    gained: int
    lost: int
    max_difference: float
    seconds: dict[str, float]
    export: ExportReport

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, as :meth:`save` writes them."""
        return {**asdict(self), "areas": list(self.areas), "export": self.export.to_dict()}

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Group(self._accuracies(), self._facts())

    def _accuracies(self) -> Table:
        points = 100 * (self.adapted.test - self.probe.test)
        table = Table(
            title=f"Which of {len(self.areas)} areas of the standard library is a sentence about?",
            caption=f"Of {self.texts['test']:,} test sentences, {self.gained} are right only with adapters "
            f"and {self.lost} only without: {points:+.1f} points.",
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
        share = self.trainable / self.parameters
        times = ", ".join(f"{name} {seconds:.0f}" for name, seconds in self.seconds.items())
        table = Table(show_header=False)
        table.add_column(style="bold")
        table.add_column()
        table.add_row("sites", f"{self.export.sites} linear layers adapted")
        table.add_row("trainable share", f"{share:.2%} ({self.trainable:,} of {self.parameters:,})")
        table.add_row("largest difference", f"{self.max_difference:.1e} (unmerged torch to merged ONNX)")
        for check, found in self.export.checks.items():
            table.add_row(check, found)
        size = self.export.onnx_bytes + self.export.data_bytes
        table.add_row("file", f"{self.export.path} ({format_bytes(size)})")
        table.add_row("time", f"{sum(self.seconds.values()):.0f} s ({times})")
        return table
