"""A weight in a base format that is a tensor: whatever reads it reads the dense one, for as long as it needs it.

    weight = QuantizedTensor(FORMATS["nf4"].quantize(dense))        # nn.Parameter(weight, requires_grad=False)
    y = F.linear(x, weight)                                         # autograd keeps the packed bytes, not the values

So a base format is nobody's business but that of what wants to be fast: captures, passes, variants, merges and exports
see a frozen parameter of the weight's shape and dtype. Products with it are operators of their own (:mod:`.ops`), which
kernels compute panel by panel; any other operator gets the dense weight, which goes when it is done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorafx.bases import FORMATS
from lorafx.bases.base import DTYPES, Packed, damaged
from lorafx.bases.ops import dense, describe, packed_cast, packed_linear, packed_mm, packed_rows
from lorafx.bases.view import ReadAsDense, unwritable
from lorafx.errors import QuantizationError

aten = torch.ops.aten


class QuantizedTensor(ReadAsDense):
    """``packed`` as a tensor of its shape and dtype; ``turned``: with the last two dimensions swapped.

    With another ``dtype`` its values are cast to that after they were rounded to their own.
    """

    packed: Packed
    turned: bool

    @staticmethod
    def __new__(cls, packed: Packed, turned: bool = False, dtype: torch.dtype | None = None) -> QuantizedTensor:
        if dtype is not None and packed.dtype is torch.float32 and dtype.itemsize <= 4:
            packed = replace(packed, dtype=dtype)  # float32 is what values are computed in
        *stack, height, width = packed.shape
        shape = (*stack, width, height) if turned else packed.shape
        strides = torch.empty(packed.shape, device="meta").stride()
        if turned:
            strides = (*strides[:-2], strides[-1], strides[-2])
        made: QuantizedTensor = Tensor._make_wrapper_subclass(
            cls,
            shape,
            strides=strides,
            dtype=dtype or packed.dtype,
            device=packed.tensors["codes"].device,
            requires_grad=False,
        )
        made.packed, made.turned = packed, turned
        for name, tensor in packed.tensors.items():
            setattr(made, name, tensor)
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch gives it no type
        """Without values."""
        kind = f"{self.packed.format}, {tuple(self.shape)}, dtype={self.dtype}, device='{self.device}'"
        return f"{type(self).__name__}({kind})"

    @property
    def origin(self) -> str:
        """What it is, for messages."""
        return f"a weight {list(self.shape)} that is stored as {self.packed.format}"

    @property
    def data(self) -> Tensor:
        """The same weight, without its history."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise unwritable("An assignment to .data", self.origin)

    def dequantize(self) -> Tensor:
        """The dense weight."""
        packed, turned = self.packed, self.turned
        same = self.dtype is packed.dtype
        found = dense(*describe(packed)) if same else packed_cast(*describe(packed), self.dtype)
        return found.view(packed.shape).mT if turned else found.view(packed.shape)

    def memory(self, start: int, stop: int) -> tuple[Tensor, int]:
        """Of the rows that have these elements."""
        if self.dtype is not self.packed.dtype:
            return self.over(self.packed, turned=False).dequantize().view(-1), 0
        width = self.packed.width
        first, last = start // width, -(-stop // width)
        found: Tensor = packed_rows(*describe(self.packed), first, last)
        return found.view(-1), first * width

    def over(self, packed: Packed, *, turned: bool | None = None, dtype: torch.dtype | None = None) -> QuantizedTensor:
        """The same view of other bytes; turned, or of another dtype, if given."""
        with torch.inference_mode(False):  # a tensor made there has no versions, and this one has
            return QuantizedTensor(packed, self.turned if turned is None else turned, dtype or self.dtype)

    def is_like(self, other: object) -> bool:
        """Whether ``other`` is a weight of the same shape and dtype in the same format, so that bytes can be copied."""
        return isinstance(other, QuantizedTensor) and self.__tensor_flatten__() == other.__tensor_flatten__()

    def storage(self) -> Any:
        """There is none, which safetensors, whoever calls it, would say in other words.

        Raises:
            QuantizationError: says what else saves it.
        """
        raise QuantizationError(
            f"{self.origin} has no memory of its dtype that could be written to a file: keep adapters with "
            "lorafx.save_adapter (LoraTrainer does, in place of transformers' Trainer), a training with "
            "lorafx.save_checkpoint, the whole state with torch.save, a file that bitsandbytes reads by way of "
            "lorafx.packed_state_dict, and dense values with weight.dequantize()"
        )

    def share_memory_(self) -> QuantizedTensor:
        """The packed bytes into shared memory: torch would look for a storage, which a tensor like this has not."""
        for tensor in self.packed.tensors.values():
            tensor.share_memory_()  # type: ignore[no-untyped-call]  # torch gives it no types
        return self

    def is_shared(self) -> bool:
        """Whether the packed bytes are in memory that processes share."""
        shared = (t.is_shared() for t in self.packed.tensors.values())  # type: ignore[no-untyped-call]  # as above
        return all(shared)

    # What torch.compile and torch.save ask for.

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        p = self.packed
        return [*p.tensors], (p.format, p.shape, p.dtype, p.block_size, p.double_quant, self.turned, self.dtype)

    @staticmethod
    def __tensor_unflatten__(
        tensors: Mapping[str, Tensor], context: Any, outer_size: Any = None, outer_stride: Any = None
    ) -> QuantizedTensor:
        *what, turned, dtype = context
        name, shape, own, block_size, double_quant = what
        return QuantizedTensor(Packed(name, shape, own, block_size, double_quant, dict(tensors)), turned, dtype)

    def __reduce_ex__(self, protocol: Any) -> Any:
        tensors, context = dict(self.packed.tensors), self.__tensor_flatten__()[1]
        return _load, (tensors, context, isinstance(self, nn.Parameter))

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedTensor:
        if id(self) not in memo:
            memo[id(self)] = _as_parameter(self.over(_map(self.packed, torch.clone)), isinstance(self, nn.Parameter))
        found: QuantizedTensor = memo[id(self)]
        return found

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub lacks func
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        own = _OWN.get(func)
        if own is not None and (found := own(*args, **kwargs)) is not NotImplemented:
            return found
        if func._can_decompose() and (found := func.decompose(*args, **kwargs)) is not NotImplemented:
            return found  # some of its parts may take the packed weight
        return super().__torch_dispatch__(func, types, args, kwargs)


