"""A packed weight with its adapters' updates folded in, as a tensor: ``W + sum over the adapters of (W' - W)``.

It keeps what the sum is made of. Whoever reads it gets the sum for as long as it reads, in one dense tensor to which a
panel at a time is added; autograd keeps the parts. Its gradient goes to the updates, a panel at a time too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from lorafx.bases.base import PANEL_BYTES
from lorafx.bases.ops import define_packed_op, describe, packed_rows
from lorafx.bases.tensor import QuantizedTensor
from lorafx.bases.view import Derived, is_cast_alone
from lorafx.variants.base import Update, full_precision, is_transformed

aten = torch.ops.aten

#: Elsewhere than on the CPU every panel waits for launches: there are no more than so many, and half as many again.
_PANELS = 16


def add_updates(matrix: Tensor, changes: Iterable[tuple[Update, Tensor | None]]) -> Tensor:
    """``W + sum over the updates of (W' - W)``, in the dtype that the operands promote to.

    Each update has with it the indices (int64, no two equal) of those rows of ``matrix [..., out, in]`` that it is of,
    or None: all of them.
    """
    total = matrix
    for update, mine in changes:
        part = matrix if mine is None else matrix.index_select(-2, mine)
        change = update.left @ update.right if update.gain is None else update.fold(part) - part
        if mine is None:
            total = total + change
        else:
            wide = torch.promote_types(total.dtype, change.dtype)
            total = total.to(wide).index_add(-2, mine, change.to(wide))
    return total


def folded(matrix: Tensor, changes: Sequence[tuple[Update, Tensor | None]]) -> Tensor:
    """:func:`add_updates` in the dtype of the matrix; of a packed one a tensor that reads as that sum."""
    if not isinstance(matrix, QuantizedTensor) or matrix.turned or is_transformed():
        return add_updates(matrix, changes).to(matrix.dtype)
    parts = [_of_all_rows(matrix, *change) for change in changes]
    flat = [tensor for update in parts for tensor in (update.left, update.right, update.gain)]
    total: Tensor = _Fold.apply(matrix, *flat)  # type: ignore[no-untyped-call]  # torch gives it no types
    return total


class FoldedTensor(Derived):
    """``base``, which is packed and not turned, with these updates of a stack (:func:`_of_all_rows`), in ``dtype``."""

    base: QuantizedTensor
    updates: list[Update]
    versions: list[int]

    @staticmethod
    def __new__(cls, base: QuantizedTensor, updates: list[Update], dtype: torch.dtype | None = None) -> FoldedTensor:
        made: FoldedTensor = Tensor._make_wrapper_subclass(
            cls, base.shape, strides=base.stride(), dtype=dtype or base.dtype, device=base.device, requires_grad=False
        )
        made.base, made.updates = base, updates
        made.versions = made._versions()
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch gives it no type
        """Without values."""
        return f"{type(self).__name__}({self.base!r}, {len(self.updates)} updates, dtype={self.dtype})"

    @property
    def origin(self) -> str:
        """What it is, for messages."""
        return f"{self.base.origin} and adapted"

    def dequantize(self) -> Tensor:
        """The dense sum."""
        return self.memory(0, self.numel())[0].view(self.shape)

    def memory(self, start: int, stop: int) -> tuple[Tensor, int]:
        """Of the rows that have these elements.

        Raises:
            RuntimeError: what it is made of was changed since it was made.
        """
        if self._versions() != self.versions:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{self.origin} is read again in the backward pass, and its adapters have been written to since the "
                "forward pass (optimizer.step, load_state_dict). Call backward before that"
            )
        width = self.shape[-1]
        first, last = start // width, -(-stop // width)
        found: Tensor = packed_folded(
            *_described(self.base), *_listed(self.updates), self.base.dtype, self.dtype, first, last
        )
        return found.view(-1), first * width

    def _versions(self) -> list[int]:
        held = [*self.base.packed.tensors.values(), *_flat(self.updates)]
        return [0 if tensor.is_inference() else tensor._version for tensor in held]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub lacks func
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (aten.detach.default, aten.alias.default):
            return args[0]._as(args[0].dtype)
        if func is aten._to_copy.default and is_cast_alone(args[0], kwargs or {}):
            return args[0]._as((kwargs or {})["dtype"])
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _as(self, dtype: torch.dtype) -> FoldedTensor:
        """The same in another dtype, for as long as this one could be read."""
        made = FoldedTensor(self.base, self.updates, dtype)
        made.versions = self.versions
        return made


class _Fold(torch.autograd.Function):
    """From a packed weight and each update's ``left``, ``right`` and ``gain`` (or None) to what reads as their sum."""

    @staticmethod
    def forward(ctx: Any, base: QuantizedTensor, *flat: Tensor | None) -> Tensor:
        ctx.base = base
        ctx.save_for_backward(*flat)
        total = FoldedTensor(base, [_each(update, Tensor.detach) for update in _updates(flat)])
        # What the compiler traces is to consist of tensors that it knows.
        return total.dequantize() if is_fake(base) else total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        base, flat = ctx.base, ctx.saved_tensors
        if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grad):  # as plain torch would
            with torch.enable_grad():
                total = add_updates(_stacked(base.dequantize()), [(update, None) for update in _updates(flat)])
                total = total.view(base.shape).to(base.dtype)
            wanted = [tensor for tensor in flat if tensor is not None and tensor.requires_grad]
            found = iter(
                torch.autograd.grad(total, wanted, grad, create_graph=torch.is_grad_enabled(), retain_graph=True)
            )
            return None, *(next(found) if t is not None and t.requires_grad else None for t in flat)
        of = iter(packed_folded_backward(*_described(base), *_listed(_updates(flat)), _stacked(grad)))
        return None, *(None if tensor is None else next(of) for tensor in flat)


