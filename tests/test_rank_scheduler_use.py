"""A rank scheduler among other adapters and objects: what it refuses, and what is left as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorafx
from lorafx import AdapterError, LoraSpec, RankScheduler
from lorafx.graph import CapturedModule
from lorafx.passes.resize import fit_ranks, resize

X = torch.randn(5, 6)
SPEC = LoraSpec(variant="adalora", r=3, target_modules=["0", "2"], options={"target_r": 1})


def build() -> tuple[CapturedModule, torch.optim.Optimizer]:
    gm = lorafx.apply(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)), SPEC, (X,), seed=0)
    optimizer = torch.optim.AdamW([p for p in gm.parameters() if p.requires_grad])
    gm(X).square().mean().backward()
    optimizer.step()
    return gm, optimizer


@pytest.mark.parametrize("merged", [False, True], ids=["other active", "merged in place"])
def test_a_step_in_which_the_adapter_did_not_train_is_refused(merged: bool) -> None:
    gm, optimizer = build()
    scheduler = RankScheduler(gm, optimizer, total_steps=9)
    lorafx.add_adapter(gm, LoraSpec(r=2, target_modules=["0"]), "other")
    if merged:
        lorafx.merge(gm, inplace=True)
    else:
        lorafx.set_adapter(gm, "other")
    with pytest.raises(AdapterError, match="adapter 'default' is not active"):
        scheduler.step()
    assert scheduler.steps == 0


def test_a_site_that_has_a_rank_again_trains_again() -> None:
    gm, _ = build()
    resize(gm, {"0": []})
    fit_ranks(gm, {"0": 3, "2": 3})
    assert all(p.requires_grad for site in lorafx.sites(gm) for p in site.parameters(gm).values())


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def test_a_checkpoint_that_one_object_refuses_leaves_the_others(tmp_path: Path) -> None:
    gm, optimizer = build()
    counter = Counter()
    counter.count = 7
    extras = {"a": counter, "s": RankScheduler(gm, optimizer, total_steps=8)}
    lorafx.save_checkpoint(gm, tmp_path, optimizer, extras=extras)
    gm, optimizer = build()
    fresh = Counter()
    with pytest.raises(AdapterError):
        lorafx.load_checkpoint(
            gm, tmp_path, optimizer, extras={"a": fresh, "s": RankScheduler(gm, optimizer, total_steps=9)}
        )
    assert fresh.count == 0
