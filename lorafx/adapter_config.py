"""The ``adapter_config.json`` of an adapted graph: settings by which PEFT finds its sites and no others."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from lorafx.errors import AdapterError
from lorafx.graph import CapturedModule
from lorafx.ir import Adapter, Site, base_modules
from lorafx.spec import ALL_LINEAR, LoraSpec, matches

#: Fields of which PEFT's config has one value for all sites, and no pattern.
_COMMON_FIELDS = ("variant", "rslora", "dropout", "init", "bias")

V = TypeVar("V")


def adapter_config(gm: CapturedModule, adapter: Adapter, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter's config as plain JSON data; ``metadata`` as in :func:`lorafx.state.save_adapter`.

    Raises:
        AdapterError: no one config of PEFT's means what the graph has.
        SpecError: a metadata key is none of PEFT's.
    """
    found = adapter.sites
    spec = _combined(adapter.specs, found, metadata)
    noted = {**spec.metadata, **metadata}
    spec = replace(spec, metadata={key: value for key, value in noted.items() if value is not None})
    spec = replace(spec, modules_to_save=_modules_to_save(gm, adapter, spec))
    spec = _targeting(spec, {s.name for s in found}, base_modules(gm), trained_modules(gm, adapter))
    transposed = any(s.transposed for s in found)
    return {"inference_mode": True, **spec.to_peft(), "fan_in_fan_out": transposed}


def trained_modules(gm: CapturedModule, adapter: Adapter) -> tuple[str, ...]:
    """Names of the modules that train whole, under all their names."""
    wanted = tuple(m for spec in adapter.specs for m in spec.trained_modules)
    return tuple(n for n in base_modules(gm, aliases=True) if matches(n, wanted))


def _combined(specs: Sequence[LoraSpec], found: Sequence[Site], metadata: Mapping[str, Any]) -> LoraSpec:
    """One spec for all sites. Of several, patterns with exact names hold what differs in rank and alpha."""
    first, *others = specs
    if not others:
        return first
    differing = [f for f in _COMMON_FIELDS if any(getattr(o, f) != getattr(first, f) for o in others)]
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
    r, rank_pattern = _exactly({s.name: s.r for s in found})
    alpha, alpha_pattern = _exactly({s.name: s.alpha for s in found})
    return replace(
        first,
        r=r,
        rank_pattern=rank_pattern,
        alpha=alpha,
        alpha_pattern=alpha_pattern,
        target_modules=tuple(s.name for s in found),
        exclude_modules=None,
        modules_to_save=tuple(m for spec in specs for m in spec.modules_to_save),
        metadata=noted,
    )


def _exactly(values: Mapping[str, V]) -> tuple[V, dict[str, V]]:
    """The commonest value, and a pattern with the others under exact names (``^``: no dotted suffix)."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {f"^{re.escape(name)}": value for name, value in values.items() if value != common}


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


def _targeting(spec: LoraSpec, wanted: set[str], modules: Collection[str], whole: Collection[str]) -> LoraSpec:
    """``spec`` with targets by which PEFT finds exactly the ``wanted`` ones of ``modules``.

    They are the spec's own if those do (they need not: PEFT sees modules that the graph never calls, and its
    "all-linear" means other layers), else the names, or a regex where a name is another one's dotted suffix.
    """
    names = tuple(sorted(wanted))
    own = () if spec.target_modules == ALL_LINEAR else ((spec.target_modules, spec.exclude_modules),)
    inside = tuple(f"{m}." for m in whole)
    for targets, excluded in (*own, (names, None), ("|".join(map(re.escape, names)), None)):
        found = {m for m in modules if matches(m, targets) and not matches(m, excluded or ())}
        if {m for m in found if m not in whole and not m.startswith(inside)} == wanted:
            return replace(spec, target_modules=targets, exclude_modules=excluded)
    raise AdapterError(
        f"one spec adapts layers in {sorted(whole)} and another trains these modules whole (modules_to_save), which "
        "PEFT cannot do together; leave them out of one of the two"
    )
