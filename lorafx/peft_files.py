"""Where an adapter's tensors lie in PEFT's files, and in which shapes: for each variant and kind of layer.

    linear     <module>.lora_A.weight [r, in], .lora_B.weight [out, r], .lora_B.bias [out],
               .lora_magnitude_vector [out]
    conv       .lora_A.weight [r, in / groups, *kernel], .lora_B.weight [out, r, 1, ..],
               .lora_magnitude_vector [1, out, 1, ..]
    embedding  .lora_embedding_A [r, num], .lora_embedding_B [dim, r]
    tokens     .token_adapter.trainable_tokens_delta [rows, dim]
    parameter  <module>[.base_layer ..].lora_A.weight [experts * r, in], .lora_B.weight [out, r * experts]
    attention  as a linear layer for the fused projection, and <module>.base_layer.out_proj as another one
    AdaLoRA    .lora_A [r, in], .lora_B [out, r], .lora_E [r, 1], whatever the layer
    VeRA       .vera_lambda_b [out], .vera_lambda_d [r]; base_model.vera_A [r, in], base_model.vera_B [out, r] for all

and all below ``base_model.model``, as PEFT 0.21.2 reads and writes them. What PEFT has no layer for (DoRA of experts,
an adapter within the groups of a convolution) keeps to the same rules, and PEFT refuses the config or the shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from lorafx.graph import CapturedModule, get_path
from lorafx.ir import Adapter, Site
from lorafx.ops import FLAT, STORAGE, SWAPPED
from lorafx.peft_targets import Target, Wrapped
from lorafx.spec import LoraSpec
from lorafx.variants import VARIANTS

SHARED_PREFIX = "base_model."
PREFIX = "base_model.model."

#: The parameter, linear in which the update is, that takes up a scaling which the variant's config has no key for.
SCALED: Mapping[str, str] = {"adalora": "lora_E", "vera": "vera_lambda_b"}

#: The parameter that is filled up with zeros where the variant's config has one rank for all sites.
FILLED: Mapping[str, str] = {"vera": "vera_lambda_d"}

#: In nn.MultiheadAttention PEFT 0.21.2 adds the update of the output projection to its weight twice, in training and
#: in merging alike (``lora.MultiheadAttention.merge``). An adapter in its format is one that is added twice.
ATTENTION_OUTPUT = 2.0


class Misfit(Exception):
    """A tensor of a file cannot be brought into the graph's form."""


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: what of the graph it is made of, the way there and back, and the shape it has.

    ``write`` takes tensors in the order of ``names`` and ``read`` gives them; it may raise :class:`Misfit`.
    """

    key: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    write: Callable[[Sequence[Tensor]], Tensor]
    read: Callable[[Tensor], Sequence[Tensor]]


def entries(
    gm: CapturedModule, adapter: Adapter, found: Sequence[Target], spec: LoraSpec, *, shared: bool
) -> tuple[Entry, ...]:
    """Every tensor of the file of an adapter whose config says ``spec``; with or without what its sites share.

    ``found`` are its :func:`~lorafx.peft_targets.targets`.
    """
    wrapped = Wrapped(found)
    made: list[Entry] = []
    for target in found:
        prefix = PREFIX + wrapped.wrapper(target.module) + ".base_layer" * target.depth
        made += _ENTRIES[target.form](gm, wrapped, target, prefix, spec)
    for leaf in shared_names(adapter) if shared else ():
        name = adapter.own_name(leaf)
        made.append(_entry(SHARED_PREFIX + leaf, name, get_path(gm, name).shape))
    kept = gm.state_dict().keys()
    for name in adapter.trained:
        if (own := adapter.own_name(name)) in kept:
            made.append(_entry(PREFIX + wrapped.inside(name), own, get_path(gm, own).shape))
    return tuple(made)


def shared_names(adapter: Adapter) -> tuple[str, ...]:
    """What the sites of an adapter have in common and do not train, as its variant calls it."""
    return tuple(dict.fromkeys(leaf for site in adapter.sites for leaf in VARIANTS[site.variant].shared))


@dataclass(frozen=True)
class _Step:
    """A change of form and its inverse."""

    write: Callable[[Tensor], Tensor]
    read: Callable[[Tensor], Tensor]


def _entry(key: str, name: str, shape: Sequence[int], *steps: _Step) -> Entry:
    def write(tensors: Sequence[Tensor]) -> Tensor:
        (tensor,) = tensors
        for step in steps:
            tensor = step.write(tensor)
        return tensor

    def read(tensor: Tensor) -> Sequence[Tensor]:
        for step in reversed(steps):
            tensor = step.read(tensor)
        return (tensor,)

    return Entry(key, (name,), tuple(write([torch.empty(tuple(shape), device="meta")]).shape), write, read)


def _of_site(gm: CapturedModule, wrapped: Wrapped, target: Target, prefix: str, spec: LoraSpec) -> Iterator[Entry]:
    (site,) = target.sites
    forms = _forms(gm, target, site)
    for parameter, shape in site.parameter_shapes().items():
        suffix, steps = forms.get(parameter, (parameter, ()))
        if parameter == SCALED.get(site.variant):
            steps = (*steps, _times(site.scaling / spec.scaling_for(target.name)))
        if parameter == FILLED.get(site.variant):
            steps = (*steps, _filled(shape[-1], spec.rank_for(target.name)))
        yield _entry(f"{prefix}.{suffix}", site.parameter_name(parameter), shape, *steps)


_Form = tuple[str, tuple[_Step, ...]]
"""What follows the wrapper's path, and the steps."""

