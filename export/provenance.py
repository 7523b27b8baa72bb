"""Where an export comes from, without saying where it was made: versions, settings, digests."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lorafx.export.weights import Stored
from lorafx.graph import CapturedModule, get_path
from lorafx.ir import Adapter, active_adapters, adapters

#: What PEFT notes in a config about the place that it was made in.
_PLACES = frozenset({"metadata", "auto_mapping", "base_model_name_or_path"})


def provenance(gm: CapturedModule) -> dict[str, Any]:
    """lorafx's version, and of each adapter that is active or merged in place its settings and digest."""
    found = {a.name: a for a in active_adapters(gm)}
    found |= {n: adapters(gm)[n] for n in gm.meta.get("merged", ())}
    return {
        "lorafx": sys.modules["lorafx"].__version__,  # the package, which imports this: it is there by now
        "adapters": {
            name: {
                "specs": [{k: v for k, v in s.to_dict().items() if k not in _PLACES} for s in adapter.specs],
                "sha256": digest(_tensors(gm, adapter)),
            }
            for name, adapter in found.items()
        },
    }


def _tensors(gm: CapturedModule, adapter: Adapter) -> Iterable[tuple[str, Tensor]]:
    """All that an adapter consists of, by names that do not hold its own."""
    for site in adapter.sites:
        for name, tensor in site.tensors(gm).items():
            yield f"{site.name}.{name}", tensor
    for name in (*adapter.trained, *adapter.residual):
        yield name, get_path(gm, adapter.own_name(name))


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of tensors in the order of their names: of each its name, dtype and shape as text, then its bytes."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        for panel in Stored(tensor, tensor.dtype).panels():
            found.update(panel.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
