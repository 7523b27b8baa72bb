"""The weights of a translated model: which initializers are made from them, and filling in their values.

A node that only reads weights and constants is computed once, when the file is written, instead of by
every session that loads it. Until then it is an expression, so that no value is looked at or held:

    t = Transpose(<q.weight>)                    y = MatMul(x, <q.weight.T>)
    y = MatMul(x, t)                      ->     # q.weight.T = Transpose(q.weight), when it is written

A transposed matrix is named ``<weight>.T``, any other expression ``<weight>.<operator>``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from lorafx.bases.ops import describe, packed_rows
from lorafx.bases.tensor import QuantizedTensor, as_dense
from lorafx.bases.view import ReadAsDense
from lorafx.errors import ExportError, NotFiniteError
from lorafx.kernels.rounding import all_finite, round_once
from lorafx.passes.fold import Fold, one_thread

#: Above this many elements, an operator other than Transpose is left to the runtime, and so is a
#: Transpose of a weight that something else needs too: the limits of torch's own ONNX optimizer.
INPUT_LIMIT = 8192
OUTPUT_LIMIT = 512 * 512

#: About how many bytes of a tensor are handled at once.
PIECE = 2**23

_NEVER = frozenset({"ConstantOfShape", "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})


@dataclass(frozen=True)
class Folded:
    """An initializer as an expression: one ONNX operator over weights, constants or other expressions."""

    value: ir.Value
    function: onnx.FunctionProto
    inputs: tuple[ir.Value, ...]

    @property
    def order(self) -> tuple[int, ...] | None:
        """The order in which it has the dimensions of its one input, if it is a transposition."""
        (node,) = self.function.node
        if node.op_type != "Transpose":
            return None
        given = next((tuple(a.ints) for a in node.attribute if a.name == "perm"), None)
        return tuple(reversed(range(len(self.value.shape or ())))) if given is None else given

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


class Stored:
    """A tensor as it is, or rounded to another dtype, in pieces; as :class:`~lorafx.passes.fold.Fold` has them.

    ``parameter`` is the name of the parameter that it is, of which every number must be one that the dtype has; None:
    it is none (a mask in a buffer may be -Inf).
    """

    def __init__(self, tensor: Tensor, dtype: torch.dtype, parameter: str | None = None) -> None:
        self.tensor = tensor.detach()
        self.dtype = dtype
        self.parameter = parameter

    def panels(self, order: Sequence[int] | None = None) -> Iterator[Tensor]:
        """The tensor with its dimensions in this order, in contiguous pieces in the order in which memory holds it.

        Raises:
            NotFiniteError: the parameter holds NaN or Inf.
            ExportError: a number of it is beyond the dtype's.
        """
        tensor = self.tensor
        if isinstance(tensor, QuantizedTensor) and _order_of_rows(tensor) == (order or tuple(range(tensor.dim()))):
            yield from self._packed_rows(tensor)
            return
        tensor = as_dense(tensor)
        if order is None and tensor.is_contiguous():
            flat, step = tensor.reshape(-1), max(1, PIECE // tensor.itemsize)
            for start in range(0, flat.numel(), step):
                yield self._round(flat[start : start + step])
            return
        order = tuple(range(tensor.dim()) if order is None else order)
        rows = tensor.shape[order[0]]
        step = max(1, PIECE // max(1, tensor.nbytes // max(1, rows)))
        for start in range(0, rows, step):
            with one_thread():
                piece = tensor.narrow(order[0], start, min(step, rows - start)).contiguous()
                piece = self._round(piece).permute(order).contiguous()  # of a contiguous piece a fifth of the time
            yield piece

    def _packed_rows(self, weight: QuantizedTensor) -> Iterator[Tensor]:
        height, step = weight.packed.height, max(1, PIECE // (weight.packed.width * weight.itemsize))
        for start in range(0, height, step):
            piece: Tensor = packed_rows(*describe(weight.packed), start, min(start + step, height))
            yield self._round(piece.to(weight.dtype))

    def _round(self, piece: Tensor) -> Tensor:
        if isinstance(piece, ReadAsDense):
            piece = piece.dequantize()
        if not piece.is_floating_point():
            return piece.to(self.dtype)
        rounded = round_once(piece, self.dtype)
        if self.parameter is not None and not all_finite(rounded):
            if not all_finite(piece):
                raise NotFiniteError(self.parameter)
            raise ExportError(
                f"weight '{self.parameter}' does not fit in {self.dtype}: it has numbers beyond "
                f"{torch.finfo(self.dtype).max:.3g}. Export with another dtype, as bf16 or fp32"
            )
        return rounded


def _order_of_rows(weight: QuantizedTensor) -> tuple[int, ...]:
    """The order of its dimensions in which a packed weight is read a row at a time."""
    *stack, height, width = range(weight.dim())
    return (*stack, width, height) if weight.turned else (*stack, height, width)


class Streamed(ir.LazyTensor):
    """A tensor of an ONNX model that is made in pieces whenever it is asked for, and never held whole to be written.

    ``order`` is that of the source's dimensions (None: as they are).
    """

    __slots__ = ("order", "source")

    def __init__(self, source: Stored | Fold, value: ir.Value, order: tuple[int, ...] | None = None) -> None:
        assert value.dtype is not None
        super().__init__(self._whole, value.dtype, value.shape or ir.Shape([]), name=value.name)
        self.source, self.order = source, order

    def pieces(self) -> Iterator[memoryview]:
        """The bytes, as a file holds them, some megabytes at a time."""
        for panel in self.source.panels(self.order):
            yield panel.cpu().reshape(-1).view(torch.uint8).numpy().data

    def tobytes(self) -> bytes:
        """The bytes, all at once."""
        return b"".join(self.pieces())

    def _whole(self) -> ir.TensorProtocol:
        array = np.frombuffer(self.tobytes(), self.dtype.numpy()).reshape(self.shape.numpy())
        return ir.tensor(array, dtype=self.dtype, name=self.name)


def pieces_of(tensor: ir.TensorProtocol) -> Iterator[memoryview]:
    """The bytes of any tensor of a model, in pieces where it has them."""
    if isinstance(tensor, Streamed):
        yield from tensor.pieces()
    else:
        yield memoryview(tensor.tobytes())


def fill(weights: Mapping[str, ir.Value], folded: Iterable[Folded], source: Callable[[str], Tensor | Fold]) -> None:
    """Give every weight a value that is made when it is needed, from ``source(name)``, in the dtype that it has there.

    Expressions follow. Nothing is read here. Making a value raises what :class:`Stored` and
    :class:`~lorafx.passes.fold.Fold` do where it is a parameter's and not finite.
    """
    for name, value in weights.items():
        assert value.dtype is not None
        found, dtype = source(name), ir.tensor_adapters.to_torch_dtype(value.dtype)
        if isinstance(found, Tensor):
            made: Stored | Fold = Stored(found, dtype, name if isinstance(found, nn.Parameter) else None)
        else:
            made = dataclasses.replace(found, dtype=dtype)
        value.const_value = Streamed(made, value)
    for expression in folded:
        value, order = expression.value, expression.order
        assert value.dtype is not None
        given = expression.inputs[0].const_value
        if order is not None and isinstance(given, Streamed) and given.order is None:
            value.const_value = Streamed(given.source, value, order)
        else:
            value.const_value = ir.LazyTensor(
                expression.compute, dtype=value.dtype, shape=value.shape or ir.Shape([]), name=value.name
            )


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
