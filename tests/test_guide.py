"""docs/adapters.md, docs/deploy.md and docs/genai.md, run as they are written."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def run(guide: str) -> str:
    """Run a guide's blocks in order: Python in one namespace, commands one by one; returns what commands print."""
    shown, namespace = "", dict[str, Any]()
    for language, block in re.findall(r"```(python|sh)\n(.*?)```", (DOCS / guide).read_text(), re.S):
        if language == "python":
            exec(block, namespace)
            continue
        for line in block.splitlines():
            program, *arguments = shlex.split(line)
            command = [sys.executable, *(["-m", "lorafx"] if program == "lorafx" else []), *arguments]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            shown += done.stdout
    return shown


def test_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    run("adapters.md")
    shown = capsys.readouterr().out
    for part in ("german", "relative error", "rank"):
        assert part in shown
    assert (tmp_path / "german.onnx").is_file()
    assert (tmp_path / "fr" / "adapter_model.safetensors").is_file()


def test_the_recipes_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = run("deploy.md")
    assert "CPUExecutionProvider" in shown
    assert "same graph; 29 initializers have the base's bits, 14 are merged" in shown
    assert "the same, to the bit" in shown
    assert "left out     site 'encoder.0': not in this part of the model" in shown
    assert "random, sizes 3 and 8" in shown
    assert (tmp_path / "merged.json").is_file()
    assert (tmp_path / "from_disk.onnx").is_file()
    assert (tmp_path / "de.onnx_adapter").is_file()


def test_onnxruntime_genai_generates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime_genai", reason="has no wheel for this platform, or was not installed")
    monkeypatch.chdir(tmp_path)
    run("genai.md")
    assert (tmp_path / "assistant" / "fr.onnx_adapter").is_file()
