"""End to end on a real model: MiniLM with its pretrained weights, from sentences to ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import peft
import pytest
import torch
from torch import Tensor, nn

import lorafx
from conftest import randomize
from lorafx.demo.model import load_model, load_tokenizer
from lorafx.export.compare import compare
from lorafx.export.translate import translate
from lorafx.graph import CapturedModule
from lorafx.passes.inference import inference
from tolerances import assert_close

pytestmark = pytest.mark.xdist_group("minilm")

SENTENCES = (
    "Return a list of the words in the string.",
    "Open the file and read it.",
    "The event loop schedules callbacks and runs until it is stopped.",
)
SPEC = lorafx.LoraSpec(r=8, alpha=16, modules_to_save=("head",))


def batch(count: int) -> dict[str, Tensor]:
    encoded = load_tokenizer()(list(SENTENCES[:count]), padding=True, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


class Embedder(nn.Module):
    """The sentence embeddings themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.model = load_model(classes=3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model.embed(input_ids, attention_mask)


@pytest.fixture(scope="module")
def trained() -> Iterator[tuple[Any, CapturedModule, list[float]]]:
    torch.manual_seed(0)
    model = load_model(classes=3)
    gm = lorafx.apply(model, SPEC, batch(2), seed=0)
    optimizer = torch.optim.AdamW([p for p in gm.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(4):
        loss = nn.functional.cross_entropy(gm(**batch(3))["logits"], torch.arange(3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, gm.eval(), losses


def test_sentence_embeddings_are_unchanged_at_initialisation() -> None:
    model = Embedder().eval()
    gm = lorafx.apply(model, lorafx.LoraSpec(r=8, dropout=0.1), batch(2))
    with torch.no_grad():
        for count in (1, 2, 3):
            assert torch.equal(gm(**batch(count)), model(**batch(count)))


def test_three_steps_lower_the_loss(trained: tuple[Any, CapturedModule, list[float]]) -> None:
    model, gm, losses = trained
    assert losses[-1] < losses[0]
    assert len(lorafx.sites(gm)) == 36  # 6 layers of query, key, value, output and two in the MLP
    fresh = load_model(classes=3)
    for (name, now), before in zip(model.encoder.named_parameters(), fresh.encoder.parameters(), strict=True):
        assert torch.equal(now, before), name


def test_outputs_are_pefts_with_the_same_adapter() -> None:
    gm = lorafx.apply(load_model(classes=3), lorafx.LoraSpec(r=8, alpha=16), batch(2)).eval()
    randomize(gm, 0.02)
    names = [s.name for s in lorafx.sites(gm)]
    model = load_model(classes=3)
    with torch.no_grad():
        model.head.load_state_dict({n: gm.get_parameter(f"head.{n}") for n in ("weight", "bias")})
    twin = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=names)).eval()
    theirs = dict(twin.named_parameters())
    with torch.no_grad():
        for site in lorafx.sites(gm):
            for name, value in site.parameters(gm).items():
                theirs[f"base_model.model.{site.name}.{name}.default.weight"].copy_(value)
        assert_close("peft", gm(**batch(3))["logits"], twin(**batch(3))["logits"])


def test_merged_file_is_the_twin(trained: tuple[Any, CapturedModule, list[float]], tmp_path: Path) -> None:
    model, gm, _ = trained
    report = lorafx.merge_and_export(gm, tmp_path / "model.onnx")
    assert (report.sites, report.outputs, report.warnings) == (36, ("logits",), ())
    assert all(row.passed for row in report.parity)

    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {name: value.numpy() for name, value in batch(1).items()})
    with torch.no_grad():
        assert_close("model", torch.from_numpy(found), gm(**batch(1))["logits"])

    ours = translate(inference(lorafx.unadapted(gm)), batch(2), {}).model
    program = torch.onnx.export(model.eval(), (), kwargs=batch(2), dynamo=True, verbose=False)
    assert program is not None
    assert compare(ours, program.model, names=False) is None