def quantized(weight: Tensor) -> Packed | None:
    """The packed weight ``[..., out, in]`` behind a tensor; None: it is dense, or turned, or cast."""
    same = isinstance(weight, QuantizedTensor) and not weight.turned and weight.dtype == weight.packed.dtype
    return weight.packed if same else None  # type: ignore[attr-defined]  # told by the line before


def as_dense(tensor: Tensor) -> Tensor:
    """A tensor, or what it reads as if it is a packed weight."""
    return tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor


def parts(weight: Tensor) -> tuple[list[Tensor], str, list[int], torch.dtype]:
    """A weight ``[..., out, in]`` for an operator that takes both kinds: as :func:`describe` has it, or by itself.

    Of a dense one the format's name is empty.
    """
    packed = quantized(weight)
    return ([weight], "", [], weight.dtype) if packed is None else describe(packed)


def some_rows(rows: slice, tensors: Sequence[Tensor], name: str, layout: Sequence[int], dtype: torch.dtype) -> Tensor:
    """These rows of the weight of which the others are the :func:`parts`, dense."""
    found: Tensor = packed_rows(tensors, name, layout, dtype, rows.start, rows.stop) if name else tensors[0][rows]
    return found


def is_cast(weight: Tensor) -> bool:
    """Whether it is packed and read in another dtype than its values were rounded to, which no kernel does."""
    return isinstance(weight, QuantizedTensor) and weight.dtype is not weight.packed.dtype


def _as_parameter(weight: QuantizedTensor, is_parameter: bool) -> Tensor:
    return nn.Parameter(weight, requires_grad=False) if is_parameter else weight


