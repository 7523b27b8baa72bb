"""Match: which candidates of a captured graph the specs mean. Changes nothing; the result is data."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from torch import Tensor, nn

from lorafx.checks import did_you_mean
from lorafx.errors import FrozenHeadWarning, MatchError
from lorafx.graph import CapturedModule, get_path, named_tensors
from lorafx.ir import ADAPTERS, FOLDED, Site, adapters, base_modules
from lorafx.ops import LAYERS
from lorafx.passes.candidates import Candidate, WeightUses, candidates, kept_whole, parameter, parts, tied, token_rows
from lorafx.spec import ALL_LINEAR, LoraSpec, matches
from lorafx.variants import VARIANTS

#: The kinds that "all-linear" means.
LINEAR = ("linear", "addmm")

_TRAINED_WHOLE = "trained whole (modules_to_save)"


@dataclass(frozen=True)
class Choice:
    """What becomes of a candidate: its site and spec, or the reason why it is left out."""

    candidate: Candidate
    site: Site | None
    spec: LoraSpec | None
    reason: str


def match(gm: CapturedModule, specs: Sequence[LoraSpec], adapter: str = "default") -> tuple[Choice, ...]:
    """Decide for every candidate. Where several specs mean a layer, the first in the list has it.

    Raises:
        MatchError: a name means nothing that can be adapted, nothing is matched at all, a matched weight has other
            uses that a fold would change (``tied="refuse"``) or is adapted twice, or an adapter of this kind cannot be
            there. Nothing is changed.
    """
    layers, uses = candidates(gm), WeightUses(gm)
    choices = {c.name: Choice(c, None, None, "") for c in layers}
    _refuse_kept_whole(gm, specs)
    for spec in specs:
        _check_entries(gm, (*layers, *(part for layer in layers for part in parts(gm, uses, layer))), spec)
        meant = [*_layers(gm, uses, layers, spec), *_parameters(gm, uses, spec), *_tokens(gm, uses, layers, spec)]
        if all(reason is not None for _, reason in meant):
            raise MatchError(_nothing_matched(meant, spec))
        for candidate, reason in meant:
            known = choices.get(candidate.name)
            if known is None or known.site is None:
                site = None if reason is not None else _site(candidate, spec, adapter)
                choices[candidate.name] = Choice(candidate, site, spec if site else None, reason or "")
            elif reason is None and (known.spec is spec or known.candidate.kind != candidate.kind):
                raise MatchError(_twice(candidate.name, candidate.name, candidate.weight))
    _refuse_shared(uses, choices.values())
    _refuse_overlaps(gm, choices.values())
    _refuse_misfits(uses, choices.values())
    return tuple(choices.values())


Meant = tuple[Candidate, str | None]
"""A candidate and the reason to leave it out, or None to take it."""


def _layers(gm: CapturedModule, uses: WeightUses, layers: Sequence[Candidate], spec: LoraSpec) -> Iterator[Meant]:
    """What ``target_modules`` means: layers, and parts of an attention's input projection by their names."""
    taken: list[str] = []
    first: dict[str, str] = {}
    for layer in layers:
        decided = [(layer, _why_not(layer, spec))]
        if decided[0][1] is not None and spec.target_modules != ALL_LINEAR:
            decided += [(p, None) for p in parts(gm, uses, layer) if _why_not(p, spec) is None]
        for candidate, reason in decided:
            if reason is None:
                taken += candidate.names
                if not any(spec.takes_layer(name) for name in candidate.names):
                    reason = "not among layers_to_transform"
            if reason is None and candidate.elsewhere and spec.tied == "tie":
                candidate = tied(gm, uses, candidate)
                if first.setdefault(candidate.weight, candidate.name) != candidate.name:
                    reason = f"its weight is that of '{first[candidate.weight]}', and adapted there"
            yield candidate, reason
    _check_numbers(taken, spec)


def _parameters(gm: CapturedModule, uses: WeightUses, spec: LoraSpec) -> Iterator[Meant]:
    """What ``target_parameters`` means; of a tensor with several names the first."""
    seen = set()
    for name in _base_parameters(gm):
        value = get_path(gm, name)
        if matches(name, spec.target_parameters) and id(value) not in seen:
            seen.add(id(value))
            yield (candidate := parameter(gm, uses, name)), _left_out(candidate, spec)


