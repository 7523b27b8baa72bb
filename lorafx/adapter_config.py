"""The ``adapter_config.json`` of an adapted graph: settings by which PEFT finds its sites and no others."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from lorafx.errors import AdapterError, SpecError
from lorafx.graph import CapturedModule, get_path
from lorafx.ir import Adapter, Site, base_modules
from lorafx.peft_config import has_key
from lorafx.peft_targets import Target
from lorafx.spec import ALL_LINEAR, LoraSpec, matches
from lorafx.variants import VARIANTS
from lorafx.variants.inits import find_init

#: Fields of which PEFT's config has one value for all sites, and no pattern.
_COMMON_FIELDS = ("variant", "rslora", "dropout", "init", "bias", "options", "tied")

V = TypeVar("V")


def adapter_config(
    gm: CapturedModule,
    adapter: Adapter,
    found: Sequence[Target],
    metadata: Mapping[str, Any],
    ranks: Mapping[Site, int],
) -> dict[str, Any]:
    """An adapter's config as plain JSON data.

    Args:
        found: the adapter's :func:`~lorafx.peft_targets.targets`.
        metadata: as in :func:`lorafx.state.save_adapter`.
        ranks: those in the file of sites that have another there than in the graph.

    Raises:
        AdapterError: no one config of PEFT's means what the graph has.
        SpecError: a metadata key is none of PEFT's.
    """
    adapted = [t for t in found if t.form != "tokens"]
    for site in adapter.sites:
        if (how := site.loftq) is not None and not how.makes(site.r, site.scaling):
            raise AdapterError(
                f"the adapter cannot be written: site '{site.name}' is relative to the base that init={how.init!r} "
                f"stored at r={how.r} and scaling {how.scaling:g}, and has r={site.r} and scaling {site.scaling:g} "
                "now, for which a model adapted by the file's settings would get another base. Save the adapters that "
                "it was made of, and make it of them again"
            )
    spec = _common(adapter.specs, metadata)
    noted = {key: value for key, value in {**spec.metadata, **metadata}.items() if value is not None}
    spec = replace(spec, metadata=noted, tied="tie" if any(t.form == "tied" for t in found) else "refuse")
    if adapted:
        spec = _RANKS.get(spec.variant, _by_patterns)(spec, adapted, ranks)
    if adapted and spec.options.get("save_projection") is False and not drawn_alike(gm, adapter, spec):
        spec = replace(spec, options={**spec.options, "save_projection": True})
    spec = replace(spec, modules_to_save=_modules_to_save(gm, adapter, spec))
    spec = _targeting(spec, adapted, base_modules(gm), trained_modules(gm, adapter))
    rows = {t.name: list(t.sites[0].rows or ()) for t in found if t.form == "tokens"}
    started = find_init(spec.init)
    if started is not None and (started.changes_base or started.by_data) and not started.rounds:
        # What changed the base is written as a plain adapter of the original; and nobody needs the data again. LoftQ's
        # is relative to the base that it has stored, which the config says how to make.
        spec = replace(spec, init=VARIANTS[spec.variant].inits[0])
    if any(t.form == "parameter" for t in found) and not any(s.dropout for s in adapter.sites):
        spec = replace(spec, dropout=0.0)  # which PEFT refuses for parameters, even if it could not do anything
    spec = replace(spec, trainable_token_indices=rows)
    transposed = any(s.kind == "addmm" for t in found if t.form == "module" for s in t.sites)
    try:
        return {"inference_mode": True, **spec.to_peft(), "fan_in_fan_out": transposed}
    except SpecError as error:
        raise AdapterError(
            f"the adapter cannot be written: {error} Keep it by save_checkpoint, or convert it to plain LoRA first"
        ) from error


def trained_modules(gm: CapturedModule, adapter: Adapter) -> tuple[str, ...]:
    """Names of the modules that train whole, under all their names."""
    wanted = tuple(m for spec in adapter.specs for m in spec.trained_modules)
    return tuple(n for n in base_modules(gm, aliases=True) if matches(n, wanted))


def drawn_alike(gm: CapturedModule, adapter: Adapter, spec: LoraSpec) -> bool:
    """Whether the tensors that an adapter's sites share are those that the spec's seed gives here."""
    sizes = [(s.out_features, s.in_features) for s in adapter.sites if VARIANTS[s.variant].shared]
    largest = max(s.r for s in adapter.sites if VARIANTS[s.variant].shared)
    found = {leaf: get_path(gm, adapter.own_name(leaf)) for leaf in VARIANTS[spec.variant].shared}
    dtype = next(iter(found.values())).dtype
    drawn = VARIANTS[spec.variant].share(sizes, largest, spec.options, dtype)
    return all(torch.equal(drawn[leaf], tensor.cpu()) for leaf, tensor in found.items())


def _common(specs: Sequence[LoraSpec], metadata: Mapping[str, Any]) -> LoraSpec:
    """One spec with what all have in common; where there are several, their targets and ranks are yet to be named."""
    first, *others = specs
    if not others:
        return first
    started = find_init(first.init)
    fields = (*_COMMON_FIELDS, "base") if started is not None and started.rounds else _COMMON_FIELDS
    differing = [f for f in fields if any(getattr(o, f) != getattr(first, f) for o in others)]
    noted: dict[str, Any] = {}
    for spec in specs:
        for key, value in spec.metadata.items():
            if noted.setdefault(key, value) != value and key not in metadata:
                differing.append(f"metadata[{key!r}]")
    if differing:
        raise AdapterError(
            f"the graph was adapted by {len(specs)} specs that differ in {', '.join(dict.fromkeys(differing))}, of "
            "which PEFT's config has one value for all sites; only targets, ranks, alphas and modules_to_save may "
            "differ. Adapt with equal values, or pass save_adapter the metadata to write"
        )
    trained = tuple(m for spec in specs for m in spec.modules_to_save)
    return replace(first, target_modules=ALL_LINEAR, exclude_modules=None, modules_to_save=trained, metadata=noted)


def _rank(target: Target, ranks: Mapping[Site, int]) -> int:
    """The rank that PEFT needs for a target; the parts of an attention's fused projection lie one after the other."""
    output = f"{target.module}.out_proj.weight"
    inner, outer = (
        sum(ranks.get(s, s.r) for s in target.sites if (s.weight == output) is out) for out in (False, True)
    )
    return max(inner, outer) if target.form == "attention" else inner + outer


