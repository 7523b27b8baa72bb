"""What "all-linear" adapts in every family of models, with PEFT as the oracle, and how sites describe it."""

from __future__ import annotations

import peft
import pytest

from conftest import Zoo
from lorafx import LoraSpec
from lorafx.passes.match import LINEAR, match
from targets import ALL_LINEAR
from zoo import Family


def test_all_linear_leaves_out_output_layers(zoo: Zoo, family: Family) -> None:
    taken, left = ALL_LINEAR[family.name]
    choices = match(zoo.capture(family).gm, (LoraSpec(),))
    assert {c.candidate.name for c in choices if c.site is not None} == taken
    assert {c.candidate.name for c in choices if c.site is None and c.candidate.kind in LINEAR} == left
    for choice in choices:
        if choice.site is None:
            kind = choice.candidate.kind
            router = choice.candidate.name.endswith(".gate")
            why = "functional call on a bare parameter" if router else "output layer"
            assert choice.reason.startswith(why if kind in LINEAR else "no linear layer"), choice


def test_all_linear_is_what_peft_takes(zoo: Zoo, hf_family: Family) -> None:
    """But for classification heads, which PEFT leaves out only where it trains them as modules_to_save."""
    wrapped = peft.get_peft_model(zoo.eager(hf_family), peft.LoraConfig(target_modules="all-linear"))
    heads = {"classifier"} if hf_family.task.endswith("classification") else set()
    assert {*wrapped.base_model.targeted_module_names} == ALL_LINEAR[hf_family.name][0] | heads


def test_sites_describe_their_layers(zoo: Zoo, family: Family) -> None:
    capture = zoo.capture(family)
    spec = LoraSpec(r=3, alpha=5, dropout=0.1, rslora=True)
    for choice in match(capture.gm, (spec,)):
        if (site := choice.site) is None:
            continue
        module = capture.model.get_submodule(site.name)
        shape = module.weight.shape[::-1] if site.transposed else module.weight.shape
        assert (site.out_features, site.in_features) == tuple(shape)
        assert site.transposed == (type(module).__name__ == "Conv1D")
        assert (site.weight, site.path) == (f"{site.name}.weight", site.name)
        assert site.bias == (None if module.bias is None else f"{site.name}.bias")
        assert (site.r, site.alpha, site.dropout, site.adapter) == (3, 5, 0.1, "default")
        assert site.scaling == pytest.approx(5 / 3**0.5)
        assert not site.apart
