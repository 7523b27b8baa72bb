"""Quantize: frozen weights into a base format (:mod:`lorafx.bases`), under whatever adapts them.

    before:  q.weight   a dense parameter
    after:   q.weight   a :class:`~lorafx.bases.tensor.QuantizedTensor` of the same shape and dtype

The graph itself does not change: an operator that reads the weight reads what the format keeps of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lorafx.bases import FORMATS
from lorafx.bases.tensor import QuantizedTensor
from lorafx.errors import MatchError, QuantizationError
from lorafx.graph import CapturedModule, get_path, rebind, share
from lorafx.ir import adapters
from lorafx.ops import PLAIN, STORAGE, SWAPPED
from lorafx.passes.activate import deactivate
from lorafx.passes.match import Choice, match
from lorafx.passes.samples import sample
from lorafx.spec import ALL_LINEAR, LoraSpec
from lorafx.variants import VARIANTS
from lorafx.variants.inits import find_init

#: The kinds whose weights are quantised. Embeddings are looked up in, and convolutions are small: theirs stay.
KINDS = tuple(kind for kind, storage in STORAGE.items() if storage in (PLAIN, SWAPPED) and kind != "embedding")


@dataclass(frozen=True)
class Wanted:
    """A weight that is to be stored in a format: the kind of its layer, and the format's name and settings."""

    kind: str
    base: str
    block_size: int | None
    double_quant: bool | None

    @classmethod
    def by(cls, choice: Choice, spec: LoraSpec) -> Wanted:
        """What a spec with a ``base`` asks for at a site."""
        return cls(choice.candidate.kind, str(spec.base), spec.block_size, spec.double_quant)

    def store(self, name: str, weight: Tensor) -> Tensor | None:
        """The weight of this name in the format; None if it is that already.

        Raises:
            QuantizationError: it is in another format, or cannot be stored in this one.
            SpecError: the format has no such settings.
        """
        form = FORMATS[self.base]
        swapped = STORAGE[self.kind] is SWAPPED
        if not isinstance(weight, QuantizedTensor):
            matrix = weight.mT if swapped else weight
            settings = {"block_size": self.block_size, "double_quant": self.double_quant}
            return QuantizedTensor(form.quantize(matrix, **settings, where=f"'{name}'"), swapped)  # type: ignore[arg-type]
        there = weight.packed
        wanted = form.settings(there.width, self.block_size, self.double_quant) if there.format == self.base else None
        if wanted == (there.block_size, there.double_quant):
            return None
        raise QuantizationError(
            f"'{name}' is stored as {there.format} already, with block_size={there.block_size} and "
            f"double_quant={there.double_quant}: ask for that, or quantize the model that it was made from"
        )

    def refuse_other(self, name: str, weight: Tensor) -> None:
        """Refuse a weight that is not stored so already.

        Raises:
            QuantizationError: it is dense, or in another format.
        """
        if not isinstance(weight, QuantizedTensor):
            raise QuantizationError(
                f"the spec asks for base={self.base!r}, and '{name}' is dense in this graph: store it first, with "
                f"lorafx.quantize(gm, {self.base!r}), or leave base out"
            )
        self.store(name, weight)


def can_store(choice: Choice) -> bool:
    """Whether the weight of a choice is of a kind that is quantised, and has no other use."""
    return choice.candidate.kind in KINDS and not choice.candidate.elsewhere


def quantize_sites(gm: CapturedModule, choices: Sequence[Choice]) -> tuple[str, ...]:
    """Store the weights of chosen sites, before an adapter starts there, as their specs ask (``LoraSpec.base``).

    Returns:
        Their names. Weights of embeddings and convolutions stay as they are, and so do those that the graph also uses
        elsewhere.

    Raises:
        MatchError: a spec asks for it, and no weight of its sites can be stored so; or the start of its adapters
            changes the weights.
        QuantizationError, SpecError: a weight cannot be stored in the format. Nothing is changed.
    """
    wanted: dict[str, Wanted] = {}
    for spec in {id(c.spec): c.spec for c in choices if c.spec is not None and c.spec.base is not None}.values():
        mine = [c for c in choices if c.spec is spec and c.site is not None]
        fit = [c for c in mine if can_store(c)]
        if not fit:
            raise MatchError(
                f"LoraSpec.base={spec.base!r} is for linear layers and stacks of experts whose weight has no other "
                f"use, and this spec adapts none: {', '.join(c.candidate.name for c in mine[:4])}. Leave base out"
            )
        wanted |= {c.candidate.weight: Wanted.by(c, spec) for c in fit}
    return quantize_weights(gm, wanted)


