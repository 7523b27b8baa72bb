"""The ways to make one change of a weight of several: what each does to the true changes.

A *change* is the whole difference ``D_i = W_i' - W`` that adapter i makes to the frozen weight, scaling included
(``s B A`` for LoRA), and never its factors: ``B A`` is also ``(B M)(M^-1 A)``, so what is done to A and to B apart
depends on which of these a training run happened to end at. ``w_i`` are the weights, ``d`` is the density.

| method | the combined change |
| --- | --- |
| ``linear``, ``cat``, ``svd`` | ``sum w_i D_i`` (task arithmetic, arXiv 2212.04089) |
| ``magnitude_prune`` | ``sum w_i top(D_i)``, where ``top`` keeps the share d of elements that is largest |
| ``ties`` | ``top`` as above; in each place the sign of ``sum top(D_i)`` is elected (``majority_sign="frequency"``: of the sum of their signs; +1 where it is zero), and ``w_i top(D_i)`` averaged over the adapters that have it (arXiv 2306.01708, algorithm 1, with ``lambda`` taken apart into weights) |
| ``dare_linear`` | ``sum w_i drop(D_i)``, where ``drop`` keeps each element with probability d, times ``1 / d`` (arXiv 2311.03099, eq. 2) |
| ``dare_ties`` | ``drop``, and then as ``ties`` |

PEFT's ``add_weighted_adapter`` has the same names. There those without ``_svd`` work on A and B apart, ``linear`` too
(whose product then has the cross terms ``B_i A_j``), and those with it on the changes. Here all work on the changes:
``ties`` and ``ties_svd`` are the same, under both names. What happens in single elements leaves no low rank, so that the
result is then factored again, at a rank and with an error that the report states.
"""  # noqa: E501  # a table's row is one line

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

Sparsify = Callable[[Tensor, float, torch.Generator | None], Tensor]


@dataclass(frozen=True)
class Method:
    """One way to combine.

    ``keeps_factors``: the result is made of the adapters' own factors, so each must have some; ``shares``: those with
    an equal right side have it once. ``sparsify`` thins each change out, ``elects`` says whether signs are elected;
    without either the changes are summed as they are.
    """

    keeps_factors: bool = False
    shares: bool = False
    sparsify: Sparsify | None = None
    elects: bool = False


@dataclass(frozen=True)
class Thinning:
    """What the methods that thin out need to know."""

    density: float = 1.0
    majority_sign: str = "total"
    generator: torch.Generator | None = field(default=None, compare=False)


def merge(method: Method, changes: Sequence[Tensor], weights: Sequence[float], thinning: Thinning) -> Tensor:
    """The combined change of tensors of one shape."""
    if method.sparsify is not None:
        changes = [method.sparsify(c, thinning.density, thinning.generator) for c in changes]
    stacked = torch.stack(list(changes))
    weighted = stacked * torch.tensor(weights, dtype=stacked.dtype, device=stacked.device).reshape(
        -1, *[1] * (stacked.dim() - 1)
    )
    if not method.elects:
        return weighted.sum(0)
    votes = (stacked.sign() if thinning.majority_sign == "frequency" else stacked).sum(0)
    elected = torch.where(votes >= 0, 1.0, -1.0).to(stacked.dtype)
    agree = stacked.sign() == elected
    return (weighted * agree).sum(0) / agree.sum(0).clamp_min(1)


def keep_largest(change: Tensor, density: float, generator: torch.Generator | None) -> Tensor:
    """The share ``density`` of the elements (rounded down, at least one) that is largest, the others zero."""
    count = max(1, int(density * change.numel()))
    kept = torch.zeros(change.numel(), dtype=torch.bool, device=change.device)
    kept[change.abs().flatten().topk(count).indices] = True
    return torch.where(kept.reshape(change.shape), change, 0.0)


def drop_and_rescale(change: Tensor, density: float, generator: torch.Generator | None) -> Tensor:
    """Each element with probability ``density``, divided by it; drawn on the CPU, the same on every device."""
    drawn = torch.rand(change.shape, generator=generator, dtype=torch.float64)
    return torch.where((drawn < density).to(change.device), change / density, 0.0)


_ELEMENTWISE: Mapping[str, Method] = {
    "ties": Method(sparsify=keep_largest, elects=True),
    "dare_linear": Method(sparsify=drop_and_rescale),
    "dare_ties": Method(sparsify=drop_and_rescale, elects=True),
    "magnitude_prune": Method(sparsify=keep_largest),
}

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "linear": Method(keeps_factors=True, shares=True),
        "cat": Method(keeps_factors=True),
        "svd": Method(),
        **{name: method for plain, method in _ELEMENTWISE.items() for name in (plain, f"{plain}_svd")},
    }
)
