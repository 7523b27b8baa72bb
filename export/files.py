"""Two ONNX files side by side: the same graph? the same weights? the same numbers?"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from lorafx.errors import ExportError
from lorafx.export.compare import Difference, compare
from lorafx.export.parity import TOLERANCES, Session, Tolerance, difference, random_like
from lorafx.export.report import Parity, parity_lines

#: Sizes of dynamic dimensions in random runs: the first dimension of an input, and any other.
_RANDOM_SIZES = ((1, 5), (3, 8))


@dataclass(frozen=True)
class FileComparison:
    """What :func:`verify_files` found.

    ``graph`` is the first difference with names counted, ``structure`` that after renumbering values in
    the order of their definition; ``weights`` names the initializers whose bytes differ.
    """

    left: str
    right: str
    graph: Difference | None
    structure: Difference | None
    weights: tuple[str, ...]
    parity: tuple[Parity, ...] = ()

    @property
    def same_structure(self) -> bool:
        """Whether both have the same graph, names aside."""
        return self.structure is None

    @property
    def same_numbers(self) -> bool:
        """Whether no run differed by more than the tolerance."""
        return all(row.passed for row in self.parity)

    def __str__(self) -> str:
        lines = [f"{self.left}", f"{self.right}"]
        if self.graph is None:
            lines.append("graph    the same, names included")
        elif self.structure is None:
            lines.append(f"graph    the same but for names ({self.graph})")
        else:
            lines.append(f"graph    different: {self.structure}")
        shown = ", ".join(self.weights[:8]) + (", ..." if len(self.weights) > 8 else "")
        lines.append(f"weights  {f'{len(self.weights)} differ: {shown}' if self.weights else 'the same, to the bit'}")
        if self.parity:
            lines += ["", *parity_lines(self.parity)]
        return "\n".join(lines)


def verify_files(
    left: str | os.PathLike[str],
    right: str | os.PathLike[str],
    inputs: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    *,
    random: bool = False,
    tolerance: Tolerance = TOLERANCES[torch.float32],
) -> FileComparison:
    """Compare two ONNX files.

    Args:
        left, right: the files; ``left`` is the reference of numbers.
        inputs: an ``.npz`` file or arrays by input name to run both on.
        random: run both on random inputs (integers are 0 or 1, since a file does not say what it allows).
        tolerance: what counts as the same numbers.

    Raises:
        ExportError: a file cannot be read or run, or ``inputs`` lacks one of its inputs.
        ParityError: one of them cannot run on the inputs, or gives outputs of another shape.
    """
    models = [_load(path) for path in (left, right)]
    cases = [("the inputs given", _read_inputs(inputs, models[0]))] if inputs is not None else []
    if random:
        for batch, size in _RANDOM_SIZES:
            cases.append((f"random, sizes {batch} and {size}", _random_inputs(models[0], batch, size)))
    rows = []
    if cases:
        first, second = (Session(Path(path), str(path)) for path in (left, right))
        names = tuple(str(v.name) for v in models[0].graph.outputs)
        for origin, case in cases:
            pairs = zip(names, first(case), second(case), strict=True)
            found = tuple(difference(n, a, b, tolerance) for n, a, b in pairs)
            rows.append(Parity(origin, {}, str(left), str(right), found))
    a, b = models
    return FileComparison(
        str(left), str(right), compare(a, b), compare(a, b, names=False), _differing(a, b), tuple(rows)
    )


def _load(path: str | os.PathLike[str]) -> ir.Model:
    try:
        return ir.load(path)
    except FileNotFoundError as error:
        raise ExportError(f"there is no file {path}") from error
    except Exception as error:  # protobuf's decoding errors have no public base class
        raise ExportError(f"{path} is no ONNX file: {error}") from error


def _differing(left: ir.Model, right: ir.Model) -> tuple[str, ...]:
    found = []
    for name, value in left.graph.initializers.items():
        other = right.graph.initializers.get(name)
        a, b = value.const_value, None if other is None else other.const_value
        if a is None or b is None or a.tobytes() != b.tobytes():
            found.append(name)
    return (*found, *(n for n in right.graph.initializers if n not in left.graph.initializers))


def _read_inputs(inputs: str | os.PathLike[str] | Mapping[str, Any], model: ir.Model) -> dict[str, Tensor]:
    if isinstance(inputs, Mapping):
        arrays = dict(inputs)
    else:
        try:
            with np.load(inputs, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        except (OSError, ValueError) as error:
            raise ExportError(
                f"cannot read inputs from {inputs}: {error}; it should be a file of numpy.savez"
            ) from error
    missing = [str(v.name) for v in model.graph.inputs if v.name not in arrays]
    if missing:
        raise ExportError(f"the inputs lack {', '.join(missing)}; there are {', '.join(arrays) or 'none'}")
    return {name: torch.as_tensor(value) for name, value in arrays.items()}


def _random_inputs(model: ir.Model, batch: int, size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    inputs = {}
    for value in model.graph.inputs:
        assert value.dtype is not None
        dtype = ir.tensor_adapters.to_torch_dtype(value.dtype)
        shape = [n if isinstance(n, int) else (size if d else batch) for d, n in enumerate(value.shape or ())]
        example = torch.tensor([0, 1]).to(dtype)
        inputs[str(value.name)] = random_like(str(value.name), example, shape, generator)
    return inputs
