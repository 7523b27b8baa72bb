"""Adapters on disk, in PEFT's format: ``adapter_config.json`` beside ``adapter_model.safetensors``.

    base_model.model.<site>.lora_A.weight        [r, in], and lora_B [out, r]: a site's adapter
    base_model.model.<site>.base_layer.bias      a trained bias of an adapted layer
    base_model.model.<name in the state dict>    other trained biases; everything in modules_to_save

The format has a place for adapters of *modules* only. A site on a bare parameter is refused: under a key
that PEFT does not know, its adapter would be dropped there without a word, and the numbers would differ.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lorafx.errors import AdapterError, SpecError
from lorafx.graph import ROOT_MODE, CapturedModule, get_path
from lorafx.ir import Site, Stage, sites, stage
from lorafx.peft_config import TASK_HEADS
from lorafx.spec import ALL_LINEAR, PEFT_CONFIG_NAME, LoraSpec, matches

WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."

#: Fields of which PEFT's config has one value for all sites, and no pattern.
_COMMON_FIELDS = ("variant", "rslora", "dropout", "init", "bias")


def adapter_state_dict(gm: CapturedModule) -> dict[str, Tensor]:
    """What training changes, under its names in ``gm.state_dict()`` and sharing its memory.

    Adapters, trained biases, and the parameters and persistent buffers of ``modules_to_save``. It goes back by
    ``gm.load_state_dict(state, strict=False)``. Other buffers (those of a BatchNorm outside
    ``modules_to_save``) are not in it, as they are not in PEFT's files.

    Raises:
        AdapterError: the graph has no adapters.
    """
    state = gm.state_dict()
    names = dict.fromkeys(n for site in _adapted(gm) for n in site.parameter_names.values())
    whole = {id(get_path(gm, n)) for n in gm.meta["original"]}
    names.update((n, None) for n, p in gm.named_parameters(remove_duplicate=False) if id(p) in whole)
    modules = tuple(f"{m}." for m in _trained_modules(gm))
    names.update((n, None) for n in state if n.startswith(modules))
    return {name: state[name] for name in names}


def save_adapter(
    gm: CapturedModule, directory: str | os.PathLike[str], *, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write the adapter to ``directory`` so that PEFT and :func:`load_adapter` read it.

    Both files are written whole inside the directory and then renamed; other files there are kept. Where
    the settings are those of the adapter that is there already, one rename replaces the weights. Otherwise the old
    pair goes first and the new config comes last: a process killed in between leaves a directory
    without ``adapter_config.json``, which nothing loads, and never the weights of one adapter under the
    scaling of another. With several processes, call it in one.

    Args:
        gm: a graph from :func:`lorafx.apply`.
        directory: made if it does not exist.
        metadata: keys that PEFT notes beside the settings (``base_model_name_or_path``, ``task_type``,
            ...), over those of the spec; None as a value leaves a key out.

    Raises:
        AdapterError: PEFT's format cannot hold this adapter (a site that is no module's; specs that
            differ in more than targets, ranks and alphas), a tensor holds NaN or Inf or no data, or the
            directory cannot be written. The adapter that was there stays.
        SpecError: a metadata key is none of PEFT's.
    """
    keys = _peft_keys(gm)
    config = _peft_config(gm, metadata or {})
    state = adapter_state_dict(gm)
    if problems := [f"{name}: {why}" for name, tensor in state.items() if (why := _unusable(tensor))]:
        raise AdapterError(_listing("the adapter cannot be saved; nothing was written", problems))
    # Copies, since safetensors refuses tensors that share memory, as tied ones do.
    tensors = {keys[name]: tensor.to("cpu", copy=True).contiguous() for name, tensor in state.items()}
    try:
        _write(Path(directory), json.dumps(config, indent=2) + "\n", tensors)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{directory}: the adapter could not be written: {error}") from error


def load_adapter(gm: CapturedModule, directory: str | os.PathLike[str]) -> None:
    """Load an adapter, PEFT's or ours, into a graph with the same sites: all of it or nothing.

    Values are cast to the dtypes in the graph and copied in place, so an optimizer that holds its parameters
    goes on working. Paths written in the files are not followed, and pickles are never read.

    Args:
        gm: a graph from :func:`lorafx.apply`; ``apply(model, directory)`` reads the spec from the same place.
        directory: a local directory with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        AdapterError: a file is missing or damaged; or the adapter does not fit: sites of another rank or
            scaling, and missing, extra, wrongly shaped or non-finite tensors, all in one list.
    """
    directory = Path(directory)
    keys = _peft_keys(gm)
    spec = _read_spec(directory)
    given = _read_tensors(directory)
    odd_sites = _site_differences(_adapted(gm), spec)
    odd_names = {name for site in odd_sites for name in site.parameter_names.values()}
    problems = list(odd_sites.values())
    values: dict[str, Tensor] = {}
    for name, key in keys.items():
        target = get_path(gm, name)
        if key not in given:
            problems.append(f"missing: {key}")
        elif name not in odd_names:  # a site of another rank is reported once, not once for each tensor
            if (why := _misfit(given[key], target)) is None:
                values[name] = given[key].to(device=target.device, dtype=target.dtype)
            else:
                problems.append(f"{key}: {why}")
    problems += [f"not of this graph's adapter: {key!r}" for key in _extra(given, keys, _trained_modules(gm))]
    problems += _broken_ties(gm, values)
    if problems:
        found = _listing(f"{directory}: the adapter does not fit this graph; nothing was loaded", problems)
        raise AdapterError(
            f"{found}\nAdapt the model that it was trained on with its own settings: lorafx.apply(model, directory)"
        )
    with torch.no_grad():
        for name, value in values.items():
            get_path(gm, name).copy_(value)


