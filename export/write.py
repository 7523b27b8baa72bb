"""An ONNX model as files: what lies where, and writing it piece by piece.

What lies where follows from names and shapes only. Values are made while they are written, and files are written while
the next pieces are made. Their names they get in :mod:`lorafx.export.commit`.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from lorafx.checks import format_bytes
from lorafx.errors import ExportError
from lorafx.export.pipe import Pipe
from lorafx.export.uncached import open_for
from lorafx.export.weights import pieces_of

#: From this many bytes of weights on they go into a file of their own: protobuf ends at 2 GiB.
INLINE_LIMIT = 3 * 2**29
_LARGEST = 2**31
#: Smaller constants stay in the graph, where shape inference and readers can see them.
_SMALL = 1024
_ALIGNMENT = 64

Progress = Callable[[float], None]


@dataclass(frozen=True)
class Place:
    """Where the bytes of an initializer lie: in which of the files of weights, from which byte on, and how many."""

    value: ir.Value
    file: int
    offset: int
    length: int


def parse_size(size: int | str | None) -> int | None:
    """A number of bytes: itself, or as in ``"500MB"`` (powers of 1000) or ``"2GiB"`` (of 1024).

    Raises:
        ExportError: it is none.
    """
    if size is None:
        return None
    text = str(size).strip() if isinstance(size, int | str) else ""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text, re.IGNORECASE)
    power = 0 if found is None else " KMGT".index(found[2].upper() or " ")
    count = 0 if found is None else int(float(found[1]) * (1024 if found[3] else 1000) ** power)
    if count <= 0:
        raise ExportError(f"max_shard_size={size!r} is no size: give a number of bytes, or one like '2GB' or '500MiB'")
    return count


def lay_out(values: Sequence[ir.Value], limit: int | None = None) -> list[Place]:
    """A place for each value, in files of at most ``limit`` bytes (None: one file; a larger tensor has its own)."""
    places: list[Place] = []
    file, end = 0, 0
    for value in values:
        assert value.const_value is not None
        start, length = end + -end % _ALIGNMENT, value.const_value.nbytes
        if limit is not None and end > 0 and start + length > limit:
            file, start = file + 1, 0
        places.append(Place(value, file, start, length))
        end = start + length
    return places


def write_model(
    model: ir.Model,
    path: Path,
    external_data: bool | None = None,
    progress: Progress = lambda done: None,
    *,
    weights: Collection[ir.Value] = (),
    data_name: str | None = None,
    limit: int | None = None,
    before: Callable[[], None] = lambda: None,
    finish: Callable[[bytes], bytes] = lambda data: data,
) -> list[Path]:
    """Write a model, piece by piece; returns the files of weights, if there are any. The model is left as it is.

    Args:
        model: every initializer has a value.
        path: the ``.onnx`` file.
        external_data: whether weights go into a file of their own beside it; None: if they are large.
        progress: called with the share of the bytes that is written.
        weights: the initializers that never stay in the ``.onnx`` then, however small they are.
        data_name: what to call the file; None: by its content.
        limit: how large a file of weights may become.
        before: called when the ``.onnx`` is there and the weights are not, which only a ``data_name`` allows.
        finish: makes what the ``.onnx`` is to hold of what it would.

    Raises:
        ExportError: there are too many weights for one file, or for one of this name; or a value is not as long as it
            said.
    """
    values = [v for v in model.graph.initializers.values() if v.const_value is not None]
    total = sum(map(_size, values))
    if external_data is None:
        external_data = data_name is not None or limit is not None or total >= INLINE_LIMIT
    if not external_data and total >= _LARGEST:
        raise ExportError(
            f"external_data=False: the weights are {format_bytes(total)}, and a file with them inside can have 2 GiB "
            "at most (protobuf's limit). Leave it out: they then lie in a file beside the .onnx"
        )
    outside = set(weights)
    large = [v for v in values if v in outside or _size(v) >= _SMALL] if external_data else []
    places = lay_out([v for v in large if _size(v) > 0], limit)
    count = places[-1].file + 1 if places else 0
    if data_name is not None:
        if count > 1:
            raise ExportError(
                f"{count} files of weights cannot all be called {data_name}, nor be replaced at one moment: leave out "
                "data_name= or max_shard_size="
            )
        names = [path.with_name(data_name)]
        path.write_bytes(finish(_serialize(model, places, names)))
        before()
        _write_data(places, names, progress)
        return names
    unnamed = [path.with_name(f"{path.name}.{number}.data") for number in range(count)]
    digests = _write_data(places, unnamed, progress)
    names = [path.with_name(f"{path.name}.{digest[:16]}.data") for digest in digests]
    for old, new in zip(unnamed, names, strict=True):
        old.rename(new)
    path.write_bytes(finish(_serialize(model, places, names)))
    return [*dict.fromkeys(names)]  # files of the same bytes are one


def _write_data(places: Sequence[Place], paths: Sequence[Path], progress: Progress) -> list[str]:
    """Write the files of weights; returns their SHA-256. Files are written while the next pieces are made."""
    total = sum(place.length for place in places)
    done = 0
    digests = []
    for number, path in enumerate(paths):
        size = sum(place.length for place in places if place.file == number)
        with open_for(path, size) as file:
            digest = hashlib.sha256()
            with Pipe(file.write) as disk, Pipe(digest.update) as check:
                end = 0
                for place in (p for p in places if p.file == number):
                    assert place.value.const_value is not None
                    for piece in itertools.chain(
                        (memoryview(bytes(place.offset - end)),), pieces_of(place.value.const_value)
                    ):
                        disk.put(piece)
                        check.put(piece)
                        end += piece.nbytes
                        progress(min(1.0, (done + end) / max(1, total)))
                    if end != place.offset + place.length:
                        raise ExportError(f"'{place.value.name}' has {end - place.offset} bytes, not {place.length}")
        done += end
        digests.append(digest.hexdigest())
    return digests


def _serialize(model: ir.Model, places: Sequence[Place], files: Sequence[Path]) -> bytes:
    """The ``.onnx`` file, in which values refer to their places; the model is left as it is."""
    placed = {place.value: place for place in places}
    held = {value: value.const_value for value in model.graph.initializers.values()}
    try:
        for value, tensor in held.items():
            assert value.name is not None
            if (place := placed.get(value)) is not None:
                assert value.dtype is not None
                file = files[place.file]
                value.const_value = ir.ExternalTensor(
                    file.name,
                    place.offset,
                    place.length,
                    value.dtype,
                    shape=value.shape or ir.Shape([]),
                    name=value.name,
                    base_dir=file.parent,
                )
            elif isinstance(tensor, ir.LazyTensor):  # made here, where what is wrong with it is raised as it is
                value.const_value = ir.tensor(tensor.numpy(), dtype=tensor.dtype, name=value.name)
        data: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
        return data
    finally:
        for value, tensor in held.items():
            value.const_value = tensor


def _size(value: ir.Value) -> int:
    return 0 if value.const_value is None else value.const_value.nbytes