def _by_patterns(spec: LoraSpec, found: Sequence[Target], ranks: Mapping[Site, int]) -> LoraSpec:
    """The spec's own ranks and alphas if they mean these, else patterns of exact names for what differs."""
    r = {t.name: _rank(t, ranks) for t in found}
    scaling = {t.name: t.sites[0].scaling for t in found}
    if all(spec.rank_for(n) == r[n] and math.isclose(spec.scaling_for(n), scaling[n]) for n in r):
        return spec
    unit = {n: VARIANTS[spec.variant].scaling(1.0, r[n], spec.rslora) for n in r}
    common_r, rank_pattern = exactly(r)
    alpha, alpha_pattern = exactly({n: _whole(scaling[n] / unit[n]) for n in r})
    return replace(spec, r=common_r, rank_pattern=rank_pattern, alpha=alpha, alpha_pattern=alpha_pattern)


def _kept_ranks(spec: LoraSpec, found: Sequence[Target], ranks: Mapping[Site, int]) -> LoraSpec:
    """AdaLoRA: one first rank and one scaling, whose other values go into the tensors; and what is left of the rank."""
    first = max([spec.r, *(_rank(t, ranks) for t in found)])
    scaling = Counter(t.sites[0].scaling for t in found).most_common(1)[0][0]
    unit = VARIANTS[spec.variant].scaling(1.0, first, False)
    same = first == spec.r and math.isclose(scaling, spec.alpha * unit)
    options = dict(spec.options)
    if options["total_step"] is None:  # PEFT wants a schedule even where training is over: the shortest there is
        options["total_step"] = options["tinit"] + options["tfinal"] + 1
    return replace(
        spec,
        r=first,
        alpha=spec.alpha if same else scaling / unit,
        rslora=False,
        alpha_pattern={},
        rank_pattern={f"^{re.escape(t.name)}": _rank(t, ranks) for t in found if _rank(t, ranks) != first},
        options=options,
    )


