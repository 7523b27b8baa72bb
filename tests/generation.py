"""Greedy generation, by transformers and by an exported file with a cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor, nn

from zoo import PAD

#: More than the examples' 11 tokens, generated ones included.
NEW = 12


def prompts(*lengths: int) -> tuple[Tensor, Tensor]:
    """Random prompts padded to the left, and their mask, both int64 ``[len(lengths), max(lengths)]``."""
    longest = max(lengths)
    mask = (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long()
    return torch.randint(3, 90, mask.shape).masked_fill(mask == 0, PAD), mask


def of_torch(model: nn.Module, ids: Tensor, mask: Tensor, new: int = NEW) -> Tensor:
    """The new tokens of transformers' own generation with a cache."""
    options = {"do_sample": False, "use_cache": True, "eos_token_id": None, "pad_token_id": PAD}
    found: Tensor = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, **options)  # type: ignore[operator]
    return found[:, ids.shape[1] :]


def of_file(
    path: Path, ids: Tensor, mask: Tensor, new: int = NEW, chunk: int | None = None, adapter: Path | None = None
) -> Tensor:
    """The new tokens of a file, by nothing but its documented inputs and outputs; the prompt in parts of ``chunk``."""
    options, loaded = ort.RunOptions(), ort.LoraAdapter()
    if adapter is not None:
        loaded.Load(str(adapter))
        options.add_active_adapter(loaded)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs = {i.name: i for i in session.get_inputs()}
    outputs = [o.name for o in session.get_outputs()]
    past = {
        name.replace("past_key_values", "present"): np.zeros((len(ids), i.shape[1], 0, i.shape[3]), np.float32)
        for name, i in inputs.items()
        if name.startswith("past_key_values")
    }
    assert outputs == ["logits", *past]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    step = chunk or ids.shape[1]
    parts = [*zip(ids.split(step, 1), positions.split(step, 1), strict=True)]
    tokens: list[Tensor] = []
    seen = 0
    while len(tokens) < new:
        fed, place = parts.pop(0)
        seen += fed.shape[1]
        present = {name.replace("present", "past_key_values"): value for name, value in past.items()}
        feed = {"input_ids": fed.numpy(), "attention_mask": mask[:, :seen].numpy(), "position_ids": place.numpy()}
        found = dict(zip(outputs, session.run(None, feed | present, options), strict=True))
        past = {name: found[name] for name in past}
        assert all(value.shape[2] == seen for value in past.values())
        if not parts:
            tokens.append(torch.from_numpy(found["logits"][:, -1].argmax(-1))[:, None])
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            parts.append((tokens[-1], place[:, -1:] + 1))
    return torch.cat(tokens, 1)
