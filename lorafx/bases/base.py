"""What a base format is: a way to store a frozen weight in fewer bits, and to read it back a few rows at a time.

A format knows tensors, not layers or adapters: whatever adapts a weight reads it by rows, in whichever format it is.
Values are grouped into blocks of consecutive ones, row after row, that share a scale: their largest magnitude.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite, prod, sqrt
from typing import ClassVar

import torch
from torch import Tensor

from lorafx.errors import QuantizationError

#: The most that a panel takes while it is dequantised: it stays in a core's cache between the table and the product.
PANEL_BYTES = 1 << 20

#: What can be quantised: bitsandbytes' three.
DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""The shape and dtype of each tensor, by its name."""


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight as a format stores it.

    Attributes:
        format: the format's name.
        shape: the weight's, ``[..., out, in]``.
        dtype: what it was quantised from, and is read back as unless another is asked for.
        block_size: how many consecutive values share a scale.
        double_quant: whether the scales are quantised as well.
        tensors: by the names that the format's :meth:`Format.layout` has; their names suit buffers.
    """

    format: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    block_size: int
    double_quant: bool
    tensors: Mapping[str, Tensor]

    @property
    def numel(self) -> int:
        """How many values the weight has."""
        return prod(self.shape)

    @property
    def height(self) -> int:
        """How many rows it has, those of a whole stack."""
        return prod(self.shape[:-1])

    @property
    def width(self) -> int:
        """How many values a row has."""
        return self.shape[-1]


class Format(ABC):
    """One way to store a weight.

    Attributes:
        name: what ``FORMATS`` has it by.
        mark: the key, after the layer's name and a dot, by which a state dict shows that a layer is in this format.
    """

    name: ClassVar[str]
    mark: ClassVar[str]

    @abstractmethod
    def settings(self, width: int, block_size: int | None, double_quant: bool | None) -> tuple[int, bool]:
        """Both settings for rows of ``width`` values; None stands for the format's own choice.

        Raises:
            SpecError: the format has no such block size, or no second quantisation.
        """

    @abstractmethod
    def layout(self, shape: tuple[int, ...], block_size: int, double_quant: bool) -> Layout:
        """The tensors that hold a weight of this shape."""

    @abstractmethod
    def pack(self, weight: Tensor, block_size: int, double_quant: bool) -> dict[str, Tensor]:
        """The tensors for ``weight``, which has one of ``DTYPES``.

        What is not finite in the weight is not finite in ``absmax``, or, where that is quantised, in ``offset``:
        :meth:`damage` finds it.
        """

    @abstractmethod
    def rows(self, packed: Packed, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """Rows ``start`` to ``stop`` as ``[stop - start, in]``: code times scale in float32, then cast to ``dtype``."""

    @abstractmethod
    def damage(self, packed: Packed) -> str | None:
        """What is wrong with the values of tensors that have the right shapes; None if nothing is."""

    @abstractmethod
    def state_dict(self, packed: Packed) -> dict[str, Tensor]:
        """What a checkpoint holds for it, by keys that follow the layer's name and a dot; memory is shared."""

    @abstractmethod
    def from_state_dict(self, tensors: Mapping[str, Tensor], prefix: str = "") -> Packed:
        """The inverse: ``tensors`` may be a whole model's, ``prefix`` is the layer's name and a dot. Memory is shared.

        Raises:
            QuantizationError: a tensor is missing, or what is there is damaged or of another format.
        """

    def quantize(
        self,
        weight: Tensor,
        *,
        block_size: int | None = None,
        double_quant: bool | None = None,
        where: str = "the weight",
    ) -> Packed:
        """``weight [..., out, in]`` in this format, on its device; ``where`` names it in errors.

        Raises:
            SpecError: see :meth:`settings`.
            QuantizationError: the weight is no matrix or stack of them, is empty, has another dtype than float32,
                bfloat16 or float16, or holds NaN or Inf.
        """
        shape = tuple(weight.shape)
        if len(shape) < 2 or not weight.numel():
            raise QuantizationError(
                f"{where} has shape {shape} and cannot be stored as {self.name}: expected a matrix [out, in], or a "
                "stack of them, with values in it. Leave the layer out."
            )
        if weight.dtype not in DTYPES.values():
            raise QuantizationError(
                f"{where} is {weight.dtype} and cannot be stored as {self.name}: expected {', '.join(DTYPES)}. Cast "
                "the model first, for instance with model.to(torch.bfloat16)."
            )
        block_size, double_quant = self.settings(shape[-1], block_size, double_quant)
        with torch.no_grad():
            tensors = self.pack(weight.detach(), block_size, double_quant)
        packed = Packed(self.name, shape, weight.dtype, block_size, double_quant, tensors)
        if self.damage(packed) is not None:
            largest = float(weight.detach().abs().max())
            what = f"values up to {largest:.3g}, whose scales overflow" if isfinite(largest) else "NaN or Inf"
            raise QuantizationError(
                f"{where} holds {what} and cannot be stored as {self.name}: one such value would spoil every value "
                "that shares its scale. Look at the checkpoint that it came from."
            )
        return packed

    def panels(
        self,
        packed: Packed,
        dtype: torch.dtype | None = None,
        panel_bytes: int = PANEL_BYTES,
        *,
        start: int = 0,
        stop: int | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """The number of the first row and ``[rows, in]`` in ``dtype``, for as many rows at a time as fit.

        Of the rows from ``start`` to ``stop``, None: to the last.

        ``panel_bytes`` bounds a panel in float32, in which it is computed. A panel has at least one row.
        """
        # A row that starts or ends within a block brings that block's other values along.
        beside = 0 if packed.width % packed.block_size == 0 else 2 * packed.block_size
        step = max(1, (panel_bytes // 4 - beside) // packed.width)
        end = packed.height if stop is None else stop
        for first in range(start, end, step):
            yield first, self.rows(packed, first, min(first + step, end), dtype)

    def dequantize(self, packed: Packed, dtype: torch.dtype | None = None) -> Tensor:
        """The whole weight, in ``dtype`` or its own."""
        codes = packed.tensors["codes"]
        whole = torch.empty(packed.shape, dtype=dtype or packed.dtype, device=codes.device)
        by_row = whole.view(packed.height, packed.width)
        for start, panel in self.panels(packed, dtype):
            by_row[start : start + len(panel)] = panel
        return whole

    def largest_loss(self, packed: Packed) -> float:
        """The most that ``||W - Q|| / ||W||`` can be for a weight ``W`` stored as ``Q``; 0.5 where nobody knows."""
        return 0.5

    def nbytes(self, packed: Packed) -> int:
        """The bytes that it takes."""
        return sum(tensor.nbytes for tensor in packed.tensors.values())

    def bits_per_parameter(self, packed: Packed) -> float:
        """The bits that a value of the weight takes, its share of the scales included."""
        return 8 * self.nbytes(packed) / packed.numel

    def validate(self, packed: Packed, where: str = "the weight") -> None:
        """Check the tensors' names, dtypes, shapes, devices and ranges; tensors on the meta device have no values.

        Raises:
            QuantizationError: something of that is not as the layout has it.
            SpecError: see :meth:`settings`.
        """
        self.settings(packed.width, packed.block_size, packed.double_quant)
        layout = self.layout(packed.shape, packed.block_size, packed.double_quant)
        if set(layout) != set(packed.tensors):
            raise damaged(self.name, where, f"it has {_names(packed.tensors)} where it must have {_names(layout)}")
        for name, (shape, dtype) in layout.items():
            tensor = packed.tensors[name]
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                found = f"{name} is {tensor.dtype} {tuple(tensor.shape)}"
                raise damaged(
                    self.name, where, f"{found}; for a weight of shape {packed.shape} expected {dtype} {shape}"
                )
        devices = {tensor.device for tensor in packed.tensors.values()}
        if len(devices) > 1:
            raise damaged(self.name, where, f"its tensors are on several devices: {', '.join(map(str, devices))}")
        what = None if torch.device("meta") in devices else self.damage(packed)
        if what is not None:
            raise damaged(self.name, where, what)


def damaged(name: str, where: str, what: str) -> QuantizationError:
    """The error for stored data that are not what the format ``name`` says."""
    return QuantizationError(
        f"{where} cannot be read as {name}: {what}. Get the file again, or quantize the original weights again."
    )


def loss_of_zeros(count: int, cell: float) -> float:
    """The :meth:`Format.largest_loss` of evenly spaced codes, or denser ones around zero: where all but one read as 0.

    Of ``count`` values with one scale, one is at full scale; the others are ``cell`` scales large, which just reads as
    zero. What is lost of quantised scales is not counted.
    """
    lost = (count - 1) * cell**2
    return sqrt(lost / (1 + lost))


def scales_damage(name: str, scales: Tensor, largest: float = torch.finfo(torch.float32).max) -> str | None:
    """What is wrong with magnitudes, which are not negative and at most ``largest``; None if nothing is."""
    # One pass that NaN goes through.
    low, high = (float(end) for end in scales.aminmax())
    if low >= 0 and high <= largest:
        return None
    finite = low >= 0 and isfinite(high)
    what = f"of {high:.3g}, and the weight's dtype ends at {largest:.3g}" if finite else "that is negative, NaN or Inf"
    return f"{name} holds a value {what}"


def take(tensors: Mapping[str, Tensor], prefix: str, name: str, key: str) -> Tensor:
    """``tensors[prefix + key]``, which format ``name`` needs."""
    found = tensors.get(prefix + key)
    if found is None:
        raise damaged(name, prefix.rstrip(".") or "the weight", f"{key} is missing")
    return found.detach()


def _names(names: Mapping[str, object]) -> str:
    return ", ".join(sorted(names)) or "no tensors"
