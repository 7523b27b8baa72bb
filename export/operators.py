"""ONNX for operators that torch.onnx has no translation of.

Mixtures of experts multiply each token's row by the matrix of the expert that it goes to: rows are sorted by expert,
and ``offsets [experts]`` says where each one's end. transformers does so by default, with torch's operator in bfloat16
and one of its own in other dtypes. In ONNX it is a loop over the experts that have rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import InlinePass, LiftConstantsToInitializersPass
from onnxscript import opset18, script
from onnxscript.function_libs.torch_lib.tensor_typing import TFloat, TInt
from onnxscript.values import Op, Opset

from lorafx.export.repeat import CALL

op: Any = opset18  # typed for one dtype each; so what the functions here return is Any to mypy
Parameter = onnx.defs.OpSchema.FormalParameter
_DOMAIN = Opset("lorafx", 1)


@script(_DOMAIN, default_opset=op)
def grouped_mm(rows: TFloat, weights: TFloat, offsets: TInt, carrier: int) -> TFloat:
    """``[n, out]`` from ``rows [n, in]`` and ``weights [experts, in, out]``; rows beyond the last offset give zeros.

    Products are kept in the dtype ``carrier`` until all are there: sequences hold no bfloat16.
    """
    first, last, end = (
        op.Constant(value_ints=[0]),
        op.Constant(value_ints=[-1]),
        op.Constant(value_ints=[9223372036854775807]),
    )
    stops = op.Cast(offsets, to=7)
    starts = op.Concat(first, op.Slice(stops, first, last), axis=0)
    busy = op.Squeeze(op.NonZero(op.Sub(stops, starts)), first)
    others = op.Sub(op.Shape(rows, start=0, end=1), op.Slice(stops, last, end))
    zeros = op.Expand(
        op.Cast(op.Constant(value_float=0.0), to=carrier), op.Concat(others, op.Shape(weights, start=2, end=3), axis=0)
    )
    products = op.SequenceConstruct(op.Slice(zeros, first, first))
    for index in range(op.Size(busy)):
        expert = op.Gather(busy, index)
        place = op.Unsqueeze(expert, first)
        mine = op.Slice(rows, op.Gather(starts, place), op.Gather(stops, place), first)
        products = op.SequenceInsert(products, op.Cast(op.MatMul(mine, op.Gather(weights, expert)), to=carrier))
    every = op.ConcatFromSequence(op.SequenceInsert(products, zeros), axis=0)
    return op.CastLike(every, rows)  # type: ignore[no-any-return]  # see op


#: What holds the products of what sequences do not take.
_CARRIERS = {ir.DataType.BFLOAT16: ir.DataType.FLOAT}
#: The same as a node, which is one while repeated blocks are told by their nodes.
_NODE = Op(
    _DOMAIN,
    "grouped_mm",
    onnx.defs.OpSchema(
        "grouped_mm",
        _DOMAIN.domain,
        _DOMAIN.version,
        inputs=[Parameter("rows", "T"), Parameter("weights", "T"), Parameter("offsets", "I")],
        outputs=[Parameter("products", "T")],
        attributes=[onnx.defs.OpSchema.Attribute("carrier", onnx.defs.OpSchema.AttrType.INT, "")],
        type_constraints=[
            ("T", [f"tensor({name})" for name in ("float", "double", "float16", "bfloat16")], ""),
            ("I", ["tensor(int32)", "tensor(int64)"], ""),
        ],
    ),
)


def _as_node(rows: TFloat, weights: TFloat, offsets: TInt) -> TFloat:
    found: Any = _NODE(rows, weights, offsets, carrier=_CARRIERS.get(rows.dtype, rows.dtype))
    return found  # type: ignore[no-any-return]  # see op


def translations() -> Mapping[Callable[..., Any], Callable[..., Any]]:
    """As torch.onnx takes them, of the operators that are registered by now: nodes that :func:`spell_out` replaces."""
    found: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.aten._grouped_mm.default: _as_node}
    if (own := getattr(torch.ops.transformers, "grouped_mm_fallback", None)) is not None:
        found[own.default] = _as_node
    return found


def spell_out(model: ir.Model) -> None:
    """Replace those nodes by what they mean, in place; what takes a node's place is of its call."""
    graph = model.graph
    calls = [node.meta.get(CALL) for node in graph if node.domain == _DOMAIN.domain]
    if not calls:
        return
    before = set(graph)
    function = ir.serde.deserialize_function(grouped_mm.to_function_proto())
    function.opset_imports[""] = model.opset_imports[""]  # what it is made of means the same from 18 on
    size = len(function)
    model.functions[function.identifier()] = function
    InlinePass()(model)
    model.opset_imports.pop(_DOMAIN.domain, None)
    for index, node in enumerate(n for n in graph if n not in before):
        node.meta[CALL] = calls[index // size]
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
