"""Build the compiled kernels with the machine's C++ compiler at first use, and keep them for the user.

They are built for this very processor. The file's name tells source, compiler, flags and processor, so that a home
directory shared between machines holds one for each, and nothing stale is ever loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

_SOURCE = Path(__file__).with_name("kernels.cpp")
_INCLUDED = ("activation.h", "dropout.h", "products.h", "vector.h")
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-w")
_TIMEOUT = 300.0


class BuildError(Exception):
    """Why there are no compiled kernels."""


@cache
def load() -> ctypes.CDLL:
    """The kernels' library.

    Raises:
        BuildError: there is no compiler, or it failed; what it said is in the message.
    """
    compiler = _compiler()
    sources = [path.read_bytes() for path in (_SOURCE, *map(_SOURCE.with_name, _INCLUDED))]
    # What -march=native means here, and which compiler this is.
    target = _run([compiler, *_FLAGS[:-2], "-dM", "-E", "-x", "c++", os.devnull])
    key = hashlib.sha256(b"\0".join([*sources, " ".join(_FLAGS).encode(), target])).hexdigest()[:32]
    try:
        folder = _cache_folder()
        built = folder / f"kernels-{key}.so"
        if not built.exists():
            _build(compiler, built)
        return ctypes.CDLL(str(built))
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        raise BuildError(f"the compiled kernels could not be kept or loaded: {error}") from error


def _compiler() -> str:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        raise BuildError(f"there is no C++ compiler ({', '.join(names)}) on PATH; install g++ or clang, or set CXX")
    return found


def _cache_folder() -> Path:
    """A folder that only this user can write to, since what lies in it is executed."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "lorafx"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022):
        raise BuildError(f"{folder} can be written to by other users, and would hold code that runs; remove it")
    return folder


def _build(compiler: str, built: Path) -> None:
    with tempfile.TemporaryDirectory(dir=built.parent) as made:
        new = Path(made) / built.name
        _run([compiler, *_FLAGS, str(_SOURCE), "-o", str(new)])
        new.replace(built)


def _run(command: list[str]) -> bytes:
    try:
        done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} did not run: {error}") from error
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise BuildError(f"{command[0]} failed: {said[0] if said else f'exit status {done.returncode}'}")
    return done.stdout
