"""The Triton kernels on a GPU, in one command: python benchmarks/gpu.py [--json results.json]

First correctness: every output and gradient of the provider against float64, over shapes, ranks, dtypes and bases; if
one is wrong nothing is timed. Then forward and backward of a block of four adapted layers, beside the frozen block,
eager PEFT and torch.compile'd PEFT; and with the base in 4 bits, beside PEFT on bitsandbytes' layers. Medians of rounds
that alternate the order, quartiles, and step memory over the weights.
Exits with 0, with 1 if something is wrong, and with 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafx.bases import FORMATS
from lorafx.bases.tensor import QuantizedTensor
from lorafx.kernels.base import Adapters, quantised
from lorafx.kernels.steps import Layer, Upstream
from lorafx.kernels.triton.provider import TritonProvider

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
#: How the frozen weights are stored: as they are, or in 4 bits (QLoRA).
BASES = ("dense", "nf4")
#: max |actual - expected| / max |expected|: operands are rounded to the dtype, s and ds once more.
LIMITS = {"bf16": 3e-2, "fp16": 4e-3, "fp32": 1e-4}


@dataclass(frozen=True)
class Check:
    """One output of the provider at one shape, and how far it is from float64."""

    what: str
    m: int
    k: int
    n: int
    r: int
    dtype: str
    p: float
    error: float
    limit: float
    base: str = "dense"

    @property
    def right(self) -> bool:
        """Whether it is near enough (NaN is not)."""
        return self.error <= self.limit


@dataclass(frozen=True)
class Timing:
    """One method at one shape: milliseconds of forward and backward, and bytes of a step over the weights."""

    method: str
    m: int
    features: int
    r: int
    dtype: str
    p: float
    milliseconds: float
    quartiles: tuple[float, float]
    over_frozen: float
    step_bytes: int
    base: str = "dense"


def check(
    device: torch.device, shapes: Sequence[tuple[int, int, int]], ranks: Sequence[int], dtypes: Sequence[str]
) -> Iterator[Check]:
    """Every output of the provider against float64, for two siblings with dropouts 0.1 and 0, gain and bias."""
    for (m, k, n), r, dtype, base in itertools.product(shapes, ranks, dtypes, BASES):
        for what, actual, expected in _outputs(device, m, k, n, r, DTYPES[dtype], base):
            scale = float(expected.abs().max()) or 1.0
            error = float((actual.double() - expected).abs().max()) / scale
            yield Check(what, m, k, n, r, dtype, 0.1, error, LIMITS[dtype], base)


def _outputs(
    device: torch.device, m: int, k: int, n: int, r: int, dtype: torch.dtype, base_format: str
) -> Iterator[tuple[str, Tensor, Tensor]]:
    from lorafx.kernels.triton.dropout import mask

    provider, generator = TritonProvider(), torch.Generator().manual_seed(m + k + n + r)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    x, seed, dys = normal(m, k), torch.tensor([r], device=device), [normal(m, n) for _ in range(2)]
    rights = [normal(r, k, scale=k**-0.5) for _ in range(2)]
    lefts = [normal(n, r, scale=r**-0.5) for _ in range(2)]
    weights = [normal(n, k, scale=k**-0.5) for _ in range(2)]
    frozen = weights
    if base_format == "nf4":
        quantized = [FORMATS["nf4"].quantize(weight) for weight in weights]
        frozen, weights = [QuantizedTensor(p) for p in quantized], [FORMATS["nf4"].dequantize(p) for p in quantized]
    biases, gains = [normal(n) for _ in range(2)], [1 + normal(n) for _ in range(2)]
    adapters = Adapters((1, 1), (r, r), (0.1, 0.0), (2.0, 0.5))
    parts = zip(frozen, biases, gains, lefts, strict=True)
    layers = [Layer(w, b, g, [left], slice(i, i + 1)) for i, (w, b, g, left) in enumerate(parts)]
    factor = mask(seed, 0, 0.1, (m, k)).double() / (1 - quantised(0.1))
    dropped = [x.double() * factor, x.double()]
    s, kept = provider.down(x, rights, adapters, seed)
    yield "s", s, torch.cat([d @ right.double().mT for d, right in zip(dropped, rights, strict=True)], 1)
    ys = provider.up(x, s, layers, adapters)
    upstream = [Upstream(dy, y, True) for dy, y in zip(dys, ys, strict=True)]
    ds, ups = provider.grad_up(upstream, s, layers, adapters)
    exact_dx = torch.zeros(m, k, dtype=torch.float64, device=device)
    bases = []
    for i, (dy, y, up) in enumerate(zip(dys, ys, ups, strict=True)):
        assert up is not None
        assert up.total is not None
        assert up.dot is not None
        scale, mine = adapters.scales[i], s[:, adapters.columns[i]].double()
        gain, left, weight = gains[i].double(), lefts[i], weights[i].double()
        base = gain * (x.double() @ weight.mT) + biases[i].double()
        yield f"y{i}", y, base + scale * mine @ left.double().mT
        yield f"ds{i}", ds[:, adapters.columns[i]], scale * dy.double() @ left.double()
        yield f"dleft{i}", up.dlefts[0], scale * dy.double().mT @ mine
        yield f"base{i}", up.base, gain * dy.double()
        yield f"total{i}", up.total, dy.double().sum(0)
        yield f"dot{i}", up.dot, (dy.double() * y.double()).sum(0)
        bases.append(up.base)
        low = ds[:, adapters.columns[i]].double() @ rights[i].double()
        exact_dx += up.base.double() @ weight + (low * factor if i == 0 else low)
    yield "dx", provider.grad_x(bases, frozen, ds, rights, adapters, kept), exact_dx
    for i, dright in enumerate(provider.grad_right(x, ds, rights, adapters, kept)):
        yield f"dright{i}", dright, ds[:, adapters.columns[i]].double().mT @ dropped[i]
    norm = torch.ops.lorafx.row_norm.default(weights[0], rights[0], lefts[0], 2.0)
    change = 2.0 * lefts[0].double() @ rights[0].double()
    yield "row norm", norm, (weights[0].double() + change).norm(dim=1)


class Block(nn.Module):
    """Three siblings and one layer after them, with weights of a transformer's shape."""

    def __init__(self, features: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        options: dict[str, Any] = {"bias": False, "dtype": dtype, "device": device}
        self.q, self.k, self.v, self.out = (nn.Linear(features, features, **options) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Something cheap between the products."""
        found: Tensor = self.out(self.q(x) + self.k(x) * 0.5 + self.v(x))
        return found


def four_bit(block: Block) -> Block:
    """The block on bitsandbytes' layers: NF4 with double quantisation, as QLoRA has it."""
    import bitsandbytes

    made, device = copy.deepcopy(block).cpu(), block.q.weight.device
    for name, layer in [*made.named_children()]:
        weight = layer.weight.detach()
        options = {"quant_type": "nf4", "compress_statistics": True}
        new = bitsandbytes.nn.Linear4bit(*weight.mT.shape, bias=False, compute_dtype=weight.dtype, **options)
        new.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, **options)
        setattr(made, name, new)
    made.is_loaded_in_4bit = True  # by which PEFT knows such models
    return made.to(device)  # which quantises


def methods(
    block: Block, x: Tensor, r: int, p: float, dora: bool, base: str
) -> Mapping[str, Callable[[Tensor], Tensor]]:
    """What is timed, by name: the frozen block (dense), PEFT and lorafx, each eager and compiled.

    With base nf4 PEFT is on bitsandbytes' layers, if that is there, and eager only: a compiler breaks at each of them.
    """
    import peft

    import lorafx

    names = ["q", "k", "v", "out"]
    config = peft.LoraConfig(r=r, lora_alpha=r, lora_dropout=p, target_modules=names, use_dora=dora)
    variant, quantized = "dora" if dora else "lora", "nf4" if base == "nf4" else None
    spec = lorafx.LoraSpec(r=r, alpha=r, dropout=p, target_modules=names, variant=variant, base=quantized)

    def adapted(of: Block) -> Any:
        return peft.get_peft_model(of, config).train()  # type: ignore[arg-type]

    def lowered() -> Any:
        return lorafx.apply(block, spec, (x,), backend="triton").train()

    block.requires_grad_(False)
    found: dict[str, Any] = {"frozen": block, "frozen, compiled": torch.compile(copy.deepcopy(block))}
    if base == "dense":
        found["PEFT"] = adapted(copy.deepcopy(block))
        found["PEFT, compiled"] = torch.compile(adapted(copy.deepcopy(block)))
    elif find_spec("bitsandbytes") is not None:
        found["PEFT, bitsandbytes"] = adapted(four_bit(block))
    return found | {"lorafx": lowered(), "lorafx, compiled": torch.compile(lowered())}


def time_block(
    m: int, features: int, r: int, dtype: str, p: float, base: str, dora: bool, rounds: int, device: torch.device
) -> list[Timing]:
    """Forward and backward of each method, in rounds of shuffled order."""
    block = Block(features, DTYPES[dtype], device)
    x = torch.randn(m, features, device=device, dtype=DTYPES[dtype], requires_grad=True)
    found = methods(block, x, r, p, dora, base)
    upstream = torch.randn_like(x)
    times: dict[str, list[float]] = {name: [] for name in found}
    memory: dict[str, int] = {}
    for name, run in found.items():
        for _ in range(3):  # compiles, and tunes where asked to
            run(x).backward(upstream)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(x).backward(upstream)
        memory[name] = torch.cuda.max_memory_allocated() - before
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(found), len(found)):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            found[name](x).backward(upstream)
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end))
    frozen = statistics.median(times["frozen"])
    return [
        Timing(
            name,
            m,
            features,
            r,
            dtype,
            p,
            middle := statistics.median(t),
            _quartiles(t),
            middle / frozen,
            memory[name],
            base,
        )
        for name, t in times.items()
    ]


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    low, _, high = statistics.quantiles(values, n=4)
    return low, high


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="The Triton kernels on a GPU: correctness, then time and memory.")
    parser.add_argument("--features", nargs="+", type=int, default=[4096, 5120, 8192])
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192])
    parser.add_argument("--ranks", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--dropout", nargs="+", type=float, default=[0.0, 0.1])
    parser.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES), help="how frozen weights are stored")
    parser.add_argument("--dora", action="store_true", help="time DoRA in the stead of LoRA")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--tune", action="store_true", help="time tilings first (LORAFX_AUTOTUNE=1)")
    parser.add_argument("--check-only", action="store_true", help="correctness, and no times")
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error("--rounds: at least 2, for quartiles")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit status."""
    options = parse(arguments)
    reason = TritonProvider().unavailable()
    if reason is not None or not torch.cuda.is_available():
        reason = reason or "there is no CUDA device"
        print(f"benchmarks/gpu.py needs a GPU: {reason}. Nothing was run.", file=sys.stderr)
        return 2
    if options.tune:
        os.environ["LORAFX_AUTOTUNE"] = "1"
    device = torch.device("cuda")
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_properties(device).name,
        "torch": torch.__version__,
        "tuned": options.tune,
        "checks": [],
        "timings": [],
    }
    shapes = [(1, 64, 64), (70, 130, 65), (513, 1000, 777), (4096, 1024, 2048)]
    checks = list(check(device, shapes, [1, 3, 8, 17, 64], list(DTYPES)))
    wrong = [c for c in checks if not c.right]
    print(f"{len(checks) - len(wrong)} of {len(checks)} outputs are right", flush=True)
    for c in wrong:
        print(f"  {c.what}: error {c.error:.2g} > {c.limit:.2g} at M={c.m} k={c.k} n={c.n} r={c.r} {c.dtype} {c.base}")
    results["checks"] = [asdict(c) | {"right": c.right} for c in checks]
    write(options.json, results)
    if wrong:
        return 1
    every = itertools.product(
        options.tokens, options.features, options.ranks, options.dtypes, options.dropout, options.bases
    )
    for m, features, r, dtype, p, base in () if options.check_only else every:
        for t in time_block(m, features, r, dtype, p, base, options.dora, options.rounds, device):
            results["timings"].append(asdict(t))
            shape = f"M={m} k=n={features} r={r} {dtype} p={p} {base}"
            cost = f"{t.milliseconds:.3f} ms, {t.over_frozen:.3f} of frozen, {t.step_bytes / 2**20:.0f} MiB"
            print(f"{t.method:20} {shape}: {cost}", flush=True)
        write(options.json, results)
    return 0


def write(path: Path | None, results: Mapping[str, Any]) -> None:
    """What there is so far, so that a later failure loses none of it."""
    if path is not None:
        new = path.with_name(f"{path.name}.new")
        new.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        new.replace(path)


if __name__ == "__main__":
    sys.exit(main())
