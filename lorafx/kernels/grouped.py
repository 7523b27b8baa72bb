"""The operator that lowering puts in the place of the twins of ``linear`` that read the same input.

    q, k = lorafx.grouped(x, [wq, wk], [bq, bk], [aq, Bq, ak, Bk], ["lora", "lora"], ...)

It means what its twins mean (:mod:`lorafx.ops`), one after the other; a layer without adapters may be among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorafx.kernels.base import Call, Dropout
from lorafx.kernels.function import LowRankLinear, Operands, make_group
from lorafx.kernels.providers import provider
from lorafx.ops import ADAPTED, LAYERS, define_op, updates
from lorafx.variants import VARIANTS
from lorafx.variants.base import Update, full_precision

#: ``kinds``, ``weights``, ``biases``, ``counts`` (of adapters) and ``training`` have one entry a sibling; ``variants``,
#: ``scaling`` and ``dropout`` one an adapter; ``tensors`` are as in a twin. From ``sources`` and ``recipe`` backward
#: computes ``x`` again, instead of keeping it (:mod:`.recipe`); with ``activation`` its name, where nothing else reads
#: ``x``, it gives the sources their gradient itself.
_SCHEMA = (
    "(Tensor x, str[] kinds, Tensor[] weights, Tensor?[] biases, int[] counts, bool[] training, Tensor[] tensors, "
    "str[] variants, float[] scaling, float[] dropout, str provider, Tensor[] sources, str recipe, "
    'str activation="") -> Tensor[]'
)


@dataclass(frozen=True)
class _Sibling:
    """One layer: its weight as ``[out, in]``, and what all of its adapters together make of it."""

    weight: Tensor
    bias: Tensor | None
    gain: Tensor | None
    lefts: list[Tensor]
    rights: list[Tensor]


def _sibling(weight: Tensor, bias: Tensor | None, changes: Sequence[Update]) -> _Sibling:
    """Each update is relative to the frozen layer: the gains' excesses over 1 add up, and scale no bias."""
    gains = [u.gain for u in changes if u.gain is not None]
    lefts = [u.left if u.gain is None else u.gain.unsqueeze(-1) * u.left for u in changes]
    gain = gains[0] if len(gains) == 1 else 1 + torch.stack([g - 1 for g in gains]).sum(0) if gains else None
    for shift in (u.shift for u in changes):
        if shift is not None:
            bias = shift if bias is None else bias + shift
    return _Sibling(weight, bias, gain, lefts, [u.right for u in changes])


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape


def _by_twins(
    x: Tensor,
    kinds: Sequence[str],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    counts: Sequence[int],
    training: Sequence[bool],
    tensors: Sequence[Tensor],
    variants: Sequence[str],
    scaling: Sequence[float],
    dropout: Sequence[float],
) -> list[Tensor]:
    """The meaning itself."""
    outputs, taken, start = [], 0, 0
    for kind, weight, bias, count, trains in zip(kinds, weights, biases, counts, training, strict=True):
        mine, layer = slice(start, start + count), LAYERS[kind]
        start += count
        size = sum(len(VARIANTS[v].parameters) + len(VARIANTS[v].shared) for v in variants[mine])
        own: list[Any] = [None] * 3
        own[layer.x], own[layer.weight] = x, weight
        assert layer.bias is not None
        own[layer.bias] = bias
        adapters = (tensors[taken : taken + size], variants[mine], scaling[mine], dropout[mine], trains, None)
        taken += size
        outputs.append(ADAPTED[kind](*own, *adapters) if count else layer.target(*own))
    return outputs


def grouped_reference(
    x: Tensor,
    kinds: Sequence[str],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    counts: Sequence[int],
    training: Sequence[bool],
    tensors: Sequence[Tensor],
    variants: Sequence[str],
    scaling: Sequence[float],
    dropout: Sequence[float],
    provider_name: str,
    sources: Sequence[Tensor],
    recipe: str,
    activation: str = "",
) -> list[Tensor]:
    """See the module; under autocast in its dtype, as ``linear`` is."""
    if torch._C._functorch.maybe_current_level() is not None:  # function transforms see plain torch
        return _by_twins(x, kinds, weights, biases, counts, training, tensors, variants, scaling, dropout)
    device = "cpu" if x.is_meta else x.device.type
    remaining, start = iter(tensors), 0
    siblings, p = [], []
    for kind, stored, bias, count, trains in zip(kinds, weights, biases, counts, training, strict=True):
        mine = slice(start, start + count)
        start += count
        weight = LAYERS[kind].storage.matrix(stored)
        changes = list(updates(weight, remaining, variants[mine], scaling[mine]))
        siblings.append(_sibling(weight, bias, changes))
        p += [chance if trains else 0.0 for chance in dropout[mine]]
    autocast = torch.is_autocast_enabled(device) and x.dtype is not torch.float64
    if autocast:
        dtype = torch.get_autocast_dtype(device)
        x, sources, recipe, activation = x.to(dtype), [], "", ""  # the recipe would give the input before the cast
    rights = [right for s in siblings for right in s.rights]
    ranks = tuple(right.shape[0] for right in rights)
    chosen = provider(provider_name)
    call = Call(x.device, x.dtype, x.shape[-1], tuple(s.weight.shape[0] for s in siblings), sum(ranks))
    if chosen.rejects(call) is not None:
        chosen = provider("torch")
    if activation not in chosen.activations or not all(_alike(source, sources[0]) for source in sources):
        activation = ""  # the sources get their gradients by autograd, as where factors broadcast
    group = make_group(chosen, tuple(counts), Dropout(ranks, tuple(p)), recipe, activation)
    apart = [s.bias if s.bias is not None and s.bias.shape != s.weight.shape[:1] else None for s in siblings]
    operands = Operands(
        [s.weight.to(x.dtype) if autocast else s.weight for s in siblings],
        [
            None if s.bias is None or late is not None else s.bias.to(x.dtype)
            for s, late in zip(siblings, apart, strict=True)
        ],
        [s.gain for s in siblings],
        [left for s in siblings for left in s.lefts],
        rights,
    )
    with full_precision(x):
        ys = LowRankLinear.apply(group, x, len(sources), *sources, *operands.flatten())  # type: ignore[no-untyped-call]
        # a bias that broadcasts (addmm takes them) is added by itself
        return [y if late is None else y + late.to(x.dtype) for y, late in zip(ys, apart, strict=True)]


grouped = define_op("grouped", _SCHEMA, grouped_reference)
