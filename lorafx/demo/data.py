"""The demo's data: sentences from the standard library's documentation, labelled with their area.

Every Python carries this text, so the demo needs no download. Sources are read with :mod:`ast` and
never imported, since some modules act when imported. A text is the first paragraph of a docstring or,
for the language itself, the first sentence of a paragraph of pydoc's topics.

Texts are told apart by their words, and ordered by a hash of them. So a text that occurs twice is
there once and on one side of a split, a text that two areas share is left out, and the splits depend
neither on the order in which files are found nor on a seed.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lorafx.demo.errors import DemoError

MIN_CHARS, MAX_CHARS = 30, 300
MIN_PER_AREA, MAX_PER_AREA = 100, 600
TEST_SHARE, VALIDATION_SHARE = 0.25, 0.15

# Area -> modules and packages. Those that a Python lacks are passed over: several left the library in
# 3.12 and 3.13. tkinter and idlelib are not used, because distributions package them apart.
MODULES: dict[str, tuple[str, ...]] = {
    "archives": ("tarfile", "zipfile", "gzip", "bz2", "lzma", "zipapp", "_compression"),
    "asyncio": ("asyncio",),
    "concurrency": ("multiprocessing", "concurrent", "threading", "subprocess", "queue", "_threading_local"),
    "debugging": ("pdb", "bdb", "inspect", "traceback", "trace", "dis", "profile", "cProfile", "pstats"),
    "email": ("email", "mailbox", "quopri", "mailcap"),
    "files": ("os", "pathlib", "shutil", "posixpath", "ntpath", "genericpath", "glob", "tempfile", "_pyio"),
    "imports": ("importlib", "pkgutil", "runpy", "zipimport", "modulefinder", "imp", "site", "venv"),
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
LANGUAGE = "language"  # the fifteenth area: pydoc's topics, the language reference
AREAS: tuple[str, ...] = (*MODULES, LANGUAGE)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True, slots=True)
class Passage:
    """One text of 30 to 300 characters; ``label`` indexes :data:`AREAS`."""

    text: str
    label: int


@dataclass(frozen=True, slots=True)
class Corpus:
    """Passages by split. No two passages, of one split or of different splits, have the same words."""

    train: tuple[Passage, ...]
    validation: tuple[Passage, ...]
    test: tuple[Passage, ...]


def load_corpus(library: Path | None = None) -> Corpus:
    """Read and split the texts of all areas.

    Args:
        library: root of a standard library's sources; by default the running Python's.

    Raises:
        DemoError: an area has too few texts, as in a Python installed without its sources.
    """
    root = library or Path(sysconfig.get_path("stdlib"))
    texts: dict[str, Iterable[str]] = {area: _docstrings(root, names) for area, names in MODULES.items()}
    texts[LANGUAGE] = _topics(root / "pydoc_data" / "topics.py")

    train: list[Passage] = []
    validation: list[Passage] = []
    test: list[Passage] = []
    for label, chosen in enumerate(_select(texts).values()):
        if len(chosen) < MIN_PER_AREA:
            raise DemoError(
                f"the demo needs {MIN_PER_AREA} texts about {AREAS[label]!r} and found {len(chosen)} "
                f"in {root}: this Python was installed without (all of) its sources; use one that has them"
            )
        passages = [Passage(text, label) for text in chosen]
        first = round(len(passages) * TEST_SHARE)
        second = first + round(len(passages) * VALIDATION_SHARE)
        test += passages[:first]
        validation += passages[first:second]
        train += passages[second:]
    return Corpus(tuple(train), tuple(validation), tuple(test))


def words(text: str) -> str:
    """What makes two texts the same: their words, without case, digits and punctuation."""
    return " ".join(re.findall(r"[^\W\d_]+", text.casefold()))


def _select(texts: dict[str, Iterable[str]]) -> dict[str, list[str]]:
    """Each area's texts of the right length that no other area has, in the order of their hashes."""
    found: dict[str, dict[str, str]] = defaultdict(dict)  # words -> area -> text
    for area, candidates in texts.items():
        for text in candidates:
            if MIN_CHARS <= len(text) <= MAX_CHARS:
                found[words(text)].setdefault(area, text)
    selected: dict[str, list[str]] = {area: [] for area in texts}
    for key in sorted(found, key=lambda key: hashlib.sha256(key.encode()).digest()):
        (area, text), *others = found[key].items()
        if not others and len(selected[area]) < MAX_PER_AREA:
            selected[area].append(text)
    return selected


def _docstrings(root: Path, names: Iterable[str]) -> Iterator[str]:
    """The first paragraph of every docstring in the named modules and packages."""
    for path in (path for name in names for path in _sources(root, name)):
        for node in ast.walk(ast.parse(path.read_bytes(), filename=str(path))):
            if isinstance(node, DOCUMENTED) and (docstring := ast.get_docstring(node)):
                yield _paragraphs(docstring)[0]


def _topics(path: Path) -> Iterator[str]:
    """The first sentence of every paragraph of prose in pydoc's topics, one literal dictionary."""
    statements = ast.parse(path.read_bytes(), filename=str(path)).body if path.is_file() else []
    for statement in statements:
        if isinstance(statement, ast.Assign):
            topics: dict[str, str] = ast.literal_eval(statement.value)
            topics.pop("debugger", None)  # pdb's manual
            for paragraph in (paragraph for topic in topics.values() for paragraph in _paragraphs(topic)):
                if re.fullmatch(r"[A-Z].*[.:]", paragraph) and "::=" not in paragraph:
                    yield re.split(r"(?<=[.:]) (?=[A-Z])", paragraph, maxsplit=1)[0]


def _sources(root: Path, name: str) -> Iterator[Path]:
    """The files of a module or package, without its tests; none if this Python lacks it."""
    if (root / f"{name}.py").is_file():
        yield root / f"{name}.py"
    for path in sorted((root / name).rglob("*.py")):
        if not {"test", "tests"} & set(path.relative_to(root).parts):
            yield path


def _paragraphs(text: str) -> list[str]:
    return [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)]
