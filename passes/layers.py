"""The calls that can be adapted: how each becomes a call of its twin, and the call it was again.

    linear = aten.linear(x, w, b)     <->     linear = lorafx.linear(x, w, b, [...], ...)

A twin has the arguments of its layer first (:mod:`lorafx.ops`), so one rule serves all kinds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from lorafx.graph import annotate, notes, unannotate
from lorafx.ops import ADAPTED, ADAPTER_ARGUMENTS, LAYERS

aten = torch.ops.aten

#: Operators through which a weight may pass on its way to the call without becoming another matrix.
_CASTS = frozenset({aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.alias.default, aten.detach.default})

_KINDS: Mapping[Any, str] = {layer.target: name for name, layer in LAYERS.items()}


@dataclass(frozen=True)
class Operands:
    """What a call multiplies: ``x`` by the weight held by ``source`` (reached through ``weight``)."""

    kind: str
    x: Node
    weight: Node
    bias: Node | None
    source: Node


def find_operands(node: Node) -> Operands | None:
    """The operands of a call that can be adapted, else None."""
    kind = _KINDS.get(node.target) if node.op == "call_function" else None
    if kind is None:
        return None
    layer, given = LAYERS[kind], arguments_of(node)
    if given is None:
        return None
    x, weight = given[layer.x], given[layer.weight]
    bias = None if layer.bias is None else given[layer.bias]
    source = weight
    while isinstance(source, Node) and source.target in _CASTS:
        source = source.args[0]
    if not isinstance(x, Node) or not isinstance(source, Node) or source.op != "get_attr":
        return None
    return Operands(kind, x, weight, bias if isinstance(bias, Node) else None, source)


def call_twin(node: Node, adapters: Sequence[Any]) -> None:
    """Make a call one of its twin, with these arguments of the adapters."""
    kind = _KINDS[node.target]
    annotate(node, call={"kind": kind, "positional": len(node.args), "named": tuple(node.kwargs)})
    arguments = _arguments(node)
    node.target = ADAPTED[kind]
    node.args = (*arguments, *adapters)
    node.kwargs = {}


def call_layer(node: Node) -> None:
    """The inverse of :func:`call_twin`."""
    call = notes(node)["call"]
    arguments = node.args[:-ADAPTER_ARGUMENTS]
    node.target = LAYERS[call["kind"]].target
    named = {a.name: i for i, a in enumerate(_positional(node))}
    options = {a.name: a.default_value for a in _options(node)}
    node.args = arguments[: call["positional"]]
    node.kwargs = {n: arguments[named[n]] if n in named else options[n] for n in call["named"]}
    unannotate(node, "call")


def arguments_of(node: Node) -> tuple[Any, ...] | None:
    """All positional arguments of a layer's call; None where it has options that no twin has (addmm with a factor)."""
    if any(node.kwargs.get(a.name, a.default_value) != a.default_value for a in _options(node)):
        return None
    return _arguments(node)


def _arguments(node: Node) -> tuple[Any, ...]:
    """All positional arguments of a call, defaults included."""
    rest = _positional(node)[len(node.args) :]
    return (*node.args, *(node.kwargs.get(a.name, a.default_value) for a in rest))


def _positional(node: Node) -> list[Any]:
    return [a for a in node.target._schema.arguments if not a.kwarg_only]  # type: ignore[union-attr]


def _options(node: Node) -> list[Any]:
    return [a for a in node.target._schema.arguments if a.kwarg_only]  # type: ignore[union-attr]


def readers(source: Node) -> list[Node]:
    """The calls that read a ``get_attr`` node, seen through casts of it."""
    found = []
    for user in source.users:
        found += readers(user) if user.target in _CASTS else [user]
    return found
