"""Extract: what a full fine-tuning changed, as a LoRA adapter on the model that it started from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorafx import checks
from lorafx.api import captured
from lorafx.arithmetic.changes import Change, PlainSite, make_cut, make_plain, refuse_unusable, trains_rows
from lorafx.arithmetic.report import FactorReport
from lorafx.arithmetic.result import plain_specs
from lorafx.errors import AdapterError
from lorafx.graph import CapturedModule, get_path, named_tensors
from lorafx.ir import Site, find_adapter
from lorafx.passes.example import ExampleInputs
from lorafx.passes.insert import Insert
from lorafx.passes.match import Choice, match
from lorafx.spec import LoraSpec, SpecLike, as_specs
from lorafx.variants import VARIANTS


class Extraction(NamedTuple):
    """A graph over the base model with the adapter active, and how near that comes to the fine-tuned model."""

    gm: CapturedModule
    report: FactorReport


def extract_adapter(
    base_model: nn.Module,
    finetuned_model: nn.Module,
    spec: SpecLike | Sequence[SpecLike] | None = None,
    example_inputs: ExampleInputs = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    niter: int | None = None,
    seed: int | None = None,
    dynamic_shapes: Mapping[str, Any] | None = None,
) -> Extraction:
    """A LoRA adapter from a full fine-tuning: at each site the leading singular directions of ``W_tuned - W_base``.

    Each side has the roots of the singular values, and the scaling is 1 (``alpha = r``). At full rank the graph
    computes what the fine-tuned model does. Layers that the fine-tuning left as they were get no adapter.

    Args:
        base_model, finetuned_model: the same architecture before and after, left unchanged; the graph shares the
            weights of the first. Half precision and other devices will do.
        spec: which layers, as for :func:`lorafx.apply`, and what to take whole: ``modules_to_save``, ``bias``, rows of
            embeddings, or with ``variant="lora_bias"`` the biases of the sites. Its ``r`` is the rank if none is given;
            its scaling and its initialisation mean nothing here. None: every Linear but the output layer.
        example_inputs, dynamic_shapes: as for :func:`lorafx.apply`.
        rank: of every site, at most.
        energy: the least rank of each site that holds this share of its change's squared norm, above 0 and at most 1.
        niter: use a randomized SVD with that many iterations; not with ``energy``.
        seed: makes ``niter`` reproducible; None: torch's global state.

    Returns:
        The graph, with the adapter ``"default"`` active, and a report: each site's rank, norm and error, and under
        ``left_out`` what else the fine-tuning changed and is not in the adapter.

    Raises:
        AdapterError: the models are not of one architecture, hold NaN, Inf or no data, or are equal at every site; or
            a weight that is tied in the base has become two.
        SpecError: a setting is not allowed, or no rank is given in any way.
        CaptureError, MatchError: as :func:`lorafx.apply`.
    """
    specs = as_specs(LoraSpec() if spec is None else spec)
    if spec is None and rank is None and energy is None:
        raise checks.refusal("extract_adapter: rank", rank, "give a rank, the energy to hold, or a spec with ranks")
    for one in specs:
        checks.one_of(("lora", "lora_bias"))("extract_adapter: LoraSpec.variant", one.variant)
    specs = tuple(replace(one, init=VARIANTS[one.variant].inits[0], dropout=0.0) for one in specs)
    cut = make_cut("extract_adapter", rank, energy, niter, seed)
    tuned = _same_architecture(base_model, finetuned_model)
    gm = captured(base_model, example_inputs, dynamic_shapes)
    made: list[tuple[Choice, PlainSite]] = []
    left_out: list[tuple[str, str]] = []
    with torch.no_grad():
        for choice in match(gm, specs):
            if choice.site is None or choice.spec is None:
                continue
            change = _change(gm, choice.site, choice.spec, tuned)
            plain = None if change is None else make_plain(gm, choice.site, change, cut.limited(choice.site.r))
            if plain is None:
                left_out.append((choice.site.name, "unchanged"))
            else:
                made.append((choice, plain))
    if not made:
        raise AdapterError(
            f"the two models have equal weights at all {len(left_out)} sites, so there is nothing to extract: give the "
            "model before and the model after the fine-tuning, and layers that it trained"
        )
    _insert(gm, made, specs, tuned)
    left_out += _beside(gm, base_model, tuned)
    title = "default: from a fine-tuned model"
    return Extraction(gm, FactorReport(title, tuple(plain.report for _, plain in made), tuple(left_out)))


def _same_architecture(base_model: nn.Module, finetuned_model: nn.Module) -> dict[str, Tensor]:
    """The fine-tuned model's tensors, which are the base's in name and shape."""
    base, tuned = dict(named_tensors(base_model)), dict(named_tensors(finetuned_model))
    problems = [f"'{name}' is only in the base model" for name in base if name not in tuned]
    problems += [f"'{name}' is only in the fine-tuned model" for name in tuned if name not in base]
    problems += [
        f"'{name}' is {tuple(base[name].shape)} in the base model and {tuple(tuned[name].shape)} in the fine-tuned one"
        for name in base
        if name in tuned and base[name].shape != tuned[name].shape
    ]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise AdapterError(
            f"the two models are not of one architecture: {'; '.join(problems[:3])}{more}. If one is wrapped (by PEFT, "
            "torch.compile or DDP), give the module inside"
        )
    return {name: value.detach() for name, value in tuned.items()}


def _change(gm: CapturedModule, site: Site, spec: LoraSpec, tuned: Mapping[str, Tensor]) -> Change | None:
    """What the fine-tuning did at a site; None: nothing."""
    before = get_path(gm, site.weight).detach()
    matrix = _difference(site.weight, before, tuned, site)
    if not site.apart:
        _check_tied(gm, site.weight, tuned)
    shift = None
    if VARIANTS[site.variant].shifts_bias and site.bias is not None:
        shift = _difference(site.bias, get_path(gm, site.bias).detach(), tuned)
    if not bool(matrix.any()) and (shift is None or not bool(shift.any())):
        return None
    return Change(matrix, shift, spec.dtype_for(before.dtype))


def _difference(name: str, before: Tensor, tuned: Mapping[str, Tensor], site: Site | None = None) -> Tensor:
    """What the fine-tuning changed of a tensor, or of what a site adapts of it, in float64."""
    refuse_unusable(f"'{name}' of the base model", before)
    refuse_unusable(f"'{name}' of the fine-tuned model", tuned[name])
    after = tuned[name].to(before.device)
    if site is not None:
        before, after = site.matrix(before), site.matrix(after)
    return after.double() - before.double()


def _check_tied(gm: CapturedModule, name: str, tuned: Mapping[str, Tensor]) -> None:
    parameter = get_path(gm, name)
    for alias, value in named_tensors(gm):
        if value is parameter and alias in tuned and not torch.equal(tuned[alias], tuned[name]):
            raise AdapterError(
                f"'{name}' and '{alias}' are one tensor in the base model and differ in the fine-tuned one. Set "
                'tied="untie" in the spec, so that each use is adapted by itself; or untie them in the base model too'
            )


def _insert(
    gm: CapturedModule,
    made: Sequence[tuple[Choice, PlainSite]],
    specs: Sequence[LoraSpec],
    tuned: Mapping[str, Tensor],
) -> None:
    plain = [p for _, p in made]
    own = plain_specs(gm, plain, specs, specs)
    by_variant = {spec.variant: spec for spec in reversed(own)}
    chosen = [
        replace(choice, site=p.site, spec=own[0] if trains_rows(p.site) else by_variant[p.site.variant])
        for choice, p in made
    ]
    with torch.inference_mode(False), torch.no_grad():
        Insert(tuple(chosen), own, torch.Generator().manual_seed(0))(gm)  # any values: each is written over
        for p in plain:
            for name, parameter in p.site.parameters(gm).items():
                parameter.copy_(p.values[name])
        adapter = find_adapter(gm)
        for name in adapter.trained:
            get_path(gm, adapter.own_name(name)).copy_(tuned[name])


def _beside(gm: CapturedModule, base_model: nn.Module, tuned: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """What the fine-tuning changed and the adapter has not."""
    adapter = find_adapter(gm)
    done = {id(get_path(gm, name)) for name in adapter.trained}
    for name, before in named_tensors(base_model):
        here = get_path(gm, name)
        difference = (tuned[name].to(before.device).double() - before.detach().double()).nan_to_num()  # of infinities
        covered: set[int] = set()
        for site in adapter.sites:
            if get_path(gm, site.weight) is here and (not site.apart or site.weight == name):
                covered.update(range(len(difference)) if site.rows is None else site.rows)
            if site.bias == name and VARIANTS[site.variant].shifts_bias:
                covered.update(range(len(difference)))
        if covered:
            difference[list(covered)] = 0
        if id(here) in done or not bool(difference.any()):
            continue
        done.add(id(here))
        size = float(difference.norm() / before.detach().double().norm().clamp_min(torch.finfo(torch.float64).tiny))
        yield (
            name,
            f"changed by {size:.2g} of its norm. To take it, target its layer, name its module in modules_to_save, or "
            "set bias",
        )
