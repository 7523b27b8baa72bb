"""The operators that sites call: each twins an operator that has a weight, and takes adapters as well.

``lorafx.linear`` has the arguments of ``aten.linear`` and after them those of the adapters. It means
``aten.linear`` with the updated weight (:class:`~lorafx.variants.base.Update`), computed without forming it:

    y = op(x, W) + b + sum over the adapters of  (gain - 1) op(x, W) + gain op(drop(x), left right) + shift

Each active adapter's update is relative to the frozen layer, so their order means nothing. The pure-torch
reference *is* the meaning. It is registered as composite: under autograd, autocast, ``torch.func`` (``vmap`` too) and
``torch.compile`` it is the sum of its parts, and it stays one node in exported graphs. What is faster is an operator of
its own for a group of layers (:mod:`lorafx.kernels.grouped`), which lowering puts in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.nn import functional as F

from lorafx.bases.view import ReadAsDense
from lorafx.folded import folded
from lorafx.variants import VARIANTS
from lorafx.variants.base import Update

aten = torch.ops.aten
#: Where every operator of lorafx is registered.
LIBRARY: Any = torch.library.Library("lorafx", "FRAGMENT")  # type: ignore[no-untyped-call]

#: What follows a layer's own arguments. ``tensors`` are those of all adapters, one adapter after the other, each in
#: the order of its variant's ``parameters`` and ``shared``; the other lists have one entry an adapter.
#: ``rows [batch]`` gives each row of the batch to the adapter with that index (none: -1); None: all to all.
_ADAPTERS = "Tensor[] tensors, str[] variants, float[] scaling, float[] dropout, bool training, Tensor? rows"
ADAPTER_ARGUMENTS = 6


def define_op(name: str, schema: str, reference: Callable[..., Tensor | list[Tensor]]) -> OpOverload:
    """Register ``lorafx::name`` with ``schema`` (``(Tensor x, ...) -> Tensor``, or several) and its reference."""
    LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, reference, "CompositeImplicitAutograd")
    LIBRARY.impl(name, reference, "FuncTorchBatchedDecomposition")  # vmap, which composites are not open to by default
    overload: OpOverload = getattr(torch.ops.lorafx, name).default
    return overload


@dataclass(frozen=True)
class Storage:
    """How a weight is stored: ``matrix`` views it as ``[..., out, in]``, ``stored`` turns a matrix back."""

    matrix: Callable[[Tensor], Tensor]
    stored: Callable[[Tensor, torch.Size], Tensor]


def _contiguous(weight: Tensor) -> Tensor:
    """In memory of its own order; what reads as dense has none, and would be dense from then on."""
    return weight if isinstance(weight, ReadAsDense) else weight.contiguous()


PLAIN = Storage(lambda weight: weight, lambda matrix, shape: matrix)
SWAPPED = Storage(lambda weight: weight.mT, lambda matrix, shape: _contiguous(matrix.mT))
FLAT = Storage(lambda weight: weight.flatten(1), lambda matrix, shape: matrix.reshape(shape))


@dataclass(frozen=True)
class Layer:
    """An operator with a weight that can be adapted.

    ``arguments`` is its schema as far as adapters go, ``x``, ``weight`` and ``bias`` the places of these
    operands. ``low_rank(arguments, x, update)`` is the operator with the matrix ``left right`` and without
    bias; the layer's output has its ``out`` at dimension ``out_dim``. ``picks`` says that the input picks columns of
    the matrix by number (an embedding): it has no elements to drop.
    """

    target: OpOverload
    arguments: str
    x: int
    weight: int
    bias: int | None
    storage: Storage
    low_rank: Callable[[Sequence[Any], Tensor, Update], Tensor]
    out_dim: int = -1
    picks: bool = False


def updates(
    weight: Tensor, tensors: Iterable[Tensor], variants: Sequence[str], scaling: Sequence[float]
) -> Iterator[Update]:
    """The update of each adapter of a matrix, from the operator's arguments; takes of an iterator what is theirs."""
    remaining = iter(tensors)
    for name, scale in zip(variants, scaling, strict=True):
        variant = VARIANTS[name]
        given = {n: next(remaining) for n in (*variant.parameters, *variant.shared)}
        yield variant.update(weight, given, scale)