def refuse_other_bases(gm: CapturedModule, choices: Sequence[Choice]) -> None:
    """Refuse specs that ask for another base than a graph has, whose other adapters are on it.

    Raises:
        QuantizationError: names the weight.
    """
    for choice in choices:
        site, spec = choice.site, choice.spec
        if site is None or spec is None or spec.base is None or not can_store(choice):
            continue
        init = find_init(spec.init)
        if init is None or not init.rounds:  # others store the weight themselves, and say so where they cannot
            Wanted.by(choice, spec).refuse_other(site.weight, get_path(gm, site.weight))


def quantize_weights(gm: CapturedModule, wanted: Mapping[str, Wanted]) -> tuple[str, ...]:
    """Store these weights, by name, in place; those that the user's model holds stay there as they are.

    Returns:
        The names of those that were dense.

    Raises:
        QuantizationError, SpecError: see :meth:`Wanted.store`. Nothing is changed.
    """
    stored = {name: how.store(name, get_path(gm, name).detach()) for name, how in wanted.items()}
    new = {name: value for name, value in stored.items() if value is not None}
    put_weights(gm, new)
    return tuple(new)


def put_weights(gm: CapturedModule, new: Mapping[str, Tensor]) -> None:
    """Let the graph have these weights, by name, instead of those that it has."""
    for name, value in new.items():
        rebind(gm, get_path(gm, name), value)
    known = gm.meta.get("samples", {})
    gm.meta["samples"] = {n: sample(get_path(gm, n)) if n in new else kept for n, kept in known.items()}


def quantize(
    gm: CapturedModule,
    base: str = "nf4",
    target_modules: str | Collection[str] = ALL_LINEAR,
    *,
    exclude_modules: str | Collection[str] | None = None,
    block_size: int | None = None,
    double_quant: bool | None = None,
) -> tuple[str, ...]:
    """Store weights of a graph in a base format, in place: also those of layers without adapters.

    ``LoraSpec(base=...)`` stores those that it adapts, before the adapters start.

    Args:
        gm: a graph from :func:`lorafx.apply`.
        base: ``"nf4"`` or ``"int8"``.
        target_modules, exclude_modules: which layers, as in a :class:`~lorafx.spec.LoraSpec`.
        block_size, double_quant: settings of the format; None: its own choice.

    Returns:
        The names of the weights that were stored; those that were in this form already are left as they are, as are
        embeddings, convolutions and weights with several uses. ``"all-linear"`` does not mean the output head, which
        is stored only if it is named (as for adapters).

    Raises:
        PassError: ``gm`` is no graph of lorafx's.
        SpecError, MatchError: as :func:`lorafx.apply`.
        QuantizationError: an adapter started from the dense weight (DoRA's magnitudes, PiSSA), or is merged into it in
            place; or a weight cannot be stored. Nothing is changed.
    """
    there = adapters(gm)
    spec = LoraSpec(
        base=base,
        target_modules=target_modules,
        exclude_modules=exclude_modules,
        block_size=block_size,
        double_quant=double_quant,
        tied="untie",
    )
    bare = share(gm)
    deactivate(bare)
    choices = match(bare, (spec,))
    chosen = {c.candidate.weight for c in choices if c.site is not None}
    if both := sorted(chosen.intersection(gm.meta.get("folded", ()))):
        raise QuantizationError(
            f"{', '.join(gm.meta['merged'])} is merged in place, into the dense values of '{both[0]}': call "
            "unmerge(gm) first, and merge again afterwards"
        )
    for adapter in there.values():
        started = {s.weight for s in adapter.sites if VARIANTS[s.variant].scales_rows} | set(adapter.residual)
        if both := sorted(started & chosen):
            raise QuantizationError(
                f"adapter '{adapter.name}' started from the dense values of '{both[0]}': give its spec "
                f"base={base!r}, so that it starts from the quantized ones, or exclude the layer here"
            )
    return quantize_sites(gm, choices)
