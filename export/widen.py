"""Half-precision graphs in float32: the same nodes over exactly the same weights.

ONNX Runtime's CPU provider has no bfloat16 kernels. Every bfloat16 number is a float32 number, so a twin of
the file in which all values are float32 can be run instead, beside the torch graph in float32. What then
differs is what the file rounded, the merged weights above all, without the noise of rounded activations.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.node import Argument, map_aggregate

from lorafx.graph import CapturedModule, share

_HALF = frozenset({torch.bfloat16, torch.float16})
_HALF_ONNX = frozenset({ir.DataType.BFLOAT16, ir.DataType.FLOAT16})
_DTYPE_ATTRIBUTES = frozenset({"to", "dtype"})


def widen_graph(gm: CapturedModule) -> CapturedModule:
    """A copy of a graph whose half-precision tensors, and casts to half precision, are float32."""
    twin = share(gm)
    subgraphs = {s for g in twin.modules() if isinstance(g, GraphModule) and g is not twin for s in g.modules()}
    wide: dict[int, Tensor] = {}
    for module in twin.modules():
        if module in subgraphs:
            continue
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None and tensor.dtype in _HALF:
                    store[name] = wide.setdefault(id(tensor), _widened(tensor))  # type: ignore[assignment]
    for node in twin.graph.nodes:
        args, kwargs = map_aggregate(node.args, _wide_dtype), map_aggregate(node.kwargs, _wide_dtype)
        assert isinstance(args, tuple)
        assert isinstance(kwargs, dict)
        node.args, node.kwargs = args, kwargs
    twin.recompile()
    return twin


def _widened(tensor: Tensor) -> Tensor:
    wide = tensor.detach().float()
    return nn.Parameter(wide, requires_grad=False) if isinstance(tensor, nn.Parameter) else wide


def _wide_dtype(argument: Argument) -> Argument:
    return torch.float32 if argument in _HALF else argument


def widen_tensor(tensor: Tensor) -> Tensor:
    """A half-precision tensor in float32; any other as it is."""
    return tensor.float() if tensor.dtype in _HALF else tensor


def widen_model(model: ir.Model) -> None:
    """Make every half-precision value, constant and cast of an ONNX model float32, in place."""
    for value in model.graph.initializers.values():
        held = value.const_value
        if held is not None and held.dtype in _HALF_ONNX:
            value.const_value = ir.LazyTensor(
                partial(_wide_tensor, held),
                dtype=ir.DataType.FLOAT,
                shape=ir.Shape(held.shape.numpy()),  # the value's own has names, where it is an input's default
                name=value.name,
            )
            value.dtype = ir.DataType.FLOAT
    for value in model.graph.inputs:
        _widen_value(value)
    for node in model.graph.all_nodes():
        for value in node.outputs:
            _widen_value(value)
        for name, attribute in list(node.attributes.items()):
            node.attributes[name] = _wide_attribute(name, attribute)


def _widen_value(value: ir.Value) -> None:
    if value.dtype in _HALF_ONNX:
        value.dtype = ir.DataType.FLOAT


def _wide_tensor(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)


def _wide_attribute(name: str, attribute: ir.Attr) -> ir.Attr:
    value: Any = attribute.value
    if attribute.type == ir.AttributeType.INT and name in _DTYPE_ATTRIBUTES and value in _HALF_ONNX:
        return ir.AttrInt64(name, int(ir.DataType.FLOAT))
    if attribute.type == ir.AttributeType.TENSOR and value.dtype in _HALF_ONNX:
        return ir.AttrTensor(name, _wide_tensor(value))
    return attribute
