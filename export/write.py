"""Writing an ONNX file so that a reader sees the old one or the new one, whole, and never a mix.

Everything is written and checked in a directory beside the target, flushed to disk, and renamed. Weights
kept in a file of their own get a name made from their content (``model.onnx.<sha256>.data``), so the one
rename that counts is that of the ``.onnx``, which names them.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from lorafx.errors import ExportError

#: From this many bytes of weights on they go into a file of their own: protobuf ends at 2 GiB.
INLINE_LIMIT = 3 * 2**29
#: Smaller tensors stay in the graph, where shape inference and readers can see them.
_SMALL = 1024
_ALIGNMENT = 64

Progress = Callable[[float], None]


def write_model(
    model: ir.Model, path: Path, external_data: bool | None = None, progress: Progress = lambda done: None
) -> Path | None:
    """Write a model, its weights fetched one at a time; returns their file if they got one.

    The model is left as it is.

    Args:
        model: every initializer has a value.
        path: the ``.onnx`` file.
        external_data: whether weights go into a file of their own beside it; None: if they are large.
        progress: called with the share that is done.
    """
    values = [v for v in model.graph.initializers.values() if v.const_value is not None]
    if external_data is None:
        external_data = sum(_size(v) for v in values) >= INLINE_LIMIT
    held = {v: v.const_value for v in values}
    try:
        large = [v for v in values if _size(v) >= _SMALL] if external_data else []
        data = _write_data(large, path, progress) if large else None
        path.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
    finally:
        for value, tensor in held.items():
            value.const_value = tensor
    progress(1.0)
    return data


def _write_data(values: list[ir.Value], path: Path, progress: Progress) -> Path:
    """Write the values to a file named by its content, and make them refer to it."""
    total = sum(_size(v) for v in values)
    digest = hashlib.sha256()
    unnamed = path.with_name(f"{path.name}.data")
    places: list[tuple[ir.Value, int, int]] = []
    offset = 0
    with unnamed.open("wb") as file:
        for value in values:
            assert value.const_value is not None
            padding = bytes(-offset % _ALIGNMENT)
            data = value.const_value.tobytes()
            for chunk in (padding, data):
                digest.update(chunk)
                file.write(chunk)
            offset += len(padding)
            places.append((value, offset, len(data)))
            offset += len(data)
            progress(min(1.0, offset / total))
    named = unnamed.rename(path.with_name(f"{path.name}.{digest.hexdigest()[:16]}.data"))
    for value, start, length in places:
        assert value.dtype is not None
        assert value.name is not None
        value.const_value = ir.ExternalTensor(
            named.name,
            start,
            length,
            value.dtype,
            shape=value.shape or ir.Shape([]),
            name=value.name,
            base_dir=named.parent,
        )
    return named


@dataclass
class Draft:
    """A file in the making: ``path`` is where it is until it is committed, ``data`` its weights' file."""

    target: Path
    path: Path
    data: Path | None = None

    def write(self, model: ir.Model, external_data: bool | None, progress: Progress) -> None:
        """See :func:`write_model`."""
        with _writing(self.target):
            self.data = write_model(model, self.path, external_data, progress)

    def check(self) -> None:
        """Run onnx's checker, shape inference included.

        Raises:
            ExportError: the checker's complaint.
        """
        try:
            onnx.checker.check_model(str(self.path), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ExportError(f"onnx.checker refuses the exported model: {error}") from error

    def commit(self) -> None:
        """Flush to disk and put the files in their place; then remove the data of the file replaced."""
        folder = self.target.parent
        with _writing(self.target):
            stale = set(_data_files(self.target))
            for file in (self.data, self.path):
                if file is not None:
                    _flush(file)
            data = None if self.data is None else self.data.replace(folder / self.data.name)
            _flush(folder)
            try:
                self.path.replace(self.target)
            except OSError:
                if data is not None and data not in stale:
                    data.unlink()
                raise
            _flush(folder)
            for file in stale - {data}:
                file.unlink(missing_ok=True)
        self.path, self.data = self.target, data


@contextmanager
def draft(path: str | os.PathLike[str]) -> Iterator[Draft]:
    """Start a file at ``path``; what is not committed by the end leaves no trace.

    Raises:
        ExportError: the folder does not exist or cannot be written, or the disk is full.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise ExportError(f"cannot write {path}: it is a directory; give the name of a file in it")
    with _writing(target):
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield Draft(target, scratch / target.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ExportError(
            f"cannot write {path}: {error.strerror or error}. Give a path in a folder that exists, may be "
            "written and has room"
        ) from error


def _size(value: ir.Value) -> int:
    return 0 if value.const_value is None else value.const_value.nbytes


def _data_files(target: Path) -> list[Path]:
    """The files of weights that exports to ``target`` have left."""
    pattern = re.compile(re.escape(target.name) + r"\.[0-9a-f]{16}\.data")
    return [p for p in target.parent.iterdir() if pattern.fullmatch(p.name)]


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