def _load(tensors: Mapping[str, Tensor], context: Any, is_parameter: bool) -> Tensor:
    """What a pickle holds, checked: kernels trust in its sizes.

    Raises:
        QuantizationError: it does not fit together.
    """
    name, shape, dtype, block_size, double_quant, turned, read_as = context
    known = name in FORMATS and all(type(flag) is bool for flag in (double_quant, turned, is_parameter))
    sizes = isinstance(shape, tuple) and len(shape) > 1 and all(type(n) is int and n > 0 for n in (*shape, block_size))
    floats = dtype in DTYPES.values() and isinstance(read_as, torch.dtype) and read_as.is_floating_point
    if not (known and sizes and floats and all(isinstance(t, Tensor) for t in tensors.values())):
        raise damaged(str(name), "a weight in the file", "its description is none that a format has")
    packed = Packed(name, shape, dtype, block_size, double_quant, {n: t.contiguous() for n, t in tensors.items()})
    FORMATS[name].validate(packed, "a weight in the file")
    return _as_parameter(QuantizedTensor(packed, turned, read_as), is_parameter)


torch.serialization.add_safe_globals([_load])  # for torch.load as it is: it runs no other code from a file


def _map(packed: Packed, f: Callable[[Tensor], Tensor]) -> Packed:
    return replace(packed, tensors={name: f(tensor) for name, tensor in packed.tensors.items()})


# What operators are to a packed weight, where they are not what they are to the dense one; NotImplemented: they are.


def _same(self: QuantizedTensor) -> Any:
    return self.over(self.packed)


def _clone(self: QuantizedTensor, **kwargs: Any) -> Any:
    return self.over(_map(self.packed, torch.clone))


def _to_copy(self: QuantizedTensor, *, dtype: torch.dtype | None = None, device: Any = None, **kwargs: Any) -> Any:
    if dtype is not None and not dtype.is_floating_point:
        return NotImplemented
    return self.over(self.packed if device is None else _map(self.packed, lambda t: t.to(device)), dtype=dtype)


def _turn(self: QuantizedTensor, *dims: Any) -> Any:
    """Of ``t``, ``transpose`` and ``permute``: the last two dimensions are swapped, and no others."""
    last = self.dim() - 2, self.dim() - 1
    if dims and isinstance(dims[0], (list, tuple)):
        swaps = [dim % self.dim() for dim in dims[0]] == [*range(self.dim() - 2), last[1], last[0]]
    else:
        swaps = not dims or {dim % self.dim() for dim in dims} == set(last)
    return self.over(self.packed, turned=not self.turned) if swaps else NotImplemented


def _reads(x: Tensor, weight: Tensor) -> bool:
    """Whether a product of these is one with a packed weight as its format reads it."""
    ours = isinstance(weight, QuantizedTensor) and weight.dtype == weight.packed.dtype
    return ours and not isinstance(x, QuantizedTensor) and x.dtype == weight.dtype


def _mm(x: Tensor, weight: Any) -> Any:
    if not _reads(x, weight):
        return NotImplemented
    what = describe(weight.packed)
    return packed_linear(x, None, *what) if weight.turned else packed_mm(x, *what)


def _addmm(bias: Tensor, x: Tensor, weight: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    if not _reads(x, weight) or not weight.turned or not beta == alpha == 1 or bias.shape != weight.shape[1:]:
        return NotImplemented
    return packed_linear(x, bias, *describe(weight.packed))


def _equal(one: Any, other: Any) -> Any:
    if not isinstance(one, QuantizedTensor) or not one.is_like(other):
        return NotImplemented
    pairs = zip(one.packed.tensors.values(), other.packed.tensors.values(), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


def _copy(self: Any, source: Any, non_blocking: bool = False) -> Any:
    if not isinstance(self, QuantizedTensor) or not self.is_like(source):
        return NotImplemented
    for name, tensor in self.packed.tensors.items():
        tensor.copy_(source.packed.tensors[name], non_blocking)
    return self


_OWN: Mapping[Any, Callable[..., Any]] = {
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.clone.default: _clone,
    aten._to_copy.default: _to_copy,
    aten.t.default: _turn,
    aten.transpose.int: _turn,
    aten.permute.default: _turn,
    aten.mm.default: _mm,
    aten.addmm.default: _addmm,
    aten.equal.default: _equal,
    aten.copy_.default: _copy,
}
