"""Recipes: how an input is computed again in backward from values that are kept anyway.

A recipe is a short program as text, so that an operator can take it: a JSON list of steps ``[operator, args, kwargs]``,
where ``{"v": i}`` is value ``i``: first the sources, then the result of each step. The last result is the input.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from lorafx.ops import define_op

#: Types that arguments have beside numbers, and their names in a recipe.
_DTYPES = {str(t): t for t in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


class Value(int):
    """The number of a value in a recipe."""


def write_recipe(steps: Sequence[tuple[Any, Any, Any]]) -> str | None:
    """Steps ``(operator, args, kwargs)`` as text, the values among the arguments as :class:`Value`.

    None if an argument is of a type that a recipe cannot hold.
    """
    try:
        return json.dumps([[str(operator), _encode(args), _encode(kwargs)] for operator, args, kwargs in steps])
    except TypeError:
        return None


def _recompute(recipe: str, sources: Sequence[Tensor]) -> Tensor:
    values = list(sources)
    for operator, args, kwargs in _steps(recipe):
        values.append(operator(*_fill(args, values), **_fill(kwargs, values)))
    return values[-1]


#: The value that a recipe computes from its sources: its last step's result. An operator, for what is compiled.
recompute = define_op("recompute", "(str recipe, Tensor[] sources) -> Tensor", _recompute)


@cache
def _steps(recipe: str) -> list[tuple[Callable[..., Tensor], Any, Any]]:
    return [(_operator(name), _decode(args), _decode(kwargs)) for name, args, kwargs in json.loads(recipe)]


def _operator(name: str) -> OpOverload:
    namespace, packet, overload = name.split(".")
    found: OpOverload = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    return found


def _encode(value: Any) -> Any:
    if isinstance(value, Value):
        return {"v": int(value)}
    if isinstance(value, torch.dtype) and str(value) in _DTYPES:
        return {"dtype": str(value)}
    if isinstance(value, (list, tuple)):
        return [_encode(v) for v in value]
    if isinstance(value, dict):
        return {"d": {k: _encode(v) for k, v in value.items()}}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"no recipe can hold a {type(value).__name__}")


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(v) for v in value]
    if isinstance(value, dict):
        if "v" in value:
            return Value(value["v"])
        return _DTYPES[value["dtype"]] if "dtype" in value else {k: _decode(v) for k, v in value["d"].items()}
    return value


def _fill(value: Any, values: Sequence[Tensor]) -> Any:
    if isinstance(value, Value):
        return values[value]
    if isinstance(value, list):
        return [_fill(v, values) for v in value]
    return {k: _fill(v, values) for k, v in value.items()} if isinstance(value, dict) else value
