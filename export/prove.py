"""Proving, from the files alone, that an ONNX file is another one with an adapter merged into it.

The graphs must be equal, message by message, and every initializer must either have the base's bits or be what the
adapter makes of it. With ``E = gain * (W + left right)`` in float64, a stored ``W'`` is right if for each element

    |W' - E|  <=  ulp(E) / 2  +  slack

where ``ulp(E)`` is the distance of two numbers of the dtype about E, and ``slack`` what the arithmetic of a merge may
lose before it rounds, with its machine epsilon ``eps`` (of float32 for float16 and bfloat16, of float64 for float32):

    slack  =  (r + 2) eps (|W| + |left| |right|) (1 + |gain|)                      the r products, the sums
           +  2 (r + sqrt(in)) eps (|w| + |left| |right|)^2 / |w + l right|^2 |E|  a gain's norm of each row

(a sum of n products is off by at most n eps of its absolute terms; a norm's, of thousands, by some sqrt(n) eps).
A merge in float32 arithmetic of float32 weights, as PEFT's, loses some r units in the last place and is not accepted.

Of a tensor that no adapter changes any flipped bit is seen. Of one that is changed, moving an element by one unit in
the last place is seen if that leaves the half unit about E, which it does unless E is within ``slack`` of the middle of
two numbers: ``Proof.seen`` is the smallest share of elements, among all tensors, for which it does.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorafx.adapter_files import IN, OUT, RANK, StoredAdapter
from lorafx.errors import ParityError
from lorafx.export.diff import graph_difference
from lorafx.export.edits import Change, Replacement, Update, find_changes, wide_dtype
from lorafx.export.onnx_file import OnnxFile, read_onnx
from lorafx.variants import VARIANTS

#: About how many elements of a matrix are held in float64 at once: few enough to stay in a processor's cache.
PANEL = 2**18
#: The bits of a float64 that are its exponent.
_EXPONENT = 0x7FF0000000000000


@dataclass(frozen=True)
class TensorProof:
    """How far a merged initializer is from what it should be.

    ``error`` is the largest ``|W' - E|`` over what is allowed there; at most 1 is right. ``seen`` is the share of its
    elements of which a change by one unit in the last place would fail.
    """

    name: str
    change: str
    error: float
    seen: float


@dataclass(frozen=True)
class Proof:
    """What :func:`verify_onnx` found: ``failure`` is None where the file is proved."""

    merged: tuple[TensorProof, ...]
    unchanged: int
    failure: str | None = None

    @property
    def passed(self) -> bool:
        """Whether the file is the base with the adapter merged, and nothing else."""
        return self.failure is None

    @property
    def worst(self) -> TensorProof | None:
        """The merged tensor that comes closest to what is allowed, or exceeds it."""
        return max(self.merged, key=lambda t: t.error, default=None)

    @property
    def seen(self) -> float:
        """The smallest share of a merged tensor's elements of which a change of the last bit would be seen."""
        return min((t.seen for t in self.merged), default=1.0)

    def raise_if_failed(self) -> None:
        """Raise :class:`ParityError` with ``failure``, if there is one."""
        if self.failure is not None:
            raise ParityError(f"the file is not the base with the adapter merged: {self.failure}")

    def __str__(self) -> str:
        if self.failure is not None:
            return f"NOT PROVED: {self.failure}"
        text = f"same graph; {self.unchanged} initializers have the base's bits, {len(self.merged)} are merged"
        if self.worst is not None:
            text += (
                f": at most {self.worst.error:.4f} of what rounding allows ('{self.worst.name}'); a flipped last bit "
                f"would be seen in {self.seen:.4%} of the elements or more"
            )
        return text


def verify_onnx(
    merged: str | os.PathLike[str],
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    *,
    progress: Callable[[float], None] = lambda done: None,
) -> Proof:
    """Prove that ``merged`` is ``base`` with the adapter merged into it, and nothing else, from the files alone.

    See :mod:`lorafx.export.prove` for what is allowed. ``progress`` is called with the share of the initializers done.

    Raises:
        ExportError: a file cannot be read, or is damaged.
        AdapterError: the adapter does not fit the base. That ``merged`` is something else is no error: see
            :attr:`Proof.failure`.
    """
    first, second = read_onnx(merged), read_onnx(base)
    changes = find_changes(second, StoredAdapter.read(Path(adapter)), str(adapter))
    return prove(first, second, changes, progress)


