"""How long `apply`, `set_adapter` and `merge` take beside PEFT's, on a BERT of MiniLM's size (6 layers of 384).

python benchmarks/calls.py

Both sides start from the same model, one after the other, turned around each round; medians. lorafx's `apply` includes
the capture of the graph, which PEFT has none of.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import lorafx

SPEC = {"r": 8, "alpha": 16, "target_modules": ["query", "key", "value", "dense"]}
ROUNDS, QUICK_ROUNDS = 7, 3


def model() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=1000, hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12
    )
    return transformers.BertModel(config, add_pooling_layer=False).eval()


def peft_model(base: nn.Module) -> nn.Module:
    return get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=SPEC["target_modules"]))


def compare(
    name: str, rounds: int, ours: Callable[[], Callable[[], object]], theirs: Callable[[], Callable[[], object]]
) -> dict[str, Any]:
    """Median ms of both, and their ratio. Each gives what is to be timed, prepared anew for each round."""
    taken: dict[str, list[float]] = {"lorafx": [], "peft": []}
    ways = [("lorafx", ours), ("peft", theirs)]
    for number in range(rounds + 1):
        for way, prepare in ways if number % 2 == 0 else reversed(ways):
            run = prepare()
            start = time.perf_counter()
            run()
            if number:  # the first round warms up
                taken[way].append(time.perf_counter() - start)
    a, b = (1e3 * statistics.median(taken[way]) for way in ("lorafx", "peft"))
    print(f"{name:12s} lorafx {a:8.1f} ms   peft {b:8.1f} ms   ratio {a / b:.2f}", flush=True)
    return {"call": name, "lorafx": a, "peft": b, "ratio": a / b}


def measure(rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Of each call."""
    base = model()
    inputs: dict[str, Tensor] = {
        "input_ids": torch.randint(0, 1000, (2, 16)), "attention_mask": torch.ones(2, 16, dtype=torch.int64)
    }  # fmt: skip
    gm = lorafx.apply(base, SPEC, inputs)
    lorafx.add_adapter(gm, SPEC, "other")
    wrapped = peft_model(copy.deepcopy(base))
    wrapped.add_adapter("other", LoraConfig(r=8, lora_alpha=16, target_modules=SPEC["target_modules"]))

    def switch(module: nn.Module, call: Callable[[str], object]) -> Callable[[], object]:
        call("default")
        return lambda: call("other")

    found = [
        compare(
            "apply",
            rounds,
            lambda: lambda: lorafx.apply(base, SPEC, inputs),
            lambda: (lambda mine: lambda: peft_model(mine))(copy.deepcopy(base)),
        ),
        compare(
            "set_adapter",
            rounds,
            lambda: switch(gm, lambda name: lorafx.set_adapter(gm, name)),
            lambda: switch(wrapped, wrapped.set_adapter),
        ),
    ]
    lorafx.set_adapter(gm, "default")
    merged = compare(
        "merge",
        rounds,
        lambda: lambda: lorafx.merge(gm),
        lambda: (lambda mine: mine.merge_and_unload)(peft_model(copy.deepcopy(base))),
    )
    return [*found, merged]


if __name__ == "__main__":
    measure()
