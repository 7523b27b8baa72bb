"""Matrices of low rank in factored form, ``left @ right``, which are never multiplied out.

With ``left = P S`` and ``right^T = Q T`` (two thin QR decompositions) the singular values of ``left right [out, in]``
are those of the small ``S T^T``, at a cost of ``(out + in) k^2`` where forming the product would take ``out in k`` and
its decomposition ``out in min(out, in)``. Done in float64; leading dimensions are a stack's (experts).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lorafx.variants.inits import leading_singular


class Factors(NamedTuple):
    """``left [..., out, k]`` and ``right [..., k, in]``."""

    left: Tensor
    right: Tensor


Matrix = Factors | Tensor
"""A matrix ``[..., out, in]``, factored or not."""


@dataclass(frozen=True)
class Cut:
    """How much of a matrix to keep: ``rank`` directions, or the fewest with this share of its squared norm.

    ``niter`` asks for subspace iteration (arXiv 0909.4061, algorithm 4.4) with that many iterations in place of the
    exact decomposition of what is not factored: faster, a little off, and only with a ``rank``.
    """

    rank: int | None = None
    energy: float | None = None
    niter: int | None = None
    generator: torch.Generator | None = None

    def limited(self, rank: int) -> Cut:
        """The same, and at most this rank where nothing was asked for."""
        return replace(self, rank=rank) if self.rank is None and self.energy is None else self

    def of(self, singular: Tensor) -> int:
        """How many of the singular values ``[..., k]``, largest first, to keep. A stack has one rank for all."""
        if self.energy is None:
            return singular.shape[-1] if self.rank is None else min(self.rank, singular.shape[-1])
        squares = singular.double().square().flatten(0, -2).sum(0) if singular.dim() > 1 else singular.double().square()
        reached = squares.cumsum(0)
        if not reached.numel() or float(reached[-1]) == 0.0:
            return 0
        enough = int((reached < self.energy * reached[-1]).sum()) + 1
        return enough if self.rank is None else min(enough, self.rank)


def add(matrices: list[Matrix]) -> Matrix:
    """The sum: factored with the ranks added up if all are factored."""
    if all(isinstance(m, Factors) for m in matrices):
        lefts, rights = zip(*matrices, strict=True)
        return Factors(torch.cat(lefts, dim=-1), torch.cat(rights, dim=-2))
    return torch.stack([dense(m) for m in matrices]).sum(0)


def scaled(matrix: Matrix, factor: float) -> Matrix:
    """The matrix times a number."""
    return Factors(matrix.left * factor, matrix.right) if isinstance(matrix, Factors) else matrix * factor


def dense(matrix: Matrix) -> Tensor:
    """The matrix multiplied out, ``[..., out, in]``, in float64."""
    return matrix.left.double() @ matrix.right.double() if isinstance(matrix, Factors) else matrix.double()


def singular_values(matrix: Matrix) -> Tensor:
    """All singular values that can differ from zero, ``[..., k]``, largest first, in float64."""
    found: Tensor = torch.linalg.svdvals(_small(matrix) if isinstance(matrix, Factors) else matrix.double())
    return found


def norm(matrix: Matrix) -> float:
    """The Frobenius norm (of a stack: of all of it)."""
    small = _small(matrix) if isinstance(matrix, Factors) else matrix
    return float(torch.linalg.vector_norm(small, dtype=torch.float64))


def relative_error(found: Factors, wanted: Matrix) -> float:
    """``||found - wanted|| / ||wanted||``; 0 where both are zero."""
    size = norm(wanted)
    if isinstance(wanted, Factors):
        off = norm(add([_double(wanted), scaled(_double(found), -1.0)]))
    else:
        off = norm(wanted - dense(found))
    if size == 0.0:
        return 0.0 if off == 0.0 else math.inf
    return off / size


def factor(matrix: Matrix, cut: Cut) -> Factors:
    """The nearest matrix of the rank that ``cut`` keeps (Eckart-Young), in float64 or, not factored, in its dtype.

    Each side has the roots of the singular values.
    """
    u, s, vh = _decompose(matrix, cut)
    kept = cut.of(s)
    root = s[..., :kept].sqrt()
    return Factors(u[..., :kept] * root.unsqueeze(-2), root.unsqueeze(-1) * vh[..., :kept, :])


def _decompose(matrix: Matrix, cut: Cut) -> tuple[Tensor, Tensor, Tensor]:
    if isinstance(matrix, Factors):
        (p, s), (q, t) = (torch.linalg.qr(side.double()) for side in (matrix.left, matrix.right.mT))
        u, values, vh = torch.linalg.svd(s @ t.mT, full_matrices=False)
        return p @ u, values, vh @ q.mT
    if cut.niter is None or cut.rank is None:
        u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u, values, vh
    found = [leading_singular(m, cut.rank, cut.niter, cut.generator) for m in matrix.reshape(-1, *matrix.shape[-2:])]
    u, values, vh = (torch.stack(part) for part in zip(*found, strict=True))
    leading = matrix.shape[:-2]
    return u.reshape(*leading, *u.shape[1:]), values.reshape(*leading, -1), vh.reshape(*leading, *vh.shape[1:])


def _small(matrix: Factors) -> Tensor:
    """A matrix of at most ``k x k`` with the same singular values."""
    s, t = (torch.linalg.qr(side.double(), mode="r").R for side in (matrix.left, matrix.right.mT))
    small: Tensor = s @ t.mT
    return small


def _double(matrix: Factors) -> Factors:
    return Factors(matrix.left.double(), matrix.right.double())
