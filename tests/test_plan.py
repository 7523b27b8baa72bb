"""The plan of what a spec adapts, and the warning of a fresh head that stays frozen."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

import lorafx
from conftest import Zoo, same
from lorafx import LoraSpec, MatchError
from lorafx.errors import FrozenHeadWarning
from lorafx.passes.match import LINEAR, match, warn_of_frozen_heads
from lorafx.passes.plan import make_plan
from targets import ALL_LINEAR, Model, X
from zoo import FAMILIES, Family


def test_plan_counts_what_apply_makes(zoo: Zoo, family: Family) -> None:
    spec = LoraSpec(r=3, dropout=0.1, rank_pattern={"lin1|fc1|0": 5})
    captured = zoo.capture(family).gm
    plan = make_plan(captured, match(captured, (spec,)))
    gm = zoo.adapted(family, spec)
    sites = {s.name: s for s in lorafx.sites(gm)}
    taken, left = ALL_LINEAR[family.name]
    assert {r.site for r in plan.adapted} == taken == {*sites}
    assert {r.site for r in plan.left_out if r.kind in LINEAR} == left
    for row in plan.adapted:
        site = sites[row.site]
        assert row.parameters == sum(p.numel() for p in site.parameters(gm).values())
        assert (row.shape, row.r, row.scaling) == ((site.out_features, site.in_features), site.r, site.scaling)
        assert row.reason == ""
    for row in plan.left_out:
        assert (row.r, row.scaling, row.parameters) == (None, None, 0)
        assert row.reason
    assert plan.trainable == sum(p.numel() for p in gm.parameters() if p.requires_grad)
    assert plan.total == sum(p.numel() for p in gm.parameters())
    assert plan.optimizer_bytes == 8 * plan.trainable
    assert plan.activation_bytes > 0


def test_plan_prints_a_table() -> None:
    spec = LoraSpec(r=2, exclude_modules=["0.q_proj"], modules_to_save=["head"])
    plan = lorafx.plan(Model(), spec, (X,))
    text = str(plan)
    for word in (
        "blocks.1.q_proj",
        "excluded by exclude_modules",
        "functional call on a bare parameter",
        "trained whole (modules_to_save)",
        "6 x 6",
        "3 x 6",
        "never called with these inputs",
        "5 layers adapted, 5 left out",
    ):
        assert word in text.replace("\n", " "), text
    rows = {r.site: r.parameters for r in plan.rows}
    assert rows["my_proj"] == 2 * (6 + 6)
    head = 3 * 6 + 3
    assert plan.trainable == 5 * 2 * (6 + 6) + head
    base = sum(p.numel() for p in Model().parameters())
    assert plan.total == base + 5 * 2 * (6 + 6)
    # Four rows of x: the activations behind A are [4, 2] float32 a site.
    assert plan.activation_bytes == 5 * 4 * 2 * 4
    dropped = lorafx.plan(Model(), LoraSpec(r=2, dropout=0.1, target_modules=["my_proj"]), (X,))
    assert dropped.activation_bytes == 4 * 2 * 4 + 4 * 6 * (4 + 1)  # and the dropped input and its mask


def test_plan_changes_nothing_and_raises_as_apply_does() -> None:
    model, before = Model(), torch.get_rng_state()
    values = copy.deepcopy(model.state_dict())
    lorafx.plan(model, LoraSpec(), (X,))
    assert same(dict(model.state_dict()), dict(values))
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(MatchError, match="'nothing'"):
        lorafx.plan(model, LoraSpec(target_modules=["nothing"]), (X,))
    tied = Model()
    tied.proj.weight = tied.my_proj.weight
    with pytest.raises(MatchError, match="which the graph also uses elsewhere"):
        lorafx.plan(tied, LoraSpec(), (X,))


def heads_warned_of(call: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    found = [w for w in caught if w.category is FrozenHeadWarning]
    return [str(w.message).split("'")[1] for w in found]


def trained_head(model: Model) -> Model:
    with torch.no_grad():
        model.head.weight.mul_(3)
        model.head.bias.add_(1)
    return model


def test_a_fresh_head_that_stays_frozen_is_warned_of() -> None:
    def warned(model: nn.Module, **fields: Any) -> Iterable[str]:
        return heads_warned_of(lambda: lorafx.apply(model, LoraSpec(**fields), (X,)))

    assert warned(Model()) == ["head"]
    assert heads_warned_of(lambda: lorafx.plan(Model(), LoraSpec(), (X,))) == ["head"]
    assert warned(Model(), modules_to_save=["head"]) == []
    assert warned(Model(), target_modules=["head"]) == []
    assert warned(trained_head(Model())) == []
    with pytest.warns(
        FrozenHeadWarning, match=r"Add modules_to_save=\['head'\] to the spec, or load its trained"
    ) as caught:
        lorafx.apply(Model(), LoraSpec(), (X,))
    assert caught[0].filename == __file__, "the warning points elsewhere than at the call"


def test_a_head_of_one_weight_says_nothing() -> None:
    """It has no deviation that could be looked at, and torch's own warning of that is not the user's."""
    model = nn.Sequential(nn.Linear(6, 1), nn.Linear(1, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lorafx.apply(model, LoraSpec(r=1, target_modules=["0"]), (X,))


def test_a_fresh_classification_head_is_warned_of(zoo: Zoo) -> None:
    """As from_pretrained leaves it: normal with initializer_range, zero bias."""
    gm = zoo.captured(FAMILIES["bert"])

    def warn() -> None:
        warn_of_frozen_heads(gm, match(gm, (LoraSpec(),)))

    assert heads_warned_of(warn) == []
    with torch.no_grad():
        gm.classifier.weight.normal_(std=FAMILIES["bert"].build().config.initializer_range)
        gm.classifier.bias.zero_()
    assert heads_warned_of(warn) == ["classifier"]
