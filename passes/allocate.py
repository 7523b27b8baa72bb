"""Allocate: give each site its own rank under one budget, before training, from a few batches of data.

Each rank i of each site has a gain, and ranks are bought one by one where the gain is largest for the price:

- ``"eva"`` (arXiv 2410.07170): the share of the variance of the site's inputs that lies along their i-th principal
  direction, ``s_i^2 / sum over j of s_j^2``, as in PEFT. It tells which inputs few directions describe well; it knows
  nothing of the task.
- ``"gradient"``: ``g_i^2``, for the singular values g of the gradient of the loss by the site's weight (what LoRA-GA,
  arXiv 2407.05000, starts from, and GoRA, arXiv 2502.12171, allocates by). To first order, the best step of rank r
  lowers the loss by ``g_1^2 + ... + g_r^2`` times the rate. In a plain stack of layers, where one can stand in for
  another, all look much alike to the first gradient; training tells them apart (:class:`lorafx.RankScheduler`).

The result is a plain pattern of ranks, to be printed, edited, and saved as JSON.
"""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import StringIO
from types import MappingProxyType
from typing import Any, Literal, Protocol, get_args

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.fx import Node

from lorafx import checks
from lorafx.errors import AdapterError, MatchError, SpecError
from lorafx.graph import CapturedModule
from lorafx.ir import Site
from lorafx.passes.capture import capture
from lorafx.passes.example import ExampleInputs
from lorafx.passes.layers import find_operands
from lorafx.passes.match import Choice, match
from lorafx.passes.observe import ITERATIONS, Batch, Directions, Loss, see_rows, sum_gradients, without_adapters
from lorafx.spec import LoraSpec, SpecLike, as_spec
from lorafx.variants import VARIANTS
from lorafx.variants.inits import INITS, leading_singular

Method = Literal["eva", "gradient"]

#: How many times its own rank a site may get, if nothing else is said: EVA's rho (arXiv 2410.07170, section 3.3).
RHO = 2


@dataclass(frozen=True)
class SiteRank:
    """One site of an allocation: ``was`` is the spec's rank, ``gain`` the share that ``r`` has of the site's gains."""

    site: str
    shape: tuple[int, ...]
    was: int
    r: int
    parameters: int
    gain: float


@dataclass(frozen=True)
class Allocation:
    """The ranks that :func:`allocate_ranks` chose. ``print(allocation)`` shows them as a table.

    ``rank_pattern`` is a plain dict from exact site names, escaped, to ranks, 0 for none. Edit it as you like, save it
    by ``json.dump``, and make a spec of it: by ``spec``, or by :func:`with_ranks` of one that was loaded. ``rows`` say
    what was chosen, and do not follow such edits.
    """

    rank_pattern: dict[str, int]
    rows: tuple[SiteRank, ...]
    budget: int
    unit: str
    base: LoraSpec = field(repr=False)

    @property
    def spec(self) -> LoraSpec:
        """The spec with these ranks, for :func:`lorafx.apply`."""
        return with_ranks(self.base, self.rank_pattern)

    @property
    def parameters(self) -> int:
        """Of all sites."""
        return sum(row.parameters for row in self.rows)

    def __str__(self) -> str:
        table = Table(title="lorafx ranks", title_justify="left")
        for column in ("site", "shape", "r", "was", "parameters", "gain"):
            table.add_column(column, justify="left" if column in ("site", "shape") else "right", overflow="fold")
        for row in self.rows:
            shape = " x ".join(map(str, row.shape))
            table.add_row(row.site, shape, str(row.r), str(row.was), f"{row.parameters:,}", f"{row.gain:.1%}")
        out = StringIO()
        console = Console(file=out, width=120)
        console.print(table)
        ranks = sum(row.r for row in self.rows)
        console.print(f"{ranks:,} ranks, {self.parameters:,} parameters; the budget is {self.budget:,} {self.unit}.")
        return out.getvalue()


