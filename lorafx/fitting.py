"""A checkpoint's tensors in the places of a module's: what fits, what is missing, and what is left over."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lorafx.checkpoint_names import named_as_in, without_expected
from lorafx.errors import CheckpointError
from lorafx.packed_files import as_held
from lorafx.shards import file_of

#: How many bytes of tensors whose dtype in the files is not the module's are converted, which takes memory.
_CONVERTED_LIMIT = 2**26

#: How many problems, and how many names, a message lists.
_SHOWN = 12


@dataclass(frozen=True)
class Fitted:
    """A module over a checkpoint's tensors; ``notes`` are sentences for whoever asked for it."""

    model: nn.Module
    notes: tuple[str, ...]


def put_tensors(model: nn.Module, tensors: Mapping[str, Tensor], folder: Path, brought: Collection[str] = ()) -> Fitted:
    """A copy of a module that has these tensors for its parameters and saved buffers; ties stay tied.

    Tensors that the module has no place for (a head that was trained before) are not read and are noted, as
    transformers does, which is also asked which ones need no note, and which buffers keep the module's own values where
    no file has them. ``brought`` are names of tensors that an adapter has: where no file has them they are zeros, until
    it is loaded.

    Raises:
        CheckpointError: they do not fit, with a list of what is missing, of another shape or untied, and of what is
            left over; or something is on the meta device that no file has.
    """
    tensors = named_as_in(model, tensors, folder)
    whole = copy.deepcopy(model)
    wanted = dict(whole.state_dict(keep_vars=True))
    ties: dict[int, list[str]] = {}
    for name, old in wanted.items():
        ties.setdefault(id(old), []).append(name)
    missing, unread = without_expected(model, wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys())
    problems: list[str] = []
    chosen: dict[str, Tensor] = {}
    filled: list[str] = []
    for names in ties.values():
        old = wanted[names[0]]
        if given := [name for name in names if name in tensors]:
            held = as_held(tensors[given[0]], old, whole.get_submodule(given[0].rpartition(".")[0]))
            problems += _misfits(held, old, given, tensors, folder)
            chosen[given[0]] = held
        elif not set(names).isdisjoint(brought):
            chosen[names[0]] = torch.zeros(old.shape, dtype=old.dtype)
            filled.append(names[0])
        elif old.is_meta or not missing.isdisjoint(names):
            problems.append(f"missing: {names[0]} {list(old.shape)}")
    problems += _conversions(chosen, wanted)
    if problems:
        _refuse(folder, problems, unread)
    places = Places(whole)
    for name, new in chosen.items():
        places.put(wanted[name], new.to(wanted[name].dtype))
    if left := [n for n, t in (*whole.named_parameters(), *whole.named_buffers()) if t.is_meta]:
        advice = (
            "is on the meta device and in no file: it is computed, so make the model with its buffers (give its "
            "config, or make it inside lorafx.pretrained.parameters_on_meta())"
        )
        _refuse(folder, [f"'{name}' {advice}" for name in left], unread)
    return Fitted(whole, tuple(_notes(folder, unread, filled)))


def _misfits(
    held: Tensor, old: Tensor, given: Sequence[str], tensors: Mapping[str, Tensor], folder: Path
) -> Iterator[str]:
    """Why a tensor cannot take the place of another, and which of its names have other values in the files."""
    name = given[0]
    if held.shape != old.shape:
        where = file_of(folder, name).name
        yield f"{name}: shape {list(held.shape)}, expected {list(old.shape)} (in {where})"
    for other in given[1:]:
        if not torch.equal(tensors[other], tensors[name]):
            yield f"'{name}' and '{other}' are one tensor in the model and differ in the files"
            return


def _conversions(chosen: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """What is of another dtype than in the module, and of another kind or too much to be converted."""
    differing = {name: (new, wanted[name].dtype) for name, new in chosen.items() if new.dtype != wanted[name].dtype}
    too_much = sum(new.nbytes for new, _ in differing.values()) > _CONVERTED_LIMIT
    return [
        f"{name}: {new.dtype}, and {dtype} in the model; make the model in {new.dtype}"
        for name, (new, dtype) in differing.items()
        if too_much or new.is_floating_point() != dtype.is_floating_point
    ]


def _refuse(folder: Path, problems: Sequence[str], unread: Collection[str]) -> NoReturn:
    shown = list(problems[:_SHOWN])
    if len(problems) > _SHOWN:
        shown.append(f"and {len(problems) - _SHOWN} more")
    if unread:
        shown.append(f"not of this model: {_some(unread)}")
    raise CheckpointError("\n  - ".join((f"{folder}: the checkpoint does not fit the model:", *shown)))


def _notes(folder: Path, unread: Collection[str], filled: Collection[str]) -> Iterator[str]:
    if unread:
        yield f"checkpoint '{folder.name}': not read, for the model has no place for it: {_some(unread)}"
    if filled:
        yield (
            f"checkpoint '{folder.name}': it has no {_some(filled)}; the adapter's is written, and the digest of the "
            "base has zeros there"
        )


def _some(names: Collection[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(sorted(names)[:_SHOWN]) + more


class Places:
    """Where a module's tensors are, to replace each under all its names."""

    def __init__(self, model: nn.Module) -> None:
        self._of: dict[int, list[tuple[dict[str, Any], str]]] = {}
        for module in model.modules():
            for store in (module._parameters, module._buffers):
                for name, held in store.items():
                    self._of.setdefault(id(held), []).append((store, name))

    def put(self, old: Tensor, new: Tensor) -> None:
        value = nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new
        for store, name in self._of[id(old)]:
            store[name] = value
