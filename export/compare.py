"""Whether two ONNX models are the same graph, and if not, where they first differ.

Both are walked side by side and their values paired in the order they are defined, so that names need
not agree for edges to be compared. With ``names=True`` they must agree as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir


@dataclass(frozen=True)
class Difference:
    """The first place where two models differ: ``where``, in what (``what``), and what each has there."""

    where: str
    what: str
    left: str
    right: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what} is {self.left} in the one and {self.right} in the other"


def is_constant(value: ir.Value) -> bool:
    """Whether an initializer is sure to be no weight: an integer, a truth value or a single number."""
    floating = value.dtype is not None and value.dtype.is_floating_point()
    return not floating or all(size == 1 for size in value.shape or ())


def compare(
    left: ir.Model,
    right: ir.Model,
    *,
    names: bool = True,
    by_value: Callable[[ir.Value], bool] = is_constant,
) -> Difference | None:
    """The first difference between two models, or None.

    Compared are the operator sets, inputs and outputs, the sequence of nodes with their operators,
    attributes and edges, and the types and shapes of inputs, outputs and initializers.

    Args:
        left, right: the models.
        names: compare also the names of nodes and values, the order of initializers, and the types and
            shapes of all values.
        by_value: the initializers (of ``left``) whose values must agree bit for bit. By default those
            that can't be weights.
    """
    return next(_Comparison(names, by_value).models(left, right), None)


@dataclass
class _Comparison:
    """One walk. ``pair`` maps each value of the left model to its counterpart."""

    names: bool
    by_value: Callable[[ir.Value], bool]
    pair: dict[ir.Value, ir.Value] = field(default_factory=dict)
    paired: set[ir.Value] = field(default_factory=set)

    def models(self, left: ir.Model, right: ir.Model) -> Iterator[Difference]:
        for what in ("opset_imports", "functions"):
            a, b = (
                sorted(getattr(m, what).items()) if what == "opset_imports" else sorted(m.functions)
                for m in (left, right)
            )
            yield from _unequal("the model", what, a, b)
        if self.names:
            a, b = (list(m.graph.initializers) for m in (left, right))
            yield from _unequal("the model", "the list of initializers", *_first_unequal(a, b))
        yield from self.graphs(left.graph, right.graph, "")

    def graphs(self, left: ir.Graph, right: ir.Graph, inside: str) -> Iterator[Difference]:
        for kind in ("inputs", "outputs"):
            a, b = getattr(left, kind), getattr(right, kind)
            yield from _unequal(f"{inside}the graph", f"the number of {kind}", len(a), len(b))
            if kind == "inputs":
                for x, y in zip(a, b, strict=True):
                    yield from self.define(x, y, f"{inside}input '{x.name}'", typed=True)
        for index, (m, n) in enumerate(itertools.zip_longest(left, right)):
            yield from self.nodes(m, n, f"{inside}node {index}")
        for index, (x, y) in enumerate(zip(left.outputs, right.outputs, strict=True)):
            where = f"{inside}output {index} '{x.name}'"
            yield from self.use(x, y, where, "value")
            yield from self.types(x, y, where)

    def nodes(self, left: ir.Node | None, right: ir.Node | None, where: str) -> Iterator[Difference]:
        if left is None or right is None:
            yield Difference(where, "node", _show(left), _show(right))
            return
        where = f"{where} ({_show(left)})"
        for what in ("domain", "op_type", "overload"):
            yield from _unequal(where, what, getattr(left, what), getattr(right, what))
        if self.names:
            yield from _unequal(where, "name", left.name, right.name)
        yield from _unequal(where, "the number of inputs", len(left.inputs), len(right.inputs))
        for index, (x, y) in enumerate(zip(left.inputs, right.inputs, strict=True)):
            yield from self.use(x, y, where, f"input {index}")
        yield from _unequal(where, "the set of attributes", sorted(left.attributes), sorted(right.attributes))
        for name, attribute in left.attributes.items():
            yield from self.attributes(attribute, right.attributes[name], where, name)
        yield from _unequal(where, "the number of outputs", len(left.outputs), len(right.outputs))
        for index, (x, y) in enumerate(zip(left.outputs, right.outputs, strict=True)):
            yield from self.define(x, y, f"{where}, output {index}", typed=self.names)

    def define(self, left: ir.Value, right: ir.Value, where: str, *, typed: bool) -> Iterator[Difference]:
        if self.names:
            yield from _unequal(where, "name", left.name, right.name)
        if typed:
            yield from self.types(left, right, where)
        self.pair[left] = right
        self.paired.add(right)

    def use(self, left: ir.Value | None, right: ir.Value | None, where: str, what: str) -> Iterator[Difference]:
        if left is None or right is None:
            yield from _unequal(where, what, left and left.name, right and right.name)
            return
        if left not in self.pair and left.is_initializer() and right.is_initializer() and right not in self.paired:
            yield from self.initializers(left, right, where, what)
            yield from self.define(left, right, f"{where}, {what}", typed=False)
        if self.pair.get(left) is not right:
            yield Difference(where, what, f"'{left.name}'", f"'{right.name}'")

    def initializers(self, left: ir.Value, right: ir.Value, where: str, what: str) -> Iterator[Difference]:
        at = f"{where}, {what}: initializer '{left.name}'"
        yield from self.types(left, right, at)
        a, b = left.const_value, right.const_value
        if a is not None and b is not None and self.by_value(left) and a.tobytes() != b.tobytes():
            yield Difference(at, "value", _show_array(a.numpy()), _show_array(b.numpy()))

    def types(self, left: ir.Value, right: ir.Value, where: str) -> Iterator[Difference]:
        yield from _unequal(where, "type", str(left.type), str(right.type))
        yield from _unequal(where, "shape", str(left.shape), str(right.shape))

    def attributes(self, left: ir.Attr, right: ir.Attr, where: str, name: str) -> Iterator[Difference]:
        what = f"attribute {name}"
        yield from _unequal(where, f"the type of {what}", left.type, right.type)
        if left.type == ir.AttributeType.GRAPH:
            yield from self.graphs(left.as_graph(), right.as_graph(), f"{where}, {name}: ")
        elif left.type == ir.AttributeType.TENSOR:
            a, b = left.as_tensor(), right.as_tensor()
            yield from _unequal(where, f"the type of {what}", (a.dtype, str(a.shape)), (b.dtype, str(b.shape)))
            if a.tobytes() != b.tobytes():
                yield Difference(where, what, _show_array(a.numpy()), _show_array(b.numpy()))
        else:
            yield from _unequal(where, what, _stored(left), _stored(right))


def _stored(attribute: ir.Attr) -> Any:
    """An attribute's value as a file keeps it: numbers in float32."""
    if attribute.type in (ir.AttributeType.FLOAT, ir.AttributeType.FLOATS):
        return np.float32(attribute.value).tolist()
    return attribute.value


def _unequal(where: str, what: str, left: Any, right: Any) -> Iterator[Difference]:
    if left != right:
        yield Difference(where, what, repr(left), repr(right))


def _first_unequal(left: list[str], right: list[str]) -> tuple[Any, Any]:
    """The first entries that differ, so that long lists show only those."""
    return next(((a, b) for a, b in itertools.zip_longest(left, right) if a != b), (None, None))


def _show(node: ir.Node | None) -> str:
    return "missing" if node is None else f"{node.op_type} '{node.name}'"


def _show_array(array: npt.NDArray[Any]) -> str:
    values = ", ".join(str(value) for value in array.reshape(-1)[:6])
    return f"[{values}{', ...' if array.size > 6 else ''}]"