_LINEAR: Mapping[str, _Form] = {
    "lora_A": ("lora_A.weight", ()),
    "lora_B": ("lora_B.weight", ()),
    "lora_B_bias": ("lora_B.bias", ()),
    "trainable_tokens_delta": ("token_adapter.trainable_tokens_delta", ()),
}
_EMBEDDING: Mapping[str, _Form] = {"lora_A": ("lora_embedding_A", ()), "lora_B": ("lora_embedding_B", ())}


def _forms(gm: CapturedModule, target: Target, site: Site) -> Mapping[str, _Form]:
    """The form of each parameter; one that is not listed is stored under its own name and as it is."""
    if site.variant in SCALED:  # methods of their own in PEFT, with names of their own
        return {}
    if target.form == "parameter":
        return {**_LINEAR, **_of_parameter(gm, target, site)}
    if site.kind == "embedding":
        return {**_LINEAR, **_EMBEDDING}
    return {**_LINEAR, **_of_kernel(gm, site)} if STORAGE[site.kind] is FLAT else _LINEAR


def _of_kernel(gm: CapturedModule, site: Site) -> Mapping[str, _Form]:
    kernel = get_path(gm, site.weight).shape[1:]
    ones = [1] * (len(kernel) - 1)
    to = {"lora_A": (-1, *kernel), "lora_B": (site.out_features, -1, *ones), "lora_magnitude_vector": (1, -1, *ones)}
    own = {name: shape for name, shape in site.parameter_shapes().items() if name in to}
    return {name: (_LINEAR.get(name, (name,))[0], (_reshaped(shape, to[name]),)) for name, shape in own.items()}


def _of_parameter(gm: CapturedModule, target: Target, site: Site) -> Mapping[str, _Form]:
    """PEFT takes a matrix for ``[out, in]``, and a stack of them too unless its module says ``is_transposed``.

    Where the graph has it the other way round, ``(B A)^T = A^T B^T``: the factors change places.
    """
    stacked = len(site.shape) == 3
    turned = (STORAGE[site.kind] is SWAPPED) != (stacked and get_path(gm, target.module).is_transposed)
    shapes = site.parameter_shapes()
    if not turned:
        return {
            "lora_A": ("lora_A.weight", (_side_by_side(shapes["lora_A"]),)),
            "lora_B": ("lora_B.weight", (_interleaved(shapes["lora_B"]),)),
        }
    return {
        "lora_A": ("lora_B.weight", (_TURNED, _interleaved(_turned(shapes["lora_A"])))),
        "lora_B": ("lora_A.weight", (_TURNED, _side_by_side(_turned(shapes["lora_B"])))),
    }


_TURNED = _Step(lambda t: t.mT, lambda t: t.mT)


def _turned(shape: Sequence[int]) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2])


def _side_by_side(shape: Sequence[int]) -> _Step:
    """``[experts, r, in]`` as ``[experts * r, in]``; of one matrix nothing."""
    return _Step(lambda t: t.flatten(0, -2), lambda t: t.reshape((*shape[:-2], -1, shape[-1])))


def _interleaved(shape: Sequence[int]) -> _Step:
    """``[experts, out, r]`` as ``[out, r * experts]``, the experts next to each other; of one matrix nothing."""
    if len(shape) == 2:
        return _Step(lambda t: t, lambda t: t)
    return _Step(lambda t: t.permute(1, 2, 0).flatten(1), lambda t: t.reshape(shape[1], -1, shape[0]).permute(2, 0, 1))


def _reshaped(shape: Sequence[int], to: Sequence[int]) -> _Step:
    return _Step(lambda t: t.reshape(to), lambda t: t.reshape(shape))


def _times(factor: float) -> _Step:
    if math.isclose(factor, 1.0):
        factor = 1.0
    return _Step(lambda t: t * factor if factor != 1.0 else t, lambda t: t / factor if factor != 1.0 else t)


