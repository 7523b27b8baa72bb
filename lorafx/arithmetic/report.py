"""What was made of which sites, and how near it came: as data and as a table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from io import StringIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class SiteReport:
    """One site. ``norm`` is the Frobenius norm of the change that was wanted, scaling included.

    ``error`` is the norm of what was left of that, over ``norm``: what the rank does not hold, and rounding.
    """

    site: str
    shape: tuple[int, ...]
    rank: int
    norm: float
    error: float


@dataclass(frozen=True)
class FactorReport:
    """What an adapter was made of; ``left_out`` has a name and the reason for what is not in it."""

    title: str
    sites: tuple[SiteReport, ...]
    left_out: tuple[tuple[str, str], ...] = ()

    @property
    def error(self) -> float:
        """The relative error of all sites together."""
        size = math.sqrt(math.fsum(s.norm**2 for s in self.sites))
        return math.sqrt(math.fsum((s.error * s.norm) ** 2 for s in self.sites)) / size if size else 0.0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(title=self.title, title_justify="left")
        for column in ("site", "shape", "rank", "norm of the change", "relative error"):
            table.add_column(column, justify="left" if column in ("site", "shape") else "right", overflow="fold")
        for site in self.sites:
            shape = " x ".join(map(str, site.shape))
            table.add_row(Text(site.site), shape, str(site.rank), f"{site.norm:.4g}", f"{site.error:.2g}")
        yield table
        yield Text(f"{len(self.sites)} sites, relative error of all together {self.error:.2g}.")
        for name, reason in self.left_out:
            yield Text(f"not in it: {name} ({reason})")

    def __str__(self) -> str:
        out = StringIO()
        Console(file=out, width=120).print(self)
        return out.getvalue()
