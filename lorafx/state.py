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
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorafx.adapter_config import adapter_config, trained_modules
from lorafx.errors import AdapterError, SpecError
from lorafx.graph import CapturedModule, get_path
from lorafx.ir import Adapter, Site, base_modules, find_adapter
from lorafx.spec import PEFT_CONFIG_NAME, LoraSpec

WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."


def adapter_state_dict(gm: CapturedModule, adapter: str | None = None) -> dict[str, Tensor]:
    """What training changes, under its names in ``gm.state_dict()`` and sharing its memory.

    The parameters of ``adapter`` (None: the active one), and its copies of trained biases and of the parameters and
    persistent buffers of ``modules_to_save``; it goes back by ``gm.load_state_dict(state, strict=False)``. Other
    buffers (those of a BatchNorm outside ``modules_to_save``) are not in it, as they are not in PEFT's files.

    Raises:
        AdapterError: the graph has no such adapter.
    """
    state = gm.state_dict()
    return {name: state[name] for name in find_adapter(gm, adapter).parameter_names if name in state}


def save_adapter(
    gm: CapturedModule,
    directory: str | os.PathLike[str],
    adapter: str | None = None,
    *,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write the adapter to ``directory`` so that PEFT and :func:`load_adapter` read it.

    Both files are written whole inside the directory and then renamed; other files there are kept. Where
    the config is the one that is there already, one rename replaces the weights. Otherwise the old pair
    goes first and the new config comes last: a process killed in between leaves a directory without
    ``adapter_config.json``, which nothing loads, and never the weights of one adapter under the scaling
    of another. With several processes, call it in one.

    Args:
        gm: a graph from :func:`lorafx.apply`.
        directory: made if it does not exist.
        adapter: which one; None: the one that is active.
        metadata: keys that PEFT notes beside the settings (``base_model_name_or_path``, ``task_type``,
            ...), over those of the spec; None as a value leaves a key out.

    Raises:
        AdapterError: PEFT's format cannot hold this adapter (a site that is no module's; specs that
            differ in more than targets, ranks and alphas), a tensor holds NaN or Inf or no data, or the
            directory cannot be written. The adapter that was there stays.
        SpecError: a metadata key is none of PEFT's.
    """
    found = find_adapter(gm, adapter)
    keys = _peft_keys(gm, found)
    config = adapter_config(gm, found, metadata or {})
    state = adapter_state_dict(gm, found.name)
    if problems := [f"{name}: {why}" for name, tensor in state.items() if (why := _unusable(tensor))]:
        raise AdapterError(_listing("the adapter cannot be saved; nothing was written", problems))
    # Copies, since safetensors refuses tensors that share memory, as tied ones do.
    tensors = {keys[name]: tensor.to("cpu", copy=True).contiguous() for name, tensor in state.items()}
    try:
        _write(Path(directory), (json.dumps(config, indent=2) + "\n").encode(), tensors)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{directory}: the adapter could not be written: {error}") from error


def load_adapter(gm: CapturedModule, directory: str | os.PathLike[str], adapter: str | None = None) -> None:
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
    found = find_adapter(gm, adapter)
    keys = _peft_keys(gm, found)
    spec = _read_spec(directory)
    given = _read_tensors(directory)
    odd_sites = _site_differences(found.sites, spec)
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
    problems += [f"not of this graph's adapter: {key!r}" for key in _extra(given, keys, trained_modules(gm, found))]
    problems += _broken_ties(gm, values)
    if problems:
        listing = _listing(f"{directory}: the adapter does not fit this graph; nothing was loaded", problems)
        raise AdapterError(
            f"{listing}\nAdapt the model that it was trained on, with its settings: apply(model, directory)"
        )
    with torch.no_grad():
        for name, value in values.items():
            get_path(gm, name).copy_(value)


def _peft_keys(gm: CapturedModule, adapter: Adapter) -> dict[str, str]:
    """PEFT's key for each name of :func:`adapter_state_dict`.

    Raises:
        AdapterError: a site is no module's.
    """
    found, modules = adapter.sites, frozenset(base_modules(gm))
    if misplaced := [s.name for s in found if s.name != s.path or s.name not in modules]:
        raise AdapterError(
            f"site '{misplaced[0]}' is no module of its own (it is a functional call on a bare parameter, or another "
            "name of a shared module), and PEFT's format has no place for its adapter. Leave it out "
            f"(exclude_modules={misplaced!r}), or keep this adapter as "
            "safetensors.torch.save_file(adapter_state_dict(gm), path)"
        )
    wrapped = {s.name for s in found}
    keys = {n: f"{PREFIX}{s.name}.{p}.weight" for s in found for p, n in s.parameter_names.items()}
    for name in adapter.trained:
        module, _, leaf = name.rpartition(".")
        in_file = f"{module}.base_layer.{leaf}" if module in wrapped else name
        keys[adapter.own_name(name)] = PREFIX + in_file
    kept = adapter_state_dict(gm, adapter.name).keys()
    return {name: key for name, key in keys.items() if name in kept}


def _write(directory: Path, config: bytes, tensors: Mapping[str, Tensor]) -> None:
    """Put both files in place. The new ones are made inside, since a rename cannot cross file systems."""
    directory.mkdir(parents=True, exist_ok=True)
    target = {name: directory / name for name in (PEFT_CONFIG_NAME, WEIGHTS_NAME)}
    with tempfile.TemporaryDirectory(dir=directory, prefix=".adapter-") as beside:
        new = {name: Path(beside, name) for name in target}
        old = {name: Path(beside, f"old_{name}") for name in target}
        new[PEFT_CONFIG_NAME].write_bytes(config)
        save_file(dict(tensors), new[WEIGHTS_NAME], metadata={"format": "pt"})
        for path in new.values():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        if target[PEFT_CONFIG_NAME].is_file() and target[PEFT_CONFIG_NAME].read_bytes() == config:
            new[WEIGHTS_NAME].replace(target[WEIGHTS_NAME])
            return
        aside = [name for name in target if target[name].exists()]
        try:
            for name in aside:
                target[name].replace(old[name])
            for name in (WEIGHTS_NAME, PEFT_CONFIG_NAME):
                new[name].replace(target[name])
        except BaseException:
            for name in reversed(aside):
                if old[name].exists():
                    old[name].replace(target[name])
            raise


def _read_spec(directory: Path) -> LoraSpec:
    if not directory.is_dir():
        raise AdapterError(
            f"{directory}: no such directory. Give a local one that holds {PEFT_CONFIG_NAME} and {WEIGHTS_NAME}; an "
            "adapter on a hub must be downloaded first"
        )
    try:
        return LoraSpec.from_json(directory / PEFT_CONFIG_NAME)
    except (SpecError, OSError) as error:
        raise AdapterError(str(error)) from error


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    path = directory / WEIGHTS_NAME
    if not path.is_file():
        pickles = sorted(p.name for p in directory.glob("adapter_model.*"))
        advice = (
            f"{pickles[0]} is not read: a pickle can run any code. If you trust it, convert it with PEFT: "
            "PeftModel.from_pretrained(model, directory).save_pretrained(directory)"
            if pickles
            else "save_adapter and PEFT's save_pretrained write it; look for the directory with both files"
        )
        raise AdapterError(f"{path}: no such file. {advice}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{path}: not a whole safetensors file ({error}). It was cut off or damaged; copy it again"
        ) from error


def _site_differences(found: Iterable[Site], spec: LoraSpec) -> dict[Site, str]:
    """The sites that a config means otherwise than the graph, and how."""
    odd = {}
    for site in found:
        r, scaling = spec.rank_for(site.name), spec.scaling_for(site.name)
        if (spec.variant, r) != (site.variant, site.r) or not math.isclose(scaling, site.scaling):
            odd[site] = (
                f"site '{site.name}': {site.variant}, r={site.r}, scaling={site.scaling:g} in the graph; "
                f"{spec.variant}, r={r}, scaling={scaling:g} in {PEFT_CONFIG_NAME}"
            )
    return odd


def _misfit(value: Tensor, target: Tensor) -> str | None:
    """Why a tensor cannot be loaded into another, or None if it can."""
    if value.shape != target.shape:
        return f"shape {tuple(value.shape)}, expected {tuple(target.shape)}"
    if (value.is_floating_point(), value.is_complex()) != (target.is_floating_point(), target.is_complex()):
        return f"dtype {value.dtype}, expected {target.dtype} or one of its kind"
    if target.is_meta:
        return "the graph's tensor is on the meta device and cannot take values"
    return _unusable(value.to(target.dtype))


def _unusable(tensor: Tensor) -> str | None:
    if tensor.is_meta:
        return "has no data (it is on the meta device)"
    return None if bool(torch.isfinite(tensor).all()) else f"holds NaN or Inf as {tensor.dtype}"


def _extra(given: Iterable[str], keys: Mapping[str, str], modules: Iterable[str]) -> list[str]:
    """Keys that nothing in the graph takes. By ``bias="all"`` PEFT repeats biases of ``modules_to_save``."""
    known = set(keys.values())
    repeated = tuple(f"{PREFIX}{m}.{c}." for m in modules for c in ("original_module", "modules_to_save"))
    return [k for k in given if k not in known and not (k.startswith(repeated) and k.endswith(".bias"))]


def _broken_ties(gm: CapturedModule, values: Mapping[str, Tensor]) -> list[str]:
    first: dict[int, str] = {}
    ties = [(first.setdefault(id(get_path(gm, name)), name), name) for name in values]
    return [
        f"'{a}' and '{b}' are one tensor in the graph and differ in the file"
        for a, b in ties
        if not torch.equal(values[a], values[b])
    ]


def _listing(what: str, problems: Iterable[str]) -> str:
    return "\n  - ".join((f"{what}:", *problems))
