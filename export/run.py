"""How far an export is: what its caller is told, and how long each phase took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from lorafx.errors import ExportError

#: Called with the phase and the share of it that is done.
Progress = Callable[[str, float], None]


@dataclass
class Run:
    """Times the phases of an export and tells the caller how far it is."""

    progress: Progress | None
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.progress is not None and not callable(self.progress):
            raise ExportError(f"progress={self.progress!r} cannot be called: give a function of a phase and a share")

    @contextmanager
    def phase(self, name: str) -> Iterator[Callable[[float], None]]:
        def tell(done: float) -> None:
            if self.progress is not None:
                self.progress(name, done)

        start = time.perf_counter()
        tell(0.0)
        yield tell
        tell(1.0)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
