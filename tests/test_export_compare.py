"""What an export is held to: the inputs that are drawn for it, the difference of numbers, the difference of graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper

from lorafx.errors import ExportError, ParityError
from lorafx.export.compare import compare
from lorafx.export.diff import diff_onnx
from lorafx.export.parity import TOLERANCES, Tolerance, difference, make_cases, random_like

FLOAT32 = TOLERANCES[torch.float32]


# Random inputs, and differences.


def test_random_inputs_keep_the_examples_character() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    drawn = random_like("attention_mask", mask, [50, 9], generator)
    assert drawn.dtype == torch.int64
    assert drawn.diff(dim=1).max() <= 0
    assert sorted(set(drawn.sum(1).tolist())) == [7, 8, 9]
    assert random_like("attention_mask", mask.bool(), [50, 1], generator).all()
    ids = random_like("input_ids", torch.tensor([[3, 17]]), [40, 5], generator)
    assert (int(ids.min()), int(ids.max())) == (3, 17)
    labels = random_like("labels", torch.tensor([-100, 4]), [40], generator)
    assert set(labels.tolist()) == {-100, 4}
    pixels = random_like("pixels", 5 + 0.1 * torch.randn(2, 3, 8), [4, 3, 8], generator)
    assert 4.5 < float(pixels.min()) < float(pixels.max()) < 5.5
    assert random_like("pixels", torch.zeros(2, 3), [4, 3], generator).std() > 0.5


def test_cases_stay_within_the_ranges() -> None:
    example = {"x": torch.zeros(2, 6), "y": torch.zeros(2, 4)}
    dims = {"x": {0: "batch", 1: "sequence"}, "y": {0: "batch"}}
    cases = make_cases(example, dims, {"batch": (1, None), "sequence": (3, 9)})
    assert [tuple(c.sizes.values()) for c in cases] == [(2, 6), (1, 3), (5, 9), (1, 9)]
    assert [tuple(c.inputs["x"].shape) for c in cases] == [tuple(c.sizes.values()) for c in cases]
    assert all(c.inputs["y"].shape == (c.sizes["batch"], 4) for c in cases)
    assert len(make_cases(example, {}, {})) == 2


@pytest.mark.parametrize(
    ("expected", "found", "passed"),
    [
        ([1.0, float("nan"), float("inf")], [1.0, float("nan"), float("inf")], True),
        ([1.0, 2.0], [1.0, float("nan")], False),
        ([float("inf")], [-float("inf")], False),
        ([100.0, 0.0], [100.0, 9e-3], True),
        ([100.0, 0.0], [100.0, 2e-2], False),
        ([], [], True),
    ],
)
def test_difference(expected: list[float], found: list[float], passed: bool) -> None:
    assert difference("y", np.array(expected, np.float32), np.array(found, np.float32), FLOAT32).passed is passed


@pytest.mark.parametrize("options", [{"atol": -1.0}, {"rtol": "1e-3"}, {"atol": float("nan")}, {"rtol": True}])
def test_what_is_no_tolerance_is_refused(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ExportError, match=rf"{name}=.* is no tolerance: give a number from 0 on, as {name}=1e-3"):
        Tolerance(**{"atol": 1e-6, "rtol": 1e-4, **options})


def test_difference_of_integers_and_shapes() -> None:
    assert not difference("y", np.array([3]), np.array([4]), FLOAT32).passed
    with pytest.raises(ParityError, match=r"output 'y' is \[1, 2\], and that of the reference \[2\]"):
        difference("y", np.zeros(2), np.zeros((1, 2)), FLOAT32)


# Comparing graphs.


def small(
    op: str = "Relu", weight: str = "w", value: float = 1.0, shape: tuple[int, ...] = (3,), axis: int = 0
) -> ir.Model:
    nodes = [
        helper.make_node("Mul", ["x", weight], ["product"], name="first"),
        helper.make_node(op, ["product"], ["positive"], name="second"),
        helper.make_node("Concat", ["positive", "x", "one"], ["y"], name="third", axis=axis),
    ]
    initializers = [
        helper.make_tensor(weight, TensorProto.FLOAT, shape, [value] * int(np.prod(shape))),
        helper.make_tensor("one", TensorProto.FLOAT, [1], [value]),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n"]) for n in ("x", "y"))
    graph = helper.make_graph(nodes, "g", [x], [y], initializers)
    return ir.from_proto(helper.make_model(graph))


def test_compare_tells_the_first_difference() -> None:
    assert compare(small(), small()) is None
    assert str(compare(small(), small(op="Tanh"))) == (
        "node 1 (Relu 'second'): op_type is 'Relu' in the one and 'Tanh' in the other"
    )
    other = compare(small(), small(axis=1))
    assert other is not None
    assert (other.where, other.what, other.left, other.right) == (
        "node 2 (Concat 'third')",
        "attribute axis",
        "0",
        "1",
    )
    assert "shape is '[3]' in the one and '[1]'" in str(compare(small(), small(shape=(1,))))
    assert "initializer 'one': value is [1.0] in the one and [2.0]" in str(compare(small(), small(value=2.0)))


def test_compare_looks_at_edges_and_counts() -> None:
    left, right = small(), small()
    second = right.graph.node("second")
    second.replace_input_with(0, right.graph.inputs[0])
    assert str(compare(left, right, names=False)) == (
        "node 1 (Relu 'second'): input 0 is 'product' in the one and 'x' in the other"
    )
    longer = small()
    longer.graph.append(ir.node("Identity", [longer.graph.inputs[0]], name="extra"))
    assert str(compare(left, longer)) == "node 3: node is missing in the one and Identity 'extra' in the other"


def test_compare_without_names_renumbers() -> None:
    renamed = small(weight="v")
    for value in (renamed.graph.node("first").outputs[0], renamed.graph.inputs[0]):
        value.name = f"other_{value.name}"
    assert compare(small(), renamed, names=False) is None
    assert "the list of initializers is 'w' in the one and 'v'" in str(compare(small(), renamed))


def test_files_of_different_graphs(tmp_path: Path) -> None:
    for name, model in (("one", small()), ("other", small(op="Tanh"))):
        ir.save(model, tmp_path / f"{name}.onnx")
    assert not diff_onnx(tmp_path / "one.onnx", tmp_path / "other.onnx").same_structure