def adapted(layer: Layer, *arguments: Any) -> Tensor:
    """The reference of a layer's twin. The branches are added in the adapters' dtype: one rounding at the end."""
    own, (tensors, variants, scaling, dropout, training, rows) = (
        arguments[:-ADAPTER_ARGUMENTS],
        arguments[-ADAPTER_ARGUMENTS:],
    )
    base: Tensor = layer.target(*own)
    x, bias = own[layer.x], None if layer.bias is None else own[layer.bias]
    total = base

    def along_out(vector: Tensor) -> Tensor:
        return vector.reshape(-1, *[1] * (base.dim() - 1 - layer.out_dim % base.dim()))

    for index, update in enumerate(updates(layer.storage.matrix(own[layer.weight]), tensors, variants, scaling)):
        dropped = F.dropout(x, dropout[index], training) if dropout[index] > 0.0 else x
        branch = layer.low_rank(own, dropped, update)
        if update.gain is not None:
            plain = base if bias is None else base - (along_out(bias) if bias.dim() < 2 else bias)
            gain = along_out(update.gain)
            branch = gain * branch + (gain - 1) * plain
        if update.shift is not None:
            branch = branch + along_out(update.shift)
        if rows is not None:
            torch._check(  # type: ignore[no-untyped-call]
                base.shape[0] % rows.shape[0] == 0,
                lambda: f"adapter_names has {rows.shape[0]} names, and the batch another size ({base.shape[0]})",
            )
            mine = (rows == index).repeat_interleave(base.shape[0] // rows.shape[0])
            branch = torch.where(mine.reshape(-1, *[1] * (base.dim() - 1)), branch, 0.0)
        total = total + branch
    return total.to(base.dtype)


def _linear(arguments: Sequence[Any], x: Tensor, update: Update) -> Tensor:
    return F.linear(F.linear(x.to(update.right.dtype), update.right), update.left)


def _embedding(arguments: Sequence[Any], x: Tensor, update: Update) -> Tensor:
    """Its gradient is dense even where the layer's is sparse: that of a transposed view cannot be."""
    _, _, padding_idx, scale_grad_by_freq, _ = arguments
    return F.linear(aten.embedding.default(update.right.t(), x, padding_idx, scale_grad_by_freq, False), update.left)


def _convolution(target: OpOverload, arguments: Sequence[Any], x: Tensor, update: Update) -> Tensor:
    """With groups, each group's part of the input meets all of ``right``, and its outputs their rows of ``left``."""
    _, weight, _, stride, padding, dilation, groups = arguments
    kernel = update.right.reshape(-1, *weight.shape[1:]).repeat(groups, *[1] * (weight.dim() - 1))
    narrow = target(x.to(kernel.dtype), kernel, None, stride, padding, dilation, groups)
    point = update.left.reshape(*update.left.shape, *[1] * (weight.dim() - 2))
    spread: Tensor = target.overloadpacket.default(narrow, point, None, groups=groups)
    return spread


def _convolution_layer(target: OpOverload, dims: int, padding: str) -> Layer:
    sizes = f"SymInt[{dims}]"
    arguments = (
        f"Tensor input, Tensor weight, Tensor? bias, {sizes} stride, {padding} padding, {sizes} dilation, SymInt groups"
    )
    return Layer(target, arguments, 0, 1, 2, FLAT, partial(_convolution, target), out_dim=-1 - dims)


#: Every operator that can be adapted, by the name of its kind, which is also that of its twin.
LAYERS: Mapping[str, Layer] = MappingProxyType(
    {
        "linear": Layer(
            aten.linear.default, "Tensor input, Tensor weight, Tensor? bias", 0, 1, 2, PLAIN, _linear
        ),
        # GPT-2's Conv1D: the weight is stored [in, out]
        "addmm": Layer(
            aten.addmm.default, "Tensor bias, Tensor input, Tensor weight", 1, 2, 0, SWAPPED, _linear
        ),
        "embedding": Layer(
            aten.embedding.default,
            "Tensor weight, Tensor indices, SymInt padding_idx, bool scale_grad_by_freq, bool sparse",
            1, 0, None, SWAPPED, _embedding, picks=True,
        ),
        "conv1d": _convolution_layer(aten.conv1d.default, 1, "SymInt[1]"),
        "conv2d": _convolution_layer(aten.conv2d.default, 2, "SymInt[2]"),
        "conv3d": _convolution_layer(aten.conv3d.default, 3, "SymInt[3]"),
        "conv1d_padding": _convolution_layer(aten.conv1d.padding, 1, "str"),
        "conv2d_padding": _convolution_layer(aten.conv2d.padding, 2, "str"),
        "conv3d_padding": _convolution_layer(aten.conv3d.padding, 3, "str"),
    }
)  # fmt: skip

#: The twin of each layer.
ADAPTED: Mapping[str, OpOverload] = MappingProxyType(
    {
        name: define_op(name, f"({layer.arguments}, {_ADAPTERS}) -> Tensor", partial(adapted, layer))
        for name, layer in LAYERS.items()
    }
)


#: How bare parameters are stored, which are adapted wherever they are read: as ``[..., out, in]``, transposed, or as
#: a convolution's ``[out, in / groups, *kernel]``.
PARAMETERS: Mapping[str, Storage] = MappingProxyType(
    {"parameter": PLAIN, "parameter_t": SWAPPED, "parameter_flat": FLAT}
)

#: How the weight of each kind of site is stored.
STORAGE: Mapping[str, Storage] = MappingProxyType(
    {**{name: layer.storage for name, layer in LAYERS.items()}, **PARAMETERS}
)


def adapted_weight_reference(
    weight: Tensor,
    tensors: Sequence[Tensor],
    variants: Sequence[str],
    scaling: Sequence[float],
    kind: str,
    rows: Sequence[Tensor | None],
) -> Tensor:
    """A parameter with its updates folded in, for code that is none of the layers.

    Args:
        weight: as :data:`PARAMETERS` says for its ``kind``; a stack of matrices for experts.
        tensors, variants, scaling: as in the layers' twins.
        rows: for each adapter the rows of the matrix that it is of, as :func:`add_updates` has them.
    """
    storage = PARAMETERS[kind]
    matrix = storage.matrix(weight)
    remaining = iter(tensors)
    changes: list[tuple[Update, Tensor | None]] = []
    for name, scale, mine in zip(variants, scaling, rows, strict=True):
        part = matrix if mine is None else matrix.index_select(-2, mine)
        changes += [(update, mine) for update in updates(part, remaining, [name], [scale])]
    return storage.stored(folded(matrix, changes), weight.shape)


adapted_weight = define_op(
    "weight",
    "(Tensor weight, Tensor[] tensors, str[] variants, float[] scaling, str kind, Tensor?[] rows) -> Tensor",
    adapted_weight_reference,
)
