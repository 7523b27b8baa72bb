"""Export: translate the graph, write its weights, folding adapters in on the way, check, and only then rename.

gm --unadapted--> base graph --inference, translate--> ONNX --weights folded in pieces--> draft --check--> path
gm --inference--> torch ------------------------------ same numbers in ONNX Runtime? -----------|
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lorafx.errors import ExportError
from lorafx.export.cast import Captures, captures
from lorafx.export.check import Checked, check_draft
from lorafx.export.commit import draft
from lorafx.export.job import Job
from lorafx.export.pack import WeightFormat, describe_errors, describe_packing, fill_packed, refuse_none
from lorafx.export.provenance import digesting_base, provenance
from lorafx.export.report import ExportReport, TensorRounding
from lorafx.export.run import Progress, Run
from lorafx.export.settings import Settings
from lorafx.export.translate import Translation, output_names
from lorafx.export.weights import fill
from lorafx.graph import CapturedModule, get_path, rebind
from lorafx.ir import Stage, active_layers, sites, stage
from lorafx.kernels.rounding import Rounding
from lorafx.passes.capture import capture
from lorafx.passes.deviation import merge_deviation
from lorafx.passes.example import ExampleInputs
from lorafx.passes.fold import Fold
from lorafx.passes.merge import compute_folds, merge_lazily, unadapted
from lorafx.passes.merge_base import Original, choose_base


def merge_and_export(
    gm: CapturedModule,
    path: str | os.PathLike[str],
    *,
    verify: bool = True,
    example_inputs: ExampleInputs = None,
    opset: int | None = None,
    dtype: torch.dtype | str | None = None,
    weight_format: WeightFormat = "dense",
    external_data: bool | None = None,
    data_name: str | None = None,
    max_shard_size: int | str | None = None,
    keep_loss: bool = False,
    kv_cache: bool = False,
    atol: float | None = None,
    rtol: float | None = None,
    base: str = "dequantized",
    original: Original | None = None,
    requantize: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Fold the adapters into the weights and write the model as ONNX, checked before it gets its name.

    Inputs and outputs have the model's own names (``input_ids``, ``logits``), dynamic dimensions are
    called ``batch`` and ``sequence``. ``gm`` is left as it is and goes on training. Weights are folded, converted and
    transposed piece by piece while they are written, and keep their names (``<name>.T`` where stored transposed).

    With the same ``data_name`` the ``.onnx`` that :func:`export_base` writes and those of all that is merged into that
    base are the same to the byte, and their weights lie at the same offsets: a fine-tune ships as a file of weights.
    What the file was made from is therefore not in it, but in the report (``report.provenance``, ``save_json``).

    Args:
        gm: what :func:`lorafx.apply` returned.
        path: the ``.onnx`` file. What is there is replaced, but only by a file that passed all checks.
        verify: compare graph, weights and numbers (see below); otherwise only onnx.checker runs.
        example_inputs: inputs to translate and compare with instead of those of the capture; needed for a
            graph that was traced without any.
        opset: version of ONNX's operators; None: torch's default, or :data:`~lorafx.export.job.BFLOAT16_OPSET`.
        dtype: the floating weights' in the file (``"fp32"``, ``"fp16"``, ``"bf16"``, or torch's), to which the exact
            sums are rounded once; the graph is then that of the model converted to it, whose code is traced once more
            (:mod:`lorafx.passes.recapture`). None: the model's.
        weight_format: how the file holds linear layers' weights that the graph holds quantized. ``"dense"``: in
            ``dtype``. ``"bnb4"``: those in nf4 as ONNX Runtime's MatMulBnb4 reads them, their bytes as they are; what
            is merged only with ``requantize=True``. ``"nbits"``: all of them, merged ones too, quantized once
            more, to int4 for MatMulNBits. The report lists which are dense all the same, and why
            (:mod:`lorafx.export.pack`).
        external_data: keep weights in a file beside; None: if they exceed 1.5 GiB.
        data_name: what to call that file, which then exists always; None: by its content. Weights of another
            graph are not overwritten.
        max_shard_size: keep them in several files of at most so many bytes (or ``"2GB"``); a tensor larger than that
            has one of its own.
        keep_loss: export the loss, and the labels as an input.
        kv_cache: export a decoder as a step of generation, with the keys and values of what came before as inputs and
            outputs (:mod:`lorafx.passes.decoder` has their names and shapes). The model's code is traced once more.
            (c) then continues prompts, of the example (or ``example_inputs``) and random, padded to the left, by
            greedy tokens.
        atol, rtol: other tolerances than the table's (:data:`lorafx.export.parity.TOLERANCES`); the report
            shows those that were used.
        base, original, requantize: what adapters on a quantized base are folded into, and whether that is quantized
            again, as in :func:`lorafx.merge`. The result is not what was trained, so that (c) is then beside the
            *merged* torch graph, which is made for it, and the report says how far that one is from the unmerged one
            (``report.deviation``).
        progress: called with the phase (``"capture"`` where code is traced once more, ``"merge"``, ``"translate"``,
            ``"write"``, ``"compare"``, ``"sync"``) and the share of it that is done, of ``"write"`` by bytes.

    The checks: (a) onnx.checker with shape inference; (b) the graph is that of the unadapted model's
    export, node by node, names and shapes included, and the file holds every weight to the bit, computed once more; (c)
    ONNX Runtime gives the outputs of the *unmerged* torch graph, on the example and at several other sizes.

    Raises:
        MergeError: an adapter holds NaN or Inf, or a merged weight does not fit in the dtype; or ``base``, ``original``
            and ``requantize`` do not fit, as :func:`lorafx.merge` says (and CheckpointError).
        NotFiniteError: a weight of the model holds NaN or Inf.
        ParityError: (b) or (c) failed; says where and by how much.
        ExportError: the graph cannot be expressed in ONNX, or not in this dtype, or the file cannot be written.
    """
    settings = Settings(
        verify=verify,
        example_inputs=example_inputs,
        opset=opset,
        dtype=dtype,
        weight_format=weight_format,
        external_data=external_data,
        data_name=data_name,
        max_shard_size=max_shard_size,
        keep_loss=keep_loss,
        kv_cache=kv_cache,
        atol=atol,
        rtol=rtol,
    )
    run = Run(progress)
    return export_merged(gm, path, run, settings, captures(gm, settings, run), base, original, requantize)


