"""A thread that works on what another one makes, a few pieces behind."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Self

Piece = memoryview | bytes


class Pipe:
    """Hands pieces of bytes to ``consume`` in another thread, in order; its error is raised by ``put`` or at the end.

    At most ``ahead`` pieces wait.
    """

    def __init__(self, consume: Callable[[Piece], object], ahead: int = 2) -> None:
        self._consume = consume
        self._waiting: queue.Queue[Piece | None] = queue.Queue(ahead)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="lorafx-write", daemon=True)

    def put(self, piece: Piece) -> None:
        """Hand over a piece, when there is room."""
        if self._error is not None:
            raise self._error
        if len(piece):
            self._waiting.put(piece)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._waiting.put(None)
        self._thread.join()
        if kind is None and self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (piece := self._waiting.get()) is not None:
            if self._error is None:
                try:
                    self._consume(piece)
                except BaseException as error:  # noqa: BLE001  # raised again in the thread that puts
                    self._error = error
