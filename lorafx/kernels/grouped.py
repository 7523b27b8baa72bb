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

from lorafx.kernels.base import Adapters, Call, quantised
from lorafx.kernels.function import LowRankLinear, make_group
from lorafx.kernels.providers import provider
from lorafx.ops import ADAPTED, LAYERS, define_op, updates
from lorafx.variants import VARIANTS
from lorafx.variants.base import full_precision

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
class _Layer:
    """One layer of a group: its own tensors, and the arguments of its adapters."""

    kind: str
    stored: Tensor
    bias: Tensor | None
    training: bool
    tensors: Sequence[Tensor]
    variants: Sequence[str]
    scaling: Sequence[float]
    dropout: Sequence[float]

    @property
    def weight(self) -> Tensor:
        """``[out, in]``."""
        return LAYERS[self.kind].storage.matrix(self.stored)

    def twin(self, x: Tensor) -> Tensor:
        """What it means."""
        layer = LAYERS[self.kind]
        own: list[Any] = [None] * 3
        assert layer.bias is not None
        own[layer.x], own[layer.weight], own[layer.bias] = x, self.stored, self.bias
        if not self.variants:
            plain: Tensor = layer.target(*own)
            return plain
        adapters = (self.tensors, self.variants, self.scaling, self.dropout, self.training, None)
        adapted: Tensor = ADAPTED[self.kind](*own, *adapters)
        return adapted


@dataclass(frozen=True)
class _Sibling:
    """What all adapters of one layer together make of it; a bias that broadcasts (addmm takes them) is added late."""

    weight: Tensor
    bias: Tensor | None
    late: Tensor | None
    gain: Tensor | None
    lefts: list[Tensor]
    rights: list[Tensor]
    scales: list[float]


def _sibling(layer: _Layer) -> _Sibling:
    """Each update is relative to the frozen layer: the gains' excesses over 1 add up, and scale no bias."""
    weight, bias = layer.weight, layer.bias
    changes = list(updates(weight, layer.tensors, layer.variants, layer.scaling))
    gains = [u.gain for u in changes if u.gain is not None]
    lefts = [u.unscaled if u.gain is None else u.gain.unsqueeze(-1) * u.unscaled for u in changes]
    gain = gains[0] if len(gains) == 1 else 1 + torch.stack([g - 1 for g in gains]).sum(0) if gains else None
    for shift in (u.shift for u in changes):
        if shift is not None:
            bias = shift if bias is None else bias + shift
    late = None
    if bias is not None and bias.shape != weight.shape[:1]:
        bias, late = None, bias
    return _Sibling(weight, bias, late, gain, lefts, [u.right for u in changes], [u.scaling for u in changes])


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
    layers, remaining, start = [], iter(tensors), 0
    for kind, weight, bias, count, trains in zip(kinds, weights, biases, counts, training, strict=True):
        mine = slice(start, start + count)
        start += count
        names = variants[mine]
        own = [next(remaining) for v in names for _ in (*VARIANTS[v].parameters, *VARIANTS[v].shared)]
        layers.append(_Layer(kind, weight, bias, trains, own, names, scaling[mine], dropout[mine]))
    if torch._C._functorch.maybe_current_level() is not None:  # function transforms see plain torch
        return [layer.twin(x) for layer in layers]

    siblings = [_sibling(layer) for layer in layers]
    device = "cpu" if x.is_meta else x.device.type
    autocast = torch.is_autocast_enabled(device) and x.dtype is not torch.float64
    if autocast:
        dtype = torch.get_autocast_dtype(device)
        x, sources, recipe, activation = x.to(dtype), [], "", ""  # the recipe would give the input before the cast
    rights = [right for s in siblings for right in s.rights]
    ranks = tuple(right.shape[0] for right in rights)
    p = tuple(quantised(chance) if layer.training else 0.0 for layer in layers for chance in layer.dropout)
    chosen = provider(provider_name)
    call = Call(x.device, x.dtype, x.shape[-1], tuple(s.weight.shape[0] for s in siblings), sum(ranks))
    if chosen.rejects(call) is not None:
        chosen = provider("torch")
    if activation not in chosen.activations or not all(_alike(source, sources[0]) for source in sources):
        activation = ""  # the sources get their gradients by autograd, as where factors broadcast
    adapters = Adapters(ranks, p, tuple(scale for s in siblings for scale in s.scales))
    group = make_group(chosen, tuple(counts), adapters, recipe, activation)
    operands = (
        *[s.weight.to(x.dtype) if autocast else s.weight for s in siblings],
        *[None if s.bias is None else s.bias.to(x.dtype) for s in siblings],
        *[s.gain for s in siblings],
        *[left for s in siblings for left in s.lefts],
        *rights,
    )  # Operands, flattened
    with full_precision(x):
        ys = LowRankLinear.apply(group, x, len(sources), *sources, *operands)  # type: ignore[no-untyped-call]
        return [y if s.late is None else y + s.late.to(x.dtype) for y, s in zip(ys, siblings, strict=True)]


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape


grouped = define_op("grouped", _SCHEMA, grouped_reference)