def allocate_ranks(
    model: nn.Module,
    spec: SpecLike,
    batches: Iterable[Batch],
    *,
    budget: int | None = None,
    mean_rank: float | None = None,
    method: Method = "eva",
    max_rank: int | None = None,
    min_rank: int = 0,
    loss_fn: Loss | None = None,
    example_inputs: ExampleInputs = None,
    dynamic_shapes: Mapping[str, Any] | None = None,
) -> Allocation:
    """Choose a rank for each site that ``spec`` means, under one budget. Nothing is changed.

    Args:
        model: the model, or a graph of lorafx's, which is looked at without its adapters.
        spec: what :func:`lorafx.apply` will be given; its ranks are the sites' in the mean, its scaling at each site
            stays what it is.
        batches: inputs, each a dict of keyword arguments, a tuple of positional ones or a tensor; read once, one
            after the other. Rows that an ``attention_mask`` among them hides are not looked at by ``"eva"``.
        budget: the number of parameters of all sites together.
        mean_rank: instead, the mean of all sites' ranks. With neither, it is the spec's. (In ranks, a wide layer's cost
            no more than a narrow one's.)
        method: where the gains come from, see the module's docstring. ``"eva"`` looks at linear layers only, and keeps
            a few directions of each different input; ``"gradient"`` at all, and needs a loss and memory for one
            gradient a weight in float32.
        max_rank: at most for one site; None: twice its rank by the spec. Never more than the weight's sides.
        min_rank: at least for each site; 0: a site may be left out.
        loss_fn: ``loss_fn(outputs, batch)`` for ``"gradient"``; None: the outputs' ``loss``. With it, a dict among
            the batches may hold labels and the like that only the loss needs.
        example_inputs, dynamic_shapes: for a model, as in :func:`lorafx.apply`.

    Raises:
        SpecError: the budget buys nothing, or less than ``min_rank`` costs; the variant has no ranks of its own at each
            site; an argument is not allowed.
        MatchError: as :func:`lorafx.apply`; or ``"eva"`` cannot look at a site.
        AdapterError: there are no batches, or a site's inputs or gradient hold NaN or Inf, or are all zero.
    """
    spec = as_spec(spec)
    if method not in _GAINS:
        raise SpecError(f"method={method!r} is not allowed: expected one of {', '.join(map(repr, get_args(Method)))}.")
    variant = VARIANTS[spec.variant]
    if variant.shrinks or variant.shared:
        raise SpecError(
            f"LoraSpec.variant={spec.variant!r} does not take ranks that are chosen before training: "
            + ("it finds them itself (RankScheduler)." if variant.shrinks else "all its sites share their matrices.")
        )
    if budget is not None and mean_rank is not None:
        raise SpecError("allocate_ranks: budget (parameters) and mean_rank exclude each other; give one.")
    checks.count("min_rank", min_rank)
    checks.optional(checks.rank)("max_rank", max_rank)
    gm = model if isinstance(model, CapturedModule) else capture(model, example_inputs, dynamic_shapes=dynamic_shapes)
    with without_adapters(gm) as bare:
        choices = [c for c in match(bare, (spec,)) if c.site is not None and c.site.variant == spec.variant]
        wishes = [_Wish(c.site, spec, max_rank) for c in choices if c.site is not None]
        gains = _GAINS[method](bare, choices, [w.ranks[-1] for w in wishes], batches, loss_fn)
    if budget is not None:
        limit, unit = checks.rank("budget", budget), "parameters"
    else:
        mean = checks.number("mean_rank", mean_rank) if mean_rank is not None else None
        limit = sum(w.site.r for w in wishes) if mean is None else round(mean * len(wishes))
        unit = "ranks"
    ranks = _buy(wishes, gains, limit, min_rank, unit == "parameters")
    rows = tuple(
        SiteRank(
            site=w.site.name,
            shape=w.site.shape,
            was=w.site.r,
            r=r,
            parameters=w.parameters(r),
            gain=sum(gains[i][:r]) / total if (total := sum(gains[i])) > 0.0 else 0.0,
        )
        for i, (w, r) in enumerate(zip(wishes, ranks, strict=True))
    )
    return Allocation({f"^{re.escape(row.site)}": row.r for row in rows}, rows, limit, unit, spec)


