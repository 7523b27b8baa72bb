"""Export: fold the adapters, translate, write beside the target, check, and only then rename.

gm --merge--> merged --inference, translate--> ONNX --write--> draft --check--> path
gm --unadapted--> base graph ----------------- same nodes, names, shapes? -|
gm --inference--> torch ---------------------- same numbers in ONNX Runtime? -|
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from lorafx.errors import ExportError
from lorafx.export.parity import TOLERANCES, Tolerance, make_cases, precision
from lorafx.export.report import ExportReport, Parity
from lorafx.export.translate import output_names, structure, translate
from lorafx.export.verify import check_graph, check_numbers, check_weights
from lorafx.export.weights import fill
from lorafx.export.write import draft
from lorafx.graph import CapturedModule, get_path
from lorafx.ir import Stage, sites, stage
from lorafx.passes.example import ExampleInputs, make_example
from lorafx.passes.inference import inference
from lorafx.passes.merge import merge, unadapted
from lorafx.signature import Signature

Progress = Callable[[str, float], None]

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
    external_data: bool | None = None,
    keep_loss: bool = False,
    atol: float | None = None,
    rtol: float | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Fold the adapters into the weights and write the model as ONNX, checked before it gets its name.

    Inputs and outputs have the model's own names (``input_ids``, ``logits``), dynamic dimensions are
    called ``batch`` and ``sequence``. ``gm`` is left as it is and goes on training.

    Args:
        gm: what :func:`lorafx.apply` returned.
        path: the ``.onnx`` file. What is there is replaced, but only by a file that passed all checks.
        verify: compare graph, weights and numbers (see below); otherwise only onnx.checker runs.
        example_inputs: inputs to translate and compare with instead of those of the capture; needed for a
            graph that was traced without any.
        opset: version of ONNX's operators; None: torch's default, or :data:`BFLOAT16_OPSET`.
        external_data: keep weights in a file beside; None: if they exceed 1.5 GiB.
        keep_loss: export the loss, and the labels as an input.
        atol, rtol: other tolerances than the table's (:data:`lorafx.export.parity.TOLERANCES`); the report
            shows those that were used.
        progress: called with the phase (``"merge"``, ``"translate"``, ``"write"``, ``"compare"``) and the
            share of it that is done.

    The checks: (a) onnx.checker with shape inference; (b) the graph is that of the unadapted model's
    export, node by node, names and shapes included, and the file holds every weight to the bit; (c) ONNX
    Runtime gives the outputs of the *unmerged* torch graph, on the example and at several other sizes.

    Raises:
        MergeError: an adapter holds NaN or Inf.
        ParityError: (b) or (c) failed; says where and by how much.
        ExportError: the graph cannot be expressed in ONNX, or the file cannot be written.
    """
    run = _Run(progress)
    with run.phase("merge"):
        merged, base = merge(gm), unadapted(gm)
    options = _Options(verify, example_inputs, opset, external_data, keep_loss, atol, rtol)
    return _export(gm, merged, base, path, run, options)


