"""What an export replaces and removes in its folder: nothing that another ``.onnx`` there reads."""

from __future__ import annotations

import hashlib
import inspect
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor

import lorafx
from lorafx.export.commit import draft
from lorafx.export.onnx_file import weight_files
from lorafx.graph import CapturedModule
from onnx_files import LAYERS, chain, lora, save, save_adapter, weights


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return save_adapter(tmp_path / "adapter", lora(LAYERS))


@pytest.fixture(scope="module")
def gm() -> CapturedModule:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.ReLU(), torch.nn.Linear(24, 5)).eval()
    gm = lorafx.apply(model, lorafx.LoraSpec(r=2, target_modules=["0"]), torch.randn(3, 16), seed=0)
    with torch.no_grad():
        for parameter in (p for p in gm.parameters() if p.requires_grad):
            parameter.normal_()
    return gm.eval()


def contents(folder: Path) -> dict[str, str]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def base_in(folder: Path, data_name: str) -> Path:
    """A base whose weights are in a file of this name."""
    path = folder / "base.onnx"
    onnx.save(chain(LAYERS), path, save_as_external_data=True, location=data_name, size_threshold=0)
    return path


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Replaced.


def copied(base: Path, folder: Path) -> Path:
    return Path(shutil.copy(base, folder / "merged.onnx"))


def linked(base: Path, folder: Path) -> Path:
    (folder / "other").symlink_to(folder)
    return Path(shutil.copy(base, folder / "other" / "merged.onnx"))


def linked_data(base: Path, folder: Path) -> Path:
    (folder / "beside").mkdir()
    (folder / "beside" / "w.data").symlink_to(folder / "w.data")
    return Path(shutil.copy(base, folder / "beside" / "merged.onnx"))