def _of_all_rows(matrix: Tensor, update: Update, mine: Tensor | None) -> Update:
    """The update as one of a stack ``[n, out, in]`` and of all rows: of others than ``mine`` it changes nothing."""
    *stack, out, _ = matrix.shape
    left, right, gain = update.left, update.right, update.gain
    if mine is not None:
        left = left.new_zeros(*left.shape[:-2], out, left.shape[-1]).index_copy(-2, mine, left)
        gain = None if gain is None else gain.new_ones(*gain.shape[:-1], out).index_copy(-1, mine, gain)
    left, right = (t.expand(*stack, *t.shape[-2:]).reshape(-1, *t.shape[-2:]) for t in (left, right))
    return Update(left, right, None if gain is None else gain.expand(*stack, out).reshape(-1, out))


def _stacked(matrix: Tensor) -> Tensor:
    return matrix.reshape(-1, *matrix.shape[-2:])


def _updates(flat: Sequence[Any]) -> list[Update]:
    return [Update(*flat[i : i + 3]) for i in range(0, len(flat), 3)]


def _rows_of(update: Update, matrices: slice, rows: slice) -> Update:
    """A view of it."""
    gain = None if update.gain is None else update.gain[matrices, rows]
    return Update(update.left[matrices, rows], update.right[matrices], gain)


def _each(update: Update, of: Callable[[Tensor], Tensor]) -> Update:
    return Update(of(update.left), of(update.right), None if update.gain is None else of(update.gain))


def _listed(updates: Sequence[Update]) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
    """As the operators take them."""
    return [u.left for u in updates], [u.right for u in updates], [u.gain for u in updates]


def _flat(updates: Sequence[Update]) -> list[Tensor]:
    """The tensors of each, one update after the other."""
    return [t for u in updates for t in (u.left, u.right, u.gain) if t is not None]


def _described(base: QuantizedTensor) -> tuple[list[Tensor], str, list[int], torch.dtype]:
    return describe(base.packed)


# The operators


