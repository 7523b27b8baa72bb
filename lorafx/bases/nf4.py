"""NF4, 4-bit NormalFloat, with its scales in 8 bits if asked for (QLoRA, arXiv 2305.14314, sections 3.1 and 3.2).

A block's scale is its largest magnitude, ``absmax``; a code is the number of the entry of ``TABLE`` nearest to
``value / absmax``, the lower one for a value halfway. Two codes share a byte, the first in the high bits.

With double quantisation the scales, less their mean ``offset``, are stored in blocks of 256 in the same way: a code is
the number of the entry of ``NESTED_TABLE`` nearest to ``(absmax - offset) / nested_absmax``.

These are bitsandbytes' bytes. For bfloat16 and float16 weights its codes are the same ones; it multiplies by
``1 / absmax``, which for float32 weights moves about one value in twenty million, halfway between two entries, to
the other one. On the CPU it rounds scales to 16 bits before it looks for the nearest entry, and so misses one in 500.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lorafx.bases.base import DTYPES, PANEL_BYTES, Format, Layout, Packed, damaged, loss_of_zeros, scales_damage, take
from lorafx.checks import refusal
from lorafx.errors import QuantizationError

#: Quantiles of the normal distribution, scaled to [-1, 1], with an exact zero (arXiv 2305.14314, appendix E).
TABLE = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
    dtype=torch.float32, device="cpu",
)  # fmt: skip

#: bitsandbytes' block sizes.
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

#: How many scales share one of their own.
NESTED_BLOCK = 256


def _dynamic_table() -> Tensor:
    """The 256 values of the signed dynamic data type (arXiv 1511.04561, section 3): decades, the top ones finer.

    In each, the middles of intervals that divide [0.1, 1] evenly. The ends of those are rounded as float32's fused
    multiply-add rounds them, which is what the tables in files have; ``torch.linspace`` has that on some processors.
    """
    low, high = torch.tensor([0.1, 1.0], dtype=torch.float32, device="cpu")
    values = [0.0, 1.0]
    for decade in range(7):
        count = 2**decade
        step = ((high - low) / count).double()
        edge = torch.arange(count + 1, dtype=torch.float64, device="cpu")
        upward, downward = low.double() + step * edge, high.double() - step * (count - edge)
        edges = torch.where(edge < (count + 1) // 2, upward, downward).float()
        middles = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)).tolist()
        values += middles + [-value for value in middles]
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")


NESTED_TABLE = _dynamic_table()

#: No two neighbours in ``NESTED_TABLE`` are further apart.
NESTED_GAP = 1 / 64

# Both values of a byte, as one number of 8 bytes: one look-up for two values.
_PAIRS = torch.stack([TABLE.repeat_interleave(16), TABLE.repeat(16)], 1).view(torch.int64).flatten()

_MIDPOINTS = ((TABLE[1:] + TABLE[:-1]) / 2).tolist()

_STATE = "weight.quant_state.bitsandbytes__nf4"
_STATE_KEYS = ("quant_type", "blocksize", "dtype", "shape")
_NESTED_KEYS = ("nested_blocksize", "nested_dtype", "nested_offset")


class Nf4(Format):
    """``codes [(numel + 1) // 2]`` uint8, and for each block ``absmax``.

    That is float32, or with double quantisation uint8 with ``nested_absmax`` for each 256 and ``offset []``, both
    float32: 4.127 bits a value at a block size of 64. Blocks run over the ends of rows, and the last one may be short.
    """

    name = "nf4"
    mark = _STATE

    def settings(self, width: int, block_size: int | None, double_quant: bool | None) -> tuple[int, bool]:
        """64 and True unless given (arXiv 2305.14314, section 3.3)."""
        if block_size is not None and block_size not in BLOCK_SIZES:
            raise refusal("block_size", block_size, f"nf4 has {', '.join(map(str, BLOCK_SIZES))}")
        return block_size or 64, True if double_quant is None else double_quant

    def layout(self, shape: tuple[int, ...], block_size: int, double_quant: bool) -> Layout:
        """See the class."""
        numel = torch.Size(shape).numel()
        blocks = -(-numel // block_size)
        codes = ((numel + 1) // 2,), torch.uint8
        if not double_quant:
            return {"codes": codes, "absmax": ((blocks,), torch.float32)}
        nested = (-(-blocks // NESTED_BLOCK),), torch.float32
        return {
            "codes": codes,
            "absmax": ((blocks,), torch.uint8),
            "nested_absmax": nested,
            "offset": ((), torch.float32),
        }

    def pack(self, weight: Tensor, block_size: int, double_quant: bool) -> dict[str, Tensor]:
        """See the module."""
        flat = weight.reshape(-1)
        codes = torch.empty((len(flat) + 1) // 2, dtype=torch.uint8, device=weight.device)
        absmax = torch.empty(-(-len(flat) // block_size), dtype=torch.float32, device=weight.device)
        step = PANEL_BYTES // 4  # a multiple of every block size
        for start in range(0, len(flat), step):
            found, scales = _pack_panel(flat[start : start + step], block_size)
            part = codes[start // 2 : (start + step) // 2]
            part.copy_(found[: len(part)])
            absmax[start // block_size : (start + step) // block_size] = scales
        if not double_quant:
            return {"codes": codes, "absmax": absmax}
        offset = absmax.mean()
        blocks = pad(absmax - offset, (0, -len(absmax) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
        nested_absmax = blocks.abs().amax(1)
        table = NESTED_TABLE.to(weight.device)
        nearest = torch.bucketize(_normalized(blocks, nested_absmax), (table[1:] + table[:-1]) / 2)
        nested = nearest.flatten()[: len(absmax)].to(torch.uint8)
        return {"codes": codes, "absmax": nested, "nested_absmax": nested_absmax, "offset": offset}

    def rows(self, packed: Packed, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """See :meth:`Format.rows`."""
        size, first, last = packed.block_size, start * packed.width, stop * packed.width
        low, high = first // size, -(-last // size)  # the blocks that have values of these rows
        begin, end = low * size, min(high * size, packed.numel)
        codes = packed.tensors["codes"][begin // 2 : (end + 1) // 2]
        values = _PAIRS.to(codes.device).index_select(0, codes.int()).view(torch.float32)
        scales = self.scales(packed, low, high)
        full = (end - begin) // size
        values[: full * size].view(full, size).mul_(scales[:full].unsqueeze(1))
        if full < len(scales):
            values[full * size :].mul_(scales[-1])
        return values[first - begin : last - begin].view(stop - start, packed.width).to(dtype or packed.dtype)

    def scales(self, packed: Packed, low: int = 0, high: int | None = None) -> Tensor:
        """The scales of blocks ``low`` to ``high`` in float32, whether stored so or quantised.

        Quantised ones are ``NESTED_TABLE[absmax] * nested_absmax + offset``, each step rounded to float32.
        """
        tensors, absmax = packed.tensors, packed.tensors["absmax"][low:high]
        if not packed.double_quant:
            return absmax
        table = NESTED_TABLE.to(absmax.device)
        return _unnested(absmax, table, tensors["nested_absmax"], NESTED_BLOCK, tensors["offset"], low)

    def largest_loss(self, packed: Packed) -> float:
        """See :meth:`Format.largest_loss`; 0.34 in blocks of 64, of which normal values lose 0.09."""
        return loss_of_zeros(packed.block_size, max(abs(m) for m in _MIDPOINTS[6:8]))

    def damage(self, packed: Packed) -> str | None:
        """Scales that are none, or that values of the weight's dtype cannot have."""
        tensors, largest = packed.tensors, torch.finfo(packed.dtype).max
        if not packed.double_quant:
            return scales_damage("absmax", tensors["absmax"], largest)
        if found := scales_damage("offset", tensors["offset"]):
            return found
        if found := scales_damage("nested_absmax", tensors["nested_absmax"]):
            return found
        # A block of next to zeros may have come out below zero, by what rounding its scale to the table loses.
        scales = self.scales(packed)
        lost = (tensors["nested_absmax"] * NESTED_GAP).repeat_interleave(NESTED_BLOCK)[: len(scales)]
        scales = scales.where(scales < -lost, scales.clamp_min(0))
        return scales_damage("absmax, with nested_absmax and offset,", scales, largest)

    def state_dict(self, packed: Packed) -> dict[str, Tensor]:
        """bitsandbytes': the codes as a column, scales, tables, and a JSON text with what is no tensor."""
        tensors = packed.tensors
        dtype = str(packed.dtype).removeprefix("torch.")
        state: dict[str, Any] = dict(
            zip(_STATE_KEYS, ("nf4", packed.block_size, dtype, list(packed.shape)), strict=True)
        )
        # Tables are copies: safetensors refuses tensors that share memory.
        device = tensors["codes"].device
        found = {
            "weight": tensors["codes"].view(-1, 1),
            "weight.absmax": tensors["absmax"],
            "weight.quant_map": TABLE.to(device, copy=True),
        }
        if packed.double_quant:
            found["weight.nested_absmax"] = tensors["nested_absmax"]
            found["weight.nested_quant_map"] = NESTED_TABLE.to(device, copy=True)
            state |= zip(_NESTED_KEYS, (NESTED_BLOCK, "float32", float(tensors["offset"])), strict=True)
        found[_STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        return found

    def from_state_dict(self, tensors: Mapping[str, Tensor], prefix: str = "") -> Packed:
        """See :meth:`Format.from_state_dict`.

        Codes that FSDP made another dtype's (``quant_storage``) are viewed as bytes. Scales that were quantised with
        another table than ``NESTED_TABLE`` (bitsandbytes before 0.50 changed its first entry on the CPU), or in other
        blocks than of 256, come back as float32: the same weight.
        """
        where = prefix.rstrip(".") or "the weight"

        def get(key: str) -> Tensor:
            return take(tensors, prefix, self.name, key)

        if f"{prefix}{_STATE}" not in tensors and f"{prefix}{_STATE[:-3]}fp4" in tensors:
            raise damaged(self.name, where, "it is stored as fp4, another format")
        state = _read_state(get(_STATE), where)
        nested = "nested_blocksize" in state
        expected = {"weight", "weight.absmax", "weight.quant_map", _STATE}
        expected |= {"weight.nested_absmax", "weight.nested_quant_map"} if nested else set()
        stray = {k[len(prefix) :] for k in tensors if k.startswith(f"{prefix}weight.")} - expected
        if stray:
            raise damaged(self.name, where, f"its state does not account for {', '.join(sorted(stray))}")
        if not _same(get("weight.quant_map"), TABLE):
            raise damaged(self.name, where, "weight.quant_map is not the table of nf4")
        codes = get("weight").contiguous().flatten().view(torch.uint8)
        found = {"codes": codes, "absmax": get("weight.absmax")}
        if nested:
            found["nested_absmax"] = get("weight.nested_absmax")
            found["offset"] = torch.tensor(state["nested_offset"], dtype=torch.float32, device=codes.device)
            table, size = get("weight.nested_quant_map"), state["nested_blocksize"]
            if size != NESTED_BLOCK or not _same(table, NESTED_TABLE):
                found, nested = {"codes": codes, "absmax": _foreign_scales(found, table, size, where)}, False
        shape, dtype = tuple(state["shape"]), DTYPES[state["dtype"]]
        packed = Packed(self.name, shape, dtype, state["blocksize"], nested, found)
        self.validate(packed, where)
        return packed


def _pack_panel(values: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """The bytes and scales of whole blocks; those after the last value stand for zeros."""
    blocks = pad(values.float(), (0, -len(values) % block_size)).view(-1, block_size)
    scales = blocks.abs().amax(1)
    blocks = _normalized(blocks, scales)
    # How many midpoints lie below a value: a binary search takes four times as long.
    codes = torch.zeros_like(blocks, dtype=torch.uint8)
    for midpoint in _MIDPOINTS:
        codes += blocks > midpoint
    high, low = codes.view(-1, 2).unbind(1)
    return high << 4 | low, scales


def _normalized(blocks: Tensor, scales: Tensor) -> Tensor:
    """Each block over its scale; a block of zeros stays one."""
    return blocks / scales.where(scales != 0, 1.0).unsqueeze(1)


def _unnested(codes: Tensor, table: Tensor, absmax: Tensor, size: int, offset: Tensor, first: int = 0) -> Tensor:
    """Quantised scales in float32; ``first`` is the number of the first one."""
    block = torch.arange(first, first + len(codes), device=codes.device) // size
    return table.index_select(0, codes.int()).mul_(absmax.index_select(0, block)).add_(offset)


def _foreign_scales(found: Mapping[str, Tensor], table: Tensor, size: int, where: str) -> Tensor:
    """Scales that were quantised with another table, or in other blocks, than ours."""
    codes, absmax = found["absmax"], found["nested_absmax"]
    if codes.dtype != torch.uint8 or codes.dim() != 1:
        raise damaged("nf4", where, f"weight.absmax is {codes.dtype} {tuple(codes.shape)}; expected bytes in a row")
    if table.shape != (256,) or table.dtype != torch.float32 or not bool(table.isfinite().all()):
        raise damaged("nf4", where, "weight.nested_quant_map is no table of 256 finite float32 values")
    if absmax.shape != (-(-len(codes) // size),) or absmax.dtype != torch.float32:
        raise damaged("nf4", where, f"weight.nested_absmax has shape {tuple(absmax.shape)} for {len(codes)} scales")
    # What comes out below zero stands for a block of next to zeros.
    return _unnested(codes, table, absmax, size, found["offset"]).clamp_min_(0)


def _same(table: Tensor, expected: Tensor) -> bool:
    return table.is_meta or (table.dtype == expected.dtype and torch.equal(table.cpu(), expected))


def _read_state(text: Tensor, where: str) -> dict[str, Any]:
    """The JSON beside the tensors, checked."""

    def wrong(what: str) -> QuantizationError:
        return damaged("nf4", where, f"{_STATE} {what}")

    if text.dtype != torch.uint8 or text.dim() != 1 or text.is_meta:
        raise wrong(f"is {text.dtype} {tuple(text.shape)} on {text.device}; expected the bytes of a JSON text")
    try:
        state = json.loads(bytes(text.tolist()))
    except (ValueError, RecursionError) as error:  # of the encoding, or of JSON
        raise wrong(f"is no JSON text ({error})") from error
    if not isinstance(state, dict):
        raise wrong("is no JSON object")
    keys = set(_STATE_KEYS) | (set(_NESTED_KEYS) if set(state) & set(_NESTED_KEYS) else set())
    if set(state) != keys:
        raise wrong(f"has the keys {_short(', '.join(sorted(state)))}; expected {', '.join(sorted(keys))}")
    shape, size, dtype = state["shape"], state["blocksize"], state["dtype"]
    checks: dict[str, tuple[bool, str]] = {
        "quant_type": (state["quant_type"] == "nf4", "'nf4'"),
        "blocksize": (_is_count(size) and size in BLOCK_SIZES, f"one of {BLOCK_SIZES}"),
        "dtype": (isinstance(dtype, str) and dtype in DTYPES, f"one of {', '.join(DTYPES)}"),
        "shape": (_is_shape(shape), "[out, in]"),
    }
    if "nested_dtype" in state:
        offset = state["nested_offset"]
        fits = type(offset) in (float, int) and 0 <= offset <= torch.finfo(torch.float32).max
        checks["nested_blocksize"] = _is_count(state["nested_blocksize"]), "an integer of at least 1"
        checks["nested_dtype"] = state["nested_dtype"] == "float32", "'float32'"
        checks["nested_offset"] = fits, "a finite number of at least 0 in float32"
    for key, (right, expected) in checks.items():
        if not right:
            raise wrong(f"says {key}={_short(repr(state[key]))}; expected {expected}")
    return state


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(map(_is_count, value)) and _is_count(prod(value))


def _is_count(value: object) -> bool:
    """Whether it is an integer (no bool, no float) of a size that tensors have."""
    return type(value) is int and 0 < value < 2**63


def _short(text: str) -> str:
    return text if len(text) <= 160 else f"{text[:100]}... ({len(text)} characters)"
