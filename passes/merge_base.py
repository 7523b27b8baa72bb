"""What adapters on a quantized base are folded into, and how the result is stored: whoever merges chooses.

    base="dequantized"     W' = W_q + s B A       what was trained, in the dtype that W_q was quantised from
    base="original"        W' = W + s B A         W: the weight that W_q was quantised from
    requantize=True        either, in the format of W_q again, with its settings

:func:`lorafx.merge` says what that means for users. With DoRA and an original, the norms are those of ``W_q + s B A``:
those of ``W + s B A`` would not give W back for an adapter that has learned nothing. (PEFT, which knows no merge into
an original, has no say.)
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafx.bases import FORMATS
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
    """``base`` is one of ``CHOICES``.

    For ``"original"``, ``original`` has what stands for each quantized weight of the graph, by each name that it has
    there.
    """

    base: str = "dequantized"
    original: Mapping[str, Tensor] = field(default_factory=dict)
    requantize: bool = False

    @property
    def is_trained(self) -> bool:
        """Whether the merged graph computes what was trained."""
        return self.base == "dequantized" and not self.requantize

    def __str__(self) -> str:
        """For reports."""
        return f"{self.base}, requantized" if self.requantize else self.base

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
    """The choice, checked; a checkpoint's tensors are mapped into memory, and read some rows at a time.

    Raises:
        MergeError: ``base`` is no such choice; it is ``"original"`` and ``original`` is missing, does not hold each
            quantized weight in its shape, is quantized itself, holds NaN or Inf or is another model's, or
            ``original`` is given without; or no weight of the graph is quantized, so that there is nothing to choose.
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
    if original is None:
        return MergeBase(base, requantize=requantize)
    matched = _matched(packed, original)
    _refuse_another_model(packed, matched)
    return MergeBase(base, matched, requantize)


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
        here = f"here they begin with '{next(iter(given))}'" if given else "here there are none"
        raise MergeError(
            f"original does not fit the graph: {'; '.join(problems[:4])}{more}. Give the weights that the base was "
            f"quantized from, by the graph's own names ({here})"
        )
    return matched


def _refuse_another_model(packed: Mapping[str, QuantizedTensor], original: Mapping[str, Tensor]) -> None:
    """Refuse weights that the quantized ones are not from.

    ``||W - Q|| / ||W||`` is at most the format's :meth:`~lorafx.bases.base.Format.largest_loss`, and at least 1 for a
    ``W`` that has nothing to do with ``Q`` (1.4 at the same norm). The limit is halfway: a base that several rounds of
    LoftQ stored is a little further off, and so may weights be that were trained on since.

    Raises:
        MergeError: names the weight that is furthest off, or one that holds NaN or Inf.
    """
    done: set[int] = set()
    worst: tuple[float, float, str] | None = None
    for name, held in packed.items():
        if id(held) in done:
            continue
        done.add(id(held))
        off, most = _distance(name, held, original[name]), FORMATS[held.packed.format].largest_loss(held.packed)
        if not off <= (1 + most) / 2 and (worst is None or off > worst[0]):
            worst = off, most, name
    if worst is not None:
        off, most, name = worst
        raise MergeError(
            f"original is of another model: its '{name}' and what the graph has as {packed[name].packed.format} differ "
            f"by {off:.2g} of its norm, and storing it so loses at most {most:.2g}. Give the weights that the base was "
            "quantized from"
        )


def _distance(name: str, held: QuantizedTensor, original: Tensor) -> float:
    """``||W - Q|| / ||W||``, from some rows at a time; infinite where only Q is not zero."""
    packed = held.packed
    rows = (original.mT if held.turned else original).reshape(-1, packed.width)
    gap = norm = 0.0
    for start, panel in FORMATS[packed.format].panels(packed, torch.float32):
        exact = rows[start : start + len(panel)].to(panel.device, torch.float64)
        gap += float((exact - panel).square().sum())
        norm += float(exact.square().sum())
        if not math.isfinite(norm) and not bool(exact.isfinite().all()):
            raise MergeError(
                f"original: '{name}' holds NaN or Inf, so that the merged weight would too. Look at the checkpoint "
                "that it came from"
            )
    return math.sqrt(gap / norm) if norm else math.inf if gap else 0.0


def _misfit(name: str, value: object, held: QuantizedTensor) -> str | None:
    """What is wrong with a tensor in the stead of a quantized weight; None if nothing is."""
    if not isinstance(value, Tensor):
        return f"'{name}' is {type(value).__name__}, expected a tensor"
    if isinstance(value, QuantizedTensor):
        return f"'{name}' is stored as {value.packed.format} itself"
    if value.shape != held.shape or not value.is_floating_point():
        return f"'{name}' is {value.dtype} {list(value.shape)}, expected floating {list(held.shape)}"
    return f"'{name}' is on the meta device and has no values" if value.is_meta else None
