"""Adapters on disk, in PEFT's format: ``adapter_config.json`` beside ``adapter_model.safetensors``.

What lies where is in :mod:`lorafx.peft_files`, what the config says in :mod:`lorafx.adapter_config`. An adapter that
started by taking a part of the weights (PiSSA, OLoRA, LoRA-GA) is written as the plain LoRA of the original weights
that it amounts to. What PEFT would drop without a word has no place in the format and is refused.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lorafx.adapter_config import adapter_config, trained_modules
from lorafx.adapter_files import WEIGHTS_NAME, read_spec, read_tensors
from lorafx.errors import AdapterError
from lorafx.graph import CapturedModule, get_path, named_tensors
from lorafx.ir import Adapter, Site, find_adapter
from lorafx.passes.residual import plain_factors
from lorafx.peft_files import FILLED, PREFIX, SCALED, SHARED_PREFIX, Entry, Misfit, entries, shared_names
from lorafx.peft_targets import Target, Wrapped, targets
from lorafx.spec import PEFT_CONFIG_NAME, LoraSpec
from lorafx.variants import VARIANTS
from lorafx.variants.inits import find_init


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

    Two fields of a spec have no key in PEFT's config, so a file does not keep them: ``adapter_dtype``, which no number
    depends on, and ``tied="untie"``. An adapter of a weight with another use is therefore read back by
    ``apply(model, replace(LoraSpec.from_json(directory), tied="untie"))`` and :func:`load_adapter`.

    Nor is the base that it was trained on there, quantized or not: say ``base`` (and ``block_size``, ``double_quant``)
    in the same way. By ``init="loftq"`` A and B are relative to the base that it has stored, and the config says
    ``init_lora_weights="loftq"``, of how many bits and rounds, as PEFT's own files do: ``apply(model, directory)`` on
    the dense model makes that base again, and a graph with another start refuses the adapter. PEFT, given a model that
    holds that base already (after one round: the weights quantized as they are), reads it by
    ``init_lora_weights=True``.

    Args:
        gm: a graph from :func:`lorafx.apply`.
        directory: made if it does not exist.
        adapter: which one; None: the one that is active.
        metadata: keys that PEFT notes beside the settings (``base_model_name_or_path``, ``task_type``,
            ...), over those of the spec; None as a value leaves a key out.

    Raises:
        AdapterError: PEFT's format cannot hold this adapter (a parameter that code elsewhere computes with; specs
            that differ in more than targets, ranks and alphas), a tensor holds NaN or Inf or no data, or the
            directory cannot be written. The adapter that was there stays.
        SpecError: a metadata key is none of PEFT's.
    """
    found = find_adapter(gm, adapter)
    shared = {name: get_path(gm, name) for name in map(found.own_name, shared_names(found))}
    state = {**shared, **adapter_state_dict(gm, found.name)}
    if problems := [f"{name}: {why}" for name, tensor in state.items() if (why := _unusable(tensor))]:
        raise AdapterError(_listing("the adapter cannot be saved; nothing was written", problems))
    ranks = {}
    for site in found.sites:
        if site.weight in found.residual:
            a, b = plain_factors(gm, found, site)
            ranks[site] = a.shape[-2]
            state |= {site.parameter_name("lora_A"): a, site.parameter_name("lora_B"): b}
    wrapped = targets(gm, found)
    config = adapter_config(gm, found, wrapped, metadata or {}, ranks)
    shares = bool(config.get("save_projection"))
    made = entries(gm, found, wrapped, LoraSpec.from_peft(config), shared=shares)
    # Copies, since safetensors refuses tensors that share memory, as tied ones do.
    tensors = {e.key: e.write([state[n] for n in e.names]).to("cpu", copy=True).contiguous() for e in made}
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
        adapter: the one to load into; None: the one that is active. ``add_adapter(gm, directory, name)`` makes one.

    Raises:
        AdapterError: a file is missing or damaged; or the adapter does not fit: sites of another variant, rank or
            scaling, relative to other weights (PiSSA), or drawn from another seed (VeRA), and missing, extra, wrongly
            shaped or non-finite tensors, all in one list; or it is merged in place.
    """
    directory = Path(directory)
    found = find_adapter(gm, adapter)
    if found.name in gm.meta.get("merged", ()):
        raise AdapterError(f"adapter '{found.name}' is merged into the weights; call unmerge(gm, '{found.name}') first")
    spec = read_spec(directory)
    given = read_tensors(directory)
    stored = any(SHARED_PREFIX + leaf in given for leaf in shared_names(found))
    shares = stored or bool(spec.options.get("save_projection"))
    wrapped = targets(gm, found)
    expected = entries(gm, found, wrapped, spec, shared=shares)
    odd = {t: why for t in wrapped if (why := _difference(found, t, spec)) is not None}
    odd_names = {name for target in odd for site in target.sites for name in site.parameter_names.values()}
    problems = list(odd.values())
    values: dict[str, Tensor] = {}
    if not stored:
        problems += _other_seed(found, spec)
    for entry in expected:
        if entry.key not in given:
            problems.append(f"missing: {entry.key}")
        elif odd_names.isdisjoint(entry.names):  # what the config has otherwise is said once, not for each tensor
            problems += _take(gm, entry, given[entry.key], values)
    unknown = {key: given[key] for key in given.keys() - {entry.key for entry in expected}}
    problems += _extra(gm, found, wrapped, unknown) if unknown else []
    problems += _broken_ties(gm, values)
    if problems:
        listing = _listing(f"{directory}: the adapter does not fit this graph; nothing was loaded", problems)
        raise AdapterError(
            f"{listing}\nAdapt the model that it was trained on, with its settings: apply(model, directory)"
        )
    with torch.no_grad():
        for name, value in values.items():
            get_path(gm, name).copy_(value)


def _take(gm: CapturedModule, entry: Entry, tensor: Tensor, values: dict[str, Tensor]) -> list[str]:
    """Bring a tensor of the file into the graph's form and add it to ``values``; what is wrong with it."""
    if tuple(tensor.shape) != entry.shape:
        return [f"{entry.key}: shape {tuple(tensor.shape)}, expected {entry.shape}"]
    try:
        read = entry.read(tensor)
    except Misfit as misfit:
        return [f"{entry.key}: {misfit}"]
    problems = []
    for name, value in zip(entry.names, read, strict=True):
        target = get_path(gm, name)
        if (why := _misfit(value, target)) is not None:
            problems.append(f"{entry.key}: {why}")
            continue
        cast = value.to(device=target.device, dtype=target.dtype)
        if not torch.equal(values.setdefault(name, cast), cast):
            problems.append(f"{entry.key}: is the same tensor as another one of the file, and differs from it")
    return problems


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


