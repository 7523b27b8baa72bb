"""One call of an adapted layer of each kind, with random operands: what the laws are checked on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lorafx import LoraSpec
from lorafx.ops import ADAPTED, LAYERS, PARAMETERS, STORAGE, adapted_weight
from lorafx.variants import SELECTABLE as VARIANTS
from lorafx.variants.base import Start, StartRequest

Draw = Callable[..., Tensor]


@dataclass(frozen=True)
class Shape:
    """A layer's kind and its own arguments: ``make(draw)`` gives them, with tensors in float64."""

    kind: str
    r: int
    make: Callable[[Draw], tuple[Any, ...]]


def linear(batch: Sequence[int], out_features: int, in_features: int, r: int, bias: bool = True) -> Shape:
    def make(draw: Draw) -> tuple[Any, ...]:
        weight = draw(out_features, in_features) / math.sqrt(in_features)
        return draw(*batch, in_features), weight, draw(out_features) if bias else None

    return Shape("linear", r, make)


def convolution(
    kind: str, image: Sequence[int], weight: Sequence[int], r: int, *options: Any, bias: bool = True
) -> Shape:
    def make(draw: Draw) -> tuple[Any, ...]:
        kernel = draw(*weight) / math.sqrt(math.prod(weight[1:]))
        return draw(*image), kernel, draw(weight[0]) if bias else None, *options

    return Shape(kind, r, make)


def embedding(*, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False) -> Shape:
    ids = torch.tensor([[0, 6, 2, 6], [1, 2, 5, 4]])
    return Shape("embedding", 3, lambda draw: (draw(7, 5), ids, padding_idx, scale_grad_by_freq, sparse))


def parameter(kind: str, shape: Sequence[int], r: int = 2) -> Shape:
    return Shape(kind, r, lambda draw: (draw(*shape) / math.sqrt(shape[-1]),))


#: Sizes of a linear layer and its input: none a multiple of a tile, some 1 or 0.
LINEAR: Mapping[str, Shape] = {
    "one": linear((1,), 1, 1, 1),
    "wide": linear((63,), 100, 33, 3),
    "no bias": linear((7, 5), 63, 100, 8, bias=False),
    "one output": linear((2, 1, 3), 1, 63, 5),
    "rank above both widths": linear((), 33, 17, 40),
    "empty batch": linear((0,), 5, 7, 2),
}

#: The other kinds.
OTHERS: Mapping[str, Shape] = {
    "addmm": Shape("addmm", 2, lambda draw: (draw(5), draw(6, 4), draw(4, 5) / 2)),
    "addmm onto a matrix": Shape("addmm", 2, lambda draw: (draw(6, 5), draw(6, 4), draw(4, 5) / 2)),
    "embedding": embedding(),
    "conv1d": convolution("conv1d", (2, 4, 9), (6, 2, 3), 2, [2], [1], [1], 2),
    "conv1d without batch": convolution("conv1d", (4, 9), (6, 4, 3), 3, [1], [0], [2], 1),
    "conv2d": convolution("conv2d", (2, 3, 7, 6), (5, 3, 3, 2), 3, [2, 1], [1, 0], [1, 2], 1, bias=False),
    "conv2d depthwise": convolution("conv2d", (2, 4, 5, 5), (8, 1, 3, 3), 2, [1, 1], [1, 1], [1, 1], 4),
    "conv3d": convolution("conv3d", (2, 2, 4, 5, 4), (4, 1, 2, 3, 2), 2, [1, 1, 1], [0, 1, 1], [1, 1, 1], 2),
    "conv1d same": convolution("conv1d_padding", (2, 3, 8), (4, 3, 4), 2, [1], "same", [1], 1),
    "conv2d same": convolution("conv2d_padding", (2, 4, 6, 6), (6, 2, 3, 2), 2, [1, 1], "same", [2, 1], 2),
    "conv3d same": convolution("conv3d_padding", (1, 2, 4, 4, 4), (3, 2, 2, 2, 3), 2, [1, 1, 1], "valid", [1, 1, 1], 1),
    "parameter": parameter("parameter", (5, 4)),
    "experts": parameter("parameter", (3, 5, 4)),
    "transposed experts": parameter("parameter_t", (3, 4, 5)),
    "bare kernel": parameter("parameter_flat", (6, 2, 3)),
}