def export_base(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    verify: bool = True,
    example_inputs: ExampleInputs = None,
    dynamic_shapes: Mapping[str, Any] | None = None,
    opset: int | None = None,
    dtype: torch.dtype | str | None = None,
    weight_format: WeightFormat = "dense",
    external_data: bool | None = None,
    data_name: str | None = None,
    max_shard_size: int | str | None = None,
    keep_loss: bool = False,
    kv_cache: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Write the model without its adapters, as it was captured. Other arguments as :func:`merge_and_export`.

    The base of a weight that adapters are to leave for another use of it (``tied="untie"``) is apart too.

    Args:
        model: what :func:`lorafx.apply` returned; or a module, which is captured as :func:`lorafx.apply` would with
            ``example_inputs`` (None: synthesised for Hugging Face models; others need them) and ``dynamic_shapes``.

    Raises:
        CaptureError: the module cannot be captured.
        ExportError: ``dynamic_shapes`` is given for what was captured already.
        NotFiniteError, ParityError, ExportError: as :func:`merge_and_export`.
    """
    settings = Settings(
        verify=verify,
        example_inputs=example_inputs,
        opset=opset,
        dtype=dtype,
        weight_format=weight_format,
        external_data=external_data,
        data_name=data_name,
        max_shard_size=max_shard_size,
        keep_loss=keep_loss,
        kv_cache=kv_cache,
    )
    run = Run(progress)
    if isinstance(model, CapturedModule):
        if dynamic_shapes is not None:
            raise ExportError(
                "dynamic_shapes is for a module that is yet to be captured, and this graph is: give it to lorafx.apply"
            )
        gm = model
    else:
        with run.phase("capture"):
            gm = capture(model, example_inputs, dynamic_shapes=dynamic_shapes).eval()
            gm.meta["stage"] = Stage.CAPTURED
        settings = replace(settings, example_inputs=None)  # the graph's own now
    captured = captures(gm, settings, run)
    with run.phase("merge"):
        base = _base(gm)
    return export_job(Job(base, base, settings, captured, model=gm), path, run)


def _base(gm: CapturedModule) -> CapturedModule:
    """The graph that merged ones are the twins of: without adapters, weights apart that they keep apart."""
    if stage(gm) is not Stage.INSERTED:
        return gm
    if not any(first.apart for first, *_ in active_layers(gm).values()):
        return unadapted(gm)
    base, folds = merge_lazily(gm)
    for name, value in folds.items():
        if isinstance(value, Fold) and value.sites[0].apart:
            rebind(base, get_path(base, name), value.weight.detach().clone())
    return base


def export_merged(
    gm: CapturedModule,
    path: str | os.PathLike[str],
    run: Run,
    settings: Settings,
    captured: Captures,
    base: str,
    original: Original | None,
    requantize: bool,
    no_numbers: str | None = None,
) -> ExportReport:
    """Export a graph with its adapters folded in, and measure how far that is from it where it is not what was trained.

    Raises:
        MergeError, CheckpointError, ParityError, ExportError: as :func:`merge_and_export`.
    """
    with run.phase("merge"):
        chosen = choose_base(gm, base, original, requantize)
        merged, folds = merge_lazily(gm, chosen)
    job = Job(gm, merged, settings, captured, folds, no_numbers, to_merged=not chosen.is_trained)
    if chosen.is_trained:
        return export_job(job, path, run)
    deviation = None
    if settings.verify and no_numbers is None:
        with run.phase("compare"):
            deviation = merge_deviation(gm, compute_folds(merged, folds), settings.example_inputs)
    return replace(export_job(job, path, run), base=str(chosen), deviation=deviation)


def export_job(job: Job, path: str | os.PathLike[str], run: Run) -> ExportReport:
    """Translate, write, check and name one file.

    Raises:
        MergeError, NotFiniteError, ParityError, ExportError: as :func:`merge_and_export`.
    """
    settings = job.settings
    for fold in job.folds.values():
        if isinstance(fold, Fold):
            fold.rounding = Rounding()
    refuse_none(settings.weight_format, job.packing.layouts, job.packing.dense)
    origin = provenance(job.trained)
    digesting = digesting_base(job.model or job.trained, job.written)
    with draft(path, settings.data_name) as file, digesting as base_sha256:
        with run.phase("translate"):
            translation = job.express(job.graph, job.packing)
            model = translation.model
            refuse_none(settings.weight_format, translation.packed, translation.dense)
        with run.phase("write") as done:
            fill(translation.weights, translation.folded, job.source)
            requantized = fill_packed(translation.packed, job.source)
            file.write(model, settings.external_data, done, translation.values, settings.limit)
            file.check()
        bytes_changed, rounding = _changes(translation, job)
        checks: dict[str, str] = {}
        if translation.packed:
            checks["packed"] = describe_packing(translation.packed)
        if requantized:
            checks["requantized"] = describe_errors(requantized)
        checks["onnx.checker"] = "passed, with shape inference"
        found = Checked({"not checked": "graph, weights and numbers (verify=False)"})
        if settings.verify:
            with run.phase("compare") as done:
                found = check_draft(job, translation, file, requantized, done)
        refused = [f"torch itself refuses {p.where}: {p.refused}" for p in found.parity if p.refused is not None]
        onnx_sha256 = hashlib.sha256(file.path.read_bytes()).hexdigest()
        with run.phase("sync"):
            origin["base_sha256"] = base_sha256()
            settings.refuse_other_base(origin["base_sha256"])
            file.commit()
    tolerance = job.tolerance(job.packing)
    return ExportReport(
        path=os.fspath(path),
        data_paths=tuple(map(str, file.data)),
        onnx_bytes=file.path.stat().st_size,
        data_bytes=sum(f.stat().st_size for f in file.data),
        opset=model.opset_imports[""],
        nodes=len(model.graph),
        initializers=len(model.graph.initializers),
        sites=len(sites(job.trained)),
        precision=str(job.dtype).removeprefix("torch."),
        atol=tolerance.atol,
        rtol=tolerance.rtol,
        inputs={str(v.name): str(v.shape) for v in model.graph.inputs},
        outputs=output_names(job.graph),
        checks={**checks, **found.checks},
        parity=found.parity,
        seconds=run.seconds,
        warnings=(*job.warnings(translation), *refused),
        onnx_sha256=onnx_sha256,
        bytes_changed=bytes_changed,
        rounding=rounding,
        provenance=origin,
        requantized=requantized,
    )


def _changes(translation: Translation, job: Job) -> tuple[int, tuple[TensorRounding, ...]]:
    """How many bytes of the file adapters changed, and what rounding did to each weight that was folded."""
    new = {id(value) for value in job.folds.values()}
    changed = {value for name, value in translation.weights.items() if id(job.source(name)) in new}
    changed |= {v for name, weight in translation.packed.items() if id(job.source(name)) in new for v in weight.values}
    rows = []
    for name, value in translation.weights.items():
        if isinstance(found := job.source(name), Fold) and value in changed and found.rounding is not None:
            r = found.rounding
            rows.append(TensorRounding(name, r.largest, r.relative, r.survived))
    for expression in translation.folded:
        if changed.intersection(expression.inputs):
            changed.add(expression.value)
    written = (v for v in translation.model.graph.initializers.values() if v in changed)
    return sum(v.const_value.nbytes for v in written if v.const_value is not None), tuple(rows)
