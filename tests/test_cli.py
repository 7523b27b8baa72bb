"""The command line: what it prints, its exit status, and that errors are one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import lorafx
from lorafx import cli
from lorafx.sources import SourceError, find_model
from zoo import FAMILIES

pytestmark = pytest.mark.xdist_group("cli")

MODEL_FILE = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), (torch.zeros(2, 6),)

def number():
    return 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_models.py").write_text(MODEL_FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "my_models", None)
    sys.modules.pop("my_models")
    return tmp_path


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def exported(path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    lorafx.merge_and_export(lorafx.apply(model, lorafx.LoraSpec(r=2), (torch.ones(2, 6),)), path)
    return path


def test_plan_of_a_function(here: Path) -> None:
    code, shown = run("plan", "my_models:build", "--r", "2")
    assert code == 0
    assert "5 x 6" in shown
    assert "output layer" in shown
    assert "1 layers adapted, 1 left out" in shown


def test_plan_of_a_checkpoint_reads_no_weights(tmp_path: Path) -> None:
    FAMILIES["llama"].build().config.save_pretrained(tmp_path)
    spec = lorafx.LoraSpec(r=3, target_modules=["q_proj"])
    spec.to_json(tmp_path / "spec.json")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    model, inputs = find_model(str(tmp_path))
    assert inputs is None
    assert {p.device.type for p in model.parameters()} == {"meta"}
    code, shown = run("plan", str(tmp_path), "--spec", str(tmp_path / "spec.json"))
    assert code == 0
    assert "2 layers adapted" in shown
    assert "model.layers.1.self_attn.q_proj" in shown


def test_verify_tells_equal_from_different(tmp_path: Path) -> None:
    first, second = (exported(tmp_path / f"{seed}.onnx", seed) for seed in (0, 1))
    code, shown = run("verify", str(first), str(first), "--random")
    assert code == 0
    assert "the same, names included" in shown
    assert "to the bit" in shown
    code, shown = run("verify", str(first), str(second))
    assert code == 0, "without inputs, other weights in the same graph are shown and no failure"
    assert "4 differ" in shown
    np.savez(tmp_path / "inputs.npz", input=np.ones((3, 6), dtype=np.float32))
    code, shown = run("verify", str(first), str(second), "--inputs", str(tmp_path / "inputs.npz"))
    assert code == 1
    assert "EXCEEDED" in shown


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "'nowhere' is neither a folder nor package.module:function"),
        ("my_models:missing", "'my_models:missing' raised AttributeError: .*missing"),
        ("my_models:number", "returned a int, not a torch.nn.Module"),
        (".", "has no config.json"),
    ],
)
def test_a_model_that_cannot_be_found(here: Path, source: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        find_model(source)


def test_errors_are_one_line_and_a_traceback_only_with_debug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lorafx", "verify", "one.onnx", "two.onnx"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    assert capsys.readouterr().err.splitlines() == ["lorafx: there is no file one.onnx"]
    for place in (1, 4):
        arguments = ["lorafx", "verify", "one.onnx", "two.onnx"]
        arguments.insert(place, "--debug")
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(lorafx.ExportError, match=r"there is no file one\.onnx"):
            cli.main()
