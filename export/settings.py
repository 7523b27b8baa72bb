"""The settings of an export, held to what they can be before any work is done."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import onnx
import torch

from lorafx.errors import ExportError
from lorafx.export.pack import WEIGHT_FORMATS, WeightFormat
from lorafx.export.parity import Tolerance
from lorafx.export.write import parse_size
from lorafx.passes.example import ExampleInputs, arguments_of

#: The precisions that a file can have, by what one may call them.
DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "fp32": torch.float32,
        "float32": torch.float32,
        "fp16": torch.float16,
        "float16": torch.float16,
        "bf16": torch.bfloat16,
        "bfloat16": torch.bfloat16,
    }
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """As :func:`lorafx.merge_and_export` explains them; those that an export has no use for keep their defaults.

    Raises:
        ExportError: one is none, or two contradict each other.
        InputError: the example inputs are none.
    """

    verify: bool = True
    example_inputs: ExampleInputs = None
    opset: int | None = None
    dtype: torch.dtype | str | None = None
    weight_format: WeightFormat = "dense"
    external_data: bool | None = None
    data_name: str | None = None
    max_shard_size: int | str | None = None
    keep_loss: bool = False
    kv_cache: bool = False
    atol: float | None = None
    rtol: float | None = None
    base_sha256: str | None = None

    def __post_init__(self) -> None:
        self._check_types()
        newest = onnx.defs.onnx_opset_version()
        if self.opset is not None and not 0 < self.opset <= newest:
            raise ExportError(
                f"opset={self.opset} is none: those that the installed onnx knows end at {newest}. Leave it out for "
                "torch's default"
            )
        if self.weight_format not in WEIGHT_FORMATS:
            raise ExportError(f"weight_format={self.weight_format!r} is none of {', '.join(map(repr, WEIGHT_FORMATS))}")
        for name, value in (("data_name", self.data_name), ("max_shard_size", self.max_shard_size)):
            if self.external_data is False and value is not None:
                raise ExportError(
                    f"external_data=False keeps the weights in the .onnx, and {name}={value!r} is about files beside "
                    "it: leave out one of them"
                )
        if self.kv_cache and self.keep_loss:
            raise ExportError("kv_cache=True and keep_loss=True: a step of generation has no labels. Export two files")
        if self.base_sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", str(self.base_sha256)):
            raise ExportError(
                f"base_sha256={self.base_sha256!r} is no SHA-256 (64 hexadecimal digits): give what another export of "
                "this base has in report.provenance['base_sha256']"
            )
        if self.dtype is not None and self.precision not in DTYPES.values():
            raise ExportError(
                f"dtype={self.dtype!r} is none of {', '.join(map(repr, DTYPES))}, or the torch.dtype of that name"
            )
        _ = self.limit

    def _check_types(self) -> None:
        if self.opset is not None and (not isinstance(self.opset, int) or isinstance(self.opset, bool)):
            raise ExportError(
                f"opset={self.opset!r} is of type {type(self.opset).__name__}: give a whole number, as opset=20, or "
                "leave it out"
            )
        for name in ("verify", "external_data", "keep_loss", "kv_cache"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (value is None and name == "external_data"):
                raise ExportError(f"{name}={value!r} is neither True nor False")
        if self.data_name is not None and not isinstance(self.data_name, str):
            raise ExportError(f"data_name={self.data_name!r} is no name of a file: give a text, as data_name='w.data'")
        arguments_of(self.example_inputs)
        Tolerance(0.0 if self.atol is None else self.atol, 0.0 if self.rtol is None else self.rtol)

    def refuse_other_base(self, sha256: str) -> None:
        """Refuse a base with another digest than the one that was asked for.

        Raises:
            ExportError: that is so.
        """
        if self.base_sha256 is not None and self.base_sha256.lower() != sha256:
            raise ExportError(
                f"the base's weights have the SHA-256 {sha256}, and base_sha256={self.base_sha256!r} was asked for: "
                "they are another model's, or bits of them were flipped. Get the files again. Nothing was written"
            )

    @property
    def precision(self) -> torch.dtype | None:
        """What ``dtype`` means."""
        return DTYPES.get(self.dtype.removeprefix("torch.")) if isinstance(self.dtype, str) else self.dtype

    @cached_property
    def limit(self) -> int | None:
        """The most bytes that a file of weights may have."""
        return parse_size(self.max_shard_size)
