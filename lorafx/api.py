"""The calls that users make; each one strings passes together and holds no logic of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lorafx.errors import CaptureError
from lorafx.graph import CapturedModule, get_path
from lorafx.ir import Stage, format_graph, stage
from lorafx.passes.capture import capture
from lorafx.passes.example import ExampleInputs
from lorafx.passes.insert import Insert, trained_base
from lorafx.passes.loftq import loftq
from lorafx.passes.lower import check_backend, lower
from lorafx.passes.match import match, warn_of_frozen_heads
from lorafx.passes.plan import Plan, make_plan
from lorafx.passes.quantize import quantize_sites
from lorafx.spec import SpecLike, as_specs


def apply(
    model: nn.Module,
    spec: SpecLike | Sequence[SpecLike],
    example_inputs: ExampleInputs = None,
    *,
    dynamic_shapes: Mapping[str, Any] | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> CapturedModule:
    """Capture a model as a graph and insert adapters into it.

    Args:
        model: the user's module, left unchanged. Weights are shared with it.
        spec: a LoraSpec; or a dict, JSON file, PEFT config or ``adapter_config.json`` to read one from; or a
            list of them for different parts of the model (the first that means a layer has it).
        example_inputs: tuple of positional arguments, dict of keyword arguments, or one tensor. None: a
            Hugging Face model's are synthesised; other models are traced symbolically.
        dynamic_shapes: see :func:`lorafx.passes.capture.capture`.
        seed, generator: make the initial values reproducible (one of them; None uses torch's global state).
        backend: what computes the adapted layers, as for :func:`lorafx.passes.lower.lower`.

    Returns:
        A ``torch.fx.GraphModule`` whose outputs equal the model's bit for bit (with a quantized base, those of the
        model with the weights that the format keeps; by ``init="loftq"`` nearer to the model's), in which only adapter
        parameters (and ``modules_to_save``, ``bias``) require gradients.

    Raises:
        SpecError, CaptureError, MatchError, QuantizationError, LoweringError: before anything is changed.
    """
    specs = as_specs(spec)
    check_backend(backend)  # before the capture, which takes its time
    if seed is not None:
        if generator is not None:
            raise ValueError("give seed or generator, not both")
        generator = torch.Generator().manual_seed(seed)
    gm = captured(model, example_inputs, dynamic_shapes)
    choices = match(gm, specs)
    warn_of_frozen_heads(gm, choices)
    with torch.inference_mode(False):
        factors = loftq(gm, choices)
        quantize_sites(gm, choices)
        Insert(choices, specs, generator, factors=factors)(gm)
    lower(gm, backend)
    return gm


def plan(
    model: nn.Module,
    spec: SpecLike | Sequence[SpecLike],
    example_inputs: ExampleInputs = None,
    *,
    dynamic_shapes: Mapping[str, Any] | None = None,
) -> Plan:
    """What :func:`apply` would adapt, and why not the rest. ``print(plan)`` shows it as a table.

    Raises:
        SpecError, CaptureError, MatchError: as :func:`apply` would.
    """
    specs = as_specs(spec)
    gm = captured(model, example_inputs, dynamic_shapes)
    choices = match(gm, specs)
    warn_of_frozen_heads(gm, choices)
    whole = {id(p): p for p in (get_path(gm, n) for n in trained_base(gm, choices, specs))}
    return make_plan(gm, choices, tuple(whole.values()))


def captured(
    model: nn.Module, example_inputs: ExampleInputs, dynamic_shapes: Mapping[str, Any] | None
) -> CapturedModule:
    """The captured graph of a model, which knows its own text so that a merge can be held to it."""
    if isinstance(model, CapturedModule):
        raise CaptureError(
            f"the model is a graph of lorafx's already ({stage(model).value}); apply the spec to the model it was made "
            "from, or give a list of specs for its parts"
        )
    # Adapters made in inference mode could never train.
    with torch.inference_mode(False):
        gm = capture(model, example_inputs, dynamic_shapes=dynamic_shapes)
    gm.meta["stage"] = Stage.CAPTURED
    gm.meta["captured"] = format_graph(gm)
    return gm
