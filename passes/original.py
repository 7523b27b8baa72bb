"""The module a graph was captured from, without its tensors: code that can be traced in another way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lorafx.errors import ExportError
from lorafx.graph import CapturedModule
from lorafx.passes.bitsandbytes import PackedLinear
from lorafx.passes.example import ExampleInputs

_STORES = ("_parameters", "_buffers")


@dataclass(frozen=True)
class Call:
    """What a module was captured with."""

    example_inputs: ExampleInputs = None
    dynamic_shapes: Mapping[str, Any] | None = None

    def inputs(self, dtype: torch.dtype, device: torch.device) -> ExampleInputs:
        """The inputs of the module in another precision, and where it is now."""

        def converted(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.to(device, dtype if value.is_floating_point() else None)

        given = self.example_inputs
        found: ExampleInputs = pytree.tree_map(converted, dict(given) if isinstance(given, Mapping) else given)
        return found


class Original:
    """A module's classes, settings and structure, and how it was called. It keeps no parameter or buffer in memory.

    A pickle of it is empty: it would hold the user's own code, which need not be there where it is read.
    ``module`` has None in the stead of every tensor; after a pickle it is None itself.
    """

    def __init__(self, module: nn.Module | None, call: Call | None = None) -> None:
        self.module = None if module is None else _bare(module)
        self.call = call or Call()

    def names(self) -> Iterator[tuple[str, str, str]]:
        """Where tensors are: the path of the module, its attribute that stores them, the name there."""
        assert self.module is not None
        for path, module in self.module.named_modules(remove_duplicate=False):
            for store in _STORES:
                for name in getattr(module, store):
                    yield path, store, name

    def filled(self, gm: CapturedModule, dtype: torch.dtype | None = None) -> nn.Module:
        """A module with the tensors (the same objects) of ``gm``, a graph of it without adapters.

        With a ``dtype`` it is the module converted to it. Its weights then hold no values, and take no memory. Buffers
        that are computed, not saved, keep float32, as ``from_pretrained(dtype=...)`` has it, and are converted from
        half precision.
        """
        assert self.module is not None
        module = _bare(self.module)
        blank: dict[int, Tensor | None] = {}
        for path, store, name in self.names():
            tensor = getattr(gm.get_submodule(path), store)[name]
            scope = module.get_submodule(path)
            if dtype is not None:
                computed = name in scope._non_persistent_buffers_set
                tensor = blank.setdefault(id(tensor), _converted(tensor, dtype, computed))
            getattr(scope, store)[name] = tensor
        for layer in (m for m in module.modules() if dtype is not None and isinstance(m, PackedLinear)):
            layer.compute_dtype = dtype
        return module

    def __reduce__(self) -> tuple[Any, ...]:
        return Original, (None,)


def original_of(gm: CapturedModule, what: str) -> Original:
    """The code that a graph was captured from, for ``what`` traces it once more.

    Raises:
        ExportError: the graph was in a pickle and no longer has it.
    """
    original = gm.meta.get("original")
    if original is None or original.module is None:
        raise ExportError(
            f"{what} traces the model's own code once more, and this graph does not have it: a pickle leaves it out. "
            "Save the adapter (lorafx.save_adapter), apply the spec to the model again, load the adapter into that "
            "graph and export it"
        )
    assert isinstance(original, Original)
    return original


def _converted(tensor: Tensor | None, dtype: torch.dtype, computed: bool) -> Tensor | None:
    if tensor is None or not tensor.is_floating_point():
        return tensor
    if computed:
        return tensor.to(dtype) if tensor.dtype.itemsize < torch.float32.itemsize else tensor
    return blank_like(tensor, dtype)


def blank_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor (a parameter for one) that nobody reads or writes: its memory is asked for and never touched."""
    blank = torch.empty(tensor.shape, dtype=dtype, device=tensor.device)
    return nn.Parameter(blank, requires_grad=False) if isinstance(tensor, nn.Parameter) else blank


def _bare(module: nn.Module) -> nn.Module:
    """Shallow copies of all modules of a tree without their tensors; one that is in two places stays one."""
    copies: dict[int, nn.Module] = {}

    def visit(source: nn.Module) -> nn.Module:
        if id(source) not in copies:
            target = copies[id(source)] = object.__new__(type(source))
            vars(target).update(vars(source))  # copy.copy refuses parametrized modules
            for name, value in vars(source).items():
                if isinstance(value, MethodType) and value.__self__ is source:  # a forward of its own
                    vars(target)[name] = MethodType(value.__func__, target)
            for store in _STORES:
                setattr(target, store, dict.fromkeys(getattr(source, store)))
            target._modules = {n: None if c is None else visit(c) for n, c in source._modules.items()}
        return copies[id(source)]

    return visit(module)
