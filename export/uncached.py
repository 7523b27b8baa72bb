"""Writing large files past the system's cache.

What is written by the cache is copied into pages that have to be found for it, at the cost of whatever else is cached,
and a program that writes faster than the disk is held up until they are clean. A file that is too large to stay there
gains nothing for that. Linux takes whole, aligned blocks straight to the disk (``O_DIRECT``).
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, Self

if sys.platform != "win32":
    import fcntl

#: From this many bytes on. Smaller files are soon read again, by checks and by whoever runs them.
LIMIT = 2**30
#: What is written at once, and what its size and place must be a multiple of (of a disk's sectors, 4096 at most).
_BLOCK, _ALIGNMENT = 2**23, 4096


class Writable(Protocol):
    """What takes bytes, all of them."""

    def write(self, piece: memoryview | bytes, /) -> object: ...


def open_for(path: Path, size: int) -> AbstractContextManager[Writable]:
    """A new file, to be written from its beginning to its end, of about this many bytes."""
    return Uncached(path) if size >= LIMIT and sys.platform == "linux" else path.open("wb")


class Uncached:
    """Collects blocks and writes them past the cache; by it where the file system does not offer that."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        try:
            self._file = os.open(path, flags | os.O_DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._file = os.open(path, flags, 0o666)
        self._memory = mmap.mmap(-1, _BLOCK)  # begins with a page
        self._filled = 0

    def write(self, piece: memoryview | bytes) -> None:
        """Take these bytes; they are copied.

        Raises:
            OSError: the disk is full, or whatever else is wrong.
        """
        rest = memoryview(piece)
        while len(rest):
            count = min(len(rest), _BLOCK - self._filled)
            self._memory[self._filled : self._filled + count] = rest[:count]
            self._filled += count
            rest = rest[count:]
            if self._filled == _BLOCK:
                self._put()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                self._put()
        finally:
            os.close(self._file)
            self._memory.close()

    def _put(self) -> None:
        """Write what was collected."""
        with memoryview(self._memory) as block:
            done = 0
            while done < self._filled:
                if (self._filled - done) % _ALIGNMENT:  # the end; or what a disk that is almost full left over
                    self._use_cache()
                try:
                    done += os.write(self._file, block[done : self._filled])
                except OSError as error:
                    if error.errno != errno.EINVAL or not self._use_cache():
                        raise
        self._filled = 0

    def _use_cache(self) -> bool:
        """Write by the cache from here on; False: that was so before."""
        flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
        fcntl.fcntl(self._file, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        return bool(flags & os.O_DIRECT)