def with_ranks(spec: LoraSpec, rank_pattern: Mapping[str, int]) -> LoraSpec:
    """A spec with these ranks, by exact site names as in :attr:`Allocation.rank_pattern`.

    Sites of rank 0 are left out (``exclude_modules``). The scaling of the others stays what it was: ``alpha_pattern``
    says alpha / r, or with rsLoRA alpha / sqrt(r), anew for each rank that is another one.

    Raises:
        SpecError: a key is no exact name, or a rank is not allowed.
    """
    names = {key: _exact_name(key) for key in rank_pattern}
    kept = {key: checks.rank(f"rank_pattern[{key!r}]", r) for key, r in rank_pattern.items() if r != 0}
    alphas = {}
    for key, r in kept.items():
        name = names[key]
        if r != spec.rank_for(name):
            alphas[key] = spec.scaling_for(name) / VARIANTS[spec.variant].scaling(1.0, r, spec.rslora)
    excluded = [re.escape(names[key]) for key in rank_pattern if key not in kept]
    known = spec.exclude_modules
    if known is not None:
        excluded.append(known if isinstance(known, str) else rf"(?:.*\.)?(?:{'|'.join(map(re.escape, known))})")
    return replace(
        spec,
        rank_pattern={**kept, **{key: r for key, r in spec.rank_pattern.items() if key not in kept}},
        alpha_pattern={**alphas, **{key: alpha for key, alpha in spec.alpha_pattern.items() if key not in alphas}},
        exclude_modules="|".join(f"(?:{e})" for e in excluded) if len(excluded) > (known is not None) else known,
    )


def _exact_name(key: str) -> str:
    name = re.sub(r"\\(.)", r"\1", key.removeprefix("^"))
    if key != f"^{re.escape(name)}":
        raise SpecError(f"rank_pattern[{key!r}]: expected the exact name of a site ('^' and the name, escaped).")
    return name


class _Wish:
    """The ranks that a site can have, ascending from 0, and what they cost."""

    def __init__(self, site: Site, spec: LoraSpec, max_rank: int | None) -> None:
        self.site = site
        self.variant = VARIANTS[site.variant]
        most = min(RHO * site.r if max_rank is None else max_rank, *site.shape[-2:])

        def fits(r: int) -> bool:
            return self.variant.misfit(spec.init, site.kind, site.shape, r, site.apart) is None

        self.ranks = [0, *(r for r in range(1, most + 1) if fits(r))]

    def parameters(self, r: int) -> int:
        """What rank r costs; nothing for 0."""
        shapes = replace(self.site, r=r).parameter_shapes()
        return sum(math.prod(shape) for shape in shapes.values()) if r else 0


def _buy(
    wishes: Sequence[_Wish], gains: Sequence[Sequence[float]], limit: int, min_rank: int, by_parameters: bool
) -> list[int]:
    """The rank of each site: from ``min_rank`` on, always the next that gains most for its price and can be paid."""

    def price(w: _Wish, r: int) -> int:
        return w.parameters(r) if by_parameters else r

    places = [next((i for i, r in enumerate(w.ranks) if r >= min_rank), len(w.ranks) - 1) for w in wishes]
    spent = sum(price(w, w.ranks[i]) for w, i in zip(wishes, places, strict=True))
    unit = "parameters" if by_parameters else "ranks"
    if spent > limit:
        raise SpecError(
            f"min_rank={min_rank} at {len(wishes)} sites takes {spent:,} {unit}, and the budget is {limit:,}: raise "
            "it, or lower min_rank."
        )

    def offer(index: int) -> tuple[float, int, int] | None:
        ranks, place = wishes[index].ranks, places[index]
        if place + 1 == len(ranks):
            return None
        low, high = ranks[place], ranks[place + 1]
        cost = price(wishes[index], high) - price(wishes[index], low)
        return -sum(gains[index][low:high]) / cost, index, cost

    offers = [o for index in range(len(wishes)) if (o := offer(index)) is not None]
    heapq.heapify(offers)
    while offers:
        worth, index, cost = heapq.heappop(offers)
        if worth < 0.0 and spent + cost <= limit:
            spent += cost
            places[index] += 1
            if (following := offer(index)) is not None:
                heapq.heappush(offers, following)
    ranks = [w.ranks[i] for w, i in zip(wishes, places, strict=True)]
    if not any(ranks):
        cheapest = min(price(w, w.ranks[1]) for w in wishes if len(w.ranks) > 1)
        raise SpecError(f"a budget of {limit:,} {unit} buys no rank; the cheapest costs {cheapest:,}.")
    return ranks


