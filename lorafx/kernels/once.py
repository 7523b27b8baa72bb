"""A backward that is differentiated no further, and says so."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

_TWICE = (
    b"lorafx: what lowering put in the place of adapted layers is differentiated once. For second derivatives "
    b'(create_graph=True) compute by plain torch: lorafx.lower(gm, "reference")'
)
#: Where a batch of gradients comes back at once (``is_grads_batched``, a vectorised Jacobian).
_BATCHED = (
    "lorafx: what lowering put in the place of adapted layers takes one gradient, not a batch of them. For "
    "is_grads_batched=True, or a Jacobian with vectorize=True, compute by plain torch: "
    'lorafx.lower(gm, "reference")'
)


def once_differentiable(
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> Callable[..., tuple[Tensor | None, ...]]:
    """A backward whose results may be used, and raise ``RuntimeError`` where they are differentiated.

    Unlike torch's decorator of this name also where what comes back needs no gradient (a loss that is linear in the
    output): gradients depend on what was kept, and a penalty on them would silently have none. Nor does it take
    batches of gradients.
    """

    @wraps(backward)
    def wrapped(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        if not torch.compiler.is_compiling() and any(map(_is_batched, dys)):
            raise RuntimeError(_BATCHED)
        with torch.no_grad():
            grads = backward(ctx, *dys)
        if not torch.is_grad_enabled():
            return grads
        refuse: Any = torch._C._functions.DelayedError(_TWICE, len(grads))
        found: tuple[Tensor | None, ...] = refuse(*[None if g is None else g.detach().requires_grad_() for g in grads])
        return found

    return wrapped


def _is_batched(dy: Tensor | None) -> bool:
    return dy is not None and torch._C._functorch.is_legacy_batchedtensor(dy)
