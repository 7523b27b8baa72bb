"""Writing an ONNX file so that a reader sees the old one or the new one, whole, and never a mix.

Everything is written and checked in a directory beside the target, flushed to disk, and renamed. Two files cannot be
renamed together, so one rename is the commit:

    weights named by their content (``model.onnx.<sha256>.data``)      that of the .onnx, which names them
    weights under a fixed name (``data_name``), .onnx to the byte      that of the weights: for the same graph they
    as it is                                                           lie at the same offsets
    weights under a fixed name that is not taken yet                   that of the .onnx; a process killed just before
                                                                       leaves weights that nobody names, and the next
                                                                       export to the same path finishes its work

A file of weights that another ``.onnx`` in the folder names stays as it is: it is neither replaced nor removed. Renamed
and copied files go on naming the weights that they had.

What lies where in the files follows from names and shapes only. Values are made piece by piece while they are written.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from lorafx.errors import ExportError
from lorafx.export.onnx_file import weight_files
from lorafx.export.pipe import Pipe
from lorafx.export.uncached import open_for
from lorafx.export.weights import Streamed, pieces_of

if sys.platform != "win32":  # there exports to one target at the same time are the user's to avoid
    import fcntl

#: From this many bytes of weights on they go into a file of their own: protobuf ends at 2 GiB.
INLINE_LIMIT = 3 * 2**29
#: Smaller constants stay in the graph, where shape inference and readers can see them.
_SMALL = 1024
_ALIGNMENT = 64
#: Where an export writes down, beside the files it makes, which weights it is about to commit.
_NOTE = ".commit"

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
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", str(size).strip(), re.IGNORECASE)
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
    """
    values = [v for v in model.graph.initializers.values() if v.const_value is not None]
    if external_data is None:
        external_data = data_name is not None or limit is not None or sum(map(_size, values)) >= INLINE_LIMIT
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
    return names


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
            elif isinstance(
                tensor, (ir.LazyTensor, Streamed)
            ):  # made here, where what is wrong with it is raised as it is
                value.const_value = ir.tensor(tensor.numpy(), dtype=tensor.dtype, name=value.name)
        data: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
        return data
    finally:
        for value, tensor in held.items():
            value.const_value = tensor


