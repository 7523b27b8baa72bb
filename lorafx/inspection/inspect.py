"""Inspect: where an adapter learned, and how much."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from lorafx.api import apply
from lorafx.arithmetic.changes import find_change
from lorafx.errors import AdapterError
from lorafx.graph import CapturedModule, get_path, named_tensors
from lorafx.inspection.files import Stored
from lorafx.inspection.report import Inspection, SiteInspection, measure, trained_whole
from lorafx.ir import find_adapter
from lorafx.passes.example import ExampleInputs
from lorafx.state import load_adapter


def inspect_adapter(
    source: CapturedModule | str | os.PathLike[str],
    adapter: str | None = None,
    *,
    base: nn.Module | None = None,
    example_inputs: ExampleInputs = None,
) -> Inspection:
    """What each site of an adapter changes: its norm, its singular values, and its share of the base's weight.

    An adapter on disk is read by itself where that is enough (LoRA, rsLoRA, AdaLoRA), at a cost of
    ``(out + in) r^2`` a site. DoRA, VeRA and rows of embeddings need the base model: with ``base`` they are loaded into
    a graph of it; without, their sites have a note and no numbers.

    Args:
        source: a graph, or a directory with ``adapter_config.json`` and ``adapter_model.safetensors``.
        adapter: of a graph, which one; None: the one that is active. A directory holds one.
        base: for a directory, the model that the adapter was trained on; gives the shares, too.
        example_inputs: for ``base``, as for :func:`lorafx.apply`, if it has to be captured.

    Returns:
        The numbers of each site, in the graph's or the file's order. ``print`` shows them as a table, ``to_dict`` gives
        JSON data, :func:`lorafx.plot_inspection` makes a picture.

    Raises:
        AdapterError: there is no such adapter or directory, a file is damaged, the adapter holds NaN or Inf, or is
            none of ``base``; ``adapter`` is given for a directory.
        SpecError, CaptureError, MatchError: as :func:`lorafx.apply`.
    """
    if isinstance(source, CapturedModule):
        return _of_graph(source, adapter)
    if adapter is not None:
        raise AdapterError(
            f"{os.fspath(source)}: a directory holds one adapter, so adapter={adapter!r} means nothing here; leave it "
            "out (the model that it was trained on goes in by base=model)"
        )
    directory = Path(source)
    stored = Stored.read(directory)
    if base is None or not stored.needs_base():
        return stored.inspected({} if base is None else dict(named_tensors(base)))
    gm = apply(base, directory, example_inputs)
    load_adapter(gm, directory)
    found = _of_graph(gm, None)
    return Inspection(stored.name, found.sites, tuple(stored.notes()))


def _of_graph(gm: CapturedModule, name: str | None) -> Inspection:
    adapter = find_adapter(gm, name)
    sites = []
    with torch.no_grad():
        for site in adapter.sites:
            weight = site.matrix(get_path(gm, site.weight).detach())
            scaling = None if site.variant == "tokens" else site.scaling
            settings = SiteInspection(site.name, site.variant, site.r, scaling, site.shape)
            sites.append(measure(settings, find_change(gm, adapter, site).matrix, weight))
    return Inspection(adapter.name, tuple(sites), tuple(trained_whole(adapter.trained)))
