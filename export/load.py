"""Opening a file in ONNX Runtime that an export may be replacing at this moment.

ONNX Runtime reads the ``.onnx``, then opens the weights beside it by their name, once for each tensor. If an export
commits meanwhile, these are gone, or some are of each export, of which nothing tells. Files are only ever renamed
(:mod:`lorafx.export.commit`), so that a load was of one export if the files were the same ones before it and after.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import onnxruntime as ort

from lorafx.checks import did_you_mean
from lorafx.errors import ExportError
from lorafx.export.onnx_file import weight_files

T = TypeVar("T")

#: How often a load may meet a commit before somebody is told.
_ATTEMPTS = 100


def open_session(
    path: str | os.PathLike[str],
    *,
    providers: Sequence[Any] | None = None,
    session_options: ort.SessionOptions | None = None,
) -> ort.InferenceSession:
    """An ``onnxruntime.InferenceSession`` of one export, also while another one takes its place.

    Args:
        path: the ``.onnx`` file.
        providers, session_options: as for ``onnxruntime.InferenceSession``; None: the CPU, and ONNX Runtime's defaults
            without its warnings.

    Raises:
        ExportError: ONNX Runtime cannot load the file, or has no such provider, or cannot start it; or the file was
            replaced during each of 100 loads.
    """
    chosen = known_providers(providers)
    options = session_options or quiet()
    session = while_unchanged(path, lambda place: ort.InferenceSession(str(place), options, providers=chosen))
    refuse_fallback(session, chosen)
    return session


def known_providers(providers: Sequence[Any] | None) -> list[Any]:
    """The providers to ask for; None: the CPU.

    Raises:
        ExportError: ONNX Runtime is without one of them, and would run on the CPU instead.
    """
    chosen = ["CPUExecutionProvider"] if providers is None else list(providers)
    there = ort.get_available_providers()
    for name in _names(chosen):
        if name not in there:
            raise ExportError(f"this ONNX Runtime has no provider '{name}'{did_you_mean(name, there)}; it has {there}")
    return chosen


def refuse_fallback(session: ort.InferenceSession, providers: Sequence[Any]) -> None:
    """Refuse a session on the CPU that nobody asked for: ONNX Runtime's answer where a provider does not start.

    Raises:
        ExportError: a provider is missing, and the CPU's is not among those that were asked for.
    """
    asked, running = _names(providers), session.get_providers()
    missing = [name for name in asked if name not in running]
    if missing and "CPUExecutionProvider" not in asked:
        raise ExportError(
            f"ONNX Runtime could not start '{missing[0]}' and runs on {running} instead; what it printed says why (a "
            "library or a device that is missing). List 'CPUExecutionProvider' as well if that will do"
        )


def _names(providers: Sequence[Any]) -> list[str]:
    return [provider[0] if isinstance(provider, tuple) else provider for provider in providers]


def quiet() -> ort.SessionOptions:
    """ONNX Runtime warns of each optional input that it is no constant, which is what it is for."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return options


def while_unchanged(path: str | os.PathLike[str], load: Callable[[Path], T]) -> T:
    """What ``load`` makes of a file and its weights, once these were the same ones before it and after.

    It is given the file's place: behind a link, if the weights lie there and not beside the link, where ONNX Runtime
    looks for them.

    Raises:
        ExportError: as :func:`open_session`.
    """
    for _ in range(_ATTEMPTS):
        before = _identities([Path(path)])  # first, so that one replaced while it is read below is seen
        place = _followed(Path(path))
        data = _weights(place)
        before += _identities(data)
        try:
            loaded = load(place)
        except Exception as error:  # onnxruntime's exceptions share no base class
            if before == _identities([Path(path), *data]):
                raise ExportError(f"ONNX Runtime cannot load {path}: {error}") from error
        else:
            if before == _identities([Path(path), *data]):
                return loaded
    raise ExportError(
        f"{path} or its weights were replaced during each of {_ATTEMPTS} loads: something exports to it without a "
        "pause, or writes over it"
    )


def _followed(path: Path) -> Path:
    there = Path(os.path.realpath(path))
    return there if path.is_symlink() and not all(file.exists() for file in _weights(path)) else path


def _weights(path: Path) -> list[Path]:
    """The files that it names; none if it cannot be read, which ONNX Runtime will say."""
    try:
        return sorted(weight_files(path))
    except ExportError:
        return []


def _identities(files: Sequence[Path]) -> list[tuple[int, ...] | None]:
    """What is another for another file under the same name; None where there is none."""
    found: list[tuple[int, ...] | None] = []
    for file in files:
        try:
            stat = file.stat()
            found.append((stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns))
        except OSError:
            found.append(None)
    return found
