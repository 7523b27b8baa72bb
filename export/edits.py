"""What an adapter makes of one initializer of an ONNX file.

A weight gets its site's update (:class:`~lorafx.variants.base.Update`), a tensor that was trained whole is replaced,
and to a bias may be added. Weights are computed by the fold of :func:`lorafx.merge`, so that merging into a file gives
the bits that merging into the model and exporting it gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import onnx_ir as ir
import torch
from torch import Tensor

from lorafx.export.onnx_file import Source
from lorafx.export.onnx_targets import Target
from lorafx.export.weights import Streamed
from lorafx.ir import Site
from lorafx.kernels.rounding import Rounding
from lorafx.ops import STORAGE
from lorafx.passes.fold import Fold


@dataclass(frozen=True)
class Update:
    """A site's update of a weight: its settings, and its variant's parameters and shared tensors in their order.

    ``turned`` says that the file stores the transpose of what torch has (and the site's ``kind`` is torch's).
    """

    site: Site
    tensors: tuple[Tensor, ...]
    turned: bool

    def __str__(self) -> str:
        if self.site.rows is not None:
            return f"{len(self.site.rows)} rows trained whole"
        return f"{self.site.variant} r={self.site.r}, scaling {self.site.scaling:g}"

    def matrix(self, stored: Tensor) -> Tensor:
        """A stored tensor as ``[out, in]``, sharing its memory."""
        return STORAGE[self.site.kind].matrix(stored.mT if self.turned else stored)

    def value(self, source: Source, value: ir.Value, rounding: Rounding) -> ir.TensorProtocol:
        """The initializer's new value, made in pieces while it is written, and rounded once.

        Raises :class:`MergeError` then, if it overflows.
        """
        stored = source.tensor()
        weight = stored.mT if self.turned else stored
        fold = Fold((self.site,), weight, (self.tensors,), stored.dtype, rounding)
        return Streamed(fold, value, (1, 0) if self.turned else None)


@dataclass(frozen=True)
class Replacement:
    """A tensor that was trained whole, in the layout that the file stores; None: what is there already."""

    whole: Tensor | None = None
    shift: Tensor | None = None
    scaling: float = 1.0

    def __str__(self) -> str:
        shifted = "" if self.shift is None else f"shifted, scaling {self.scaling:g}"
        return ", ".join(filter(None, ("" if self.whole is None else "trained whole", shifted)))

    def exact(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """The new value in a wide dtype."""
        value = (stored if self.whole is None else self.whole).to(dtype)
        return value if self.shift is None else value + self.shift.to(dtype) * self.scaling

    def value(self, source: Source, value: ir.Value, rounding: Rounding) -> ir.TensorProtocol:
        """The initializer's new value, made when it is written, and rounded once."""

        def compute() -> ir.TensorProtocol:
            stored = source.tensor()
            wide = wide_dtype(stored.dtype) if self.shift is None else torch.float64
            exact = self.exact(stored, wide)
            result = torch.empty(stored.shape, dtype=stored.dtype)
            if result.numel():
                rounding.round(*(t.reshape(1, -1) for t in (result, exact, stored)))
            return ir.tensor_adapters.TorchTensor(result)

        return _lazily(compute, value)


@dataclass(frozen=True)
class Change:
    """What becomes of one initializer, and by what it was found; ``rounding`` is measured while it is written."""

    target: Target
    edit: Update | Replacement
    rounding: Rounding = field(default_factory=Rounding)

    @property
    def name(self) -> str:
        """The initializer's."""
        return self.target.initializer

    def value(self, source: Source, value: ir.Value) -> ir.TensorProtocol:
        """The initializer's new value, in its own dtype and layout; made when it is written, not before.

        It is computed in float32 for dtypes of two bytes and in float64 otherwise, and rounded once. Writing it raises
        :class:`MergeError` if it overflows.
        """
        return self.edit.value(source, value, self.rounding)


def _lazily(compute: Callable[[], ir.TensorProtocol], value: ir.Value) -> ir.LazyTensor:
    assert value.dtype is not None
    return ir.LazyTensor(compute, value.dtype, value.shape or ir.Shape([]), name=value.name)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a tensor of this dtype is merged in: float32 for two bytes, and otherwise float64."""
    return torch.float32 if dtype.itemsize < 4 else torch.float64
