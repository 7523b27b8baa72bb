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

and all below ``base_model.model``, as PEFT 0.21.2 reads and writes them. What PEFT has no layer for (DoRA of experts, an
adapter within the groups of a convolution) keeps to the same rules, and PEFT refuses the config or the shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorafx.graph import CapturedModule, get_path
from lorafx.ir import Adapter, Site
from lorafx.ops import FLAT, STORAGE, SWAPPED
from lorafx.peft_targets import Target, path_in_file, targets
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


def entries(gm: CapturedModule, adapter: Adapter, spec: LoraSpec) -> tuple[Entry, ...]:
    """Every tensor of the file of an adapter whose config says ``spec``.

    Raises:
        AdapterError: a site has no place in the format.
    """
    found = targets(gm, adapter)
    made: list[Entry] = []
    for target in found:
        prefix = PREFIX + path_in_file(found, target.module, inside=False) + ".base_layer" * target.depth
        made += _of_attention(target, prefix, spec) if target.attention else _of_site(gm, target, prefix, spec)
    if spec.options.get("save_projection"):
        shared = {n: s for site in adapter.sites for s, n in site.tensor_names.items() if n not in site.parameter_names}
        made += [
            _same(SHARED_PREFIX + leaf, name, tuple(get_path(gm, name).shape))
            for name, leaf in shared.items()
            if leaf in VARIANTS[spec.variant].shared
        ]
    kept = gm.state_dict().keys()
    for name in adapter.trained:
        own = adapter.own_name(name)
        if own in kept:
            made.append(_same(PREFIX + path_in_file(found, name), own, tuple(get_path(gm, own).shape)))
    return tuple(made)


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


def _same(key: str, name: str, shape: Sequence[int]) -> Entry:
    return _entry(key, name, shape)


def _of_site(gm: CapturedModule, target: Target, prefix: str, spec: LoraSpec) -> Iterator[Entry]:
    (site,) = target.sites
    forms = _forms(gm, target, site)
    for parameter, shape in site.parameter_shapes().items():
        suffix, *steps = forms.get(parameter, (parameter,))
        if parameter == SCALED.get(site.variant):
            steps.append(_times(site.scaling / spec.scaling_for(target.name)))
        if parameter == FILLED.get(site.variant):
            steps.append(_filled(shape[-1], spec.rank_for(target.name)))
        yield _entry(f"{prefix}.{suffix}", site.parameter_name(parameter), shape, *steps)


Form = tuple[Any, ...]
"""What follows the wrapper's path, and steps."""


def _forms(gm: CapturedModule, target: Target, site: Site) -> Mapping[str, Form]:
    """The form of each parameter; one that is not listed is stored under its own name and as it is."""
    if site.variant in ("adalora", "vera"):
        return {}
    if site.variant == "tokens":
        return {"trainable_tokens_delta": ("token_adapter.trainable_tokens_delta",)}
    bias = {"lora_B_bias": ("lora_B.bias",)}
    shapes = site.parameter_shapes()
    if target.parameter is not None:
        return {**bias, **_of_parameter(gm, target, site, shapes)}
    if site.kind == "embedding":
        return {**bias, "lora_A": ("lora_embedding_A",), "lora_B": ("lora_embedding_B",)}
    if STORAGE[site.kind] is FLAT:
        kernel = get_path(gm, site.weight).shape[1:]
        ones = [1] * (len(kernel) - 1)
        to = {"lora_A": (-1, *kernel), "lora_B": (site.out_features, -1, *ones), "lora_magnitude_vector": (1, -1, *ones)}
        suffix = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_magnitude_vector": "lora_magnitude_vector"}
        return {**bias, **{n: (suffix[n], _reshaped(shapes[n], to[n])) for n in to if n in shapes}}
    return {**bias, "lora_A": ("lora_A.weight",), "lora_B": ("lora_B.weight",)}


def _of_parameter(
    gm: CapturedModule, target: Target, site: Site, shapes: Mapping[str, tuple[int, ...]]
) -> Mapping[str, Form]:
    """PEFT takes a matrix for ``[out, in]``, and a stack of them too unless its module says ``is_transposed``.

    Where the graph has it the other way round, ``(B A)^T = A^T B^T``: the factors change places.
    """
    stacked = len(site.shape) == 3
    turned = (STORAGE[site.kind] is SWAPPED) != (stacked and get_path(gm, target.module).is_transposed)
    first, second = ("lora_B", "lora_A") if turned else ("lora_A", "lora_B")
    swap = [_Step(lambda t: t.mT, lambda t: t.mT)] if turned else []
    a, b = (list(shapes[n]) for n in (first, second))
    if turned:
        a[-2:], b[-2:] = reversed(a[-2:]), reversed(b[-2:])
    side = _Step(lambda t: t.flatten(0, -2), lambda t: t.reshape(a))
    interleaved = _Step(
        lambda t: t.permute(1, 2, 0).flatten(1),  # [experts, out, r] -> [out, r * experts]
        lambda t: t.reshape(b[1], b[2], b[0]).permute(2, 0, 1),
    )
    return {first: ("lora_A.weight", *swap, side), second: ("lora_B.weight", *swap, *([interleaved] if stacked else []))}


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


def _of_attention(target: Target, prefix: str, spec: LoraSpec) -> Iterator[Entry]:
    """One A and one B for the fused projection of q, k and v, and one of each for the output's.

    Sites of parts lie one after the other along the rank, each in its rows of B; what is not adapted is zero.
    """
    r, scaling = spec.rank_for(target.name), spec.scaling_for(target.name)
    output = f"{target.module}.out_proj.weight"
    for weight, path, twice in ((None, prefix, 1.0), (output, f"{prefix}.base_layer.out_proj", ATTENTION_OUTPUT)):
        members = tuple(s for s in target.sites if (s.weight == output) == (weight is not None))
        yield from _blocks(members, path, r, [s.scaling / scaling / twice for s in members], target)


def _blocks(members: Sequence[Site], path: str, r: int, factors: Sequence[float], target: Target) -> Iterator[Entry]:
    width = target.sites[0].in_features
    height = 3 * width if path.count("out_proj") == 0 else width
    raise NotImplementedError
