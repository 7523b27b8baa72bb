"""Tensors that read as dense ones, and their views: what is written to these would not reach what they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from lorafx.errors import QuantizationError

aten = torch.ops.aten


class ReadAsDense(Tensor):
    """Not the tensor that it reads as: an operator that it has no way of its own for is given that one.

    A view of it is one as well, so that whatever is kept of it (by autograd, say) is not dense either. While a graph is
    traced tensors have no values, and what would be written stands in the graph.
    """

    def dequantize(self) -> Tensor:
        """The dense tensor that it reads as."""
        raise NotImplementedError  # abstract: torch's metaclass of tensors is not ABCMeta

    def memory(self, start: int, stop: int) -> tuple[Tensor, int]:
        """``[n]``: what of the dense tensor's memory has the elements ``start`` to ``stop``, and where that starts.

        Of all elements unless it knows better, for a tensor that is contiguous.
        """
        return self.dequantize().contiguous().view(-1), 0

    @property
    def origin(self) -> str:
        """What it is a part of, for messages."""
        raise NotImplementedError  # abstract: torch's metaclass of tensors is not ABCMeta

    def view_by(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """What an operator that returns a view of a tensor, or several, returns of this one."""
        return _views(self, self, func, *args, **kwargs)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # torch's stub: a method

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub lacks func
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in _written(func, args, kwargs):
            raise unwritable(str(func), tensor.origin)
        if _makes_views(func) and isinstance(args[0], ReadAsDense):
            return args[0].view_by(func, *args[1:], **kwargs)
        dense_args, dense_kwargs = tree_map_only(
            ReadAsDense, lambda tensor: tensor.dequantize(), (tuple(args), dict(kwargs))
        )
        return func(*dense_args, **dense_kwargs)


class Derived(ReadAsDense):
    """What is computed of others whenever it is read.

    Whoever asks for it by its address gets memory that is there as long as it is; a file or a copy of it is dense.
    """

    @cached_property
    def dense(self) -> Tensor:
        """The dense tensor, kept."""
        return self.dequantize()

    def data_ptr(self) -> int:
        return self.dense.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.dense.untyped_storage()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dequantize().clone().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]  # torch gives it no types

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.dequantize().clone()


class View(Derived):
    """Of the memory of ``base`` what ``like``, a tensor without values, has of its own: dense while it is read.

    Only what lies between its first and its last element is.
    """

    base: ReadAsDense

    @staticmethod
    def __new__(cls, base: ReadAsDense, like: Tensor) -> View:
        made: View = Tensor._make_wrapper_subclass(
            cls,
            like.shape,
            strides=like.stride(),
            storage_offset=int(like.storage_offset()),
            dtype=like.dtype,
            device=base.device,
        )
        made.base = base
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch gives it no type
        return repr(self.dequantize())

    def dequantize(self) -> Tensor:
        """The dense view."""
        first = int(self.storage_offset())
        counted = (first, first + self._span()) if self.dtype is self.base.dtype else (0, self.base.numel())
        memory, start = self.base.memory(*counted)
        return memory.view(self.dtype).as_strided(self.shape, self.stride(), first - start)

    def _span(self) -> int:
        """How many elements there are from the first to the last one, what lies between included."""
        steps = ((size - 1) * step for size, step in zip(self.shape, self.stride(), strict=True))
        return sum(steps) + 1 if self.numel() else 0

    @property
    def origin(self) -> str:
        """Of which weight it is a view."""
        return self.base.origin

    def view_by(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Of the same memory."""
        return _views(self.base, self, func, *args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub lacks func
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is aten._to_copy.default and (cast := args[0]._cast(**kwargs or {})) is not None:
            return cast
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _cast(self, **kwargs: Any) -> View | None:
        """The same view of the base in another dtype: autograd is to keep no dense one of what autocast makes."""
        as_copied = self.dtype is self.base.dtype and self._span() == self.numel()  # where a copy has these strides
        if not (as_copied and is_cast_alone(self, kwargs)):
            return None
        base = aten._to_copy.default(self.base, **kwargs)
        if not isinstance(base, ReadAsDense):
            return None
        return View(base, _memory(base).as_strided(self.shape, self.stride(), self.storage_offset()))


def _memory(base: ReadAsDense) -> Tensor:
    """What has as many elements, and no values."""
    return torch.empty(base.numel(), dtype=base.dtype, device="meta")


def _views(base: ReadAsDense, of: ReadAsDense, func: Any, *args: Any, **kwargs: Any) -> Any:
    like = _memory(base).view(of.dtype).as_strided(of.shape, of.stride(), of.storage_offset())
    try:
        found = func(like, *args, **kwargs)
    except RuntimeError:  # this lies transposed in memory, and the weight in its place did not
        if func is not aten.view.default:
            raise
        return of.dequantize().reshape(*args)
    return tree_map_only(Tensor, lambda view: View(base, view), found)


def is_cast_alone(tensor: Tensor, kwargs: Mapping[str, Any]) -> bool:
    """Whether arguments of ``_to_copy`` ask for another floating-point dtype and nothing else."""
    dtype, device, layout = kwargs.get("dtype"), kwargs.get("device"), kwargs.get("memory_format")
    floats = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    return floats and device in (None, tensor.device) and layout in (None, torch.preserve_format)


def _makes_views(func: Any) -> bool:
    return not func._schema.is_mutable and any(found.alias_info is not None for found in func._schema.returns)


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[ReadAsDense]:
    """What an operator is to write to, and what would be lost."""
    if not func._schema.is_mutable:
        return []
    marks = {a.name: a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments}
    given = {**dict(zip(marks, args, strict=False)), **kwargs}
    leaves = [leaf for name, value in given.items() if marks[name] for leaf in tree_leaves(value)]
    return [leaf for leaf in leaves if isinstance(leaf, ReadAsDense)]


def unwritable(what: str, origin: str) -> QuantizationError:
    """For a write that would be lost."""
    return QuantizationError(
        f"{what} would write to {origin}, and packed values cannot be written one by one: change a dense copy "
        "(weight.dequantize()), put it in the weight's place and, to pack it again, call lorafx.quantize. What can be "
        "copied whole (copy_, load_state_dict) is a weight of the same shape that is stored in the same way"
    )