def _difference(adapter: Adapter, target: Target, spec: LoraSpec) -> str | None:
    """What a config means otherwise than the graph at a target, or None."""
    site = target.sites[0]
    if target.form == "tokens":
        return None
    here, there = _relative_to(site, adapter), _started_from(site, spec)
    start = find_init(spec.init)
    unknown = there != _ITSELF and start is not None and start.by_data
    if here != there or unknown:
        hint = ", which depends on the data that it looked at" if unknown else ""
        return f"site '{site.name}': the adapter is relative to {here} in the graph, and to {there} in the file{hint}"
    r, scaling = spec.rank_for(target.name), spec.scaling_for(target.name)
    fits = r == site.r or target.form == "attention" or (site.variant in FILLED and r > site.r)
    scaled = math.isclose(scaling, site.scaling) or target.form == "attention" or site.variant in SCALED
    if spec.variant == site.variant and fits and scaled:
        return None
    return (
        f"site '{site.name}': {site.variant}, r={site.r}, scaling={site.scaling:g} in the graph; "
        f"{spec.variant}, r={r}, scaling={scaling:g} in {PEFT_CONFIG_NAME}"
    )


_ITSELF = "the weight itself"


def _relative_to(site: Site, adapter: Adapter) -> str:
    """What a site's update is added to in the graph, for people: its start may have changed the weight."""
    if (how := site.loftq) is not None:
        of_rank = "" if how.makes(site.r, site.scaling) else f" at r={how.r}"
        return f"the base that init={how.init!r} stores as {how.base}{of_rank}"
    starts = [_started_from(site, spec) for spec in adapter.specs if not spec.init.startswith("loftq")]
    return next((text for text in starts if text != _ITSELF), _ITSELF) if site.weight in adapter.residual else _ITSELF


def _started_from(site: Site, spec: LoraSpec) -> str:
    """The same for a graph that is yet to be made by a spec."""
    start = find_init(spec.init)
    if spec.variant != site.variant or start is None or not start.changes_base:
        return _ITSELF
    if start.rounds:
        return f"the base that init={spec.init!r} stores as {spec.base}"
    return f"what init={spec.init!r} leaves of it"


def _other_seed(adapter: Adapter, spec: LoraSpec) -> list[str]:
    """Say so where the tensors that sites share are not in the file, and are to be drawn from another seed."""
    seeds = {s.options["projection_prng_key"] for s in adapter.specs if VARIANTS[s.variant].shared}
    theirs = spec.options.get("projection_prng_key")
    return [
        f"projection_prng_key={ours} in the graph, {theirs} in {PEFT_CONFIG_NAME}, and no projections in the file"
        for ours in seeds
        if theirs is not None and ours != theirs
    ]


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


def _extra(gm: CapturedModule, adapter: Adapter, found: Sequence[Target], unknown: Mapping[str, Tensor]) -> list[str]:
    """What nothing in the graph takes.

    By ``bias="all"`` PEFT repeats biases of ``modules_to_save``, and with an adapted embedding it writes the
    embedding's own weight, which must be the base's here.
    """
    repeated = tuple(
        f"{PREFIX}{m}.{c}." for m in trained_modules(gm, adapter) for c in ("original_module", "modules_to_save")
    )
    wrapped = Wrapped(found)
    base = {PREFIX + wrapped.inside(name): tensor for name, tensor in named_tensors(gm)}
    problems = []
    for key, tensor in sorted(unknown.items()):
        if key.startswith(repeated) and key.endswith(".bias"):
            continue
        if key not in base:
            problems.append(f"not of this graph's adapter: {key!r}")
        elif tensor.shape != base[key].shape or not torch.equal(tensor.to(base[key]), base[key]):
            problems.append(f"{key}: a weight of the base, which differs from the graph's")
    return problems


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