def _one_rank(spec: LoraSpec, found: Sequence[Target], ranks: Mapping[Site, int]) -> LoraSpec:
    """VeRA: one rank, and no scaling; both go into the tensors."""
    r = max(_rank(t, ranks) for t in found)
    return replace(spec, r=r, alpha=r, rslora=False, rank_pattern={}, alpha_pattern={})


#: How a variant's config states ranks and scalings, if not by patterns.
_RANKS: Mapping[str, Callable[[LoraSpec, Sequence[Target], Mapping[Site, int]], LoraSpec]] = {
    "adalora": _kept_ranks,
    "vera": _one_rank,
}


def exactly(values: Mapping[str, V]) -> tuple[V, dict[str, V]]:
    """The commonest value, and a pattern with the others under exact names (``^``: no dotted suffix)."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {f"^{re.escape(name)}": value for name, value in values.items() if value != common}


def _whole(value: float) -> float:
    """The integer that a number is but for rounding, as a config has it; else the number."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-12) else value


def _modules_to_save(gm: CapturedModule, adapter: Adapter, spec: LoraSpec) -> tuple[str, ...]:
    """Names by which PEFT finds what trains whole. It compares the ends of names, without regard to dots."""
    trained = set(trained_modules(gm, adapter))
    modules = base_modules(gm, aliases=True)
    wrapped: set[str] = set()
    for names in (tuple(spec.modules_to_save), tuple(sorted(trained))):
        wrapped = {m for m in modules if m.endswith((*names, *spec.heads_of_task))}
        if wrapped == trained:
            return names
    raise AdapterError(
        f"PEFT would take {sorted(wrapped - trained)} for trained whole and expect its tensors: it compares the ends "
        f"of names with modules_to_save={sorted(trained)}, to which task_type={spec.metadata.get('task_type')!r} "
        f"adds {list(spec.heads_of_task)}. Name these modules "
        'in modules_to_save when adapting, or save with metadata={"task_type": None}'
    )


def _targeting(spec: LoraSpec, found: Sequence[Target], modules: Collection[str], whole: Collection[str]) -> LoraSpec:
    """``spec`` with targets by which PEFT finds exactly these of ``modules``.

    They are the spec's own if those do (they need not: PEFT sees modules that the graph never calls, and its
    "all-linear" means other layers), else the names, or a regex where a name is another one's dotted suffix.
    """
    parameters = tuple(t.name for t in found if t.form == "parameter")
    wanted = {m for t in found if t.form != "parameter" for m in t.modules or (t.module,)}
    names = tuple(sorted(wanted))
    plain: dict[str, Any] = {"exclude_modules": None, "layers_to_transform": (), "layers_pattern": ()}
    choices: list[dict[str, Any]] = [{}] if _may_keep(spec, names) else []
    choices.append({"target_modules": names, **plain})
    if names:
        choices.append({"target_modules": "|".join(map(re.escape, names)), **plain})
    inside = tuple(f"{m}." for m in whole)
    for choice in choices:
        chosen = replace(spec, target_parameters=parameters, **choice)
        means = {m for m in modules if _means(chosen, m) and m not in whole and not m.startswith(inside)}
        if means == wanted:
            return chosen
    raise AdapterError(
        f"one spec adapts layers in {sorted(whole)} and another trains these modules whole (modules_to_save), which "
        "PEFT cannot do together; leave them out of one of the two"
    )


def _means(spec: LoraSpec, module: str) -> bool:
    excluded = spec.exclude_modules is not None and matches(module, spec.exclude_modules)
    return matches(module, spec.target_modules) and not excluded and spec.takes_layer(module)


def _may_keep(spec: LoraSpec, names: Collection[str]) -> bool:
    """Whether PEFT's config can say the spec's own targets; of a list, each must be a module."""
    if spec.target_modules == ALL_LINEAR or (spec.exclude_modules and not has_key(spec.variant, "exclude_modules")):
        return False
    if isinstance(spec.target_modules, str):
        return not spec.layers_to_transform
    return all(any(matches(name, (entry,)) for name in names) for entry in spec.target_modules)