@dataclass(frozen=True)
class One:
    """One adapter of a call."""

    name: str
    scaling: float
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Adapted:
    """A call of a layer with its adapters. ``own`` are the layer's own arguments."""

    kind: str
    own: tuple[Any, ...]
    adapters: tuple[One, ...]

    @property
    def weight(self) -> Tensor:
        found: Tensor = self.own[self.weight_index]
        return found

    @property
    def weight_index(self) -> int:
        return 0 if self.kind in PARAMETERS else LAYERS[self.kind].weight

    @property
    def matrix(self) -> Tensor:
        return STORAGE[self.kind].matrix(self.weight)

    @property
    def parameters(self) -> list[Tensor]:
        """The trained tensors of all adapters."""
        return [a.tensors[n] for a in self.adapters for n in VARIANTS[a.name].parameters]

    def layer(self) -> Tensor:
        """The layer alone (of a bare parameter: the parameter)."""
        found: Tensor = self.own[0] if self.kind in PARAMETERS else LAYERS[self.kind].target(*self.own)
        return found

    def __call__(self, dropout: float = 0.0, training: bool = False, rows: Tensor | None = None) -> Tensor:
        tensors = [t for a in self.adapters for t in a.tensors.values()]
        names, scalings = [a.name for a in self.adapters], [a.scaling for a in self.adapters]
        if self.kind in PARAMETERS:
            return adapted_weight(*self.own, tensors, names, scalings, self.kind, [None] * len(names))
        probabilities = [dropout] * len(names)
        return ADAPTED[self.kind](*self.own, tensors, names, scalings, probabilities, training, rows)

    def folded(self, dtype: torch.dtype | None = None) -> Adapted:
        """The layer with the first adapter in its weight and bias, computed in float64, rounded once to ``dtype``."""
        (one,) = self.adapters
        update = VARIANTS[one.name].update(
            self.matrix.double(), {n: t.double() for n, t in one.tensors.items()}, one.scaling
        )
        matrix = update.fold(self.matrix.double())
        own = list(self.own)
        own[self.weight_index] = STORAGE[self.kind].stored(matrix, self.weight.shape).to(dtype or self.weight.dtype)
        place = None if self.kind in PARAMETERS else LAYERS[self.kind].bias
        if update.shift is not None and place is not None and own[place] is not None:
            own[place] = (own[place].double() + update.shift).to(dtype or self.weight.dtype)
        return replace(self, own=tuple(own))

    def with_weight(self, matrix: Tensor | None) -> Adapted:
        """With another weight; None: with the same."""
        own = list(self.own)
        if matrix is not None:
            own[self.weight_index] = STORAGE[self.kind].stored(matrix, self.weight.shape)
        return replace(self, own=tuple(own))

    def with_adapters(self, *adapters: One) -> Adapted:
        return replace(self, adapters=adapters)


def has_bias(shape: Shape) -> bool:
    """Whether a layer of this shape has a bias that a variant could shift."""
    place = None if shape.kind in PARAMETERS else LAYERS[shape.kind].bias
    return place is not None and shape.make(torch.randn)[place] is not None


def fits(name: str, shape: Shape) -> bool:
    """Whether a variant can adapt a layer of this shape: one that shifts the bias needs one."""
    return has_bias(shape) or not VARIANTS[name].shifts_bias


def spec_for(name: str, r: int, rslora: bool = False) -> LoraSpec:
    return LoraSpec(variant=name, rslora=rslora, r=r, alpha=1.5)


def started(given: Adapted, name: str, init: str, r: int, seed: int = 1, rslora: bool = False) -> tuple[One, Start]:
    """A variant's start at this layer, and the adapter that it makes."""
    variant, spec = VARIANTS[name], spec_for(name, r, rslora)
    scaling, dtype = spec.scaling_for("any"), spec.dtype_for(given.weight.dtype)
    matrix = given.matrix
    generator = torch.Generator().manual_seed(seed)
    several = [
        variant.start(StartRequest(one, r, scaling, init, dtype, generator, spec.options, given.kind == "embedding"))
        for one in (matrix if matrix.dim() == 3 else [matrix])
    ]
    parameters = {n: torch.stack([s.parameters[n] for s in several]) for n in variant.parameters}
    bases = [s.base for s in several if s.base is not None]
    if matrix.dim() == 2:
        parameters = {n: t[0] for n, t in parameters.items()}
    base = None if not bases else torch.stack(bases) if matrix.dim() == 3 else bases[0]
    shared = variant.share([(matrix.shape[-2] + 1, matrix.shape[-1] + 2)], r, spec.options, dtype)
    return One(name, scaling, {**parameters, **shared}), Start(parameters, base)


def operands(
    name: str, shape: Shape, dtype: torch.dtype, *, rslora: bool = False, fresh: bool = False, seed: int = 1
) -> Adapted:
    """Random operands with one adapter, at its first values (``fresh``) or anywhere."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    own = tuple(v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for v in shape.make(draw))
    bare = Adapted(shape.kind, own, ())
    one, _ = started(bare, name, VARIANTS[name].inits[0], shape.r, seed, rslora)
    if not fresh:
        moved = {
            n: (draw(*t.shape) / math.sqrt(shape.r)).to(t.dtype) if n in VARIANTS[name].parameters else t
            for n, t in one.tensors.items()
        }
        one = replace(one, tensors=moved)
    return bare.with_adapters(one)
