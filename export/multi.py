"""Many tasks, one model: a base whose adapters come at run time, and a file for each adapter.

    model.onnx               the base's graph; each adapted layer has optional inputs whose defaults change nothing
    fr.onnx_adapter          what task "fr" gives these inputs: ONNX Runtime's LoraAdapter reads it
    de.onnx_adapter

An adapter is for one base: its file has, as ``model_version``, the first bits of the SHA-256 of the ``.onnx``
(:func:`model_version`), which names its weights by their content. :class:`lorafx.AdapterSession` compares them.

Several files cannot be renamed at one moment. Everything is written, flushed and checked in a directory beside the
target; then, in this order, so that nobody finds a base beside an adapter of another one under these names:

    1. where the base changes, the adapters of these names that are there go
    2. weights, then the ``.onnx`` (:mod:`lorafx.export.commit`): the commit
    3. each adapter, by one rename

The same base gives the same ``.onnx`` to the byte: then nothing is missing at any time, and each task changes at one
moment. A process killed between 1 and 3 leaves a base without some of its adapters; export again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx_ir as ir
from torch.fx import Node

from lorafx.checks import format_bytes
from lorafx.errors import AdapterError, ExportError, MergeError
from lorafx.export.adapter_file import ADAPTER_SUFFIX, load_adapter_file, model_version, write_adapter
from lorafx.export.adapter_inputs import Inputs, adapter_values, find_inputs, insert_inputs
from lorafx.export.cast import captures
from lorafx.export.commit import Draft, draft
from lorafx.export.input_names import A, genai_name, site_name
from lorafx.export.job import Job
from lorafx.export.multi_check import Checked, TaskDraft, check_tasks
from lorafx.export.pack import Plan, describe_packing, fill_packed, refuse_none
from lorafx.export.provenance import digesting_base, provenance
from lorafx.export.report import FileReport, Parity, parity_lines
from lorafx.export.run import Run
from lorafx.export.settings import Settings
from lorafx.export.translate import output_names
from lorafx.export.weights import fill
from lorafx.graph import CapturedModule, get_path, share
from lorafx.ir import adapters, find_adapter, layer_nodes
from lorafx.ops import LAYERS
from lorafx.passes.activate import activate
from lorafx.passes.candidates import candidates
from lorafx.passes.merge import unadapted

Naming = Literal["lorafx", "genai"]

_NAMES: Mapping[str, Callable[[str, str], str]] = {"lorafx": site_name, "genai": genai_name}


@dataclass(frozen=True)
class TaskFile:
    """One task's file.

    ``ranks`` are the smallest and largest of its branches, ``rescaled`` counts those with a gain, ``whole`` are the
    tensors that it has a version of its own of, and ``parity`` the runs beside torch.
    """

    path: str
    size: int
    sha256: str
    branches: int
    ranks: tuple[int, int]
    rescaled: int
    whole: tuple[str, ...]
    parity: tuple[Parity, ...] = ()


@dataclass(frozen=True, kw_only=True)
class MultiReport(FileReport):
    """What :func:`lorafx.export_multi` wrote and checked; ``str(report)`` is for people.

    ``optional`` counts the inputs that a call may leave out, ``base`` are the runs without adapter.
    """

    optional: int
    tasks: Mapping[str, TaskFile]
    base: tuple[Parity, ...] = ()

    @property
    def max_abs(self) -> float:
        """The largest absolute difference seen between torch and ONNX Runtime."""
        runs = (*self.base, *(p for task in self.tasks.values() for p in task.parity))
        return max((o.max_abs for p in runs for o in p.outputs), default=0.0)

    def __str__(self) -> str:
        lines = self._head(f"opset {self.opset}; {self.optional} optional inputs")
        for name, task in self.tasks.items():
            low, high = task.ranks
            what = f"{task.branches} layers, rank {low}" + (f" to {high}" if high != low else "")
            what += f", {task.rescaled} rescaled" if task.rescaled else ""
            if task.whole:
                more = f" and {len(task.whole) - 3} more" if len(task.whole) > 3 else ""
                what += f"; its own {', '.join(task.whole[:3])}{more}"
            lines.append(f"{name:<12} {task.path}  ({format_bytes(task.size)}): {what}")
        lines += self._checks()
        for name, runs in (("no adapter", self.base), *((n, t.parity) for n, t in self.tasks.items())):
            if runs:
                lines += ["", f"{name}:", *parity_lines(runs)]
        return "\n".join([*lines, *self._tail()])


def export_tasks(
    gm: CapturedModule,
    path: str | os.PathLike[str],
    tasks: Mapping[str, str],
    naming: Naming,
    settings: Settings,
    run: Run,
) -> MultiReport:
    """:func:`lorafx.export_multi` for adapters that ``gm`` holds: ``tasks`` has their names by those of the files.

    Raises:
        AdapterError, MergeError, ParityError, ExportError: as there.
    """
    _refuse(gm, tasks, naming, settings)
    target = Path(os.path.realpath(path))
    captured = captures(gm, settings, run)
    with run.phase("merge"):
        job = Job(gm, unadapted(gm) if adapters(gm) else gm, settings, captured)
        active = {name: _active(gm, adapter) for name, adapter in tasks.items()}
        inputs = find_inputs(gm, job.graph, tasks.values(), _NAMES[naming], _calls(gm, job, tasks.values()))
    packing = _packing(job, inputs)
    origin = provenance(gm, tasks)
    with draft(path) as file, digesting_base(gm, job.written) as base_sha256:
        with run.phase("translate"):
            translation = job.express(job.graph, packing)
            refuse_none(settings.weight_format, translation.packed, translation.dense)
            model = translation.model
            required = {str(v.name): str(v.shape) for v in model.graph.inputs}
            whole = insert_inputs(translation, job.graph, inputs)
        with run.phase("write") as done:
            fill(translation.weights, translation.folded, job.source)
            fill_packed(translation.packed, job.source)
            file.write(model, settings.external_data, done, translation.values, settings.limit)
            file.check()
            sha256 = hashlib.sha256(file.path.read_bytes()).hexdigest()
            values = {
                name: adapter_values(work, tasks[name], job.graph, translation, inputs, whole, job.source)
                for name, work in active.items()
            }
            drafts = [
                TaskDraft(name, active[name], held, _write_beside(file, name, held, model_version(sha256)))
                for name, held in values.items()
            ]
        stale = _stale(target, drafts, sha256)
        tolerance = job.tolerance(packing)
        found = Checked({"not checked": "weights and numbers (verify=False)"})
        if settings.verify:
            with run.phase("compare") as done:
                found = check_tasks(job, translation, file, drafts, tolerance, done)
        with run.phase("sync"):
            origin["base_sha256"] = base_sha256()
            placed = _commit(file, drafts, stale)
    checks = {"onnx.checker": "passed, with shape inference"}
    if translation.packed:
        checks["packed"] = describe_packing(translation.packed)
    return MultiReport(
        path=os.fspath(path),
        data_paths=tuple(map(str, file.data)),
        onnx_bytes=file.path.stat().st_size,
        data_bytes=sum(f.stat().st_size for f in file.data),
        onnx_sha256=sha256,
        opset=model.opset_imports[""],
        nodes=len(model.graph),
        inputs=required,
        outputs=output_names(job.graph),
        optional=len(model.graph.inputs) - len(required),
        precision=str(job.dtype).removeprefix("torch."),
        atol=tolerance.atol,
        rtol=tolerance.rtol,
        tasks={n: _described(p, values[n], inputs, whole, found.parity.get(n, ())) for n, p in placed.items()},
        base=found.parity.get(None, ()),
        checks={**checks, **found.checks},
        seconds=run.seconds,
        warnings=(*job.warnings(translation), *_orphans(target, placed, sha256)),
        provenance=origin,
    )


def _refuse(gm: CapturedModule, tasks: Mapping[str, str], naming: str, settings: Settings) -> None:
    if naming not in _NAMES:
        raise ExportError(f"naming={naming!r} is none of {', '.join(map(repr, _NAMES))}")
    if not tasks:
        raise ExportError("no adapters: the file would be the base alone, which export_base writes")
    for adapter in tasks.values():
        find_adapter(gm, adapter)
    if merged := gm.meta.get("merged"):
        raise MergeError(
            f"{', '.join(merged)} is merged in place, and the file's base is the model without it: call unmerge(gm)"
        )
    if settings.weight_format == "nbits":
        raise ExportError(
            "weight_format='nbits' quantizes the base once more, to other values than those that adapters were trained "
            "on: 'bnb4' keeps an nf4 base as it is; or merge an adapter first (merge_and_export)"
        )


def _calls(gm: CapturedModule, job: Job, names: Iterable[str]) -> Mapping[str, Sequence[Node]]:
    """The calls of adapted layers, by the layer, in a graph that has the names of the one that is written.

    Raises:
        ExportError: the model's code, with a cache, has no call of an adapted layer.
    """
    found = layer_nodes(gm)
    if job.captured.step is None:
        return found
    step = {layer.name: layer.nodes for layer in candidates(job.plain)}
    adapted = (site for name in names for site in adapters(gm)[name].sites if site.kind in LAYERS and site.r > 0)
    if missing := [site for site in adapted if site.layer in found and site.layer not in step]:
        raise ExportError(
            f"kv_cache=True: site '{missing[0].name}' (adapter '{missing[0].adapter}') is not called where the model's "
            "code runs with a cache. Adapt without this layer, or export with kv_cache=False"
        )
    return step


def _packing(job: Job, inputs: Inputs) -> Plan:
    """Which weights are to be packed: not those that an adapter has a version of its own of."""
    own = {id(get_path(job.graph, name)) for name in inputs.whole}
    own_names = {name for name in job.packing.layouts if id(get_path(job.graph, name)) in own}
    packing = job.packing.without(own_names, "an adapter has a version of its own, which is an input")
    refuse_none(job.settings.weight_format, packing.layouts, packing.dense)
    return packing


def _write_beside(file: Draft, task: str, values: Mapping[str, ir.TensorProtocol], version: int) -> Path:
    return write_adapter(file.path.with_name(f"{task}{ADAPTER_SUFFIX}"), values, version)


def _active(gm: CapturedModule, adapter: str) -> CapturedModule:
    """A graph with this adapter, which shares everything with ``gm``."""
    work = share(gm)
    activate(work, (adapter,))
    work.recompile()
    return work


def _stale(target: Path, drafts: Iterable[TaskDraft], sha256: str) -> list[Path]:
    """The adapters of these names that are for the base that is replaced.

    Raises:
        ExportError: one is for neither base: another model lies in the folder.
    """
    old = hashlib.sha256(target.read_bytes()).hexdigest() if target.exists() else None
    found = []
    for place in (target.with_name(new.path.name) for new in drafts):
        if not place.exists():
            continue
        version = load_adapter_file(place).version
        if version == model_version(sha256):
            continue
        if old is None or version != model_version(old):
            raise ExportError(
                f"{place} is there, and is an adapter for another model than {target}. Export to another folder, call "
                "the task otherwise, or delete the file first"
            )
        found.append(place)
    return found


def _orphans(target: Path, placed: Mapping[str, Path], sha256: str) -> list[str]:
    """What is to be said of other adapters beside. All is in its place by now, so that none of them is an error."""
    found = []
    for path in sorted(set(target.parent.glob(f"*{ADAPTER_SUFFIX}")).difference(placed.values())):
        try:
            if load_adapter_file(path).version == model_version(sha256):
                continue
            why = "is for another base"
        except AdapterError:
            why = "cannot be read"
        found.append(f"{path.name} lies beside the file and {why}; AdapterSession refuses it")
    return found


def _commit(file: Draft, drafts: Sequence[TaskDraft], stale: Iterable[Path]) -> dict[str, Path]:
    """Put everything in place, in the order that the module's text gives."""
    target = file.target
    try:
        for new in drafts:
            with new.path.open("rb") as written:
                os.fsync(written.fileno())
        for old in stale:
            old.unlink()
        file.commit()
        placed = {new.name: new.path.replace(target.with_name(new.path.name)) for new in drafts}
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise ExportError(f"cannot write beside {target}: {error.strerror or error}") from error
    return placed


def _described(
    path: Path,
    values: Mapping[str, ir.TensorProtocol],
    inputs: Inputs,
    whole: Mapping[str, tuple[ir.Value, ...]],
    parity: tuple[Parity, ...],
) -> TaskFile:
    ranks = [
        values[branch.inputs[A]].shape.numpy()[branch.rank_dim]
        for branch in inputs.branches.values()
        if branch.inputs[A] in values
    ]
    gains = {branch.inputs.get("lora_gain") for branch in inputs.branches.values()}
    return TaskFile(
        path=str(path),
        size=path.stat().st_size,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        branches=len(ranks),
        ranks=(min(ranks, default=0), max(ranks, default=0)),
        rescaled=len(gains.intersection(values)),
        whole=tuple(n for n, stand in whole.items() if any(v.name in values for v in stand)),
        parity=parity,
    )