@pytest.mark.parametrize("place", [copied, linked, linked_data])
def test_a_merge_never_writes_over_its_bases_weights(
    place: Callable[[Path, Path], Path], adapter: Path, tmp_path: Path
) -> None:
    """The graphs are the same to the byte, so that the weights' place alone tells whose they are."""
    base = base_in(tmp_path, "w.data")
    out = place(base, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(lorafx.ExportError, match=r"w\.data is the base's file of weights, which would be lost: give"):
        lorafx.merge_onnx(base, adapter, out, data_name="w.data")
    with pytest.raises(lorafx.ExportError, match=r"w\.data is the base's file of weights, which would be lost: give"):
        lorafx.merge_onnx(base, adapter, out.with_name("w.data"))
    assert contents(tmp_path) == before


def test_an_export_never_writes_over_weights_that_another_file_names(gm: CapturedModule, tmp_path: Path) -> None:
    lorafx.export_base(gm, tmp_path / "base.onnx", data_name="w.data", verify=False)
    shutil.copy(tmp_path / "base.onnx", tmp_path / "merged.onnx")
    before = contents(tmp_path)
    with pytest.raises(
        lorafx.ExportError, match=r"base\.onnx has its weights in .*w\.data too, and would have those of"
    ):
        lorafx.merge_and_export(gm, tmp_path / "merged.onnx", data_name="w.data", verify=False)
    assert contents(tmp_path) == before
    (tmp_path / "base.onnx").rename(tmp_path / "base")  # no .onnx any more
    (tmp_path / "damaged.onnx").write_bytes(b"of which nobody can read weights")
    lorafx.merge_and_export(gm, tmp_path / "merged.onnx", data_name="w.data", verify=False)


def test_one_file_of_weights_is_swapped_for_another(adapter: Path, tmp_path: Path) -> None:
    """The recipe: the same .onnx to the byte in two folders, or one whose weights are replaced."""
    for folder in ("base", "tuned"):
        (tmp_path / folder).mkdir()
    base = base_in(tmp_path / "base", "w.data")
    out = tmp_path / "tuned" / "base.onnx"
    for _ in range(2):
        lorafx.merge_onnx(base, adapter, out, data_name="w.data")
        assert lorafx.verify_onnx(out, base, adapter).passed
    assert sorted(contents(tmp_path / "tuned")) == ["base.onnx", "w.data"]
    (tmp_path / "tuned" / "w.data").replace(tmp_path / "base" / "w.data")
    assert not same(weights(base), weights(save(chain(LAYERS), tmp_path / "plain.onnx")))


# Removed.


def renamed(model: Path, folder: Path) -> Path:
    return model.rename(folder / "base.onnx")


def copied_base(model: Path, folder: Path) -> Path:
    return Path(shutil.copy(model, folder / "base.onnx"))


def nameless(model: Path, folder: Path) -> Path:
    """A base without the suffix that tells an ONNX file."""
    return model.rename(folder / "base")


@pytest.mark.parametrize("keep", [renamed, copied_base, nameless])
def test_a_merge_keeps_its_bases_weights_whatever_their_name(
    keep: Callable[[Path, Path], Path], gm: CapturedModule, tmp_path: Path
) -> None:
    lorafx.save_adapter(gm, tmp_path / "adapter")
    report = lorafx.export_base(gm, tmp_path / "model.onnx", external_data=True, verify=False)
    base = keep(tmp_path / "model.onnx", tmp_path)
    for _ in range(2):
        merged = lorafx.merge_onnx(base, tmp_path / "adapter", tmp_path / "model.onnx")
        assert lorafx.verify_onnx(tmp_path / "model.onnx", base, tmp_path / "adapter").passed
    assert {p.name for p in tmp_path.glob("*.data")} == {Path(d).name for d in (*report.data_paths, *merged.data_paths)}


@pytest.mark.parametrize("keep", [renamed, copied_base])
def test_an_export_keeps_weights_that_another_file_names(
    keep: Callable[[Path, Path], Path], gm: CapturedModule, tmp_path: Path
) -> None:
    """And removes them with the last file that does."""
    lorafx.export_base(gm, tmp_path / "model.onnx", external_data=True, verify=False)
    before = weights(tmp_path / "model.onnx")
    base = keep(tmp_path / "model.onnx", tmp_path)
    lorafx.merge_and_export(gm, tmp_path / "model.onnx", external_data=True, verify=False)
    assert same(weights(base), before)
    assert not same(weights(tmp_path / "model.onnx"), before)
    base.unlink()
    report = lorafx.merge_and_export(gm, tmp_path / "model.onnx", external_data=True, verify=False)
    assert {str(p) for p in tmp_path.glob("*.data")} == set(report.data_paths)


def test_nothing_is_removed_beside_a_file_that_cannot_be_read(gm: CapturedModule, tmp_path: Path) -> None:
    (old,) = lorafx.export_base(gm, tmp_path / "model.onnx", external_data=True, verify=False).data_paths
    other = tmp_path / "other.onnx"
    for damaged in ((tmp_path / "model.onnx").read_bytes()[:-5], b""):
        other.write_bytes(damaged)
        (new,) = lorafx.merge_and_export(gm, tmp_path / "model.onnx", external_data=True, verify=False).data_paths
        assert Path(old).exists()
    other.unlink()
    other.symlink_to("model.onnx")  # names what it is a link to, and no more
    lorafx.merge_and_export(gm, tmp_path / "model.onnx", external_data=True, verify=False)
    assert {str(p) for p in tmp_path.glob("*.data")} == {new}


def test_weights_that_a_branch_of_the_graph_names(tmp_path: Path) -> None:
    """Whatever tensor names a file, and by whatever path."""
    inner = onnx.TensorProto(name="c", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    inner.external_data.add(key="location", value="./there/../inner.data")
    model = chain(LAYERS[:1])
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["c"], value=inner))
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="w.data", size_threshold=0)
    assert weight_files(tmp_path / "m.onnx") == {tmp_path / "w.data", tmp_path / "inner.data"}


def test_more_weights_than_the_onnx_holds_are_refused(tmp_path: Path) -> None:
    """Before any is made."""

    def never() -> ir.Tensor:
        raise AssertionError("made")

    weight = ir.Value(name="w", shape=ir.Shape([2**29]), type=ir.TensorType(ir.DataType.FLOAT))
    weight.const_value = ir.LazyTensor(never, ir.DataType.FLOAT, ir.Shape([2**29]), name="w")
    node = ir.node("Identity", [weight])
    graph = ir.Graph([], [*node.outputs], nodes=[node], initializers=[weight], opset_imports={"": 20})
    message = r"external_data=False: the weights are 2\.0 GiB, and .* at most .*Leave it out"
    with pytest.raises(lorafx.ExportError, match=message), draft(tmp_path / "m.onnx") as file:
        file.write(ir.Model(graph, ir_version=10), False, lambda done: None)
    assert not contents(tmp_path)


