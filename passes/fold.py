"""Fold: the weight of a layer with the updates of its adapters in it, a panel at a time, so that no whole one is held.

    W'[rows, columns] = round( W[rows, columns] + sum over the sites of the update's part there )

Each weight is computed in float32 or better (float64 where it, or what it is written as, has four bytes or more; the
factor that DoRA has for each row always in float64) and rounded once. What a matrix product rounds to depends on its
operands' shapes and on the number of threads, so the products are always those of the same tiles, by one thread each: a
panel has, bit for bit, the values of the whole. Threads share out the panels instead.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NoReturn, TypeVar

import torch
from torch import Tensor

from lorafx.bases import FORMATS
from lorafx.bases.ops import describe, packed_rows
from lorafx.bases.tensor import QuantizedTensor, quantized
from lorafx.errors import MergeError, NotFiniteError
from lorafx.folded import add_updates
from lorafx.graph import CapturedModule
from lorafx.ir import Site
from lorafx.kernels.cpu.build import load_built
from lorafx.kernels.rounding import Rounding, all_finite
from lorafx.ops import STORAGE, updates
from lorafx.passes.samples import refuse_changed
from lorafx.variants import VARIANTS
from lorafx.variants.base import Update

P = TypeVar("P")
R = TypeVar("R")

#: Rows and columns of a tile: its operands and results stay in a processor's cache.
TILE = 512
#: Stand for the sizes of a matrix in the shapes of its variant's tensors.
_OUT, _IN, _RANK = -1, -2, -3


@dataclass(eq=False)
class Fold:
    """One weight with the updates of ``sites`` (of one layer, or bare parameter) folded in; computed when asked for.

    ``weight`` is the base's, as it is stored, and is not read before; of one in a base format some rows at a time are
    dequantised. ``tensors`` are the sites', in the order in which operators take them; ``dtype`` is the result's. While
    there is a ``rounding``, panels are counted in it. ``trained`` is the weight that the sites were trained on, where
    it is another one, on the device of their tensors: DoRA's gain ``m / ||W + s B A||`` is worked out from it.
    """

    sites: tuple[Site, ...]
    weight: Tensor
    tensors: tuple[tuple[Tensor, ...], ...]
    dtype: torch.dtype
    rounding: Rounding | None = field(default=None)
    trained: Tensor | None = None

    @classmethod
    def of(cls, gm: CapturedModule, found: Sequence[Site], weight: Tensor, dtype: torch.dtype | None = None) -> Fold:
        """The fold of these sites of ``gm`` into their layer's weight, in ``dtype`` (None: the weight's).

        Raises:
            MergeError: an adapter holds NaN or Inf; or the base was overwritten after apply.
        """
        for site in found:
            for name, value in site.parameters(gm).items():
                if not value.is_meta and not bool(torch.isfinite(value).all()):
                    raise MergeError(
                        f"site '{site.name}': {name} holds NaN or Inf, so it cannot be folded. Training diverged: go "
                        "back to an earlier adapter, or lower the learning rate"
                    )
        refuse_changed(gm, found[0])
        tensors = tuple(tuple(t.detach() for t in s.tensors(gm).values()) for s in found)
        return cls(tuple(found), weight, tensors, weight.dtype if dtype is None else dtype)

    @property
    def shape(self) -> torch.Size:
        """The stored weight's."""
        return self.weight.shape

    @property
    def device(self) -> torch.device:
        """The result's."""
        return (self.weight if self.trained is None else self.trained).device

    def compute(self, order: Sequence[int] | None = None) -> Tensor:
        """The whole weight, in the layout of the base's, with its dimensions in this order (None: as they are).

        Raises:
            MergeError: it overflows its dtype.
            NotFiniteError: ``weight`` holds NaN or Inf.
        """
        shape = self.shape if order is None else [self.shape[dim] for dim in order]
        result = torch.empty(shape, dtype=self.dtype, device=self.device)
        flat, start = result.view(-1), 0
        for panel in self.panels(order):
            flat[start : start + panel.numel()].copy_(panel.reshape(-1))
            start += panel.numel()
        return result

    def requantize(self, like: QuantizedTensor) -> QuantizedTensor:
        """The weight, rounded to its dtype, in the format of ``like`` with its settings. Meanwhile it is held dense.

        Raises:
            MergeError, NotFiniteError: as :meth:`compute`.
        """
        packed, dims = like.packed, range(len(self.shape))
        again = FORMATS[packed.format].quantize(
            self.compute((*dims[:-2], dims[-1], dims[-2]) if like.turned else None),
            block_size=packed.block_size,
            double_quant=packed.double_quant,
            where=f"'{self.sites[0].weight}' with its adapters merged",
        )
        return QuantizedTensor(again, like.turned)

    def panels(self, order: Sequence[int] | None = None) -> Iterator[Tensor]:
        """The weight in pieces, contiguous and in the order in which memory holds it.

        Args:
            order: of the stored weight with its dimensions in this order (None: as they are).

        Raises:
            MergeError, NotFiniteError: as :meth:`compute`.
        """
        load_built()
        storage = STORAGE[self.sites[0].kind]
        matrix = storage.matrix(self.weight)
        order = tuple(range(len(self.shape))) if order is None else tuple(order)
        swapped = _swaps_last(order)
        if swapped is None or (swapped and len(self.shape) != matrix.dim()):
            yield self.compute().permute(order).contiguous()
            return
        turned = swapped != self.sites[0].transposed  # whether a panel holds columns of the matrix
        with one_thread():
            changes = self._changes(matrix)
        *stack, height, width = matrix.shape

        def make(place: tuple[tuple[int, ...], int]) -> tuple[Tensor, Rounding]:
            counted = Rounding()
            return self._panel(matrix, changes, *place, turned, counted), counted

        starts = range(0, width if turned else height, TILE)
        for panel, counted in _in_threads(make, [*itertools.product(itertools.product(*map(range, stack)), starts)]):
            if self.rounding is not None:
                self.rounding.include(counted)
            yield panel

    def _panel(
        self,
        matrix: Tensor,
        changes: list[tuple[Update, Tensor | None]],
        index: tuple[int, ...],
        first: int,
        turned: bool,
        counted: Rounding,
    ) -> Tensor:
        """``TILE`` rows of a matrix of the stack, or columns, transposed; from the one with this number on."""
        height, width = matrix.shape[-2:]
        long, short = (height, width) if turned else (width, height)
        panel = torch.empty((min(TILE, short - first), long), dtype=self.dtype, device=self.device)
        mine = slice(first, min(first + TILE, short))
        strip = None if turned else _rows(matrix, index, mine)
        for start in range(0, long, TILE):
            other = slice(start, min(start + TILE, long))
            if strip is None:
                base = _rows(matrix, index, other)[:, mine]
                self._tile(panel[:, other].t(), base, changes, index, other, mine, counted)
            else:
                self._tile(panel[:, other], strip[:, other], changes, index, mine, other, counted)
        return panel

    def _tile(
        self,
        out: Tensor,
        stored_base: Tensor,
        changes: list[tuple[Update, Tensor | None]],
        index: tuple[int, ...],
        rows: slice,
        columns: slice,
        counted: Rounding,
    ) -> None:
        stored_base = stored_base.to(self.device)
        parts = [part for change in changes if (part := _part(*change, index, rows, columns)) is not None]
        if len(parts) == 1 and parts[0][1] is None and parts[0][0].gain is None:  # the usual case, with one pass less
            values, added = parts[0][0].left @ parts[0][0].right, True
        else:
            values, added = add_updates(stored_base.to(self._wide), parts), False
        if not (out.is_meta or counted.round(out, values, stored_base, added=added) or all_finite(out)):
            self._refuse()

    def _refuse(self) -> NoReturn:
        """Say why a tile is not finite: of the whole weight, since the factor of a row is made of all of it."""
        matrix = STORAGE[self.sites[0].kind].matrix(self.weight)
        *stack, height, _ = matrix.shape
        for index, first in itertools.product(itertools.product(*map(range, stack)), range(0, height, TILE)):
            if not all_finite(_rows(matrix, index, slice(first, min(first + TILE, height)))):
                raise NotFiniteError(self.sites[0].weight)
        raise MergeError(
            f"site '{self.sites[0].name}': the merged weight does not fit in {self.dtype} (it overflows to "
            "Inf). Merge into a wider copy of the model, or lower the adapter's scaling"
        )

    @property
    def _wide(self) -> torch.dtype:
        return torch.float64 if max(self.weight.dtype.itemsize, self.dtype.itemsize) >= 4 else torch.float32

    def _changes(self, matrix: Tensor) -> list[tuple[Update, Tensor | None]]:
        """The updates, each with the rows of the matrix that it is for (None: all)."""
        changes: list[tuple[Update, Tensor | None]] = []
        for site, tensors in zip(self.sites, self.tensors, strict=True):
            rows = None if site.rows is None else site.index(matrix)
            part = matrix if rows is None else matrix.index_select(-2, rows)
            if VARIANTS[site.variant].scales_rows:
                if site.rows is None:
                    trained = part if self.trained is None else STORAGE[site.kind].matrix(self.trained)
                    changes.append((scaled_rows(site, trained, tensors, self._wide), rows))
                    continue
                part = part.to(self._wide)  # single rows of an embedding, trained whole
            wide = [t.to(self._wide) for t in tensors]
            changes += [(update, rows) for update in updates(part, wide, [site.variant], [site.scaling])]
        return changes


