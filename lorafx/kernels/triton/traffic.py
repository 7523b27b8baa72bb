"""How many bytes each kernel moves and how many FLOPs it does, from the arguments of its launch alone.

``loaded`` and ``stored`` are what the programs ask for: a tile that many programs read counts each time, since only
a cache can make that cheap. ``dram`` counts each byte of each operand once, read or written: what has to cross the
memory bus however large the cache. Partial sums of split sums count as written and read again. The tests hold the
first two to the bytes that the interpreter sees loaded and stored. FLOPs are those of the products, without padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor

from lorafx.bases.nf4 import NESTED_TABLE
from lorafx.kernels.triton.launches import Launch
from lorafx.kernels.triton.tiles import cdiv


@dataclass(frozen=True)
class Traffic:
    """Bytes that programs load and store, bytes that must cross the memory bus, and FLOPs."""

    loaded: int = 0
    stored: int = 0
    dram: int = 0
    flops: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.loaded + other.loaded, self.stored + other.stored, self.dram + other.dram, self.flops + other.flops
        )


@dataclass(frozen=True)
class _Reads:
    """An operand: its bytes, and how many times over programs read all of it (or ask for as many bytes)."""

    bytes: int
    times: float = 1


def total(launches: Iterable[Launch]) -> Traffic:
    """Of all launches together."""
    return sum((traffic(launch) for launch in launches), Traffic())


def traffic(launch: Launch) -> Traffic:
    """What one launch moves and does.

    Raises:
        KeyError: for a kernel that has no model.
    """
    arguments = dict(zip(launch.kernel.arg_names, launch.args, strict=True))
    reads, stored, flops = _MODELS[launch.name](arguments, launch.grid)
    loaded = round(sum(r.bytes * r.times for r in reads))
    return Traffic(loaded, stored, sum(r.bytes for r in reads if r.times) + stored, flops)


Model = tuple[Sequence[_Reads], int, int]


def _down(a: Mapping[str, Any], grid: Sequence[int]) -> Model:
    tiles, parts = grid
    m, k, ranks = a["M"], a["K"], _ranks(a)
    reads = [_Reads(m * k * _size(a["x"])), _Reads(ranks * k * _size(a["right"]), tiles), _seed(a, tiles * parts)]
    return reads, parts * m * ranks * _size(a["out"]), 2 * m * k * ranks


def _up(a: Mapping[str, Any], grid: Sequence[int]) -> Model:
    m, n, k, r = a["M"], a["N"], a["K"], a["R"]
    down, across = cdiv(m, a["BLOCK_M"]), cdiv(n, a["BLOCK_N"])
    y = m * n * _size(a["y"])
    if a["BASE_GIVEN"]:
        base, flops = [_Reads(y)], 0
    else:
        base = [_Reads(m * k * _size(a["x"]), across)]
        steps = down * across * cdiv(k, a["BLOCK_K"])
        base += _weight(a["weight"], n, k, a["BLOCK_SIZE"], a["WHOLE"], a["BLOCK_K"], down, steps)
        flops = 2 * m * n * k
    low = [_Reads(m * r * _size(a["s"]), across), _Reads(n * r * _size(a["left"]), down)]
    unread = a["BASE_GIVEN"] and a["gain"] is None  # the bias is in what is given
    vectors = [_Reads(n * _size(a["gain"]), down), _Reads(n * _size(a["bias"]), 0 if unread else down)]
    return [*base, *low, *vectors], y, flops + 2 * m * n * r


def _grad_up(a: Mapping[str, Any], grid: Sequence[int]) -> Model:
    blocks, strips, parts = grid
    m, n, r = a["M"], a["N"], a["R"]
    reads = [
        _Reads(m * n * _size(a["dy"]), blocks),
        _Reads(m * n * _size(a["y"])),
        _Reads(m * r * _size(a["s"]), strips),
        _Reads(n * r * _size(a["left"]), parts),
        _Reads(n * _size(a["gain"]), parts * blocks),
    ]
    scaled = 0 if a["gain"] is None else m * n * _size(a["base"])
    sums = strips * m * r * _size(a["ds"]) + parts * n * r * _size(a["dleft"])
    vectors = parts * n * (_size(a["total"]) + _size(a["dot"]))
    return reads, sums + scaled + vectors, 4 * m * n * r


def _dx(a: Mapping[str, Any], grid: Sequence[int]) -> Model:
    m, k = a["M"], a["K"]
    down, across = cdiv(m, a["BLOCK_M"]), cdiv(k, a["BLOCK_K"])
    ds, right, dx = a["ds"], a["right"], m * k * _size(a["dx"])
    r = 0 if right is None else right.shape[0]
    if a["BASE_GIVEN"]:
        base, flops = [_Reads(dx)], 0
    else:
        base = [_Reads(m * n * _size(b), across) for b, n in zip(a["bases"], a["widths"], strict=True)]
        for weight, n, block_size, whole in zip(a["weights"], a["widths"], a["BLOCK_SIZES"], a["WHOLE"], strict=True):
            tiles = down * across * cdiv(n, a["BLOCK_N"])
            base += _weight(weight, n, k, block_size, whole, a["BLOCK_K"], down, tiles)
        flops = 2 * m * k * sum(a["widths"])
    low = [_Reads(m * r * _size(ds), across), _Reads(r * k * _size(right), down)]
    columns = 2 if a["seed"] is None else 4
    pieces = _Reads(columns * a["PIECES"] * 4, down * across)
    return [*base, *low, pieces, _seed(a, down * across)], dx, flops + 2 * m * k * r


def _dequantize(a: Mapping[str, Any], grid: Sequence[int]) -> Model:
    n, k = a["STOP"] - a["START"], a["K"]
    reads = _weight(a["weight"], n, k, a["BLOCK_SIZE"], a["WHOLE"], a["BLOCK_K"], 1, prod(grid))
    return reads, n * k * _size(a["values"]), 0


def _weight(
    tensors: Sequence[Tensor], n: int, k: int, block_size: int, whole: bool, columns: int, times: int, tiles: int
) -> list[_Reads]:
    """A frozen weight ``[n, k]`` that is read ``times`` over, in as many ``tiles`` of that many columns."""
    if not block_size:
        return [_Reads(n * k * _size(tensors[0]), times)]
    codes, absmax, *nested = tensors
    scales = times * n * (cdiv(k, min(columns, block_size)) if whole else k)  # that are asked for
    reads = [_Reads(codes.numel(), times if whole else times * n * k / codes.numel())]
    reads.append(_Reads(absmax.numel() * _size(absmax), scales / absmax.numel()))
    if nested:
        reads += [_Reads(t.numel() * 4, scales / t.numel()) for t in (nested[0], NESTED_TABLE)]
        reads.append(_Reads(4, tiles))  # their offset
    return reads


def _dright(a: Mapping[str, Any], grid: Sequence[int]) -> Model:
    strips, parts = grid
    m, k, ranks = a["M"], a["K"], _ranks(a)
    reads = [_Reads(m * k * _size(a["x"])), _Reads(m * ranks * _size(a["ds"]), strips), _seed(a, strips * parts)]
    return reads, parts * ranks * k * _size(a["dright"]), 2 * m * k * ranks


def _reduce(a: Mapping[str, Any], grid: Sequence[int]) -> Model:
    reads = [_Reads(splits * size * 4) for splits, size in zip(a["splits"], a["sizes"], strict=True)]
    return reads, sum(size * _size(out) for size, out in zip(a["sizes"], a["outs"], strict=True)), 0


def _row_norm(a: Mapping[str, Any], grid: Sequence[int]) -> Model:
    n, k, r = a["N"], a["K"], a["R"]
    reads = [
        _Reads(n * k * _size(a["weight"])),
        _Reads(r * k * _size(a["a"]), grid[0]),
        _Reads(n * r * _size(a["b"]), cdiv(k, a["BLOCK_K"])),
        _Reads(n * _size(a["squares"])),
    ]
    return reads, n * _size(a["norm"]), 2 * n * k * r


_MODELS: Mapping[str, Callable[[Mapping[str, Any], Sequence[int]], Model]] = {
    "down": _down, "up": _up, "grad_up": _grad_up, "dx": _dx, "dright": _dright, "reduce": _reduce,
    "row_norm": _row_norm, "dequantize": _dequantize,
}  # fmt: skip


def _size(tensor: Tensor | None) -> int:
    """Bytes of an element; of what is not there, none."""
    return 0 if tensor is None else tensor.element_size()


def _seed(a: Mapping[str, Any], programs: int) -> _Reads:
    return _Reads(_size(a["seed"]), programs)


def _ranks(a: Mapping[str, Any]) -> int:
    return sum(stop - start for start, stop in zip(a["STARTS"], a["STOPS"], strict=True))
