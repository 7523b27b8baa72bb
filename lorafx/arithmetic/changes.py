"""What an adapter of a graph makes of a frozen weight, and the plain LoRA adapter that makes a given change.

A plain adapter has scaling 1 (``alpha = r``), so that ``lora_B lora_A`` is the change itself, and one rank a site.
Rows of an embedding that train whole stay such rows, and a change of the bias stays with the site (``lora_bias``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorafx import checks
from lorafx.arithmetic.low_rank import Cut, Factors, Matrix, factor, norm, relative_error
from lorafx.arithmetic.report import SiteReport
from lorafx.errors import AdapterError
from lorafx.graph import CapturedModule, get_path
from lorafx.ir import Adapter, Site
from lorafx.passes.residual import FACTORS, plain_factors
from lorafx.variants import VARIANTS


@dataclass(frozen=True)
class Change:
    """``W' - W`` at one site, relative to the weight that the model came with, and ``b' - b``.

    ``matrix`` has factors, as the graph multiplies by them, wherever the change is of low rank; what is not is in
    float64. ``dtype`` is the factors', which a plain adapter in its place should have.
    """

    matrix: Matrix
    shift: Tensor | None
    dtype: torch.dtype


@dataclass(frozen=True)
class PlainSite:
    """A site of a plain adapter, the values of its parameters, and how near they are to what was wanted."""

    site: Site
    values: dict[str, Tensor]
    report: SiteReport


def find_change(gm: CapturedModule, adapter: Adapter, site: Site) -> Change:
    """What an adapter does at one of its sites.

    Raises:
        AdapterError: its tensors have no data, or hold NaN or Inf; names the site.
    """
    weight = site.matrix(get_path(gm, site.weight).detach())
    tensors = {name: value.detach() for name, value in site.tensors(gm).items()}
    for name, value in tensors.items():
        refuse_unusable(f"adapter '{adapter.name}', site '{site.name}': {name}", value)
    if site.weight in adapter.residual:
        tensors.update(zip(FACTORS, plain_factors(gm, adapter, site), strict=True))
    variant = VARIANTS[site.variant]
    update = variant.update(weight, tensors, site.scaling)
    if not variant.scales_rows:
        return Change(Factors(update.left, update.right), update.shift, update.left.dtype)
    wide = weight.double()
    folded = variant.update(wide, {n: t.double() for n, t in tensors.items()}, site.scaling).fold(wide)
    return Change(folded - wide, update.shift, update.left.dtype)


def refuse_unusable(what: str, value: Tensor) -> None:
    """Raise :class:`AdapterError` for a tensor without data, or with NaN or Inf."""
    if value.is_meta:
        raise AdapterError(f"{what} has no data (it is on the meta device)")
    if not bool(torch.isfinite(value).all()):
        raise AdapterError(f"{what} holds NaN or Inf. Training diverged: go back to an earlier state of it")


def trains_rows(site: Site) -> bool:
    """Whether a site is rows that train whole: their change is kept as it is, whatever its rank."""
    return isinstance(site.rows, tuple)


def make_plain(gm: CapturedModule, site: Site, change: Change, cut: Cut | None) -> PlainSite | None:
    """The plain site with this change; with a ``cut``, and where there are no factors, of the nearest of lower rank.

    ``site`` says where and for which adapter. None where nothing is left.
    """
    wanted, dtype = change.matrix, change.dtype
    if trains_rows(site):
        assert isinstance(wanted, Tensor)
        rows = (site.matrix(get_path(gm, site.weight).detach()).double() + wanted).to(dtype)
        found = replace(site, variant="tokens", r=len(rows), alpha=len(rows), scaling=1.0, dropout=0.0)
        report = SiteReport(site.name, site.shape, len(rows), norm(wanted), 0.0)
        return PlainSite(found, {"trainable_tokens_delta": rows}, report)
    if cut is None:
        assert isinstance(wanted, Factors)
        kept = wanted
    else:
        kept = factor(wanted, cut)
    if kept.right.shape[-2] == 0:
        if change.shift is None or not bool(change.shift.any()):
            return None
        *leading, out_features, in_features = site.shape  # nothing but the bias changes
        kept = Factors(kept.left.new_zeros(*leading, out_features, 1), kept.right.new_zeros(*leading, 1, in_features))
    r = kept.right.shape[-2]
    a, b = (side.to(dtype, copy=True).contiguous() for side in (kept.right, kept.left))
    values = {"lora_A": a, "lora_B": b}
    if change.shift is not None:
        values["lora_B_bias"] = change.shift.to(dtype)
    variant = "lora" if change.shift is None else "lora_bias"
    found = replace(site, variant=variant, r=r, alpha=r, scaling=1.0, dropout=0.0)
    report = SiteReport(site.name, site.shape, r, norm(wanted), relative_error(Factors(b, a), wanted))
    if not math.isfinite(report.error):
        raise AdapterError(f"site '{site.name}': the result does not fit in {dtype} (it overflows to Inf)")
    return PlainSite(found, values, report)


def make_cut(where: str, rank: int | None, energy: float | None, niter: int | None, seed: int | None) -> Cut:
    """How much to keep, as it was asked for.

    Raises:
        SpecError: a value is not allowed, or both ``energy`` and ``niter`` are given.
    """
    rank = checks.optional(checks.rank)(f"{where}: rank", rank)
    if energy is not None and energy != 1:
        energy = checks.share(f"{where}: energy", energy)
    niter = checks.optional(checks.count)(f"{where}: niter", niter)
    if niter is not None and energy is not None:
        raise checks.refusal(f"{where}: niter", niter, "a randomized SVD does not see all energy; give rank")
    return Cut(rank, energy, niter, None if seed is None else torch.Generator().manual_seed(seed))
