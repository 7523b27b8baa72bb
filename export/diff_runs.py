"""Two ONNX files run on the same inputs: those given, or random ones of sizes that go together."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from lorafx.errors import ExportError
from lorafx.export.onnx_file import OnnxFile
from lorafx.export.parity import Session, Tolerance, difference, random_like
from lorafx.export.report import Parity

#: Sizes of dynamic dimensions in random runs: the first dimension of an input, and any other.
_RANDOM_SIZES = ((1, 5), (3, 8))


def run_both(
    left: OnnxFile,
    right: OnnxFile,
    inputs: str | os.PathLike[str] | Mapping[str, Any] | None,
    random: bool,
    tolerance: Tolerance,
) -> tuple[Parity, ...]:
    """Run two files on the ``inputs``, if there are any, and at ``random``; ``left`` is the reference.

    Raises:
        ExportError: a file cannot be run, they take other inputs or give more outputs, or ``inputs`` lacks some.
        ParityError: one of them cannot run on the inputs, or gives outputs of another shape.
    """
    cases = [("the inputs given", _read_inputs(inputs, left.model))] if inputs is not None else []
    if random:
        for batch, size in _RANDOM_SIZES:
            cases.append((f"random, sizes {batch} and {size}", _random_inputs(left.model, batch, size)))
    if not cases:
        return ()
    _refuse_other_names(left, right)
    first, second = (Session(file.path, str(file.path)) for file in (left, right))
    names = [str(v.name) for v in left.model.graph.outputs]
    rows = []
    for origin, case in cases:
        pairs = zip(names, first(case), second(case), strict=True)
        found = tuple(difference(name, x, y, tolerance) for name, x, y in pairs)
        rows.append(Parity(origin, {}, str(left.path), str(right.path), found))
    return tuple(rows)


def _refuse_other_names(left: OnnxFile, right: OnnxFile) -> None:
    for what, same in (("inputs", set), ("outputs", len)):
        a, b = ([str(v.name) for v in getattr(file.model.graph, what)] for file in (left, right))
        if same(a) != same(b):
            raise ExportError(
                f"{left.path} and {right.path} cannot be run side by side: the {what} of the first are {', '.join(a)}, "
                f"and of the second {', '.join(b)}. Leave out inputs and random to compare the rest"
            )


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
    """Random inputs of a file; integers are 0 or 1, since it does not say what it allows.

    A dynamic dimension has the size ``batch`` if it is the first of an input, or has that one's name. Others have
    ``size``, but for sums of others by their names (a decoder's ``total_sequence``, see :func:`_terms`).
    """
    generator = torch.Generator().manual_seed(batch)
    dims = {str(v.name): [d if isinstance(d, int) else d.value for d in v.shape or ()] for v in model.graph.inputs}
    batches = {held[0] for held in dims.values() if held and held[0] is not None}
    known = {d for held in dims.values() for d in held if isinstance(d, str)}

    def length(dim: int | str | None, first: bool) -> int:
        if isinstance(dim, int):
            return dim
        if first or dim in batches:
            return batch
        return sum(int(term) if term.isdecimal() else size for term in _terms(dim or "", known))

    inputs = {}
    for value in model.graph.inputs:
        assert value.dtype is not None
        name, example = str(value.name), torch.tensor([0, 1]).to(ir.tensor_adapters.to_torch_dtype(value.dtype))
        shape = [length(dim, first=not place) for place, dim in enumerate(dims[name])]
        inputs[name] = random_like(name, example, shape, generator)
    return inputs


def _terms(name: str, known: Collection[str]) -> list[str]:
    """The dimensions and numbers that a dimension is the sum of, by its name.

    Decoders with a cache have one: ``total_sequence`` here, ``total_sequence_length`` in onnxruntime-genai's files,
    both of past and new tokens, and ``past_sequence_length + sequence_length`` in optimum's.
    """
    rest = name.removeprefix("total_")
    if rest != name and f"past_{rest}" in known:
        return [f"past_{rest}", rest]
    return [term.strip() for term in name.split("+")]
