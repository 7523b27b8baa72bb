"""Checkpoints: what a training run needs to go on as if it had never stopped, in one file.

    checkpoint.safetensors      tensors   model.<name>: all that training changes in the graph, bit for bit
                                          optimizer.<n>, scheduler.<n>, extras.<n>, rng.cpu, rng.cuda.<i>
                                          base.<name>: some values of each adapted weight, to know the base by
                                header    everything else, as JSON

One file, so that one rename puts it in place: a process that is killed leaves the old checkpoint or the new one.
It has the graph's own names and forms, and is for going on; to give an adapter to others, use
:func:`lorafx.save_adapter`. Parameters are told by name, not by their place in the optimizer. Nothing is pickled.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.optim import Optimizer

from lorafx.errors import AdapterError
from lorafx.graph import CapturedModule, get_path, named_tensors
from lorafx.ir import ADAPTERS, Site, adapters, find_adapter
from lorafx.passes.residual import rebuild_residual
from lorafx.passes.resize import fit_ranks
from lorafx.plain import pack, unpack
from lorafx.variants import VARIANTS

CHECKPOINT_NAME = "checkpoint.safetensors"

#: Where the header keeps the JSON, and the version of its form.
_KEY, _VERSION = "lorafx_checkpoint", 1

aten = torch.ops.aten


class Stateful(Protocol):
    """What has a state to keep: learning rate schedulers, :class:`lorafx.RankScheduler`, a data sampler."""

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state_dict: Any) -> Any: ...


def save_checkpoint(
    gm: CapturedModule,
    directory: str | os.PathLike[str],
    optimizer: Optimizer | None = None,
    scheduler: Stateful | None = None,
    *,
    step: int = 0,
    extras: Mapping[str, Stateful] | None = None,
    rng: bool = True,
) -> None:
    """Write ``checkpoint.safetensors``, from which :func:`load_checkpoint` goes on bit for bit.

    It holds every adapter of the graph, the buffers that training updates (BatchNorm's too), the states of the
    optimizer, the scheduler and the extras, and torch's random state. The file is written beside and renamed.
    With several processes, call it in one.

    Args:
        gm: a graph from :func:`lorafx.apply`.
        directory: made if it does not exist; a checkpoint that is there is replaced.
        optimizer: what trains parameters of ``gm``, and of nothing else. None: it is kept elsewhere.
        scheduler: of the learning rate.
        step: a number to find again, such as the steps that were made.
        extras: other objects with ``state_dict`` and ``load_state_dict``, by name.
        rng: whether to keep the states of torch's global generators (CPU and CUDA), which dropout draws from.

    Raises:
        AdapterError: a state holds what is neither plain data nor a tensor (it is named), the optimizer has
            parameters that are not the graph's, or the file cannot be written. What was there stays.
    """
    _refuse_merged(gm)
    tensors = {f"model.{name}": get_path(gm, name) for name in _trained_tensors(gm)}
    tensors |= {f"base.{name}": sample for name, sample in gm.meta.get("samples", {}).items()}
    header: dict[str, Any] = {"version": _VERSION, "step": step, "graph": _graph(gm)}
    states: dict[str, Any] = {"extras": {name: dict(e.state_dict()) for name, e in (extras or {}).items()}}
    if optimizer is not None:
        states["optimizer"] = _optimizer_state(gm, optimizer)
    if scheduler is not None:
        states["scheduler"] = {"class": type(scheduler).__name__, "state": dict(scheduler.state_dict())}
    for name, state in states.items():
        header[name] = pack(state, name, tensors)
    if rng:
        tensors |= {f"rng.{device}": state for device, state in _random_states().items()}
    if problems := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise AdapterError(f"the checkpoint cannot be saved: {problems[0]} has no data (it is on the meta device)")
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    try:
        _write(Path(directory), copies, json.dumps(header))
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{directory}: the checkpoint could not be written: {error}") from error


def load_checkpoint(
    gm: CapturedModule,
    directory: str | os.PathLike[str],
    optimizer: Optimizer | None = None,
    scheduler: Stateful | None = None,
    *,
    extras: Mapping[str, Stateful] | None = None,
    rng: bool = True,
) -> int:
    """Go on from a checkpoint: the same model and spec, an optimizer, scheduler and extras made in the same way.

    Values are copied in place. AdaLoRA sites get the ranks that they had then, as new parameters, which take the
    old ones' places in the optimizer.

    Returns:
        The ``step`` it was saved with.

    Raises:
        AdapterError: the file is missing or damaged; or it is of another run: other adapters, sites, scalings or
            base weights, parameters of other names, shapes or groups, another optimizer or scheduler, all in
            one list. Nothing is changed.
    """
    _refuse_merged(gm)
    path = Path(directory, CHECKPOINT_NAME)
    header, tensors = _read(path)
    states: dict[str, Any] = {
        name: unpack(header[name], tensors) for name in ("optimizer", "scheduler", "extras") if name in header
    }
    problems = _other_graph(gm, header["graph"], tensors)
    problems += _others("extra", states["extras"], extras or {})
    for name, given in {"optimizer": optimizer, "scheduler": scheduler}.items():
        there, here = states.get(name, {}).get("class"), None if given is None else type(given).__name__
        if there != here:
            problems.append(f"{name}: {there or 'none'} there, {here or 'none'} here")
    if optimizer is not None and "optimizer" in states:
        gone = _names_without_rank(gm, header["graph"])
        problems += _other_groups(states["optimizer"]["groups"], _optimizer_state(gm, optimizer)["groups"], gone)
    if problems:
        raise AdapterError("\n  - ".join((f"{path}: not a checkpoint of this run; nothing was loaded:", *problems)))
    _load_extras(extras or {}, states["extras"])
    for name, record in header["graph"]["adapters"].items():
        fit_ranks(gm, {n: s["r"] for n, s in record.items() if VARIANTS[s["variant"]].shrinks}, name, optimizer)
    with torch.no_grad():
        for name in _trained_tensors(gm):
            get_path(gm, name).copy_(tensors[f"model.{name}"])
    for adapter in adapters(gm).values():
        rebuild_residual(gm, adapter)
    if optimizer is not None:
        _load_optimizer(gm, optimizer, states["optimizer"])
    if scheduler is not None:
        scheduler.load_state_dict(states["scheduler"]["state"])
    if rng:
        _set_random_states({n.removeprefix("rng."): t for n, t in tensors.items() if n.startswith("rng.")})
    return int(header["step"])


def _load_extras(extras: Mapping[str, Stateful], states: Mapping[str, Any]) -> None:
    """Load all of them, or, where one refuses its state, leave all as they were."""
    before = {name: copy.deepcopy(extra.state_dict()) for name, extra in extras.items()}
    loaded = []
    try:
        for name, extra in extras.items():
            loaded.append(name)
            extra.load_state_dict(states[name])
    except BaseException:
        for name in loaded[:-1]:
            extras[name].load_state_dict(before[name])
        raise


# The graph


def _trained_tensors(gm: CapturedModule) -> list[str]:
    """Names of what training changes: all that adapters have, and buffers of the base.

    What an initialisation left of a weight is not among them: it follows from the base and the start values.
    """
    kept: dict[str, None] = {}
    derived = set()
    for adapter in adapters(gm).values():
        kept.update(dict.fromkeys(adapter.parameter_names))
        derived |= {adapter.own_name(name) for name in adapter.residual}
        derived |= {site.index_name for site in adapter.sites}
    written, persistent = set(_written(gm)), gm.state_dict().keys()
    for name, tensor in named_tensors(gm):
        own = name.startswith(f"{ADAPTERS}.")
        if own or (not isinstance(tensor, nn.Parameter) and (name in persistent or name in written)):
            kept[name] = None
    return [name for name in kept if name not in derived]


def _written(gm: CapturedModule) -> Iterator[str]:
    """Names of tensors that the graph writes in place."""
    for node in gm.graph.nodes:
        if not isinstance(node.target, OpOverload):
            continue
        arguments = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False)) | node.kwargs
        names = [a.name for a in node.target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        if node.target in (aten.batch_norm.default, aten.instance_norm.default):  # whose schemas don't say so
            names += ["running_mean", "running_var"]
        for source in map(arguments.get, names):
            if getattr(source, "op", "") == "get_attr":
                yield str(source.target)


def _graph(gm: CapturedModule) -> dict[str, Any]:
    """What a graph must have in common with another one to go on from its checkpoint."""
    return {
        "adapters": {a.name: {site.name: _site(site) for site in a.sites} for a in adapters(gm).values()},
        "active": list(gm.meta.get("active", ())),
    }


def _refuse_merged(gm: CapturedModule) -> None:
    find_adapter(gm, next(iter(adapters(gm)), None))  # refuses a graph without adapters
    if merged := gm.meta.get("merged", ()):
        raise AdapterError(
            f"adapter '{merged[0]}' is merged into the weights; call unmerge(gm) before going on to train"
        )


def _site(site: Site) -> dict[str, Any]:
    return {"variant": site.variant, "r": site.r, "scaling": site.scaling, "dropout": site.dropout}


def _other_graph(gm: CapturedModule, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
    """How a graph differs from the one that was saved."""
    own = _graph(gm)
    problems = []
    if own["active"] != saved["active"]:
        problems.append(f"active adapters: {saved['active']} there, {own['active']} here")
    problems += _others("adapter", saved["adapters"], own["adapters"])
    fitted: dict[str, tuple[int, ...]] = {}
    for name in saved["adapters"].keys() & own["adapters"].keys():
        sites = {site.name: site for site in find_adapter(gm, name).sites}
        problems += _others(f"adapter '{name}': site", saved["adapters"][name], sites)
        for there in sites.keys() & saved["adapters"][name].keys():
            site, record = sites[there], saved["adapters"][name][there]
            if site.variant == record["variant"] and VARIANTS[site.variant].shrinks:
                site = replace(site, r=record["r"])  # ranks that training took away
            if differing := {k: v for k, v in _site(site).items() if record[k] != v}:
                said = ", ".join(f"{k}={record[k]!r} there and {v!r} here" for k, v in differing.items())
                problems.append(f"adapter '{name}': site '{there}': {said}")
                site = sites[there]
            fitted |= {site.parameter_name(p): shape for p, shape in site.parameter_shapes().items()}
    mine = {name: get_path(gm, name) for name in _trained_tensors(gm)}
    theirs = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    problems += _others("tensor", theirs, mine)
    for name in mine.keys() & theirs.keys():
        shape, dtype = fitted.get(name, tuple(mine[name].shape)), mine[name].dtype
        if (tuple(theirs[name].shape), theirs[name].dtype) != (shape, dtype):
            problems.append(
                f"tensor '{name}': {theirs[name].dtype} {list(theirs[name].shape)} there, {dtype} {list(shape)} here"
            )
    for name, sample in gm.meta.get("samples", {}).items():
        if (there := tensors.get(f"base.{name}")) is not None and not torch.equal(there, sample):
            problems.append(f"base weight '{name}' has other values: the run was on another base model")
    return sorted(problems)


def _others(what: str, there: Iterable[str], here: Iterable[str]) -> list[str]:
    saved, own = set(there), set(here)
    return [f"{what} '{n}' is only there" for n in saved - own] + [f"{what} '{n}' is only here" for n in own - saved]


# The optimizer


def _optimizer_state(gm: CapturedModule, optimizer: Optimizer) -> dict[str, Any]:
    """Its state, with names of the graph in place of numbers."""
    names = {id(p): name for name, p in reversed(list(gm.named_parameters(remove_duplicate=False)))}
    state = optimizer.state_dict()
    by_number: dict[int, str] = {}
    groups = []
    for g, (group, held) in enumerate(zip(state["param_groups"], optimizer.param_groups, strict=True)):
        for i, (number, parameter) in enumerate(zip(group["params"], held["params"], strict=True)):
            if id(parameter) not in names:
                raise AdapterError(
                    f"optimizer: parameter {i} of group {g}, {list(parameter.shape)}, is not one of the graph's: make "
                    "the optimizer of [p for p in gm.parameters() if p.requires_grad], after adapters have changed"
                )
            by_number[number] = names[id(parameter)]
        settings = {key: value for key, value in group.items() if key != "params"}
        groups.append({"params": [by_number[number] for number in group["params"]], "settings": settings})
    return {
        "class": type(optimizer).__name__,
        "groups": groups,
        "state": {by_number[number]: value for number, value in state["state"].items()},
    }


def _names_without_rank(gm: CapturedModule, saved: Mapping[str, Any]) -> set[str]:
    """Parameters of sites that had no rank left, or have none: an optimizer does without them."""
    found = [site for adapter in adapters(gm).values() for site in adapter.sites]
    return {
        name
        for site in found
        if 0 in (site.r, saved["adapters"].get(site.adapter, {}).get(site.name, {}).get("r"))
        for name in site.parameter_names.values()
    }


def _other_groups(
    saved: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]], gone: Collection[str]
) -> list[str]:
    """How the parameters of an optimizer differ from those that were saved."""
    if len(saved) != len(own):
        return [f"optimizer: {len(saved)} groups of parameters there, {len(own)} here"]
    problems = []
    for g, (there, here) in enumerate(zip(saved, own, strict=True)):
        names = ([n for n in group["params"] if n not in gone] for group in (there, here))
        problems += _others(f"optimizer: group {g}: parameter", *names)
    return problems


def _load_optimizer(gm: CapturedModule, optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    numbers: dict[str, int] = {}
    groups = []
    own = _optimizer_state(gm, optimizer)["groups"]
    for group, there, held in zip(optimizer.state_dict()["param_groups"], saved["groups"], own, strict=True):
        numbers |= dict(zip(held["params"], group["params"], strict=True))
        groups.append({**there["settings"], "params": group["params"]})
    state = {numbers[name]: value for name, value in saved["state"].items()}
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for name, values in saved["state"].items():  # torch casts to the parameter's dtype
        loaded = optimizer.state[gm.get_parameter(name)]
        for key, value in values.items():
            if isinstance(value, Tensor) and loaded[key].dtype != value.dtype:
                loaded[key] = value.to(loaded[key].device)


# The random state


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _set_random_states(states: Mapping[str, Tensor]) -> None:
    for device, state in states.items():
        kind, _, index = device.partition(".")
        if kind == "cpu":
            torch.set_rng_state(state)
        elif int(index) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, int(index))


# The file


def _write(directory: Path, tensors: Mapping[str, Tensor], header: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".checkpoint-") as beside:
        new = Path(beside, CHECKPOINT_NAME)
        save_file(dict(tensors), new, metadata={_KEY: header})
        with new.open("rb+") as file:
            os.fsync(file.fileno())
        new.replace(directory / CHECKPOINT_NAME)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise AdapterError(f"{path}: no such file; save_checkpoint writes it")
    try:
        with safe_open(path, framework="pt") as file:
            noted = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: not a whole checkpoint ({error}); take an earlier one") from error
    if _KEY not in noted:
        raise AdapterError(f"{path}: tensors, but no checkpoint of lorafx's")
    header: dict[str, Any] = json.loads(noted[_KEY])
    if header["version"] != _VERSION:
        raise AdapterError(f"{path}: of version {header['version']}; this lorafx reads version {_VERSION}")
    return header, tensors
