"""The providers there are, the one that is liked best first. Those with heavy imports are loaded when asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from types import MappingProxyType

from lorafx.kernels.base import Provider


def _in(module: str, name: str) -> Callable[[], Provider]:
    def make() -> Provider:
        made: Provider = getattr(import_module(f"lorafx.kernels.{module}"), name)()
        return made

    return make


#: Where each provider is, by its name.
PROVIDERS: Mapping[str, Callable[[], Provider]] = MappingProxyType(
    {
        "triton": _in("triton.provider", "TritonProvider"),
        "cpu": _in("cpu.provider", "Cpu"),
        "torch": _in("aten", "Aten"),
    }
)


@cache
def provider(name: str) -> Provider:
    """The provider with this name."""
    return PROVIDERS[name]()