def scaled_rows(site: Site, matrix: Tensor, tensors: Sequence[Tensor], wide: torch.dtype) -> Update:
    """The update of a site that scales rows: its gain is worked out in float64, some rows at a time, and rounded once.

    (A layer that runs in half precision has the norm of what it multiplies, with A rounded.)
    """
    variant = VARIANTS[site.variant]
    given = {n: t.double() for n, t in zip((*variant.parameters, *variant.shared), tensors, strict=True)}
    shapes = variant.shapes(_OUT, _IN, _RANK)
    along = {n: shapes[n].index(_OUT) - len(shapes[n]) for n in variant.parameters if _OUT in shapes[n]}
    parts = []
    for first in range(0, max(1, matrix.shape[-2]), TILE):
        count = min(TILE, matrix.shape[-2] - first)
        mine = {n: t.narrow(along[n], first, count) if n in along else t for n, t in given.items()}
        rows = _rows(matrix, (), slice(first, first + count))
        rows = rows.double().contiguous()  # what a sum rounds to depends on the layout
        parts.append(variant.update(rows, mine, site.scaling))
    gains = [part.gain for part in parts if part.gain is not None]
    left = torch.cat([part.unscaled for part in parts], -2)
    return Update(left.to(wide), parts[0].right.to(wide), torch.cat(gains, -1).to(wide), scaling=site.scaling)


