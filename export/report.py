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
from lorafx.errors import ExportError
from lorafx.export.commit import draft, write_text
from lorafx.passes.deviation import Deviation

#: What reports call their files' paths.
_PATHS = frozenset({"path", "data_paths"})


@dataclass(frozen=True)
class JsonReport:
    """A report of an ONNX file and its weights, as plain data and as a JSON file, where paths are names of files."""

    path: str
    data_paths: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data that JSON can hold."""
        found: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self, dict_factory=_without_folders)))
        return found

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON.

        Raises:
            ExportError: the file cannot be written, or is one of those that the report is of; what was there is.
        """
        check_place(path, dict.fromkeys([self.path, *self.data_paths], "what the report is of"))
        write_text(path, json.dumps(self.to_dict(), indent=2) + "\n")


def check_place(path: str | os.PathLike[str], taken: Mapping[str, str]) -> None:
    """Refuse a place where no report can be written, or one of files that are, or will be, something else.

    Raises:
        ExportError: it is, by any path, one of ``taken``, which says of each what it is; or as :func:`draft`.
    """
    for file, what in taken.items():
        if os.path.realpath(path) == os.path.realpath(file):
            raise ExportError(f"{path} is {what}, which would be lost: give the report another name or folder")
    with draft(path):
        pass  # what is not committed leaves no trace


def _without_folders(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: _file_names(value) if name in _PATHS else value for name, value in fields}


def _file_names(paths: str | Sequence[str]) -> str | list[str]:
    return Path(paths).name if isinstance(paths, str) else [Path(path).name for path in paths]


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
class TensorRounding:
    """What rounding a merged weight to the file's dtype did to the change that the adapters make.

    ``largest`` is the largest difference of an element from the exact sum, ``relative`` the norm of all of them over
    that of the change, ``survived`` the share of the change that the stored weight has (the projection of what it
    has moved by on the change, over the change's norm).
    """

    weight: str
    largest: float
    relative: float
    survived: float


@dataclass(frozen=True, kw_only=True)
class FileReport(JsonReport):
    """A model's files, and what was checked of them. ``inputs`` are those that a call must give, with their shapes."""

    onnx_bytes: int
    data_bytes: int
    onnx_sha256: str
    opset: int
    nodes: int
    precision: str
    atol: float
    rtol: float
    inputs: Mapping[str, str]
    outputs: tuple[str, ...]
    checks: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def data_path(self) -> str | None:
        """The (first) file of weights, if they have one of their own."""
        return self.data_paths[0] if self.data_paths else None

    def _head(self, graph: str) -> list[str]:
        size = format_bytes(self.onnx_bytes)
        if self.data_paths:
            files = f" in {len(self.data_paths)} files" if len(self.data_paths) > 1 else ""
            size += f" + {format_bytes(self.data_bytes)} of weights{files}"
        return [
            f"ONNX file    {self.path}  ({size})",
            f"graph        {self.nodes} nodes, {graph}",
            f"inputs       {', '.join(f'{name} {shape}' for name, shape in self.inputs.items())}",
            f"outputs      {', '.join(self.outputs)}",
        ]

    def _checks(self) -> list[str]:
        return [f"{name:<12} {result}" for name, result in self.checks.items()]

    def _tail(self) -> list[str]:
        seconds = ", ".join(f"{name} {value:.1f}" for name, value in self.seconds.items())
        return ["", f"seconds      {seconds}", *(f"warning      {warning}" for warning in self.warnings)]


@dataclass(frozen=True, kw_only=True)
class ExportReport(FileReport):
    """What :func:`lorafx.export.export.merge_and_export` wrote and checked.

    ``str(report)`` is the report for people; :meth:`save_json` keeps it. The file itself has no record of where it
    comes from, so that the graphs of a base and of all that is merged into it can be the same to the byte;
    ``provenance`` has: lorafx's version, the settings of each adapter, and SHA-256 digests of adapters and of the
    base's weights (:func:`lorafx.export.provenance.digest`). It names no paths, users or machines.
    ``bytes_changed`` is the size of those weights in the file that adapters changed. ``requantized`` has for weights
    that the file holds in int4 how far that is from what it was made of, as norms over its norm.
    ``base`` is what adapters were folded into. Where that is not what was trained, ``parity`` is beside the merged
    torch graph, and ``deviation`` tells how far that one is from the unmerged one (None: not checked).
    """

    initializers: int
    sites: int
    parity: tuple[Parity, ...] = ()
    bytes_changed: int = 0
    rounding: tuple[TensorRounding, ...] = ()
    requantized: Mapping[str, float] = field(default_factory=dict)
    base: str = "dequantized"
    deviation: Deviation | None = None

    @property
    def max_abs(self) -> float:
        """The largest absolute difference seen between torch's graph and ONNX Runtime."""
        return max((o.max_abs for p in self.parity for o in p.outputs), default=0.0)

    def __str__(self) -> str:
        graph = f"{self.initializers} initializers, opset {self.opset}; {self.sites} adapted layers folded"
        lines = [*self._head(graph), *self._changes(), *self._base(), *self._checks()]
        if self.parity:
            lines += ["", *parity_lines(self.parity), self._tolerance()]
        return "\n".join([*lines, *self._tail()])

    def _changes(self) -> list[str]:
        if not self.rounding:
            return []
        worst = max(self.rounding, key=lambda r: r.relative)
        return [
            f"changed      {format_bytes(self.bytes_changed)} of weights; rounded to {self.precision}, at least "
            f"{min(r.survived for r in self.rounding):.2%} of each change survived. Worst: {worst.weight}, off by "
            f"{worst.largest:.2g} at most, {worst.relative:.2g} of the change's norm"
        ]

    def _base(self) -> list[str]:
        if self.base == "dequantized":
            return []
        found = "not compared (verify=False)" if self.deviation is None else str(self.deviation)
        return [f"merged into  {self.base}; by design, beside the unmerged graph: {found}"]

    def _tolerance(self) -> str:
        return (
            f"tolerance for {self.precision}: |torch - ONNX Runtime| <= "
            f"{self.atol:g} + {self.rtol:g} * largest magnitude of the output"
        )


def parity_lines(rows: Iterable[Parity], sides: tuple[str, str] = ("torch graph", "ONNX Runtime ran")) -> list[str]:
    """The runs as a table; ``sides`` are what is compared: the headings of :attr:`Parity.reference` and ``ran``."""
    table: list[Sequence[str]] = [("inputs", *sides, "output", "max abs", "relative", "allowed")]
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
    widths = [max(len(r[i]) for r in table if r[3]) for i in range(len(table[0]))]  # refusals are sentences
    return ["  ".join(cell.ljust(width) for cell, width in zip(r, widths, strict=True)).rstrip() for r in table]
