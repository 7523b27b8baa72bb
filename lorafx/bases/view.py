"""Tensors that read as dense ones, and their views: what is written to these would not reach what they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from lorafx.errors import QuantizationError


class ReadAsDense(Tensor):
    """Not the tensor that it reads as: an operator that it has no way of its own for is given that one.

    While a graph is traced tensors have no values, and what would be written stands in the graph.
    """

    def dequantize(self) -> Tensor:
        """The dense tensor that it reads as."""
        raise NotImplementedError  # abstract: torch's metaclass of tensors is not ABCMeta

    @property
    def origin(self) -> str:
        """What it is a part of, for messages."""
        raise NotImplementedError  # abstract: torch's metaclass of tensors is not ABCMeta

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # torch's stub: a method

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub lacks func
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in _written(func, args, kwargs):
            raise unwritable(str(func), tensor.origin)
        given = (tuple(args), kwargs)
        origin = next(leaf.origin for leaf in tree_leaves(given) if isinstance(leaf, ReadAsDense))
        dense_args, dense_kwargs = tree_map_only(ReadAsDense, lambda tensor: tensor.dequantize(), given)
        result = func(*dense_args, **dense_kwargs)
        if func._schema.is_mutable or not any(found.alias_info is not None for found in func._schema.returns):
            return result
        return tree_map_only(Tensor, lambda t: DenseView(t, origin) if type(t) is Tensor else t, result)


class DenseView(ReadAsDense):
    """``dense`` as the view that it is in place of: a tensor like any other, until someone writes to it.

    ``origin`` says of which weight.
    """

    dense: Tensor
    _origin: str

    @staticmethod
    def __new__(cls, dense: Tensor, origin: str) -> DenseView:
        made: DenseView = Tensor._make_wrapper_subclass(
            cls,
            dense.shape,
            strides=dense.stride(),
            storage_offset=int(dense.storage_offset()),
            dtype=dense.dtype,
            device=dense.device,
        )
        made.dense, made._origin = dense, origin
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch gives it no type
        return repr(self.dense)

    def dequantize(self) -> Tensor:
        return self.dense

    @property
    def origin(self) -> str:
        return self._origin

    # The memory is that of the dense one, for whoever asks for it by its address.

    def data_ptr(self) -> int:
        return self.dense.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.dense.untyped_storage()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dense.clone().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]  # torch gives it no types

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.dense.clone()


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
