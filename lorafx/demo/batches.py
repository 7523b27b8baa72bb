"""Tokenised texts, and two ways to batch them that both put texts of similar length together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorafx.demo.data import Passage

PAD = 0  # BERT's [PAD]; the mask is what counts


@dataclass(frozen=True, slots=True)
class Batch:
    """int64 tensors: the model's inputs ``[batch, sequence]``, and ``labels`` and ``rows`` ``[batch]``."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    rows: Tensor  # where in the Texts each example is

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the model is called with."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}


class Texts:
    """One split, tokenised: ``ids[i]`` are the token ids of text ``i`` and ``labels[i]`` is its area."""

    def __init__(self, passages: Sequence[Passage], tokenizer: Any) -> None:
        self.ids: list[list[int]] = tokenizer([passage.text for passage in passages])["input_ids"]
        self.labels = torch.tensor([passage.label for passage in passages])

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: Sequence[int]) -> Batch:
        """The given texts, padded to the longest of them."""
        ids = [self.ids[row] for row in rows]
        length = max(map(len, ids))
        input_ids = torch.tensor([one + [PAD] * (length - len(one)) for one in ids])
        attention_mask = torch.tensor([[1] * len(one) + [0] * (length - len(one)) for one in ids])
        index = torch.tensor(rows)
        return Batch(input_ids, attention_mask, self.labels[index], index)

    def in_order(self, size: int = 64) -> Iterator[Batch]:
        """Every text once, shortest first."""
        rows = sorted(range(len(self)), key=lambda row: len(self.ids[row]))
        for start in range(0, len(rows), size):
            yield self.batch(rows[start : start + size])

    def shuffled(self, size: int, generator: torch.Generator) -> Iterator[Batch]:
        """Full batches without end: each epoch draws new ones of texts of similar length, in random order."""
        while True:
            order = torch.randperm(len(self), generator=generator).tolist()
            order.sort(key=lambda row: len(self.ids[row]))  # stable: equal lengths stay shuffled
            # The remainder is left out at a random place, not always among the longest.
            start = int(torch.randint(len(order) % size + 1, (), generator=generator))
            batches = [order[i : i + size] for i in range(start, len(order) - size + 1, size)]
            for index in torch.randperm(len(batches), generator=generator).tolist():
                yield self.batch(batches[index])
