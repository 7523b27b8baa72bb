"""Which part of a model an ONNX graph is the export of, and how the paths of modules go over into its own.

An adapter knows modules by their paths in the whole model. A graph may be a part of that (the encoder's file of an
encoder with a decoder), or hold it inside something else, so that its paths have less or more in front.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable

#: Modules of which a model has several with the same names inside, and which are exported as files of their own.
_SIDE_NAME = r"(?:\w*(?:encoder|decoder)|(?:text|vision|audio|image|speech)_\w+)"
_SIDE = re.compile(rf"(?:.*\.)?{_SIDE_NAME}\.(?:.*\.)?")
_FIRST_SIDE = re.compile(rf"((?:.*?\.)?{_SIDE_NAME})\..*")


class Unmatched(Exception):
    """A tensor of an adapter has no one place in the graph; says why."""


class Absent(Unmatched):
    """A tensor of an adapter has no place in the graph: nothing there has its name, or could hold it."""


def inside(path: str, part: str) -> bool:
    """Whether a module is the part or lies in it."""
    return f"{path}.".startswith(f"{part}.")


def side_of(path: str) -> str | None:
    """The outermost module about another one, itself left aside, that might be exported as a file of its own."""
    found = _FIRST_SIDE.fullmatch(path)
    return None if found is None else found[1]


def refuse_no_part(paths: Collection[str], part: str) -> None:
    """Raise :class:`Unmatched` where none of the modules lies in the part."""
    if any(inside(path, part) for path in paths):
        return
    sides = sorted(side for side in {*map(side_of, paths)} if side is not None)
    there = f"Parts that it has layers in: {listed(sides)}" if sides else "It knows no such parts: leave it out"
    raise Unmatched(f"part '{part}' (part=, --part): the adapter has no layer in a module of this path. {there}")


def align(paths: Collection[str], known: Collection[str], part: str | None = None) -> tuple[str, str]:
    """What to take off the front of paths and what to put there, so that most of them are known.

    Of a graph that is said to be a ``part``, no other module's path is taken off. Of one that is not, a wrapper's is
    (``model.``, ``bert.``), and not a side's (``decoder.``): the graph may be the other one's, with the same names.

    Raises:
        Unmatched: there is more than one way, or it cannot be told whether it is one; or the ``part`` is none.
    """
    if part is not None:
        refuse_no_part(paths, part)
    ways: Counter[tuple[str, str]] = Counter()
    for path in paths:
        ways["", ""] += path in known
        for name in known:
            if name.endswith(f".{path}"):
                ways["", name.removesuffix(path)] += 1
            elif name and path.endswith(f".{name}") and part in (None, path.removesuffix(f".{name}")):
                ways[path.removesuffix(name), ""] += 1
    most = max(ways.values(), default=0)
    best = [way for way, count in ways.items() if count == most]
    if most == 0 or ("", "") in best:
        return "", ""
    if len(best) > 1:
        places = listed(sorted(prefix or strip for strip, prefix in best))
        raise Unmatched(
            f"the graph has these modules in several places ({places}), and it cannot be told which the adapter is "
            "for. If the model was exported as several files, say which part of it this is (part=, --part)"
        )
    strip, prefix = best[0]
    if part is None and _SIDE.fullmatch(strip):
        raise Unmatched(
            f"the graph has these modules without '{strip}', so that it may be the export of another part of the "
            f"model, in which modules have the same names. If it is that of '{strip[:-1]}', say so "
            f"(part='{strip[:-1]}', --part {strip[:-1]})"
        )
    return strip, prefix


def listed(names: Iterable[str]) -> str:
    """The first of them, and how many there are."""
    found = list(names)
    return ", ".join(found[:4]) + (f", ... ({len(found)} in all)" if len(found) > 4 else "")
