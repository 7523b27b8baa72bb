"""Compiles the Triton kernels for devices that are not there, and prints what came out: python benchmarks/aot_table.py

For each part, dtype, alignment, weight and kernel: registers a thread, what spilled, shared memory, the kind of
tensor-core instruction, asynchronous copies. Exits with 1 if a kernel spills, has too much shared memory or no tensor
cores.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Iterator, Sequence
from itertools import product

import torch
from rich.console import Console
from rich.table import Table

from lorafx.kernels.triton.aot import PARTS, Binary, Part, compile_launch, unique
from lorafx.kernels.triton.launches import step

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
COLUMNS = (
    "part",
    "dtype",
    "operands",
    "weight",
    "kernel",
    "tile",
    "registers",
    "spilled",
    "shared KiB",
    "tensor cores",
    "async",
)


#: Block sizes of the frozen weight, 0 where it is dense.
WEIGHTS = {"dense": 0, "nf4": 64}
#: What reads it.
READERS = ("up", "dx", "dequantize")


def binaries(
    part: Part, dtype: torch.dtype, aligned: bool, ranks: Sequence[int], p: float, only: Collection[str] = (),
    block_size: int = 0, dora: bool = True,
) -> Iterator[Binary]:  # fmt: skip
    """The kernels of a step of three siblings at M = 8192, k = n = 4096, or a little less where not aligned.

    Both those after the library's product and those that are fused with it; ``only`` those of these names. With
    ``block_size`` those that then read weights in NF4 (with double quantisation).
    """
    off = 0 if aligned else 1
    shape = (8192 - 3 * off, 4096 - 5 * off, [4096 - 7 * off for _ in ranks])
    options = {"dora": dora, "aligned": aligned, "block_size": block_size}
    ways = [step(part.device, *shape, ranks, dtype, p, fused=f, **options) for f in (False, True)]
    for launch in unique([launch for way in ways for launch in way]):
        if (not only or launch.name in only) and (not block_size or launch.name in READERS):
            yield compile_launch(launch, part)


def row(binary: Binary, dtype: str, aligned: bool, weight: str) -> tuple[str, ...]:
    """One line of the table."""
    launch = binary.launch
    blocks = [
        f"{name.removeprefix('BLOCK_')}{value}"
        for name, value in zip(launch.kernel.arg_names, launch.args, strict=True)
        if name.startswith("BLOCK_") and name not in ("BLOCK_SIZE", "BLOCK_SIZES")
    ]
    tile = f"{' '.join(blocks)}, {launch.options['num_warps']} warps"
    counts = (binary.registers, binary.spilled, binary.shared // 1024)
    cores = (binary.tensor_core or "-", str(binary.asynchronous))
    operands = "aligned" if aligned else "odd"
    return (binary.part.name, dtype, operands, weight, launch.name, tile, *map(str, counts), *cores)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 if a kernel is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "fp16"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[16, 16, 16])
    parser.add_argument("--kernels", nargs="+", default=[], help="these alone, such as grad_up")
    parser.add_argument("--dora", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--markdown", action="store_true", help="print Markdown, not a table for the terminal")
    options = parser.parse_args(arguments)
    rows, bad = [], 0
    for name, dtype, weight, aligned in product(options.parts, options.dtypes, options.weights, (True, False)):
        ranks, block_size = options.ranks, WEIGHTS[weight]
        settings = (options.dropout, options.kernels, block_size, options.dora)
        for binary in binaries(PARTS[name], DTYPES[dtype], aligned, ranks, *settings):
            rows.append(row(binary, dtype, aligned, weight))
            bad += bool(binary.faults)
    if options.markdown:
        for line in (COLUMNS, ["---"] * len(COLUMNS), *rows):
            print("| " + " | ".join(line) + " |")
    else:
        table = Table(*COLUMNS)
        for line in rows:
            table.add_row(*line)
        Console().print(table)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
