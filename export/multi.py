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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from lorafx.checks import format_bytes
from lorafx.errors import AdapterError, ExportError, MergeError, ParityError
from lorafx.export.adapter_inputs import (
    A,
    Inputs,
    adapter_values,
    find_inputs,
    genai_name,
    insert_inputs,
    site_name,
)
from lorafx.export.cast import captures
from lorafx.export.commit import Draft, draft
from lorafx.export.job import Job
from lorafx.export.pack import (
    describe_packing,
    fill_packed,
    refuse_none,
)
from lorafx.export.parity import Tolerance, make_cases, run_case
from lorafx.export.provenance import digesting_base, provenance
from lorafx.export.report import JsonReport, Parity, parity_lines
from lorafx.export.run import Run
from lorafx.export.runtime import ADAPTER_SUFFIX, load_adapter_file, model_version
from lorafx.export.settings import Settings
from lorafx.export.translate import output_names
from lorafx.export.verify import Runtime, check_weights, open_runtime
from lorafx.export.weights import fill
from lorafx.export.widen import widen_graph
from lorafx.graph import CapturedModule, get_path, share
from lorafx.ir import adapters, find_adapter
from lorafx.passes.activate import activate
from lorafx.passes.inference import inference
from lorafx.passes.merge import unadapted

Array = npt.NDArray[Any]
Naming = Literal["lorafx", "genai"]

#: The version of lorafx's inputs, in each file as ``adapter_version``.
ADAPTER_VERSION = 1

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


@dataclass(frozen=True)
class MultiReport(JsonReport):
    """What :func:`lorafx.export_multi` wrote and checked; ``str(report)`` is for people.

    ``inputs`` are those that a call must give, ``optional`` counts the others, ``base`` are the runs without adapter.
    """

    path: str
    data_paths: tuple[str, ...]
    onnx_bytes: int
    data_bytes: int
    onnx_sha256: str
    opset: int
    nodes: int
    inputs: Mapping[str, str]
    outputs: tuple[str, ...]
    optional: int
    precision: str
    atol: float
    rtol: float
    tasks: Mapping[str, TaskFile]
    base: tuple[Parity, ...] = ()
    checks: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def max_abs(self) -> float:
        """The largest absolute difference seen between torch and ONNX Runtime."""
        runs = (*self.base, *(p for task in self.tasks.values() for p in task.parity))
        return max((o.max_abs for p in runs for o in p.outputs), default=0.0)

    def __str__(self) -> str:
        size = format_bytes(self.onnx_bytes)
        if self.data_paths:
            size += f" + {format_bytes(self.data_bytes)} of weights"
        lines = [
            f"ONNX file    {self.path}  ({size})",
            f"graph        {self.nodes} nodes, opset {self.opset}; {self.optional} optional inputs",
            f"inputs       {', '.join(f'{name} {shape}' for name, shape in self.inputs.items())}",
            f"outputs      {', '.join(self.outputs)}",
        ]
        for name, task in self.tasks.items():
            low, high = task.ranks
            what = f"{task.branches} layers, rank {low}" + (f" to {high}" if high != low else "")
            what += f", {task.rescaled} rescaled" if task.rescaled else ""
            if task.whole:
                more = f" and {len(task.whole) - 3} more" if len(task.whole) > 3 else ""
                what += f"; its own {', '.join(task.whole[:3])}{more}"
            lines.append(f"{name:<12} {task.path}  ({format_bytes(task.size)}): {what}")
        lines += [f"{name:<12} {result}" for name, result in self.checks.items()]
        for name, runs in (("no adapter", self.base), *((n, t.parity) for n, t in self.tasks.items())):
            if runs:
                lines += ["", f"{name}:", *parity_lines(runs)]
        lines += ["", "seconds      " + ", ".join(f"{name} {value:.1f}" for name, value in self.seconds.items())]
        return "\n".join([*lines, *(f"warning      {warning}" for warning in self.warnings)])


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
    _refuse(gm, tasks, naming)
    if settings.weight_format == "nbits":
        raise ExportError(
            "weight_format='nbits' quantizes the base once more, to other values than those that adapters were trained "
            "on: 'bnb4' keeps an nf4 base as it is; or merge an adapter first (merge_and_export)"
        )
    target = Path(os.path.realpath(path))
    captured = captures(gm, settings, run)
    with run.phase("merge"):
        job = Job(gm, unadapted(gm) if adapters(gm) else gm, settings, captured)
        active = {name: _active(gm, adapter) for name, adapter in tasks.items()}
        inputs = find_inputs(gm, job.graph, tasks.values(), _NAMES[naming])
    own = {id(get_path(job.graph, name)) for name in inputs.whole}
    own_names = {name for name in job.packing.layouts if id(get_path(job.graph, name)) in own}
    packing = job.packing.without(own_names, "an adapter has a version of its own, which is an input")
    refuse_none(settings.weight_format, packing.layouts, packing.dense)
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
            files = {
                name: write_adapter(file.path.parent / f"{name}{ADAPTER_SUFFIX}", held, model_version(sha256))
                for name, held in values.items()
            }
        stale = _stale(target, files, sha256)
        checks = {"onnx.checker": "passed, with shape inference"}
        if translation.packed:
            checks["packed"] = describe_packing(translation.packed)
        parity: dict[str | None, tuple[Parity, ...]] = {}
        tolerance = job.tolerance(packing)
        if settings.verify:
            with run.phase("compare") as done:
                count = check_weights(ir.load(file.path), model)
                for name, place in files.items():
                    _check_values(place, values[name], name)
                unmerged = {name: inference(work) for name, work in active.items()}
                plain = widen_graph(job.plain) if job.is_cast else job.plain
                runtime = open_runtime(file.path, plain, job.dtype, file.path.parent)
                cases = make_cases(job.example.compared, translation.dims, job.plain.signature.ranges)
                for number, (task, reference) in enumerate([(None, runtime.graph), *unmerged.items()]):
                    held = None
                    if task is not None:
                        wide = runtime.note is not None or job.is_cast
                        reference = widen_graph(reference) if wide else reference
                        held = files[task] if runtime.note is None else _widened(files[task], values[task])
                    parity[task] = _compare(runtime, reference, task, held, cases, tolerance)
                    done((number + 1) / (len(files) + 1))
            checks["same weights"] = f"{count} initializers in the file, to the bit, and all that adapters hold"
            agreed = sum(p.refused is None for runs in parity.values() for p in runs)
            checks["same numbers"] = f"{agreed} runs agree with torch, without an adapter and with each"
            if runtime.note is not None:
                checks["not run"] = runtime.note
        else:
            checks["not checked"] = "weights and numbers (verify=False)"
        with run.phase("sync"):
            origin["base_sha256"] = base_sha256()
            placed = _commit(file, files, stale)
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
        tasks={name: _described(placed[name], values[name], inputs, whole, parity.get(name, ())) for name in files},
        base=parity.get(None, ()),
        checks=checks,
        seconds=run.seconds,
        warnings=(*job.warnings(translation), *_orphans(target, placed, sha256)),
        provenance=origin,
    )


