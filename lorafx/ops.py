"""The operators that sites call. An operator's pure-torch reference *is* its meaning.

``define_op`` registers a reference as composite: under autograd, autocast, ``torch.func`` and
``torch.compile`` it is the sum of its parts, and it stays one node in exported graphs. Faster
implementations are operators of their own with the same schema; lowering exchanges one for the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.nn import functional as F

_LIBRARY: Any = torch.library.Library("lorafx", "FRAGMENT")  # type: ignore[no-untyped-call]


def define_op(name: str, schema: str, reference: Callable[..., Tensor]) -> OpOverload:
    """Register ``lorafx::name`` with ``schema`` (``(Tensor x, ...) -> Tensor``) and its reference."""
    _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, reference, "CompositeImplicitAutograd")
    overload: OpOverload = getattr(torch.ops.lorafx, name).default
    return overload


def lora_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float,
    training: bool,
) -> Tensor:
    """``y = x W^T + b + scaling * (drop(x) A^T) B^T`` (LoRA, arXiv 2106.09685, eq. 3).

    Args:
        x: ``[..., in]``; weight: ``[out, in]``; bias: ``[out]`` or None.
        lora_A, lora_B: ``[r, in]`` and ``[out, r]``.
        scaling: alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732).
        dropout: probability of dropping an element of the branch's input while ``training``.

    Returns:
        ``[..., out]`` in the base layer's result dtype. The branch is computed in the adapter's dtype and
        added there, so that float32 adapters on a half-precision base are rounded once.
    """
    base = F.linear(x, weight, bias)
    dropped = F.dropout(x, dropout, training) if dropout > 0.0 else x
    branch = F.linear(F.linear(dropped.to(lora_A.dtype), lora_A), lora_B)
    return (base + branch * scaling).to(base.dtype)


lora_linear = define_op(
    "lora_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, float scaling, float dropout, bool "
    "training) -> Tensor",
    lora_linear_reference,
)