def _tokens(gm: CapturedModule, uses: WeightUses, layers: Sequence[Candidate], spec: LoraSpec) -> Iterator[Meant]:
    """What ``trainable_token_indices`` means."""
    embeddings = [c for c in layers if c.kind == "embedding"]
    wanted = spec.trainable_token_indices
    if isinstance(wanted, Mapping):
        meant = [(e, rows) for entry, rows in wanted.items() for e in embeddings if matches(e.name, (entry,))]
    elif not wanted:
        return
    else:
        name = gm.meta.get("input_embedding")
        inputs = embeddings if name is None else [e for e in embeddings if e.name == name]
        if len(inputs) != 1:
            raise MatchError(
                "trainable_token_indices is a list, and which embedding is the input's is not clear: map the name of "
                f"one to it. Embeddings: {', '.join(e.name for e in embeddings) or 'none'}"
            )
        meant = [(inputs[0], wanted)]
    for embedding, rows in meant:
        reason = _left_out(embedding, spec)
        if reason == _TRAINED_WHOLE:
            raise MatchError(
                f"'{embedding.name}' is in modules_to_save, which trains all of it, and has rows to train in "
                "trainable_token_indices: leave it to one of them"
            )
        yield token_rows(gm, uses, embedding, tuple(rows)), reason


def _left_out(candidate: Candidate, spec: LoraSpec) -> str | None:
    """The reason to leave out a candidate that is meant."""
    if spec.exclude_modules is not None and any(matches(n, spec.exclude_modules) for n in candidate.names):
        return "excluded by exclude_modules"
    if any(_is_under(candidate.name, m) for m in spec.trained_modules):
        return _TRAINED_WHOLE
    return None


def _why_not(candidate: Candidate, spec: LoraSpec) -> str | None:
    """The reason to leave out a candidate that ``target_modules`` may mean, or None to take it."""
    if (reason := _left_out(candidate, spec)) is not None:
        return reason
    if spec.target_modules != ALL_LINEAR:
        meant = any(matches(n, spec.target_modules) for n in candidate.names)
        return None if meant else "not in target_modules"
    if candidate.kind not in LINEAR:
        return "no linear layer (name it in target_modules to adapt it)"
    if candidate.is_output:
        return "output layer (name it in target_modules to adapt it)"
    if not candidate.module:
        return "functional call on a bare parameter (name it in target_modules to adapt it)"
    return None


def _site(candidate: Candidate, spec: LoraSpec, adapter: str) -> Site:
    """The site of a candidate that is taken. A pattern may name it by any of its names."""
    site = Site(
        name=candidate.name,
        path=candidate.path,
        adapter=adapter,
        variant=spec.variant,
        kind=candidate.kind,
        weight=candidate.weight,
        bias=candidate.bias,
        shape=candidate.shape,
        r=spec.r,
        alpha=spec.alpha,
        scaling=1.0,
        dropout=spec.dropout,
        apart=bool(candidate.elsewhere) and spec.tied == "untie" and candidate.kind in LAYERS,
        rows=candidate.rows,
    )
    if isinstance(candidate.rows, tuple):
        r = candidate.shape[0]
        return replace(site, variant="tokens", r=r, alpha=r, dropout=0.0)
    picks = candidate.kind in LAYERS and LAYERS[candidate.kind].picks
    names = [n for n in candidate.names if (spec.rank_for(n), spec.alpha_for(n)) != (spec.r, spec.alpha)]
    name = names[0] if names else candidate.name
    return replace(
        site,
        r=spec.rank_for(name),
        alpha=spec.alpha_for(name),
        scaling=spec.scaling_for(name),
        dropout=0.0 if picks else spec.dropout,
    )


def _base_parameters(gm: CapturedModule) -> list[str]:
    """The names of the model's own parameters, under all their names."""
    of_adapters = {n for a in adapters(gm).values() for n in a.parameter_names}
    names = [n for n, t in named_tensors(gm) if isinstance(t, nn.Parameter) and n not in of_adapters]
    return [n for n in names if n.partition(".")[0] not in (ADAPTERS, FOLDED)]


def _check_entries(gm: CapturedModule, found: Sequence[Candidate], spec: LoraSpec) -> None:
    """Refuse the entries of a list that name nothing of the graph, all of them at once."""
    modules = base_modules(gm, aliases=True)
    layers = [n for c in found for n in c.names]
    known: dict[str, Sequence[str]] = {
        "target_modules": layers,
        "target_parameters": _base_parameters(gm),
        "trainable_token_indices": [c.name for c in found if c.kind == "embedding"],
        "exclude_modules": (*layers, *modules, *_base_parameters(gm)),
        "modules_to_save": (*modules, *spec.heads_of_task),
    }
    unmatched = []
    for field, names in known.items():
        entries = getattr(spec, field)
        if field == "trainable_token_indices" and not isinstance(entries, Mapping):
            entries = None  # rows of the input embedding, whatever its name
        for entry in () if entries is None or isinstance(entries, str) else entries:
            if not any(matches(n, (entry,)) for n in names):
                unmatched.append(_no_layer(gm, field, entry, names, modules) or _unknown(field, entry, names))
    if unmatched:
        raise MatchError("; ".join(unmatched))


