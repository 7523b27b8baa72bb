"""What is given to an export, or to a session, and does not fit: named, with nothing written."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lorafx
from conftest import Zoo
from lorafx.errors import InputError
from lorafx.pretrained import SourceError
from zoo import FAMILIES


def test_a_provider_that_onnx_runtime_is_without_is_refused(tmp_path: Path) -> None:
    """It would run on the CPU, and print so."""
    with pytest.raises(lorafx.ExportError, match=r"has no provider 'CPUExecutionProvder' \(did you mean 'CPUExec"):
        lorafx.open_session(tmp_path / "model.onnx", providers=[("CPUExecutionProvder", {})])


def test_a_provider_that_does_not_start_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the CPU is asked for beside it. Played, so that it does so where there is a GPU too."""
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    lorafx.export_base(model, tmp_path / "model.onnx", example_inputs=(torch.ones(2, 4),), verify=False)
    gpu = ["CUDAExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: [*gpu, "CPUExecutionProvider"])
    start = ort.InferenceSession
    on_cpu = {"providers": ["CPUExecutionProvider"]}
    monkeypatch.setattr(ort, "InferenceSession", lambda *arguments, **options: start(*arguments, **on_cpu))
    for session in (lorafx.open_session, lorafx.AdapterSession):
        with pytest.raises(lorafx.ExportError, match=r"could not start 'CUDAExecutionProvider' and runs on \['CPU"):
            session(tmp_path / "model.onnx", providers=gpu)  # type: ignore[operator]
        session(tmp_path / "model.onnx", providers=[(gpu[0], {}), "CPUExecutionProvider"])  # type: ignore[operator]


def test_example_inputs_that_the_model_does_not_take_are_named(tmp_path: Path, zoo: Zoo) -> None:
    gm = zoo.adapted(FAMILIES["llama"], lorafx.LoraSpec(r=2))
    ids = torch.ones(2, 8, dtype=torch.long)
    unknown = {"input_ids": ids + 10**6, "attention_mask": ids}
    with pytest.raises(InputError, match=r"on the example inputs \(input_ids \[2, 8\], .*: index out of range"):
        lorafx.merge_and_export(gm, tmp_path / "model.onnx", example_inputs=unknown)
    short = {"input_ids": ids, "attention_mask": ids[:, :5]}
    with pytest.raises(lorafx.ExportError, match=r"if it does not take input_ids \[2, 8\], attention_mask \[2, 5\]"):
        lorafx.merge_and_export(gm, tmp_path / "model.onnx", example_inputs=short)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("given", "named"), [(nn.Linear, "Linear"), ({"hidden_size": 8}, "a dict")])
def test_what_is_no_model_is_named(tmp_path: Path, given: object, named: str) -> None:
    save_file({"weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match=rf"expected a transformers config, .* not {named}$"):
        lorafx.export_checkpoint(given, tmp_path, None, tmp_path / "model.onnx")
