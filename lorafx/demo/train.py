"""Training: a linear probe of the frozen base, which is the baseline and the start, then the adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorafx.demo.batches import Texts

PENALTIES = (1e-4, 3e-4, 1e-3, 3e-3)  # L2 of the probe's weights, chosen on the validation split
BATCH_SIZE = 32
LEARNING_RATE = 3e-3
WARMUP_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Probe:
    """A linear classifier of embeddings: ``weight`` ``[classes, hidden]``, ``bias`` ``[classes]``."""

    weight: Tensor
    bias: Tensor

    def logits(self, embeddings: Tensor) -> Tensor:
        """``[n, classes]`` of ``embeddings`` ``[n, hidden]``."""
        return F.linear(embeddings, self.weight, self.bias)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows of ``logits`` ``[n, classes]`` whose largest entry is the label's."""
    return float((logits.argmax(1) == labels).double().mean())


@torch.no_grad()
def compute(
    function: Callable[..., Tensor],
    width: int,
    texts: Texts,
    advance: Callable[[int], None] = lambda count: None,
) -> Tensor:
    """``[n, width]``: what ``function(input_ids=, attention_mask=)`` gives for each text.

    ``advance`` hears how many texts each batch brought.
    """
    out = torch.empty(len(texts), width)
    for batch in texts.in_order():
        out[batch.rows] = function(**batch.inputs)
        advance(len(batch.rows))
    return out


def fit_probe(train: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor], classes: int) -> Probe:
    """The converged softmax regression on ``(embeddings, labels)`` whose L2 penalty validates best.

    Each penalty's problem is convex, so the result depends on no seed.
    """
    embeddings, labels = validation
    probes = [_softmax_regression(*train, classes, penalty) for penalty in PENALTIES]
    return max(probes, key=lambda probe: accuracy(probe.logits(embeddings), labels))


def _softmax_regression(embeddings: Tensor, labels: Tensor, classes: int, penalty: float) -> Probe:
    weight = torch.zeros(classes, embeddings.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer: torch.optim.Optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=1000, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(embeddings, weight, bias), labels) + penalty * weight.square().sum()
        torch.autograd.backward(loss)
        return loss.item()

    optimizer.step(closure)
    return Probe(weight.detach(), bias.detach())


def make_optimizer(model: nn.Module, rate: float = LEARNING_RATE) -> torch.optim.Optimizer:
    """AdamW over what requires gradients."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)


def fine_tune(
    model: nn.Module,
    texts: Texts,
    steps: int,
    generator: torch.Generator,
    optimizer: torch.optim.Optimizer | None = None,
    penalty: Callable[[], Tensor] | None = None,
) -> Iterator[float]:
    """Train what requires gradients, one batch a step, yielding each step's loss.

    A short warm-up and a linear descent to zero. ``model`` is called as SentenceClassifier is; between steps,
    when the gradients of the last one are still there, it may be put in eval mode. ``penalty`` is added to
    the loss that is trained, not to the one yielded.
    """
    optimizer = make_optimizer(model) if optimizer is None else optimizer
    warmup = max(1, round(steps * WARMUP_SHARE))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    batches = texts.shuffled(BATCH_SIZE, generator)
    for _ in range(steps):
        batch = next(batches)
        model.train()
        loss = F.cross_entropy(model(**batch.inputs)["logits"], batch.labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss if penalty is None else loss + penalty())
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()
        schedule.step()
        yield loss.item()
    model.eval()
