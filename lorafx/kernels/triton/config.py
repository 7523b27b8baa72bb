"""How a kernel is tiled: defaults from the shape alone, and on request the fastest of a few, measured once a class.

No table of devices: a default is the largest tile that the shape fills and the device's shared memory holds. With
``LORAFX_AUTOTUNE=1`` the first call of each shape class times the candidates and keeps the fastest; M counts to the
next power of two. Which tile is used decides the order of summation, so tuning is off unless it is asked for, and
under ``torch.use_deterministic_algorithms`` it is off in any case.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import triton
from triton.runtime.errors import OutOfResources

from lorafx.kernels.triton.device import Device
from lorafx.kernels.triton.tiles import MAX_ADDED_RANKS, MIN_RANKS, interpreted, rank_block

T = TypeVar("T")


@dataclass(frozen=True)
class Config:
    """A tiling: ``rows`` and ``columns`` of the output, ``depth`` of a step of the sum, warps, stages of the pipeline.

    ``library``: the large product is the vendor's GEMM, and the kernel only adds the rest to it.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    library: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """What the launch takes beside the block sizes."""
        return {"num_warps": self.warps, "num_stages": self.stages}


def gemm_configs(
    m: int, n: int, itemsize: int, device: Device, aligned: bool, fused: bool, packed: bool = False
) -> list[Config]:
    """For a product ``[m, n]`` of two large matrices, of which one may be ``packed``: first the default.

    The default is fused with that product, or after the library's; then comes what else is worth timing.
    """
    depth = 128 // itemsize  # 128 bytes a row: one line of the cache
    if packed:  # a value takes more registers until it is one
        depth = 32 if aligned else 16
    if not aligned and packed:
        found = [Config(32, 32, depth, 4, 2)]
    elif not aligned:  # elements are loaded one by one, each with an address in a register
        found = [Config(64, 64, 16 if itemsize == 4 else 32, 4, 2), Config(32, 64, 32, 4, 2)]
    else:
        if m <= 64 and packed:
            tiles = [(32, 64, 8), (64, 64, 8), (16, 64, 4)]
        elif m <= 64:
            tiles = [(32, 64, 4), (16, 128, 4), (64, 64, 8), (16, 64, 4)]
        elif itemsize == 4 or n <= 64:  # a product of float32 is several of TF32, and takes more registers
            tiles = [(64, 64, 8), (128, 64, 8), (64, 32, 4)]
        elif packed:  # many rows, so that a value is computed less often
            tiles = [(128, 64, 8), (64, 64, 8)] if device.amd else [(128, 128, 8), (256, 64, 8), (128, 64, 8)]
        else:
            tiles = [(128, 128, 8), (128, 64, 4), (64, 128, 4), (128, 256, 8), (64, 64, 4)]
        found = [
            Config(rows, columns, depth, warps, _stages(depth * (rows + columns) * itemsize, device))
            for rows, columns, warps in tiles
        ]
    library = replace(found[0], library=True)
    return [*found, library] if fused else [library, *found]


def skinny_configs(rows: int, itemsize: int, ranks: int, device: Device, aligned: bool, masks: int = 0) -> list[Config]:
    """For :mod:`down`: many rows, few columns, a long sum; ``masks`` of the pieces drop elements."""
    warps = 4 if ranks <= 64 or device.amd else 8
    if not aligned:  # as above, and an accumulator for each piece of the ranks; on AMD a mask is two scalar registers
        depth = 32 if ranks * itemsize <= (32 if device.amd else 128) else 16
        return [Config(h, ranks, depth, warps, 2) for h in ((32, 16) if ranks <= 32 else (16,))]
    depth = 128 // itemsize if ranks <= 64 else 32
    if device.amd and ranks > 32:  # the masks again
        depth = min(depth, 32) if ranks <= 64 else 16
    heights = [16, 32] if rows <= 256 else [64, 32] if ranks <= 64 or itemsize == 2 else [32, 16]
    if masks > 1 and ranks > 48 and not device.amd:
        heights = [32, 16]
        if itemsize == 4 and ranks > 64:
            depth = 16
    if ranks > 64 and device.amd:
        heights = [32] if ranks <= 128 else [16]
    return [Config(h, ranks, depth, warps, _stages(depth * (h + ranks) * itemsize, device)) for h in heights]


