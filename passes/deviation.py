"""Deviation: how far a merged graph is from the unmerged one, by design where it was merged into another base."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lorafx.bases.tensor import as_dense
from lorafx.errors import MergeError
from lorafx.graph import CapturedModule, get_path, share
from lorafx.ir import Stage, stage
from lorafx.passes.example import ExampleInputs
from lorafx.passes.fold import Fold
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
    the others what the quantization of the base does as well. Weights are compared some rows at a time; of those that
    are quantized in the merged graph one at a time is held dense.

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
    if not isinstance(unmerged, Fold) and held is unmerged:
        return
    flat = as_dense(held).reshape(-1)
    if not isinstance(unmerged, Fold):
        yield flat, as_dense(unmerged).reshape(-1)
        return
    start = 0
    for panel in replace(unmerged, dtype=torch.float64, rounding=None).panels():
        yield flat[start : start + panel.numel()], panel.reshape(-1)
        start += panel.numel()


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
