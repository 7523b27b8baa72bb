"""The configs of PEFT (``adapter_config.json``): what each of their keys becomes here, for each ``peft_type``.

Every key of ``peft.LoraConfig``, ``AdaLoraConfig`` and ``VeraConfig`` stands in exactly one table of its
:class:`Method`; ``tests/test_spec.py`` holds them against PEFT's dataclasses, so a key that a new PEFT adds
fails a test instead of being dropped. PEFT is never imported: configs go in and out as plain dicts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from lorafx.checks import refuse_unknown
from lorafx.errors import SpecError

Values = Mapping[str, Any]

#: The heads that PEFT's task models add to ``modules_to_save`` on their own.
HEADS_OF_TASK: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "SEQ_CLS": ("classifier", "score"),
        "TOKEN_CLS": ("classifier", "score"),
        "QUESTION_ANS": ("qa_outputs",),
    }
)

METADATA: Values = {
    "task_type": None,
    "auto_mapping": None,
    "peft_version": None,
    "base_model_name_or_path": None,
    "revision": None,
    "inference_mode": False,
    # Whether the base weight is stored [in, out], as GPT-2's Conv1D does; here the graph says so.
    "fan_in_fan_out": False,
}
"""Keys of all configs, with PEFT's defaults, that do not change the numbers: kept in LoraSpec.metadata and written
back."""

#: Fields that a config need not state where this holds: no number of a given adapter depends on them.
_MAY_GO: Mapping[str, Callable[[Any], bool]] = {
    "adapter_dtype": lambda value: True,
    "tied": lambda value: value != "tie",
    "base": lambda value: True,
    "block_size": lambda value: True,
    "double_quant": lambda value: True,
}


@dataclass(frozen=True)
class Translated:
    """A key that is a :class:`~lorafx.spec.LoraSpec` field.

    ``default`` is PEFT's, which is not always ours (``lora_alpha`` is 8 there). ``read`` turns PEFT's value into
    the field's, given the whole config too, ``write`` the field's plain JSON value into PEFT's, given all fields.
    """

    field: str
    default: Any
    read: Callable[[Any, Values], Any] = lambda value, config: value
    write: Callable[[Any, Values], Any] = lambda value, fields: value


@dataclass(frozen=True)
class Method:
    """One ``peft_type``, by the keys of its config class.

    ``variants`` are our variants of this type, each with the settings that ask for it, ``choosing`` the keys of these
    settings with PEFT's defaults. ``options`` are the variant's own, under the same names. ``starts`` only say how an
    adapter starts, and PEFT itself ignores the ``ignored``: both are left out. ``unsupported`` are
    refused by name at any other value than the default.
    """

    variants: Mapping[str, Values]
    translated: Mapping[str, Translated]
    unsupported: Values
    choosing: Values = field(default_factory=dict)
    options: Values = field(default_factory=dict)
    starts: Values = field(default_factory=dict)
    ignored: Values = field(default_factory=dict)

    @property
    def keys(self) -> dict[str, Any]:
        """Every key with PEFT's default."""
        translated = {key: t.default for key, t in self.translated.items()}
        return {
            **translated, **self.choosing, **self.options, **self.starts, **self.ignored, **METADATA,
            **self.unsupported,
        }  # fmt: skip


#: ``init_lora_weights`` -> LoraSpec.init where both have the same name, and PEFT's family of fast PiSSA.
_INITS = ("gaussian", "orthogonal", "pissa", "olora", "eva", "lora_ga")
_FAST_PISSA = re.compile(r"pissa_niter_\d+")

#: LoftQ's ``loftq_bits``, by the base format that has them, and what PEFT's ``LoftQConfig`` has by default.
_LOFTQ_BITS: Mapping[str, int] = {"nf4": 4, "int8": 8}
_LOFTQ_DEFAULTS: Values = {"loftq_bits": 4, "loftq_iter": 1}


