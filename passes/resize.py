"""Resize: give the sites of an adapter other ranks, in place. Parameters are sliced, and the graph follows.

    W' = W + s P diag(E) Q        ->        W' = W + s P[:, kept] diag(E[kept]) Q[kept]

The scaling ``s`` stays that of the first rank. A site of which nothing is left has no node, and costs nothing.
What has another rank is another ``nn.Parameter``: an optimizer is told, and keeps the state of what is left.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorafx.errors import AdapterError
from lorafx.graph import CapturedModule, get_path, mark_own, set_tensor
from lorafx.ir import Adapter, Site, adapters, find_adapter, stage, verify
from lorafx.passes.activate import activate
from lorafx.variants import VARIANTS


@dataclass(frozen=True)
class _Cut:
    """What becomes of one parameter: along ``dim`` these indices are left, and zeros behind them up to ``r``."""

    name: str
    old: nn.Parameter
    dim: int
    kept: tuple[int, ...]
    r: int

    def of(self, tensor: Tensor) -> Tensor:
        """The same of a tensor of the parameter's shape."""
        left = tensor.detach().index_select(self.dim, torch.tensor(self.kept, dtype=torch.long, device=tensor.device))
        if len(self.kept) == self.r:
            return left
        shape = list(left.shape)
        shape[self.dim] = self.r - len(self.kept)
        return torch.cat([left, left.new_zeros(shape)], self.dim)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the new parameter."""
        shape = list(self.old.shape)
        shape[self.dim] = self.r
        return tuple(shape)


def resize(
    gm: CapturedModule,
    kept: Mapping[str, Sequence[int]],
    adapter: str | None = None,
    optimizer: Optimizer | None = None,
) -> None:
    """Leave the named sites these of their ranks, in this order; in place, gradients included.

    Where what goes has no effect (AdaLoRA's ``E`` is zero there), outputs stay what they are up to the order of
    summation.

    Args:
        gm: the graph. A copy of it that another module made (DistributedDataParallel's buckets, a compiled
            optimizer) must be made anew.
        kept: indices of ranks by the name of the site; other sites stay as they are. None: nothing is left.
        adapter: which one; None: the one that is active.
        optimizer: what trains it. The new parameters take the places of the old ones, with the state of what is
            left; those of a site without rank are taken out.

    Raises:
        AdapterError: there is no such adapter, site or rank; it is merged in place; the site's variant does not
            shrink; a parameter has hooks, or state in the optimizer that cannot be sliced. Nothing is changed.
    """
    _change(gm, {name: (tuple(indices), len(indices)) for name, indices in kept.items()}, adapter, optimizer)


def fit_ranks(
    gm: CapturedModule, ranks: Mapping[str, int], adapter: str | None = None, optimizer: Optimizer | None = None
) -> None:
    """Give the named sites these ranks, for values that are loaded next: the last ones go, new ones are zero.

    Raises:
        AdapterError: as :func:`resize`; or a site's parameters are to grow and are not in the optimizer.
    """
    sites = _sites(find_adapter(gm, adapter), ranks)
    changes = {n: (tuple(range(min(r, sites[n].r))), r) for n, r in ranks.items() if r != sites[n].r}
    if changes:
        _change(gm, changes, adapter, optimizer)


def refuse_unsliceable(gm: CapturedModule, adapter: str, optimizer: Optimizer) -> None:
    """Raise the errors about hooks and the optimizer's state that a later :func:`resize` of any site would raise."""
    sites = _sites(find_adapter(gm, adapter), {}).values()
    _states(optimizer, [cut for site in sites for cut in _cuts(gm, site, (), 0)])


def _change(
    gm: CapturedModule,
    changes: Mapping[str, tuple[tuple[int, ...], int]],
    name: str | None,
    optimizer: Optimizer | None,
) -> None:
    adapter = find_adapter(gm, name)
    if adapter.name in gm.meta.get("merged", ()):
        raise AdapterError(f"adapter '{adapter.name}' is merged into the weights; call unmerge(gm) first")
    sites = _sites(adapter, changes)
    cuts = [cut for n, (kept, r) in changes.items() for cut in _cuts(gm, sites[n], kept, r)]
    states = {} if optimizer is None else _states(optimizer, cuts)
    new: dict[nn.Parameter, nn.Parameter] = {}
    # A site without a rank has nothing that could train; when it has one again, it trains as its adapter does.
    running = adapter.name in gm.meta.get("active", ())
    with torch.inference_mode(False):
        for cut in cuts:
            trains = cut.old.requires_grad if cut.old.numel() else running
            parameter = nn.Parameter(cut.of(cut.old), requires_grad=cut.r > 0 and trains)
            if cut.old.grad is not None and cut.r > 0:
                parameter.grad = cut.of(cut.old.grad)
            mark_own(parameter)
            set_tensor(gm, cut.name, parameter)
            new[cut.old] = parameter
    resized = {sites[n]: replace(sites[n], r=r) for n, (_, r) in changes.items()}
    record = _record(adapter, tuple(resized.get(site, site) for site in adapter.sites))
    gm.meta["adapters"] = {**adapters(gm), adapter.name: record}
    activate(gm, gm.meta.get("active", ()), gm.meta.get("by_row", False))
    gm.recompile()
    verify(gm, stage(gm))
    if optimizer is not None:
        _follow(optimizer, new, states)


def _sites(adapter: Adapter, names: Mapping[str, Any]) -> dict[str, Site]:
    """The adapter's sites that can have other ranks, by name; raises if ``names`` has others."""
    sites = {site.name: site for site in adapter.sites if VARIANTS[site.variant].shrinks}
    for name in names:
        if name in sites:
            continue
        if any(site.name == name for site in adapter.sites):
            able = ", ".join(v.name for v in VARIANTS.values() if v.shrinks)
            raise AdapterError(
                f"site '{name}': the scaling of its variant follows from its rank (alpha / r), on disk too, so it "
                f"cannot have another one; what can is {able}"
            )
        raise AdapterError(f"adapter '{adapter.name}' has no site '{name}'")
    return sites


def _cuts(gm: CapturedModule, site: Site, kept: tuple[int, ...], r: int) -> list[_Cut]:
    if len(set(kept)) != len(kept) or not set(kept) <= set(range(site.r)):
        raise AdapterError(f"site '{site.name}' has the ranks 0 to {site.r - 1}, each once, and not {list(kept)}")
    shapes = site.parameter_shapes()
    wider = replace(site, r=site.r + 1).parameter_shapes()
    cuts = []
    for parameter, name in site.parameter_names.items():
        pairs = enumerate(zip(shapes[parameter], wider[parameter], strict=True))
        dim = next(i for i, (size, larger) in pairs if size != larger)
        old: nn.Parameter = get_path(gm, name)
        if old._backward_hooks or getattr(old, "_post_accumulate_grad_hooks", None):
            raise AdapterError(
                f"site '{site.name}': {parameter} has hooks, which a new parameter would not; remove them"
            )
        cuts.append(_Cut(name, old, dim, kept, r))
    return cuts


def _record(adapter: Adapter, sites: tuple[Site, ...]) -> Adapter:
    """The adapter with these sites, and specs that say their ranks by exact names (as :mod:`lorafx.adapter_config`)."""
    specs = []
    for spec in adapter.specs:
        if VARIANTS[spec.variant].shrinks:
            own = (site for site in sites if site.variant == spec.variant and site.r != spec.r)
            spec = replace(spec, rank_pattern={f"^{re.escape(site.name)}": site.r for site in own})
        specs.append(spec)
    return replace(adapter, specs=tuple(specs), sites=sites)


# The optimizer


def _states(optimizer: Optimizer, cuts: Sequence[_Cut]) -> dict[nn.Parameter, dict[str, Any]]:
    """The state of each new parameter, by the old one."""
    held = {p for group in optimizer.param_groups for p in group["params"]}
    states = {}
    for cut in cuts:
        if cut.old not in held and cut.r > cut.old.shape[cut.dim]:
            raise AdapterError(
                f"'{cut.name}' is not in the optimizer; make one of the graph's parameters after it has its ranks"
            )
        state = optimizer.state.get(cut.old, {})
        states[cut.old] = {key: _state(key, value, cut) for key, value in state.items()}
    return states


def _state(key: str, value: Any, cut: _Cut) -> Any:
    if not isinstance(value, Tensor) or value.dim() == 0 or value.shape == cut.shape:
        return value  # a number, a count of steps; or loaded with its new rank already
    if value.shape == cut.old.shape:
        return cut.of(value)
    raise AdapterError(
        f"'{cut.name}': the optimizer's {key!r} is {list(value.shape)} and not of the parameter's shape "
        f"{list(cut.old.shape)} (factored or quantised state), so it cannot follow the ranks. Use another optimizer, "
        "or let ranks be masked only (shrink=False)"
    )


def _follow(
    optimizer: Optimizer,
    new: Mapping[nn.Parameter, nn.Parameter],
    states: Mapping[nn.Parameter, dict[str, Any]],
) -> None:
    for group in optimizer.param_groups:
        places = [i for i, p in enumerate(group["params"]) if p not in new or new[p].numel() > 0]
        group["params"][:] = [new.get(p, p) for p in (group["params"][i] for i in places)]
        if "param_names" in group:
            group["param_names"] = [group["param_names"][i] for i in places]
    for old, state in states.items():
        optimizer.state.pop(old, None)
        if state and new[old].numel() > 0:
            optimizer.state[new[old]] = state