def export_base(
    gm: CapturedModule,
    path: str | os.PathLike[str],
    *,
    verify: bool = True,
    example_inputs: ExampleInputs = None,
    opset: int | None = None,
    external_data: bool | None = None,
    keep_loss: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Write the model without its adapters, as it was captured. Arguments as :func:`merge_and_export`.

    Raises:
        ParityError, ExportError: as :func:`merge_and_export`.
    """
    run = _Run(progress)
    with run.phase("merge"):
        base = unadapted(gm) if stage(gm) is Stage.INSERTED else gm
    options = _Options(verify, example_inputs, opset, external_data, keep_loss)
    return _export(base, base, base, path, run, options)


@dataclass(frozen=True)
class _Options:
    """See :func:`merge_and_export`."""

    verify: bool
    example_inputs: ExampleInputs
    opset: int | None
    external_data: bool | None
    keep_loss: bool
    atol: float | None = None
    rtol: float | None = None


@dataclass
class _Run:
    """Times the phases of an export and tells the caller how far it is."""

    progress: Progress | None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[Callable[[float], None]]:
        def tell(done: float) -> None:
            if self.progress is not None:
                self.progress(name, done)

        start = time.perf_counter()
        tell(0.0)
        yield tell
        tell(1.0)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def _export(
    trained: CapturedModule,
    written: CapturedModule,
    base: CapturedModule,
    path: str | os.PathLike[str],
    run: _Run,
    options: _Options,
) -> ExportReport:
    """Export ``written``, which must have the graph of ``base`` and the numbers of ``trained``."""
    adapted = sites(trained)
    apart = [site.name for site in adapted if site.apart]
    captured = trained.meta.get("example")
    trained, written, base = (inference(g, keep_loss=options.keep_loss) for g in (trained, written, base))
    example = flat_example(written.signature, captured, options.example_inputs)
    dims = written.signature.dims if captured is not None else usual_dims(example)
    dtype = precision(written)
    opset = BFLOAT16_OPSET if options.opset is None and dtype is torch.bfloat16 else options.opset
    default = TOLERANCES[dtype]
    tolerance = Tolerance(
        default.atol if options.atol is None else options.atol,
        default.rtol if options.rtol is None else options.rtol,
    )
    checks: dict[str, str] = {}
    parity: tuple[Parity, ...] = ()
    with draft(path) as file:
        with run.phase("translate"):
            translation = translate(written, example, dims, opset)
            model = translation.model
            # A translation does not depend on weights, so that of an equal graph need not be repeated.
            twin = structure(base) == structure(written)
            reference = model if twin else translate(base, example, dims, opset).model
        warnings = [f"{place} came out fixed: the file takes this size only" for place in translation.fixed]
        warnings += [
            f"dimension {dim} of '{name}' is fixed at {size}: the model's code was traced for that size only"
            for name, sizes in written.signature.fixed.items()
            for dim, size in sizes.items()
        ]
        with run.phase("write") as done:
            fill(translation.weights, translation.folded, lambda name: get_path(written, name))
            file.write(model, options.external_data, done)
            file.check()
        checks["onnx.checker"] = "passed, with shape inference"
        if options.verify:
            with run.phase("compare") as done:
                loaded = ir.load(file.path)
                difference = check_graph(loaded, reference, apart)
                count = check_weights(loaded, model)
                cases = make_cases(example, translation.dims, written.signature.ranges)
                parity, note = check_numbers(file.path, trained, dtype, cases, tolerance, done)
            checks["same graph"] = f"{len(model.graph)} nodes, named, typed and shaped as in the base model's export"
            if difference is not None:
                checks["same graph"] = f"but for the weights kept apart as asked ({', '.join(apart)}): {difference}"
            checks["same weights"] = f"{count} initializers in the file, to the bit"
            checks["same numbers"] = f"{sum(p.refused is None for p in parity)} runs agree with torch"
            warnings += [f"torch itself refuses {p.where}: {p.refused}" for p in parity if p.refused is not None]
            if note is not None:
                checks["not run"] = note
        else:
            checks["not checked"] = "graph, weights and numbers (verify=False)"
        file.commit()
    return ExportReport(
        path=os.fspath(path),
        data_path=None if file.data is None else str(file.data),
        onnx_bytes=file.path.stat().st_size,
        data_bytes=0 if file.data is None else file.data.stat().st_size,
        opset=model.opset_imports[""],
        nodes=len(model.graph),
        initializers=len(model.graph.initializers),
        sites=len(adapted),
        precision=str(dtype).removeprefix("torch."),
        atol=tolerance.atol,
        rtol=tolerance.rtol,
        inputs={str(v.name): str(v.shape) for v in model.graph.inputs},
        outputs=output_names(written),
        checks=checks,
        parity=parity,
        seconds=run.seconds,
        warnings=tuple(warnings),
    )


def flat_example(signature: Signature, captured: Any, given: ExampleInputs) -> dict[str, Tensor]:
    """A tensor for each placeholder: from the inputs given, or else those of the capture.

    Raises:
        ExportError: there are none, or some are missing.
        InputError: they do not fit the graph.
    """
    inputs = captured if given is None else given
    if inputs is None:
        raise ExportError("the graph was traced without example inputs, and ONNX needs some: pass example_inputs=")
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    if isinstance(inputs, Mapping):
        absent = [a.name for a in signature.arguments if a.name not in inputs]
        if absent:
            raise ExportError(
                f"no example for {', '.join(absent)}: pass example_inputs= as a dict of "
                f"{', '.join(a.name for a in signature.arguments)}"
            )
        # Labels may be among a capture's inputs; without the loss they are none of the graph's.
        wanted = {a.name for a in signature.arguments}
        flat = signature.flatten(**{n: v for n, v in inputs.items() if n in wanted})
    else:
        flat = signature.flatten(*inputs)
    return dict(zip(signature.placeholders, flat, strict=True))


def usual_dims(example: Mapping[str, Tensor]) -> dict[str, Mapping[int, str]]:
    """The dimensions that are dynamic where a capture had no example to find it out with."""
    return {name: roles[0] for name, roles in make_example(dict(example), {}).roles.items()}