def _loftq(config: Values) -> Values | None:
    """The ``loftq_config`` of a config, with PEFT's defaults; None: it asks for another start, and PEFT ignores it."""
    if str(config.get("init_lora_weights")).lower() != "loftq":
        return None
    given = config.get("loftq_config") or {}
    refuse_unknown("PEFT config: loftq_config", given, _LOFTQ_DEFAULTS)
    found = {**_LOFTQ_DEFAULTS, **given}
    allowed = {"loftq_bits": found["loftq_bits"] in _LOFTQ_BITS.values(), "loftq_iter": _is_count(found["loftq_iter"])}
    for key, expected in {"loftq_bits": "4 or 8", "loftq_iter": "an integer of at least 1"}.items():
        if not allowed[key]:
            raise SpecError(
                f"PEFT config: loftq_config[{key!r}]={found[key]!r} is not supported; supported is {expected}."
            )
    return found


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _read_base(value: Any, config: Values) -> str | None:
    found = _loftq(config)
    return None if found is None else next(name for name, bits in _LOFTQ_BITS.items() if bits == found["loftq_bits"])


def _write_loftq(value: Any, fields: Values) -> Values:
    name, _, rounds = fields["init"].partition("_")
    if name != "loftq":
        return {}
    if value not in _LOFTQ_BITS:
        raise SpecError(
            f"LoraSpec.base={value!r} cannot be written as a PEFT config beside init={fields['init']!r}: PEFT's "
            f"loftq_bits are those of {' and '.join(map(repr, _LOFTQ_BITS))}."
        )
    return {"loftq_bits": _LOFTQ_BITS[value], "loftq_iter": int(rounds or 1)}


def _read_init(value: Any, config: Values) -> str:
    name = value.lower() if isinstance(value, str) else value  # PEFT ignores the case too
    if (quantized := _loftq(config)) is not None:
        return "loftq" if quantized["loftq_iter"] == 1 else f"loftq_{quantized['loftq_iter']}"
    if name is True:
        return "kaiming"
    if name in _INITS or (isinstance(name, str) and _FAST_PISSA.fullmatch(name)):
        return str(name)
    allowed = ", ".join(map(repr, (True, *_INITS, "loftq")))
    raise SpecError(
        f"PEFT config: init_lora_weights={value!r} is not supported; supported are {allowed} and 'pissa_niter_<n>'."
    )


def _write_init(value: Any, fields: Values) -> Any:
    return {"kaiming": True}.get(value, "loftq" if value.startswith("loftq") else value)


def _default_init(key: str, name: str) -> Translated:
    """An initialisation of which there is one."""

    def read(value: Any, config: Values) -> str:
        if value is not True:
            raise SpecError(f"PEFT config: {key}={value!r} is not supported; supported is True.")
        return name

    return Translated("init", True, read, lambda value, fields: True)


def _read_targets(value: Any, config: Values) -> Any:
    if value is None and config.get("target_parameters"):
        return ()
    if value is None:
        raise SpecError(
            "PEFT config: target_modules=None leaves the choice to PEFT's table of architectures; "
            'name the modules, or use "all-linear".'
        )
    return value


def _write_layers(value: Any, fields: Values) -> Any:
    if value and isinstance(fields["target_modules"], str):
        raise SpecError(
            f"LoraSpec.layers_to_transform={value!r} cannot be written as a PEFT config beside "
            f"target_modules={fields['target_modules']!r}: PEFT takes it with a list of names only."
        )
    return value or None


def _read_kept(value: Any, config: Values) -> dict[str, int]:
    """AdaLoRA's ``{"<module>.lora_E": [True, False, ...]}`` as a pattern of ranks under exact names."""
    return {
        f"^{re.escape(name.rpartition('.lora_E')[0])}": sum(map(bool, mask)) for name, mask in (value or {}).items()
    }


