"""Deviation: how far a merged graph is from the unmerged one, by design where it was merged into another base."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lorafx.bases.ops import describe, packed_rows
from lorafx.bases.tensor import QuantizedTensor, as_dense, quantized
from lorafx.errors import MergeError
from lorafx.graph import CapturedModule, get_path, share
from lorafx.ir import Stage, stage
from lorafx.passes.example import ExampleInputs
from lorafx.passes.fold import TILE, Fold
from lorafx.passes.merge import merge_lazily, taken_out
from lorafx.passes.merge_base import packed_weights


@dataclass(frozen=True)
class Deviation:
    """``|merged - unmerged| / |unmerged|`` (Frobenius norms), 0 where they agree.

    ``weights``: by name, of each that adapters change or that is quantized; the unmerged one is what the base reads as
    with the exact updates added. ``outputs``: of each floating output on the example inputs.
    """

    weights: Mapping[str, float]
    outputs: Mapping[str, float]

    @property
    def worst_weight(self) -> str:
        """The name of the weight that is furthest off; empty if there is none."""
        return max(self.weights, key=lambda name: self.weights[name], default="")

    @property
    def largest(self) -> float:
        """How far that one is off."""
        return max(self.weights.values(), default=0.0)

    def __str__(self) -> str:
        outputs = ", ".join(f"{name} {value:.2g}" for name, value in self.outputs.items()) or "not run"
        return (
            f"weights off by {self.largest:.2g} of their norm at most ({self.worst_weight}), outputs on the example: "
            f"{outputs}"
        )


def merge_deviation(gm: CapturedModule, merged: CapturedModule, example_inputs: ExampleInputs = None) -> Deviation:
    """Hold a merged graph to the adapted one that it comes from, as that is: with its active adapters, in eval mode.

    What is merged in place counts as it was before it was rounded: as if it were active.

    For each choice of :func:`lorafx.merge`: with ``base="dequantized"`` what rounding to the weights' dtype does, with
    the others what the quantization of the base does as well. Weights are compared some rows at a time, in
    float64.

    Args:
        gm: the adapted graph.
        merged: what :func:`lorafx.merge` made of it.
        example_inputs: inputs to run both on instead of those of the capture; without any no outputs are compared.

    Raises:
        MergeError: ``merged`` is no merged graph, or of another model.
        PassError: ``gm`` has no adapters.
    """
    if stage(merged) is not Stage.MERGED:
        raise MergeError(f"merge_deviation needs what lorafx.merge returned; this graph is {stage(merged).value}")
    if gm.meta.get("merged"):
        gm = taken_out(gm)
        gm.recompile()
    graph, folds = merge_lazily(gm)
    unmerged: dict[str, Fold | Tensor] = dict(folds)
    done = {id(get_path(graph, name)) for name in folds}
    for name, weight in packed_weights(graph).items():
        if id(weight) not in done:
            done.add(id(weight))
            unmerged[name] = weight
    weights = {name: _relative(_pieces(_held(merged, name, value.shape), value)) for name, value in unmerged.items()}
    inputs = gm.meta.get("example") if example_inputs is None else example_inputs
    return Deviation(weights, {} if inputs is None else _of_outputs(gm, merged, inputs))


def _held(merged: CapturedModule, name: str, shape: torch.Size) -> Tensor:
    held = merged.state_dict(keep_vars=True).get(name)
    if held is None or held.shape != shape:
        raise MergeError(
            f"merge_deviation: '{name}' is not in the merged graph with shape {list(shape)}: of another model?"
        )
    found: Tensor = held.detach()
    return found


def _pieces(held: Tensor, unmerged: Fold | Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The same rows of both, in the order in which a packed weight has them."""
    turned = isinstance(held, QuantizedTensor) and held.turned
    read, width = _reader(held.mT if turned else held), held.shape[-2 if turned else -1]
    expected: Iterable[Tensor]
    if isinstance(unmerged, Fold):
        dims = tuple(range(held.dim()))
        order = (*dims[:-2], dims[-1], dims[-2]) if turned else None
        expected = replace(unmerged, dtype=torch.float64, rounding=None).panels(order)
    else:
        every, rows = _reader(unmerged.mT if turned else unmerged), held.numel() // width
        expected = (every(first, min(first + TILE, rows)) for first in range(0, rows, TILE))
    start = 0
    for panel in expected:
        exact = panel.reshape(-1, width)
        yield read(start, start + len(exact)), exact
        start += len(exact)


def _reader(weight: Tensor) -> Callable[[int, int], Tensor]:
    """Rows of a weight by where they begin and end, leading dimensions as one; packed ones are dequantised then."""
    packed = quantized(weight)
    if packed is not None:
        return lambda first, end: packed_rows(*describe(packed), first, end)
    rows = as_dense(weight).reshape(-1, weight.shape[-1])
    return lambda first, end: rows[first:end]


def _relative(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """``|found - expected| / |expected|`` over all pieces."""
    gap = norm = 0.0
    for found, expected in pairs:
        exact = expected.double()
        gap += float((found.to(exact.device, torch.float64) - exact).square().sum())
        norm += float(exact.square().sum())
    if norm:
        return math.sqrt(gap / norm)
    return math.inf if gap else 0.0


def _of_outputs(gm: CapturedModule, merged: CapturedModule, inputs: Any) -> dict[str, float]:
    expected, found = (_outputs(graph, inputs) for graph in (gm, merged))
    return {name: _relative([(found[name], value)]) for name, value in expected.items()}


def _outputs(gm: CapturedModule, inputs: Any) -> dict[str, Tensor]:
    twin = share(gm).eval()
    with torch.no_grad():
        if isinstance(inputs, Mapping):
            result = twin(**inputs)
        else:
            result = twin(inputs) if isinstance(inputs, Tensor) else twin(*inputs)
    leaves, _ = pytree.tree_flatten_with_path(result)
    named = {re.sub(r"\W+", ".", pytree.keystr(path)).strip(".") or "output": leaf for path, leaf in leaves}
    return {name: leaf for name, leaf in named.items() if isinstance(leaf, Tensor) and leaf.is_floating_point()}
