"""Checks of the values that people give.

Each takes where the value stands (``"LoraSpec.r"``) and the value, and returns it in the form in which it is
kept, or raises :class:`~lorafx.errors.SpecError` saying where, what was given and what was expected.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from numbers import Integral, Real
from typing import Any, Generic, TypeVar

import torch

from lorafx.errors import SpecError

V = TypeVar("V")
Check = Callable[[str, Any], V]


class FrozenDict(Mapping[str, V], Generic[V]):
    """A read-only dict in a fixed order, which counts in ``==``: in a pattern the first match wins."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, V]) -> None:
        self._items = dict(items)

    def __getitem__(self, key: str) -> V:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and list(self.items()) == list(other.items())

    def __hash__(self) -> int:
        return hash(tuple(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)


def plain(value: Any) -> Any:
    """``value`` with FrozenDicts as dicts and tuples as lists, all the way down: what JSON has."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def frozen(value: Any) -> Any:
    """The inverse of :func:`plain`."""
    if isinstance(value, Mapping):
        return FrozenDict({key: frozen(item) for key, item in value.items()})
    return tuple(map(frozen, value)) if isinstance(value, (list, tuple)) else value


def did_you_mean(word: str, known: Collection[str]) -> str:
    """``" (did you mean 'alpha'?)"`` with the up to three names nearest to ``word``, else ``""``."""
    near = difflib.get_close_matches(word, list(known), n=3)
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""


def refuse_unknown(where: str, given: Collection[Any], known: Collection[str]) -> None:
    """Raise :class:`SpecError` listing every key of ``given`` that is not in ``known``, with near matches."""
    unknown = [f"{key!r}{did_you_mean(str(key), known)}" for key in given if key not in known]
    if unknown:
        listing = ", ".join(sorted(known)) or "none"
        raise SpecError(f"{where}: unknown key {', '.join(unknown)}; known are {listing}.")


def refusal(where: str, value: object, expected: str) -> SpecError:
    """The error for a value that is not allowed."""
    return SpecError(f"{where}={value!r} is not allowed: {expected}.")


def rank(where: str, value: Any) -> int:
    """An integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 1:
        raise refusal(where, value, "expected an integer of at least 1")
    return int(value)


def alpha(where: str, value: Any) -> float:
    """A finite number above 0; integers stay integers, as PEFT's config has them."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < math.inf:
        raise refusal(where, value, "expected a finite number above 0")
    return int(value) if isinstance(value, Integral) else float(value)


def dropout(where: str, value: Any) -> float:
    """A probability of at least 0 and below 1."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < 1:
        raise refusal(where, value, "expected a probability of at least 0 and below 1")
    return float(value)


def flag(where: str, value: Any) -> bool:
    """True or False, and nothing that merely counts as one."""
    if not isinstance(value, bool):
        raise refusal(where, value, "expected True or False")
    return value


def integer(where: str, value: Any) -> int:
    """An integer of either sign, and no bool."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise refusal(where, value, "expected an integer")
    return int(value)


def count(where: str, value: Any) -> int:
    """An integer of at least 0."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 0:
        raise refusal(where, value, "expected an integer of at least 0")
    return int(value)


def number(where: str, value: Any) -> float:
    """A finite number of either sign, as a float."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(float(value)):
        raise refusal(where, value, "expected a finite number")
    return float(value)


def weight(where: str, value: Any) -> float:
    """A finite number of at least 0."""
    if number(where, value) < 0:
        raise refusal(where, value, "expected a number of at least 0")
    return float(value)


def share(where: str, value: Any) -> float:
    """A number above 0 and below 1."""
    if not 0 < number(where, value) < 1:
        raise refusal(where, value, "expected a number above 0 and below 1")
    return float(value)


def word(where: str, value: Any) -> str:
    """A string that is not empty."""
    if not isinstance(value, str) or not value:
        raise refusal(where, value, "expected a name")
    return value


def mapping(where: str, value: Any) -> FrozenDict[Any]:
    """A mapping with strings for keys."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise refusal(where, value, "expected a mapping with strings for keys")
    return FrozenDict(value)


def one_or_more(check: Check[V]) -> Check[tuple[V, ...]]:
    """One value or a list of them that all pass ``check``, as a tuple."""

    def checked(where: str, value: Any) -> tuple[V, ...]:
        several = isinstance(value, (Sequence, Set)) and not isinstance(value, (str, bytes))
        return tuple(check(where, item) for item in (value if several else (value,)))

    return checked


def optional(check: Check[V]) -> Check[V | None]:
    """None, or what ``check`` lets pass."""
    return lambda where, value: None if value is None else check(where, value)


def one_of(choices: tuple[str, ...]) -> Check[str]:
    """A check that a value is one of these words."""

    def check(where: str, value: Any) -> str:
        if value not in choices:
            expected = f"expected one of {', '.join(map(repr, choices))}"
            raise refusal(where, value, expected + did_you_mean(str(value), choices))
        return str(value)

    return check


def dtype_name(choices: tuple[str, ...]) -> Check[str | None]:
    """The name of one of these dtypes, which may be given as a ``torch.dtype``; or None."""

    def check(where: str, value: Any) -> str | None:
        name = str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
        if name not in (None, *choices):
            expected = f"expected None, or a torch.dtype or its name of {', '.join(map(repr, choices))}"
            raise refusal(where, value, expected + did_you_mean(str(name), choices))
        return None if name is None else str(name)

    return check


def _compiles(where: str, text: str, value: object) -> None:
    try:
        re.compile(text)
    except re.error as error:
        raise refusal(where, value, f"expected a regular expression, and this is none ({error})") from error


def regex(where: str, value: Any) -> str:
    """A regular expression."""
    _compiles(where, word(where, value), value)
    return str(value)


def names(where: str, value: Any) -> tuple[str, ...]:
    """Module names in the order given, each once."""
    if not isinstance(value, (Sequence, Set)) or isinstance(value, (str, bytes)):
        raise refusal(where, value, "expected a list of module names")
    if not all(isinstance(name, str) and name for name in value):
        raise refusal(where, value, "expected every module name to be a non-empty string")
    return tuple(dict.fromkeys(value))


def regex_or_names(where: str, value: Any) -> str | tuple[str, ...]:
    """A regex, or the names sorted: as targets their order means nothing, and PEFT keeps none."""
    if isinstance(value, str):
        _compiles(where, value, value)
        return value
    return tuple(sorted(names(where, value)))


def rows(where: str, value: Any) -> tuple[int, ...]:
    """Numbers of rows in the order given, none twice."""
    if not isinstance(value, (Sequence, Set)) or isinstance(value, (str, bytes)):
        raise refusal(where, value, "expected a list of row numbers")
    found = tuple(count(where, row) for row in value)
    if len(set(found)) < len(found):
        raise refusal(where, value, "a row stands in it twice")
    return found


def token_indices(where: str, value: Any) -> tuple[int, ...] | FrozenDict[tuple[int, ...]]:
    """Rows of the input embedding, or a mapping from names of embeddings to rows of each."""
    if not isinstance(value, Mapping):
        return rows(where, value)
    if not all(isinstance(name, str) and name for name in value):
        raise refusal(where, value, "expected a mapping from names of embeddings to lists of row numbers")
    return FrozenDict({name: rows(f"{where}[{name!r}]", item) for name, item in value.items()}) or ()


def pattern_regex(key: str) -> str:
    """The regex that a pattern's key stands for: PEFT's rule, the whole name or what follows a dot."""
    return rf"(.*\.)?({key})$"


def pattern(check: Check[V]) -> Check[FrozenDict[V]]:
    """A mapping from regexes on site names to values that pass ``check``."""

    def checked(where: str, value: Any) -> FrozenDict[V]:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) and key for key in value):
            raise refusal(where, value, "expected a mapping from regular expressions on site names to values")
        for key in value:
            _compiles(f"{where} key", pattern_regex(key), key)
        return FrozenDict({key: check(f"{where}[{key!r}]", item) for key, item in value.items()})

    return checked


def json_object(keys: Collection[str]) -> Check[FrozenDict[Any]]:
    """A mapping with none but these keys, to values that JSON can hold."""

    def check(where: str, value: Any) -> FrozenDict[Any]:
        if not isinstance(value, Mapping):
            raise refusal(where, value, "expected a mapping")
        refuse_unknown(where, value, keys)
        try:  # Through JSON and back: enums that are strings (PEFT's task types) become their values.
            text = json.dumps(plain(value), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise refusal(where, value, f"expected values that JSON can hold ({error})") from error
        result: FrozenDict[Any] = frozen(json.loads(text))
        return result

    return check


def format_bytes(count: int) -> str:
    """A number of bytes for people: ``86.3 MiB``."""
    if count < 1024:
        return f"{count} bytes"
    size, units = count / 1024, ["KiB", "MiB", "GiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.1f} {units[0]}"
