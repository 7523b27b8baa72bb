"""The README's example, run as it is written, on MiniLM's weights."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import lorafx
from lorafx.demo.model import weights_folder

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.xdist_group("minilm")
def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code = next(b for b in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "my_batches" in b)
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