def _no_layer(gm: CapturedModule, field: str, entry: str, names: Sequence[str], modules: Sequence[str]) -> str | None:
    """What to say of an entry that is a module, but none that can be adapted; None if it is no module."""
    kind = {"target_modules": "layer", "trainable_token_indices": "embedding"}.get(field)
    held = [m for m in modules if matches(m, (entry,))]
    if kind is None or not held:
        return None
    if getattr(gm.get_submodule(held[0]), "kind", "") == "transposed convolution":
        return f"{field} names '{entry}': '{held[0]}' is a transposed convolution, which cannot be adapted"
    called = [str(n.target) for n in gm.graph.find_nodes(op="call_module")]
    if any(f"{held[0]}.".startswith(f"{whole}.") for whole in called):
        return f"{field} names '{entry}': '{held[0]}' is called as a whole; give example_inputs to see into it"
    inside = [n for n in names if any(n.startswith(m + ".") for m in held)]
    advice = f"; {kind}s below it: {', '.join(inside[:4])}" if inside else ""
    return (
        f"{field} names '{entry}', which is the module '{held[0]}' but no {kind} that this graph calls (one that "
        f"these inputs never reach is not in the graph){advice}. Name {kind}s, or remove the entry"
    )


def _unknown(field: str, entry: str, names: Sequence[str]) -> str:
    what = {"target_parameters": "parameter", "trainable_token_indices": "embedding"}.get(field, "layer")
    suffixes = {".".join(n.split(".")[i:]) for n in names for i in range(n.count(".") + 1)}
    endings = sorted({n.rpartition(".")[2] for n in names})[:12]
    return (
        f"{field} names '{entry}', and the model has no such {what}{did_you_mean(entry, sorted(suffixes))}. Its "
        f"{what}s end in: {', '.join(endings)}"
    )


def _check_numbers(taken: Sequence[str], spec: LoraSpec) -> None:
    """Refuse entries of ``layers_to_transform`` that number none of the layers that are targeted otherwise."""
    wanted = spec.layers_to_transform if isinstance(spec.layers_to_transform, tuple) else ()

    def there(number: int) -> bool:
        one = replace(spec, target_modules=ALL_LINEAR, layers_to_transform=number)
        return any(one.takes_layer(name) for name in taken)

    if absent := [number for number in wanted if not there(number)]:
        numbers = {int(atom) for name in taken for atom in name.split(".") if atom.isdecimal()}
        listing = ", ".join(str(n) for n in sorted(numbers) if there(n)) or "none"
        if spec.layers_pattern:
            where, advice = f" in {' or '.join(map(repr, spec.layers_pattern))}", ""
        else:
            where, advice = "", "; a list at the top of the model counts if layers_pattern names it"
        raise MatchError(
            f"layers_to_transform names {', '.join(map(str, absent))}, and no layer that target_modules means has that "
            f"number{where}. There are: {listing}{advice}"
        )


def _refuse_kept_whole(gm: CapturedModule, specs: Sequence[LoraSpec]) -> None:
    """Refuse layers that are meant and that the graph calls inside an autocast region it keeps whole."""
    for candidate, said in kept_whole(gm):
        name = candidate.name
        if any(_why_not(candidate, spec) is None and spec.takes_layer(name) for spec in specs):
            raise MatchError(
                f"'{name}' is called under {said} in the model's own forward, and the graph keeps that part whole: the "
                "layer cannot be adapted there. Take the context manager out of forward (put torch.autocast around the "
                f"call of the graph, and casts where forward needs them), or exclude the layer (exclude_modules="
                f"['{name}'])"
            )


def _nothing_matched(meant: Sequence[Meant], spec: LoraSpec) -> str:
    if not meant:
        return "the graph has no layer on a parameter, so there is nothing to adapt"
    counts = Counter(reason for _, reason in meant)
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
    endings = sorted({c.name.rpartition(".")[2] for c, _ in meant})
    hint = did_you_mean(spec.target_modules, endings) if isinstance(spec.target_modules, str) else ""
    return (
        f"target_modules={spec.target_modules!r} leaves nothing to adapt among {len(meant)} layers: {reasons}{hint}. "
        f"A string is a regex for the whole name, a list holds names or their dotted suffixes, such as {endings[:12]}"
    )


def _refuse_shared(uses: WeightUses, choices: Iterable[Choice]) -> None:
    """Refuse weights with uses that the fold would change, or that change the weight."""
    for choice in choices:
        site, candidate = choice.site, choice.candidate
        if site is None:
            continue
        if writes := uses.writes(site.weight):
            raise MatchError(
                f"site '{site.name}': the graph itself writes to '{site.weight}', by {'; '.join(writes)}, so that an "
                f"adapter has no fixed weight to go with. Exclude the layer (exclude_modules=['{site.name}'])"
            )
        if not candidate.elsewhere or site.apart:
            continue
        places = "; ".join(candidate.elsewhere[:3])
        if site.kind not in LAYERS:
            raise MatchError(
                f"site '{site.name}': a part of '{site.weight}' is also read as another tensor, or inside a module "
                f"that is called whole: {places}. Folding the adapter in would not change that use. Leave it out"
            )
        raise MatchError(
            f"site '{site.name}' multiplies by '{site.weight}', which the graph also uses elsewhere: {places}. Folding "
            "the adapter into it would change that use as well. "
            f"Exclude the layer (exclude_modules=['{site.name}']); or set tied=\"untie\": the adapted call then gets "
            'a weight of its own when it is merged; or tied="tie": every use is adapted alike'
        )