def _filled(r: int, to: int) -> _Step:
    """Zeros behind the first r: the ranks that a site has not."""

    def read(tensor: Tensor) -> Tensor:
        if bool(tensor[r:].any()):
            raise Misfit(f"has values beyond the site's rank of {r}")
        return tensor[:r]

    return _Step(lambda t: torch.cat([t, t.new_zeros(to - r)]) if to > r else t, read)


def _of_tied(gm: CapturedModule, wrapped: Wrapped, target: Target, prefix: str, spec: LoraSpec) -> Iterator[Entry]:
    """The embedding's factors, and the same ones turned for each linear layer that has its weight."""
    (site,) = target.sites
    a, b = (site.parameter_name(p) for p in ("lora_A", "lora_B"))
    shapes = site.parameter_shapes()
    if STORAGE[site.kind] is not SWAPPED:  # named after a linear layer: its factors are the embedding's, turned
        a, b = b, a
        shapes = {"lora_A": shapes["lora_B"], "lora_B": shapes["lora_A"]}
    turn = () if STORAGE[site.kind] is SWAPPED else (_TURNED,)
    back = () if turn else (_TURNED,)
    yield _entry(f"{prefix}.lora_embedding_A", a, shapes["lora_A"], *turn)
    yield _entry(f"{prefix}.lora_embedding_B", b, shapes["lora_B"], *turn)
    for module in target.modules[1:]:
        path = PREFIX + wrapped.wrapper(module)
        yield _entry(f"{path}.lora_A.weight", b, shapes["lora_B"], *back)
        yield _entry(f"{path}.lora_B.weight", a, shapes["lora_A"], *back)


def _of_attention(gm: CapturedModule, wrapped: Wrapped, target: Target, prefix: str, spec: LoraSpec) -> Iterator[Entry]:
    """An A and a B for the fused projection of q, k and v, and another pair for the output's."""
    width = target.sites[0].in_features
    output = f"{target.module}.out_proj.weight"
    inner = tuple(s for s in target.sites if s.weight != output)
    outer = tuple(s for s in target.sites if s.weight == output)
    r, scaling = spec.rank_for(target.name), spec.scaling_for(target.name)
    yield from _blocks(inner, prefix, 3 * width, width, r, scaling)
    yield from _blocks(outer, f"{prefix}.base_layer.out_proj", width, width, r, scaling * ATTENTION_OUTPUT)


def _blocks(members: Sequence[Site], prefix: str, height: int, width: int, r: int, scaling: float) -> Iterator[Entry]:
    """The sites of a weight one after the other along the rank, each in its own rows of B; all else is zero.

    An adapter of PEFT's has one A for all rows: where the sites of parts have the file's rank, each gets that.
    """
    factors = [site.scaling / scaling for site in members]
    shared = sum(site.r for site in members) > r
    rows = [slice(None) if s.rows is None else slice(min(s.rows), max(s.rows) + 1) for s in members]

    def write_a(tensors: Sequence[Tensor]) -> Tensor:
        stacked = torch.cat([*tensors]) if tensors else torch.zeros(0, width)
        return torch.cat([stacked, stacked.new_zeros(r - len(stacked), width)])

    def write_b(tensors: Sequence[Tensor]) -> Tensor:
        block = tensors[0].new_zeros(height, r) if tensors else torch.zeros(height, r)
        for tensor, mine, columns, factor in zip(tensors, rows, _spans(tensors), factors, strict=True):
            block[mine, columns] = tensor * factor
        return block

    def read_a(tensor: Tensor) -> Sequence[Tensor]:
        return [tensor[span] for span in spans]

    def read_b(tensor: Tensor) -> Sequence[Tensor]:
        left = tensor.clone()
        for mine, span in zip(rows, spans, strict=True):
            left[mine, span] = 0
        if bool(left.any()):
            raise Misfit("adapts more than the sites that the graph has of this attention")
        return [tensor[mine, span] / f for mine, span, f in zip(rows, spans, factors, strict=True)]

    spans = [slice(r)] * len(members) if shared else _spans([torch.empty(0, s.r, device="meta") for s in members])
    for name, shape, write, read in (("lora_A", (r, width), write_a, read_a), ("lora_B", (height, r), write_b, read_b)):
        yield Entry(f"{prefix}.{name}.weight", tuple(s.parameter_name(name) for s in members), shape, write, read)


def _spans(tensors: Sequence[Tensor]) -> list[slice]:
    """The columns that B's of these ranks have when they lie one after the other."""
    ends = list(accumulate(t.shape[-1] for t in tensors))
    return [slice(end - t.shape[-1], end) for t, end in zip(tensors, ends, strict=True)]


_ENTRIES: Mapping[str, Callable[..., Iterator[Entry]]] = {
    "module": _of_site,
    "parameter": _of_site,
    "tokens": _of_site,
    "tied": _of_tied,
    "attention": _of_attention,
}
