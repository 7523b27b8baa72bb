"""Plan: what ``apply`` would do, as data and as a table, before anything is done."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn
from torch.fx import Node

from lorafx.checks import format_bytes
from lorafx.graph import CapturedModule
from lorafx.ir import Site
from lorafx.passes.layers import find_operands
from lorafx.passes.match import Choice


@dataclass(frozen=True)
class PlanRow:
    """One layer. Adapted: ``reason`` is empty; left out: it says why, and r and scale are None."""

    site: str
    kind: str
    shape: tuple[int, ...]
    r: int | None
    scaling: float | None
    parameters: int
    reason: str


@dataclass(frozen=True)
class Plan:
    """What would be adapted.

    ``trainable`` and ``total`` count parameters (the model's own plus the adapters');
    ``optimizer_bytes`` is AdamW's state (two float32 values a trainable parameter);
    ``activation_bytes`` is what the adapters keep for the backward pass at the example's sizes, before lowering, which
    keeps less: the rank-r activations, and with dropout a dropped input and its mask a site; where a parameter is
    adapted and not a layer, a weight of its size.
    """

    rows: tuple[PlanRow, ...]
    trainable: int
    total: int
    optimizer_bytes: int
    activation_bytes: int

    @property
    def adapted(self) -> tuple[PlanRow, ...]:
        """The layers that get an adapter."""
        return tuple(r for r in self.rows if not r.reason)

    @property
    def left_out(self) -> tuple[PlanRow, ...]:
        """The layers that get none."""
        return tuple(r for r in self.rows if r.reason)

    def __str__(self) -> str:
        table = Table(title="lorafx plan", title_justify="left")
        for column in ("site", "shape", "r", "scale", "new parameters", "left out because"):
            right = column in ("r", "scale", "new parameters")
            table.add_column(column, justify="right" if right else "left", overflow="fold")
        for row in self.rows:
            table.add_row(
                row.site,
                " x ".join(map(str, row.shape)),
                "" if row.r is None else str(row.r),
                "" if row.scaling is None else f"{row.scaling:.4g}",
                f"{row.parameters:,}" if row.parameters else "",
                row.reason,
            )
        share = self.trainable / self.total if self.total else 0.0
        out = StringIO()
        console = Console(file=out, width=120)
        console.print(table)
        console.print(
            f"{len(self.adapted)} layers adapted, {len(self.left_out)} left out. Trainable: {self.trainable:,} of "
            f"{self.total:,} parameters ({share:.2%}). AdamW state: {format_bytes(self.optimizer_bytes)}; "
            f"activations kept for the adapters at the example's sizes: {format_bytes(self.activation_bytes)}."
        )
        return out.getvalue()


def make_plan(gm: CapturedModule, choices: Sequence[Choice], trained: Sequence[nn.Parameter] = ()) -> Plan:
    """The plan of a captured (not yet adapted) graph; ``trained`` are base parameters that train whole."""
    rows = []
    trainable = sum(p.numel() for p in trained)
    new = activations = 0
    for choice in choices:
        candidate, site, spec = choice.candidate, choice.site, choice.spec
        count = 0
        if site is not None and spec is not None:
            count = sum(math.prod(s) for s in site.parameter_shapes().values())
            width = spec.dtype_for(candidate.dtype).itemsize
            activations += sum(_saved_bytes(n, site, width) for n in candidate.nodes)
        new += count
        rows.append(
            PlanRow(
                candidate.name,
                candidate.kind,
                candidate.shape,
                site.r if site else None,
                site.scaling if site else None,
                count,
                choice.reason,
            )
        )
    rows += _never_called(gm, {c.candidate.name for c in choices})
    base = sum(p.numel() for p in gm.parameters())
    trainable += new
    return Plan(tuple(rows), trainable, base + new, 8 * trainable, activations)


def _never_called(gm: CapturedModule, known: Collection[str]) -> list[PlanRow]:
    """Rows for layers that are no candidates: not reached, inside a module called whole, or of a kind without one."""
    whole = [str(n.target) for n in gm.graph.nodes if n.op == "call_module"]
    rows = []
    for name, module in gm.named_modules():
        weight = module._parameters.get("weight")
        kind = getattr(module, "kind", "")
        if name in known or weight is None:
            continue
        inside = next((w for w in whole if name == w or name.startswith(f"{w}.")), None)
        if inside is not None and isinstance(module, nn.Linear):
            kind, reason = (
                "linear",
                f"inside '{inside}', which is called as a whole; give example_inputs to see into it",
            )
        elif kind == "linear":
            reason = "never called with these inputs"
        elif kind == "transposed convolution":
            reason = "a transposed convolution, which cannot be adapted"
        else:
            continue
        rows.append(PlanRow(name, kind, tuple(weight.shape), None, None, 0, reason))
    return rows


def _saved_bytes(node: Node, site: Site, width: int) -> int:
    """What one call (or, of a parameter, one read) keeps for the backward pass."""
    value = node.meta.get("val")
    operands = find_operands(node)
    if value is None or operands is None:
        return 0 if value is None else math.prod(value.shape) * value.dtype.itemsize
    saved = math.prod(_hint(s) for s in value.shape) // site.out_features * site.r * width
    x = operands.x.meta.get("val")
    if site.dropout > 0.0 and x is not None:
        saved += math.prod(_hint(s) for s in x.shape) * (width + 1)
    return saved


def _hint(size: Any) -> int:
    """The size at the example inputs of a possibly symbolic dimension."""
    return size if isinstance(size, int) else int(size.node.hint)
