"""Export: translate the graph, write its weights, folding adapters in on the way, check, and only then rename.

gm --unadapted--> base graph --inference, translate--> ONNX --weights folded in pieces--> draft --check--> path
gm --inference--> torch ------------------------------ same numbers in ONNX Runtime? -----------|
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from lorafx.errors import ExportError
from lorafx.export.cast import captures, cast_graph, file_dtype, written_source
from lorafx.export.commit import draft
from lorafx.export.decoder import check_generation, make_prompts, translate_step
from lorafx.export.example import find_example, flat_example
from lorafx.export.pack import (
    WeightFormat,
    check_format,
    dense_notes,
    describe_errors,
    describe_packing,
    fill_packed,
    plan_packing,
    read_as,
    read_int4,
    refuse_none,
)
from lorafx.export.parity import TOLERANCES, Tolerance, make_cases, precision
from lorafx.export.provenance import digest, provenance
from lorafx.export.report import ExportReport, Parity, TensorRounding
from lorafx.export.run import Progress, Run
from lorafx.export.settings import check_settings
from lorafx.export.translate import Translation, output_names, structure, translate
from lorafx.export.verify import check_graph, check_numbers, check_weights
from lorafx.export.weights import fill
from lorafx.export.widen import widen_graph
from lorafx.export.write import parse_size
from lorafx.graph import CapturedModule, get_path, rebind
from lorafx.ir import Stage, active_layers, sites, stage
from lorafx.kernels.rounding import Rounding
from lorafx.passes.capture import capture
from lorafx.passes.decoder import longest_sequence, with_tensors
from lorafx.passes.deviation import merge_deviation
from lorafx.passes.example import ExampleInputs
from lorafx.passes.fold import Fold
from lorafx.passes.inference import inference
from lorafx.passes.merge import compute_folds, merge_lazily, unadapted
from lorafx.passes.merge_base import Original, choose_base

#: For bfloat16 unless said otherwise. Before 22 ONNX has no bfloat16 convolutions; before 23 attention is
#: spelled out, with its scale rounded to bfloat16, which torch does not do.
BFLOAT16_OPSET = 23


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
        opset: version of ONNX's operators; None: torch's default, or :data:`BFLOAT16_OPSET`.
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
        max_shard_size: keep them in several files of at most so many bytes (or ``"2GB"``).
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
    check_format(weight_format)
    check_settings(opset, external_data, data_name, max_shard_size)
    run = Run(progress)
    wanted = file_dtype(dtype)
    step, twin = captures(gm, wanted, kv_cache, keep_loss, run)
    options = Options(
        verify,
        example_inputs,
        opset,
        wanted,
        external_data,
        data_name,
        parse_size(max_shard_size),
        keep_loss,
        atol,
        rtol,
        twin=twin,
        step=step,
        weight_format=weight_format,
    )
    return export_merged(gm, path, run, options, base, original, requantize)


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
    check_format(weight_format)
    check_settings(opset, external_data, data_name, max_shard_size)
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
    wanted = file_dtype(dtype)
    step, twin = captures(gm, wanted, kv_cache, keep_loss, run)
    options = Options(
        verify,
        example_inputs if gm is model else None,
        opset,
        wanted,
        external_data,
        data_name,
        parse_size(max_shard_size),
        keep_loss,
        twin=twin,
        step=step,
        weight_format=weight_format,
    )
    with run.phase("merge"):
        base = _base(gm)
    return export_graph(base, base, {}, path, run, options)


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


@dataclass(frozen=True)
class Options:
    """See :func:`merge_and_export`.

    ``no_numbers`` is why (c) is not to be run, if it is not; ``twin`` the graph captured in ``dtype``, if there is one;
    ``step`` the graph of the model with a cache, if that is to be written; ``to_merged`` says that (c) is beside the
    merged graph.
    """

    verify: bool
    example_inputs: ExampleInputs
    opset: int | None
    dtype: torch.dtype | None
    external_data: bool | None
    data_name: str | None
    limit: int | None
    keep_loss: bool = False
    atol: float | None = None
    rtol: float | None = None
    no_numbers: str | None = None
    twin: CapturedModule | None = None
    step: CapturedModule | None = None
    to_merged: bool = False
    weight_format: WeightFormat = "dense"


def export_merged(
    gm: CapturedModule,
    path: str | os.PathLike[str],
    run: Run,
    options: Options,
    base: str,
    original: Original | None,
    requantize: bool,
) -> ExportReport:
    """Export a graph with its adapters folded in, and measure how far that is from it where it is not what was trained.

    Raises:
        MergeError, CheckpointError, ParityError, ExportError: as :func:`merge_and_export`.
    """
    with run.phase("merge"):
        chosen = choose_base(gm, base, original, requantize)
        merged, folds = merge_lazily(gm, chosen)
    if chosen.is_trained:
        return export_graph(gm, merged, folds, path, run, options)
    deviation = None
    if options.verify and options.no_numbers is None:
        with run.phase("compare"):
            deviation = merge_deviation(gm, compute_folds(merged, folds), options.example_inputs)
    report = export_graph(gm, merged, folds, path, run, replace(options, to_merged=True))
    return replace(report, base=str(chosen), deviation=deviation)


def export_graph(
    trained: CapturedModule,
    written: CapturedModule,
    folds: Mapping[str, Fold | Tensor],
    path: str | os.PathLike[str],
    run: Run,
    options: Options,
) -> ExportReport:
    """Export ``written``, in which ``folds`` take the place of tensors; it must have the numbers of ``trained``."""
    held = {id(get_path(written, name)): value for name, value in folds.items()}
    for value in folds.values():
        if isinstance(value, Fold):
            value.rounding = Rounding()
    step = options.step
    express = translate if step is None else translate_step

    def callable_as_file(gm: CapturedModule) -> CapturedModule:
        return inference(gm if step is None else with_tensors(step, gm), keep_loss=options.keep_loss)

    plain = callable_as_file(written)

    def source(name: str) -> Fold | Tensor:
        tensor = written_source(plain, graph, name)
        return held.get(id(tensor), tensor)

    def converted(graph: CapturedModule) -> CapturedModule:
        twin = options.twin
        return graph if twin is None else cast_graph(graph, inference(twin, keep_loss=options.keep_loss))

    graph = converted(plain)
    captured = (trained if step is None else step).meta.get("example")
    given = options.example_inputs if step is None else None
    example = find_example(plain, captured, given, options.dtype if graph is not plain else None)
    dtype = precision(graph)
    opset = BFLOAT16_OPSET if options.opset is None and dtype is torch.bfloat16 else options.opset
    packing = plan_packing(plain, source, options.weight_format)
    refuse_none(options.weight_format, packing.layouts, packing.dense)
    default = TOLERANCES[read_as(packing, dtype)]
    tolerance = Tolerance(
        default.atol if options.atol is None else options.atol,
        default.rtol if options.rtol is None else options.rtol,
    )
    checks: dict[str, str] = {}
    parity: tuple[Parity, ...] = ()
    origin = provenance(trained)
    with draft(path, options.data_name) as file:
        with run.phase("translate"):
            translation = express(graph, example.traced, example.dims, opset, packing)
            model = translation.model
            refuse_none(options.weight_format, translation.packed, translation.dense)
        warnings = [f"{place} came out fixed: the file takes this size only" for place in translation.fixed]
        warnings += [
            f"dimension {dim} of '{name}' is fixed at {size}: the model's code was traced for that size only"
            for name, sizes in graph.signature.fixed.items()
            for dim, size in sizes.items()
        ]
        warnings += dense_notes(translation.dense)
        if options.twin is not None and (note := options.twin.meta.get("note")):
            warnings.append(note)
        with run.phase("write") as done:
            fill(translation.weights, translation.folded, source)
            requantized = fill_packed(translation.packed, source)
            file.write(model, options.external_data, done, translation.values, options.limit)
            file.check()
        bytes_changed, rounding = _changes(translation, folds, source)
        if translation.packed:
            checks["packed"] = describe_packing(translation.packed)
        if requantized:
            checks["requantized"] = describe_errors(requantized)
        checks["onnx.checker"] = "passed, with shape inference"
        if options.verify:
            with run.phase("compare") as done:
                base = callable_as_file(unadapted(trained) if stage(trained) is Stage.INSERTED else trained)
                base_packing = plan_packing(base, partial(get_path, base), options.weight_format).only(packing.layouts)
                # A translation does not depend on weights, so that of an equal graph need not be repeated.
                twin = structure(base) == structure(plain) and base_packing.layouts == packing.layouts
                reference = model
                if not twin:
                    reference = express(converted(base), example.traced, example.dims, opset, base_packing).model
                loaded = ir.load(file.path)
                apart = [site.name for site in sites(trained) if site.apart]
                difference = check_graph(loaded, reference, apart)
                count = check_weights(loaded, model)
                origin["base_sha256"] = digest(
                    (name, t) for name, t in base.state_dict().items() if name in translation.names
                )
                if options.no_numbers is None:
                    unmerged = inference(trained, keep_loss=options.keep_loss)
                    exact, name = unmerged, "unmerged"
                    wide = None if graph is plain else torch.float32
                    if requantized:  # the file is held to its own values; how far they lead away is measured
                        packed = {id(get_path(plain, weight)) for weight in translation.packed}
                        others = {n: v for n, v in folds.items() if id(get_path(written, n)) not in packed}
                        beside = compute_folds(written, others, wide)
                        for weight, value in read_int4(translation.packed, loaded):
                            stored = get_path(beside, weight)
                            rebind(beside, stored, value.to(stored.device, wide or stored.dtype))
                        exact, name = inference(beside, keep_loss=options.keep_loss), "requantized"
                    elif options.to_merged:
                        beside = compute_folds(written, folds, wide)
                        exact, name = inference(beside, keep_loss=options.keep_loss), "merged"
                    if graph is not plain:  # the torch graph in float32 or better, whatever the file is in
                        exact, unmerged = widen_graph(exact), widen_graph(unmerged)
                    if step is None:
                        cases = make_cases(example.compared, translation.dims, plain.signature.ranges)
                        parity, note = check_numbers(file.path, exact, dtype, cases, tolerance, done, name)
                        checks["same numbers"] = f"{sum(p.refused is None for p in parity)} runs agree with torch"
                        if requantized:
                            checks["same numbers"] += " on the requantized weights"
                            anything = Tolerance(math.inf, 0.0)
                            parity += check_numbers(file.path, unmerged, dtype, cases, anything, done)[0]
                    else:
                        given = flat_example(unmerged.signature, trained.meta.get("example"), options.example_inputs)
                        prompts = make_prompts(given, longest_sequence(trained))
                        parity, agreed, note = check_generation(file.path, exact, dtype, prompts, tolerance, done, name)
                        checks["same tokens"] = agreed
                    if note is not None:
                        checks["not run"] = note
                else:
                    checks["not checked"] = options.no_numbers
            checks["same graph"] = f"{len(model.graph)} nodes, named, typed and shaped as in the base model's export"
            if difference is not None:
                checks["same graph"] = f"but for the weights kept apart as asked ({', '.join(apart)}): {difference}"
            checks["same weights"] = f"{count} initializers in the file, to the bit"
            warnings += [f"torch itself refuses {p.where}: {p.refused}" for p in parity if p.refused is not None]
        else:
            checks["not checked"] = "graph, weights and numbers (verify=False)"
        onnx_sha256 = hashlib.sha256(file.path.read_bytes()).hexdigest()
        with run.phase("sync"):
            file.commit()
    return ExportReport(
        path=os.fspath(path),
        data_paths=tuple(map(str, file.data)),
        onnx_bytes=file.path.stat().st_size,
        data_bytes=sum(f.stat().st_size for f in file.data),
        opset=model.opset_imports[""],
        nodes=len(model.graph),
        initializers=len(model.graph.initializers),
        sites=len(sites(trained)),
        precision=str(dtype).removeprefix("torch."),
        atol=tolerance.atol,
        rtol=tolerance.rtol,
        inputs={str(v.name): str(v.shape) for v in model.graph.inputs},
        outputs=output_names(graph),
        checks=checks,
        parity=parity,
        seconds=run.seconds,
        warnings=tuple(warnings),
        onnx_sha256=onnx_sha256,
        bytes_changed=bytes_changed,
        rounding=rounding,
        provenance=origin,
        requantized=requantized,
    )


def _changes(
    translation: Translation, folds: Mapping[str, Fold | Tensor], source: Callable[[str], Fold | Tensor]
) -> tuple[int, tuple[TensorRounding, ...]]:
    """How many bytes of the file adapters changed, and what rounding did to each weight that was folded."""
    new = {id(value) for value in folds.values()}
    changed = {value for name, value in translation.weights.items() if id(source(name)) in new}
    changed |= {v for name, weight in translation.packed.items() if id(source(name)) in new for v in weight.values}
    rows = []
    for name, value in translation.weights.items():
        if isinstance(found := source(name), Fold) and value in changed and found.rounding is not None:
            r = found.rounding
            rows.append(TensorRounding(name, r.largest, r.relative, r.survived))
    for expression in translation.folded:
        if changed.intersection(expression.inputs):
            changed.add(expression.value)
    written = (v for v in translation.model.graph.initializers.values() if v in changed)
    return sum(v.const_value.nbytes for v in written if v.const_value is not None), tuple(rows)