def _rows(matrix: Tensor, index: tuple[int, ...], rows: slice) -> Tensor:
    """Some rows of a matrix of the stack, or with an empty index of each; of a packed one only they are dequantised."""
    packed = quantized(matrix)
    if packed is None or len(index) != matrix.dim() - 2:
        return matrix[index][..., rows, :]
    first = 0
    for i, size in zip(index, matrix.shape, strict=False):
        first = first * size + i
    first *= matrix.shape[-2]
    found: Tensor = packed_rows(*describe(packed), first + rows.start, first + rows.stop)
    return found


def _in_threads(make: Callable[[P], R], places: Sequence[P]) -> Iterator[R]:
    """``make`` of each place, in order; as many at once as torch has threads, and by one thread each."""
    threads = min(torch.get_num_threads(), len(places))
    if threads < 2:
        for place in places:
            with one_thread():
                made = make(place)
            yield made
        return
    waiting: deque[Future[R]] = deque()
    before = torch.get_num_threads()
    with ThreadPoolExecutor(threads, "lorafx-fold", torch.set_num_threads, (1,)) as pool:
        try:
            for place in places:
                waiting.append(pool.submit(make, place))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for rest in waiting:
                rest.cancel()
            torch.set_num_threads(before)  # some libraries have one number for all threads


@contextmanager
def one_thread() -> Iterator[None]:
    """torch's operators in the calling thread only: for pieces that are too small to be worth handing around."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _swaps_last(order: tuple[int, ...]) -> bool | None:
    """Whether an order of dimensions swaps the last two, and no others; None if it is no such order."""
    same = tuple(range(len(order)))
    if order == same:
        return False
    return True if order == (*same[:-2], *same[:-3:-1]) else None


def _part(
    update: Update, where: Tensor | None, index: tuple[int, ...], rows: slice, columns: slice
) -> tuple[Update, Tensor | None] | None:
    """The part of an update that changes this tile, and which of the tile's rows; None if none is."""
    chosen: slice | Tensor = rows
    inside = None
    if where is not None:
        mine = ((where >= rows.start) & (where < rows.stop)).nonzero().reshape(-1)
        if mine.numel() == 0:
            return None
        chosen, inside = mine, where[mine] - rows.start
    left, right = (t[index] if t.dim() > 2 else t for t in (update.unscaled, update.right))
    gain = update.gain
    if gain is not None:
        gain = (gain[index] if gain.dim() > 1 else gain)[chosen]
    return Update(left[chosen], right[:, columns], gain, scaling=update.scaling), inside
