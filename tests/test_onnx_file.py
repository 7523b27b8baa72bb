"""ONNX files that lie about their tensors, or lead out of their folder: each is refused, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper

import lorafx
from lorafx.export.onnx_file import read_onnx
from onnx_files import chain, lora, make_model, save, save_adapter, stored, weights

LAYERS = ("a.0", "a.1")
Change = Callable[[ModelProto, Path], None]


def edit(**fields: str) -> Change:
    """Change what the second tensor says of its data outside."""

    def change(model: ModelProto, folder: Path) -> None:
        for entry in model.graph.initializer[1].external_data:
            if entry.key in fields:
                entry.value = fields[entry.key].format(folder=folder)

    return change


def link(model: ModelProto, folder: Path) -> None:
    (folder / "base.onnx.data").rename(folder.parent / "elsewhere.data")
    (folder / "base.onnx.data").symlink_to(folder.parent / "elsewhere.data")


def cut(model: ModelProto, folder: Path) -> None:
    data = folder / "base.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])


def remove(model: ModelProto, folder: Path) -> None:
    (folder / "base.onnx.data").unlink()


def widen(model: ModelProto, folder: Path) -> None:
    model.graph.initializer[1].dims[0] = 2**40


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit(location="../base.onnx.data"), r"'\.\./base\.onnx\.data', which is not in the folder"),
        (edit(location="{folder}/base.onnx.data"), "is not in the folder"),
        (edit(location="C:\\base.data"), "is not in the folder"),
        (edit(location="x/../../base.onnx.data"), "is not in the folder"),
        (edit(location=""), "is not in the folder"),
        (link, "is not in the folder"),
        (edit(location="."), "is not in the folder|no such file"),
        (edit(location="none.data"), "no such file beside"),
        (remove, "no such file beside"),
        (cut, r"bytes \d+ to \d+ of 'base\.onnx\.data', which has 287"),
        (edit(offset="1000000"), "The file was cut off"),
        (edit(offset="-4"), "The file was cut off"),
        (edit(offset="four"), "are no numbers"),
        (edit(length="12"), "which takes 144 bytes, and a length of 12"),
        (widen, "and a length of 144"),
    ],
)
def test_data_outside_that_is_not_where_and_as_large_as_it_says(tmp_path: Path, change: Change, message: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    base = save(chain(LAYERS), folder / "base.onnx", outside=True)
    adapter = save_adapter(tmp_path / "adapter", lora(LAYERS))
    model = onnx.load(base, load_external_data=False)
    change(model, folder)
    base.write_bytes(model.SerializeToString())
    for use in (
        lambda: lorafx.merge_onnx(base, adapter, tmp_path / "merged.onnx"),
        lambda: lorafx.diff_onnx(base, base),
        lambda: lorafx.verify_onnx(base, base, adapter),
    ):
        with pytest.raises(lorafx.ExportError, match=message) as error:
            use()
        first = change in (link, remove)  # which concerns the data of all
        assert f"tensor 'a.{0 if first else 1}.weight.T'" in str(error.value)
    assert not list(tmp_path.glob("*merged*"))


def raw(model: ModelProto, data: bytes) -> None:
    model.graph.initializer[1].raw_data = data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: raw(m, b"\0" * 143), "takes 144 bytes, and holds 143"),
        (lambda m: raw(m, b""), "takes 144 bytes, and holds 0"),
        (lambda m: m.graph.initializer[1].ClearField("raw_data"), "takes 36 entries of float_data, and holds 0"),
        (lambda m: m.graph.initializer[1].dims.append(-1), "has a negative size"),
        (lambda m: setattr(m.graph.initializer[1], "data_type", 99), "the unknown dtype 99"),
        (lambda m: setattr(m.graph.initializer[1], "data_type", TensorProto.DOUBLE), "takes 288 bytes"),
        (
            lambda m: setattr(m.graph.initializer[1], "name", "a.0.weight.T"),
            "two initializers are called 'a.0.weight.T'",
        ),
        (lambda m: m.graph.initializer[1].external_data.add(key="location", value="x"), "outside the file and inside"),
        (
            lambda m: m.graph.node[0].attribute.append(
                helper.make_attribute("t", TensorProto(name="inner", data_type=1, dims=[3], raw_data=b"1"))
            ),
            "tensor 'inner' declares .* takes 12 bytes, and holds 1",
        ),
        (lambda m: m.graph.Clear(), "holds no graph"),
    ],
)
def test_tensors_inside_that_do_not_hold_what_they_declare(
    tmp_path: Path, change: Callable[[ModelProto], None], message: str
) -> None:
    model = chain(LAYERS)
    change(model)
    (tmp_path / "base.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(lorafx.ExportError, match=message):
        lorafx.merge_onnx(tmp_path / "base.onnx", tmp_path, tmp_path / "merged.onnx")
    assert not (tmp_path / "merged.onnx").exists()


def test_what_is_no_onnx_file(tmp_path: Path) -> None:
    for name, content in (("text", b"no model"), ("empty", b""), ("cut", chain(LAYERS).SerializeToString()[:-9])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(lorafx.ExportError, match=f"{name} is no ONNX file"):
            read_onnx(tmp_path / name)
    with pytest.raises(lorafx.ExportError, match="there is no file"):
        read_onnx(tmp_path / "none")
    with pytest.raises(lorafx.ExportError, match="cannot read"):
        read_onnx(tmp_path)


def test_a_link_within_the_folder_is_followed(tmp_path: Path) -> None:
    base = save(chain(LAYERS), tmp_path / "base.onnx", outside=True)
    expected = weights(base)
    (tmp_path / "base.onnx.data").rename(tmp_path / "blob")
    (tmp_path / "base.onnx.data").symlink_to("blob")
    file = read_onnx(base)
    assert all(torch.equal(file.sources[n].tensor(), t) for n, t in expected.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("outside", [False, True])
def test_tensors_are_read_as_they_are(tmp_path: Path, dtype: torch.dtype, outside: bool) -> None:
    given = {
        "odd": torch.zeros(1, dtype=dtype),
        "w": torch.randn(3, 5).to(dtype),
        "none": torch.zeros(0, 4, dtype=dtype),
    }
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="n")
    file = read_onnx(save(make_model([node], given, 3), tmp_path / "m.onnx", outside))
    for name, tensor in given.items():
        assert torch.equal(file.sources[name].tensor(), tensor)
        value = file.model.graph.initializers[name].const_value
        assert value is not None
        assert value.tobytes() == stored(name, tensor).raw_data


def test_small_tensors_outside_the_main_graph_come_along(tmp_path: Path) -> None:
    """Branches' weights and attributes may lie outside too; the merged file has other data."""
    model = chain(LAYERS)
    inner = TensorProto(name="inner", data_type=1, dims=[2], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "inner.data"), ("length", "8")):
        inner.external_data.add(key=key, value=value)
    (tmp_path / "inner.data").write_bytes(np.array([1, 2], np.float32).tobytes())
    model.graph.node.append(helper.make_node("Constant", [], ["c"], name="c", value=inner))
    (tmp_path / "base.onnx").write_bytes(model.SerializeToString())
    adapter = save_adapter(tmp_path / "adapter", lora(LAYERS))
    lorafx.merge_onnx(tmp_path / "base.onnx", adapter, tmp_path / "merged.onnx")
    (tmp_path / "inner.data").unlink()
    constant = onnx.load(tmp_path / "merged.onnx").graph.node[-1].attribute[0].t
    assert onnx.numpy_helper.to_array(constant).tolist() == [1, 2]