def _refuse(gm: CapturedModule, tasks: Mapping[str, str], naming: str) -> None:
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


def _active(gm: CapturedModule, adapter: str) -> CapturedModule:
    """A graph with this adapter, which shares everything with ``gm``."""
    work = share(gm)
    activate(work, (adapter,))
    work.recompile()
    return work


def write_adapter(path: Path, values: Mapping[str, ir.TensorProtocol], version: int) -> Path:
    """Write ONNX Runtime's adapter file.

    Raises:
        ExportError: it cannot be written.
    """
    made = ort.AdapterFormat()
    made.set_adapter_version(ADAPTER_VERSION)
    made.set_model_version(version)
    arrays = {name: np.ascontiguousarray(values[name].numpy()) for name in sorted(values)}  # referred to
    made.set_parameters({name: _ort_value(array, values[name].dtype) for name, array in arrays.items()})
    try:
        made.export_adapter(str(path))
    except RuntimeError as error:  # all that ONNX Runtime says is where in its code it could not
        raise ExportError(
            f"cannot write {path.name}, of {format_bytes(sum(a.nbytes for a in arrays.values()))}: give a path in a "
            f"folder that may be written and has room (ONNX Runtime: {str(error).splitlines()[0]})"
        ) from error
    return path


def _ort_value(array: Array, dtype: ir.DataType) -> ort.OrtValue:
    if dtype is ir.DataType.BFLOAT16:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), int(dtype))
    return ort.OrtValue.ortvalue_from_numpy(array)


def _widened(path: Path, values: Mapping[str, ir.TensorProtocol]) -> Path:
    """An adapter for the float32 twin."""
    wide = {
        name: ir.tensor(t.numpy().astype(np.float32)) if t.dtype.is_floating_point() else t
        for name, t in values.items()
    }
    return write_adapter(path.with_name(f"twin_{path.name}"), wide, 0)


def _check_values(path: Path, values: Mapping[str, ir.TensorProtocol], task: str) -> None:
    """Hold what a file has to what was to be written, bit for bit."""
    found = load_adapter_file(path)
    if set(found.values) != set(values) or any(found.data(name) != held.tobytes() for name, held in values.items()):
        raise ParityError(f"the file of '{task}' does not hold what was written to it")


def _compare(
    runtime: Runtime,
    reference: CapturedModule,
    task: str | None,
    file: Path | None,
    cases: Iterable[Any],
    tolerance: Tolerance,
) -> tuple[Parity, ...]:
    names = output_names(reference)
    what = "without an adapter" if task is None else f"with adapter '{task}'"
    rows = []
    adapter = ort.LoraAdapter()  # which run options refer to, and do not keep
    runtime.session.run_options = None
    if file is not None:
        adapter.Load(str(file))
        runtime.session.run_options = ort.RunOptions()
        runtime.session.run_options.add_active_adapter(adapter)
    for case in cases:
        row = run_case(case, names, runtime.session, reference, what, tolerance, runtime.prepare)
        if not row.passed:
            worst = max(row.outputs, key=lambda o: o.max_abs - o.allowed)
            raise ParityError(
                f"ONNX Runtime (running {row.ran}) and torch, {what}, disagree on {row.where}: output '{worst.output}' "
                f"by {worst.max_abs:.3g} (relative {worst.relative:.3g}), allowed is {worst.allowed:.3g}"
            )
        rows.append(row)
    return tuple(rows)


def _stale(target: Path, files: Mapping[str, Path], sha256: str) -> list[Path]:
    """The adapters of these names that are for the base that is replaced.

    Raises:
        ExportError: one is for neither base: another model lies in the folder.
    """
    old = hashlib.sha256(target.read_bytes()).hexdigest() if target.exists() else None
    found = []
    for place in (target.with_name(new.name) for new in files.values()):
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


def _commit(file: Draft, files: Mapping[str, Path], stale: Iterable[Path]) -> dict[str, Path]:
    """Put everything in place, in the order that the module's text gives."""
    target = file.target
    try:
        for new in files.values():
            with new.open("rb") as written:
                os.fsync(written.fileno())
        for old in stale:
            old.unlink()
        file.commit()
        placed = {name: new.replace(target.with_name(new.name)) for name, new in files.items()}
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
        values[branch.inputs[A]].shape.numpy()[branch.rank_dim[A]]
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
