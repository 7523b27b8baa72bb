"""The example that an export traces with: from the inputs given, or else those of the capture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorafx.errors import ExportError
from lorafx.export.widen import widen_tensor
from lorafx.graph import CapturedModule
from lorafx.passes.example import ExampleInputs, make_example
from lorafx.signature import Signature


@dataclass(frozen=True)
class Example:
    """A tensor for each placeholder, and which of their dimensions are dynamic.

    ``traced`` are as the graph that is written takes them; ``compared`` as the one whose numbers it must have: the
    captured one, in float32 or better if another is written.
    """

    traced: dict[str, Tensor]
    compared: dict[str, Tensor]
    dims: Mapping[str, Mapping[int, str]]


def find_example(plain: CapturedModule, captured: Any, given: ExampleInputs, dtype: torch.dtype | None) -> Example:
    """For a graph, which is written in another dtype if one is given.

    Raises:
        ExportError, InputError: as :func:`flat_example`.
    """
    inputs = flat_example(plain.signature, captured, given)
    traced, compared = inputs, inputs
    if dtype is not None:
        traced = {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}
        compared = {name: widen_tensor(t) for name, t in inputs.items()}
    return Example(traced, compared, _usual_dims(traced) if captured is None else plain.signature.dims)


def flat_example(signature: Signature, captured: Any, given: ExampleInputs) -> dict[str, Tensor]:
    """A tensor for each placeholder: from the inputs given, or else those of the capture.

    Raises:
        ExportError: there are none, or some are missing.
        InputError: they do not fit the graph.
    """
    inputs = captured if given is None else given
    if inputs is None:
        raise ExportError("the graph was traced without example inputs, and ONNX needs some: pass example_inputs=")
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    if isinstance(inputs, Mapping):
        absent = [a.name for a in signature.arguments if a.name not in inputs]
        if absent:
            raise ExportError(
                f"no example for {', '.join(absent)}: pass example_inputs= as a dict of "
                f"{', '.join(a.name for a in signature.arguments)}"
            )
        # Labels may be among a capture's inputs; without the loss they are none of the graph's.
        wanted = {a.name for a in signature.arguments}
        flat = signature.flatten(**{n: v for n, v in inputs.items() if n in wanted})
    else:
        flat = signature.flatten(*inputs)
    return dict(zip(signature.placeholders, flat, strict=True))


def _usual_dims(example: Mapping[str, Tensor]) -> dict[str, Mapping[int, str]]:
    """The dimensions that are dynamic where a capture had no example to find it out with."""
    return {name: roles[0] for name, roles in make_example(dict(example), {}).roles.items()}
