"""What an export checks of its draft: the graph and the weights that the base's export has, and the trained numbers.

draft --read--> the graph of the base's translation? --> the weights, made once more? --> ONNX Runtime = torch?
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import onnx_ir as ir
import torch

from lorafx.export.commit import Draft
from lorafx.export.decoder import check_generation, make_prompts
from lorafx.export.example import flat_example
from lorafx.export.job import Job
from lorafx.export.pack import plan_packing, read_int4
from lorafx.export.parity import Tolerance, make_cases
from lorafx.export.report import Parity
from lorafx.export.translate import Translation, structure
from lorafx.export.verify import check_graph, check_numbers, check_weights
from lorafx.export.widen import widen_graph
from lorafx.graph import CapturedModule, get_path, rebind
from lorafx.ir import Stage, sites, stage
from lorafx.passes.decoder import longest_sequence
from lorafx.passes.inference import inference
from lorafx.passes.merge import compute_folds, unadapted

#: Measures, and refuses nothing.
_ANYTHING = Tolerance(math.inf, 0.0)


@dataclass
class Checked:
    """What was found: of each check what people are told, and each run beside torch."""

    checks: dict[str, str] = field(default_factory=dict)
    parity: tuple[Parity, ...] = ()


def check_draft(
    job: Job,
    translation: Translation,
    draft: Draft,
    requantized: Mapping[str, float],
    progress: Callable[[float], None],
) -> Checked:
    """Hold a draft to the job's base, its weights and its numbers.

    Args:
        job: what was exported.
        translation: the model, its weights filled in.
        draft: the file.
        requantized: the weights that the file holds in int4, whose values are then the file's own.
        progress: called with the share of the runs that are done.

    Raises:
        ParityError: the first that fails.
        ExportError: ONNX Runtime or torch cannot run what there is.
    """
    model, trained = translation.model, job.trained
    base = job.as_called(unadapted(trained) if stage(trained) is Stage.INSERTED else trained)
    packing = plan_packing(base, partial(get_path, base), job.settings.weight_format).only(job.packing.layouts)
    # A translation does not depend on weights, so that of an equal graph need not be repeated.
    same = structure(base) == structure(job.plain) and packing.layouts == job.packing.layouts
    reference = model if same else job.express(job.in_its_dtype(base), packing).model
    loaded = ir.load(draft.path)
    apart = [site.name for site in sites(trained) if site.apart]
    difference = check_graph(loaded, reference, apart)
    count = check_weights(loaded, model)
    found = Checked()
    if job.no_numbers is None:
        _check_numbers(job, translation, draft, loaded, bool(requantized), progress, found)
    else:
        found.checks["not checked"] = job.no_numbers
    found.checks["same graph"] = (
        f"{len(model.graph)} nodes, named, typed and shaped as in the base model's export"
        if difference is None
        else f"but for the weights kept apart as asked ({', '.join(apart)}): {difference}"
    )
    found.checks["same weights"] = f"{count} initializers in the file, to the bit"
    return found


def _check_numbers(
    job: Job,
    translation: Translation,
    draft: Draft,
    loaded: ir.Model,
    requantized: bool,
    progress: Callable[[float], None],
    found: Checked,
) -> None:
    """Beside the unmerged graph, or the one that the file can equal: its own values are what it is held to then."""
    unmerged = inference(job.trained, keep_loss=job.settings.keep_loss)
    exact, name = unmerged, "unmerged"
    if requantized or job.to_merged:
        exact, name = _merged(job, translation, loaded, requantized), "requantized" if requantized else "merged"
    if job.is_cast:  # the torch graph in float32 or better, whatever the file is in
        exact, unmerged = widen_graph(exact), widen_graph(unmerged)
    tolerance = job.tolerance(job.packing)
    if job.captured.step is None:
        cases = make_cases(job.example.compared, translation.dims, job.plain.signature.ranges)
        run = partial(check_numbers, draft.path, dtype=job.dtype, cases=cases, progress=progress)
        found.parity, note = run(exact, tolerance=tolerance, name=name)
        agreed = sum(p.refused is None for p in found.parity)
        found.checks["same numbers"] = f"{agreed} runs agree with torch"
        if requantized:  # how far that leads away from what was trained is measured
            found.checks["same numbers"] += " on the requantized weights"
            found.parity += run(unmerged, tolerance=_ANYTHING)[0]
    else:
        given = flat_example(unmerged.signature, job.trained.meta.get("example"), job.settings.example_inputs)
        prompts = make_prompts(given, longest_sequence(job.trained))
        found.parity, found.checks["same tokens"], note = check_generation(
            draft.path, exact, job.dtype, prompts, tolerance, progress, name
        )
    if note is not None:
        found.checks["not run"] = note


def _merged(job: Job, translation: Translation, loaded: ir.Model, requantized: bool) -> CapturedModule:
    """The merged torch graph; of requantized weights with the file's values."""
    wide = torch.float32 if job.is_cast else None
    packed = {id(get_path(job.plain, weight)) for weight in translation.packed} if requantized else set()
    folds = {n: v for n, v in job.folds.items() if id(get_path(job.written, n)) not in packed}
    merged = compute_folds(job.written, folds, wide)
    for weight, value in read_int4(translation.packed, loaded) if requantized else ():
        stored = get_path(merged, weight)
        rebind(merged, stored, value.to(stored.device, wide or stored.dtype))
    return inference(merged, keep_loss=job.settings.keep_loss)
