"""First values of the factors ``A [r, in]`` and ``B [out, r]``: one function and one line in ``INITS`` each.

Random ones leave ``B A = 0``. Those that take their factors from the weight itself, or from gradients, start at
``B A != 0``; the adapter then keeps a base of its own, ``W - s B A`` (:func:`less`), so that the layer's output is
unchanged but for one rounding of the weight. LoftQ starts from what a base format loses of the weight, with the base
that is stored then (:mod:`lorafx.passes.loftq`). Random numbers are drawn on the CPU in float32: a seed means the
same on every device.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor, nn

from lorafx.variants.base import StartRequest, full_precision

Factors = tuple[Tensor, Tensor]
"""A and B in float32 or better."""


@dataclass(frozen=True)
class Init:
    """A way to start, and where it can.

    ``changes_base`` says that ``B A`` is not zero, so that the base becomes ``W - s B A``. One that goes
    ``by_data`` starts as kaiming does until :func:`lorafx.initialize` has seen some. One of ``rounds`` needs a base
    format: so many times the base is stored and factors are taken from what that lost, before the adapter is there;
    they are handed to the start, and the base is not the adapter's own. ``largest_rank(out, in)`` and ``kinds`` limit
    the ranks and the kinds of layers (None: any); ``even`` asks for an even rank.
    """

    factors: Callable[[StartRequest], Factors]
    changes_base: bool = False
    by_data: bool = False
    rounds: int = 0
    largest_rank: Callable[[int, int], int] | None = None
    kinds: tuple[str, ...] | None = None
    even: bool = False

    def misfit(self, name: str, kind: str, shape: tuple[int, ...], r: int, shared: bool) -> str | None:
        """Why it cannot start a layer of this kind, and what to do; None if it can.

        ``shape`` is the weight's, ``[..., out, in]``; ``shared`` says that the weight has another use.
        """
        largest = None if self.largest_rank is None else self.largest_rank(shape[-2], shape[-1])
        if largest is not None and r > largest:
            return (
                f"init={name!r} has at most r={largest} for a weight of {shape[-2]} x {shape[-1]}, not r={r}: lower "
                "its rank (rank_pattern), or start it otherwise (a spec of its own)"
            )
        if self.even and r % 2:
            return f"init={name!r} splits the rank in two halves, and r={r} is odd: take an even one"
        if self.kinds is not None and kind not in self.kinds:
            return (
                f"init={name!r} looks at the activations that a linear layer multiplies, and this is of kind {kind!r}: "
                "leave it out (exclude_modules), or give it a spec of its own that starts otherwise"
            )
        if self.changes_base and shared:
            return (
                f"init={name!r} takes a part of the weight away, and the weight is also used elsewhere: start this "
                "layer otherwise (a spec of its own), or leave it out (exclude_modules)"
            )
        return None


def less(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """``W - s B A``, computed in float64 and rounded once, in the dtype and memory layout of ``W [..., out, in]``."""
    if weight.dim() > 2:  # one by one: the same bits as each matrix alone
        return torch.stack([less(*one, scaling) for one in zip(weight, a, b, strict=True)])
    return torch.empty_like(weight).copy_(weight.double() - scaling * (b.double() @ a.double()))


def _one_random(request: StartRequest, fill: Callable[[Tensor], Tensor]) -> Factors:
    """One factor as ``fill`` draws it and the other one zero."""
    out_features, in_features = request.weight.shape
    drawn_on = "meta" if request.weight.is_meta else "cpu"
    a = torch.empty((request.r, in_features), dtype=torch.float32, device=drawn_on)
    b = torch.empty((out_features, request.r), dtype=torch.float32, device=drawn_on)
    drawn, zero = (b, a) if request.sparse else (a, b)
    fill(drawn)
    zero.zero_()
    return a, b


def kaiming(request: StartRequest) -> Factors:
    """Uniform in +-1/sqrt(in) (Kaiming with a = sqrt(5), as in the authors' code for arXiv 2106.09685)."""
    if request.sparse:
        return _one_random(request, lambda t: nn.init.normal_(t, generator=request.generator))
    return _one_random(request, lambda t: nn.init.kaiming_uniform_(t, a=math.sqrt(5), generator=request.generator))


def gaussian(request: StartRequest) -> Factors:
    """Normal with deviation 1/r."""
    return _one_random(request, lambda t: nn.init.normal_(t, std=1.0 / request.r, generator=request.generator))


def orthogonal(request: StartRequest) -> Factors:
    """A and B random, and orthogonal to each other: the rank's directions are dealt out between them.

    PEFT's ``"orthogonal"`` (datta0.github.io/posts/rethink-lora-init), drawn in its order. ``B A`` is zero but for
    the rounding of A and B to the adapter's dtype, so the base stays as it is: elements of ``B A`` are of the
    order of ``eps / 100``.
    """
    out_features, in_features = request.weight.shape
    half = request.r // 2

    def draw(*shape: int) -> Tensor:
        if request.weight.is_meta:
            return torch.empty(shape, dtype=torch.float64, device="meta")
        return torch.randn(shape, dtype=torch.float32, generator=request.generator).double()

    basis, _ = torch.linalg.qr(draw(request.r, request.r))
    a = (draw(in_features, half) @ basis[0::2]).t() / 10
    b = draw(half, out_features).t() @ basis[1::2] / 10
    return a.contiguous(), b.contiguous()


def pissa(request: StartRequest, iterations: int | None = None) -> Factors:
    """The r largest singular values and their vectors: ``s B A = U S V`` (arXiv 2404.02948, eq. 2 and 3).

    With ``iterations`` the decomposition is :func:`leading_singular`'s, which is faster and a little off; the base
    that is left makes up for it.
    """
    if iterations is None:
        return nearest(request.weight, request.r, request.scaling)
    triplets = leading_singular(_wide(request.weight), request.r, iterations, request.generator)
    return _factors(*triplets, request.r, request.scaling)


def nearest(matrix: Tensor, r: int, scaling: float) -> Factors:
    """A and B for which ``s B A`` is the nearest of rank ``r`` to a matrix (or to each of a stack) in norm."""
    u, s, vh = torch.linalg.svd(_wide(matrix), full_matrices=False)
    return _factors(u, s, vh, r, scaling)


def _factors(u: Tensor, s: Tensor, vh: Tensor, r: int, scaling: float) -> Factors:
    """The first ``r`` of singular triplets, the value's root on both sides and the scaling divided out."""
    root = (s[..., :r] / scaling).sqrt()
    return root.unsqueeze(-1) * vh[..., :r, :], u[..., :r] * root.unsqueeze(-2)


def olora(request: StartRequest) -> Factors:
    """B the first r columns of Q and A the first r rows of R, for ``W = Q R`` (arXiv 2406.01775, algorithm 1)."""
    q, r = torch.linalg.qr(_wide(request.weight))
    return r[: request.r].contiguous(), q[:, : request.r].contiguous()


def leading_singular(
    matrix: Tensor, count: int, iterations: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The ``count`` largest singular triplets ``U [m, count]``, ``S [count]``, ``Vh [count, n]`` of a matrix.

    By subspace iteration from random directions, of which there are twice as many as are asked for and 8 more
    (arXiv 0909.4061, algorithm 4.4); exactly, where that would be as much work.
    """
    sampled = 2 * count + 8
    with full_precision(matrix):
        if sampled >= min(matrix.shape):
            u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
            return u[:, :count], s[:count], vh[:count]
        drawn_on = "meta" if matrix.is_meta else "cpu"
        directions = torch.randn((matrix.shape[1], sampled), device=drawn_on, generator=generator).to(matrix)
        basis, _ = torch.linalg.qr(matrix @ directions)
        for _ in range(iterations):
            basis, _ = torch.linalg.qr(matrix.mT @ basis)
            basis, _ = torch.linalg.qr(matrix @ basis)
        u, s, vh = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
        return basis @ u[:, :count], s[:count], vh[:count]


def _wide(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


#: By the name that ``LoraSpec.init`` selects it by.
INITS: Mapping[str, Init] = MappingProxyType(
    {
        "kaiming": Init(kaiming),
        "gaussian": Init(gaussian),
        "orthogonal": Init(orthogonal, even=True),
        "pissa": Init(pissa, changes_base=True, largest_rank=min),
        "olora": Init(olora, changes_base=True, largest_rank=min),
        "eva": Init(kaiming, by_data=True, largest_rank=lambda m, n: n, kinds=("linear", "addmm")),
        "lora_ga": Init(kaiming, by_data=True, changes_base=True, largest_rank=lambda m, n: min(m, n) // 2),
        "loftq": Init(kaiming, rounds=1, changes_base=True, largest_rank=min),
    }
)

#: The names above, and one of each of the families ``pissa_niter_<number of iterations>`` and ``loftq_<rounds>``.
NAMES = (*INITS, "pissa_niter_16", "loftq_5")


def find_init(name: str) -> Init | None:
    """The initialisation with this name; None if there is none."""
    if found := re.fullmatch(r"pissa_niter_(\d+)", name):
        iterations = int(found[1])
        return Init(lambda request: pissa(request, iterations), changes_base=True, largest_rank=min)
    if found := re.fullmatch(r"loftq_([2-9]|[1-9]\d+)", name):  # each number has one name
        return replace(INITS["loftq"], rounds=int(found[1]))
    return INITS.get(name)
