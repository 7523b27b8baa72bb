"""A decoder captured once more, as one step of generation: with the keys and values of what came before.

    logits = model(input_ids, attention_mask)
        ->   logits, present = step(input_ids, attention_mask, position_ids, past)

    input_ids, position_ids  [batch, sequence]            the new tokens, and where they stand
    attention_mask           [batch, total_sequence]      of the tokens before and the new ones: 0 hides one
    past.{i}.key, .value     [batch, heads, past_sequence, size]      none (past_sequence 0) at first
    present.{i}.key, .value  [batch, heads, total_sequence, size]     what to give the next step as its past

Names and order are those of optimum and onnxruntime-genai. Layers with a sliding window keep all of the past too, and
their mask hides what the window has left behind.
"""

from __future__ import annotations

import inspect
import types
import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from lorafx.errors import CaptureError, ExportError, FixedDimensionWarning
from lorafx.graph import CapturedModule, share
from lorafx.ir import Stage, stage
from lorafx.passes.canonical import share_sizes
from lorafx.passes.capture import capture
from lorafx.passes.huggingface import experts_without_values, is_hf
from lorafx.passes.merge import unadapted
from lorafx.passes.original import original_of

#: Sizes to trace with, all different, so that one dynamic dimension is not taken for another.
_BATCH, _SEQUENCE, _PAST = 2, 3, 4

_TOKENS = frozenset({"input_ids", "attention_mask", "position_ids"})

Past = Sequence[dict[str, Tensor]]


def capture_decoder(gm: CapturedModule, dtype: torch.dtype | None = None) -> CapturedModule:
    """The model that ``gm`` was made of as a step with a cache; its tensors are those of ``gm`` without adapters.

    With a ``dtype`` it is that of the model converted to it, whose weights hold no values.

    Raises:
        ExportError: the model is no decoder whose past is keys and values of attention, or ``gm`` was in a pickle and
            no longer knows its model; says which.
        CaptureError: the model's code cannot be traced with a cache, or only for one size.
    """
    original = original_of(gm, "kv_cache=True")
    assert original.module is not None
    _check_decoder(original.module, gm)
    model = original.filled(unadapted(gm) if stage(gm) is Stage.INSERTED else gm, dtype)
    positions = "position_ids" in inspect.signature(model.forward).parameters
    inputs, shapes = _example(model, positions)
    model.forward = types.MethodType(_step_at_positions if positions else _step, model)
    with warnings.catch_warnings():
        # The total is the sum of two sizes which torch takes to be 2 or more.
        warnings.simplefilter("ignore", FixedDimensionWarning)
        step = capture(model, inputs, dynamic_shapes=shapes, eval_only=True)
    (past,) = (a.leaves for a in step.signature.arguments if a.name == "past_key_values")
    share_sizes(step.graph, frozenset(past))  # then all layers but the first use their own past only, and are alike
    step.recompile()
    if step.signature.fixed:
        fixed = [f"dimension {d} of {n} at {s}" for n, sizes in step.signature.fixed.items() for d, s in sizes.items()]
        raise CaptureError(
            f"with a cache, the code of {type(model).__name__} fixes {', '.join(fixed)}: such a file could not "
            "generate. Export with kv_cache=False, or try another attn_implementation"
        )
    return step


def with_tensors(step: CapturedModule, gm: CapturedModule) -> CapturedModule:
    """The step with the model's tensors as ``gm`` has them (the same objects), a graph without adapters.

    Raises:
        ExportError: ``gm`` has a weight that the model has not.
    """
    twin = share(step)
    for path, store, name in original_of(gm, "kv_cache=True").names():
        getattr(twin.get_submodule(path), store)[name] = getattr(gm.get_submodule(path), store)[name]
    if own := sorted(gm.state_dict().keys() - twin.state_dict().keys()):
        raise ExportError(
            f'kv_cache=True: {", ".join(own)} was kept apart from another use of the weight (tied="untie"), and the '
            "model's code knows one weight only. Adapt without this layer, or export with kv_cache=False"
        )
    return twin


def longest_sequence(gm: CapturedModule) -> int | None:
    """How many tokens the model takes at most; None if any number."""
    module = original_of(gm, "kv_cache=True").module
    assert module is not None
    config: Any = module.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limits = [getattr(text, "max_position_embeddings", None), gm.signature.ranges.get("sequence", (1, None))[1]]
    return min((n for n in limits if n is not None), default=None)


