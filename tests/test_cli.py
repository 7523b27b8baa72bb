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
from lorafx.pretrained import SourceError
from lorafx.sources import find_model
from onnx_files import LAYERS, chain, lora, save, save_adapter
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


def test_diff_tells_equal_from_different(tmp_path: Path) -> None:
    first, second = (exported(tmp_path / f"{seed}.onnx", seed) for seed in (0, 1))
    code, shown = run("diff", str(first), str(first), "--random")
    assert code == 0
    assert "the same, names included" in shown
    assert "to the bit" in shown
    np.savez(tmp_path / "inputs.npz", input=np.ones((3, 6), dtype=np.float32))
    code, shown = run("diff", str(first), str(second), "--inputs", str(tmp_path / "inputs.npz"))
    assert code == 1
    assert "graph    the same, names included" in shown
    assert "4 differ" in shown
    assert "EXCEEDED" in shown


def test_merge_and_verify_an_onnx_file(here: Path) -> None:
    torch.manual_seed(0)
    base, folder = exported(here / "base.onnx", 0), adapter(here / "mine")
    code, shown = run("merge", str(base), str(folder), "-o", "merged.onnx")
    assert code == 0
    assert "merged       2 of 4 initializers" in shown
    assert "same graph; 2 initializers have the base's bits, 2 are merged" in shown
    arguments = ["--base", str(base), "--adapter", str(folder)]
    code, shown = run("verify", "merged.onnx", *arguments)
    assert code == 0
    assert "a flipped last bit would be seen in 100.0000%" in shown
    code, shown = run("verify", str(base), *arguments)
    assert code == 1
    assert "NOT PROVED: initializer '0.weight" in shown


def test_merge_splits_the_weights_and_writes_its_report(here: Path) -> None:
    base = save(chain(LAYERS, 32), here / "base.onnx")
    folder = save_adapter(here / "mine", lora(LAYERS, 32, 32))
    options = ["--max-shard-size", "5KiB", "--json", "report.json"]
    code, shown = run("merge", str(base), str(folder), "-o", "merged.onnx", *options)
    assert code == 0
    assert len(json.loads((here / "report.json").read_text())["provenance"]["base_sha256"]) == 64
    assert "of weights in 3 files)" in shown


@pytest.mark.parametrize(
    ("report", "message"),
    [
        ("merged.onnx", "is the file to write"),
        ("base.onnx", "is the base"),
        ("mine/adapter_config.json", "is a file of the adapter"),
        ("no/r.json", "cannot write .*r.json"),
    ],
)
def test_a_report_takes_no_files_place_and_is_refused_before_the_merge(here: Path, report: str, message: str) -> None:
    base = save(chain(LAYERS), here / "base.onnx")
    folder = save_adapter(here / "mine", lora(LAYERS))
    before, config = base.read_bytes(), (folder / "adapter_config.json").read_bytes()
    there = sorted(here.iterdir())
    with pytest.raises(lorafx.ExportError, match=message):
        run("merge", str(base), str(folder), "-o", str(here / "merged.onnx"), "--json", report)
    assert sorted(here.iterdir()) == there
    assert (base.read_bytes(), (folder / "adapter_config.json").read_bytes()) == (before, config)
    merged = lorafx.merge_onnx(base, folder, here / "merged.onnx")
    with pytest.raises(lorafx.ExportError, match=r"merged.onnx is what the report is of"):
        merged.save_json("merged.onnx")


def test_merge_swaps_one_file_of_weights(here: Path) -> None:
    """A base and what is merged into it differ in the file of weights alone."""
    folder = adapter(here / "mine")
    model, _ = find_model("my_models:build")
    for name in ("base", "tuned"):
        (here / name).mkdir()
    gm = lorafx.apply(model, lorafx.LoraSpec(r=2), (torch.ones(2, 6),))
    lorafx.export_base(gm, here / "base" / "model.onnx", data_name="weights.data")
    code, _ = run("merge", "base/model.onnx", str(folder), "-o", "tuned/model.onnx", "--data-name", "weights.data")
    assert code == 0
    files = {p.name: p.read_bytes() for p in (here / "base").iterdir()}
    tuned = {p.name: p.read_bytes() for p in (here / "tuned").iterdir()}
    assert files.keys() == tuned.keys() == {"model.onnx", "weights.data"}
    assert [name for name in files if files[name] != tuned[name]] == ["weights.data"]


def adapter(path: Path, variant: str = "lora") -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    spec = lorafx.LoraSpec(r=2, variant=variant, target_modules=["0", "2"])
    gm = lorafx.apply(model, spec, (torch.ones(2, 6),))
    with torch.no_grad():
        for parameter in gm.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    lorafx.save_adapter(gm, path)
    return path


def test_inspect_shows_and_draws_where_an_adapter_learned(here: Path) -> None:
    folder = adapter(here / "mine")
    code, shown = run("inspect", str(folder), "--plot", "learned.png")
    assert code == 0
    assert "adapter mine" in shown
    assert "effective rank" in shown
    assert "drawn into learned.png" in shown
    assert (here / "learned.png").read_bytes().startswith(b"\x89PNG")
    code, shown = run("inspect", str(folder), "--json")
    assert code == 0
    found = json.loads(shown)["sites"]
    assert [(s["site"], s["rank"], s["share"]) for s in found] == [("0", 2, None), ("2", 2, None)]


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_inspect_compares_with_the_base_model(here: Path, variant: str) -> None:
    code, shown = run("inspect", str(adapter(here / "mine", variant)), "--json", "--base", "my_models:build")
    assert code == 0
    assert all(s["norm"] > 0 and s["share"] > 0 for s in json.loads(shown)["sites"])


def test_inspect_reads_the_weights_of_a_checkpoint(tmp_path: Path) -> None:
    model = FAMILIES["llama"].build()
    model.save_pretrained(tmp_path / "base")
    found, _ = find_model(str(tmp_path / "base"), weights=True)
    assert all(torch.equal(found.get_parameter(n), p) for n, p in model.named_parameters())
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(SourceError, match="its weights cannot be read"):
        find_model(str(tmp_path / "base"), weights=True)


def test_inspect_of_what_is_no_adapter(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (["nowhere"], "nowhere: no such directory"),
        ([str(adapter(here / "dora", "dora")), "--plot", "a.png"], "nothing to draw of adapter dora: dora is relative"),
        ([str(adapter(here / "mine")), "--base", "my_models:number"], "returned a int, not a torch.nn.Module"),
    ):
        monkeypatch.setattr(sys, "argv", ["lorafx", "inspect", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


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
    monkeypatch.setattr(sys, "argv", ["lorafx", "diff", "one.onnx", "two.onnx"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines() == ["lorafx: there is no file one.onnx"]
    for place in (1, 4):
        arguments = ["lorafx", "diff", "one.onnx", "two.onnx"]
        arguments.insert(place, "--debug")
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(lorafx.ExportError, match=r"there is no file one\.onnx"):
            cli.main()