def _write_kept(value: Any, fields: Values) -> Any:
    kept = {}
    for pattern, r in value.items():
        name = re.sub(r"\\(.)", r"\1", pattern.removeprefix("^"))
        if pattern != f"^{re.escape(name)}" or r > fields["r"]:
            raise SpecError(
                f"LoraSpec.rank_pattern={{{pattern!r}: {r}}} cannot be written as a PEFT config: AdaLoRA's says which "
                f"of the {fields['r']} ranks each module has kept, by its exact name ('^' and the name, escaped)."
            )
        kept[f"{name}.lora_E"] = [index < r for index in range(fields["r"])]
    return kept or None


def _or_none(name: str, default: Any = None) -> Translated:
    """A key that is None where the field is empty."""
    return Translated(name, default, lambda value, config: value or (), lambda value, fields: value or None)


#: Keys that all three have.
_COMMON: Mapping[str, Translated] = {
    "r": Translated("r", 8),
    "target_modules": Translated("target_modules", None, read=_read_targets),
    "modules_to_save": _or_none("modules_to_save"),
    "layers_to_transform": Translated(
        "layers_to_transform", None, lambda value, config: () if value is None else value, _write_layers
    ),
    "layers_pattern": _or_none("layers_pattern"),
}


def _pattern(name: str) -> Translated:
    """A key that may be None where the field is empty."""
    return Translated(name, {}, lambda value, config: value or {})


_LORA: Mapping[str, Translated] = {
    **_COMMON,
    "lora_alpha": Translated("alpha", 8),
    "exclude_modules": Translated("exclude_modules", None),
    "lora_dropout": Translated("dropout", 0.0),
    "use_rslora": Translated("rslora", False),
    "init_lora_weights": Translated("init", True, _read_init, _write_init),
    "rank_pattern": _pattern("rank_pattern"),
    "alpha_pattern": _pattern("alpha_pattern"),
    "bias": Translated("bias", "none"),
    "target_parameters": _or_none("target_parameters"),
    "trainable_token_indices": _or_none("trainable_token_indices"),
    "ensure_weight_tying": Translated(
        "tied", False, lambda value, config: "tie" if value else "refuse", lambda value, fields: value == "tie"
    ),
}

_LORA_UNSUPPORTED: Values = {
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "corda_config": None,
    "velora_config": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "qalora_group_size": 16,
    "monteclora_config": None,
    "layer_replication": None,
    "runtime_config": {"ephemeral_gpu_offload": False},
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
}

#: How EVA and LoRA-GA looked at the data, long before.
_STARTS: Values = {"eva_config": None, "lora_ga_config": None}

_ADALORA_OWN = ("r", "use_rslora", "alpha_pattern", "ensure_weight_tying")

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "LORA": Method(
            variants={"lora": {}, "dora": {"use_dora": True}, "lora_bias": {"lora_bias": True}},
            choosing={"use_dora": False, "lora_bias": False},
            translated={**_LORA, "loftq_config": Translated("base", {}, _read_base, _write_loftq)},
            starts=_STARTS,
            # The last two were written by PEFT before 0.3 and are gone since; adapters with them are still in use.
            unsupported={**_LORA_UNSUPPORTED, "enable_lora": None, "merge_weights": False},
        ),
        "ADALORA": Method(
            variants={"adalora": {}},
            translated={
                **{key: t for key, t in _LORA.items() if key not in _ADALORA_OWN},
                "init_r": Translated("r", 12),
                "init_lora_weights": _default_init("init_lora_weights", "gaussian"),
                "rank_pattern": Translated("rank_pattern", None, _read_kept, _write_kept),
            },
            options={
                "target_r": 8,
                "tinit": 0,
                "tfinal": 0,
                "deltaT": 1,
                "beta1": 0.85,
                "beta2": 0.85,
                "orth_reg_weight": 0.5,
                "total_step": None,
            },
            starts=_STARTS,
            ignored={"r": 8, "use_rslora": False, "alpha_pattern": {}},
            unsupported={
                **_LORA_UNSUPPORTED,
                "loftq_config": {},
                "use_dora": False,
                "lora_bias": False,
                "ensure_weight_tying": False,
            },
        ),
        "VERA": Method(
            variants={"vera": {}},
            translated={
                **_COMMON,
                "r": Translated("r", 256),
                "vera_dropout": Translated("dropout", 0.0),
                "bias": Translated(
                    "bias",
                    "none",
                    lambda value, config: "lora_only" if value == "vera_only" else value,
                    lambda value, fields: "vera_only" if value == "lora_only" else value,
                ),
                "init_weights": _default_init("init_weights", "kaiming"),
            },
            options={"projection_prng_key": 0, "save_projection": True, "d_initial": 0.1},
            unsupported={},
        ),
    }
)


