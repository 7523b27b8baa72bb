"""The compiled provider's kernels: built once by the machine's compiler, for this user alone; or a reason why not."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorafx.kernels.cpu import build

SCRIPT = """
import torch, lorafx
from torch import nn
spec = lorafx.LoraSpec(r=2, dropout=0.1, target_modules=["0"])
gm = lorafx.apply(nn.Sequential(nn.Linear(6, 6), nn.Tanh()), spec, (torch.ones(4, 6),))
gm(torch.ones(4, 6)).sum().backward()
(row,) = lorafx.explain(gm).rows
print(row.provider, "|", dict(row.declined).get("cpu"))
try:
    lorafx.lower(gm, "cpu")
except lorafx.LoweringError as error:
    print("refused:", error)
"""


def in_fresh_cache(folder: Path, **environment: str) -> str:
    """What the script says in a process of its own."""
    paths = os.pathsep.join(sys.path)
    given = {**os.environ, "PYTHONPATH": paths, "XDG_CACHE_HOME": str(folder), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_a_compiler_auto_falls_back_and_says_so(tmp_path: Path) -> None:
    said = in_fresh_cache(tmp_path, CXX="/nonexistent")
    reason = "there is no C++ compiler (/nonexistent) on PATH; install g++ or clang, or set CXX"
    assert said.splitlines() == [
        f"torch | {reason}",
        f"refused: backend 'cpu' cannot serve '0': {reason}. Choose 'auto'",
    ]


def test_what_a_failing_compiler_says_is_told(tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'this compiler is broken' >&2\nexit 3\n")
    compiler.chmod(0o755)
    said = in_fresh_cache(tmp_path / "cache", CXX=str(compiler))
    assert said.startswith(f"torch | {compiler} failed: this compiler is broken\n")
    assert not list((tmp_path / "cache").rglob("*.so"))


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """No kernels are loaded yet, and the user's cache is this folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.load.cache_clear()
    build.load_built.cache_clear()
    yield tmp_path
    build.load.cache_clear()
    build.load_built.cache_clear()


def test_a_cache_that_others_can_write_to_is_refused(unloaded: Path) -> None:
    folder = unloaded / "lorafx"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(
        build.BuildError, match=r"lorafx can be written to by other users, and would hold code that runs"
    ):
        build.load()
    assert list(folder.iterdir()) == []


def test_the_kernels_are_built_once_for_this_user_alone(unloaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Path] = []

    def nothing(compiler: list[str], to: Path) -> None:
        built.append(to)
        to.unlink(missing_ok=True)
        subprocess.run([*compiler, "-shared", "-fPIC", "-x", "c++", os.devnull, "-o", str(to)], check=True)

    def load() -> int:
        build.load.cache_clear()
        build.load()
        return len(built)

    monkeypatch.setattr(build, "_build", lambda compiler, to: to.write_bytes(b"not a library"))
    with pytest.raises(build.BuildError, match="could not be kept or loaded"):
        load()
    monkeypatch.setattr(build, "_build", nothing)
    assert load() == 1, "what is damaged is built again"
    assert load() == 1
    folder = unloaded / "lorafx"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    monkeypatch.setenv("CXX", f"{build._compiler()[0]} -DARGUMENT")
    assert build._compiler()[1:] == ["-DARGUMENT"]
    assert load() == 2, "another compilation, another file"
    sources = unloaded / "sources"
    sources.mkdir()
    (sources / "other.cpp").write_text("// another source")
    monkeypatch.setattr(build, "_FOLDER", sources)
    assert load() == 3, "another source, another file"
    assert len(set(built)) == 3


def test_what_can_do_without_does_not_wait_for_a_compiler(unloaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes what was built before, if that can be loaded."""
    assert not build.load_built()
    assert list((unloaded / "lorafx").iterdir()) == []
    place = build._place(build._compiler())
    place.write_bytes(b"not a library")
    build.load_built.cache_clear()
    assert not build.load_built()
    subprocess.run([*build._compiler(), "-shared", "-fPIC", "-x", "c++", os.devnull, "-o", str(place)], check=True)
    build.load_built.cache_clear()
    assert build.load_built()
    monkeypatch.setenv("CXX", "no-such-compiler")
    build.load_built.cache_clear()
    assert not build.load_built()


def test_a_compiler_that_is_no_command_is_a_reason(unloaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", 'g++ "unclosed')
    with pytest.raises(build.BuildError, match=r"CXX is no command \(No closing quotation\)"):
        build.load()


def test_a_cache_that_cannot_be_written_is_a_reason(unloaded: Path) -> None:
    (unloaded / "lorafx").write_text("a file where the folder should be")
    with pytest.raises(build.BuildError, match="could not be kept or loaded"):
        build.load()
