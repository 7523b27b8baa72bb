"""The demo, start to end: read, embed, probe, apply, train, evaluate, export, check, report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
from rich.console import Console
from torch import Tensor

from lorafx.api import apply
from lorafx.demo.batches import Texts
from lorafx.demo.data import AREAS, load_corpus
from lorafx.demo.model import load_model, load_tokenizer
from lorafx.demo.report import Accuracy, DemoResult
from lorafx.demo.train import accuracy, compute, fine_tune, fit_probe
from lorafx.export.export import merge_and_export
from lorafx.progress import Parts
from lorafx.spec import LoraSpec

SPEC = LoraSpec(r=16, alpha=32, target_modules="all-linear", dropout=0.1, modules_to_save=("head",))
VALIDATE_EVERY = 100  # steps
LOSS_WINDOW = 20  # steps that the running loss is the mean of


def run_demo(out_dir: Path, seed: int = 0, steps: int = 200, console: Console | None = None) -> DemoResult:
    """Fine-tune MiniLM to tell which area of the standard library a sentence is about, and export it.

    Writes ``model.onnx`` and ``demo.json`` to ``out_dir`` (made if missing); prints progress and the report.
    ``seed`` sets the adapters' initial values and the order of the batches; the splits do not depend on it.

    Raises:
        DemoError: the weights, transformers or the library's sources are missing.
        ValueError: ``steps`` is below 1.
        ParityError: the exported file is not the trained model's twin.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; training needs at least 1")
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
            note = ""
            for step, loss in enumerate(fine_tune(gm, train, steps, torch.Generator().manual_seed(seed)), 1):
                losses.append(loss)
                if step % VALIDATE_EVERY == 0 or step == steps:
                    gm.eval()
                    validated = accuracy(compute(adapted, classes, validation), validation.labels)
                    note = f", validation {validated:.1%}"
                recent = losses[-LOSS_WINDOW:]
                advance(1, f"loss {sum(recent) / len(recent):.3f}{note}")

        with parts.part("evaluate", total=len(test)) as advance:
            adapted_logits = compute(adapted, classes, test, advance)

        with parts.part("export") as advance:
            export = merge_and_export(gm, path, progress=lambda phase, done: advance(0, phase))

        with parts.part("run ONNX", total=len(test)) as advance:
            exported_logits = compute(_onnx_model(path), classes, test, advance)

    probe_logits = probe.logits(test_x)
    before, after = (logits.argmax(1) == test.labels for logits in (probe_logits, adapted_logits))
    result = DemoResult(
        seed=seed,
        steps=steps,
        areas=AREAS,
        texts={"train": len(train), "validation": len(validation), "test": len(test)},
        trainable=sum(p.numel() for p in gm.parameters() if p.requires_grad),
        parameters=sum(p.numel() for p in gm.parameters()),
        probe=Accuracy(accuracy(probe.logits(validation_x), validation.labels), accuracy(probe_logits, test.labels)),
        adapted=Accuracy(validated, accuracy(adapted_logits, test.labels)),
        exported=Accuracy(None, accuracy(exported_logits, test.labels)),
        gained=int((after & ~before).sum()),
        lost=int((before & ~after).sum()),
        max_difference=float((adapted_logits - exported_logits).abs().max()),
        seconds=parts.seconds,
        export=export,
    )
    result.save(out_dir / "demo.json")
    console.print(result)
    return result


def _onnx_model(path: Path) -> Callable[..., Tensor]:
    """The file in ONNX Runtime, called as the model is: its logits ``[batch, classes]``."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def logits(**inputs: Tensor) -> Tensor:
        [output] = session.run(["logits"], {name: value.numpy() for name, value in inputs.items()})
        return torch.from_numpy(output)

    return logits
