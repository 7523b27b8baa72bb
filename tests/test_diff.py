"""What differs between two ONNX files: nothing, nodes, tensors and by how much."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

import lorafx
from onnx_files import chain, delta, lora, make_model, save, save_adapter, weights

LAYERS = ("a.0", "a.1", "a.2")


def test_nothing_differs_wherever_weights_are_kept(tmp_path: Path) -> None:
    model = chain(LAYERS)
    first = save(model, tmp_path / "first.onnx")
    model.graph.node[0].doc_string = "another"
    model.metadata_props.add(key="k", value="v")
    second = save(model, tmp_path / "second.onnx", outside=True)
    found = lorafx.diff_onnx(first, second, random=True)
    assert found.same
    assert "graph    the same, names included\nweights  the same, to the bit" in str(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [40, 600])  # exact, and by subspace iteration
def test_a_merge_is_seen_as_its_norm_and_rank(tmp_path: Path, dtype: torch.dtype, width: int) -> None:
    base = save(chain(LAYERS, width, dtype), tmp_path / "base.onnx")
    tensors = lora(LAYERS[:2], width, width, r=3)
    adapter = save_adapter(tmp_path / "adapter", tensors, r=3, alpha=6)
    lorafx.merge_onnx(base, adapter, tmp_path / "merged.onnx")
    found = lorafx.diff_onnx(base, tmp_path / "merged.onnx")
    assert found.graph is None
    assert not found.same
    assert [t.name for t in found.tensors] == ["a.0.weight.T", "a.1.weight.T"]
    for tensor, path in zip(found.tensors, LAYERS, strict=False):
        change = delta(tensors, path)
        assert tensor.rank == 3
        assert tensor.norm == pytest.approx(float(change.norm()), rel=1e-3)
        assert tensor.relative == pytest.approx(tensor.norm / float(weights(base)[tensor.name].double().norm()))
        assert tensor.largest == pytest.approx(float(change.abs().max()), rel=1e-2)
        assert tensor.changed > 0.9 * width * width
    assert "rank 3" in str(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rank_is_the_same_in_both_directions(tmp_path: Path, dtype: torch.dtype) -> None:
    """Also where the adapter is much larger than the weight, whose rounding is then finer than the merged one's."""
    base = save(chain(LAYERS, 40, dtype), tmp_path / "base.onnx")
    tensors = {name: 30 * t for name, t in lora(LAYERS[:1], 40, 40, r=3).items()}
    adapter = save_adapter(tmp_path / "adapter", tensors, r=3, alpha=6)
    lorafx.merge_onnx(base, adapter, tmp_path / "merged.onnx")
    for one, other in ((base, tmp_path / "merged.onnx"), (tmp_path / "merged.onnx", base)):
        assert [t.rank for t in lorafx.diff_onnx(one, other).tensors] == [3]


def test_rounding_alone_has_no_rank_and_noise_has_all(tmp_path: Path) -> None:
    weight = torch.randn(30, 50)
    near = weight.bfloat16()
    moved = near.clone()
    moved.view(torch.int16)[3, 4] ^= 1
    for name, tensor in (("a", near), ("b", moved), ("c", torch.randn(30, 50).bfloat16())):
        node = helper.make_node("MatMul", ["x", "w"], ["y"], name="n")
        save(make_model([node], {"w": tensor}, 30), tmp_path / f"{name}.onnx")
    (one,) = lorafx.diff_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx").tensors
    assert (one.changed, one.rank) == (1, 0)
    (all_,) = lorafx.diff_onnx(tmp_path / "a.onnx", tmp_path / "c.onnx").tensors
    assert all_.rank == 30


def test_nodes_and_tensors_that_only_one_has(tmp_path: Path) -> None:
    first = chain(LAYERS)
    second = onnx.ModelProto()
    second.CopyFrom(first)
    second.graph.node[1].op_type = "Gemm"
    second.graph.node[1].attribute.append(helper.make_attribute("alpha", 2.0))
    second.graph.node.append(helper.make_node("Relu", ["y2"], ["z"], name="more"))
    second.graph.initializer[2].name = "other"
    second.graph.node[2].input[1] = "other"
    second.graph.initializer[0].CopyFrom(helper.make_tensor("a.0.weight.T", 1, [6, 5], [0.0] * 30))
    paths = [save(model, tmp_path / f"{i}.onnx") for i, model in enumerate((first, second))]
    found = lorafx.diff_onnx(*paths)
    assert not found.same_structure
    assert found.nodes == (
        "Gemm 'n1'".replace("Gemm", "MatMul") + ": op_type MatMul -> Gemm, attribute alpha",
        "MatMul 'n2': input [y1, a.2.weight.T] -> [y1, other]",
        "only in the second: Relu 'more'",
    )
    assert [(t.name, t.what) for t in found.tensors] == [
        ("a.0.weight.T", "(6, 5) float in the second"),
        ("a.2.weight.T", "only in the first"),
        ("other", "only in the second"),
    ]
    assert "graph    different" in str(found)
    assert "MatMul 'n2': input" in str(found)


