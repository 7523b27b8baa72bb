"""Where an export comes from, without saying where it was made: versions, settings, digests."""

from __future__ import annotations

import hashlib
import itertools
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from lorafx.export.weights import Stored
from lorafx.graph import CapturedModule, get_path
from lorafx.ir import Adapter, active_adapters, find_adapter
from lorafx.spec import LoraSpec

#: What PEFT notes in a config about the place that it was made in.
_PLACES = frozenset({"metadata", "auto_mapping", "base_model_name_or_path"})


def provenance(gm: CapturedModule, names: Mapping[str, str] | None = None) -> dict[str, Any]:
    """lorafx's version, and of each adapter its settings and digest.

    Args:
        gm: the graph that holds them.
        names: the adapters, by what to call them; None: those that are active or merged in place.
    """
    if names is None:
        names = {name: name for name in (*(a.name for a in active_adapters(gm)), *gm.meta.get("merged", ()))}
    found = {called: find_adapter(gm, name) for called, name in names.items()}
    return origin({called: (adapter.specs, _tensors(gm, adapter)) for called, adapter in found.items()})


def origin(adapters: Mapping[str, tuple[Iterable[LoraSpec], Iterable[tuple[str, Tensor]]]]) -> dict[str, Any]:
    """lorafx's version, and of each adapter, given as its specs and its tensors by name, settings and digest."""
    return {
        "lorafx": sys.modules["lorafx"].__version__,  # the package, which imports this: it is there by now
        "adapters": {
            called: {
                "specs": [{k: v for k, v in s.to_dict().items() if k not in _PLACES} for s in specs],
                "sha256": digest(tensors),
            }
            for called, (specs, tensors) in adapters.items()
        },
    }


def digesting_base(gm: CapturedModule, written: CapturedModule) -> AbstractContextManager[Callable[[], str]]:
    """Take the digest of what ``written`` is of the base of ``gm``, as :func:`digesting`."""
    return digesting(_pieces(_base_weights(gm, written)))


@contextmanager
def digesting(pieces: Iterable[bytes | memoryview]) -> Iterator[Callable[[], str]]:
    """Take the SHA-256 of all pieces in a thread of its own, while the block runs.

    Hashing leaves the interpreter to others, and an export has it busy for longer than that takes. What is given waits
    for the digest, and raises what the thread did. Whoever leaves the block without asking stops it.
    """
    left = threading.Event()
    with ThreadPoolExecutor(1, "lorafx-digest") as threads:
        found = threads.submit(_sha256, itertools.takewhile(lambda _: not left.is_set(), pieces))
        try:
            yield found.result
        finally:
            left.set()


def _base_weights(gm: CapturedModule, written: CapturedModule) -> list[tuple[str, Tensor]]:
    """What a graph reads of the model's state as the base has it, each tensor under the first of its names."""
    saved = gm.state_dict().keys()  # a weight that is kept apart has a name of its own, and is no base's
    names = (str(read.target) for read in written.graph.find_nodes(op="get_attr"))
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in ((name, get_path(gm, name)) for name in names if name in saved):
        found.setdefault(id(tensor), (name, tensor))
    return list(found.values())


def _tensors(gm: CapturedModule, adapter: Adapter) -> Iterable[tuple[str, Tensor]]:
    """All that an adapter consists of, by names that do not hold its own."""
    for site in adapter.sites:
        for name, tensor in site.tensors(gm).items():
            yield f"{site.name}.{name}", tensor
    for name in (*adapter.trained, *adapter.residual):
        yield name, get_path(gm, adapter.own_name(name))


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of tensors in the order of their names: of each its name, dtype and shape as text, then its bytes."""
    return _sha256(_pieces(tensors))


def _sha256(pieces: Iterable[bytes | memoryview]) -> str:
    found = hashlib.sha256()
    for piece in pieces:
        found.update(piece)
    return found.hexdigest()


def _pieces(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[bytes | memoryview]:
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        yield f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode()
        for panel in Stored(tensor, tensor.dtype).panels():
            yield panel.cpu().reshape(-1).view(torch.uint8).numpy().data
