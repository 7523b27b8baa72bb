"""The kernels as operators, so that what traces a graph (torch.compile) sees a call, and launches nothing.

The kernels, and Triton with them, are imported by the first call that has values.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lorafx.bases.ops import packed_reference
from lorafx.bases.tensor import QuantizedTensor, quantized
from lorafx.ops import LIBRARY
from lorafx.variants.row_norm import factored_norm

#: Types of the large operands.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreted() -> bool:
    """Whether Triton is to interpret the kernels, on tensors of the CPU (``TRITON_INTERPRET=1``): for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def reads(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether kernels that compute in ``dtype`` read a frozen weight as it is stored: dense, or in NF4 row by row."""
    packed = quantized(weight)
    if packed is None:
        return not isinstance(weight, QuantizedTensor)
    return packed.format == "nf4" and len(packed.shape) == 2 and packed.dtype is dtype


def arguments(weights: Sequence[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], list[int]]:
    """Frozen weights as the operators take them: their tensors, and of each how many, out, in and the block size.

    That is 0 of a dense one; the operator gets as dense what kernels do not read.
    """
    tensors: list[Tensor] = []
    layouts: list[int] = []
    for weight in weights:
        packed = quantized(weight) if reads(weight, dtype) else None
        own = [weight] if packed is None else [*packed.tensors.values()]
        tensors += own
        layouts += [len(own), *weight.shape, 0 if packed is None else packed.block_size]
    return tensors, layouts


def _down(x: Tensor, right: Tensor, ranks: Sequence[int], p: Sequence[float], seed: Tensor | None) -> Tensor:
    from lorafx.kernels.triton.down import down
    from lorafx.kernels.triton.dropout import plan

    return down(x, right, plan(tuple(ranks), tuple(p)), seed)


def _down_fake(x: Tensor, right: Tensor, ranks: Sequence[int], p: Sequence[float], seed: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], right.shape[0])


def _up(
    x: Tensor,
    weight: Sequence[Tensor],
    layout: Sequence[int],
    bias: Tensor | None,
    s: Tensor,
    left: Tensor,
    gain: Tensor | None,
) -> Tensor:
    from lorafx.kernels.triton.up import up
    from lorafx.kernels.triton.weights import stored

    return up(x, stored(weight, layout)[0], bias, s, left, gain)


def _up_fake(x: Tensor, weight: Any, layout: Sequence[int], *others: Any) -> Tensor:
    return x.new_empty(math.prod(x.shape[:-1]), layout[1])


def _grad_up(
    dy: Tensor, s: Tensor, left: Tensor, gain: Tensor | None, y: Tensor | None, needs_total: bool
) -> list[Tensor]:
    """``ds, dleft, base, total, dot``; what is not asked for is empty, and so is ``base`` without gain."""
    from lorafx.kernels.triton.grad_up import grad_up

    ds, dleft, base, total, dot = grad_up(dy, s, left, gain, y, needs_total)
    nothing = [None if gain is None else base, total, dot]
    return [ds, dleft, *(dy.new_empty(0) if t is None else t for t in nothing)]


def _grad_up_fake(
    dy: Tensor, s: Tensor, left: Tensor, gain: Tensor | None, y: Tensor | None, needs_total: bool
) -> list[Tensor]:
    def sums(asked: bool) -> Tensor:
        return dy.new_empty(dy.shape[1], dtype=torch.float32) if asked else dy.new_empty(0)

    base = dy.new_empty(0 if gain is None else dy.shape)
    return [dy.new_empty(s.shape), left.new_empty(left.shape), base, sums(needs_total), sums(y is not None)]


def _grad_x(
    bases: Sequence[Tensor],
    weights: Sequence[Tensor],
    layouts: Sequence[int],
    ds: Tensor,
    right: Tensor,
    ranks: Sequence[int],
    p: Sequence[float],
    seed: Tensor | None,
) -> Tensor:
    from lorafx.kernels.triton.dropout import plan
    from lorafx.kernels.triton.grad_down import grad_x
    from lorafx.kernels.triton.weights import stored

    return grad_x(bases, stored(weights, layouts), ds, right, plan(tuple(ranks), tuple(p)), seed)


def _grad_x_fake(bases: Any, weights: Any, layouts: Any, ds: Tensor, right: Tensor, *others: Any) -> Tensor:
    return ds.new_empty(ds.shape[0], right.shape[1])


def _grad_right(ds: Tensor, x: Tensor, ranks: Sequence[int], p: Sequence[float], seed: Tensor | None) -> Tensor:
    """In float32."""
    from lorafx.kernels.triton.dropout import plan
    from lorafx.kernels.triton.grad_down import grad_right

    return grad_right(ds, x, plan(tuple(ranks), tuple(p)), seed, torch.float32)


def _grad_right_fake(ds: Tensor, x: Tensor, *others: Any) -> Tensor:
    return x.new_empty(ds.shape[1], x.shape[1], dtype=torch.float32)


def _factored_norm(squares: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """The operator of :mod:`lorafx.variants.row_norm` by one kernel; by torch where that does not serve."""
    if weight.dim() != 2 or any(t.dtype not in DTYPES for t in (weight, a, b)):
        return factored_norm(squares, weight, a, b, scaling)
    from lorafx.kernels.triton.row_norm import row_norm

    return row_norm(weight, a, b, squares, scaling)


# The operators on packed weights (:mod:`lorafx.bases.ops`): layers in NF4 that have no adapters.


def packed_rows(
    tensors: Sequence[Tensor], name: str, layout: Sequence[int], dtype: torch.dtype, start: int, stop: int
) -> Tensor:
    """Rows ``start`` to ``stop``."""
    if name != "nf4":
        rows: Tensor = packed_reference(tensors, name, layout, dtype, start, stop)
        return rows
    from lorafx.kernels.triton.weights import dequantize, stored

    return dequantize(stored(tensors, [len(tensors), *layout[:3]])[0], dtype, start, stop)


def packed_linear(
    x: Tensor, bias: Tensor | None, tensors: Sequence[Tensor], name: str, layout: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """``x W^T + bias``: of NF4 as the frozen layer's share of :func:`_up`, bit for bit."""
    if name != "nf4":
        return F.linear(x, packed_reference(tensors, name, layout, dtype, 0, layout[0]), bias)
    from lorafx.kernels.triton.up import up
    from lorafx.kernels.triton.weights import stored

    return up(x, stored(tensors, [len(tensors), *layout[:3]])[0], bias)


def packed_mm(x: Tensor, tensors: Sequence[Tensor], name: str, layout: Sequence[int], dtype: torch.dtype) -> Tensor:
    """``x [M, out] W``, for the gradient of a frozen layer's input: of NF4 as the frozen share of :func:`_grad_x`."""
    if name != "nf4":
        weight: Tensor = packed_reference(tensors, name, layout, dtype, 0, layout[0])
        return x @ weight
    from lorafx.kernels.triton.grad_down import grad_x
    from lorafx.kernels.triton.weights import stored

    return grad_x([x], stored(tensors, [len(tensors), *layout[:3]]))


def _implement(name: str, kernel: Callable[..., Any]) -> None:
    LIBRARY.impl(name, kernel, "CUDA")  # AMD's devices have that key too
    if interpreted():
        LIBRARY.impl(name, kernel, "CPU")


def _define(name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register an operator. ``torch.library.custom_op`` would do, at ten times the cost of a call."""
    LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, fake, "Meta")
    _implement(name, kernel)
    overload: Callable[..., Any] = getattr(torch.ops.lorafx, name).default
    return overload


triton_down = _define(
    "triton_down", "(Tensor x, Tensor right, int[] ranks, float[] p, Tensor? seed) -> Tensor", _down, _down_fake
)
triton_up = _define(
    "triton_up",
    "(Tensor x, Tensor[] weight, int[] layout, Tensor? bias, Tensor s, Tensor left, Tensor? gain) -> Tensor",
    _up, _up_fake,
)  # fmt: skip
triton_grad_up = _define(
    "triton_grad_up",
    "(Tensor dy, Tensor s, Tensor left, Tensor? gain, Tensor? y, bool needs_total) -> Tensor[]",
    _grad_up, _grad_up_fake,
)  # fmt: skip
triton_grad_x = _define(
    "triton_grad_x",
    "(Tensor[] bases, Tensor[] weights, int[] layouts, Tensor ds, Tensor right, int[] ranks, float[] p, Tensor? seed)"
    " -> Tensor",
    _grad_x, _grad_x_fake,
)  # fmt: skip
triton_grad_right = _define(
    "triton_grad_right",
    "(Tensor ds, Tensor x, int[] ranks, float[] p, Tensor? seed) -> Tensor",
    _grad_right, _grad_right_fake,
)  # fmt: skip
if find_spec("triton") is not None:
    _implement("factored_norm", _factored_norm)
    for _name, _kernel in (("rows", packed_rows), ("linear", packed_linear), ("mm", packed_mm)):
        LIBRARY.impl(f"packed_{_name}", _kernel, "CUDA")  # the CPU has its own, interpreter or not
