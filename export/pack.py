"""Weights that stay packed in a file: products with them become operators of ONNX Runtime's for 4-bit weights.

    bnb4     y = MatMul(x, <q.weight.T>)      ->   y = MatMulBnb4(x, <q.weight>, <q.weight.absmax>)
             y = Gemm(x, <q.weight.T>, b)     ->   y = Add(MatMulBnb4(...), b)
    nbits    y = MatMul(x, <q.weight.T>)      ->   y = MatMulNBits(x, <q.weight>, <...scales>, <...zero_points>)

``bnb4`` is for nf4: ``q.weight`` has the base's codes as they are, ``q.weight.absmax`` its scales in float32. ``nbits``
is affine int4, which cannot hold nf4's values: what was quantized is quantized again, adapters included.

Both run in float32: ONNX Runtime's CPU provider has no bfloat16 for them, and in float16 the scales would be rounded as
well. In a half-precision graph there is a cast before and one after, so that a product is rounded once, and its weight
not at all (torch rounds nf4's values to the model's dtype). What CPU kernels take was tried (1.31): MatMulBnb4's blocks
may run over the ends of rows, and the last may be short, as in nf4; they have at most 256 values.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from lorafx.bases.nf4 import Nf4
from lorafx.bases.tensor import QuantizedTensor
from lorafx.checks import format_bytes
from lorafx.errors import ExportError
from lorafx.export.int4 import Int4Tensor, dequantize_int4, quantize_int4
from lorafx.export.weights import Folded, Stored, Streamed
from lorafx.graph import CapturedModule, get_path
from lorafx.passes.fold import Fold

#: How a file holds the weights that are quantized in the graph.
WeightFormat = Literal["dense", "bnb4", "nbits"]
WEIGHT_FORMATS = ("dense", "bnb4", "nbits")

Source = Callable[[str], Fold | Tensor]

DOMAIN = "com.microsoft"
#: Where a product has, in its ``meta``, the dense graph's operand and result: what is before and after its casts.
AROUND = "lorafx.around"
#: The largest block that ONNX Runtime's CPU kernel of MatMulBnb4 takes.
LARGEST_BLOCK = 256
#: How many int4 values share a scale and a zero point: 5.1 bits a value with both.
INT4_BLOCK = 32

_FLOAT, _UINT8 = ir.DataType.FLOAT, ir.DataType.UINT8


@dataclass(frozen=True)
class Layout:
    """A matrix ``[out, in]`` as an operator takes it; ``turned``: the graph has it transposed, and in ``dtype``."""

    operator: str
    out: int
    width: int
    block_size: int
    turned: bool
    dtype: torch.dtype

    def tensors(self) -> dict[str, tuple[ir.DataType, tuple[int, ...]]]:
        """The dtype and shape of each operand that stands for it, by what follows the weight's name."""
        if self.operator == "MatMulBnb4":
            count = self.out * self.width
            return {"": (_UINT8, ((count + 1) // 2,)), ".absmax": (_FLOAT, (-(-count // self.block_size),))}
        blocks = -(-self.width // self.block_size)
        return {
            "": (_UINT8, (self.out, blocks, self.block_size // 2)),
            ".scales": (_FLOAT, (self.out, blocks)),
            ".zero_points": (_UINT8, (self.out, (blocks + 1) // 2)),
        }

    def attributes(self) -> dict[str, int]:
        """The operator's."""
        kind = {"quant_type": 1} if self.operator == "MatMulBnb4" else {"bits": 4}
        return {"K": self.width, "N": self.out, "block_size": self.block_size, **kind}


@dataclass(frozen=True)
class Plan:
    """The weights that a file is to hold packed, by name; and of the quantized ones that are not, why."""

    layouts: Mapping[str, Layout] = field(default_factory=dict)
    dense: Mapping[str, str] = field(default_factory=dict)

    def without(self, names: Collection[str], why: str) -> Plan:
        """A plan that leaves these dense."""
        kept = {n: layout for n, layout in self.layouts.items() if n not in names}
        return Plan(kept, {**self.dense, **{n: why for n in self.layouts if n in names}})

    def only(self, names: Collection[str]) -> Plan:
        """A plan for no others than these."""
        return Plan({n: layout for n, layout in self.layouts.items() if n in names})


#: Everything dense.
DENSE = Plan()


def plan_packing(gm: CapturedModule, source: Source, weight_format: WeightFormat) -> Plan:
    """Which weights of a graph for inference can be packed: those that it holds quantized.

    Args:
        gm: the graph.
        source: what the file is to hold for a name of its state dict.
        weight_format: how.
    """
    layouts, dense = {}, {}
    for name in gm.state_dict() if weight_format != "dense" else ():
        held = get_path(gm, name)
        if isinstance(held, QuantizedTensor):
            found = _layout(held, source(name), weight_format)
            if isinstance(found, Layout):
                layouts[name] = found
            else:
                dense[name] = found
    return Plan(layouts, dense)


def read_as(plan: Plan, dtype: torch.dtype) -> torch.dtype:
    """The coarsest of the file's dtype and of those to which torch rounds nf4's values, which MatMulBnb4 does not."""
    rounded = {layout.dtype for layout in plan.layouts.values() if layout.operator == "MatMulBnb4"}
    return max(dtype, *rounded, key=lambda d: torch.finfo(d).eps) if rounded else dtype


def refuse_none(weight_format: WeightFormat, packed: Collection[str], dense: Mapping[str, str]) -> None:
    """Refuse to write a packed file in which nothing is packed.

    Raises:
        ExportError: that is so; says why for a weight that might have been.
    """
    if weight_format == "dense" or packed:
        return
    if dense:  # each reason has its remedy, where there is one
        raise ExportError(
            f"weight_format={weight_format!r}, and all would be dense ({'; '.join(dense_notes(dense))}): change that, "
            "or leave weight_format out"
        )
    wanted = "stored as nf4" if weight_format == "bnb4" else "quantized"
    raise ExportError(
        f"weight_format={weight_format!r}: the graph has no linear layer whose weight is {wanted}. Quantize the base "
        "(LoraSpec(base='nf4'), lorafx.quantize), or leave weight_format out"
    )


def _layout(held: QuantizedTensor, value: Fold | Tensor, weight_format: WeightFormat) -> Layout | str:
    """The layout of a weight, or why it has none."""
    if len(held.packed.shape) != 2:
        return "a stack of matrices has no operator for packed weights"
    if weight_format == "nbits":
        return Layout("MatMulNBits", held.packed.height, held.packed.width, INT4_BLOCK, held.turned, held.dtype)
    if held.packed.format != "nf4":
        return f"stored as {held.packed.format}, and MatMulBnb4 takes nf4"
    if isinstance(value, Fold):
        return "what is merged is dense; requantize=True stores it as nf4 again"
    if not isinstance(value, QuantizedTensor):
        return "what trained whole (modules_to_save) is dense, and an original's weight too without requantize=True"
    size = value.packed.block_size
    if size > LARGEST_BLOCK:
        return f"in blocks of {size} values, and ONNX Runtime's CPU provider takes at most {LARGEST_BLOCK}"
    return Layout("MatMulBnb4", value.packed.height, value.packed.width, size, value.turned, value.dtype)


# In the ONNX graph.


@dataclass(frozen=True)
class PackedWeight:
    """A weight of a translated model that is packed: the values of its operands, in the order of its layout."""

    layout: Layout
    values: tuple[ir.Value, ...]


def pack_weights(
    model: ir.Model, folded: Sequence[Folded], plan: Plan
) -> tuple[dict[str, PackedWeight], tuple[Folded, ...], dict[str, str]]:
    """Let products with planned weights read them packed, in place; before values are named.

    Returns:
        The packed weights by name, the expressions that are left, and why each other weight of the plan is dense.
    """
    graph = model.graph
    known = {str(v.name): v for v in (*(v for f in folded for v in f.inputs), *graph.initializers.values())}
    packed: dict[str, PackedWeight] = {}
    dense = dict(plan.dense)
    readers: dict[ir.Node, PackedWeight] = {}
    gone: set[ir.Value] = set()
    for name, layout in plan.layouts.items():
        if (weight := known.get(name)) is None:
            continue  # another name of a tensor, or one that nothing reads
        products = _products(weight, folded, layout.turned)
        if products is None or any(n.graph is not graph for n in products):
            dense[name] = "the graph does not only multiply by it"
            continue
        taken = {*known, *graph.initializers} - {name}
        made = [_unique(name + suffix, taken, *kind) for suffix, kind in layout.tensors().items()]
        packed[name] = PackedWeight(layout, tuple(made))
        readers |= dict.fromkeys(products, packed[name])
        gone |= {weight, *(f.value for f in folded if weight in f.inputs)}
    around: dict[ir.Value, ir.Value] = {}
    for node in [n for n in graph if n in readers]:
        _pack(graph, node, readers[node], around)
    for value in gone:
        for transpose in {use.node for use in value.uses()}:  # which the runtime would have had to do
            graph.remove(transpose, safe=True)
        graph.initializers.pop(str(value.name), None)
    for value in (v for weight in packed.values() for v in weight.values):
        graph.initializers.add(value)
    if packed:
        model.opset_imports[DOMAIN] = 1
    return packed, tuple(f for f in folded if f.value not in gone), dense


def _products(weight: ir.Value, folded: Iterable[Folded], turned: bool) -> list[ir.Node] | None:
    """The products ``x W^T`` of all that read a weight; None if there are others, or none."""
    found: list[ir.Node] = []
    values = [(weight, turned)]
    for expression in folded:
        if weight in expression.inputs:
            if expression.order != (1, 0):
                return None
            values.append((expression.value, not turned))
    while values:
        value, as_factor = values.pop()  # as_factor: it is [in, out], as a product's right side has it
        if value.is_graph_output() or value.is_graph_input():
            return None
        for node, index in value.uses():
            if node.op_type == "Transpose" and not node.domain and len(value.shape or ()) == 2:
                values.append((node.outputs[0], not as_factor))
                continue
            swapped = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
            if not _is_product(node) or index != 1 or as_factor == swapped:
                return None
            found.append(node)
    return list(dict.fromkeys(found)) or None


def _is_product(node: ir.Node) -> bool:
    if node.domain or node.op_type not in ("MatMul", "Gemm"):
        return False
    plain = all(node.attributes.get_float(name, 1.0) == 1.0 for name in ("alpha", "beta"))
    return plain and node.attributes.get_int("transA", 0) == 0 and node.inputs[0] is not node.inputs[1]


def _pack(graph: ir.Graph, old: ir.Node, weight: PackedWeight, wide: dict[ir.Value, ir.Value]) -> None:
    """Put the operator, with its casts and the bias, in the place of a product.

    ``wide`` are values in float32, which several products may share, in the order of the graph.
    """
    (result,) = old.outputs
    x = old.inputs[0]
    assert x is not None
    half = result.dtype is not _FLOAT
    dtype = result.dtype

    def add(op: str, inputs: Sequence[ir.Value], domain: str = "", **attributes: int) -> ir.Node:
        given = [ir.AttrInt64(name, value) for name, value in attributes.items()]
        node = ir.Node(domain, op, inputs, given, metadata_props=dict(old.metadata_props))
        node.meta.update(old.meta)
        node.outputs[0].shape = result.shape
        node.outputs[0].type = result.type
        graph.insert_before(old, node)
        return node

    operand = x
    if half and x not in wide:
        cast = add("Cast", [x], to=int(_FLOAT)).outputs[0]
        cast.shape, cast.type = x.shape, ir.TensorType(_FLOAT)
        wide[x] = cast
    if half:
        operand = wide[x]
    product = add(weight.layout.operator, [operand, *weight.values], DOMAIN, **weight.layout.attributes())
    last = product.outputs[0]
    if half:
        assert dtype is not None
        last.type = ir.TensorType(_FLOAT)
        last = add("Cast", [last], to=int(dtype)).outputs[0]
    product.meta[AROUND] = (x, last)
    if old.op_type == "Gemm" and len(old.inputs) > 2 and (bias := old.inputs[2]) is not None:
        last = add("Add", [last, bias]).outputs[0]
    result.replace_all_uses_with(last, replace_graph_outputs=True)
    graph.remove(old, safe=True)


def _unique(name: str, taken: Collection[str], dtype: ir.DataType, shape: Sequence[int]) -> ir.Value:
    while name in taken:
        name += "_"
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


# What they hold.


def fill_packed(packed: Mapping[str, PackedWeight], source: Source) -> dict[str, float]:
    """Give packed weights their values, which are made when they are written.

    Returns:
        How far int4 is from what ``source`` has, as norms over the norm of that, by name: filled while it is written.
    """
    errors: dict[str, float] = {}
    last = _Last()
    for name, weight in packed.items():
        value = source(name)
        if weight.layout.operator == "MatMulBnb4":
            assert isinstance(value, QuantizedTensor)
            codes, absmax = weight.values
            codes.const_value = Streamed(Stored(value.packed.tensors["codes"], torch.uint8), codes)
            absmax.const_value = _lazily(partial(Nf4().scales, value.packed), absmax)
            continue
        made = partial(_int4_of, value, weight.layout, name, errors)
        for index, operand in enumerate(weight.values):
            operand.const_value = _lazily(partial(last.part, name, made, index), operand)
    return errors


def read_int4(packed: Mapping[str, PackedWeight], model: ir.Model) -> Iterator[tuple[str, Int4Tensor]]:
    """The int4 weights that a model holds, by name, as a graph has them; in float32."""
    for name, weight in packed.items():
        held = (model.graph.initializers[str(value.name)].const_value for value in weight.values)
        codes, scales, zeros = (torch.from_numpy(np.array(t.numpy())) for t in held if t is not None)
        yield name, Int4Tensor((codes, scales, zeros), weight.layout.width, weight.layout.turned)


class _Last:
    """The tensors of the weight that was quantized last: a file has them one after the other."""

    def __init__(self) -> None:
        self.name, self.made = "", list[Tensor]()

    def part(self, name: str, make: Callable[[], list[Tensor]], index: int) -> Tensor:
        if self.name != name:
            self.name, self.made = "", []  # before the next one takes its memory
            self.made, self.name = make(), name
        return self.made[index]


def _int4_of(value: Fold | Tensor, layout: Layout, name: str, errors: dict[str, float]) -> list[Tensor]:
    made = []
    gap = norm = 0.0
    for rows in _rows(value, layout):
        made.append(quantize_int4(rows, layout.block_size))
        away = dequantize_int4(*made[-1], layout.width).sub_(rows)
        gap, norm = (math.hypot(had, float(torch.linalg.vector_norm(t))) for had, t in ((gap, away), (norm, rows)))
    errors[name] = gap / norm if norm else 0.0
    return [torch.cat(parts) for parts in zip(*made, strict=True)]


def _rows(value: Fold | Tensor, layout: Layout) -> Iterator[Tensor]:
    """The dense weight ``[out, in]`` in float32, some rows at a time."""
    wide = torch.float32
    made = Stored(value, wide) if isinstance(value, Tensor) else dataclasses.replace(value, dtype=wide, rounding=None)
    for panel in made.panels((1, 0) if layout.turned else (0, 1)):
        yield panel.reshape(-1, layout.width)


def _lazily(compute: Callable[[], Tensor], value: ir.Value) -> ir.LazyTensor:
    assert value.dtype is not None
    dtype, name = value.dtype, value.name

    def made() -> ir.TensorProtocol:
        return ir.tensor(compute().cpu().numpy(), dtype=dtype, name=name)

    return ir.LazyTensor(made, dtype, value.shape or ir.Shape([]), name=name)


# What is said of it.


def describe_packing(packed: Mapping[str, PackedWeight]) -> str:
    """How many layers are packed as what, and how large that is."""
    operator = next(iter(packed.values())).layout.operator
    size = sum(v.const_value.nbytes for p in packed.values() for v in p.values if v.const_value is not None)
    count = sum(p.layout.out * p.layout.width for p in packed.values())
    return f"{len(packed)} weights for {operator}: {format_bytes(size)}, {8 * size / count:.2f} bits a value"


def describe_errors(errors: Mapping[str, float]) -> str:
    """What requantizing to int4 did."""
    worst = max(errors, key=errors.__getitem__)
    mean = math.sqrt(sum(e * e for e in errors.values()) / len(errors))
    return f"to int4 in blocks of {INT4_BLOCK}: off by {mean:.2%} of a weight's norm, {worst} by {errors[worst]:.2%}"


def dense_notes(dense: Mapping[str, str]) -> list[str]:
    """The weights that are written dense, by why."""
    by_reason: dict[str, list[str]] = {}
    for name, why in dense.items():
        by_reason.setdefault(why, []).append(name)
    notes = []
    for why, names in by_reason.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        notes.append(f"{', '.join(names[:3])}{more} written dense: {why}")
    return notes
