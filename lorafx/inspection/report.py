"""What is measured of each site of an adapter, as data and as a table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import Tensor

from lorafx.arithmetic.low_rank import Matrix, norm, singular_values


@dataclass(frozen=True)
class SiteInspection:
    """One site: its settings, and what it changes of the weight, ``W' - W`` with the scaling included.

    Attributes:
        site, variant, rank: as in the adapter; ``scaling`` is None where the variant has none.
        shape: the changed matrix's, ``[out, in]`` or ``[experts, out, in]``; None where the file does not say.
        singular_values: of the change, largest first; of a stack, the root of the mean square of each.
        norm: Frobenius norm of the change (of a stack: of all of it).
        spectral_norm: its largest singular value (of a stack: the largest of all).
        effective_rank: exp of the entropy of the singular values over their sum (Roy and Vetterli, EUSIPCO 2007):
            1 where one direction has all, ``rank`` where all have the same; of a stack the mean.
        share: ``norm`` over the Frobenius norm of the base's weight; None without one.
        note: why there are no numbers, where there are none.
    """

    site: str
    variant: str
    rank: int
    scaling: float | None
    shape: tuple[int, ...] | None
    singular_values: tuple[float, ...] = ()
    norm: float | None = None
    spectral_norm: float | None = None
    effective_rank: float | None = None
    share: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Inspection:
    """What is to be seen of an adapter; ``notes`` say what is in it beside its sites."""

    adapter: str
    sites: tuple[SiteInspection, ...]
    notes: tuple[str, ...] = ()

    @property
    def norm(self) -> float:
        """The Frobenius norm of all changes together."""
        return math.sqrt(math.fsum((s.norm or 0.0) ** 2 for s in self.sites))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON data."""
        return {"norm": self.norm, **dataclasses.asdict(self)}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(title=f"adapter {self.adapter}", title_justify="left")
        texts = ("site", "variant", "shape")
        for column in (*texts, "rank", "scaling", "norm", "spectral norm", "effective rank", "share of base"):
            table.add_column(column, justify="left" if column in texts else "right", overflow="fold")
        for s in self.sites:
            table.add_row(
                Text(s.site),
                s.variant,
                "?" if s.shape is None else " x ".join(map(str, s.shape)),
                str(s.rank),
                _shown(s.scaling),
                _shown(s.norm),
                _shown(s.spectral_norm),
                _shown(s.effective_rank),
                "" if s.share is None else f"{s.share:.2%}",
            )
        yield table
        yield Text(f"{len(self.sites)} sites, norm of all changes together {self.norm:.4g}.")
        reasons = dict.fromkeys(s.note for s in self.sites if s.note)
        for reason in reasons:
            concerned = [s.site for s in self.sites if s.note == reason]
            names = ", ".join(concerned[:3]) + (", ..." if len(concerned) > 3 else "")
            yield Text(f"no numbers for {len(concerned)} sites ({names}): {reason}")
        yield from map(Text, self.notes)

    def __str__(self) -> str:
        out = StringIO()
        Console(file=out, width=140).print(self)
        return out.getvalue()


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def measure(settings: SiteInspection, matrix: Matrix, base: Tensor | None) -> SiteInspection:
    """The numbers of a change ``matrix``, filled in; ``base`` is the weight that it changes, if it has data."""
    values = singular_values(matrix)
    size = norm(matrix)
    several = values if values.dim() > 1 else values.unsqueeze(0)  # a row for each matrix of a stack
    whole = None if base is None or base.is_meta else norm(base.detach())
    return dataclasses.replace(
        settings,
        singular_values=tuple(several.square().mean(0).sqrt().tolist()),
        norm=size,
        spectral_norm=float(values.max()) if values.numel() else 0.0,
        effective_rank=float(torch.stack([effective_rank(row) for row in several]).mean()),
        share=None if not whole else size / whole,
    )


def effective_rank(singular: Tensor) -> Tensor:
    """``exp(-sum p_i log p_i)`` with ``p`` the singular values ``[k]`` over their sum; 0 where all are zero."""
    total = singular.sum()
    if not bool(total > 0):
        return torch.zeros((), dtype=singular.dtype, device=singular.device)
    entropy: Tensor = torch.special.entr(singular / total).sum()
    return entropy.exp()


def trained_whole(names: Sequence[str]) -> Iterator[str]:
    """The note on tensors that an adapter has trained whole."""
    if names:
        more = ", ..." if len(names) > 4 else ""
        yield f"trained whole: {', '.join(names[:4])}{more} ({len(names)} tensors)"
