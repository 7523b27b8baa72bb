"""Explain: what computes each site of a graph, and why nothing better does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO

from rich.console import Console
from rich.table import Table
from torch.fx import Node

from lorafx.graph import CapturedModule
from lorafx.ir import Site, active_layers, layer_nodes
from lorafx.passes.group import why_left
from lorafx.passes.lower import REFERENCE, Decision, backend_of, decide


@dataclass(frozen=True)
class ExplanationRow:
    """One call of an adapted layer.

    ``group`` counts the calls that are computed together with it; ``declined`` has the providers that are liked
    better, with their reasons.
    """

    site: str
    kind: str
    provider: str
    group: int
    declined: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found; ``print`` shows it as a table."""

    backend: str
    rows: tuple[ExplanationRow, ...]

    def __str__(self) -> str:
        table = Table(title=f"lorafx lowering, backend '{self.backend}'", title_justify="left")
        for column in ("site", "kind", "provider", "grouped", "why not another"):
            table.add_column(column, overflow="fold")
        for row in self.rows:
            why = "; ".join(f"{name}: {reason}" for name, reason in row.declined)
            table.add_row(row.site, row.kind, row.provider, f"of {row.group}" if row.group > 1 else "", why)
        out = StringIO()
        Console(file=out, width=120).print(table)
        return out.getvalue()


def explain(gm: CapturedModule) -> Explanation:
    """Who computes each call of an adapted layer, and why the providers before it in line do not.

    Raises:
        PassError: it is no graph of lorafx's.
    """
    backend = backend_of(gm)
    nodes = layer_nodes(gm)
    decisions = {m.node: d for d in decide(gm, gm.graph, backend) for m in d.members}
    rows = []
    for layer, found in active_layers(gm).items():
        rows += [_row(node, found, decisions.get(node), backend) for node in nodes[layer]]
    return Explanation(backend, tuple(rows))


def _row(node: Node, found: Sequence[Site], decision: Decision | None, backend: str) -> ExplanationRow:
    site = found[0]
    if decision is not None:
        size = len(decision.members) if decision.provider != REFERENCE else 1
        return ExplanationRow(site.name, site.kind, decision.provider, size, tuple(decision.declined.items()))
    reason = None if backend == REFERENCE else why_left(node)
    return ExplanationRow(site.name, site.kind, REFERENCE, 1, () if reason is None else (("all", reason),))
