"""The sites of an adapter in PEFT's files, read without the model where names, shapes and settings tell all.

What a change is made of besides stands in the base model for some: DoRA scales the rows of the weights, whole rows that
train are compared with them, and how wide its layers are stands nowhere in the file of a VeRA adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorafx.adapter_files import IN, OUT, RANK, StoredAdapter, StoredSite, as_matrix
from lorafx.arithmetic.changes import refuse_unusable
from lorafx.arithmetic.low_rank import Factors
from lorafx.checks import did_you_mean
from lorafx.errors import AdapterError
from lorafx.inspection.report import Inspection, SiteInspection, measure, trained_whole
from lorafx.spec import LoraSpec, matches
from lorafx.variants.base import Variant
from lorafx.variants.inits import find_init


@dataclass(frozen=True)
class Stored:
    """An adapter on disk: its settings, its sites, and the names of what it has trained whole."""

    name: str
    spec: LoraSpec
    sites: tuple[StoredSite, ...]
    whole: tuple[str, ...]

    @classmethod
    def read(cls, directory: Path) -> Stored:
        """Read the files.

        Raises:
            AdapterError: a file is missing or damaged, or holds no site.
        """
        found = StoredAdapter.read(directory)
        return cls(directory.resolve().name, found.spec, found.sites, tuple(found.whole))

    def needs_base(self) -> bool:
        """Whether a base model tells more than the norms of its weights."""
        return any(isinstance(self._change(site), str) or len(self._parameters(site)) > 1 for site in self.sites)

    def inspected(self, base: Mapping[str, Tensor]) -> Inspection:
        """What is to be seen of the adapter; the weights in ``base``, if there are any, are what it is compared with.

        Raises:
            AdapterError: a site is not whole, or not in ``base``.
        """
        return Inspection(self.name, tuple(self._inspected(site, base) for site in self.sites), tuple(self.notes()))

    def notes(self) -> Iterator[str]:
        """What the adapter is beside its sites."""
        yield from trained_whole(self.whole)
        init = find_init(self.spec.init)
        if init is not None and init.changes_base:
            yield (
                f"it started by {self.spec.init}: the changes are those of the weights that this left of the original "
                "ones, and not what training changed"
            )

    def _inspected(self, site: StoredSite, base: Mapping[str, Tensor]) -> SiteInspection:
        variant, name, change = site.variant(self.spec), self._name(site), self._change(site)
        rows = variant.name == "tokens"
        scaling = None if rows else self.spec.scaling_for(name) * site.factor
        if isinstance(change, str):
            return SiteInspection(name, variant.name, self._rank(site, variant), scaling, None, note=change)
        shape = (*change.left.shape[:-1], change.right.shape[-1])
        settings = SiteInspection(name, variant.name, change.left.shape[-1], scaling, shape)
        return measure(settings, change, _weight(base, name) if base else None)

    def _parameters(self, site: StoredSite) -> list[str]:
        """The names of the parameters of the site's module that have adapters; none, if it is a layer."""
        wanted = [t.rpartition(".")[2] for t in self.spec.target_parameters]
        return [n for leaf in wanted if matches(n := f"{site.path}.{leaf}", self.spec.target_parameters)]

    def _name(self, site: StoredSite) -> str:
        names = self._parameters(site)
        if len(names) > 1:
            return f"{site.path} (parameter {len(names) - site.depth} of {len(names)})"
        return names[0] if names else site.path

    def _rank(self, site: StoredSite, variant: Variant) -> int:
        """The rank, of which rows that train whole have as many as there are."""
        if len(ranks := {self.spec.rank_for(name) for name in self._parameters(site)}) == 1:
            return ranks.pop()  # the tensors have it once for each expert
        shapes = variant.shapes(OUT, IN, RANK)
        of_rank = (p for p in variant.parameters if shapes[p][0] == RANK)
        return len(site.tensors[next(of_rank, variant.parameters[0])])

    def _change(self, site: StoredSite) -> Factors | str:
        """What a site changes, in float64; or why the file does not say."""
        variant = site.variant(self.spec)
        site.refuse_absent(variant)
        if variant.scales_rows:
            return f"{variant.name} is relative to the base's weights: give the base model"
        for parameter in variant.parameters:
            refuse_unusable(f"site '{site.path}': {parameter}", site.tensors[parameter])
        names = self._parameters(site)
        tensors = {p: site.tensors[p].double() for p in variant.parameters}
        if not names:
            tensors = {p: as_matrix(tensor) for p, tensor in tensors.items()}
        ranks = {self.spec.rank_for(name) for name in names or [site.path]}
        if names and len(ranks) > 1:
            return "its ranks differ by parameter, and the file does not say which one this is: give the base model"
        flat = names and tensors["lora_A"].dim() == 2  # AdaLoRA's have a dimension for the experts
        if flat and (experts := len(tensors["lora_A"]) // max(1, *ranks)) > 1:
            tensors = _unstacked(tensors, experts)
        sizes = site.sizes(variant, tensors)
        if IN not in sizes:
            return f"a {variant.name} file does not say how wide the layers are: give the base model"
        weight = torch.empty(sizes[OUT], sizes[IN], device="meta")  # only the shape of it matters here
        scaling = self.spec.scaling_for(names[0] if names else site.path) * site.factor
        update = variant.update(weight, tensors, scaling)
        return Factors(update.left, update.right)


def _unstacked(tensors: Mapping[str, Tensor], experts: int) -> dict[str, Tensor]:
    """``[experts * r, in]`` and ``[out, r * experts]``, the experts next to each other there, as stacks."""
    a, b = tensors["lora_A"], tensors["lora_B"]
    stacked = {"lora_A": a.reshape(experts, -1, a.shape[-1]), "lora_B": b.reshape(len(b), -1, experts).permute(2, 0, 1)}
    return {**tensors, **stacked}


def _weight(base: Mapping[str, Tensor], name: str) -> Tensor:
    """The weight of a layer, or a parameter."""
    for key in (f"{name}.weight", name, f"{name}.in_proj_weight"):
        if key in base:
            return base[key]
    hint = did_you_mean(f"{name}.weight", base)
    raise AdapterError(f"site '{name}' is not in the base model{hint}: give the one that the adapter was trained on")
