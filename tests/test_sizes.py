"""Sizes that a model's code fixes: reported when captured, refused when another one is given."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lorafx
from lorafx import FixedDimensionWarning, InputError, LoraSpec


class Loop(nn.Module):
    """Takes one step for each position, which tracing unrolls."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(8, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            h = torch.tanh(self.cell(x[:, t]) + h)
        return self.out(h)


class Masked(nn.Module):
    """Embeds tokens and averages those that a float mask keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.dense = nn.Linear(8, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        h = torch.tanh(self.dense(self.embed(input_ids)))
        return self.out((h * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True))


def unrolled() -> lorafx.graph.CapturedModule:
    with pytest.warns(FixedDimensionWarning, match=r"dimension 1 of 'x' \(sequence\) came out fixed at 5"):
        return lorafx.apply(Loop(), LoraSpec(r=2), (torch.randn(2, 5, 8),)).eval()


def test_another_size_than_the_fixed_one_is_refused() -> None:
    gm = unrolled()
    assert gm(torch.randn(3, 5, 8)).shape == (3, 3)
    message = r"dimension 1 of 'x' is 9, and the graph was traced for 5: .*capture again"
    with pytest.raises(InputError, match=message):
        gm(torch.randn(2, 9, 8))
    with pytest.raises(InputError, match=message):
        gm(x=torch.randn(2, 9, 8))


def test_a_fixed_size_is_in_the_report_and_other_examples_are_refused(tmp_path: Path) -> None:
    gm = unrolled()
    report = lorafx.merge_and_export(gm, tmp_path / "model.onnx")
    assert report.inputs == {"x": "[batch,5,8]"}
    assert any("dimension 1 of 'x' is fixed at 5" in w for w in report.warnings)
    with pytest.raises(InputError, match="is 9, and the graph was traced for 5"):
        lorafx.merge_and_export(gm, tmp_path / "other.onnx", example_inputs=(torch.randn(2, 9, 8),))
    assert not (tmp_path / "other.onnx").exists()


def test_what_is_declared_static_is_no_surprise() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FixedDimensionWarning)
        lorafx.apply(Loop(), LoraSpec(r=2), (torch.randn(2, 5, 8),), dynamic_shapes={"x": {0: "batch"}})


def test_a_float_mask_stays_dynamic() -> None:
    model = Masked()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FixedDimensionWarning)
        gm = lorafx.apply(model, LoraSpec(r=2), {"input_ids": torch.ones(2, 6).long(), "mask": torch.ones(2, 6)})
    ids, mask = torch.arange(12).reshape(1, 12), (torch.arange(12) < 7).float().reshape(1, 12)
    assert torch.equal(gm(ids, mask), model(ids, mask))


def test_an_attention_layers_projection_is_a_site_by_its_own_name() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.out = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.out(self.attention(x, x, x, need_weights=False)[0])
            return y

    model, x = Attends().eval(), torch.randn(2, 5, 8)
    plan = lorafx.plan(model, LoraSpec(r=2, target_modules=["out_proj"]), (x,))
    assert [row.site for row in plan.adapted] == ["attention.out_proj"]
    assert len({row.site for row in plan.rows}) == len(plan.rows)
    gm = lorafx.apply(model, LoraSpec(r=2, target_modules=["out_proj"]), (x,)).eval()
    with torch.no_grad():
        for parameter in gm.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    expected = gm(x)
    model.load_state_dict({n: v.clone() for n, v in lorafx.merged_state_dict(gm).items()})
    assert torch.allclose(model(x), expected, atol=1e-5)


def test_a_plan_without_inputs_shows_what_tracing_does_not_enter() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 8), nn.Linear(8, 3))
    plan = lorafx.plan(model, LoraSpec(r=2))
    hidden = [row for row in plan.left_out if "give example_inputs" in row.reason]
    assert {row.site for row in hidden} == {"0.self_attn.out_proj", "0.linear1", "0.linear2"}
    assert hidden[0].reason.startswith("inside '0")
