"""What trains beside low-rank factors: biases, and modules that are trained whole (PEFT's modules_to_save)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorafx
from conftest import Zoo, randomize, same, train
from lorafx import LoraSpec, MatchError
from lorafx.ir import format_graph
from small import X, small
from tolerances import assert_close
from zoo import FAMILIES

OWN = "_adapters.default."


def trainable(gm: nn.Module) -> set[str]:
    """Names in the base of what trains a copy."""
    names = {n for n, p in gm.named_parameters() if p.requires_grad and "lora_" not in n}
    assert all(n.startswith(OWN) for n in names)
    return {n.removeprefix(OWN) for n in names}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"bias": "none"}, set()),
        ({"bias": "all"}, {"0.bias", "2.bias", "4.bias"}),
        ({"bias": "lora_only"}, {"0.bias", "2.bias"}),
        ({"modules_to_save": ["4"]}, {"4.weight", "4.bias"}),
        ({"modules_to_save": ["2"]}, {"2.weight", "2.bias"}),
        ({"bias": "lora_only", "modules_to_save": ["4"]}, {"0.bias", "2.bias", "4.weight", "4.bias"}),
    ],
    ids=lambda value: "" if isinstance(value, set) else str(value),  # sets print in any order
)
def test_what_else_trains(fields: dict[str, Any], expected: set[str]) -> None:
    model = small()
    original = copy.deepcopy(model.state_dict())
    gm = lorafx.apply(model, LoraSpec(r=2, **fields), (X,))
    assert trainable(gm) == expected
    assert torch.equal(gm(X), model(X))
    optimizer = torch.optim.SGD([p for p in gm.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        gm(X).square().mean().backward()
        optimizer.step()
    for name in expected:
        assert not torch.equal(gm.get_parameter(OWN + name), original[name]), f"{name} did not train"
        assert torch.equal(gm.get_parameter(name), original[name]), f"{name} of the base changed"
    assert same(dict(model.state_dict()), dict(original)), "training wrote into the user's model"
    merged = lorafx.merge(gm)
    assert_close("model", merged(X), gm(X))
    assert format_graph(merged) == format_graph(lorafx.api.captured(model, (X,), None))
    bare = lorafx.unadapted(gm)
    assert torch.equal(bare(X), model(X))
    assert same(dict(bare.state_dict()), dict(original))
    loaded = small()
    loaded.load_state_dict(lorafx.merged_state_dict(gm))
    assert torch.equal(loaded(X), merged(X))


def test_a_module_trained_whole_gets_no_adapter() -> None:
    gm = lorafx.apply(small(), LoraSpec(r=2, modules_to_save=["2"]), (X,))
    assert [s.name for s in lorafx.sites(gm)] == ["0"]


class TiedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layer(self.embed(tokens)).tanh())
        return logits


TOKENS = torch.arange(10).reshape(2, 5) % 9


def test_half_of_a_tied_pair_cannot_train_whole() -> None:
    for name, other in (("head", "embed"), ("embed", "head")):
        with pytest.raises(
            MatchError, match=rf"'{name}.weight' is to be trained whole .*same tensor as '{other}.weight', which is not"
        ):
            lorafx.apply(TiedHead(), LoraSpec(modules_to_save=[name]), (TOKENS,))


def test_a_tied_pair_trains_whole_as_one() -> None:
    model = TiedHead()
    gm = lorafx.apply(model, LoraSpec(r=2, modules_to_save=["head", "embed"]), (TOKENS,))
    assert gm.get_parameter(OWN + "head.weight") is gm.get_parameter(OWN + "embed.weight")
    assert trainable(gm) == {"embed.weight"}
    randomize(gm)
    merged = lorafx.merge(gm)
    assert merged.head.weight is merged.embed.weight
    assert_close("model", merged(TOKENS), gm(TOKENS))
    bare = lorafx.unadapted(gm)
    assert bare.head.weight is bare.embed.weight
    assert torch.equal(bare(TOKENS), model(TOKENS))


def test_modules_to_save_train_in_a_real_model(zoo: Zoo) -> None:
    family = FAMILIES["bert"]
    gm = zoo.adapted(family, LoraSpec(r=2, modules_to_save=["classifier"]))
    assert trainable(gm) == {"classifier.weight", "classifier.bias"}
    before = copy.deepcopy(gm.state_dict())
    losses = train(gm, family, steps=3)
    assert losses[-1] < losses[0]
    changed = {n for n, t in gm.state_dict().items() if not torch.equal(t, before[n]) and "lora_" not in n}
    assert changed == {OWN + "classifier.weight", OWN + "classifier.bias"}
    model = zoo.eager(family)
    model.load_state_dict(lorafx.merged_state_dict(gm))
    assert_close("model", model(**family.inputs()).logits, gm.eval()(**family.inputs()).logits)