def _refuse_overlaps(gm: CapturedModule, choices: Iterable[Choice]) -> None:
    """Refuse two sites on one weight, unless the fold keeps them apart or they have no row in common."""
    on: dict[int, list[Site]] = {}
    for choice in choices:
        if choice.site is not None:
            on.setdefault(id(get_path(gm, choice.site.weight)), []).append(choice.site)
    for found in on.values():
        for a, b in combinations(found, 2):
            if a.apart and b.apart:
                continue
            if a.rows is None or b.rows is None or not set(a.rows).isdisjoint(b.rows):
                raise MatchError(_twice(a.name, b.name, a.weight))


def _twice(one: str, other: str, weight: str) -> str:
    names = f"'{one}'" if one == other else f"'{one}' and '{other}'"
    return (
        f"'{weight}' would be adapted twice by one adapter, at {names}: by target_modules, target_parameters or "
        "trainable_token_indices. Leave it to one of them"
    )


def _refuse_misfits(uses: WeightUses, choices: Iterable[Choice]) -> None:
    """Refuse a site where an adapter of this kind, or its start, cannot be."""
    for choice in choices:
        site, spec = choice.site, choice.spec
        if site is None or spec is None:
            continue
        variant = VARIANTS[site.variant]
        why = variant.misfit(spec.init, site.kind, site.shape, site.r, site.apart)
        if why is None and site.kind not in LAYERS and site.dropout > 0.0:
            why = (
                "its parameter is adapted wherever it is read, whatever multiplies by it there, so dropout="
                f"{site.dropout} of that cannot be expressed: give it a spec of its own with dropout=0"
            )
        if why is None and variant.shifts_bias:
            if site.bias is None or site.kind not in LAYERS:
                why = (
                    f"variant {site.variant!r} adds to a layer's bias, and it has none: leave it out (exclude_modules)"
                )
            elif others := uses.beside(site.bias, choice.candidate.nodes):
                why = (
                    f"variant {site.variant!r} would add to '{site.bias}', which the graph also uses elsewhere: "
                    f"{'; '.join(others[:3])}. Leave it out (exclude_modules)"
                )
        if why is not None:
            raise MatchError(f"site '{site.name}': {why}")


def _is_under(name: str, module: str) -> bool:
    atoms = name.split(".")
    return any(matches(".".join(atoms[: i + 1]), (module,)) for i in range(len(atoms)))


def warn_of_frozen_heads(gm: CapturedModule, choices: Sequence[Choice]) -> None:
    """Warn of output layers that look freshly initialised and would stay as they are."""
    initializer = float(gm.meta.get("initializer_range", math.nan))
    tensors = dict(named_tensors(gm))
    adapted = {id(tensors[c.site.weight]) for c in choices if c.site is not None and c.site.kind not in LAYERS}
    for choice in choices:
        candidate = choice.candidate
        if choice.site is not None or not candidate.is_output or choice.reason == _TRAINED_WHOLE:
            continue
        if id(tensors[candidate.weight]) in adapted:  # in all its uses
            continue
        weight, bias = tensors[candidate.weight], tensors.get(candidate.bias or "")
        if not weight.is_meta and _looks_untrained(weight, bias, candidate.shape[-1], initializer):
            warnings.warn(
                f"'{candidate.name}' is the model's head, looks freshly initialised, and gets no adapter: it will "
                f"not train. Add modules_to_save=['{candidate.name.rpartition('.')[2]}'] to the spec, or load its "
                "trained weights first",
                FrozenHeadWarning,
                stacklevel=3,
            )


def _looks_untrained(weight: Tensor, bias: Tensor | None, columns: int, initializer: float) -> bool:
    """Whether values are as transformers (normal, zero bias) or nn.Linear (uniform) initialise them."""
    if weight.numel() < 2:
        return False  # one value has no distribution
    std = float(weight.detach().float().std())
    if abs(std - initializer) < 0.1 * initializer and (bias is None or not bool(bias.detach().any())):
        return True
    bound = 1.0 / math.sqrt(columns)
    uniform = abs(std - bound / math.sqrt(3.0)) < 0.1 * bound
    return uniform and bool(weight.detach().abs().max() <= bound)
