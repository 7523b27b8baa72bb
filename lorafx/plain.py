"""Plain data with tensors in it, as JSON beside tensors: the states of optimizers, schedulers and the like.

JSON has no tuples, and its keys are strings: ``{"betas": (0.9, 0.99), "milestones": {3: 1}}`` would come back as
something else. So they are marked: ``{"dict": {..}}``, ``{"items": [[key, value], ..]}``, ``{"tuple": [..]}``,
``{"counter": [[key, count], ..]}``, ``{"tensor": name}``; lists and numbers are themselves.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from enum import Enum
from typing import Any

from torch import Tensor

from lorafx.errors import AdapterError


def pack(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON data; its tensors are added to ``tensors`` under names that start with ``where``.

    Raises:
        AdapterError: something in it is neither plain data nor a tensor; its place is named.
    """
    if isinstance(value, Tensor):
        name = where if where not in tensors else f"{where} ({len(tensors)})"  # keys may hold dots
        tensors[name] = value
        return {"tensor": name}
    if value is None or (isinstance(value, (bool, int, float, str)) and not isinstance(value, Enum)):
        return value
    if type(value) is Counter:
        return {"counter": [[key, count] for key, count in value.items()]}
    if type(value) in (dict, OrderedDict):
        packed = {key: pack(item, f"{where}.{key}", tensors) for key, item in value.items()}
        if all(isinstance(key, str) for key in packed):
            return {"dict": packed}
        if all(isinstance(key, (int, float, str)) for key in packed):
            return {"items": [[key, item] for key, item in packed.items()]}
    if type(value) in (list, tuple):
        items = [pack(item, f"{where}.{index}", tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    raise AdapterError(
        f"{where} is a {type(value).__name__}, which a checkpoint cannot hold: only None, numbers, strings, lists, "
        "tuples, dicts and tensors, for a pickle of anything else could run any code when it is read"
    )


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of :func:`pack`."""
    if isinstance(packed, list):
        return [unpack(item, tensors) for item in packed]
    if not isinstance(packed, dict):
        return packed
    ((kind, held),) = packed.items()
    if kind == "tensor":
        return tensors[held]
    if kind == "counter":
        return Counter(dict(held))
    if kind == "dict":
        return {key: unpack(item, tensors) for key, item in held.items()}
    items = [unpack(item, tensors) for item in held]
    return tuple(items) if kind == "tuple" else dict(items)
