"""The README's example, run as it is written, on MiniLM's weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import lorafx
from lorafx.demo.model import weights_folder
from zoo import FAMILIES

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)


@pytest.mark.xdist_group("minilm")
def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code = next(block for block in BLOCKS if "my_batches" in block)
    assert code.count("path/to/model") == 2
    monkeypatch.chdir(tmp_path)
    ids = torch.tensor([[101, 2023, 2003, 102], [101, 2178, 102, 0]])
    batch = {"input_ids": ids, "token_type_ids": torch.zeros_like(ids), "attention_mask": (ids != 0).long()}
    exec(code.replace("path/to/model", str(weights_folder())), {"my_batches": [(batch, torch.tensor([0, 2]))]})
    shown = capsys.readouterr().out
    assert "37 layers adapted" in shown
    assert "agree with torch" in shown
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert (tmp_path / "model.onnx").stat().st_size > 80e6
    assert lorafx.LoraSpec.from_json(tmp_path / "adapter" / "adapter_config.json").r == 16


def test_the_other_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order on one model; the last starts again, from the model."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"lorafx": lorafx, "model": FAMILIES["bert"].build().eval()}
    first, *others = [block for block in BLOCKS if "my_batches" not in block]
    exec(first, names)
    assert (tmp_path / "model.onnx").exists()
    for block in others:
        exec(block, names)
    assert len(others) == 2
    assert {type(p).__name__ for p in names["gm"].parameters()} >= {"QuantizedTensor"}
