"""Many tasks, one model: the files, what leaves them as they are, and what is said of them."""

from __future__ import annotations

import copy
import itertools
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

import lorafx
from conftest import Zoo
from lorafx import AdapterSession, LoraSpec
from lorafx.errors import AdapterError, ExportError, LorafxError, MergeError, ParityError
from lorafx.export import multi, provenance
from lorafx.export.commit import Draft
from lorafx.graph import CapturedModule
from several import files, several
from zoo import FAMILIES


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
        (ParityError, r"the adapter 'd' torch graph disagree on example .*: output 'output' by", {"wrong": True}),
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
        (AdapterError, r"adapters=\['dora'\] is of type list, and a mapping of task names", {"adapters": ["dora"]}),
        (
            AdapterError,
            r"task 'd': 5 is of type int, and the name of an .* is expected",
            {"adapters": {"d": 5}},
        ),
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


def test_what_a_file_is_of(tmp_path: Path) -> None:
    """Checked or not, base, merged or with adapters at run time: the base has one digest, and tasks their names."""
    gm = copy.deepcopy(several())
    lorafx.save_adapter(gm, tmp_path / "peft", "dora")
    tasks = {"x": tmp_path / "peft", "y": "dora"}
    one = lorafx.export_multi(gm, tmp_path / "m.onnx", tasks, verify=False).provenance
    assert one == lorafx.export_multi(gm, tmp_path / "m.onnx", tasks).provenance
    assert "task_0" not in json.dumps(one)
    assert one["adapters"]["x"]["sha256"] == one["adapters"]["y"]["sha256"]
    lorafx.set_adapter(gm, "dora")
    others = [
        call(gm, tmp_path / "o.onnx", verify=verify).provenance
        for call in (lorafx.export_base, lorafx.merge_and_export)
        for verify in (False, True)
    ]
    assert {p["base_sha256"] for p in (one, *others)} == {one["base_sha256"]}
    assert others[2]["adapters"]["dora"] == one["adapters"]["y"]
    changed = lorafx.export_base(other_base(gm), tmp_path / "o.onnx", verify=False)
    assert changed.provenance["base_sha256"] != one["base_sha256"]


def test_a_base_with_a_weight_kept_apart_has_the_digest_of_what_is_merged_into_it(tmp_path: Path, zoo: Zoo) -> None:
    gm = zoo.captured(FAMILIES["gpt2"])
    base = lorafx.export_base(gm, tmp_path / "a.onnx", verify=False).provenance["base_sha256"]
    lorafx.add_adapter(gm, LoraSpec(r=2, target_modules=["lm_head"], tied="untie"), "head", seed=0)
    for call in (lorafx.export_base, lorafx.merge_and_export):
        assert call(gm, tmp_path / "a.onnx", verify=False).provenance["base_sha256"] == base


def digests() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("lorafx-digest")]


def test_what_goes_wrong_in_the_thread_that_takes_the_digest_reaches_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Torn(Exception):
        pass

    def pieces(tensors: Any) -> Iterator[Any]:
        if threading.current_thread() in digests():
            raise Torn
        yield from real(tensors)

    real = provenance._pieces
    monkeypatch.setattr(provenance, "_pieces", pieces)
    with pytest.raises(Torn):
        lorafx.export_base(several(), tmp_path / "m.onnx", verify=False)
    with pytest.raises(Torn):
        lorafx.export_multi(several(), tmp_path / "m.onnx", verify=False)
    assert files(tmp_path) == {}


def test_a_failed_export_does_not_wait_for_the_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = itertools.count()

    def pieces(tensors: Any) -> Iterator[bytes]:
        for _ in zip(range(1000), taken, strict=False):
            time.sleep(0.02)
            yield b""

    def fails(*arguments: Any) -> None:
        raise ExportError("in between")

    monkeypatch.setattr(provenance, "_pieces", pieces)
    monkeypatch.setattr("lorafx.export.export.fill", fails)
    with pytest.raises(ExportError, match="in between"):
        lorafx.export_base(several(), tmp_path / "m.onnx", verify=False)
    assert digests() == []
    assert next(taken) < 1000
