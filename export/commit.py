"""Giving an ONNX file its name so that what lies there is the old one or the new one, whole, and never a mix.

Everything is written and checked in a directory beside the target, flushed to disk, and renamed. Two files cannot be
renamed together, so one rename is the commit:

    weights named by their content (``model.onnx.<sha256>.data``)      that of the .onnx, which names them
    weights under a fixed name (``data_name``), .onnx to the byte      that of the weights: for the same graph they
    as it is                                                           lie at the same offsets
    weights under a fixed name that is not taken yet                   that of the .onnx; a process killed just before
                                                                       leaves weights that nobody names, and the next
                                                                       export to the same path finishes its work

That is what a crash leaves, and what one who opens both files at one moment finds. ONNX Runtime opens the weights
later than the ``.onnx``, and more than once: while an export commits it may find them gone (named by content), or some
of each (under a fixed name). :func:`lorafx.export.load.open_session` does not.

A file of weights that another ``.onnx`` in the folder names stays as it is: it is neither replaced nor removed. Renamed
and copied files go on naming the weights that they had.
"""

from __future__ import annotations

import glob
import itertools
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from lorafx.errors import ExportError
from lorafx.export.onnx_file import weight_files
from lorafx.export.write import Progress, write_model

if sys.platform != "win32":  # there exports to one target at the same time are the user's to avoid
    import fcntl

#: Where an export writes down, beside the files it makes, which weights it is about to commit.
_NOTE = ".commit"


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
                if self.target.exists():  # who may read a model may read the next one, and nobody else
                    shutil.copymode(self.target, file)
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
            take the place of a file that must stay, or is read-only.
    """
    kept = kept or {}
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise ExportError(f"{path!r} is no path to write to: give the name of the .onnx file")
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise ExportError(f"cannot write {path}: it is a directory; give the name of a file in it")
    if data_name is not None and (Path(data_name).name != data_name or data_name in ("", ".", "..", target.name)):
        raise ExportError(f"data_name={data_name!r} must be the name of a file beside {target.name}, without a folder")
    written = [target] if data_name is None else [target, target.with_name(data_name)]
    for place in written:
        if place.exists() and not place.stat().st_mode & 0o222:  # a rename would not ask
            raise ExportError(f"cannot write {place}: it is read-only. Give another name, or make it writable first")
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
