"""The operator that lowering puts in the place of the twins of ``linear`` that read the same input.

    q, k = lorafx.grouped(x, [wq, wk], [bq, bk], [aq, Bq, ak, Bk], ["lora", "lora"], ...)

It means what its twins mean (:mod:`lorafx.ops`), one after the other; a layer without adapters may be among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorafx.bases.tensor import is_cast
from lorafx.kernels.base import Adapters, Call, Operands, quantised
from lorafx.kernels.providers import provider
from lorafx.ops import ADAPTED, LAYERS, define_op, updates
from lorafx.variants import VARIANTS
from lorafx.variants.base import is_transformed


class Arguments(NamedTuple):
    """What the operator takes, in its order.

    ``kinds``, ``weights``, ``biases``, ``counts`` (of adapters) and ``training`` have one entry a sibling;
    ``variants``, ``scaling`` and ``dropout`` one an adapter; ``tensors`` are as in a twin. From ``sources`` and
    ``recipe`` backward computes ``x`` again, instead of keeping it (:mod:`.recipe`); with ``activation`` its name,
    where nothing else reads ``x``, it gives the sources their gradient itself. In a graph nodes stand for the tensors.
    """

    x: Tensor
    kinds: Sequence[str]
    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    counts: Sequence[int]
    training: Sequence[bool]
    tensors: Sequence[Tensor]
    variants: Sequence[str]
    scaling: Sequence[float]
    dropout: Sequence[float]
    provider: str
    sources: Sequence[Tensor]
    recipe: str
    activation: str = ""


#: What the annotations above are called in a schema.
_TYPES = {
    "Tensor": "Tensor",
    "str": "str",
    "Sequence[Tensor]": "Tensor[]",
    "Sequence[Tensor | None]": "Tensor?[]",
    "Sequence[str]": "str[]",
    "Sequence[int]": "int[]",
    "Sequence[bool]": "bool[]",
    "Sequence[float]": "float[]",
}
_DEFAULTS = {name: f'="{value}"' for name, value in Arguments._field_defaults.items()}
_SCHEMA = ", ".join(
    f"{_TYPES[kind.__forward_arg__]} {name}{_DEFAULTS.get(name, '')}"
    for name, kind in Arguments.__annotations__.items()
)


class _Sibling(NamedTuple):
    """What all adapters of one layer together make of it; a bias that broadcasts (addmm takes them) is added late."""

    weight: Tensor
    bias: Tensor | None
    late: Tensor | None
    gains: list[Tensor | None]
    lefts: list[Tensor]
    rights: list[Tensor]
    scales: list[float]


@dataclass(frozen=True)
class _Layer:
    """What of one layer of a group is no tensor; ``place`` is where in ``tensors`` those of its adapters are."""

    kind: str
    training: bool
    variants: tuple[str, ...]
    scaling: tuple[float, ...]
    dropout: tuple[float, ...]
    place: slice

    def twin(self, x: Tensor, stored: Tensor, bias: Tensor | None, tensors: Sequence[Tensor]) -> Tensor:
        """What it means."""
        layer = LAYERS[self.kind]
        own: list[Any] = [None] * 3
        assert layer.bias is not None
        own[layer.x], own[layer.weight], own[layer.bias] = x, stored, bias
        if not self.variants:
            plain: Tensor = layer.target(*own)
            return plain
        adapters = (tensors[self.place], self.variants, self.scaling, self.dropout, self.training, None)
        adapted: Tensor = ADAPTED[self.kind](*own, *adapters)
        return adapted

    def sibling(self, stored: Tensor, bias: Tensor | None, tensors: Sequence[Tensor]) -> _Sibling:
        """The shifts are added to the bias."""
        weight, late = LAYERS[self.kind].storage.matrix(stored), None
        changes = list(updates(weight, tensors[self.place], self.variants, self.scaling))
        for change in changes:
            if change.shift is not None:
                bias = change.shift if bias is None else bias + change.shift
        if bias is not None and bias.shape != weight.shape[:1]:
            bias, late = None, bias
        gains, lefts, rights = [u.gain for u in changes], [u.unscaled for u in changes], [u.right for u in changes]
        return _Sibling(weight, bias, late, gains, lefts, rights, [u.scaling for u in changes])


@lru_cache(maxsize=4096)
def _layers(
    kinds: tuple[str, ...],
    counts: tuple[int, ...],
    training: tuple[bool, ...],
    variants: tuple[str, ...],
    scaling: tuple[float, ...],
    dropout: tuple[float, ...],
) -> tuple[tuple[_Layer, ...], tuple[float, ...]]:
    """The layers of a group, and the chance of each adapter to drop an element now: once for all steps."""
    layers: list[_Layer] = []
    adapter = tensor = 0
    for kind, count, trains in zip(kinds, counts, training, strict=True):
        mine = slice(adapter, adapter + count)
        size = sum(len(VARIANTS[v].parameters) + len(VARIANTS[v].shared) for v in variants[mine])
        place = slice(tensor, tensor + size)
        layers.append(_Layer(kind, trains, variants[mine], scaling[mine], dropout[mine], place))
        adapter, tensor = mine.stop, place.stop
    return tuple(layers), tuple(quantised(p) if layer.training else 0.0 for layer in layers for p in layer.dropout)


def grouped_reference(*arguments: Any) -> list[Tensor]:
    """See the module; takes :class:`Arguments`. Under autocast in its dtype, as ``linear`` is."""
    given = Arguments(*arguments)
    x, sources, recipe, activation = given.x, given.sources, given.recipe, given.activation
    kinds, counts, training = tuple(given.kinds), tuple(given.counts), tuple(given.training)
    layers, p = _layers(kinds, counts, training, tuple(given.variants), tuple(given.scaling), tuple(given.dropout))
    own = list(zip(layers, given.weights, given.biases, strict=True))
    if is_transformed():
        return [layer.twin(x, weight, bias, given.tensors) for layer, weight, bias in own]

    siblings = [layer.sibling(weight, bias, given.tensors) for layer, weight, bias in own]
    device = "cpu" if x.is_meta else x.device.type
    autocast = torch.is_autocast_enabled(device) and x.dtype is not torch.float64
    if autocast:
        dtype = torch.get_autocast_dtype(device)
        x, sources, recipe, activation = x.to(dtype), [], "", ""  # the recipe would give the input before the cast
    weights = [s.weight.to(x.dtype) if autocast else s.weight for s in siblings]
    rights = [right for s in siblings for right in s.rights]
    ranks = tuple(int(right.shape[0]) for right in rights)  # of factors that are inputs they may be symbols
    chosen = provider(given.provider)
    call = Call(x.device, x.dtype, x.shape[-1], tuple(s.weight.shape[0] for s in siblings), sum(ranks))
    if chosen.rejects(call) is not None or any(is_cast(weight) for weight in weights):
        chosen = provider("torch")  # which makes dense what is cast, a weight at a time
    if activation not in chosen.activations or not all(_alike(source, sources[0]) for source in sources):
        activation = ""  # the sources get their gradients by autograd, as where factors broadcast
    adapters = Adapters(counts, ranks, p, tuple(scale for s in siblings for scale in s.scales))
    operands = Operands(
        weights,
        [s.bias if s.bias is None or s.bias.dtype is x.dtype else s.bias.to(x.dtype) for s in siblings],
        [gain for s in siblings for gain in s.gains],
        [left for s in siblings for left in s.lefts],
        rights,
    )
    operands.check(x, adapters)
    ys = chosen.linear(x, sources, recipe, activation, operands, adapters)
    return [y if s.late is None else y + s.late.to(x.dtype) for y, s in zip(ys, siblings, strict=True)]


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape


grouped = define_op("grouped", f"({_SCHEMA}) -> Tensor[]", grouped_reference)
