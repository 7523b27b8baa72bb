"""Build the compiled operators with the machine's C++ compiler at first use, and keep them for the user.

They are built for this very processor and torch. The file's name tells sources, compiler, flags, processor and torch,
so that a home directory shared between machines holds one for each, and nothing stale is ever loaded.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from lorafx.kernels.cpu import ops as _schemas  # noqa: F401  # an operator without one breaks torch's list of them

_FOLDER = Path(__file__).parent
_SOURCE = _FOLDER / "ops.cpp"
_TORCH = Path(torch.__file__).parent
_FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++20",
    "-fopenmp",
    "-fPIC",
    "-w",
    f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
)
_TIMEOUT = 600.0


class BuildError(Exception):
    """Why there are no compiled kernels."""


@cache
def load() -> None:
    """See to it that the operators are there.

    Raises:
        BuildError: there is no compiler, or it failed; what it said is in the message.
    """
    compiler = _compiler()
    try:
        built = _place(compiler)
        if not built.exists() or not _loads(built):
            _build(compiler, built)
            _load(built)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        raise BuildError(f"the compiled kernels could not be kept or loaded: {error}") from error


@cache
def load_built() -> bool:
    """Have the operators if they were built before: what torch can do as well, only slower, waits for no compiler."""
    try:
        built = _place(_compiler())
        return built.exists() and _loads(built)
    except (BuildError, OSError, RuntimeError):
        return False


def _place(compiler: list[str]) -> Path:
    """Where the compiled operators are kept, whether they are there or not."""
    sources = [path.read_bytes() for path in sorted(_FOLDER.iterdir()) if path.suffix in (".cpp", ".h")]
    # What -march=native means here, and which compiler this is.
    target = _run([*compiler, *_FLAGS, "-dM", "-E", "-x", "c++", os.devnull])
    version = f"{torch.__version__} {torch.version.git_version} {' '.join(_FLAGS)}".encode()
    key = hashlib.sha256(b"\0".join([*sources, version, target])).hexdigest()[:32]
    return _cache_folder() / f"ops-{key}.so"


def _loads(built: Path) -> bool:
    """Whether it could be loaded: a damaged file is built again."""
    try:
        _load(built)
    except (OSError, RuntimeError):
        return False
    return True


def _load(built: Path) -> None:
    torch.ops.load_library(str(built))  # type: ignore[no-untyped-call]  # torch has no types there


def _compiler() -> list[str]:
    """The command: CXX, which may have arguments (``ccache g++``), or the first of the usual names."""
    try:
        given = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise BuildError(f"CXX is no command ({error}): {os.environ['CXX']}") from error
    names = given[:1] or ["c++", "g++", "clang++"]
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        raise BuildError(f"there is no C++ compiler ({', '.join(names)}) on PATH; install g++ or clang, or set CXX")
    return [found, *given[1:]]


def _cache_folder() -> Path:
    """A folder that only this user can write to, since what lies in it is executed."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "lorafx"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022):
        raise BuildError(f"{folder} can be written to by other users, and would hold code that runs; remove it")
    return folder


def _build(compiler: list[str], built: Path) -> None:
    with tempfile.TemporaryDirectory(dir=built.parent) as made:
        new = Path(made) / built.name
        torchs = [f"-I{_TORCH / 'include'}", f"-L{_TORCH / 'lib'}"]
        _run([*compiler, *_FLAGS, "-shared", *torchs, str(_SOURCE), "-o", str(new), "-lc10", "-ltorch_cpu"])
        new.replace(built)


def _run(command: list[str]) -> bytes:
    try:
        done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} did not run: {error}") from error
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        first = next((line for line in said if "error" in line), said[0] if said else f"exit status {done.returncode}")
        raise BuildError(f"{command[0]} failed: {first}")
    return done.stdout