# Gains


class _Gains(Protocol):
    """The gains of the first ``counts[i]`` ranks of each chosen site, not increasing."""

    def __call__(
        self,
        bare: CapturedModule,
        choices: Sequence[Choice],
        counts: Sequence[int],
        batches: Iterable[Batch],
        loss_fn: Loss | None,
    ) -> list[list[float]]: ...


def _eva(
    bare: CapturedModule,
    choices: Sequence[Choice],
    counts: Sequence[int],
    batches: Iterable[Batch],
    loss_fn: Loss | None,
) -> list[list[float]]:
    """Shares of variance. Sites with the same inputs (q, k, v) share the work."""
    kinds = INITS["eva"].kinds or ()
    inputs = []
    for choice in choices:
        candidate = choice.candidate
        if candidate.kind not in kinds:
            raise MatchError(
                f"site '{candidate.name}': method='eva' looks at the activations that a linear layer multiplies, and "
                f"this is of kind {candidate.kind!r}: leave it out (exclude_modules), or take method='gradient'"
            )
        inputs.append(tuple(operands.x for node in candidate.nodes if (operands := find_operands(node))))
    names = {node: choice.candidate.name for choice, nodes in zip(choices, inputs, strict=True) for node in nodes}
    most: dict[tuple[Node, ...], int] = {}
    for nodes, count in zip(inputs, counts, strict=True):
        most[nodes] = max(count, most.get(nodes, 0))
    directions = {nodes: Directions(count) for nodes, count in most.items()}

    def see(node: Node, rows: torch.Tensor) -> None:
        if not bool(rows.isfinite().all()):
            raise AdapterError(f"site '{names[node]}': its inputs on these batches hold NaN or Inf")
        for nodes, found in directions.items():
            if node in nodes:
                found.add(rows)

    _refuse_none(see_rows(bare, names.keys(), batches, see))
    for choice, nodes in zip(choices, inputs, strict=True):
        if directions[nodes].scatter == 0.0:
            raise AdapterError(
                f"site '{choice.candidate.name}': its inputs on these batches ({directions[nodes].rows} rows) are all "
                "the same; give more data"
            )
    return [directions[nodes].explained(count) for nodes, count in zip(inputs, counts, strict=True)]


def _gradient(
    bare: CapturedModule,
    choices: Sequence[Choice],
    counts: Sequence[int],
    batches: Iterable[Batch],
    loss_fn: Loss | None,
) -> list[list[float]]:
    """Squared singular values; experts have a rank in common, and its gains are added."""
    found = [choice.site for choice in choices if choice.site is not None]
    gradients, seen = sum_gradients(bare, (site.weight for site in found), batches, loss_fn)
    _refuse_none(seen)
    gains = []
    for site, count in zip(found, counts, strict=True):
        gradient = gradients.get(site.weight)
        if gradient is None or not bool(gradient.isfinite().all()):
            what = "no gradient" if gradient is None else "a gradient with NaN or Inf"
            raise AdapterError(f"site '{site.name}': '{site.weight}' gets {what} on these batches; give it other data")
        matrices = site.matrix(gradient)
        total = torch.zeros(count, dtype=torch.float64)
        for matrix in matrices if matrices.dim() == 3 else [matrices]:
            values = leading_singular(matrix, count, ITERATIONS, torch.Generator().manual_seed(0))[1]
            total += values.double().square().cpu()
        gains.append(total.tolist())
    if not any(map(any, gains)):
        raise AdapterError("the gradients of all sites are zero on these batches; give other data, or another loss")
    return gains


def _refuse_none(batches: int) -> None:
    if batches == 0:
        raise AdapterError("allocate_ranks was given no batches (an iterator that was read before is empty)")


_GAINS: Mapping[str, _Gains] = MappingProxyType({"eva": _eva, "gradient": _gradient})