def _adapted(gm: CapturedModule) -> tuple[Site, ...]:
    if stage(gm) is not Stage.INSERTED:
        raise AdapterError(
            f"the graph is {stage(gm).value} and has no adapters; adapt a model with lorafx.apply(model, spec)"
        )
    return sites(gm)


def _modules(gm: CapturedModule) -> tuple[str, ...]:
    """Names of the original's modules, as PEFT lists them: each module under its first name."""
    adapters = {name.rpartition(".")[0] for site in sites(gm) for name in site.parameter_names.values()}
    return tuple(n for n, _ in gm.named_modules() if n and n != ROOT_MODE and n not in adapters)


def _trained_modules(gm: CapturedModule) -> tuple[str, ...]:
    """The modules that ``modules_to_save`` means."""
    wanted = tuple(m for spec in gm.meta["specs"] for m in spec.modules_to_save)
    return tuple(n for n, _ in gm.named_modules(remove_duplicate=False) if n and matches(n, wanted))


def _peft_keys(gm: CapturedModule) -> dict[str, str]:
    """PEFT's key for each name of :func:`adapter_state_dict`.

    Raises:
        AdapterError: a site is no module's.
    """
    found, modules = _adapted(gm), frozenset(_modules(gm))
    if misplaced := [s.name for s in found if s.name != s.path or s.name not in modules]:
        raise AdapterError(
            f"site '{misplaced[0]}' is no module of its own (it is a functional call on a bare parameter, or another name "
            "of a shared module), and PEFT's format has no place for its adapter. Leave it out (exclude_modules="
            f"{misplaced!r}), or keep this adapter with safetensors.torch.save_file(lorafx.adapter_state_dict(gm), path)"
        )
    wrapped = {s.name for s in found}
    keys = {n: f"{PREFIX}{s.name}.{p}.weight" for s in found for p, n in s.parameter_names.items()}
    for name in adapter_state_dict(gm):
        if name not in keys:
            module, _, leaf = name.rpartition(".")
            keys[name] = f"{PREFIX}{module}.base_layer.{leaf}" if module in wrapped else PREFIX + name
    return keys


def _peft_config(gm: CapturedModule, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """``adapter_config.json`` for a graph: the settings by which PEFT finds exactly its sites."""
    found = _adapted(gm)
    spec = _combined(gm.meta["specs"], found, metadata)
    noted = {**spec.metadata, **metadata}
    spec = replace(spec, metadata={key: value for key, value in noted.items() if value is not None})
    spec = replace(spec, modules_to_save=_modules_to_save(gm, spec))
    spec = _targeting({s.name for s in found}, _modules(gm), spec)
    transposed = any(s.transposed for s in found)
    return {"inference_mode": True, **spec.to_peft(), "fan_in_fan_out": transposed}


def _combined(specs: Sequence[LoraSpec], found: Sequence[Site], metadata: Mapping[str, Any]) -> LoraSpec:
    """One spec for all sites. Of several, patterns with exact names hold what differs in rank and alpha.

    Raises:
        AdapterError: they differ in what PEFT has one value for.
    """
    first, *others = specs
    if not others:
        return first
    differing = [f for f in _COMMON_FIELDS if any(getattr(o, f) != getattr(first, f) for o in others)]
    noted: dict[str, Any] = {}
    for spec in specs:
        for key, value in spec.metadata.items():
            if noted.setdefault(key, value) != value and key not in metadata:
                differing.append(f"metadata[{key!r}]")
    if differing:
        raise AdapterError(
            f"the graph was adapted by {len(specs)} specs that differ in {', '.join(dict.fromkeys(differing))}, and PEFT's "
            "config has one value of each for all sites (only targets, ranks and alphas may differ). Give the specs the same "
            "value (metadata can be given to save_adapter)"
        )
    r, rank_pattern = _exactly({s.name: s.r for s in found})
    alpha, alpha_pattern = _exactly({s.name: s.alpha for s in found})
    return replace(
        first,
        r=r,
        rank_pattern=rank_pattern,
        alpha=alpha,
        alpha_pattern=alpha_pattern,
        target_modules=tuple(s.name for s in found),
        exclude_modules=None,
        modules_to_save=tuple(m for spec in specs for m in spec.modules_to_save),
        metadata=noted,
    )


def _exactly[T](values: Mapping[str, T]) -> tuple[T, dict[str, T]]: ...