@dataclass
class Draft:
    """A file in the making: ``path`` is where it is until it is committed, ``data`` its files of weights.

    ``data_name`` is the name that these (then one) are to have, None: by their content. ``kept`` are files that stay.
    """

    target: Path
    path: Path
    data_name: str | None = None
    data: tuple[Path, ...] = ()
    kept: Collection[Path] = ()

    def write(
        self,
        model: ir.Model,
        external_data: bool | None,
        progress: Progress,
        weights: Collection[ir.Value] = (),
        limit: int | None = None,
        finish: Callable[[bytes], bytes] = lambda data: data,
    ) -> None:
        """See :func:`write_model`.

        Raises:
            ExportError: the files cannot be written; or weights under the fixed name are those of another graph or
                file.
        """
        with _writing(self.target):
            found = write_model(
                model,
                self.path,
                external_data,
                progress,
                weights=weights,
                data_name=self.data_name,
                limit=limit,
                before=self._refuse_mixing,
                finish=finish,
            )
        self.data = tuple(found)

    def put(self, data: bytes) -> None:
        """Write these bytes as the file.

        Raises:
            ExportError: as :meth:`write`.
        """
        with _writing(self.target):
            self.path.write_bytes(data)

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
        """Flush the files to disk and put them in their place; then remove the weights that nothing names any more.

        Raises:
            ExportError: as :meth:`write`.
        """
        folder = self.target.parent
        with _writing(self.target):
            for file in (*self.data, self.path):
                _flush(file)
        with _writing(self.target), _locked(folder):
            there = set(_data_files(self.target))
            new = tuple(folder / file.name for file in self.data)
            if self.data_name is not None:
                self._refuse_mixing()
            same = self.data_name is not None and _same_bytes(self.path, self.target)
            if self.data_name is not None and not same:
                _note(self.path.parent, self.data[0])
            try:
                for file, place in zip(self.data, new, strict=True):
                    file.replace(place)
                _flush(folder)
                if not same:
                    self.path.replace(self.target)
            except BaseException:  # an interruption, too
                if not same and self.path.exists():
                    for place in set(new) - there:
                        place.unlink(missing_ok=True)
                raise
            _flush(folder)
            for place in self._unnamed(there - set(new)):
                place.unlink(missing_ok=True)
        self.path, self.data = self.target, new

    def _refuse_mixing(self) -> None:
        """Refuse to replace weights under a fixed name that are those of another graph or another file."""
        assert self.data_name is not None
        data = self.target.with_name(self.data_name)
        if data.exists() and not _same_bytes(self.path, self.target):
            what = "is another graph" if self.target.exists() else "is not there"
            raise ExportError(
                f"{data} exists, and {self.target} {what}: whoever reads these weights would read others under its own "
                "graph. Give another data_name= or folder, or delete the files that are there first"
            )
        for other, named in _named_beside(self.target):
            if Path(os.path.realpath(data)) in (named or ()):
                raise ExportError(
                    f"{other} has its weights in {data} too, and would have those of {self.target.name}. Give another "
                    f"data_name= or folder, or delete {other.name} first"
                )

    def _unnamed(self, files: set[Path]) -> set[Path]:
        """Those of the files that no other ``.onnx`` in the folder names; none of them, if one cannot be read."""
        if not files:
            return set()
        named = set(self.kept)
        for _, found in _named_beside(self.target):
            if found is None:
                return set()
            named |= found
        return {file for file in files if Path(os.path.realpath(file)) not in named}


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file of text, whole or not at all.

    Raises:
        ExportError: it cannot be written.
    """
    with draft(path) as file:
        file.put(text.encode())
        file.commit()


@contextmanager
def draft(
    path: str | os.PathLike[str], data_name: str | None = None, kept: Mapping[Path, str] | None = None
) -> Iterator[Draft]:
    """Start a file at ``path``; what is not committed by the end leaves no trace.

    What exports to the same path left behind when they were killed is removed. ``kept`` says of files that must stay
    what they are, for people.

    Raises:
        ExportError: the folder does not exist or cannot be written, or the disk is full; or what is to be written is to
            take the place of a file that must stay.
    """
    kept = kept or {}
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise ExportError(f"cannot write {path}: it is a directory; give the name of a file in it")
    if data_name is not None and (Path(data_name).name != data_name or data_name in ("", ".", "..", target.name)):
        raise ExportError(f"data_name={data_name!r} must be the name of a file beside {target.name}, without a folder")
    written = [target] if data_name is None else [target, target.with_name(data_name)]
    for place, (file, what) in itertools.product(written, kept.items()):
        if place.exists() and place.samefile(file):
            raise ExportError(
                f"{place} is {what}, which would be lost: give what is to be written another name or folder"
            )
    prefix = f".{target.name}."
    with _writing(target):
        for left in target.parent.glob(f"{glob.escape(prefix)}*"):
            _remove_abandoned(left, target)
        scratch, lock = _scratch(target.parent, prefix)
    try:
        yield Draft(target, scratch / target.name, data_name, kept=[Path(os.path.realpath(file)) for file in kept])
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _scratch(folder: Path, prefix: str) -> tuple[Path, int | None]:
    """A directory of one's own, locked for as long as the process lives."""
    while True:
        scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=folder))
        if sys.platform == "win32":
            return scratch, None
        lock = os.open(scratch, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if scratch.exists():  # nobody took it for abandoned before it was locked
            return scratch, lock
        os.close(lock)


def _note(scratch: Path, data: Path) -> None:
    """Write down which file of weights is about to be put in its place, ahead of the ``.onnx`` beside it."""
    note = scratch / _NOTE
    note.write_text(_identity(data), encoding="utf-8")
    _flush(note)
    _flush(scratch)


def _identity(data: Path) -> str:
    """What stays the same of a file that is renamed, and of no other; its name included."""
    found = data.stat()
    return f"{found.st_ino} {found.st_size} {found.st_mtime_ns} {data.name}"


def _finish(scratch: Path, target: Path) -> None:
    """Do the second rename of a commit whose process was killed after the first, if its weights are there still."""
    note = scratch / _NOTE
    if not note.exists():
        return
    identity = note.read_text(encoding="utf-8")
    data = target.with_name(identity.split(" ", 3)[-1])
    if data.exists() and _identity(data) == identity and (scratch / target.name).exists():
        with _locked(target.parent):
            (scratch / target.name).replace(target)
            _flush(target.parent)


def _remove_abandoned(scratch: Path, target: Path) -> None:
    """Remove a directory that no living process has locked; what was committed there is committed."""
    if sys.platform == "win32" or not scratch.is_dir():
        return
    try:
        lock = os.open(scratch, os.O_RDONLY)
    except OSError:  # its process is done with it just now
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _finish(scratch, target)
        shutil.rmtree(scratch, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(lock)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One commit in a folder at a time, so that none removes the weights of another that is half way."""
    if sys.platform == "win32":
        yield
        return
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


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


def _same_bytes(a: Path, b: Path) -> bool:
    return b.exists() and a.read_bytes() == b.read_bytes()


def _named_beside(target: Path) -> Iterator[tuple[Path, frozenset[Path] | None]]:
    """The other ``.onnx`` files in a folder, each with the files of weights that it names; None: it cannot be read."""
    for path in sorted(target.parent.glob("*.onnx")):
        if path.is_file() and Path(os.path.realpath(path)) != target:
            try:
                yield path, weight_files(path)
            except ExportError:
                yield path, None


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
