"""Tensors that a model's code makes, below other modules too: they are captured, kept, and no part of the state."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import FalconConfig, FalconForCausalLM

import lorafx
from conftest import randomize
from lorafx import LoraSpec
from tolerances import assert_close


class Floor(nn.Module):
    """Makes a constant each time it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.drop = nn.Linear(4, 4), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.l(x))
        return torch.where(y > 0, y, torch.tensor(-1.0))


class Below(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.floor, self.blocks = Floor(), nn.ModuleList([Floor(), Floor()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.floor(self.floor(x))
        for block in self.blocks:
            x = block(x)
        return x * torch.tensor([1.0, 2.0, 3.0, 4.0])


@pytest.mark.parametrize("build", [Floor, Below])
def test_constants_of_modules(build: type[nn.Module]) -> None:
    model, x = build().eval(), torch.randn(3, 4)
    gm = lorafx.apply(model, LoraSpec(r=2, target_modules=".*"), (x,)).eval()
    assert torch.equal(gm(x), model(x))
    assert not [name for name in gm.state_dict() if "tensor" in name]
    for other in (copy.deepcopy(gm), pickle.loads(pickle.dumps(gm)), lorafx.merge(gm)):  # noqa: S301  # its own
        assert torch.equal(other(x), model(x))


@pytest.mark.parametrize(
    "options",
    [{"hidden_dropout": 0.1, "attention_dropout": 0.1}, {"alibi": True}, {"new_decoder_architecture": True}],
    ids=lambda options: next(iter(options)),
)
def test_falcon_is_applied_trained_and_merged(options: dict[str, Any]) -> None:
    """Its attention makes constants, and its linear layers multiply by ``weight.T`` themselves."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = FalconForCausalLM(FalconConfig(**sizes, num_kv_heads=2, bos_token_id=1, eos_token_id=2, **options)).eval()
    ids = torch.randint(0, 16, (2, 5))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    gm = lorafx.apply(model, LoraSpec(r=2, target_modules=["query_key_value", "dense_4h_to_h"]), inputs)
    assert {row.provider for row in lorafx.explain(gm).rows} == {"cpu"}
    assert torch.equal(gm.eval()(**inputs).logits, model(**inputs).logits)
    randomize(gm)
    gm.train()
    before = {n: p.detach().clone() for n, p in gm.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in gm.parameters() if p.requires_grad], 0.1)
    gm(**inputs).logits.square().mean().backward()
    optimizer.step()
    assert len(before) == 8
    assert all(not torch.equal(p, before[n]) for n, p in gm.named_parameters() if p.requires_grad)
    wanted = gm.eval()(**inputs).logits
    assert_close("model", lorafx.merge(gm)(**inputs).logits, wanted)
