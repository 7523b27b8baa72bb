"""Specs and PEFT's configs to be drawn by hypothesis."""

from __future__ import annotations

import re
from typing import Any

import peft
import torch
from hypothesis import settings
from hypothesis import strategies as st

from lorafx.spec import LoraSpec

PARTS = st.sampled_from(["model", "layers", "0", "11", "attn", "q_proj", "proj", "v"])
NAMES = st.lists(PARTS, min_size=1, max_size=4).map(".".join)
NAME_LISTS = st.lists(NAMES, min_size=1, max_size=4, unique=True)
REGEXES = st.sampled_from([r".*\.(q|v)_proj", r"model\..*", "proj", r"(.*\.)?\d+"])
PATTERN_KEYS = NAMES | st.sampled_from([r"layers\.\d+\.attn", "^model.layers", "q_proj|v", ".*_proj"])
NUMBERS = st.integers(1, 512) | st.floats(0.125, 512)
METADATA = st.fixed_dictionaries(
    {},
    optional={
        "task_type": st.sampled_from(["CAUSAL_LM", "SEQ_CLS"]),
        "auto_mapping": st.just({"base_model_class": "Net", "parent_library": "lib"}),
        "peft_version": st.just("0.11.0"),
        "base_model_name_or_path": st.text(max_size=8),
        "revision": st.just("main"),
        "inference_mode": st.just(True),
        "fan_in_fan_out": st.just(True),
    },
)

Fields = dict[str, st.SearchStrategy[Any]]

# What a LoraSpec and each of PEFT's configs can both say.
CONFIGS: dict[str, Any] = {"LORA": peft.LoraConfig, "ADALORA": peft.AdaLoraConfig, "VERA": peft.VeraConfig}
TARGETS = st.just("all-linear") | REGEXES | NAME_LISTS
NUMBERED = st.fixed_dictionaries(
    {"target_modules": NAME_LISTS, "layers_to_transform": st.lists(st.integers(0, 12), min_size=1, unique=True)},
    optional={"layers_pattern": st.lists(st.sampled_from(["layers", "h"]), min_size=1, unique=True)},
)
TOKENS = st.lists(st.integers(0, 99), max_size=4, unique=True)
COMMON_FIELDS: Fields = {
    "r": st.integers(1, 512),
    "target_modules": TARGETS,
    "dropout": st.floats(0, 0.99),
    "bias": st.sampled_from(["none", "all", "lora_only"]),
    "modules_to_save": NAME_LISTS | st.just(()),
    "metadata": METADATA,
}
LORA_FIELDS: Fields = {
    **COMMON_FIELDS,
    "alpha": NUMBERS,
    "exclude_modules": st.none() | REGEXES | NAME_LISTS,
    "rslora": st.booleans(),
    "variant": st.sampled_from(["lora", "dora"]),
    "init": st.sampled_from(["kaiming", "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora"]),
    "rank_pattern": st.dictionaries(PATTERN_KEYS, st.integers(1, 64), max_size=3),
    "alpha_pattern": st.dictionaries(PATTERN_KEYS, NUMBERS, max_size=3),
    "target_parameters": NAME_LISTS | st.just(()),
    "trainable_token_indices": TOKENS | st.dictionaries(NAMES, TOKENS, max_size=2),
    "tied": st.sampled_from(["refuse", "tie"]),
}
LORA_BIAS_FIELDS: Fields = {**LORA_FIELDS, "variant": st.just("lora_bias"), "init": st.just("kaiming")}
ADALORA_FIELDS: Fields = {
    **COMMON_FIELDS,
    "r": st.integers(8, 32),
    "alpha": NUMBERS,
    "exclude_modules": st.none() | REGEXES | NAME_LISTS,
    "variant": st.just("adalora"),
    "rank_pattern": st.dictionaries(NAMES.map(lambda name: "^" + re.escape(name)), st.integers(0, 8), max_size=3),
    "options": st.fixed_dictionaries(
        {"total_step": st.integers(40, 99), "tinit": st.integers(0, 9)},
        optional={"tfinal": st.integers(0, 9), "deltaT": st.integers(1, 9), "beta1": st.floats(0.1, 0.9)},
    ),
}
VERA_FIELDS: Fields = {
    **COMMON_FIELDS,
    "variant": st.just("vera"),
    "options": st.fixed_dictionaries(
        {},
        optional={
            "projection_prng_key": st.integers(0, 99),
            "save_projection": st.booleans(),
            "d_initial": st.floats(-1, 1),
        },
    ),
}
OWN_FIELDS: Fields = {
    **LORA_FIELDS,
    "adapter_dtype": st.sampled_from([None, "bfloat16", torch.float64]),
    "tied": st.sampled_from(["refuse", "untie", "tie"]),
}


def specs(fields: Fields) -> st.SearchStrategy[LoraSpec]:
    """Some of the fields; variants and their options always, and the numbers of layers beside names."""
    always = {name: fields[name] for name in ("variant", "options") if name in fields}
    drawn = st.fixed_dictionaries(always, optional={n: s for n, s in fields.items() if n not in always})
    return st.builds(lambda own, numbered: LoraSpec(**{**own, **numbered}), drawn, st.just({}) | NUMBERED)


LORA_SPECS = specs(LORA_FIELDS) | specs(LORA_BIAS_FIELDS)
PEFT_SPECS = LORA_SPECS | specs(ADALORA_FIELDS) | specs(VERA_FIELDS)
SPECS = specs(OWN_FIELDS) | specs(ADALORA_FIELDS) | specs(VERA_FIELDS)

few = settings(max_examples=60, deadline=None)


def lora_config(**settings: Any) -> Any:
    return peft.LoraConfig(**settings)  # whose methods have no types


def peft_config_of(settings: dict[str, Any]) -> Any:
    """PEFT's config object for the keywords that ``to_peft`` gives."""
    return CONFIGS[settings["peft_type"]](**settings)


def identical(a: LoraSpec, b: LoraSpec) -> bool:
    return a == b and a.metadata == b.metadata  # == leaves the metadata out
