"""The module a graph was captured from, without its tensors: code that can be traced in another way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from lorafx.graph import CapturedModule

_STORES = ("_parameters", "_buffers")


class Original:
    """A module's classes, settings and structure. It holds no tensor, and so keeps none in memory.

    A pickle of it is empty: it would hold the user's own code, which need not be there where it is read.
    ``module`` has None in the stead of every tensor; after a pickle it is None itself.
    """

    def __init__(self, module: nn.Module | None) -> None:
        self.module = None if module is None else _bare(module)

    def names(self) -> Iterator[tuple[str, str, str]]:
        """Where tensors are: the path of the module, its attribute that stores them, the name there."""
        assert self.module is not None
        for path, module in self.module.named_modules(remove_duplicate=False):
            for store in _STORES:
                for name in getattr(module, store):
                    yield path, store, name

    def filled(self, gm: CapturedModule) -> nn.Module:
        """A module with the tensors (the same objects) of ``gm``, a graph of it without adapters."""
        assert self.module is not None
        module = _bare(self.module)
        for path, store, name in self.names():
            getattr(module.get_submodule(path), store)[name] = getattr(gm.get_submodule(path), store)[name]
        return module

    def __reduce__(self) -> tuple[Any, ...]:
        return Original, (None,)


def _bare(module: nn.Module) -> nn.Module:
    """Shallow copies of all modules of a tree without their tensors; one that is in two places stays one."""
    copies: dict[int, nn.Module] = {}

    def visit(source: nn.Module) -> nn.Module:
        if id(source) not in copies:
            target = copies[id(source)] = object.__new__(type(source))
            vars(target).update(vars(source))  # copy.copy refuses parametrized modules
            for store in _STORES:
                setattr(target, store, dict.fromkeys(getattr(source, store)))
            target._modules = {n: None if c is None else visit(c) for n, c in source._modules.items()}
        return copies[id(source)]

    return visit(module)
