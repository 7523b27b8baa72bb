"""The keys of PEFT's ``LoraConfig`` (``adapter_config.json``) and what each becomes here.

Every key stands in exactly one of the tables below; ``tests/test_spec.py`` holds them against
``peft.LoraConfig`` itself, so a key that a new PEFT adds fails a test instead of being dropped. PEFT
is never imported: configs go in and out as plain dicts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from lorafx.checks import refuse_unknown
from lorafx.errors import SpecError

# init_lora_weights -> LoraSpec.init. False (a random B, so no identity at the start) and the
# data- or SVD-driven initialisations, some of which change the base weights, have no counterpart.
_INITS: tuple[tuple[Any, str], ...] = ((True, "kaiming"), ("gaussian", "gaussian"))


def _read_init(value: Any) -> str:
    name = value.lower() if isinstance(value, str) else value  # PEFT ignores the case too
    for theirs, ours in _INITS:
        if name == theirs:
            return ours
    allowed = " or ".join(repr(theirs) for theirs, _ in _INITS)
    raise SpecError(f"PEFT config: init_lora_weights={value!r} is not supported; supported are {allowed}.")


def _write_init(init: str) -> Any:
    return next(theirs for theirs, ours in _INITS if ours == init)


def _read_targets(value: Any) -> Any:
    if value is None:
        raise SpecError(
            "PEFT config: target_modules=None leaves the choice to PEFT's table of architectures; "
            'name the modules, or use "all-linear".'
        )
    return value


#: The heads that PEFT's task models add to ``modules_to_save`` on their own.
HEADS_OF_TASK: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "SEQ_CLS": ("classifier", "score"),
        "TOKEN_CLS": ("classifier", "score"),
        "QUESTION_ANS": ("qa_outputs",),
    }
)


@dataclass(frozen=True)
class Translated:
    """A ``LoraConfig`` key that is a :class:`~lorafx.spec.LoraSpec` field.

    ``default`` is PEFT's, which is not always ours (``lora_alpha`` is 8 there). ``read`` turns PEFT's
    value into the field's, ``write`` turns the field's plain JSON value into PEFT's.
    """

    field: str
    default: Any
    read: Callable[[Any], Any] = lambda value: value
    write: Callable[[Any], Any] = lambda value: value


TRANSLATED: Mapping[str, Translated] = {
    "r": Translated("r", 8),
    "lora_alpha": Translated("alpha", 8),
    "target_modules": Translated("target_modules", None, read=_read_targets),
    "exclude_modules": Translated("exclude_modules", None),
    "lora_dropout": Translated("dropout", 0.0),
    "use_rslora": Translated("rslora", False),
    "init_lora_weights": Translated("init", True, read=_read_init, write=_write_init),
    "rank_pattern": Translated("rank_pattern", {}, read=lambda value: value or {}),
    "alpha_pattern": Translated("alpha_pattern", {}, read=lambda value: value or {}),
    "bias": Translated("bias", "none"),
    "modules_to_save": Translated(
        "modules_to_save", None, read=lambda value: value or (), write=lambda value: value or None
    ),
}

VARIANT_SETTINGS: Mapping[str, Mapping[str, Any]] = {"lora": {}}
"""LoraSpec.variant -> the ``LoraConfig`` settings that ask for it. A variant that PEFT knows adds a line."""

METADATA: Mapping[str, Any] = {
    "task_type": None,
    "auto_mapping": None,
    "peft_version": None,
    "base_model_name_or_path": None,
    "revision": None,
    "inference_mode": False,
    # Whether the base weight is stored [in, out], as GPT-2's Conv1D does; here the graph says so.
    "fan_in_fan_out": False,
}
"""Keys, with PEFT's defaults, that do not change the numbers: kept in LoraSpec.metadata and written back."""

UNSUPPORTED: Mapping[str, Any] = {
    "layers_to_transform": None,
    "layers_pattern": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "trainable_token_indices": None,
    "loftq_config": {},
    "eva_config": None,
    "corda_config": None,
    "lora_ga_config": None,
    "use_dora": False,
    "velora_config": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "qalora_group_size": 16,
    "monteclora_config": None,
    "layer_replication": None,
    "runtime_config": {"ephemeral_gpu_offload": False},
    "lora_bias": False,
    "target_parameters": None,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "ensure_weight_tying": False,
    # Written by PEFT before 0.3 and gone since; adapters with them are still in use.
    "enable_lora": None,
    "merge_weights": False,
}
"""Keys, with PEFT's defaults, that are refused by name at any other value."""

KEYS = frozenset({"peft_type", *TRANSLATED, *METADATA, *UNSUPPORTED})


def fields_from_peft(config: Mapping[str, Any]) -> dict[str, Any]:
    """The :class:`~lorafx.spec.LoraSpec` fields that a ``LoraConfig``, given as a dict, asks for.

    A key that is absent has PEFT's default, not ours. Raises :class:`SpecError` for another
    ``peft_type`` than LORA, for unknown keys, and for settings that are not supported, naming them all.
    """
    peft_type = config.get("peft_type", "LORA")
    if peft_type != "LORA":
        name = getattr(peft_type, "value", peft_type)
        raise SpecError(f"PEFT config: peft_type={name!r} is not supported; supported is 'LORA'.")
    refuse_unknown("PEFT config", config, KEYS)

    changed = {key: config[key] for key, default in UNSUPPORTED.items() if key in config and config[key] != default}
    # The variant that accounts for the most of the changed settings; "lora" asks for none.
    variant = max(
        (name for name, asks in VARIANT_SETTINGS.items() if asks.items() <= changed.items()),
        key=lambda name: len(VARIANT_SETTINGS[name]),
    )
    refused = [f"{key}={value!r}" for key, value in changed.items() if key not in VARIANT_SETTINGS[variant]]
    if refused:
        raise SpecError(
            f"PEFT config: not supported by lorafx: {', '.join(refused)}. Leave each at PEFT's default, or merge "
            "this adapter with PEFT."
        )

    fields = {t.field: t.read(config.get(key, t.default)) for key, t in TRANSLATED.items()}
    metadata = {key: config[key] for key, default in METADATA.items() if config.get(key, default) != default}
    return {**fields, "variant": variant, "metadata": metadata}


def peft_from_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The ``LoraConfig`` keywords, as plain JSON data, for the fields of a spec's ``to_dict``.

    Raises :class:`SpecError` for a variant that PEFT has no setting for.
    """
    variant = fields["variant"]
    if variant not in VARIANT_SETTINGS:
        raise SpecError(
            f"LoraSpec.variant={variant!r} cannot be written as a PEFT config; PEFT has "
            f"{', '.join(map(repr, VARIANT_SETTINGS))}."
        )
    translated = {key: t.write(fields[t.field]) for key, t in TRANSLATED.items()}
    return {"peft_type": "LORA", **translated, **VARIANT_SETTINGS[variant], **fields["metadata"]}
