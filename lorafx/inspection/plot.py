"""A picture of an inspection: where the adapter learned, and how many directions it used."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lorafx.errors import LorafxError
from lorafx.inspection.report import Inspection, SiteInspection

#: Cells beyond which the numbers in them could not be read.
_WRITTEN = 260
#: Kinds of modules beyond which their curves could not be told apart.
_CURVES = 10


class PlotError(LorafxError):
    """There is nothing to draw, or nothing to draw it with."""


def plot_inspection(inspection: Inspection, path: str | os.PathLike[str]) -> None:
    """Draw an inspection into a file (``.png``, ``.svg``, ``.pdf``), by matplotlib and without a display.

    Above, a map over layers and kinds of modules: the share that the change has of the base's weight, or its
    norm where that is not known. Below, the singular values of each kind: their median over the layers, and their
    range.

    Raises:
        PlotError: matplotlib is not installed, no site has numbers, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError("drawing needs matplotlib: pip install 'lorafx[plot]'") from error
    known = [site for site in inspection.sites if site.norm is not None]
    if not known:
        reasons = "; ".join(dict.fromkeys(s.note for s in inspection.sites if s.note)) or "the adapter has no sites"
        raise PlotError(f"there is nothing to draw of adapter {inspection.adapter}: {reasons}")
    rows, columns, cells = grid(known)
    width = min(24.0, max(8.0, 3.5 + 0.45 * len(columns)))
    heights = (1.2 + 0.3 * len(rows), 3.6)
    figure: Any = Figure(figsize=(width, sum(heights) + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subfigures(2, 1, height_ratios=heights)
    _draw_map(above, rows, columns, cells)
    _draw_spectra(below.subplots(), known)
    missing = (
        f", {len(inspection.sites) - len(known)} more without numbers" if len(known) < len(inspection.sites) else ""
    )
    figure.suptitle(f"adapter {inspection.adapter}: {len(known)} sites{missing}", fontweight="bold")
    try:
        figure.savefig(Path(path), dpi=150)
    except (OSError, ValueError) as error:  # no such folder; no such format
        raise PlotError(f"{path}: the picture cannot be written: {error}") from error


def place(site: str) -> tuple[str, int | None]:
    """The kind of module that a site is, and the number of its layer: the first number in its name.

    ``model.layers.3.mlp.up_proj`` is ``mlp.up_proj`` in layer 3; what stands before the number tells apart kinds
    that have the same name (an encoder's and a decoder's): :func:`grid` adds it where needed.
    """
    found = re.match(r"(?:(.*?)\.)?(\d+)(?:\.(.*))?$", site)
    if found is None:
        return site, None
    return found[3] or found[1] or "layer", int(found[2])


def _stem(site: str) -> str:
    found = re.match(r"(?:(.*?)\.)?\d+(?:\.|$)", site)
    return "" if found is None else found[1] or ""


def kinds(sites: Sequence[SiteInspection]) -> dict[str, tuple[str, int | None]]:
    """For each site its kind and its layer; kinds of several stacks of layers bear the stack's name."""
    places = {s.site: place(s.site) for s in sites}
    stems = {_stem(name) for name, (_, layer) in places.items() if layer is not None}
    if len(stems) <= 1:
        return places
    return {
        name: (kind if layer is None else f"{_stem(name)}: {kind}", layer) for name, (kind, layer) in places.items()
    }


def grid(sites: Sequence[SiteInspection]) -> tuple[list[str], list[str], Mapping[tuple[str, str], SiteInspection]]:
    """Kinds (rows), layers by number (columns; the last one, "-", is of none), and the site in each cell."""
    places = kinds(sites)
    rows = list(dict.fromkeys(places[s.site][0] for s in sites))
    layers = sorted({layer for _, layer in places.values() if layer is not None})
    columns = [str(layer) for layer in layers] + (["–"] if any(layer is None for _, layer in places.values()) else [])
    cells = {(places[s.site][0], "–" if places[s.site][1] is None else str(places[s.site][1])): s for s in sites}
    return rows, columns, cells


def _draw_map(
    figure: Any, rows: Sequence[str], columns: Sequence[str], cells: Mapping[tuple[str, str], SiteInspection]
) -> None:
    axes = figure.subplots()
    shares = all(site.share is not None for site in cells.values())
    values = np.full((len(rows), len(columns)), np.nan)
    for (kind, layer), site in cells.items():
        values[rows.index(kind), columns.index(layer)] = (site.share or 0.0) * 100 if shares else site.norm
    largest = float(np.nanmax(values)) or 1.0
    axes.set_facecolor("0.93")  # where there is no site
    image = axes.imshow(values, cmap="viridis", vmin=0.0, vmax=largest, aspect="auto", interpolation="nearest")
    axes.set_xticks(range(len(columns)), columns, fontsize=8 if len(columns) <= 48 else 5)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_xlabel("layer" if columns != ["–"] else "no numbered layers")
    what = "share of the base weight's norm (%)" if shares else "norm of the change"
    axes.set_title(f"Where it learned: {what}", loc="left", fontsize=10)
    figure.colorbar(image, ax=axes, label=what, pad=0.01)
    axes.set_xticks(np.arange(-0.5, len(columns)), minor=True)
    axes.set_yticks(np.arange(-0.5, len(rows)), minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="minor", length=0)
    if values.size <= _WRITTEN:
        for row, column in zip(*np.nonzero(~np.isnan(values)), strict=True):
            value = values[row, column]
            color = "white" if value < 0.6 * largest else "black"
            axes.text(column, row, f"{value:.2g}", ha="center", va="center", fontsize=7, color=color)


def _draw_spectra(axes: Any, sites: Sequence[SiteInspection]) -> None:
    places = kinds(sites)
    groups: dict[str, list[SiteInspection]] = {}
    for site in sites:
        groups.setdefault(places[site.site][0], []).append(site)
    strongest = sorted(groups, key=lambda kind: -max(s.spectral_norm or 0.0 for s in groups[kind]))[:_CURVES]
    colors = {kind: f"C{i}" for i, kind in enumerate(k for k in groups if k in strongest)}
    for kind, color in colors.items():
        longest = max(len(s.singular_values) for s in groups[kind])
        values = np.full((len(groups[kind]), longest), np.nan)
        for i, site in enumerate(groups[kind]):
            values[i, : len(site.singular_values)] = site.singular_values
        largest = max((v for s in groups[kind] for v in s.singular_values), default=0.0)
        if largest == 0.0:
            continue
        values[values <= 1e-7 * largest] = np.nan  # rounding, which a logarithmic axis would show at length
        values = values[:, ~np.isnan(values).all(axis=0)]
        index = np.arange(1, values.shape[1] + 1)
        effective = float(np.median([s.effective_rank or 0.0 for s in groups[kind]]))
        axes.plot(index, np.nanmedian(values, axis=0), color=color, marker="o", markersize=3, linewidth=1.5,
                  label=f"{kind} (effective rank {effective:.1f})")  # fmt: skip
        if len(values) > 1:
            axes.fill_between(index, np.nanmin(values, axis=0), np.nanmax(values, axis=0), color=color, alpha=0.15)
    axes.set_yscale("log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("index")
    axes.set_ylabel("singular value")
    left = f"; the {len(colors)} strongest of {len(groups)} kinds" if len(groups) > len(colors) else ""
    axes.set_title(f"Singular values: median over the layers, and their range{left}", loc="left", fontsize=10)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
