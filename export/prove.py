"""Proving, from the files alone, that an ONNX file is another one with an adapter merged into it.

The graphs must be equal, message by message, and every initializer must either have the base's bits or be what the
adapter makes of it. With ``E = g (W + L R)`` in float64, a stored ``W'`` is right if for each element

    |W' - E|  <=  ulp(E) / 2  +  slack

where ``ulp(E)`` is the distance of two numbers of the dtype about E, and ``slack`` what the arithmetic of a merge can
lose before it rounds. Its unit roundoff is u: that of float32 (2^-24) for float16 and bfloat16, of float64 (2^-53) for
float32. With absolute values for E, W, L, R and g (1 where there is no gain), and s for the rows of W + L R:

    the factors of L and R, made of an adapter's tensors by at most 6 roundings       6 u L R
    a product of r terms, in any order (Higham, Accuracy and Stability, section 3.1)  r u L R
    the sum                                                                           u (E / g)
    with a gain: the gain rounded, times the sum, less W, and W added again           u (E + E + (E + W) + E)
    the gain itself, m / |w + l R| in float64                                         c E

                        slack  =  u (g (r + 6) L R + E)  [+ u (4 E + W) + c E]

A gain is worked out from ``|w + l R|^2 = |w|^2 + 2 l (R w) + l (R R^T) l``, sums of products whose absolute terms add
up to |s|^2, so that with n columns c is at most ``(n + 2 r + 8) 2^-53 |s|^2 / |w + l R|^2`` (the root halves it, and
ours is off as well). Terms of second order are less than 1 % of these for r < 10^5. For float32 the arithmetic here
loses as much as that of the merge, and slack is twice that.

A merge in float32 arithmetic of float32 weights, as PEFT's, loses some r units in the last place and is not accepted;
nor is one of half-precision weights whose gain was worked out in less than float64.

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
from lorafx.export.changes import Changes, find_changes
from lorafx.export.diff import graph_difference
from lorafx.export.edits import Change, Replacement, Update, wide_dtype
from lorafx.export.onnx_file import OnnxFile, read_onnx
from lorafx.variants import VARIANTS

#: About how many elements of a matrix are held in float64 at once: few enough to stay in a processor's cache.
PANEL = 2**18
#: For terms of second order, and how many roundings an adapter's tensors go through before they are multiplied.
_MORE, _FACTORS = 1.01, 6
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
    """What :func:`verify_onnx` found: ``failure`` is None where the file is proved.

    ``absent`` is what of the adapter is not in the file, which is a part of the model.
    """

    merged: tuple[TensorProof, ...]
    unchanged: int
    failure: str | None = None
    absent: tuple[str, ...] = ()

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
        if self.absent:
            text += f". {len(self.absent)} parts of the adapter are not in this part of the model"
        return text


def verify_onnx(
    merged: str | os.PathLike[str],
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    *,
    part: str | None = None,
    progress: Callable[[float], None] = lambda done: None,
) -> Proof:
    """Prove that ``merged`` is ``base`` with the adapter merged into it, and nothing else, from the files alone.

    See :mod:`lorafx.export.prove` for what is allowed, and :func:`lorafx.merge_onnx` for ``part``. ``progress`` is
    called with the share of the initializers done.

    Raises:
        ExportError: a file cannot be read, or is damaged.
        AdapterError: the adapter does not fit the base. That ``merged`` is something else is no error: see
            :attr:`Proof.failure`.
    """
    first, second = read_onnx(merged), read_onnx(base)
    changes = find_changes(second, StoredAdapter.read(Path(adapter)), str(adapter), part)
    return prove(first, second, changes, progress)


def prove(merged: OnnxFile, base: OnnxFile, found: Changes, progress: Callable[[float], None]) -> Proof:
    """See :func:`verify_onnx`."""
    if (difference := graph_difference(merged, base)) is not None:
        return Proof((), 0, f"the graphs differ: {difference}")
    expected = {change.name: change for change in found.changes}
    proofs: list[TensorProof] = []
    foreign: list[str] = []
    rounded: set[torch.dtype] = set()
    unchanged = 0
    for index, (name, source) in enumerate(base.sources.items()):
        other = merged.sources[name]
        if name in expected:
            tensor = source.tensor()
            proofs.append(_prove_tensor(expected[name], tensor, other.tensor()))
            if tensor.dtype.itemsize < 4 and not proofs[-1].error <= 1.0:
                rounded.add(tensor.dtype)
        elif not source.same_bytes(other):
            foreign.append(f"initializer '{name}' is not the base's, and the adapter does not change it")
        else:
            unchanged += 1
        progress((index + 1) / len(base.sources))
    hints = [
        f"if the base was rounded to {dtype} when it was exported, a merge of what it was before is another file than "
        "this: prove files that were exported in the dtype of the model, or what merge_onnx makes of the base"
        for dtype in rounded
    ]
    failures = [f for f in (_shortened(_off(proofs)), _shortened(foreign), *hints) if f]
    return Proof(tuple(proofs), unchanged, "; ".join(failures) or None, found.absent)


def _off(proofs: Sequence[TensorProof]) -> list[str]:
    """The merged initializers that are not what they should be, the worst first."""
    wrong = sorted((p for p in proofs if not p.error <= 1.0), key=lambda p: p.error, reverse=True)
    found = [f"initializer '{p.name}' ({p.change}) is off by {p.error:.4g} times what is allowed" for p in wrong]
    return [f"{found[0]}, the worst of {len(found)}", *found[1:]] if len(found) > 1 else found


def _shortened(failures: Sequence[str]) -> str:
    return "; ".join(failures[:4]) + (f" (and {len(failures) - 4} more)" if len(failures) > 4 else "")


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
    edit, wide = change.edit, wide_dtype(base.dtype)
    lost = _MORE * torch.finfo(wide).eps * (1.0 if wide is torch.float64 else 0.5)  # u, ours included
    if not base.numel():
        return
    if isinstance(edit, Replacement):
        exact = edit.exact(base, torch.float64)
        shifted = 0.0 if edit.shift is None else (edit.shift.double() * edit.scaling).abs()
        yield exact, _MORE * torch.finfo(torch.float64).eps * (shifted + exact.abs()) * (edit.shift is not None), merged
        return
    whole, found = edit.matrix(base), edit.matrix(merged)
    step = max(1, PANEL // whole.shape[1])
    for first in range(0, len(whole), step):
        rows = slice(first, min(first + step, len(whole)))
        yield (*_updated(edit, whole, rows, lost), found[rows])


def _updated(edit: Update, whole: Tensor, rows: slice, lost: float) -> tuple[Tensor, Tensor]:
    """Rows of a merged matrix in float64, and the slack. Independent of the code that merges."""
    variant, weight = VARIANTS[edit.site.variant], whole[rows].double()
    if edit.site.rows is not None:
        given = torch.tensor(edit.site.rows)
        mine = (given >= rows.start) & (given < rows.stop)
        places = given[mine] - rows.start
        exact = weight.index_copy(0, places, edit.tensors[0][mine].double())
        slack = torch.zeros_like(exact)  # a change is added to what was there: u (|W' - W| + |W'|)
        slack[places] = lost * (2 * exact[places].abs() + weight[places].abs())
        return exact, slack
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
    product = left.abs() @ update.right.abs()
    exact = torch.addmm(weight, left, update.right)
    r = edit.site.r + _FACTORS
    if update.gain is None:
        return exact, lost * (r * product + exact.abs())
    gain = update.gain.unsqueeze(-1)
    sizes = (weight.abs() + product).square().sum(1, keepdim=True)
    ratio = sizes / exact.square().sum(1, keepdim=True).clamp_min(1e-300)
    terms = weight.shape[1] + 2 * edit.site.r + 8
    exact = gain * exact
    relative = 5 * lost + _MORE * terms * torch.finfo(torch.float64).eps / 2 * ratio
    return exact, lost * (gain.abs() * r * product + weight.abs()) + relative * exact.abs()