def test_the_order_of_initializers_is_called_what_it_is(tmp_path: Path) -> None:
    model = chain(LAYERS)
    first = save(model, tmp_path / "first.onnx")
    model.graph.initializer.reverse()
    found = lorafx.diff_onnx(first, save(model, tmp_path / "second.onnx"))
    assert (found.aside, found.same_structure, found.same) == ("the order of initializers", True, False)
    assert "the same but for the order of initializers" in str(found)
    model.graph.node[0].name = "another"
    assert lorafx.diff_onnx(first, save(model, tmp_path / "second.onnx")).aside == "names"


def test_what_a_file_declares_is_no_name(tmp_path: Path) -> None:
    model = chain(LAYERS)
    first = save(model, tmp_path / "first.onnx")
    model.ir_version = 9
    found = lorafx.diff_onnx(first, save(model, tmp_path / "second.onnx"))
    assert "graph    the same but for what it declares of values or versions (their ir_version)" in str(found)


CACHES = {  # as written here, by optimum and by onnxruntime-genai
    "past_sequence": ("batch", "sequence", "total_sequence"),
    "past_sequence_length": ("batch_size", "sequence_length", "past_sequence_length + sequence_length"),
    "past_sequence_length ": ("batch_size", "sequence_length", "total_sequence_length"),
}


@pytest.mark.parametrize("past", CACHES)
def test_random_sizes_of_a_cache_go_together(tmp_path: Path, past: str) -> None:
    """The mask has all tokens, those of the past and the new ones; the batch is the same wherever it stands."""
    batch, new, total = CACHES[past]
    shapes = {
        "input_ids": (batch, new), "attention_mask": (batch, total), "past": (batch, past.strip()),
        "index": (3, batch, new),
    }  # fmt: skip
    nodes = [
        helper.make_node("Concat", ["past", "input_ids"], ["all"], axis=1),
        helper.make_node("Add", ["all", "attention_mask"], ["y"]),
        helper.make_node("Add", ["index", "input_ids"], ["z"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, onnx.TensorProto.INT64, shape) for name, shape in shapes.items()],
        [helper.make_tensor_value_info(name, onnx.TensorProto.INT64, None) for name in ("y", "z")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    file = save(model, tmp_path / "a_name_that_is_longer_than_forty_characters.onnx")
    found = lorafx.diff_onnx(file, file, random=True)
    assert found.same
    assert len(found.parity) == 2
    header, first, *_ = str(found).splitlines()[5:]
    assert header.index("the second file") == first.rindex(str(file))
    assert "torch" not in header


def test_files_that_take_or_give_something_else_are_not_run(tmp_path: Path) -> None:
    model = chain(LAYERS)
    first = save(model, tmp_path / "first.onnx")
    more = onnx.ModelProto()
    more.CopyFrom(model)
    more.graph.output.append(helper.make_tensor_value_info("y0", onnx.TensorProto.FLOAT, None))
    model.graph.input[0].name = model.graph.node[0].input[0] = "z"
    for other, message in ((model, "inputs of the first are x, and of the second z"), (more, "outputs .* y2, y0")):
        second = save(other, tmp_path / "second.onnx")
        assert not lorafx.diff_onnx(first, second).same
        with pytest.raises(lorafx.ExportError, match=f"cannot be run side by side: the {message}"):
            lorafx.diff_onnx(first, second, random=True)


def test_names_alone(tmp_path: Path) -> None:
    model = chain(LAYERS)
    first = save(model, tmp_path / "first.onnx")
    model.graph.node[0].name = "another"
    found = lorafx.diff_onnx(first, save(model, tmp_path / "second.onnx"))
    assert found.same_structure
    assert not found.same
    assert "the same but for names" in str(found)


def test_numbers_are_compared_on_inputs(tmp_path: Path) -> None:
    first, second = (save(chain(LAYERS, seed=s), tmp_path / f"{s}.onnx") for s in (0, 1))
    np.savez(tmp_path / "inputs.npz", x=np.ones((3, 6), dtype=np.float32))
    assert lorafx.diff_onnx(first, first, tmp_path / "inputs.npz").same
    found = lorafx.diff_onnx(first, second, tmp_path / "inputs.npz")
    assert not found.same_numbers
    assert "EXCEEDED" in str(found)
    with pytest.raises(lorafx.ExportError, match="the inputs lack x; there are y"):
        lorafx.diff_onnx(first, second, {"y": torch.zeros(1, 2)})
    (tmp_path / "text.npz").write_text("no arrays")
    with pytest.raises(lorafx.ExportError, match=r"it should be a file of numpy\.savez"):
        lorafx.diff_onnx(first, second, tmp_path / "text.npz")
