"""Memory: what a node of a graph writes to in place, and in whose memory its result may lie.

The operators of an exported graph say both by their schemas, but for those listed here. The functions, methods and
modules of a symbolic one say it by their names and flags:

    h.relu_()    torch.relu_(h)    operator.iadd(h, 1)    F.relu(h, inplace=True)    torch.add(h, 1, out=h)
    nn.ReLU(inplace=True)(h)

Of what is not known the worst is assumed: that it writes to all that it is given, and returns it.
"""

from __future__ import annotations

import inspect
import operator
from functools import cache
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.fx import GraphModule, Node
from torch.fx.graph import inplace_methods
from torch.fx.node import map_arg

#: Operators that may return their input itself, or a view of it, though their schemas don't say so: some where they
#: have nothing to do (dropout in eval mode), some always.
_UNTOLD = frozenset(
    {
        "dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "atleast_1d", "atleast_2d",
        "atleast_3d", "broadcast_tensors", "meshgrid", "cartesian_prod", "einsum", "sum_to_size", "type_as",
        "conj_physical", "to_dense", "dequantize", "lift", "chain_matmul", "unsafe_chunk", "unsafe_split",
        "unsafe_split_with_sizes", "_unsafe_view",
    }
)  # fmt: skip

#: Arguments that normalisations write to, whatever their schemas say.
_STATISTICS = frozenset({"running_mean", "running_var"})

#: Functions that write running statistics.
_UPDATES = frozenset({"batch_norm", "instance_norm"})

#: Arguments of functions, and attributes of modules, by which these write to what they are given.
_FLAGS = ("inplace", "out", "max_norm")

#: Whose functions and modules write to what they are given only if their names or flags say so.
_KNOWN = frozenset({"torch", "_operator", "math", "builtins", "lorafx"})


def written(node: Node) -> list[Node]:
    """The values that a node may write to."""
    if isinstance(node.target, OpOverload):
        return _given(node, _effects(node.target).written)
    if node.op == "call_module":
        return node.all_input_nodes if _module_writes(node) else []
    if node.op not in ("call_function", "call_method"):
        return []
    return node.all_input_nodes if _call_writes(node) else []


def memory_of(node: Node) -> list[Node]:
    """The values in whose memory the result of a node may lie; none: in memory of its own."""
    if isinstance(node.target, OpOverload):
        return _given(node, _effects(node.target).aliased)
    if node.op == "output" or (node.op != "call_module" and not _call_writes(node) and _is_fresh(node)):
        return []
    return node.all_input_nodes


class _Effects(NamedTuple):
    """Of an operator: the names of its arguments in order, which it writes to, and in whose memory its result lies."""

    arguments: tuple[str, ...]
    written: tuple[str, ...]
    aliased: tuple[str, ...]


@cache
def _effects(target: OpOverload) -> _Effects:
    arguments = target._schema.arguments
    names = tuple(a.name for a in arguments)
    changed = tuple(a.name for a in arguments if a.is_write or a.name in _STATISTICS)
    aliased = tuple(a.name for a in arguments if a.alias_info is not None)
    return _Effects(names, changed, names if target._opname in _UNTOLD else aliased)


def _given(node: Node, names: tuple[str, ...]) -> list[Node]:
    """The values that a node has for these arguments of its operator."""
    if not names:
        return []
    assert isinstance(node.target, OpOverload)
    given = {**dict(zip(_effects(node.target).arguments, node.args, strict=False)), **node.kwargs}
    found: dict[Node, None] = {}
    map_arg([given.get(name) for name in names], lambda value: found.setdefault(value))
    return list(found)


def _name(node: Node) -> str:
    return str(node.target) if node.op == "call_method" else str(getattr(node.target, "__name__", ""))


def _call_writes(node: Node) -> bool:
    name = _name(node)
    if name in _UPDATES or name.strip("_") in inplace_methods or (name.endswith("_") and not name.endswith("__")):
        return True
    given: dict[str, Any] = node.kwargs
    if isinstance(node.target, FunctionType):
        given = _signature(node.target).bind_partial(*node.args, **node.kwargs).arguments
    return any(map(_is_set, map(given.get, _FLAGS))) or (node.op == "call_function" and not _is_known(node.target))


_signature = cache(inspect.signature)


def _is_set(flag: Any) -> bool:
    return flag is not None and flag is not False


def _is_known(target: Any) -> bool:
    module = getattr(target, "__module__", None) or ""
    return module.partition(".")[0] in _KNOWN and not isinstance(target, (HigherOrderOperator, OpOverloadPacket))


def _is_fresh(node: Node) -> bool:
    """Whether a call of a function or method that writes to nothing returns memory of its own."""
    if getattr(node.target, "__module__", "") == "_operator":
        return node.target not in (operator.getitem, operator.pos)
    return _are_fresh(_name(node))


@cache
def _are_fresh(name: str) -> bool:
    """Whether all operators of a name, which is also that of a function or method, return memory of their own."""
    packet = getattr(torch.ops.aten, name, None)
    if packet is None or name in _UNTOLD:
        return False
    schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
    return not any(r.alias_info is not None for s in schemas if not s.is_mutable for r in s.returns)


def _module_writes(node: Node) -> bool:
    """Whether the module that a node calls, or one below it, writes to what it is given."""
    root = node.graph.owning_module
    return root is None or any(map(_writes, root.get_submodule(str(node.target)).modules()))


def _writes(module: nn.Module) -> bool:
    if isinstance(module, GraphModule):
        return any(map(written, module.graph.nodes))
    hooked = module._forward_hooks or module._forward_pre_hooks
    return bool(hooked) or not _is_known(type(module)) or any(_is_set(getattr(module, f, None)) for f in _FLAGS)
