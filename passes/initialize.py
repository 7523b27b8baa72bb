"""Initialize: let an adapter start from data: from the activations of its sites (EVA) or from gradients (LoRA-GA).

Both look at the model as it is without adapters, in eval mode. What they find takes the place of the random
factors that the adapter was inserted with; the graph's outputs stay what they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor
from torch.fx import Node

from lorafx.errors import AdapterError
from lorafx.graph import CapturedModule, share
from lorafx.ir import Adapter, Site, Stage, find_adapter, layer_nodes, verify
from lorafx.passes.activate import activate, deactivate, own_tensors
from lorafx.passes.insert import start_values
from lorafx.passes.layers import find_operands
from lorafx.passes.match import match
from lorafx.passes.observe import ITERATIONS, Batch, Directions, Loss, see_rows, sum_gradients, without_adapters
from lorafx.passes.residual import FACTORS, keep_residual
from lorafx.spec import LoraSpec
from lorafx.variants import VARIANTS
from lorafx.variants.inits import leading_singular

Factors = tuple[Tensor, Tensor]

#: LoRA-GA's gamma, by which the start is made small (arXiv 2407.05000, section 4.1).
GAMMA = 16.0


def initialize(
    gm: CapturedModule,
    batches: Iterable[Batch],
    *,
    adapter: str | None = None,
    method: str | None = None,
    loss_fn: Loss | None = None,
) -> None:
    """Start an adapter from some batches of data, in place; its parameters stay the same objects.

    ``"eva"`` (arXiv 2410.07170): A is the r leading principal directions of what the site's layer is given,
    B zero. ``"lora_ga"`` (arXiv 2407.05000): with the singular vectors of the gradient of the loss by the weight,
    ``A = c V[:r]`` and ``B = c U[:, r:2r]``, ``c = out^(1/4) / sqrt(16)``; the adapter then has a weight of its own,
    ``W - s B A``, so that outputs change by its rounding only. It needs memory for those gradients, in float32.
    (To go on from a checkpoint of such an adapter, initialize it first, from any data, and load then.)

    Args:
        gm: a graph with the adapter, not trained yet.
        batches: inputs of the model, each a dict of keyword arguments, a tuple of positional ones or a tensor. Rows
            of activations that an ``attention_mask`` among them hides are left out. A few hundred rows will do.
        adapter: which one; None: the one that is active.
        method: ``"eva"`` or ``"lora_ga"``, for all sites of variants that know it; None: where the specs say
            ``init="eva"`` or ``init="lora_ga"``.
        loss_fn: ``loss_fn(outputs, batch)`` for LoRA-GA; None: the outputs' ``loss``. With it, a dict among the
            batches may hold labels and the like that only the loss needs.

    Raises:
        AdapterError: there is no such adapter; it has no such sites, was trained, or is merged; the data
            are not enough, or give no loss or gradient. Nothing is changed.
    """
    found = find_adapter(gm, adapter)
    methods = _methods(gm, found, method)
    _check_fresh(gm, found, methods)
    by_method: dict[str, list[Site]] = {}
    for site, spec in methods.items():
        by_method.setdefault(spec.init, []).append(site)
    batches = list(batches)
    if not batches:
        raise AdapterError("initialize was given no batches")
    factors: dict[Site, Factors] = {}
    for name, sites in by_method.items():
        factors.update(_FACTORS[name](gm, batches, sites, loss_fn))
    with torch.inference_mode(False), torch.no_grad():
        _write(gm, found, methods, factors)


def _methods(gm: CapturedModule, adapter: Adapter, method: str | None) -> dict[Site, LoraSpec]:
    """The sites to initialize and their specs, whose ``init`` is the method."""
    if method is not None and method not in _FACTORS:
        raise AdapterError(f"method={method!r} is none that looks at data; there are {', '.join(map(repr, _FACTORS))}")
    bare = share(gm)
    deactivate(bare)
    specs = {c.site.name: c.spec for c in match(bare, adapter.specs, adapter.name) if c.site and c.spec}
    chosen = {}
    for site in adapter.sites:
        spec = specs.get(site.name, adapter.specs[0])
        name = spec.init if method is None else method
        if name not in _FACTORS or not VARIANTS[site.variant].has_init(name):
            continue
        if why := VARIANTS[site.variant].misfit(name, site.kind, site.shape, site.r, site.apart):
            raise AdapterError(f"site '{site.name}': {why}")
        dtype = site.tensors(gm)[FACTORS[0]].dtype
        chosen[site] = replace(spec, variant=site.variant, init=name, adapter_dtype=dtype)
    if not chosen:
        raise AdapterError(
            f"adapter '{adapter.name}' has no site that starts from data: set init='eva' or init='lora_ga' in its "
            "spec, or name the method"
        )
    return chosen


def _check_fresh(gm: CapturedModule, adapter: Adapter, sites: Iterable[Site]) -> None:
    """Refuse what has been trained, or would not be the start of what is computed."""
    if adapter.name in gm.meta.get("merged", ()):
        raise AdapterError(f"adapter '{adapter.name}' is merged into the weights; call unmerge(gm) first")
    for site in sites:
        a, b = (site.tensors(gm)[factor].detach() for factor in FACTORS)
        if a.is_meta:
            raise AdapterError(f"site '{site.name}' is on the meta device, where there are no data to start from")
        if bool(a.any() and b.any()):
            raise AdapterError(
                f"site '{site.name}' is not at its start any more: its adapter was trained, loaded or initialized. Add "
                "a new adapter and initialize that"
            )


def _write(
    gm: CapturedModule, adapter: Adapter, specs: Mapping[Site, LoraSpec], factors: Mapping[Site, Factors]
) -> None:
    starts = {site: start_values(gm, site, specs[site], factors=given) for site, given in factors.items()}
    taken = dict.fromkeys(site.weight for site, start in starts.items() if start.base is not None)
    record = replace(adapter, residual=tuple(dict.fromkeys((*adapter.residual, *taken))))
    running, by_row = tuple(gm.meta.get("active", ())), gm.meta.get("by_row", False)
    if adapter.name in running and taken:
        if by_row:
            raise AdapterError(
                f"adapter '{adapter.name}' would get weights of its own, and rows of a batch go through several "
                "adapters now: call set_adapter first"
            )
        chosen = [record if name == adapter.name else find_adapter(gm, name) for name in running]
        own_tensors(
            gm, chosen, gm.meta.get("merged", ()), gm.meta.get("folded", ())
        )  # raises before anything is changed
    for site, start in starts.items():
        for name, parameter in site.parameters(gm).items():
            parameter.copy_(start.parameters[name])
        keep_residual(gm, record, site, start)
    gm.meta["adapters"] = {**gm.meta["adapters"], adapter.name: record}
    activate(gm, running, by_row)
    gm.recompile()
    verify(gm, Stage.INSERTED)


# EVA


def _eva(
    gm: CapturedModule, batches: Sequence[Batch], sites: Sequence[Site], loss_fn: Loss | None
) -> dict[Site, Factors]:
    """Directions of the activations; layers with the same inputs (q, k, v) share the work."""
    with without_adapters(gm) as bare:
        calls = layer_nodes(bare)
        inputs = {site: tuple(o.x for n in calls[site.layer] if (o := find_operands(n))) for site in sites}
        ranks: dict[tuple[Node, ...], int] = {}
        for site, nodes in inputs.items():
            ranks[nodes] = max(site.r, ranks.get(nodes, 0))
        directions = {nodes: Directions(r) for nodes, r in ranks.items()}

        def see(node: Node, rows: Tensor) -> None:
            for nodes, found in directions.items():
                if node in nodes:
                    found.add(rows)

        see_rows(bare, {node for nodes in directions for node in nodes}, batches, see)
    factors = {}
    for site, nodes in inputs.items():
        a = directions[nodes].leading(site.r)
        if a is None:
            raise AdapterError(
                f"site '{site.name}': its inputs on these batches ({directions[nodes].rows} rows) have fewer than r="
                f"{site.r} directions. Give more data, or lower its rank"
            )
        factors[site] = (a, a.new_zeros(site.out_features, site.r))
    return factors


# LoRA-GA


def _lora_ga(
    gm: CapturedModule, batches: Sequence[Batch], sites: Sequence[Site], loss_fn: Loss | None
) -> dict[Site, Factors]:
    """Singular vectors of the mean gradient of the loss by each weight."""
    with without_adapters(gm) as bare:
        gradients, _ = sum_gradients(bare, (site.weight for site in sites), batches, loss_fn)
    factors = {}
    for site in sites:
        gradient = gradients.get(site.weight)
        if gradient is None or not bool(gradient.any()) or not bool(torch.isfinite(gradient).all()):
            what = "no gradient" if gradient is None else "a gradient that is zero, NaN or Inf"
            raise AdapterError(f"site '{site.name}': '{site.weight}' gets {what} on these batches; give it other data")
        matrix = site.matrix(gradient)
        if matrix.dim() == 2:
            factors[site] = _from_gradient(matrix, site.r)
        else:
            a, b = zip(*(_from_gradient(one, site.r) for one in matrix), strict=True)
            factors[site] = torch.stack(a), torch.stack(b)
    return factors


def _from_gradient(gradient: Tensor, r: int) -> Factors:
    """A and B for a gradient ``[out, in]``. (PEFT scales B alone, and by the gradient's size; the paper does not.)"""
    u, _, vh = leading_singular(gradient, 2 * r, ITERATIONS, torch.Generator().manual_seed(0))
    size = gradient.shape[0] ** 0.25 / math.sqrt(GAMMA)
    return size * vh[:r], size * u[:, r : 2 * r]


_FACTORS: Mapping[str, Callable[..., dict[Site, Factors]]] = MappingProxyType({"eva": _eva, "lora_ga": _lora_ga})