def has_key(variant: str, name: str) -> bool:
    """Whether PEFT's config of a variant has a key for this field of a spec."""
    return any(t.field == name for m in METHODS.values() if variant in m.variants for t in m.translated.values())


def fields_from_peft(config: Values) -> dict[str, Any]:
    """The :class:`~lorafx.spec.LoraSpec` fields that a config of PEFT's, given as a dict, asks for.

    A key that is absent has PEFT's default, not ours. Raises :class:`SpecError` for a ``peft_type`` that is none of
    ``METHODS``, for unknown keys, and for settings that are not supported, naming them all.
    """
    given = config.get("peft_type", "LORA")
    name: Any = getattr(given, "value", given)  # an enum, in a config object
    if name not in METHODS:
        supported = ", ".join(map(repr, METHODS))
        raise SpecError(f"PEFT config: peft_type={name!r} is not supported; supported are {supported}.")
    method = METHODS[name]
    refuse_unknown("PEFT config", config, {"peft_type", *method.keys})

    def changed(defaults: Values) -> dict[str, Any]:
        return {key: config[key] for key, default in defaults.items() if key in config and config[key] != default}

    refused, asked = changed(method.unsupported), changed(method.choosing)
    variant = next((v for v, settings in method.variants.items() if settings == asked), None)
    if refused or variant is None:
        listing = ", ".join(
            f"{key}={value!r}" for key, value in {**refused, **(asked if variant is None else {})}.items()
        )
        raise SpecError(
            f"PEFT config: not supported by lorafx: {listing}. Leave each at PEFT's default, or merge "
            "this adapter with PEFT."
        )
    fields = {t.field: t.read(config.get(key, t.default), config) for key, t in method.translated.items()}
    options = {key: config.get(key, default) for key, default in method.options.items()}
    return {**fields, "variant": variant, "options": options, "metadata": changed(METADATA)}


def peft_from_fields(fields: Values, defaults: Values) -> dict[str, Any]:
    """The config keywords, as plain JSON data, for the fields of a spec's ``to_dict``.

    ``defaults`` are the fields of a spec with this variant and r and nothing else set. Raises :class:`SpecError` for a
    variant that PEFT does not have, and for fields that its config has no key for.
    """
    variant = fields["variant"]
    peft_type, method = next(((n, m) for n, m in METHODS.items() if variant in m.variants), (None, None))
    if method is None:
        known = ", ".join(repr(v) for m in METHODS.values() for v in m.variants)
        raise SpecError(f"LoraSpec.variant={variant!r} cannot be written as a PEFT config; PEFT has {known}.")
    said = {"variant", "options", "metadata", *(t.field for t in method.translated.values())}
    lost = [
        f"LoraSpec.{name}={value!r}"
        for name, value in fields.items()
        if name not in said and value != defaults[name] and not (name in _MAY_GO and _MAY_GO[name](value))
    ]
    if lost:
        raise SpecError(f"PEFT's config of type {peft_type} has no key for {', '.join(lost)}.")
    translated = {key: t.write(fields[t.field], fields) for key, t in method.translated.items()}
    options = {key: fields["options"][key] for key in method.options}
    return {"peft_type": peft_type, **translated, **options, **method.variants[variant], **fields["metadata"]}
