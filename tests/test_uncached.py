"""Files written past the system's cache are what was written, whatever the file system makes of it."""

from __future__ import annotations

import errno
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from disk import room_for
from lorafx.export import uncached
from lorafx.export.uncached import Uncached, open_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="O_DIRECT is Linux's")
BLOCK = 2 * 4096


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uncached, "_BLOCK", BLOCK)


def pieces(size: int) -> Iterator[bytes]:
    """Bytes that tell their place, in pieces of sizes that fit nothing."""
    data = bytes(i * 7 % 251 for i in range(size))
    start = 0
    for length in itertools.cycle([1, 4095, 4096, 10_001]):
        if start >= size:
            return
        yield data[start : start + length]
        start += length


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, BLOCK, BLOCK + 4096, 3 * BLOCK - 1, 3 * BLOCK + 77])
def test_the_file_has_every_byte_once(size: int, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"x" * 100_000)  # an older file, that is replaced
    with Uncached(path) as file:
        for piece in pieces(size):
            file.write(memoryview(piece))
    assert path.read_bytes() == b"".join(pieces(size))


@pytest.mark.parametrize("refusal", ["open", "write"])
def test_a_file_system_without_direct_writes_gets_ordinary_ones(
    refusal: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some refuse such a file when it is opened, some the first write."""
    refused = []
    if refusal == "open":
        real_open = os.open

        def open_(path: Any, flags: int, *rest: int) -> int:
            if flags & os.O_DIRECT:
                refused.append(path)
                raise OSError(errno.EINVAL, "Invalid argument")
            return real_open(path, flags, *rest)

        monkeypatch.setattr(os, "open", open_)
    else:
        real_write = os.write

        def write(descriptor: int, data: memoryview) -> int:
            if not refused:
                refused.append(descriptor)
                raise OSError(errno.EINVAL, "Invalid argument")
            return real_write(descriptor, data)

        monkeypatch.setattr(os, "write", write)
    with Uncached(tmp_path / "weights") as file:
        for piece in pieces(3 * BLOCK + 5):
            file.write(piece)
    assert refused
    assert (tmp_path / "weights").read_bytes() == b"".join(pieces(3 * BLOCK + 5))


@pytest.mark.parametrize("limit", [BLOCK, BLOCK + 4096, BLOCK + 77])
def test_a_full_disk_is_called_that(limit: int, tmp_path: Path) -> None:
    """A write that is cut short, in the midst of a sector too, goes on to the error that tells why."""

    def write() -> None:
        with Uncached(tmp_path / "weights") as file:
            for piece in pieces(3 * BLOCK):
                file.write(piece)

    with room_for(limit), pytest.raises(OSError, match="File too large"):
        write()
    assert (tmp_path / "weights").stat().st_size == limit


def test_large_files_are_written_past_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uncached, "LIMIT", 1000)
    with open_for(tmp_path / "large", 1000) as large, open_for(tmp_path / "small", 999) as small:
        assert isinstance(large, Uncached)
        assert not isinstance(small, Uncached)
