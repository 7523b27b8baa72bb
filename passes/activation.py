"""Activation: inputs of layers that are an activation of something, in a form that can be differentiated in one pass.

    g = silu(gate)
    x = g * up            ->   "silu_mul", of (gate, up)
    y = linear(x, ...)

Only where nothing else reads ``x`` or what lies between, since their gradients are not computed then.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch.fx import Node

from lorafx.passes.views import behind_views

aten = torch.ops.aten


def find_activation(x: Node) -> tuple[str, list[Node]] | None:
    """The name (:data:`lorafx.kernels.base.ACTIVATIONS`) and the sources of an activation, or None."""
    found = x
    while len(found.users) == 1 and (source := behind_views(found, 1)) is not found:
        found = source
    if len(found.users) > 1:
        return None
    if (single := _single(found)) is not None:
        return single[0], [single[1]]
    if found.target is aten.mul.Tensor:
        a, b = found.args[:2]
        for inner, other in ((a, b), (b, a)):
            if not isinstance(inner, Node) or not isinstance(other, Node) or len(inner.users) > 1 or inner is other:
                continue
            if (single := _single(inner)) is not None and single[1] is not other:  # each source has one gradient
                return f"{single[0]}_mul", [single[1], other]
    return None


def _single(node: Node) -> tuple[str, Node] | None:
    """An activation of one value."""
    h = node.args[0] if node.args else None
    if node.target is aten.silu.default and isinstance(h, Node):
        return "silu", h
    if node.target is aten.gelu.default and isinstance(h, Node):
        return ("gelu_tanh" if node.kwargs.get("approximate", "none") == "tanh" else "gelu"), h
    if (written_out := _written_out_gelu(node)) is not None:
        return "gelu_tanh", written_out
    return None


def _written_out_gelu(node: Node) -> Node | None:
    """``h`` of ``(0.5 h) (1 + tanh(sqrt(2 / pi) (h + 0.044715 h^3)))``, as GPT-2 and others compute it."""
    for half, rest in _orders(node, aten.mul.Tensor):
        for h, factor in _orders(half, aten.mul.Tensor):
            for tanh, one in _orders(rest, aten.add.Tensor):
                inner = _argument(tanh, aten.tanh.default)
                for total, scale in _orders(inner, aten.mul.Tensor):
                    for same, cubic in _orders(total, aten.add.Tensor):
                        for power, coefficient in _orders(cubic, aten.mul.Tensor):
                            base = _argument(power, aten.pow.Tensor_Scalar)
                            numbers = (factor, one, scale, coefficient, _exponent(power))
                            if (
                                isinstance(h, Node)
                                and h is same is base
                                and _close(numbers, (0.5, 1.0, math.sqrt(2 / math.pi), 0.044715, 3.0))
                                and _read_once(half, rest, tanh, inner, total, cubic, power)
                            ):
                                return h
    return None


def _read_once(*nodes: object) -> bool:
    return all(isinstance(node, Node) and len(node.users) == 1 for node in nodes)


def _orders(node: object, target: object) -> Iterator[tuple[object, object]]:
    """Both orders of the operands of a call of a commutative operator."""
    if isinstance(node, Node) and node.target is target and not node.kwargs:
        a, b = node.args[:2]
        yield a, b
        yield b, a


def _argument(node: object, target: object) -> object:
    return node.args[0] if isinstance(node, Node) and node.target is target else None


def _exponent(node: object) -> object:
    return node.args[1] if isinstance(node, Node) and len(node.args) > 1 else None


def _close(found: tuple[object, ...], wanted: tuple[float, ...]) -> bool:
    return all(
        isinstance(a, (int, float)) and math.isclose(a, b, rel_tol=1e-6) for a, b in zip(found, wanted, strict=True)
    )
