"""The demo's data: sentences from the standard library's documentation, labelled with their area.

Every Python carries this text, so the demo needs no download. Sources are read with :mod:`ast` and
never imported (some modules act when imported). The language reference comes from pydoc's topics, a
dictionary literal in ``pydoc_data/topics.py``.

A passage is the opening of one docstring: as many of its leading paragraphs as fit. Splits are by
docstring and by content: passages are ordered by a hash of their words, so equal texts are one
passage and fall on one side, whatever the order in which files are found.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

MIN_CHARS, MAX_CHARS = 30, 300
MAX_PER_AREA, MIN_PER_AREA = 600, 60
TEST_SHARE, VALIDATION_SHARE = 0.25, 0.15

# Area -> modules and packages. Those that a Python lacks are passed over: several left the library in
# 3.12 and 3.13. tkinter and idlelib are not used, because distributions package them apart.
AREAS: dict[str, tuple[str, ...]] = {
    "archives": ("tarfile", "zipfile", "gzip", "bz2", "lzma", "zipapp", "_compression"),
    "asyncio": ("asyncio",),
    "concurrency": ("multiprocessing", "concurrent", "threading", "subprocess", "queue", "_threading_local"),
    "debugging": ("pdb", "bdb", "inspect", "traceback", "trace", "dis", "profile", "cProfile", "pstats"),
    "email": ("email", "mailbox", "quopri", "mailcap"),
    "files": ("os", "pathlib", "shutil", "posixpath", "ntpath", "genericpath", "glob", "tempfile", "_pyio"),
    "imports": ("importlib", "pkgutil", "runpy", "zipimport", "modulefinder", "imp", "site", "venv"),
    "language": ("pydoc_data/topics",),
    "logging": ("logging", "warnings"),
    "network": (
        *("socket", "socketserver", "ssl", "ftplib", "imaplib", "nntplib", "poplib", "smtplib", "telnetlib"),
        "ipaddress",
    ),
    "numbers": ("_pydecimal", "fractions", "statistics", "numbers", "random"),
    "testing": ("unittest", "doctest"),
    "types": ("typing", "types", "enum", "abc", "dataclasses", "collections", "functools", "contextlib"),
    "web": ("http", "urllib", "wsgiref", "cgi", "html", "webbrowser", "xmlrpc"),
    "xml": ("xml", "plistlib"),
}


@dataclass(frozen=True, slots=True)
class Passage:
    """One labelled text: ``label`` indexes :attr:`Corpus.areas`, ``source`` is relative to the library's root."""

    text: str
    label: int
    source: str


@dataclass(frozen=True, slots=True)
class Corpus:
    """Passages by split. No two splits share a text, and no two passages differ in case or punctuation only."""

    areas: tuple[str, ...]
    train: tuple[Passage, ...]
    validation: tuple[Passage, ...]
    test: tuple[Passage, ...]


def _docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring; of pydoc's topics, every paragraph of the one dictionary."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if text := ast.get_docstring(node):
                yield getattr(node, "lineno", 1), text


def paragraphs(text):
    return [" ".join(p.split()) for p in re.split(r"\n\s*\n", text)]
