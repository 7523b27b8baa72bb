"""Many tasks, one model: the files, what leaves them as they are, and what is said of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

import lorafx
from lorafx import AdapterSession
from lorafx.errors import AdapterError, ExportError, LorafxError, MergeError, ParityError
from lorafx.export import multi
from lorafx.export.commit import Draft
from lorafx.graph import CapturedModule
from several import files, several


def test_a_saved_report_names_no_folder(tmp_path: Path) -> None:
    """It is to be passed on; the object's own paths can be used."""
    gm = several()
    merged = lorafx.merge_and_export(gm, tmp_path / "merged.onnx", verify=False, max_shard_size=200)
    tasks = lorafx.export_multi(gm, tmp_path / "m.onnx", {"s": "small"}, verify=False, external_data=True)
    assert {Path(p).parent for p in (merged.path, *merged.data_paths, tasks.path, *tasks.data_paths)} == {tmp_path}
    for report in (merged, tasks):
        report.save_json(tmp_path / "report.json")
        text = (tmp_path / "report.json").read_text(encoding="utf-8")
        assert str(tmp_path) not in text
        assert json.loads(text) == report.to_dict()
        assert report.to_dict()["data_paths"] == [Path(p).name for p in report.data_paths]
    assert Path(tasks.tasks["s"].path).parent == tmp_path
    assert tasks.to_dict()["tasks"]["s"]["path"] == "s.onnx_adapter"


def test_the_same_base_gives_the_same_bytes_and_only_the_task_changes(tmp_path: Path) -> None:
    gm = copy.deepcopy(several())
    tasks = {"d": "dora", "s": "small"}
    lorafx.export_multi(gm, tmp_path / "model.onnx", tasks, verify=False)
    before = files(tmp_path)
    lorafx.export_multi(gm, tmp_path / "model.onnx", tasks, verify=False)
    assert files(tmp_path) == before
    with torch.no_grad():
        gm.get_parameter("down.lora_A.small").mul_(2)
    lorafx.export_multi(gm, tmp_path / "model.onnx", tasks, verify=False)
    after = files(tmp_path)
    assert [name for name in before if before[name] != after[name]] == ["s.onnx_adapter"]


def test_what_lies_beside_and_cannot_be_read_is_no_error_of_the_export(tmp_path: Path) -> None:
    """It is found when all is in its place already: the export succeeded, and says so."""
    (tmp_path / "torn.onnx_adapter").write_bytes(b"no adapter")
    (tmp_path / "folder.onnx_adapter").mkdir()
    report = lorafx.export_multi(several(), tmp_path / "model.onnx", {"s": "small"}, verify=False)
    assert report.warnings == tuple(
        f"{name}.onnx_adapter lies beside the file and cannot be read; AdapterSession refuses it"
        for name in ("folder", "torn")
    )
    assert AdapterSession(tmp_path / "model.onnx").adapters == ("s",)


def other_base(gm: CapturedModule) -> CapturedModule:
    other = copy.deepcopy(gm)
    state = {"norm.weight": torch.full((6,), 2.0)}
    other.load_state_dict(state, strict=False)
    return other


def test_another_base_never_lies_beside_its_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gm = several()
    lorafx.export_multi(gm, tmp_path / "model.onnx", {"d": "dora", "s": "small"}, verify=False)
    commit = Draft.commit
    seen: list[set[str]] = []

    def watched(self: Draft) -> None:
        seen.append({p.name for p in tmp_path.glob("*.onnx_adapter")})
        commit(self)
        seen.append({p.name for p in tmp_path.glob("*.onnx_adapter")})
        raise KeyboardInterrupt  # killed before the adapters get their names

    monkeypatch.setattr(Draft, "commit", watched)
    with pytest.raises(KeyboardInterrupt):
        lorafx.export_multi(other_base(gm), tmp_path / "model.onnx", {"d": "dora"}, verify=False)
    assert seen == [{"s.onnx_adapter"}, {"s.onnx_adapter"}]
    assert AdapterSession(tmp_path / "model.onnx").adapters == ()
    monkeypatch.undo()
    report = lorafx.export_multi(other_base(gm), tmp_path / "model.onnx", {"d": "dora"}, verify=False)
    assert report.warnings == (
        "s.onnx_adapter lies beside the file and is for another base; AdapterSession refuses it",
    )
    session = AdapterSession(tmp_path / "model.onnx")
    assert session.adapters == ("d",)
    with pytest.raises(AdapterError, match="made for another base"):
        session.add("s", tmp_path / "s.onnx_adapter")


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ParityError, r"torch, with adapter 'd', disagree on example .*: output 'output' by", {"wrong": True}),
        (MergeError, r"site 'down': lora_A holds NaN or Inf", {"nan": True}),
        (MergeError, r"dora is merged in place.*unmerge", {"merge": True}),
        (ExportError, "No such file or directory", {"path": "nowhere/model.onnx"}),
        (ExportError, "an adapter for another model than", {"path": "other.onnx", "adapters": {"d": "small"}}),
        (ExportError, "naming='olive' is none of", {"naming": "olive"}),
        (ExportError, "no adapters", {"adapters": {}}),
        (
            AdapterError,
            "neither a folder nor an adapter of the graph, which has 'default'",
            {"adapters": {"d": "dorra"}},
        ),
        (AdapterError, "cannot be a task's name", {"adapters": {"../d": "dora"}}),
    ],
)
def test_what_is_refused_leaves_all_files(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[LorafxError],
    message: str,
    arguments: dict[str, Any],
) -> None:
    gm = copy.deepcopy(several())
    tasks = {"d": "dora", "s": "small"}
    lorafx.export_multi(gm, tmp_path / "model.onnx", tasks, verify=False)
    before = files(tmp_path)
    if arguments.pop("wrong", False):
        values = multi.adapter_values

        def wrong(gm: CapturedModule, name: str, *rest: Any) -> Any:
            found = values(gm, name, *rest)
            return {n: ir.tensor(t.numpy() * 1.01) for n, t in found.items()}

        monkeypatch.setattr(multi, "adapter_values", wrong)
    if arguments.pop("nan", False):
        with torch.no_grad():
            gm.get_parameter("down.lora_A.small")[0, 0] = float("nan")
    if arguments.pop("merge", False):
        lorafx.merge(gm, "dora", inplace=True)
    path = tmp_path / arguments.pop("path", "model.onnx")
    with pytest.raises(error, match=message):
        lorafx.export_multi(gm, path, **{"adapters": tasks, **arguments})
    assert files(tmp_path) == before


def test_a_layer_that_the_translation_has_not_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorafx.export.adapter_inputs._PRODUCTS", frozenset({"Conv"}))
    with pytest.raises(ExportError, match=r"site 'up': expected one product with 'up\.weight' .* MatMul 'up/MatMul'"):
        lorafx.export_multi(several(), tmp_path / "model.onnx", {"a": "adalora"})
    assert files(tmp_path) == {}
