"""What an export did and what was checked, for people and as JSON."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorafx.checks import format_bytes


@dataclass(frozen=True)
class OutputParity:
    """How far one output is from the reference.

    ``max_abs`` is the largest absolute difference, ``relative`` that over the largest magnitude of the
    reference, ``allowed`` the largest absolute difference that passes: atol + rtol * largest magnitude.
    """

    output: str
    max_abs: float
    relative: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the difference is allowed (NaN is not)."""
        return self.max_abs <= self.allowed


@dataclass(frozen=True)
class Parity:
    """One run of ONNX Runtime beside torch.

    ``inputs`` says where the inputs come from, ``sizes`` what the dynamic dimensions were, ``reference``
    the torch graph that was run, ``ran`` what ONNX Runtime ran. ``refused`` holds torch's message if the
    graph itself does not take such sizes; then nothing was compared.
    """

    inputs: str
    sizes: Mapping[str, int]
    reference: str
    ran: str
    outputs: tuple[OutputParity, ...] = ()
    refused: str | None = None

    @property
    def passed(self) -> bool:
        """Whether every output is as close as it must be."""
        return all(o.passed for o in self.outputs)

    @property
    def where(self) -> str:
        """The inputs and sizes in words."""
        return " ".join([self.inputs, *(f"{name}={size}" for name, size in self.sizes.items())])


@dataclass(frozen=True)
class ExportReport:
    """What :func:`lorafx.export.export.merge_and_export` wrote and checked.

    ``str(report)`` is the report for people; :meth:`save_json` keeps it.
    """

    path: str
    data_path: str | None
    onnx_bytes: int
    data_bytes: int
    opset: int
    nodes: int
    initializers: int
    sites: int
    precision: str
    atol: float
    rtol: float
    inputs: Mapping[str, str]
    outputs: tuple[str, ...]
    checks: Mapping[str, str] = field(default_factory=dict)
    parity: tuple[Parity, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def max_abs(self) -> float:
        """The largest absolute difference seen between torch's unmerged graph and ONNX Runtime."""
        return max((o.max_abs for p in self.parity for o in p.outputs), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data that JSON can hold."""
        found: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self), allow_nan=True))
        return found

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        size = format_bytes(self.onnx_bytes)
        if self.data_path:
            size += f" + {format_bytes(self.data_bytes)} of weights"
        lines = [
            f"ONNX file    {self.path}  ({size})",
            f"graph        {self.nodes} nodes, {self.initializers} initializers, opset {self.opset}; "
            f"{self.sites} adapted layers folded",
            f"inputs       {', '.join(f'{name} {shape}' for name, shape in self.inputs.items())}",
            f"outputs      {', '.join(self.outputs)}",
            *(f"{name:<12} {result}" for name, result in self.checks.items()),
        ]
        if self.parity:
            lines += ["", *parity_lines(self.parity), self._tolerance()]
        lines += [
            "",
            "seconds      " + ", ".join(f"{name} {value:.1f}" for name, value in self.seconds.items()),
        ]
        lines += [f"warning      {warning}" for warning in self.warnings]
        return "\n".join(lines)

    def _tolerance(self) -> str:
        return (
            f"tolerance for {self.precision}: |torch - ONNX Runtime| <= "
            f"{self.atol:g} + {self.rtol:g} * largest magnitude of the output"
        )


def parity_lines(rows: Iterable[Parity]) -> list[str]:
    """The runs as a table."""
    table: list[Sequence[str]] = [
        ("inputs", "torch graph", "ONNX Runtime ran", "output", "max abs", "relative", "allowed")
    ]
    for row in rows:
        if row.refused is not None:
            table.append(
                (
                    row.where,
                    row.reference,
                    f"nothing: torch refuses this size ({row.refused})",
                    "",
                    "",
                    "",
                    "",
                )
            )
        for o in row.outputs:
            numbers = (
                f"{o.max_abs:.2e}",
                f"{o.relative:.2e}",
                f"{o.allowed:.2e}" + ("" if o.passed else "  EXCEEDED"),
            )
            table.append((row.where, row.reference, row.ran, o.output, *numbers))
    widths = [max(len(r[i]) for r in table if len(r[2]) < 40) for i in range(len(table[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(r, widths, strict=True)).rstrip() for r in table]
