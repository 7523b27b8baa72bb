"""What has to be known about Hugging Face models to capture them. Nothing here imports transformers.

A model is treated as one of theirs when it has a ``config`` that can be written as a dict and names its
``main_input_name``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorafx.errors import CaptureError

_BATCH, _LENGTH = 2, 8
_LAYERDROP = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
_HEADS = ("classifier", "score", "classification_head")
_SPEC_AUGMENT = ("mask_time_prob", "mask_feature_prob")


def configs(model: nn.Module) -> list[Any]:
    """Every config the model's modules hold, nested ones included, its own first; empty if there are none."""
    found: list[Any] = []
    pending = [getattr(m, "config", None) for m in reversed(list(model.modules()))]
    while pending:
        config = pending.pop()
        if config is None or not hasattr(config, "to_dict") or any(c is config for c in found):
            continue
        found.append(config)
        pending.extend(vars(config).values())
    return found


def is_hf(model: nn.Module) -> bool:
    """Whether the model carries what transformers' models carry."""
    return bool(configs(model)) and hasattr(model, "main_input_name")


@contextmanager
def capture_config(model: nn.Module) -> Iterator[None]:
    """Switch caches off while capturing (they are no graph outputs), and put every config field back after.

    Raises:
        CaptureError: a config field asks for something that no fixed graph can do in training.
    """
    held = configs(model)
    for config in held:
        for name in _LAYERDROP:
            if (getattr(config, name, 0.0) or 0.0) > 0.0:
                raise CaptureError(
                    f"{type(config).__name__}.{name} is {getattr(config, name)}: whole layers dropped at random "
                    f"cannot be part of a graph. Set config.{name} = 0.0 (on the model's modules too) before apply"
                )
        if getattr(config, "apply_spec_augment", False):
            for name in _SPEC_AUGMENT:
                if (getattr(config, name, 0.0) or 0.0) > 0.0:
                    raise CaptureError(
                        f"{type(config).__name__}.{name} is {getattr(config, name)}: SpecAugment draws its mask "
                        "outside the graph, so one mask would be frozen in. Set config.apply_spec_augment = False "
                        "and mask the features in your data loader"
                    )
    saved = [dict(vars(c)) for c in held]
    try:
        for config in held:
            if getattr(config, "use_cache", None):
                config.use_cache = False
        yield
    finally:
        for config, fields in zip(held, saved, strict=True):
            vars(config).clear()
            vars(config).update(fields)


@contextmanager
def experts_without_values(model: nn.Module) -> Iterator[None]:
    """Let experts run on fake tensors: torch knows the shapes of their default, ``grouped_mm``, for bfloat16 only."""
    chosen: dict[str, str | None] = getattr(model, "get_experts_implementation", dict)()
    if "grouped_mm" not in chosen.values():
        yield
        return
    switch: Any = model
    switch.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        switch.set_experts_implementation(chosen)


def output_layers(model: nn.Module) -> tuple[str, ...]:
    """Paths of a Hugging Face model's output embedding and classification heads."""
    if not is_hf(model):
        return ()
    names = {id(m): n for n, m in model.named_modules()}
    find = getattr(model, "get_output_embeddings", None)
    embedding = find() if callable(find) else None
    found = [] if embedding is None else [names[id(embedding)]]
    if type(model).__name__.endswith("Classification"):
        found += [n for n, _ in model.named_children() if n in _HEADS]
    return tuple(found)


def input_embedding(model: nn.Module) -> str | None:
    """Path of a Hugging Face model's embedding of its input tokens; None where it has none."""
    find = getattr(model, "get_input_embeddings", None) if is_hf(model) else None
    try:
        embedding = find() if callable(find) else None
    except (NotImplementedError, AttributeError):  # as transformers says that there is none, or not one alone
        return None
    return next((n for n, m in model.named_modules() if m is embedding), None)


def initializer_range(model: nn.Module) -> float:
    """The deviation that transformers initialises this model's layers with; NaN where it has none."""
    return float(getattr(configs(model)[0], "initializer_range", None) or math.nan) if is_hf(model) else math.nan


def synthesize_inputs(model: nn.Module) -> dict[str, Tensor] | None:
    """Example inputs for a model that nobody gave any for, from its config and ``forward``'s parameters.

    Token ids ``[2, 8]`` with a mask whose second row is padded, pixels or audio features of the
    configured size, decoder ids for encoder-decoders. None if the model is not a Hugging Face one or its
    main input is of an unknown kind.
    """
    if not is_hf(model):
        return None
    names = inspect.signature(model.forward).parameters
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    config = configs(model)[0]
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    main = str(model.main_input_name)
    inputs: dict[str, Tensor] = {}
    if main == "input_ids":
        inputs["input_ids"] = _tokens(text, device)
    elif main == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        shape = (_BATCH, getattr(config, "num_channels", 3), height, width)
        inputs["pixel_values"] = torch.zeros(shape, device=device, dtype=dtype)
    elif main == "input_features" and hasattr(config, "num_mel_bins"):
        frames = 2 * getattr(config, "max_source_positions", 1500)
        inputs["input_features"] = torch.zeros((_BATCH, config.num_mel_bins, frames), device=device, dtype=dtype)
    else:
        return None
    if main == "input_ids" and "attention_mask" in names:
        inputs["attention_mask"] = _mask(device)
    if main == "input_ids" and "token_type_ids" in names and (getattr(text, "type_vocab_size", 0) or 0) > 0:
        inputs["token_type_ids"] = torch.zeros((_BATCH, _LENGTH), dtype=torch.long, device=device)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in names:
        inputs["decoder_input_ids"] = _tokens(text, device)
    return inputs


def synthesize_labels(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor | None:
    """Labels that let the model's own loss be captured along, or None where their form is not known.

    The form follows the class of the model (sequence classification, token-level language modelling)
    and, for classification, ``config.problem_type``.
    """
    if not is_hf(model) or "labels" not in inspect.signature(model.forward).parameters or "labels" in inputs:
        return None
    name = type(model).__name__
    tokens = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    main = inputs.get(str(model.main_input_name))
    if not isinstance(main, Tensor):
        return None
    if name.endswith(("ForSequenceClassification", "ForImageClassification")):
        config: Any = model.config
        problem = getattr(config, "problem_type", None)
        if problem == "multi_label_classification":
            return torch.zeros((main.shape[0], config.num_labels), device=main.device)
        regression = problem == "regression" or (problem is None and config.num_labels == 1)
        return torch.zeros(main.shape[0], dtype=torch.float32 if regression else torch.long, device=main.device)
    if name.endswith(
        ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForTokenClassification", "ForConditionalGeneration")
    ):
        return torch.zeros_like(tokens) if isinstance(tokens, Tensor) else None
    return None


def _tokens(config: Any, device: torch.device) -> Tensor:
    vocabulary = int(getattr(config, "vocab_size", 2) or 2)
    ids = torch.arange(_BATCH * _LENGTH, device=device).reshape(_BATCH, _LENGTH)
    return ids % max(vocabulary, 1)


def _mask(device: torch.device) -> Tensor:
    mask = torch.ones((_BATCH, _LENGTH), dtype=torch.long, device=device)
    mask[1, _LENGTH - 2 :] = 0
    return mask