def _check_decoder(model: nn.Module, gm: CapturedModule) -> None:
    """Refuse what does not generate by keys and values alone, before anything is traced."""
    name = type(model).__name__
    parameters = inspect.signature(model.forward).parameters
    reason = None
    if not is_hf(model):
        reason = "is no model of Hugging Face transformers"
    elif not getattr(model, "can_generate", bool)():
        reason = "does not generate text (transformers' ...ForCausalLM and ...LMHeadModel do)"
    elif getattr(model.config, "is_encoder_decoder", False):
        reason = "is an encoder with a decoder, whose cache holds the encoder's keys and values too"
    elif "past_key_values" not in parameters:
        reason = "takes no past_key_values: its past is not keys and values of attention"
    else:
        others = [a.name for a in gm.signature.arguments if not a.optional and a.name not in _TOKENS]
        if others:
            reason = f"was captured with {', '.join(others)} beside tokens and mask"
    if reason is not None:
        raise ExportError(f"kv_cache=True: {name} {reason}. Export with kv_cache=False")


def _example(model: nn.Module, positions: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs to trace a step with, and the names of their dynamic dimensions."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    total = _PAST + _SEQUENCE
    past = [
        {
            name: torch.zeros(_BATCH, heads, _PAST, size, dtype=dtype, device=device)
            for name, heads, size, dtype in layer
        }
        for layer in _past_layout(model, device)
    ]
    inputs: dict[str, Any] = {
        "input_ids": torch.zeros(_BATCH, _SEQUENCE, dtype=torch.long, device=device),
        "attention_mask": torch.ones(_BATCH, total, dtype=torch.long, device=device),
        "position_ids": torch.arange(_PAST, total, device=device).repeat(_BATCH, 1),
        "past_key_values": past,
    }
    shapes = {
        "input_ids": {0: "batch", 1: "sequence"},
        "attention_mask": {0: "batch", 1: "total_sequence"},
        "position_ids": {0: "batch", 1: "sequence"},
        "past_key_values": {0: "batch", 2: "past_sequence"},
    }
    if not positions:
        del inputs["position_ids"], shapes["position_ids"]
    return inputs, shapes


def _past_layout(model: nn.Module, device: torch.device) -> list[list[tuple[str, int, int, torch.dtype]]]:
    """For each layer name, heads, size and dtype of what it keeps, from a run of the model without computing anything.

    Raises:
        ExportError: it keeps something else than keys and values.
        CaptureError: the model's code does not run like this.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    name = type(model).__name__
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tokens = torch.zeros(_BATCH, _SEQUENCE, dtype=torch.long, device=device)
    try:
        with torch.no_grad(), mode, experts_without_values(model):
            cache = model(
                input_ids=mode.from_tensor(tokens),
                attention_mask=mode.from_tensor(torch.ones_like(tokens)),
                use_cache=True,
                return_dict=True,
            ).past_key_values
    except Exception as error:  # whatever the model's own code raises
        raise CaptureError(f"{name} cannot be run with use_cache=True: {error}") from error
    if not isinstance(cache, DynamicCache):
        raise ExportError(f"kv_cache=True: {name} keeps a {type(cache).__name__}, not a DynamicCache")
    layout = []
    layers: list[Any] = cache.layers
    for index, layer in enumerate(layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.keys is None:
            raise ExportError(
                f"kv_cache=True: layer {index} of {name} keeps a {type(layer).__name__}, not keys and values of its "
                "own. Export with kv_cache=False"
            )
        held = {"key": layer.keys, "value": layer.values}
        layout.append([(key, tensor.shape[1], tensor.shape[3], tensor.dtype) for key, tensor in held.items()])
    return layout


def _step(self: nn.Module, input_ids: Tensor, attention_mask: Tensor, past_key_values: Past) -> dict[str, Any]:
    return _run(self, past_key_values, input_ids=input_ids, attention_mask=attention_mask)


def _step_at_positions(
    self: nn.Module, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past_key_values: Past
) -> dict[str, Any]:
    tokens = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
    return _run(self, past_key_values, **tokens)


def _run(model: nn.Module, past: Past, **tokens: Tensor) -> dict[str, Any]:
    """One call of the model's own ``forward``, with a cache that holds the past."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache, make_layer = DynamicCache(), cast(Any, DynamicLayer)
    layers = cast(list[Any], cache.layers)
    for held in past:
        layer = make_layer()
        layer.lazy_initialization(held["key"], held["value"])
        layer.keys, layer.values = held["key"], held["value"]
        layers.append(layer)
    length = past[0]["key"].shape[2]
    for tensor in (tensor for held in past for tensor in held.values()):
        torch._check(tensor.shape[2] == length)  # type: ignore[no-untyped-call]  # else each has a size of its own
    total = length + tokens["input_ids"].shape[1]
    torch._check(tokens["attention_mask"].shape[1] == total)  # type: ignore[no-untyped-call]  # else a size of its own
    outputs = type(model).forward(model, **tokens, past_key_values=cache, use_cache=True, return_dict=True)
    present = [{"key": layer.keys, "value": layer.values} for layer in layers]
    return {"logits": outputs.logits, "present": present}
