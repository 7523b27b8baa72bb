"""ONNX Runtime's adapter files: what a task gives a model's optional inputs, and which base it is for."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from lorafx.checks import format_bytes
from lorafx.errors import AdapterError, ExportError

ADAPTER_SUFFIX = ".onnx_adapter"
#: The version of lorafx's inputs, in each file as ``adapter_version``.
ADAPTER_VERSION = 1


def model_version(sha256: str) -> int:
    """What an adapter's file notes of the ``.onnx`` with this digest: its first 31 bits.

    There is room for no more. That keeps files apart that were mixed up, and is no protection against forgery.
    """
    return int(sha256[:8], 16) >> 1


@dataclass(frozen=True)
class AdapterFile:
    """An ``.onnx_adapter`` file: the ``version`` of the base that it is for, and its values by the inputs' names."""

    path: Path
    version: int
    values: Mapping[str, ort.OrtValue]
    held: ort.AdapterFormat  # the mapped file that the values lie in

    def data(self, name: str) -> bytes:
        """A copy of a tensor's bytes, whatever its dtype (numpy has no bfloat16)."""
        value = self.values[name]
        return ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())


def load_adapter_file(path: str | os.PathLike[str]) -> AdapterFile:
    """Read an adapter's file.

    Raises:
        AdapterError: it is not there, or no such file.
    """
    place = Path(path)
    if not place.is_file():
        raise AdapterError(f"{place}: no such file; export_multi writes one for each task, beside the .onnx")
    try:
        found = ort.AdapterFormat.read_adapter(str(place))
        return AdapterFile(place, found.get_model_version(), found.get_parameters(), found)
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise AdapterError(f"{place} is no adapter of ONNX Runtime's, or damaged: {error}") from error


def write_adapter(path: Path, values: Mapping[str, ir.TensorProtocol], version: int) -> Path:
    """Write ONNX Runtime's adapter file.

    Raises:
        ExportError: it cannot be written.
    """
    made = ort.AdapterFormat()
    made.set_adapter_version(ADAPTER_VERSION)
    made.set_model_version(version)
    arrays = {name: np.ascontiguousarray(values[name].numpy()) for name in sorted(values)}  # referred to
    made.set_parameters({name: _ort_value(array, values[name].dtype) for name, array in arrays.items()})
    try:
        made.export_adapter(str(path))
    except RuntimeError as error:  # all that ONNX Runtime says is where in its code it could not
        raise ExportError(
            f"cannot write {path.name}, of {format_bytes(sum(a.nbytes for a in arrays.values()))}: give a path in a "
            f"folder that may be written and has room (ONNX Runtime: {str(error).splitlines()[0]})"
        ) from error
    return path


def _ort_value(array: npt.NDArray[Any], dtype: ir.DataType) -> ort.OrtValue:
    if dtype is ir.DataType.BFLOAT16:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), int(dtype))
    return ort.OrtValue.ortvalue_from_numpy(array)
