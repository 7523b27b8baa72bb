"""The demo, start to end: read, embed, probe, apply, train, evaluate, export, check, report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
from rich.console import Console
from torch import Tensor

from lorafx.api import apply, merge_and_export
from lorafx.demo.batches import Texts
from lorafx.demo.data import AREAS, load_corpus
from lorafx.demo.model import load_model, load_tokenizer
from lorafx.demo.progress import Parts
from lorafx.demo.report import Accuracy, DemoResult, Example
from lorafx.demo.train import accuracy, compute, fine_tune, fit_probe
from lorafx.ir import sites
from lorafx.spec import LoraSpec

SPEC = LoraSpec(r=16, alpha=32, target_modules="all-linear", modules_to_save=("head",))
VALIDATE_EVERY = 100  # steps
EXAMPLES = 3


def run_demo(out_dir: Path, seed: int = 0, steps: int = 200, console: Console | None = None) -> DemoResult:
    """Fine-tune MiniLM to tell which area of the standard library a sentence is about, and export it.

    Writes ``model.onnx`` and ``demo.json`` to ``out_dir`` (made if missing); prints progress and the report.
    ``seed`` sets the adapters' initial values and the order of the batches; texts and probe do not depend on it.

    Raises:
        DemoError: the weights, transformers or the library's sources are missing.
        ParityError: the exported file is not the trained model's twin.
    """
    console = console or Console()
    out_dir.mkdir(parents=True, exist_ok=True)
    path = out_dir / "model.onnx"
    classes = len(AREAS)
    with Parts(console) as parts:
        with parts.part("read"):
            corpus, tokenizer, model = load_corpus(), load_tokenizer(), load_model(classes)
            splits = [Texts(passages, tokenizer) for passages in (corpus.train, corpus.validation, corpus.test)]
            train, validation, test = splits

        with parts.part("embed", total=sum(map(len, splits))) as advance:
            train_x, validation_x, test_x = (
                compute(model.embed, model.head.in_features, texts, advance) for texts in splits
            )
        with parts.part("probe"):
            probe = fit_probe((train_x, train.labels), (validation_x, validation.labels), classes)

        with parts.part("apply"):
            # The head starts as the probe: what the adapters bring comes on top of the baseline.
            model.head.load_state_dict({"weight": probe.weight, "bias": probe.bias})
            gm = apply(model, SPEC, train.batch(range(4)).inputs, seed=seed)

        def adapted(**inputs: Tensor) -> Tensor:
            logits: Tensor = gm(**inputs)["logits"]
            return logits

        with parts.part("train", total=steps) as advance:
            losses: list[float] = []
            validated = 0.0
            for loss in fine_tune(gm, train, steps, torch.Generator().manual_seed(seed)):
                losses = [*losses[-19:], loss]
                note = f"loss {sum(losses) / len(losses):.3f}"
                advance(1, note)
