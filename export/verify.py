"""The checks of a written file before it gets its name: its graph, its weights, its numbers."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from lorafx.errors import ParityError
from lorafx.export.compare import Difference, compare
from lorafx.export.parity import Case, NoKernelError, Session, Tolerance, run_case
from lorafx.export.report import Parity
from lorafx.export.translate import output_names
from lorafx.export.weights import pieces_of
from lorafx.export.widen import widen_graph, widen_model, widen_tensor
from lorafx.export.write import write_model
from lorafx.graph import CapturedModule


def check_graph(written: ir.Model, base: ir.Model, apart: Sequence[str]) -> Difference | None:
    """Hold a file to the graph of the base's export, names included.

    Returns the first difference where one was asked for: the sites ``apart`` write a weight of their own.

    Raises:
        ParityError: the first difference, where none is allowed.
    """
    difference = compare(written, base)
    if difference is not None and not apart:
        raise ParityError(f"the exported graph is not the graph of the base model's export: {difference}")
    return difference


def check_weights(written: ir.Model, expected: ir.Model) -> int:
    """Hold every initializer of a file to the tensor it should be, bit for bit; returns how many there are.

    Each is made once more, piece by piece.

    Raises:
        ParityError: names the first that differs.
    """
    for name, value in expected.graph.initializers.items():
        wanted, found = value.const_value, written.graph.initializers[name].const_value
        assert wanted is not None
        assert found is not None
        held = np.ascontiguousarray(found.numpy()).reshape(-1).view(np.uint8)
        start, same = 0, held.nbytes == wanted.nbytes
        for piece in pieces_of(wanted) if same else ():
            same = same and np.array_equal(held[start : start + len(piece)], np.frombuffer(piece, np.uint8))
            start += len(piece)
        if not same:
            raise ParityError(f"initializer '{name}' in the file is not the tensor that was to be written")
    return len(expected.graph.initializers)


@dataclass(frozen=True)
class Runtime:
    """What ONNX Runtime runs and the torch graph it is held to, with what brings inputs to their dtypes."""

    session: Session
    graph: CapturedModule
    reference: str
    prepare: Callable[[Tensor], Tensor]
    note: str | None = None


def open_runtime(
    path: Path, graph: CapturedModule, dtype: torch.dtype, scratch: Path, name: str = "unmerged"
) -> Runtime:
    """Load a file; if there are no kernels for its half precision, its float32 twin.

    Args:
        path: the file.
        graph: the torch graph, for inference.
        dtype: the precision of the file's weights.
        scratch: where a twin may be written.
        name: what to call the torch graph.

    Raises:
        ExportError: ONNX Runtime cannot run the file, and not for want of half-precision kernels.
    """
    try:
        if dtype is not torch.bfloat16:
            return Runtime(Session(path, "the file"), graph, name, lambda tensor: tensor)
    except NoKernelError:
        if dtype is not torch.float16:
            raise
    twin = ir.load(path)
    widen_model(twin)
    outside = [v for v in twin.graph.initializers.values() if isinstance(v.const_value, ir.ExternalTensor)]
    write_model(twin, scratch / "twin.onnx", external_data=True, weights=outside)
    note = (
        f"the file itself: ONNX Runtime's CPU provider has no {str(dtype).removeprefix('torch.')}; its "
        "float32 twin ran, with the same nodes and exactly the same weights, beside torch in float32"
    )
    session = Session(scratch / "twin.onnx", "its float32 twin")
    return Runtime(session, widen_graph(graph), f"{name}, in float32", widen_tensor, note)


def check_numbers(
    path: Path,
    graph: CapturedModule,
    dtype: torch.dtype,
    cases: Sequence[Case],
    tolerance: Tolerance,
    progress: Callable[[float], None],
    name: str = "unmerged",
) -> tuple[tuple[Parity, ...], str | None]:
    """Run ONNX Runtime and torch on each case; returns the runs, and a note where a twin was run.

    ``name`` is what to call the torch graph.

    Raises:
        ParityError: an output is further off than the tolerance allows.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        runtime = open_runtime(path, graph, dtype, Path(scratch), name)
        return compare_numbers(runtime, cases, tolerance, progress), runtime.note


def compare_numbers(
    runtime: Runtime, cases: Sequence[Case], tolerance: Tolerance, progress: Callable[[float], None]
) -> tuple[Parity, ...]:
    """:func:`check_numbers` of a file that is open.

    Raises:
        ParityError: as there.
    """
    names = output_names(runtime.graph)
    rows: list[Parity] = []
    for index, case in enumerate(cases):
        row = run_case(case, names, runtime.session, runtime.graph, runtime.reference, tolerance, runtime.prepare)
        if not row.passed:
            worst = max(row.outputs, key=lambda o: o.max_abs - o.allowed)
            raise ParityError(
                f"ONNX Runtime (running {row.ran}) and the {row.reference} torch graph disagree on "
                f"{row.where}: output '{worst.output}' by {worst.max_abs:.3g} (relative "
                f"{worst.relative:.3g}), allowed is {worst.allowed:.3g}"
            )
        rows.append(row)
        progress((index + 1) / len(cases))
    return tuple(rows)
