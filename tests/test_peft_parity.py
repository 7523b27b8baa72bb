"""PEFT as the oracle in memory: with the same adapter weights its model and our graph compute the same."""

from __future__ import annotations

import peft
import pytest
import torch

from conftest import Zoo, leaves, loss_of, randomize
from lorafx import LoraSpec, merged_state_dict, sites
from lorafx.graph import CapturedModule
from tolerances import assert_close
from zoo import FAMILIES, Family

LORA = LoraSpec(r=3, alpha=5)
RSLORA = LoraSpec(r=5, alpha=3.5, rslora=True)
PATTERNS = LoraSpec(
    r=4,
    alpha=6,
    rslora=True,
    rank_pattern={"layers.1.mlp.up_proj": 9, ".*q_proj": 2},
    alpha_pattern={"0.self_attn.*": 11, "down_proj": 0.5},
)


def peft_twin(zoo: Zoo, family: Family, gm: CapturedModule, spec: LoraSpec) -> peft.PeftModel:
    """PEFT's model of the same base with the adapter weights of ``gm``, in eval mode."""
    config = peft.LoraConfig(**{**spec.to_peft(), "target_modules": [s.name for s in sites(gm)]})
    twin = peft.get_peft_model(zoo.eager(family), config).eval()
    theirs = dict(twin.named_parameters())
    with torch.no_grad():
        for site in sites(gm):
            for name, value in site.parameters(gm).items():
                theirs.pop(f"base_model.model.{site.name}.{name}.default.weight").copy_(value)
    assert not [n for n in theirs if "lora_" in n], "PEFT adapts layers that we don't"
    return twin


def assert_same(zoo: Zoo, family: Family, spec: LoraSpec) -> None:
    gm = zoo.adapted(family, spec).eval()
    randomize(gm)
    twin = peft_twin(zoo, family, gm, spec)

    ours, theirs = (leaves(model(**family.inputs())) for model in (gm, twin))
    for actual, expected in zip(ours, theirs, strict=True):
        assert_close("peft", actual, expected)

    for model in (gm, twin):
        loss_of(model, family).backward()
    gradients = {n: p.grad for n, p in twin.named_parameters()}
    for site in sites(gm):
        for name, value in site.parameters(gm).items():
            gradient = gradients[f"base_model.model.{site.name}.{name}.default.weight"]
            assert value.grad is not None
            assert gradient is not None
            assert bool(gradient.any())
            assert_close("peft", value.grad, gradient)

    merged = merged_state_dict(gm)
    theirs_merged = twin.merge_and_unload().state_dict()
    assert merged.keys() == theirs_merged.keys()
    adapted = {s.weight for s in sites(gm)}
    for name, expected in theirs_merged.items():
        if name in adapted:
            assert_close("fold", merged[name], expected)
        else:
            assert torch.equal(merged[name], expected), name


@pytest.mark.parametrize("spec", [LORA, RSLORA], ids=["lora", "rslora"])
def test_outputs_gradients_and_merged_weights_are_pefts(zoo: Zoo, family: Family, spec: LoraSpec) -> None:
    assert_same(zoo, family, spec)


@pytest.mark.xdist_group("llama")
def test_ranks_and_alphas_by_pattern_are_pefts(zoo: Zoo) -> None:
    assert_same(zoo, FAMILIES["llama"], PATTERNS)
