"""The demo's texts: what a fair held-out accuracy rests on."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest

from lorafx.demo.data import (
    AREAS,
    LANGUAGE,
    MAX_CHARS,
    MAX_PER_AREA,
    MIN_CHARS,
    MIN_PER_AREA,
    MODULES,
    Corpus,
    load_corpus,
    words,
)
from lorafx.demo.errors import DemoError


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus()


def test_no_two_passages_have_the_same_words(corpus: Corpus) -> None:
    counts = Counter(words(p.text) for p in (*corpus.train, *corpus.validation, *corpus.test))
    assert [text for text, count in counts.items() if count > 1] == []


def test_splits_are_disjoint_by_text(corpus: Corpus) -> None:
    splits = [{p.text for p in split} for split in (corpus.train, corpus.validation, corpus.test)]
    assert all(first.isdisjoint(second) for first, second in itertools.combinations(splits, 2))


def test_reading_twice_gives_the_same_corpus(corpus: Corpus) -> None:
    assert load_corpus() == corpus


def test_lengths(corpus: Corpus) -> None:
    assert all(MIN_CHARS <= len(p.text) <= MAX_CHARS for p in corpus.train + corpus.validation + corpus.test)


def test_every_area_is_in_every_split_in_the_same_proportion(corpus: Corpus) -> None:
    assert len(AREAS) == 15
    train, validation, test = (
        Counter(p.label for p in split) for split in (corpus.train, corpus.validation, corpus.test)
    )
    for label in range(len(AREAS)):
        total = train[label] + validation[label] + test[label]
        assert MIN_PER_AREA <= total <= MAX_PER_AREA, AREAS[label]
        assert train[label] / total == pytest.approx(0.60, abs=0.01)
        assert validation[label] / total == pytest.approx(0.15, abs=0.01)
        assert test[label] / total == pytest.approx(0.25, abs=0.01)


def test_where_a_text_falls_does_not_depend_on_the_order_it_is_found_in(tmp_path: Path) -> None:
    docstrings = _docstrings()
    one = load_corpus(_library(tmp_path / "one", docstrings))
    other = load_corpus(_library(tmp_path / "other", {area: texts[::-1] for area, texts in docstrings.items()}))
    assert one == other
    assert [len(one.train), len(one.validation), len(one.test)] == [15 * 72, 15 * 18, 15 * 30]


def test_a_text_of_two_areas_is_left_out_and_a_repeated_one_is_there_once(tmp_path: Path) -> None:
    docstrings = _docstrings()
    docstrings["email"] += ["Raised when something goes wrong.", "Return the message in one long string."]
    docstrings["xml"] += ["raised WHEN something goes wrong"]
    docstrings["email"] += ["Return THE message, in one long string!"]
    found = load_corpus(_library(tmp_path, docstrings))
    texts = [words(p.text) for p in found.train + found.validation + found.test]
    assert "raised when something goes wrong" not in texts
    assert texts.count("return the message in one long string") == 1


def test_a_library_without_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match=r"needs 100 texts about 'archives' and found 0 .* without .* sources"):
        load_corpus(tmp_path)


def _docstrings() -> dict[str, list[str]]:
    """120 texts for each area; numbers are spelt with letters, since digits do not tell texts apart."""
    letters = str.maketrans("0123456789", "abcdefghij")
    numbers = [str(i).translate(letters) for i in range(120)]
    return {area: [f"What {area} does, in the words of docstring {n}." for n in numbers] for area in AREAS}


def _library(root: Path, docstrings: dict[str, list[str]]) -> Path:
    """A standard library of one module an area, with a function for each docstring."""
    (root / "pydoc_data").mkdir(parents=True)
    for area, (module, *_) in MODULES.items():
        source = "".join(f"def f{i}():\n    {text!r}\n\n" for i, text in enumerate(docstrings[area]))
        (root / f"{module}.py").write_text(source)
    topics = {f"topic {i}": text for i, text in enumerate(docstrings[LANGUAGE])}
    (root / "pydoc_data" / "topics.py").write_text(f"topics = {topics!r}\n")
    return root
