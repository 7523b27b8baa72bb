"""AdaLoRA: a singular value decomposition that is trained, and whose rank shrinks (arXiv 2303.10512)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from lorafx import checks
from lorafx.variants.base import Option, Start, StartRequest, Update, Variant

_OPTIONS: Mapping[str, Option] = MappingProxyType(
    {
        "target_r": Option(8, checks.rank),
        "tinit": Option(0, checks.count),
        "tfinal": Option(0, checks.count),
        "deltaT": Option(1, checks.rank),
        "beta1": Option(0.85, checks.share),
        "beta2": Option(0.85, checks.share),
        "orth_reg_weight": Option(0.5, checks.weight),
        "total_step": Option(None, checks.optional(checks.rank)),
    }
)


class AdaLora(Variant):
    """``W' = W + s P diag(E) Q``: ``lora_B [out, r]`` is P, ``lora_E [r, 1]`` the values, ``lora_A [r, in]`` Q.

    The options are PEFT's; :class:`lorafx.RankScheduler` reads them, and takes ranks away while training.
    """

    name = "adalora"
    parameters = ("lora_A", "lora_B", "lora_E")
    inits = ("gaussian",)
    options = _OPTIONS
    shrinks = True

    def scaling(self, alpha: float, r: int, rslora: bool) -> float:
        """alpha / r of the first rank, with the 1e-5 that the authors' code and PEFT add to r."""
        return alpha / ((math.sqrt(r) if rslora else r) + 1e-5)

    def shapes(self, out_features: int, in_features: int, r: int) -> Mapping[str, tuple[int, ...]]:
        """``lora_A [r, in]``, ``lora_B [out, r]``, ``lora_E [r, 1]``."""
        return {"lora_A": (r, in_features), "lora_B": (out_features, r), "lora_E": (r, 1)}

    def start(self, request: StartRequest) -> Start:
        """Both factors normal with deviation 0.02, the values zero."""
        parameters = {}
        for name, shape in self.shapes(request.weight.shape[0], request.weight.shape[1], request.r).items():
            values = torch.zeros(shape, dtype=torch.float32, device="meta" if request.weight.is_meta else "cpu")
            if name != "lora_E":
                nn.init.normal_(values, std=0.02, generator=request.generator)
            parameters[name] = values.to(device=request.weight.device, dtype=request.dtype)
        return Start(parameters)

    def update(self, weight: Tensor, tensors: Mapping[str, Tensor], scaling: float) -> Update:
        """``left = s P``, ``right = diag(E) Q``."""
        return Update(tensors["lora_B"], tensors["lora_A"] * tensors["lora_E"], scaling=scaling)


@dataclass(frozen=True)
class Schedule:
    """When how many ranks are left, of all sites together; steps count from 1.

    This is the global budget scheduler of arXiv 2303.10512 as the authors' code and PEFT have it. (The paper's formula
    subtracts ``tfinal`` from the steps of the descent too, which would start it above the first budget.)

    ``total_steps`` is T, ``target_r`` the mean rank at the end; the first ``tinit`` steps take none, the last
    ``tfinal`` train what is left, and in between ranks are chosen every ``deltaT`` steps. ``beta1`` and ``beta2``
    smooth the importance, ``orth_reg_weight`` weighs the penalty.
    """

    total_steps: int
    target_r: int
    tinit: int
    tfinal: int
    deltaT: int
    beta1: float
    beta2: float
    orth_reg_weight: float

    @property
    def last(self) -> int:
        """The step of the last allocation, after which the ranks stay what they are."""
        return self.total_steps - self.tfinal

    def allocates(self, step: int) -> bool:
        """Whether ranks are chosen at this step."""
        return step == self.last or (self.tinit < step < self.last and step % self.deltaT == 0)

    def budget(self, step: int, first: int, target: int) -> int:
        """How many of ``first`` ranks are left: a cubic descent to ``target``."""
        if step <= self.tinit:
            return first
        if step >= self.last:
            return target
        left = 1 - (step - self.tinit) / (self.last - self.tinit)
        return int((first - target) * left**3 + target)


def scores(importance: Mapping[str, Tensor]) -> Tensor:
    """The score of each rank of a site, ``[r]``, from the importance of each element of its parameters.

    A rank is a triplet, of a value and its two vectors, and has ``S = s(E) + mean of s(Q's row) + mean of s(P's
    column)``, the importance of a triplet in arXiv 2303.10512. The ranks of a stack of experts, which they give up
    together, have the mean over the experts.
    """
    vectors = importance["lora_A"].mean(-1) + importance["lora_B"].mean(-2)
    triplets = importance["lora_E"].squeeze(-1) + vectors
    return triplets.flatten(0, -2).mean(0) if triplets.dim() > 1 else triplets


def orthogonality(parameters: Mapping[str, Tensor]) -> Tensor:
    """How far from orthogonal the two factors are: ``||Q Q^T - I|| + ||P^T P - I||``, in float32 or better.

    Frobenius norms, as in the authors' code and PEFT; the regularizer ``R(P, Q)`` of arXiv 2303.10512 has their
    squares. Of a stack, the mean.
    """
    a, b = (parameters[n].to(torch.promote_types(parameters[n].dtype, torch.float32)) for n in ("lora_A", "lora_B"))
    identity = torch.eye(a.shape[-2], dtype=a.dtype, device=a.device)
    gaps = (torch.linalg.matrix_norm(gram - identity) for gram in (a @ a.mT, b.mT @ b))
    return sum((gap.mean() for gap in gaps), start=a.new_zeros(()))
