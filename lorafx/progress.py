"""Progress bars, one for each part of a longer command, which also time the parts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Advance(Protocol):
    """Moves a part's bar on by ``count``; ``note`` is shown beside it."""

    def __call__(self, count: int = 1, note: str = "") -> None: ...


class Parts:
    """A live display with one bar a part; ``seconds`` holds the wall time of the parts that are done.

    A ``transient`` display goes when it is done, and is not shown where there is no terminal.
    """

    def __init__(self, console: Console, *, transient: bool = False) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=transient,
            disable=transient and not console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    @contextmanager
    def part(self, name: str, total: int = 1) -> Iterator[Advance]:
        """Run a part of ``total`` pieces of work under a bar of its own, which is full when the part ends."""
        task = self._progress.add_task(name, total=total, note="")

        def advance(count: int = 1, note: str = "") -> None:
            self._progress.update(task, advance=count, note=note)

        start = time.perf_counter()
        yield advance
        self.seconds[name] = time.perf_counter() - start
        self._progress.update(task, completed=total)
