"""The weights of a translated model: which initializers are made from them, and filling in their values.

A node that only reads weights and constants is computed once, when the file is written, instead of by
every session that loads it. Until then it is an expression, so that no value is looked at or held:

    t = Transpose(<q.weight>)                    y = MatMul(x, <q.weight.T>)
    y = MatMul(x, t)                      ->     # q.weight.T = Transpose(q.weight), when it is written

A transposed matrix is named ``<weight>.T``, any other expression ``<weight>.<operator>``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from torch import Tensor

#: Above this many elements, an operator other than Transpose is left to the runtime, and so is a
#: Transpose of a weight that something else needs too: the limits of torch's own ONNX optimizer.
INPUT_LIMIT = 8192
OUTPUT_LIMIT = 512 * 512

_NEVER = frozenset({"ConstantOfShape", "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})


@dataclass(frozen=True)
class Folded:
    """An initializer as an expression: one ONNX operator over weights, constants or other expressions."""

    value: ir.Value
    function: onnx.FunctionProto
    inputs: tuple[ir.Value, ...]

    def compute(self) -> ir.TensorProtocol:
        """The value, from the values that the inputs hold now."""
        given = {}
        for name, value in zip(self.function.input, self.inputs, strict=True):
            assert value.const_value is not None
            given[name] = value.const_value.numpy()
        (found,) = ReferenceEvaluator(self.function).run(None, given, attributes={})
        return ir.tensor(found, dtype=self.value.dtype)


def fold_weights(model: ir.Model, weights: Collection[ir.Value]) -> tuple[Folded, ...]:
    """Replace what only depends on weights by initializers, in place; returns how they come about, in order.

    ``weights`` are initializers without a value. Constants alone are the optimizer's business.
    """
    graph = model.graph
    version = graph.opset_imports[""]
    symbolic = set(weights)
    folded: list[Folded] = []
    for node in list(graph):
        operands = [v for v in node.inputs if v is not None]
        if not any(v in symbolic for v in operands) or not _foldable(node, symbolic):
            continue
        (result,) = node.outputs
        name = _name(node, next(v for v in operands if v in symbolic), graph.initializers)
        proto = ir.serde.serialize_node(node)
        names = list(dict.fromkeys(n for n in proto.input if n))
        function = onnx.helper.make_function(
            "lorafx", "folded", names, list(proto.output), [proto], [onnx.helper.make_opsetid("", version)]
        )
        by_name = {v.name: v for v in operands}
        value = ir.Value(name=name, shape=result.shape, type=result.type)
        folded.append(Folded(value, function, tuple(by_name[n] for n in names)))
        graph.initializers.add(value)
        symbolic.add(value)
        result.replace_all_uses_with(value)
        graph.remove(node, safe=True)
    for name in [n for n, v in graph.initializers.items() if not v.uses() and not v.is_graph_output()]:
        del graph.initializers[name]
    return tuple(folded)


def fill(weights: Mapping[str, ir.Value], folded: Iterable[Folded], tensor: Callable[[str], Tensor]) -> None:
    """Give every weight a value that is fetched when it is needed: ``tensor(name)``, once a use.

    Expressions follow. Nothing is fetched here.
    """

    def fetch(name: str) -> ir.TensorProtocol:
        return ir.tensor_adapters.TorchTensor(tensor(name).detach().cpu().contiguous())

    for name, value in weights.items():
        _set_lazily(value, partial(fetch, name))
    for expression in folded:
        _set_lazily(expression.value, expression.compute)


def _set_lazily(value: ir.Value, function: Callable[[], ir.TensorProtocol]) -> None:
    assert value.dtype is not None
    assert value.shape is not None
    value.const_value = ir.LazyTensor(function, dtype=value.dtype, shape=value.shape, name=value.name)


def _foldable(node: ir.Node, symbolic: set[ir.Value]) -> bool:
    operands = [v for v in node.inputs if v is not None]
    if node.domain or node.op_type in _NEVER or len(node.outputs) != 1 or node.outputs[0].is_graph_output():
        return False
    if not all(v in symbolic or v.const_value is not None for v in operands):
        return False
    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
        return False
    size = _elements(node.outputs[0])
    if size is None or node.outputs[0].dtype is None:
        return False
    large = [v for v in operands if (_elements(v) or 0) > INPUT_LIMIT]
    if node.op_type == "Transpose":
        return not large or len(large[0].uses()) == 1
    return not large and size <= OUTPUT_LIMIT


def _elements(value: ir.Value) -> int | None:
    if value.shape is None or any(not isinstance(size, int) for size in value.shape):
        return None
    return math.prod(int(size) for size in value.shape if isinstance(size, int))


def _name(node: ir.Node, weight: ir.Value, taken: Collection[str]) -> str:
    swapped = node.op_type == "Transpose" and len(node.outputs[0].shape or ()) == 2
    name = base = f"{weight.name}.{'T' if swapped else node.op_type}"
    count = 1
    while name in taken:
        name, count = f"{base}.{count}", count + 1
    return name
