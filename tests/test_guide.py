"""docs/adapters.md, run as it is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[1] / "docs" / "adapters.md"


def test_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    exec("\n".join(blocks), {})
    shown = capsys.readouterr().out
    for part in ("german", "relative error", "rank"):
        assert part in shown
    assert (tmp_path / "german.onnx").is_file()
    assert (tmp_path / "fr" / "adapter_model.safetensors").is_file()