# Settings.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"opset": "18"}, "opset='18' is of type str: give a whole number"),
        ({"opset": True}, "opset=True is of type bool"),
        ({"opset": 99}, "opset=99 is none: those that the installed onnx knows end at"),
        ({"opset": 0}, "opset=0 is none"),
        ({"atol": -1}, "atol=-1 is no tolerance: give a number from 0 on, as atol=1e-3"),
        ({"rtol": "1e-3"}, "rtol='1e-3' is no tolerance"),
        ({"rtol": float("nan")}, "rtol=nan is no tolerance"),
        ({"external_data": "no"}, "external_data='no' is neither True nor False"),
        ({"data_name": 3}, "data_name=3 is no name of a file"),
        ({"progress": True}, "progress=True cannot be called: give a function"),
        ({"verify": 2}, "verify=2 is neither True nor False"),
        ({"max_shard_size": 1.5}, "max_shard_size=1.5 is no size"),
        ({"external_data": False, "max_shard_size": 100}, "external_data=False .* max_shard_size=100 is about files"),
        ({"external_data": False, "data_name": "w.data"}, r"external_data=False .* data_name='w\.data' is about files"),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    settings: dict[str, Any], message: str, gm: CapturedModule, adapter: Path, tmp_path: Path
) -> None:
    given: dict[Callable[..., object], tuple[object, ...]] = {
        lorafx.merge_and_export: (gm, tmp_path / "m.onnx"),
        lorafx.export_base: (gm, tmp_path / "m.onnx"),
        lorafx.export_checkpoint: (tmp_path, tmp_path, None, tmp_path / "m.onnx"),
        lorafx.export_multi: (gm, tmp_path / "m.onnx"),
        lorafx.merge_onnx: (tmp_path / "base.onnx", adapter, tmp_path / "m.onnx"),
    }
    calls = [call for call in given if settings.keys() <= inspect.signature(call).parameters.keys()]
    assert calls
    for call in calls:
        with pytest.raises(lorafx.ExportError, match=message):
            call(*given[call], **settings)


@pytest.mark.parametrize("named", [None, "weights.data"])
def test_a_file_that_is_read_only_stays(gm: CapturedModule, tmp_path: Path, named: str | None) -> None:
    target = tmp_path / "m.onnx"
    export = partial(lorafx.merge_and_export, gm, target, external_data=True, data_name=named, verify=False)
    report = export()
    there = {path: path.read_bytes() for path in tmp_path.iterdir()}
    guarded = target if named is None else Path(report.data_paths[0])
    guarded.chmod(0o444)
    with pytest.raises(lorafx.ExportError, match=rf"cannot write .*{guarded.name}: it is read-only"):
        export()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == there


def test_who_may_read_a_file_may_read_the_next_one(gm: CapturedModule, tmp_path: Path) -> None:
    target = tmp_path / "m.onnx"
    lorafx.export_base(gm, target, external_data=True, verify=False)
    target.chmod(0o600)
    report = lorafx.merge_and_export(gm, target, external_data=True, verify=False)
    assert {Path(path).stat().st_mode & 0o777 for path in (report.path, *report.data_paths)} == {0o600}


def test_a_session_over_a_link_to_one_of_two_exports(gm: CapturedModule, tmp_path: Path) -> None:
    """ONNX Runtime looks for weights beside the link; those of a file that is linked with its weights are there."""
    x = torch.randn(3, 16)
    for name, export in {"base": lorafx.export_base, "tuned": lorafx.merge_and_export}.items():
        (tmp_path / name).mkdir()
        report = export(gm, tmp_path / name / "m.onnx", external_data=True, verify=False)
    link = tmp_path / "current.onnx"
    outputs = []
    for name in ("base", "tuned"):
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / name / "m.onnx")
        session = lorafx.open_session(link)
        outputs.append(torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]))
    torch.testing.assert_close(outputs[1], gm(x).detach())
    assert not torch.allclose(outputs[0], outputs[1])
    (tmp_path / "both").mkdir()
    for file in (report.path, *report.data_paths):
        (tmp_path / "both" / Path(file).name).symlink_to(file)
    lorafx.open_session(tmp_path / "both" / "m.onnx")
