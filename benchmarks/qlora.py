"""What a 4-bit base costs: a training step over NF4 weights, beside the frozen dense model and bitsandbytes + PEFT.

    python benchmarks/qlora.py                          # time, at 2048 tokens
    python benchmarks/qlora.py --dtype float32          # the same where a processor has no bfloat16 products
    python benchmarks/qlora.py --memory                 # weights and step of a Llama of 0.9 B parameters, 128 tokens

Time is measured as in tax.py, on one Llama layer of width 2048: a step of each model in turn, the order turned around
each round, medians of each round's ratio to the frozen model, with quartiles. Gradients are compared with the
reference's on the same packed weights first. Memory is what a process holds and reaches at its peak, from before the
model is built (but for what building takes, which is over by then), of a process each.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tax
import torch
import transformers
from torch import Tensor, nn

import lorafx
from lorafx.bases.tensor import QuantizedTensor

SPEC: Mapping[str, Any] = {"r": 16, "alpha": 32, "target_modules": "all-linear"}

#: The width of a Llama of a billion parameters.
WIDTH: dict[str, int] = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32}


def llama(layers: int, vocabulary: int, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """As wide as ``WIDTH``, with as many keys as queries."""
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, num_hidden_layers=layers, tie_word_embeddings=False, use_cache=False, **WIDTH
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model: nn.Module = transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.train().requires_grad_(False)


def lorafx_on(model: nn.Module, example: Mapping[str, Tensor], base: str | None, **options: Any) -> nn.Module:
    """Ours; ``base`` None: on the weights as they are."""
    gm = lorafx.apply(model, {**SPEC, "base": base, **options}, dict(example), seed=0)
    tax.randomise(gm)
    return gm.train()


def bitsandbytes_and_peft(model: nn.Module, example: Mapping[str, Tensor]) -> nn.Module:
    """bitsandbytes' layers in the place of linear ones but the head, in its 4-bit form, and PEFT's adapters on them."""
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model

    model = copy.deepcopy(model)
    dtype = next(model.parameters()).dtype
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and not name.endswith("lm_head"):
            weight = bnb.nn.Params4bit(
                module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
            )
            new = bnb.nn.Linear4bit(1, 1, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
            new.in_features, new.out_features = module.in_features, module.out_features
            new.weight = weight
            model.set_submodule(name, new.to("cpu"))
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    model.prepare_inputs_for_generation = None
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=False)
    tax.randomise(wrapped)
    return wrapped.train()


#: Each way to train, from the dense model and an example of its inputs.
WAYS: Mapping[str, Callable[[nn.Module, Mapping[str, Tensor]], nn.Module]] = {
    "lorafx, dense": lambda model, example: lorafx_on(model, example, None),
    "lorafx, nf4": lambda model, example: lorafx_on(model, example, "nf4"),
    "lorafx, nf4, DoRA": lambda model, example: lorafx_on(model, example, "nf4", variant="dora"),
    "lorafx, int8": lambda model, example: lorafx_on(model, example, "int8"),
    "bitsandbytes + PEFT": bitsandbytes_and_peft,
}


def check(step: tax.Step, bound: float) -> None:
    """The gradients of the adapters and of the input are those of the reference on the same packed weights."""
    assert isinstance(step.model, torch.fx.GraphModule)
    step.model.eval()
    found = step.gradients()
    lorafx.lower(step.model, "reference")  # type: ignore[arg-type]
    wanted = step.gradients()
    lorafx.lower(step.model)  # type: ignore[arg-type]
    step.model.train()
    for name, grad in wanted.items():
        off = float((found[name] - grad).float().norm() / grad.float().norm().clamp_min(1e-12))
        if not off < bound:
            raise SystemExit(f"the gradient of {name} is {off:.1e} off the reference's")


def time_steps(ways: list[str], tokens: int, rounds: int, dtype: torch.dtype) -> None:
    model = llama(1, 1000, dtype).model
    example = tax.text(tokens // 256, 256, WIDTH["hidden_size"])
    example["inputs_embeds"] = example["inputs_embeds"].to(dtype)
    with torch.no_grad():
        grad = torch.randn_like(model(**example)[0])
    inputs = {n: v.clone().requires_grad_(v.is_floating_point()) for n, v in example.items()}
    steps = {"frozen": tax.Step(model, inputs, grad), "frozen, again": tax.Step(copy.deepcopy(model), inputs, grad)}
    steps |= {way: tax.Step(WAYS[way](model, example), inputs, grad) for way in ways}
    bound = 6e-2 if dtype == torch.bfloat16 else 1e-4  # of a gradient's norm
    for way in ways:
        if way.startswith("lorafx"):
            check(steps[way], bound)
    threads = torch.get_num_threads()
    print(f"One layer, {tokens} tokens, {threads} threads, {rounds} rounds; over the frozen {dtype} model\n")
    print("| way | ratio | quartiles | ms |\n| --- | ---: | ---: | ---: |")
    for way, found in tax.times(steps, rounds).items():
        print(f"| {way} | {found['ratio']:.3f} | {found['low']:.3f} to {found['high']:.3f} | {found['ms']:.0f} |")


def peak(way: str, layers: int) -> dict[str, int]:
    """Bytes: of the base's adapted weights, of all that is held between steps, and the peak of a step."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)
    example = {"input_ids": torch.arange(128).unsqueeze(0) % 1000}
    llama(1, 100)(input_ids=example["input_ids"] % 100)  # libraries' own memory first
    gc.collect()
    trim(0)
    start = tax._status("VmRSS")
    trained = WAYS[way](llama(layers, 32000), example)
    gc.collect()
    trim(0)
    held = tax._status("VmRSS") - start

    def step() -> None:
        trained(**example)[0].float().logsumexp(-1).sum().backward()
        for p in trained.parameters():
            p.grad = None

    step()
    Path("/proc/self/clear_refs").write_text("5")
    step()
    packed = [p.packed for p in trained.parameters() if isinstance(p, QuantizedTensor)]
    stored = sum(t.nbytes for p in packed for t in p.tensors.values())
    bits = 8 * stored / sum(p.numel for p in packed) if packed else 0.0  # what others pack is not counted
    return {"millibits": round(1000 * bits), "held": held, "peak": tax._status("VmHWM") - start}


def measure_memory(ways: list[str], layers: int) -> None:
    print(f"{layers} layers, 1 x 128 tokens; over lorafx's own bf16 LoRA\n")
    print("| way | bits a weight | held (MiB) | peak (MiB) | ratio of peaks | peak - held (MiB) |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    floor = 0
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for way in ["lorafx, dense", *[w for w in ways if w != "lorafx, dense"]]:
        command = [sys.executable, __file__, "--peak", way, "--layers", str(layers)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        found = json.loads(done.stdout.splitlines()[-1])
        floor = floor or found["peak"]
        held, top = found["held"] / 2**20, found["peak"] / 2**20
        ratio = found["peak"] / floor
        bits = f"{found['millibits'] / 1000:.3f}" if found["millibits"] else ""
        print(f"| {way} | {bits} | {held:.0f} | {top:.0f} | {ratio:.3f} | {top - held:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of what is timed")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--layers", type=int, default=16, help="of the model whose memory is measured")
    parser.add_argument("--peak", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    transformers.logging.set_verbosity_error()
    if given.peak:
        print(json.dumps(peak(given.peak, given.layers)))
    elif given.memory:
        measure_memory(given.way, given.layers)
    else:
        time_steps(given.way, given.tokens, given.rounds, getattr(torch, given.dtype))


if __name__ == "__main__":
    main()
