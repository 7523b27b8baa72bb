"""What ``lorafx.apply`` costs beside the captures it cannot do without.

A Llama of 8 B parameters on the meta device (no weights): ``apply`` over bare ``torch.export`` calls, in
one process, alternating. Without dropout its graph does not depend on the mode and one capture is needed;
with attention dropout, two. Then its own cost a layer from 4 to 64 layers, which should stay flat.
Prints ratios; absolute times say little across machines.

    python benchmarks/apply_time.py [--layers 32] [--rounds 3] [--depths 4,16,32,64]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import transformers
from torch.export import Dim

import lorafx


def llama(layers: int, dropout: float = 0.0) -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        attention_dropout=dropout,
        use_cache=False,
    )
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


def inputs() -> dict[str, torch.Tensor]:
    ids = torch.zeros((2, 16), dtype=torch.long, device="meta")
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):
        call()
    return time.perf_counter() - start


def bare_captures(model: transformers.PreTrainedModel) -> None:
    """What apply cannot do without: one export a mode, labels included as apply includes them."""
    batch = inputs()
    batch["labels"] = torch.zeros_like(batch["input_ids"])
    shapes = {name: {0: Dim.AUTO, 1: Dim.AUTO} for name in batch}
    modes = (True, False) if model.config.attention_dropout else (True,)
    for training in modes:
        model.train(training)
        kwargs = {k: v.clone() for k, v in batch.items()}
        torch.export.export(model, (), kwargs, dynamic_shapes=shapes, strict=False)


def adapted(model: torch.nn.Module) -> None:
    lorafx.apply(model, lorafx.LoraSpec(r=16), inputs())


def compare(layers: int, rounds: int, dropout: float = 0.0) -> tuple[float, float, float]:
    """Medians over rounds: apply / captures, and the seconds a layer of each."""
    model = llama(layers, dropout)
    seconds: dict[str, list[float]] = {"captures": [], "apply": []}
    calls = {"captures": bare_captures, "apply": adapted}
    for index in range(rounds):
        for name in sorted(calls, reverse=index % 2 == 0):
            seconds[name].append(timed(partial(calls[name], model)))
    ratio = statistics.median(a / c for a, c in zip(seconds["apply"], seconds["captures"], strict=True))
    return ratio, statistics.median(seconds["apply"]) / layers, statistics.median(seconds["captures"]) / layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--depths", default="4,16,32,64")
    options = parser.parse_args()
    bare_captures(llama(1))  # imports and caches
    adapted(llama(1))
    for dropout, needed in ((0.0, "one capture"), (0.1, "two captures")):
        ratio, _, _ = compare(options.layers, options.rounds, dropout)
        print(f"apply / {needed}, {options.layers} layers: {ratio:.3f} (goal 1.30)", flush=True)
    found = {}
    for depth in map(int, options.depths.split(",")):
        ratio, *found[depth] = compare(depth, options.rounds)
        print(f"  {depth:3d} layers: apply / one capture {ratio:.3f}", flush=True)
    (apply_first, bare_first), *_, (apply_last, bare_last) = found.values()
    print(f"a layer's time, deepest over shallowest: apply {apply_last / apply_first:.2f}, ", end="")
    print(f"torch.export alone {bare_last / bare_first:.2f}")


if __name__ == "__main__":
    main()