class _Panels:
    """A packed stack of matrices and its updates, of which some rows are dense at a time."""

    def __init__(self, packed: Sequence[Any], updates: Sequence[Update], own: torch.dtype) -> None:
        self.packed, self.updates, self.own, self.wide = packed, updates, own, own
        tensors, _, (total, self.width, *_), _ = packed
        self.height = total // len(updates[0].left)
        for tensor in _flat(updates):
            self.wide = torch.promote_types(self.wide, tensor.dtype)
        rows = PANEL_BYTES // (self.width * self.wide.itemsize)
        self.step = max(1, rows if tensors[0].is_cpu else max(rows, total // _PANELS))

    def places(self, start: int, stop: int) -> Iterator[tuple[slice, slice]]:
        """The matrices and the rows of them of each panel: a part of one matrix, or whole ones."""
        while start < stop:
            matrix, row = divmod(start, self.height)
            whole = min(self.step, stop - start) // self.height if row == 0 else 0
            rows = slice(0, self.height) if whole else slice(row, min(row + min(self.step, stop - start), self.height))
            yield slice(matrix, matrix + max(1, whole)), rows
            start += max(1, whole) * (rows.stop - rows.start)

    def values(self, matrices: slice, rows: slice) -> Tensor:
        """The weight itself, ``[matrices, rows, width]``."""
        last = (matrices.stop - 1) * self.height + rows.stop
        found: Tensor = packed_rows(*self.packed, matrices.start * self.height + rows.start, last)
        found = found.view(matrices.stop - matrices.start, -1, self.width)
        return found.to(self.own).to(self.wide)

    def part(self, update: Update, matrices: slice, rows: slice) -> Update:
        """The update of these rows."""
        return _each(_rows_of(update, matrices, rows), lambda tensor: tensor.to(self.wide))


def _folded(*arguments: Any) -> Tensor:
    *packed, left, right, gain, own, to, start, stop = arguments
    panels = _Panels(packed, [*map(Update, left, right, gain)], own)
    found: Tensor = torch.empty(stop - start, panels.width, dtype=to, device=left[0].device)
    at = 0
    for matrices, rows in panels.places(start, stop):
        changes = [(panels.part(update, matrices, rows), None) for update in panels.updates]
        with full_precision(found):
            panel = add_updates(panels.values(matrices, rows), changes).to(own).view(-1, panels.width)
        found[at : at + len(panel)] = panel
        at += len(panel)
    return found


def _fake_folded(*arguments: Any) -> Tensor:
    *_, layout, _, left, _, _, _, to, start, stop = arguments
    found: Tensor = left[0].new_empty(stop - start, layout[1], dtype=to)
    return found


def _backward(*arguments: Any) -> list[Tensor]:
    *packed, left, right, gain, grad = arguments
    updates = [*map(Update, left, right, gain)]
    panels = _Panels(packed, updates, grad.dtype)
    exact = torch.promote_types(panels.wide, torch.float32)  # in which panels are summed
    found = [_each(update, lambda t: torch.zeros_like(t, dtype=exact)) for update in updates]
    for matrices, rows in panels.places(0, prod(grad.shape[:-1])):
        parts = [panels.part(update, matrices, rows) for update in updates]
        values = panels.values(matrices, rows) if any(part.gain is not None for part in parts) else None
        with full_precision(grad):
            for part, sums in zip(parts, found, strict=True):
                _add_gradients(grad[matrices, rows].to(panels.wide), values, part, _rows_of(sums, matrices, rows))
    return [sums.to(given.dtype) for given, sums in zip(_flat(updates), _flat(found), strict=True)]


def _add_gradients(dw: Tensor, values: Tensor | None, part: Update, sums: Update) -> None:
    """Of a panel ``gain * (W + left right)`` with the gradient ``dw``, to the sums of these rows."""
    down, left = dw @ part.right.mT, part.left
    if part.gain is not None and sums.gain is not None and values is not None:
        exact = sums.gain.dtype
        sums.gain.add_((dw * values).sum(-1, dtype=exact) + (down * left).sum(-1, dtype=exact))
        down, left = part.gain.unsqueeze(-1) * down, part.gain.unsqueeze(-1) * left
    sums.left.add_(down)
    sums.right.add_(left.mT @ dw)


def _fake_backward(*arguments: Any) -> list[Tensor]:
    *_, left, right, gain, _ = arguments
    return [torch.empty_like(t) for t in _flat([*map(Update, left, right, gain)])]


_UPDATES = "Tensor[] left, Tensor[] right, Tensor?[] gain"
#: Rows ``start`` to ``stop``, rounded to the weight's dtype ``own`` and cast to another. ``left [n, out, r]``,
#: ``right [n, r, in]`` and ``gain [n, out]`` are of the matrices of a stack.
packed_folded = define_packed_op(
    "packed_folded", f"{_UPDATES}, ScalarType own, ScalarType to, int start, int stop", "Tensor", _folded, _fake_folded
)
#: The gradients of each update's ``left``, ``right`` and ``gain`` if it has one, from that of the sum ``[n, out, in]``.
packed_folded_backward = define_packed_op(
    "packed_folded_backward", f"{_UPDATES}, Tensor grad", "Tensor[]", _backward, _fake_backward
)
