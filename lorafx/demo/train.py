"""Training: a linear probe of the frozen base, which is the baseline and the start, then the adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorafx.demo.batches import Texts
from lorafx.demo.model import SentenceClassifier

PENALTIES = (1e-4, 3e-4, 1e-3, 3e-3)  # L2 of the probe's weights, chosen on the validation split
BATCH_SIZE = 32
LEARNING_RATE = 3e-3
WARMUP_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Probe:
    """A linear classifier of embeddings: ``weight`` ``[classes, hidden]``, ``bias`` ``[classes]``."""

    weight: Tensor
    bias: Tensor
    penalty: float

    def accuracy(self, embeddings: Tensor, labels: Tensor) -> float:
        """Share of ``embeddings`` ``[n, hidden]`` that get their label."""
        return accuracy(F.linear(embeddings, self.weight, self.bias), labels)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows of ``logits`` ``[n, classes]`` whose largest entry is the label's."""
    return float((logits.argmax(1) == labels).double().mean())


@torch.no_grad()
def embed(model: SentenceClassifier, texts: Texts, advance: Callable[[int], None]) -> Tensor:
    """Embeddings ``[n, hidden]`` of all texts; ``advance`` hears how many each batch brought."""
    out = torch.empty(len(texts), model.head.in_features)
    for batch in texts.in_order():
        out[batch.rows] = model.embed(**batch.inputs)
        advance(len(batch.rows))
    return out


@torch.no_grad()
def predict(logits_of: Callable[..., Tensor], texts: Texts, classes: int) -> Tensor:
    """Logits ``[n, classes]`` of all texts from ``logits_of(input_ids=, attention_mask=)``."""
    out = torch.empty(len(texts), classes)
    for batch in texts.in_order():
        out[batch.rows] = logits_of(**batch.inputs)
    return out


def fit_probe(
    train: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor], classes: int
) -> Probe:
    """The converged softmax regression on ``(embeddings, labels)`` whose L2 penalty validates best.

    Convex, so L-BFGS from zero finds the one optimum of each penalty, whatever the seed.
    """
    probes = (_softmax_regression(*train, classes, penalty) for penalty in PENALTIES)
    return max(probes, key=lambda probe: probe.accuracy(*validation))


def _softmax_regression(embeddings: Tensor, labels: Tensor, classes: int, penalty: float) -> Probe:
    weight = torch.zeros(classes, embeddings.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=1000, tolerance_grad=1e-5, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(embeddings, weight, bias), labels) + penalty * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return Probe(weight.detach(), bias.detach(), penalty)


def fine_tune(
    model: nn.Module, texts: Texts, steps: int, generator: torch.Generator, after_step: Callable[[int, float], None]
) -> None:
    """Train what requires gradients for ``steps`` batches: AdamW, a short warm-up, then linearly down to zero.

    ``model`` is called as SentenceClassifier is; ``after_step`` hears the number of steps done and the loss.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=0.0)
    warmup = max(1, round(steps * WARMUP_SHARE))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    model.train()
    for step, batch in zip(range(1, steps + 1), texts.shuffled(BATCH_SIZE, generator), strict=False):
        loss = F.cross_entropy(model(**batch.inputs)["logits"], batch.labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        schedule.step()
        after_step(step, loss.item())
    model.eval()
