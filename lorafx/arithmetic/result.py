"""The plain LoRA adapter that is made of others: its specs, what trains whole with it, and its way into the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from lorafx.adapter_config import exactly
from lorafx.adapters import switch
from lorafx.arithmetic.changes import PlainSite, refuse_unusable, trains_rows
from lorafx.errors import AdapterError
from lorafx.graph import CapturedModule, get_path, named_tensors
from lorafx.ir import ROWS, Adapter, Site, base_modules
from lorafx.ops import PARAMETERS
from lorafx.passes.activate import deactivate
from lorafx.passes.insert import put_adapter
from lorafx.spec import Bias, LoraSpec, matches

_Start = tuple[tuple[str, Any], ...]
"""Fields of a spec, with their values."""


def whole_tensors(gm: CapturedModule, adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    """What these adapters train whole (``modules_to_save``, ``bias``), by its names in the base.

    Raises:
        AdapterError: two have different versions of one.
    """
    found: dict[str, tuple[Adapter, Tensor]] = {}
    for adapter in adapters:
        for name in adapter.trained:
            value = get_path(gm, adapter.own_name(name)).detach()
            refuse_unusable(f"adapter '{adapter.name}': '{name}'", value)
            owner, known = found.setdefault(name, (adapter, value))
            if not torch.equal(known, value):
                raise AdapterError(
                    f"adapters '{owner.name}' and '{adapter.name}' each have their own '{name}' (modules_to_save or "
                    "bias), trained whole: such tensors are no changes of low rank, and a mean of two heads is a head "
                    f"for neither task. Say whose to take, heads='{owner.name}'"
                )
    return {name: value for name, (_, value) in found.items()}


def put_plain(
    gm: CapturedModule,
    into: str,
    sources: Sequence[Adapter],
    keepers: Sequence[Adapter],
    made: Sequence[PlainSite],
    whole: Mapping[str, Tensor],
) -> None:
    """Add a plain adapter of these sites, not active, in place.

    ``sources`` are the adapters that it was made of; ``keepers`` those of them whose trained tensors, ``whole``, it
    has.
    """
    if not made:
        raise AdapterError(f"adapter '{into}' would be empty: nothing of {', '.join(s.name for s in sources)} is left")
    specs = plain_specs(gm, made, _specs_of(sources), _specs_of(keepers))
    of_sites = [p.site.bias for p in made if p.site.bias is not None] if specs[0].bias == "lora_only" else []
    trained = tuple(dict.fromkeys((*whole, *of_sites)))
    adapter = Adapter(into, specs, tuple(p.site for p in made), trained)
    tensors = {p.site.parameter_name(n): value for p in made for n, value in p.values.items()}
    tensors |= {adapter.own_name(name): value for name, value in whole.items()}
    running, rows = tuple(gm.meta.get("active", ())), gm._buffers.get(ROWS)
    deactivate(gm)
    with torch.inference_mode(False):
        put_adapter(gm, adapter, tensors)
    switch(gm, running, rows)


def _specs_of(adapters: Sequence[Adapter]) -> list[LoraSpec]:
    return [spec for adapter in adapters for spec in adapter.specs]


def plain_specs(
    gm: CapturedModule, made: Sequence[PlainSite], sources: Sequence[LoraSpec], keepers: Sequence[LoraSpec]
) -> tuple[LoraSpec, ...]:
    """Specs that mean these sites: one for each variant among them, and for each base that LoftQ stored.

    What the specs ``sources`` agree on is kept of their metadata; ``keepers`` say what trains whole.
    """
    modules = base_modules(gm, aliases=True)
    asked = dict.fromkeys(m for spec in keepers for m in spec.trained_modules)
    tied = {spec.tied for spec in sources}
    common: dict[str, Any] = {
        "modules_to_save": tuple(m for m in asked if any(matches(n, (m,)) for n in modules)),
        "bias": max((spec.bias for spec in keepers), key=get_args(Bias).index, default="none"),
        "tied": next((t for t in ("tie", "untie") if t in tied), "refuse"),
        "metadata": _agreed([spec.metadata for spec in sources]),
    }
    rows = {p.site.name: tuple(p.site.rows or ()) for p in made if trains_rows(p.site)}
    groups: dict[tuple[str, _Start], list[PlainSite]] = {}
    for plain in made:
        if not trains_rows(plain.site):
            groups.setdefault((plain.site.variant, _start(plain.site)), []).append(plain)
    specs: list[LoraSpec] = []
    parameters = dict(named_tensors(gm))
    for (variant, start), members in groups.items() or {("lora", ()): []}.items():
        found = [p.site for p in members]
        bare = [s.name for s in found if s.kind in PARAMETERS and s.name in parameters]
        ranks = {s.name: s.r for s in found}
        r, pattern = exactly(ranks) if ranks else (1, {})
        dtypes = {p.values["lora_A"].dtype for p in members}
        specs.append(
            LoraSpec(
                variant=variant,
                r=r,
                alpha=r,
                rank_pattern=pattern,
                alpha_pattern=pattern,
                target_modules=tuple(s.name for s in found if s.name not in bare),
                target_parameters=tuple(bare),
                trainable_token_indices=rows if not specs else (),
                adapter_dtype=next(iter(dtypes)) if len(dtypes) == 1 else None,
                **dict(start),
                **common,
            )
        )
    return tuple(specs)


def _start(site: Site) -> _Start:
    """What a spec says to make the base again that LoftQ stored for a site.

    Nothing where that would be another base; :func:`lorafx.save_adapter` refuses such a site.
    """
    how = site.loftq
    if how is None or not how.makes(site.r, site.scaling):
        return ()
    return tuple((name, getattr(how, name)) for name in ("init", "base", "block_size", "double_quant"))


def _agreed(several: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all that say something of a key say."""
    keys = dict.fromkeys(key for one in several for key in one)
    values = {key: [one[key] for one in several if key in one] for key in keys}
    return {key: said[0] for key, said in values.items() if all(value == said[0] for value in said)}
