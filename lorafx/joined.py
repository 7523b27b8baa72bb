"""A tensor whose memory is that of several others, one after another, none of which is copied until it is read."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from lorafx.bases.view import ReadAsDense

aten = torch.ops.aten


class JoinedTensor(ReadAsDense):
    """``parts``, of one dtype and contiguous, as one contiguous tensor of ``shape``: a stack of experts, say.

    A view of it is made of those parts only that it reaches, and of one part is that part's own memory.
    """

    parts: tuple[Tensor, ...]

    @staticmethod
    def __new__(cls, parts: Sequence[Tensor], shape: Sequence[int]) -> JoinedTensor:
        made: JoinedTensor = Tensor._make_wrapper_subclass(
            cls,
            tuple(shape),
            strides=torch.empty(tuple(shape), device="meta").stride(),
            dtype=parts[0].dtype,
            device=parts[0].device,
            requires_grad=False,
        )
        made.parts = tuple(parts)
        for number, part in enumerate(parts):
            setattr(made, f"part_{number}", part)  # for torch, which asks for them by names
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch gives it no type
        """Without values."""
        return f"{type(self).__name__}({tuple(self.shape)}, {len(self.parts)} parts, dtype={self.dtype})"

    @property
    def origin(self) -> str:
        """What it is, for messages."""
        return f"a weight {list(self.shape)} that lies in {len(self.parts)} tensors of a checkpoint"

    def dequantize(self) -> Tensor:
        """The tensor in memory of its own."""
        return self.memory(0, self.numel())[0].view(self.shape)

    def memory(self, start: int, stop: int) -> tuple[Tensor, int]:
        """Of the parts that have these elements."""
        if start >= stop:
            return self.parts[0].view(-1)[:0], start
        ends = list(accumulate(part.numel() for part in self.parts))
        first, last = bisect_right(ends, start), bisect_right(ends, stop - 1)
        found = [part.view(-1) for part in self.parts[first : last + 1]]
        return (found[0] if len(found) == 1 else torch.cat(found)), ends[first] - self.parts[first].numel()

    # What torch asks for. Nothing can write to it, so that copies may share its parts.

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return [f"part_{number}" for number in range(len(self.parts))], tuple(self.shape)

    @staticmethod
    def __tensor_unflatten__(
        tensors: Mapping[str, Tensor], context: Any, outer_size: Any = None, outer_stride: Any = None
    ) -> JoinedTensor:
        return JoinedTensor(list(tensors.values()), context)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        found: Tensor = memo.setdefault(id(self), self._again())
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        dense: Tensor = self.dequantize()
        kept = nn.Parameter(dense, requires_grad=False) if isinstance(self, nn.Parameter) else dense
        return kept.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]  # torch gives it no types

    def _again(self) -> Tensor:
        made = JoinedTensor(self.parts, self.shape)
        return nn.Parameter(made, requires_grad=False) if isinstance(self, nn.Parameter) else made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub lacks func
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (aten.detach.default, aten.alias.default) and isinstance(args[0], JoinedTensor):
            return JoinedTensor(args[0].parts, args[0].shape)
        return super().__torch_dispatch__(func, types, args, kwargs)
