"""What an adapter on a quantized base can be merged into, and how far each merged graph is from the unmerged one.

    python benchmarks/merge_choices.py

A small Llama with random weights in bfloat16, nf4 with double quantization, rank 8 on all linear layers, trained to
repeat a batch; then the batch's loss unmerged and merged, and what ``lorafx.merge_deviation`` finds.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lorafx


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    ids = torch.randint(0, 512, (4, 32))
    batch: dict[str, Any] = {"input_ids": ids, "labels": ids}
    print("| variant | merged into | largest weight | logits | loss |")
    print("|---|---|---:|---:|---:|")
    for variant in ("lora", "dora"):
        gm = lorafx.apply(model, lorafx.LoraSpec(r=8, alpha=16, variant=variant, base="nf4"), batch, seed=options.seed)
        optimizer = torch.optim.AdamW([p for p in gm.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(options.steps):
            optimizer.zero_grad()
            gm(**batch)["loss"].backward()
            optimizer.step()
        gm.eval()
        print(f"| {variant} | unmerged | | | {gm(**batch)['loss'].item():.3f} |")
        choices: dict[str, dict[str, Any]] = {
            'base="dequantized"': {},
            'base="original"': {"base": "original", "original": model},
            "requantize=True": {"requantize": True},
            'base="original", requantize=True': {"base": "original", "original": model, "requantize": True},
        }
        for name, how in choices.items():
            merged = lorafx.merge(gm, **how).eval()
            off, loss = lorafx.merge_deviation(gm, merged), merged(**batch)["loss"].item()
            print(f"| | `{name}` | {off.largest:.2g} | {off.outputs['logits']:.2g} | {loss:.3f} |")


if __name__ == "__main__":
    main()
