"""The demo, start to end: read, embed, probe, apply, train, evaluate, merge, export, check, report."""

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
from lorafx.demo.train import accuracy, embed, fine_tune, fit_probe, predict
from lorafx.ir import sites
from lorafx.spec import LoraSpec

SPEC = LoraSpec(r=16, alpha=32, target_modules="all-linear", modules_to_save=("head",))
VALIDATE_EVERY = 100  # steps


def run_demo(out_dir: Path, seed: int = 0, steps: int = 200, console: Console | None = None) -> DemoResult:
    """Fine-tune MiniLM to tell which area of the standard library a sentence is about, and export it.

    Writes ``model.onnx`` and ``demo.json`` to ``out_dir`` (made if missing), prints progress and the report.
    ``seed`` sets the adapters' initial values and the order of the batches; data and probe do not depend on it.

    Raises:
        DemoError: the weights, transformers or the library's sources are missing.
        ParityError: the exported file is not the trained model's twin.
    """
    console = console or Console()
    out_dir.mkdir(parents=True, exist_ok=True)
    path = out_dir / "model.onnx"
    classes = len(AREAS)
    with Parts(console) as parts:
        with parts("read"):
            corpus, tokenizer, model = load_corpus(), load_tokenizer(), load_model(classes)
            train, validation, test = (
                Texts(split, tokenizer) for split in (corpus.train, corpus.validation, corpus.test)
            )

        with parts("embed", total=len(train) + len(validation) + len(test)) as advance:
            embedded = [(embed(model, texts, advance), texts.labels) for texts in (train, validation, test)]
        with parts("probe"):
            probe = fit_probe(embedded[0], embedded[1], classes)
            probe_logits = probe.logits(embedded[2][0])

        with parts("apply"):
            # The head starts as the probe, so what the adapters bring comes on top of the baseline.
            model.head.load_state_dict({"weight": probe.weight, "bias": probe.bias})
            gm = apply(model, SPEC, train.batch(range(4)).inputs, seed=seed)

        with parts("train", total=steps) as advance:
            losses: list[float] = []
            note = ""

            def after_step(step: int, loss: float) -> None:
                nonlocal note
                losses.append(loss)
                if step % VALIDATE_EVERY == 0 or step == steps:
                    share = accuracy(predict(adapted, validation, classes), validation.labels)
                    note = f", validation {share:.1%}"
                recent = losses[-20:]
                advance(1, f"loss {sum(recent) / len(recent):.3f}{note}")

            def adapted(**inputs: Tensor) -> Tensor:
                logits: Tensor = gm(**inputs)["logits"]
                return logits

            fine_tune(gm, train, steps, torch.Generator().manual_seed(seed), after_step)
