"""What adapters on a quantized base are folded into, and how the result is stored: whoever merges chooses.

    base="dequantized"     W' = W_q + s B A       what was trained, in the dtype that W_q was quantised from
    base="original"        W' = W + s B A         W: the weight that W_q was quantised from
    requantize=True        either, in the format of W_q again, with its settings

With an original, DoRA's ``m / ||W_q + s B A||`` stays the factor that was trained: ``W' = gain (W + s B A)``. So an
adapter that has learned nothing, whose magnitudes are the norms of W_q, gives W back. (With the norms of W instead it
would not, and PEFT, which knows no merge into an original, has no say.)
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorafx.bases.tensor import QuantizedTensor
from lorafx.errors import MergeError
from lorafx.graph import CapturedModule, get_path, named_tensors
from lorafx.ir import ADAPTERS, FOLDED
from lorafx.shards import read_shards

#: Weights that adapters on a quantized base can be folded into.
CHOICES = ("dequantized", "original")

#: The user's own weights: the folder of a checkpoint, tensors by name, or a module.
Original = str | os.PathLike[str] | Mapping[str, Tensor] | nn.Module


@dataclass(frozen=True)
class MergeBase:
    """``original`` has what stands for each quantized weight of the graph, by each name that it has there."""

    original: Mapping[str, Tensor] = field(default_factory=dict)
    requantize: bool = False

    @property
    def is_trained(self) -> bool:
        """Whether the merged graph computes what was trained."""
        return not self.original and not self.requantize

    def rest(self, gm: CapturedModule, changed: Iterable[str]) -> dict[str, Tensor]:
        """The originals of quantized weights other than these: of those that no adapter changes."""
        if self.requantize:
            return {}  # quantised again they would be what they are
        done = {id(get_path(gm, name)) for name in changed}
        left: dict[str, Tensor] = {}
        for name, value in self.original.items():
            if (held := id(get_path(gm, name))) not in done:
                done.add(held)
                left[name] = value
        return left


def choose_base(
    gm: CapturedModule, base: str = "dequantized", original: Original | None = None, requantize: bool = False
) -> MergeBase:
    """The choice, checked; a checkpoint's tensors are mapped into memory and not read.

    Raises:
        MergeError: ``base`` is no such choice; it is ``"original"`` and ``original`` is missing, does not hold each
            quantized weight in its shape or is quantized itself, or ``original`` is given without; or no weight of
            the graph is quantized, so that there is nothing to choose.
        CheckpointError: the checkpoint cannot be read.
    """
    if base not in CHOICES:
        raise MergeError(f"base={base!r} is none of {', '.join(map(repr, CHOICES))}")
    if base == "original" and original is None:
        raise MergeError(
            "base='original' folds into the weights that the base was quantized from: give them as original=, the "
            "folder of a checkpoint, tensors by name, or the model"
        )
    if base != "original" and original is not None:
        raise MergeError(f"original is given, and base={base!r} does not use it: say base='original', or leave it out")
    if base == "dequantized" and not requantize:
        return MergeBase()
    packed = packed_weights(gm)
    if not packed:
        what = "requantize=True" if requantize else "base='original'"
        raise MergeError(
            f"{what} is for a quantized base, and no weight of this graph is quantized: leave it out (and call "
            "lorafx.quantize on a graph before it is adapted to store it so)"
        )
    return MergeBase({} if original is None else _matched(packed, original), requantize)


def packed_weights(gm: CapturedModule) -> dict[str, QuantizedTensor]:
    """The quantized weights of the base, under each name."""
    own = (f"{ADAPTERS}.", f"{FOLDED}.")
    found = ((name, t) for name, t in named_tensors(gm) if not name.startswith(own))
    return {name: t for name, t in found if isinstance(t, QuantizedTensor)}


def _matched(packed: Mapping[str, QuantizedTensor], original: Any) -> dict[str, Tensor]:
    if isinstance(original, nn.Module):
        given = dict(named_tensors(original))
    elif isinstance(original, Mapping):
        given = dict(original)
    elif isinstance(original, str | os.PathLike):
        given = read_shards(Path(original))
    else:
        raise MergeError(f"original is {type(original).__name__}: expected a folder, tensors by name, or a module")
    aliases: dict[int, list[str]] = {}
    for name, held in packed.items():
        aliases.setdefault(id(held), []).append(name)
    matched: dict[str, Tensor] = {}
    problems: list[str] = []
    for names in aliases.values():
        name = next((n for n in names if n in given), names[0])
        problem = _misfit(name, given[name], packed[name]) if name in given else f"no '{name}'"
        if problem is None:
            matched |= dict.fromkeys(names, given[name].detach())
        else:
            problems.append(problem)
    if problems:
        more = f", and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise MergeError(
            f"original does not fit the graph: {'; '.join(problems[:4])}{more}. Give the weights that the base was "
            f"quantized from, by the graph's own names (here they begin with '{next(iter(given), '')}')"
        )
    return matched


def _misfit(name: str, value: object, held: QuantizedTensor) -> str | None:
    """What is wrong with a tensor in the stead of a quantized weight; None if nothing is."""
    if not isinstance(value, Tensor):
        return f"'{name}' is {type(value).__name__}, expected a tensor"
    if isinstance(value, QuantizedTensor):
        return f"'{name}' is stored as {value.packed.format} itself"
    if value.shape != held.shape or not value.is_floating_point():
        return f"'{name}' is {value.dtype} {list(value.shape)}, expected floating {list(held.shape)}"
    return f"'{name}' is on the meta device and has no values" if value.is_meta else None