def stream_configs(
    columns: int, itemsize: int, ranks: int, device: Device, aligned: bool, even: bool = True
) -> list[Config]:
    """For sums over M of a large matrix times ``ranks`` columns: blocks of ``depth`` rows of it are streamed.

    ``aligned`` is said of the large matrix, ``even`` of what has the ranks: its elements are else loaded one by one.
    """
    if device.amd and not even:  # each has a mask, of two scalar registers
        ranks = MIN_RANKS
    if not aligned:
        return [Config(ranks, 32, 16, 8 if itemsize == 4 and ranks > 64 else 4, 2)]
    narrow = 16 if device.amd else 32  # as many ranks leave registers for wide tiles
    if itemsize == 4:
        tiles = [(128, 16, 8)] if ranks <= narrow and columns > 64 and (even or device.amd) else []
        tiles += [(64, 16, 8)] if ranks <= 128 else []
        tiles += [(32, 16, 8 if ranks > 128 else 4)]
    elif columns > 128 and ranks <= narrow:
        tiles = [(256, 32, 8), (128, 32, 4), (256, 64, 8)] if even or not device.amd else [(256, 16, 8), (128, 16, 4)]
    elif ranks <= 128:
        widest = 64 if device.amd and ranks > 64 else 128
        tiles = [(min(widest, max(64, power_class(columns))), 16, 4 if ranks <= 64 else 8), (64, 16, 4), (64, 32, 4)]
    else:
        tiles = [(64, 16, 8), (64, 16, 4)]
    return [
        Config(ranks, width, depth, warps, _stages(depth * (width + ranks) * itemsize, device))
        for width, depth, warps in tiles
    ]


def norm_configs(r: int, itemsize: int, device: Device, aligned: bool) -> list[Config]:
    """For :mod:`row_norm`: few rows a program, so that all processors have one; W goes through in wide blocks.

    ``depth`` is the block of ranks, ``itemsize`` that of the factors.
    """
    depth = rank_block(r, MAX_ADDED_RANKS)
    if not aligned:
        return [Config(16, 64, depth, 4, 2)]
    stages = 3 if device.shared >= 96 * 1024 else 2
    if r > MAX_ADDED_RANKS:
        return [Config(rows, 64, rank_block(r), 4, stages) for rows in ((16,) if itemsize == 4 else (32, 16))]
    return [Config(rows, columns, depth, 4, stages) for rows, columns in ((32, 128), (16, 128), (32, 64))]


def _stages(bytes_per_stage: int, device: Device) -> int:
    """As many as fit, leaving a third for what the epilogue stages; 2 to 4. On AMD's they pass through registers: 2."""
    return 2 if device.amd else max(2, min(4, (2 * device.shared // 3) // bytes_per_stage))


def power_class(size: int) -> int:
    """``size``, rounded up to a power of two."""
    return 1 << max(size - 1, 0).bit_length()


def splits(tiles: int, steps: int, processors: int) -> int:
    """In how many parts to divide a sum of ``steps`` steps, so that with ``tiles`` outputs every processor has work."""
    return max(1, min(processors // max(tiles, 1), steps))


#: By the key and whether it was to be tuned for.
_CHOSEN: dict[tuple[Hashable, bool], Config] = {}


def choose(key: Hashable, candidates: Sequence[Config], run: Callable[[Config], T]) -> T:
    """``run(config)`` with the configuration for ``key``: the first that fits the device, or the fastest if tuning.

    While a CUDA graph is recorded nothing can be timed: what was tuned before is taken, or else the first that fits.

    Raises:
        OutOfResources: if none of the candidates fits.
    """
    tunes = _tunes()
    known = _CHOSEN.get((key, tunes))
    if known is None and tunes and len(candidates) > 1 and not torch.cuda.is_current_stream_capturing():
        timed = list(_timed(candidates, run))
        if timed:
            known = _CHOSEN[key, True] = min(timed, key=lambda pair: pair[0])[1]
    if known is None:
        known = _CHOSEN.get((key, False))
    if known is not None:
        return run(known)
    for config in candidates[:-1]:
        try:
            result = run(config)
        except OutOfResources:
            continue
        _CHOSEN[key, False] = config
        return result
    return run(candidates[-1])


def _tunes() -> bool:
    """Whether the fastest is asked for: what is to be the same each time cannot depend on times."""
    wanted = os.environ.get("LORAFX_AUTOTUNE") == "1"
    return wanted and not interpreted() and not torch.are_deterministic_algorithms_enabled()


def _timed(candidates: Sequence[Config], run: Callable[[Config], T]) -> Iterator[tuple[float, Config]]:
    for config in candidates:
        try:
            yield triton.testing.do_bench(lambda config=config: run(config), warmup=5, rep=20), config
        except OutOfResources:
            continue
