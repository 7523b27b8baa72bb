"""Combine and convert: a new plain LoRA adapter from the changes that others of the graph make."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import replace
from functools import reduce
from itertools import combinations

import torch
from torch import Tensor

from lorafx import checks
from lorafx.adapters import check_new_name
from lorafx.arithmetic.changes import Change, PlainSite, find_change, make_cut, make_plain, trains_rows
from lorafx.arithmetic.low_rank import Cut, Factors, Matrix, add, dense, scaled
from lorafx.arithmetic.methods import METHODS, Method, Thinning, merge
from lorafx.arithmetic.report import FactorReport
from lorafx.arithmetic.result import put_plain, whole_tensors
from lorafx.errors import AdapterError
from lorafx.graph import CapturedModule, get_path
from lorafx.ir import Adapter, Site, find_adapter

Place = tuple[Site, list[tuple[int, Site]]]
"""A site of the combined adapter, and those that it is combined of, with the numbers of their adapters."""

Member = tuple[Change, float, Site]
"""What one adapter does at a place, its weight, and its site there."""


def combine_adapters(
    gm: CapturedModule,
    names: Sequence[str],
    weights: Sequence[float],
    method: str,
    into: str,
    *,
    density: float | None = None,
    majority_sign: str = "total",
    rank: int | None = None,
    energy: float | None = None,
    niter: int | None = None,
    heads: str | None = None,
    seed: int | None = None,
) -> FactorReport:
    """Make one adapter of several, in place: ``into``, of plain LoRA with scaling 1, not active.

    What is combined is what each adapter makes of the frozen weights, ``D_i = W_i' - W``, with its scaling (alpha,
    rsLoRA, patterns) and whatever its variant does. A site that an adapter does not have counts as zero there.
    Changes of biases (``variant="lora_bias"``) and rows of embeddings (``trainable_token_indices``) are combined by
    the same formula, and kept as such.

    - ``"cat"``: ``sum w_i D_i``, exactly: the factors side by side, with as many ranks as all have together. For
      variants that have factors; not DoRA, which rescales the rows of W too.
    - ``"linear"``: the same sum, with the ranks of adapters that have the same A at a site shared.
    - ``"svd"``: the nearest to that sum of lower rank (``rank``, ``energy``); for all variants.
    - ``"ties"``, ``"dare_linear"``, ``"dare_ties"``, ``"magnitude_prune"``, each also with ``_svd``, which means the
      same here: by elements, at a ``density``, and then factored as ``"svd"`` is. See :mod:`lorafx.arithmetic.methods`
      for the formulas, their papers, and where PEFT's methods of these names differ.

    One adapter with weight 1.0 is that adapter: ``"cat"`` and ``"linear"`` give its outputs bit for bit. What has an
    adapter by LoftQ in it, whatever its weight, has a part of what the base lost in it, and counts as started so.

    Args:
        gm: a graph with the adapters.
        names: which ones; merged in place or not, active or not.
        weights: one for each, of any sign.
        method: one of the above.
        into: the name of the new adapter.
        density: the share of elements that stays, above 0 and at most 1; for the methods that thin out, and needed.
        majority_sign: ``"total"`` or ``"frequency"``: how ``ties`` elects a sign.
        rank: of the result, at most; None: the sum of the adapters' ranks at a site. Not for ``"cat"``, ``"linear"``.
        energy: the least rank that holds this share of the squared norm, above 0 and at most 1, instead.
        niter: use a randomized SVD with that many iterations where a change has no factors; not with ``energy``.
        heads: the adapter whose ``modules_to_save`` and trained biases the result gets. They are no changes of low rank
            and are not combined. None: those of all adapters that have some, which must be equal.
        seed: makes what ``dare`` drops (and ``niter``) reproducible; None: torch's global state.

    Returns:
        Each site's rank, the norm of its change and the error of the factors. ``print(report)`` shows a table.

    Raises:
        AdapterError: there is no such adapter, one is named twice or holds NaN or Inf; the name is taken; not as many
            weights as names; a method that needs factors meets a site that has none; adapters that have shapes at one
            weight that do not go together, or different heads.
        SpecError: ``method``, ``density``, ``rank`` or another setting is not allowed. Nothing is changed.
    """
    chosen = _chosen(gm, names, weights)
    check_new_name(gm, into)
    how, thinning, cut = _settings(method, density, majority_sign, rank, energy, niter, seed)
    factors = [checks.number("combine_adapters: weights", w) for w in weights]
    if heads is not None and heads not in names:
        raise AdapterError(f"heads='{heads}' is none of the adapters that are combined: {', '.join(names)}")
    keepers = [a for a in chosen if heads in (None, a.name)]
    whole = whole_tensors(gm, keepers)
    made: list[PlainSite] = []
    left_out = []
    with torch.no_grad():
        for site, members in _places(gm, chosen, into):
            found = [(find_change(gm, chosen[i], member), factors[i], member) for i, member in members]
            change = _combined(how, thinning, site, found)
            limit = None if how.keeps_factors else cut.limited(sum(s.r for _, s in members))
            plain = make_plain(gm, site, change, limit)
            if plain is None:
                left_out.append((site.name, "no change"))
            else:
                made.append(plain)
    put_plain(gm, into, chosen, keepers, made, whole)
    what = ", ".join(f"{w:g} {n}" for n, w in zip(names, factors, strict=True))
    return FactorReport(f"{into}: {method} of {what}", tuple(p.report for p in made), tuple(left_out))


def convert(
    gm: CapturedModule,
    adapter: str,
    into: str,
    *,
    variant: str = "lora",
    rank: int | None = None,
    energy: float | None = None,
    niter: int | None = None,
    seed: int | None = None,
) -> FactorReport:
    """Make a plain LoRA adapter of another, in place: relative to the base's own weights, scaling 1, not active.

    Exact for LoRA of any scaling, VeRA and AdaLoRA, whose factors are kept; and, at twice its rank, for LoRA that
    started by taking from the weight (PiSSA, OLoRA, LoRA-GA), but for the rounding of the weight that it left. DoRA
    rescales the rows of the weight, which leaves no low rank: the result is the nearest one of the site's rank, or of
    ``rank`` or ``energy``, and the report says how near. Sites from which AdaLoRA took all ranks are left out. What
    trains whole (``modules_to_save``, biases) goes along.

    Args:
        gm: a graph with the adapter.
        adapter: its name.
        into: the name of the new one.
        variant: ``"lora"`` is what there is to convert to.
        rank, energy: factor what is exact otherwise, too: as in :func:`combine_adapters`.
        niter, seed: as in :func:`combine_adapters`.

    Returns:
        Each site's rank, the norm of its change and the error of the factors.

    Raises:
        AdapterError: there is no such adapter, it holds NaN or Inf, or the name is taken.
        SpecError: ``variant``, ``rank`` or another setting is not allowed. Nothing is changed.
    """
    source = find_adapter(gm, adapter)
    check_new_name(gm, into)
    checks.one_of(("lora",))("convert: variant", variant)
    cut = make_cut("convert", rank, energy, niter, seed)
    asked = rank is not None or energy is not None
    whole = whole_tensors(gm, [source])
    made: list[PlainSite] = []
    left_out = []
    with torch.no_grad():
        for site in source.sites:
            change = find_change(gm, source, site)
            exact = isinstance(change.matrix, Factors) and not asked
            plain = make_plain(gm, replace(site, adapter=into), change, None if exact else cut.limited(site.r))
            if plain is None:
                left_out.append((site.name, "no change"))
            else:
                made.append(plain)
    put_plain(gm, into, [source], [source], made, whole)
    return FactorReport(f"{into}: {adapter} as plain LoRA", tuple(p.report for p in made), tuple(left_out))


def _chosen(gm: CapturedModule, names: Sequence[str], weights: Sequence[float]) -> list[Adapter]:
    """The adapters to combine."""
    for given in (names, weights):
        if isinstance(given, str) or not isinstance(given, Sized) or len(given) == 0:
            raise AdapterError(f"combine_adapters takes a list of names and a list of weights, not {given!r}")
    if len(names) != len(weights):
        raise AdapterError(f"there are {len(names)} adapters and {len(weights)} weights: give one weight for each")
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise AdapterError(f"adapter '{twice[0]}' is named twice; name it once, with the sum of its weights")
    return [find_adapter(gm, name) for name in names]


def _settings(
    method: str,
    density: float | None,
    majority_sign: str,
    rank: int | None,
    energy: float | None,
    niter: int | None,
    seed: int | None,
) -> tuple[Method, Thinning, Cut]:
    where = "combine_adapters"
    how = METHODS[checks.one_of(tuple(METHODS))(f"{where}: method", method)]
    if how.keeps_factors and not (rank is None and energy is None and niter is None):
        raise checks.refusal(
            f"{where}: method", method, "it keeps the adapters' factors as they are, so it takes no rank, energy or "
            "niter; method='svd' does",
        )  # fmt: skip
    if (density is not None) != (how.sparsify is not None):
        expected = f"{method} {'needs a' if density is None else 'has no'} density"
        raise checks.refusal(f"{where}: density", density, f"{expected}, the share of elements that stays")
    if density is not None and density != 1:
        density = checks.share(f"{where}: density", density)
    checks.one_of(("total", "frequency"))(f"{where}: majority_sign", majority_sign)
    cut = make_cut(where, rank, energy, niter, seed)
    return how, Thinning(1.0 if density is None else density, majority_sign, cut.generator), cut


def _places(gm: CapturedModule, chosen: Sequence[Adapter], into: str) -> list[Place]:
    """The sites of the combined adapter.

    Raises:
        AdapterError: two adapters have sites on one weight that do not go together.
    """
    named: dict[str, list[tuple[int, Site]]] = {}
    for i, adapter in enumerate(chosen):
        for site in adapter.sites:
            named.setdefault(site.name, []).append((i, site))
    places: list[Place] = []
    by_weight: dict[int, list[Site]] = {}
    for members in named.values():
        first = members[0][1]
        for _, other in members:
            if _shape(other) != _shape(first):
                raise _unequal(first, other)
        loftq = next((s.loftq for _, s in members if s.loftq is not None), None)
        site = replace(first, adapter=into, apart=any(s.apart for _, s in members), loftq=loftq)
        if trains_rows(first):
            rows = tuple(sorted({row for _, s in members for row in s.rows or ()}))
            site = replace(site, rows=rows, shape=(len(rows), first.shape[-1]))
        places.append((site, members))
        by_weight.setdefault(id(get_path(gm, site.weight)), []).append(replace(first, apart=site.apart))
    for here in by_weight.values():
        for a, b in combinations(here, 2):
            disjoint = a.rows is not None and b.rows is not None and set(a.rows).isdisjoint(b.rows)
            if not (disjoint or (a.apart and b.apart)):
                raise _unequal(a, b)
    return places


def _shape(site: Site) -> tuple[object, ...]:
    """What must be equal for sites to be combined; rows that train whole may be others."""
    return (site.layer, site.shape[-1]) if trains_rows(site) else (site.layer, site.shape, site.rows)


def _unequal(one: Site, other: Site) -> AdapterError:
    def what(site: Site) -> str:
        size = " x ".join(map(str, site.shape)) + ("" if site.rows is None else " of its rows")
        return f"'{site.adapter}' at '{site.name}' ({site.kind}, {size})"

    return AdapterError(
        f"adapters of unequal shapes cannot be combined: '{one.weight}' is adapted by {what(one)} and by "
        f"{what(other)}. Combine adapters that have the same targets there"
    )


def _combined(how: Method, thinning: Thinning, site: Site, found: Sequence[Member]) -> Change:
    weights = [weight for _, weight, _ in found]
    dtype = reduce(torch.promote_types, [change.dtype for change, _, _ in found])
    shifts = [(change.shift, weight) for change, weight, _ in found if change.shift is not None]
    shift = merge(how, [s.double() for s, _ in shifts], [w for _, w in shifts], thinning) if shifts else None
    if trains_rows(site) or how.sparsify is not None:
        elements = [_on_rows(site, s, dense(change.matrix)) for change, _, s in found]
        return Change(merge(how, elements, weights, thinning), shift, dtype)
    matrices: list[Matrix] = []
    for change, weight, member in found:
        if how.keeps_factors and not isinstance(change.matrix, Factors):
            raise AdapterError(
                f"adapter '{member.adapter}', site '{site.name}': {member.variant} rescales the rows of the base's "
                "weight, so that what it changes has no factors to put side by side: use method='svd', which factors "
                "the whole change, and look at the error in its report"
            )
        matrices.append(scaled(change.matrix, weight))
    return Change(add(_shared(matrices) if how.shares else matrices), shift, dtype)


def _shared(matrices: Sequence[Matrix]) -> list[Matrix]:
    """The factors with those added up that have the same right side."""
    found: list[Matrix] = []
    for matrix in matrices:
        for i, known in enumerate(found):
            if isinstance(known, Factors) and isinstance(matrix, Factors) and _equal(known.right, matrix.right):
                found[i] = Factors(known.left + matrix.left, known.right)
                break
        else:
            found.append(matrix)
    return found


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _on_rows(place: Site, member: Site, change: Tensor) -> Tensor:
    """A change of some rows as one of all the rows of a place."""
    if place.rows == member.rows:
        return change
    at = [list(place.rows or ()).index(row) for row in member.rows or ()]
    full = change.new_zeros(place.shape)
    return full.index_copy(0, torch.tensor(at, device=change.device), change)
