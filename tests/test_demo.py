"""The demo, start to end, on a handful of sentences and a few steps: what it does, not how well."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from lorafx.demo import run as demo
from lorafx.demo.data import AREAS, Corpus, load_corpus

pytestmark = pytest.mark.xdist_group("minilm")


def small_corpus() -> Corpus:
    corpus = load_corpus()
    splits = {}
    for name in ("train", "validation", "test"):
        passages = getattr(corpus, name)
        splits[name] = [p for area in range(len(AREAS)) for p in [p for p in passages if p.label == area][:4]]
    return dataclasses.replace(corpus, **splits)


def test_the_demo_trains_exports_checks_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "load_corpus", small_corpus)
    out = io.StringIO()
    result = demo.run_demo(tmp_path, seed=1, steps=3, console=Console(file=out, width=100))
    assert (tmp_path / "model.onnx").is_file()
    saved = json.loads((tmp_path / "demo.json").read_text())
    assert saved["steps"] == 3
    assert saved["export"]["sites"] == 36
    assert 0 < result.max_difference < 1e-3
    assert result.exported.test == result.adapted.test
    shown = out.getvalue()
    for line in ("frozen MiniLM, linear head", "merged and exported", "trainable share", "same numbers", "time"):
        assert line in shown