def prove(merged: OnnxFile, base: OnnxFile, changes: Sequence[Change], progress: Callable[[float], None]) -> Proof:
    """See :func:`verify_onnx`."""
    if (difference := graph_difference(merged, base)) is not None:
        return Proof((), 0, f"the graphs differ: {difference}")
    expected = {change.name: change for change in changes}
    proofs: list[TensorProof] = []
    failures: list[str] = []
    unchanged = 0
    for index, (name, source) in enumerate(base.sources.items()):
        found = merged.sources[name]
        if name in expected:
            proof = _prove_tensor(expected[name], source.tensor(), found.tensor())
            proofs.append(proof)
            if not proof.error <= 1.0:
                failures.append(
                    f"initializer '{name}' ({proof.change}) is off by {proof.error:.4g} times what is allowed"
                )
        elif not source.same_bytes(found):
            failures.append(f"initializer '{name}' is not the base's, and the adapter does not change it")
        else:
            unchanged += 1
        progress((index + 1) / len(base.sources))
    more = f" (and {len(failures) - 5} more)" if len(failures) > 5 else ""
    return Proof(tuple(proofs), unchanged, "; ".join(failures[:5]) + more if failures else None)


def _prove_tensor(change: Change, base: Tensor, merged: Tensor) -> TensorProof:
    error, unseen = 0.0, 0
    for exact, slack, found in _panels(change, base, merged):
        unit = _unit(exact, merged.dtype)
        allowed = unit / 2 + slack
        off = (found.double() - exact).abs()
        error = max(error, float(torch.nan_to_num(off / allowed, nan=math.inf, posinf=math.inf).max()))
        # The neighbour that is closer to E than the other is one unit away from what is stored.
        unseen += int((_unit(found.double(), merged.dtype) - off <= allowed).sum())
    return TensorProof(change.name, str(change.edit), error, 1.0 - unseen / max(1, merged.numel()))


def _unit(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of two numbers of a dtype about each element, in float64."""
    limits = torch.finfo(dtype)
    power = (exact.view(torch.int64) & _EXPONENT).view(torch.float64)  # 2 ** floor(log2 |E|)
    return power.clamp_min_(limits.tiny).mul_(limits.eps)


def _panels(change: Change, base: Tensor, merged: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """What some elements should be, in float64, what the arithmetic may lose there, and what they are."""
    edit, eps = change.edit, torch.finfo(wide_dtype(base.dtype)).eps
    if not base.numel():
        return
    if isinstance(edit, Replacement):
        exact = edit.exact(base, torch.float64)
        yield exact, (0.0 if edit.shift is None else 4 * eps) * (base.double().abs() + exact.abs()), merged
        return
    whole, found = edit.matrix(base), edit.matrix(merged)
    step = max(1, PANEL // whole.shape[1])
    for first in range(0, len(whole), step):
        rows = slice(first, min(first + step, len(whole)))
        yield (*_updated(edit, whole, rows, eps), found[rows])


def _updated(edit: Update, whole: Tensor, rows: slice, eps: float) -> tuple[Tensor, Tensor]:
    """Rows of a merged matrix in float64, and the slack. Independent of the code that merges."""
    variant, weight = VARIANTS[edit.site.variant], whole[rows].double()
    if edit.site.rows is not None:
        given = torch.tensor(edit.site.rows)
        mine = (given >= rows.start) & (given < rows.stop)
        exact = weight.index_copy(0, given[mine] - rows.start, edit.tensors[0][mine].double())
        return exact, torch.zeros_like(exact)
    names = (*variant.parameters, *variant.shared)
    tensors = {n: t.double() for n, t in zip(names, edit.tensors, strict=True)}
    if variant.scales_rows:
        shapes = variant.shapes(OUT, IN, RANK)
        tensors = {n: t[rows] if shapes[n][0] == OUT else t for n, t in tensors.items()}
        update = variant.update(weight, tensors, edit.site.scaling)
        left = update.left
    else:  # what it makes of the weight does not depend on the weight
        update = variant.update(torch.empty(whole.shape, device="meta"), tensors, edit.site.scaling)
        left = update.left[rows]
    sizes = torch.addmm(weight.abs(), left.abs(), update.right.abs())
    exact = torch.addmm(weight, left, update.right)
    r = edit.site.r + 2
    if update.gain is None:
        return exact, r * eps * sizes
    gain = update.gain.unsqueeze(-1)
    ratio = sizes.square().sum(1, keepdim=True) / exact.square().sum(1, keepdim=True).clamp_min(1e-300)
    lost = 2 * (edit.site.r + math.sqrt(weight.shape[1])) * eps * ratio
    return gain * exact, (1 + gain.abs()) * r * eps * sizes + lost * (gain * exact).abs()
