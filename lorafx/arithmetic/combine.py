"""Combine and convert: a new plain LoRA adapter from the changes that others of the graph make."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor

from lorafx import checks
from lorafx.adapters import check_new_name, switch
from lorafx.arithmetic.changes import Change, PlainSite, find_change, make_plain, reports, trains_rows
from lorafx.arithmetic.low_rank import Cut, Factors, Matrix, add, dense, scaled
from lorafx.arithmetic.methods import METHODS, Method, Thinning, merge
from lorafx.arithmetic.plain import plain_specs
from lorafx.arithmetic.report import FactorReport
from lorafx.errors import AdapterError
from lorafx.graph import CapturedModule, get_path
from lorafx.ir import Adapter, Site, find_adapter
from lorafx.passes.activate import deactivate
from lorafx.passes.insert import put_adapter


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

    What is combined is what each adapter makes of the frozen weights, ``D_i = W_i' - W``, with its scaling
    (alpha, rsLoRA, patterns) and whatever its variant does. A site that an adapter does not have counts as zero there. The
    changes of biases (``variant="lora_bias"``) and rows of embeddings (``trainable_token_indices``) are combined by the
    same formula, and kept as such.

    - ``"cat"``: ``sum w_i D_i``, exactly: the factors side by side, with as many ranks as all have together. For
      variants that have factors; not DoRA, which rescales the rows of W too.
    - ``"linear"``: the same sum, with the ranks of adapters that have the same A at a site shared.
    - ``"svd"``: the nearest to that sum of lower rank (``rank``, ``energy``); for all variants.
    - ``"ties"``, ``"dare_linear"``, ``"dare_ties"``, ``"magnitude_prune"``, each also with ``_svd``, which here means the
      same: by elements, at a ``density``, and then factored as ``"svd"`` is. See :mod:`lorafx.arithmetic.methods` for
      the formulas, their papers, and where PEFT's methods of these names differ.

    One adapter with weight 1.0 is that adapter: ``"cat"`` and ``"linear"`` give its outputs bit for bit.

    Args:
        gm: a graph with the adapters.
        names: which ones; merged in place or not, active or not.
        weights: one for each, of any sign.
        method: one of the above.
        into: the name of the new adapter.
        density: the share of elements that stays, above 0 and at most 1; for the methods that thin out, and needed.
        majority_sign: ``"total"`` or ``"frequency"``: how ``ties`` elects a sign.
        rank: of the result, at most; None: the sum of the adapters' ranks at a site. Not for ``"cat"`` and ``"linear"``.
        energy: the least rank that holds this share of the squared norm, above 0 and at most 1, instead.
        niter: use a randomized SVD with that many iterations where a change has no factors; needs ``rank``.
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
    groups = _sites_by_name(gm, chosen)
    keeper = [find_adapter(gm, heads)] if heads is not None else chosen
    if heads is not None and heads not in names:
        raise AdapterError(f"heads='{heads}' is none of the adapters that are combined: {', '.join(names)}")
    values = _heads(gm, keeper)
    made: list[PlainSite] = []
    left_out = []
    with torch.no_grad():
        for name, members in groups.items():
            found = [(find_change(gm, chosen[i], site), factors[i], site) for i, site in members]
            site = _common_site(found, into)
            change = _combined(how, found, site, thinning)
            here = None if how.keeps_factors else cut.limited(sum(s.r for _, s in members))
            plain = make_plain(gm, site, change, here)
            if plain is None:
                left_out.append((name, "no change"))
            else:
                made.append(plain)
    _put(gm, into, chosen, keeper, made, values)
    what = ", ".join(f"{w:g} {n}" for n, w in zip(names, factors, strict=True))
    return FactorReport(f"{into}: {method} of {what}", reports(made), tuple(left_out))


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
    """Make a plain LoRA adapter of another, in place: relative to the original weights, scaling 1, not active.

    Exact for LoRA of any scaling, VeRA and AdaLoRA, whose factors are kept; for LoRA that started by taking from the weight
    (PiSSA, OLoRA, LoRA-GA) at twice its rank, but for the rounding of the weight that it left. DoRA rescales
    the rows of the weight, which leaves no low rank: the result is the nearest one of the site's rank, or of ``rank`` or
    ``energy``, and the report says how near. Sites from which AdaLoRA took all ranks are left out. What trains
    whole (``modules_to_save``, biases) goes along.

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
    cut = _cut("convert", rank, energy, niter, seed)
    asked = rank is not None or energy is not None
    values = _heads(gm, [source])
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
    _put(gm, into, [source], [source], made, values)
    return FactorReport(f"{into}: {adapter} as plain LoRA", reports(made), tuple(left_out))
