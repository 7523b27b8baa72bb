"""PEFT as the oracle in memory: with the same adapter weights its model and our graph compute the same.

Outputs and gradients, on linear layers: in float64 in train mode too (without dropout in the adapter), in float32
with the merged weights.
The other kinds of layers are in ``test_layer_kinds.py``, what is on disk in ``test_peft_files.py``.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn

from conftest import Zoo, leaves, loss_of, randomize
from lorafx import LoraSpec, merged_state_dict, sites
from lorafx.graph import CapturedModule
from tolerances import assert_close
from zoo import FAMILIES, Family, Inputs

CONFIGS: dict[str, Any] = {"LORA": peft.LoraConfig, "ADALORA": peft.AdaLoraConfig, "VERA": peft.VeraConfig}

SPECS: dict[str, LoraSpec] = {
    "lora": LoraSpec(r=3, alpha=5),
    "rslora": LoraSpec(r=5, alpha=3.5, rslora=True),
    "dora": LoraSpec(r=3, alpha=5, variant="dora"),
    "rsdora": LoraSpec(r=4, alpha=3, variant="dora", rslora=True),
    "lora_bias": LoraSpec(r=3, alpha=5, variant="lora_bias"),
    "vera": LoraSpec(r=7, variant="vera", options={"projection_prng_key": 3}),
    # PEFT adds the penalty to the loss of a forward pass; here RankScheduler.penalty is apart.
    "adalora": LoraSpec(r=4, alpha=6, variant="adalora", options={"total_step": 9, "orth_reg_weight": 0.0}),
}
PATTERNS = LoraSpec(
    r=4,
    alpha=6,
    rslora=True,
    rank_pattern={"layers.1.mlp.up_proj": 9, ".*q_proj": 2},
    alpha_pattern={"0.self_attn.*": 11, "down_proj": 0.5},
)

#: Families whose linear layers have no bias for lora_bias to shift.
WITHOUT_BIAS = ("llama", "mixtral")

#: All but the keys: what is added to all keys alike is nothing to a softmax, and its gradient only rounding.
WITH_GRADIENT = {"bert": ["query", "value", "dense"]}


def in_float64(family: Family) -> Family:
    def inputs(make: Callable[[], Inputs]) -> Callable[[], Inputs]:
        return lambda: {n: v.double() if v.is_floating_point() else v for n, v in make().items()}

    return dataclasses.replace(
        family,
        name=f"{family.name} float64",
        build=lambda: family.build().double(),
        inputs=inputs(family.inputs),
        other_inputs=inputs(family.other_inputs),
    )


NAMES = ("mlp", "bert", "gpt2", "llama", "convnet", "mixtral")
WIDE = {name: in_float64(FAMILIES[name]) for name in NAMES}
CASES = [
    pytest.param(family, spec, marks=pytest.mark.xdist_group(family.name), id=f"{family.name}-{spec}")
    for name in NAMES
    for family in (FAMILIES[name], WIDE[name])
    for spec in SPECS
    if not (spec == "lora_bias" and name in WITHOUT_BIAS)
]


def theirs_by_name(twin: nn.Module, site: str, parameter: str) -> nn.Parameter:
    """PEFT's parameter for one of ours."""
    held = dict(twin.named_parameters())
    name = "lora_B.default.bias" if parameter == "lora_B_bias" else f"{parameter}.default"
    path = f"base_model.model.{site}.{name}"
    return held[path if path in held else f"{path}.weight"]


def peft_twin(zoo: Zoo, family: Family, gm: CapturedModule, spec: LoraSpec) -> Any:
    """PEFT's model of the same base with the adapter weights of ``gm``."""
    settings = spec.to_peft()
    config = CONFIGS[settings["peft_type"]](**{**settings, "target_modules": [s.name for s in sites(gm)]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Conv1D's fan_in_fan_out, which PEFT sets right by itself
        twin = peft.get_peft_model(zoo.eager(family), config)
    # In float64, PEFT lets AdaLoRA's first rank, a parameter there, require a gradient.
    count = sum(1 for n, p in twin.named_parameters() if p.requires_grad and "ranknum" not in n)
    assert count == sum(len(site.parameters(gm)) for site in sites(gm)), "PEFT trains what we don't"
    with torch.no_grad():
        for site in sites(gm):
            for name, value in site.parameters(gm).items():
                theirs_by_name(twin, site.name, name).copy_(value)
    return twin


def assert_same(zoo: Zoo, family: Family, spec: LoraSpec) -> None:
    gm = zoo.adapted(family, spec)
    randomize(gm, scale=0.1)
    twin = peft_twin(zoo, family, gm, spec)
    exact = gm.get_parameter(sites(gm)[0].weight).dtype == torch.float64
    for training in (True, False):
        for model in (gm, twin):
            model.train(training)
            model.zero_grad()
        outputs = []
        for model in (gm, twin):
            torch.manual_seed(0)  # the base's own dropout
            outputs.append(leaves(model(**family.inputs())))
            torch.manual_seed(0)
            loss_of(model, family).backward()
        for actual, expected in zip(*outputs, strict=True):
            assert_close("peft", actual, expected)
        for site in sites(gm):
            for name, value in site.parameters(gm).items():
                gradient = theirs_by_name(twin, site.name, name).grad
                assert value.grad is not None
                assert gradient is not None
                assert bool(gradient.any())
                assert_close("peft", value.grad, gradient)

    if exact:
        return
    merged = merged_state_dict(gm)
    theirs_merged = twin.merge_and_unload().state_dict()
    assert merged.keys() == theirs_merged.keys()
    adapted = {name for s in sites(gm) for name in (s.weight, s.bias)}
    for name, expected in theirs_merged.items():
        if name in adapted:
            assert_close("peft", merged[name], expected)
        else:
            assert torch.equal(merged[name], expected), name


@pytest.mark.parametrize(("chosen", "spec"), CASES)
def test_every_variant_is_pefts(zoo: Zoo, chosen: Family, spec: str) -> None:
    targets = WITH_GRADIENT.get(chosen.name.split()[0]) if spec == "lora_bias" else None
    assert_same(zoo, chosen, dataclasses.replace(SPECS[spec], target_modules=targets or "all-linear"))


def test_lora_is_pefts_on_every_family(zoo: Zoo, family: Family) -> None:
    assert_same(zoo, family, SPECS["lora"])


@pytest.mark.xdist_group("llama")
def test_ranks_and_alphas_by_pattern_are_pefts(zoo: Zoo) -> None:
    assert_same(zoo, FAMILIES["llama"], PATTERNS)
