"""The formats of a frozen base, against their definitions in NumPy and ONNX Runtime's 4-bit operator.

What bitsandbytes makes of the same weights is in test_bases_bitsandbytes.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorafx
from lorafx.bases import FORMATS
from lorafx.bases.base import PANEL_BYTES, Format, Packed
from lorafx.bases.nf4 import BLOCK_SIZES, NESTED_TABLE, TABLE, Nf4

NF4, INT8 = Nf4(), FORMATS["int8"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rows that hold whole blocks, that do not, of an odd length, a short last block, less than one byte's worth, a stack.
SHAPES = [(64, 128), (48, 96), (48, 160), (7, 9), (3, 321), (1, 1), (3, 10, 20)]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def equal(a: Packed, b: Packed) -> bool:
    """The same bytes; 0.0 and -0.0 differ."""
    same = (a.format, a.shape, a.dtype, a.block_size, a.double_quant, list(a.tensors))
    other = (b.format, b.shape, b.dtype, b.block_size, b.double_quant, list(b.tensors))
    return same == other and all(
        torch.equal(x.reshape(-1).view(torch.uint8), b.tensors[name].reshape(-1).view(torch.uint8))
        for name, x in a.tensors.items()
    )


# The definition, in NumPy. The table is written out as in the paper's appendix, not taken from the implementation.

PAPER = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
    dtype=np.float32,
)  # fmt: skip


def blocks_of(values: NDArray[np.float32], size: int) -> list[NDArray[np.float32]]:
    return [values[i : i + size] for i in range(0, len(values), size)]


def nearest(values: NDArray[np.float32], size: int, table: NDArray[np.float32]) -> tuple[list[int], list[float]]:
    """The code of each value, and the scale of each block."""
    codes, scales = [], []
    for block in blocks_of(values, size):
        scale = np.abs(block).max()
        unit = block / scale if scale else block
        codes += np.searchsorted((table[1:] + table[:-1]) / np.float32(2), unit, "left").tolist()
        scales.append(scale)
    return codes, scales


def read(codes: list[int], scales: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    return PAPER[codes] * np.repeat(scales, size)[: len(codes)]


def defined(weight: Tensor, size: int) -> tuple[list[int], NDArray[np.float32], NDArray[np.float32]]:
    """NF4's codes, scales and values, by the book."""
    codes, found = nearest(weight.float().numpy().ravel(), size, PAPER)
    scales = np.array(found, dtype=np.float32)
    return codes, scales, read(codes, scales, size).reshape(weight.shape)


def unpacked(packed: Packed) -> list[int]:
    return [code for byte in packed.tensors["codes"].tolist() for code in (byte >> 4, byte & 15)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("size", [32, 64, 256])
def test_nf4_has_the_codes_scales_and_values_of_its_definition(
    shape: tuple[int, ...], dtype: torch.dtype, size: int
) -> None:
    weight = normal(*shape, dtype=dtype)
    codes, scales, values = defined(weight, size)
    packed = NF4.quantize(weight, block_size=size, double_quant=False)
    found = unpacked(packed)
    assert found[: len(codes)] == codes
    assert found[len(codes) :] == [7] * (weight.numel() % 2), "half a byte is left over and stands for zero"
    assert packed.tensors["absmax"].tolist() == scales.tolist()
    assert torch.equal(NF4.dequantize(packed, torch.float32), torch.from_numpy(values))
    assert torch.equal(NF4.dequantize(packed), torch.from_numpy(values).to(dtype))


def test_nf4_with_double_quantisation_has_the_scales_of_its_definition() -> None:
    weight = normal(97, 320)  # 485 blocks: a whole nested one, and a short one
    _, scales, _ = defined(weight, 64)
    packed = NF4.quantize(weight)
    offset = packed.tensors["offset"].numpy()
    assert offset == torch.from_numpy(scales).mean().numpy()
    codes, nested = nearest(scales - offset, 256, NESTED_TABLE.numpy())
    assert packed.tensors["absmax"].tolist() == codes
    assert packed.tensors["nested_absmax"].tolist() == nested
    restored = NESTED_TABLE.numpy()[codes] * np.repeat(nested, 256).astype(np.float32)[: len(codes)] + offset
    assert NF4.scales(packed).tolist() == restored.tolist()
    values = read(unpacked(packed)[: weight.numel()], restored, 64).reshape(weight.shape)
    assert torch.equal(NF4.dequantize(packed), torch.from_numpy(values))


def test_the_nested_table_is_the_one_in_files_whatever_the_processor() -> None:
    """torch.linspace, which bitsandbytes builds it by, gives another last bit without fused multiply-add."""
    digest = hashlib.sha256(NESTED_TABLE.numpy().tobytes()).hexdigest()
    assert digest == "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"


def run_matmul_bnb4(packed: Packed) -> Tensor:
    """The weight as ONNX Runtime reads it: the identity times its transpose."""
    out_features, in_features = packed.shape
    initializers = [
        onnx.numpy_helper.from_array(packed.tensors["codes"].numpy(), "B"),
        onnx.numpy_helper.from_array(NF4.scales(packed).numpy(), "absmax"),
    ]
    node = onnx.helper.make_node(
        "MatMulBnb4", ["A", "B", "absmax"], ["Y"], domain="com.microsoft",
        K=in_features, N=out_features, block_size=packed.block_size, quant_type=1,
    )  # fmt: skip
    a, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None, None]) for name in "AY")
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "bnb4", [a], [y], initializers),
        opset_imports=[onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (product,) = session.run(None, {"A": np.eye(in_features, dtype=np.float32)})
    return torch.from_numpy(product.T.copy())


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(64, 128), (48, 96), (48, 160), (32, 200)], ids=str)
def test_onnx_runtime_reads_the_same_weight_from_the_same_bytes(shape: tuple[int, int], double_quant: bool) -> None:
    packed = NF4.quantize(normal(*shape), double_quant=double_quant)
    assert torch.equal(run_matmul_bnb4(packed), NF4.dequantize(packed))


def test_onnx_runtime_quantises_to_the_same_bytes() -> None:
    from onnxruntime.capi._pybind_state import quantize_matmul_bnb4

    weight = normal(48, 128)
    codes, absmax = np.zeros(48 * 64, np.uint8), np.zeros(96, np.float32)
    quantize_matmul_bnb4(codes, weight.numpy(), absmax, 64, 1, 48, 128)  # 1: NF4
    packed = NF4.quantize(weight, double_quant=False)
    assert packed.tensors["codes"].tolist() == codes.tolist()
    assert packed.tensors["absmax"].tolist() == absmax.tolist()


@pytest.mark.parametrize("bits", [7, 10], ids=["bfloat16", "float16"])
def test_for_half_types_rounding_of_the_quotient_never_moves_a_code(bits: int) -> None:
    """All pairs of a value and a scale: dividing, and multiplying by the inverse as others do, give the same code.

    A code depends on both significands and the difference of the exponents; below 2^-5 every quotient is 0.
    """
    table = torch.from_numpy(PAPER)
    midpoints = (table[1:] + table[:-1]) / 2
    significands = 1 + torch.arange(2**bits) / 2**bits
    values = torch.cat([sign * significands * 2.0**-e for e in range(6) for sign in (1, -1)])
    for scales in significands.split(64):
        inside = values.abs() <= scales.unsqueeze(1)
        by_quotient, by_inverse = values / scales.unsqueeze(1), values * (1 / scales).unsqueeze(1)
        differ = sum(((by_quotient > m) != (by_inverse > m)) & inside for m in midpoints)
        assert not torch.as_tensor(differ).any()


# Laws of every format.


@pytest.fixture(params=FORMATS.values(), ids=FORMATS)
def base(request: pytest.FixtureRequest) -> Format:
    found: Format = request.param
    return found


#: Half the widest gap between two codes' values, in units of the scale.
HALF_GAP = {"nf4": float((TABLE[1:] - TABLE[:-1]).max()) / 2, "int8": 0.5 / 127}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_state_dict_on_disk_gives_the_same_bytes_back(base: Format, shape: tuple[int, ...], tmp_path: Path) -> None:
    packed = base.quantize(normal(*shape, dtype=torch.float16))
    base.validate(packed)
    state = {f"model.layer.{key}": tensor for key, tensor in base.state_dict(packed).items()}
    assert f"model.layer.{base.mark}" in state
    save_file({**state, "model.layer.bias": torch.zeros(3)}, tmp_path / "model.safetensors")
    assert equal(packed, base.from_state_dict(load_file(tmp_path / "model.safetensors"), "model.layer."))


def test_a_state_dict_shares_the_weight_s_memory(base: Format) -> None:
    packed = base.quantize(normal(6, 64))
    again = base.from_state_dict(base.state_dict(packed))
    for name in ("codes", "absmax"):
        assert again.tensors[name].data_ptr() == packed.tensors[name].data_ptr()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_panels_are_the_weight_s_rows(base: Format, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    packed = base.quantize(normal(*shape))
    whole = base.dequantize(packed, dtype)
    assert (whole.shape, whole.dtype) == (torch.Size(shape), dtype)
    for limit in (1, 4096, PANEL_BYTES):
        panels = list(base.panels(packed, dtype, limit))
        assert all(panel.dtype == dtype for _, panel in panels)
        assert torch.equal(torch.cat([panel for _, panel in panels]), whole.flatten(0, -2))
        assert [start for start, _ in panels] == np.cumsum([0, *(len(p) for _, p in panels)])[:-1].tolist()


@pytest.mark.parametrize("width", [4096, 4099, 96])
def test_a_panel_takes_a_mebibyte_at_most(base: Format, width: int) -> None:
    packed = base.quantize(
        normal(1, width).expand(2**19 // width, width), block_size=4096 if base.name == "nf4" else None
    )
    for _, panel in base.panels(packed, torch.float32):
        assert panel.untyped_storage().nbytes() <= PANEL_BYTES


@pytest.mark.parametrize(
    ("name", "double_quant", "bits"), [("nf4", True, 4.127), ("nf4", False, 4.5), ("int8", None, 8.008)]
)
def test_bits_per_parameter(name: str, double_quant: bool | None, bits: float) -> None:
    base = FORMATS[name]
    packed = base.quantize(normal(512, 4096), double_quant=double_quant)
    assert base.bits_per_parameter(packed) == 8 * sum(t.nbytes for t in packed.tensors.values()) / (512 * 4096)
    assert round(base.bits_per_parameter(packed), 3) == bits


def test_the_layout_of_a_weight_that_has_no_values(base: Format) -> None:
    """On the meta device: what an exporter or a loader allocates before it has the bytes."""
    packed = base.quantize(normal(40, 96))
    layout = base.layout(packed.shape, packed.block_size, packed.double_quant)
    empty = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in layout.items()}
    base.validate(replace(packed, tensors=empty))


def test_a_weight_is_read_in_any_memory_layout_and_left_alone(base: Format) -> None:
    weight = torch.nn.Parameter(normal(96, 40).T)
    before = weight.detach().clone()
    packed = base.quantize(weight)
    assert equal(packed, base.quantize(before.contiguous()))
    assert torch.equal(weight, before)
    assert not any(tensor.requires_grad for tensor in packed.tensors.values())


def test_a_stack_is_its_rows(base: Format) -> None:
    weight = normal(3, 10, 64)
    packed, flat = base.quantize(weight), base.quantize(weight.flatten(0, 1))
    assert torch.equal(base.dequantize(packed).flatten(0, 1), base.dequantize(flat))


def test_zeros_stay_zeros(base: Format) -> None:
    weight = normal(4, 96)
    weight[0] = 0
    weight[3, 32:] = 0
    assert not base.dequantize(base.quantize(torch.zeros(3, 70))).any()
    found = base.dequantize(base.quantize(weight))
    assert not found[0].any()
    assert not found[3, 32:].any()


rows = st.integers(1, 9)
widths = st.integers(1, 150)
seeds = st.integers(0, 2**16)
exponents = st.integers(-30, 30)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(HALF_GAP)), rows, widths, seeds, exponents, st.sampled_from(DTYPES))
def test_a_value_is_off_by_half_a_gap_at_most(
    name: str, height: int, width: int, seed: int, exponent: int, dtype: torch.dtype
) -> None:
    base = FORMATS[name]
    weight = (normal(height, width, seed=seed) * 2.0 ** (exponent if dtype != torch.float16 else exponent / 4)).to(
        dtype
    )
    packed = base.quantize(weight, double_quant=False)
    flat = weight.double().flatten()
    scales = packed.tensors["absmax"].double().repeat_interleave(packed.block_size)[: len(flat)]
    off = (base.dequantize(packed, torch.float32).double().flatten() - flat).abs()
    assert bool((off <= scales * (HALF_GAP[name] + 2**-22)).all())


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(HALF_GAP)), rows, widths, seeds, exponents)
def test_what_was_read_back_quantises_to_itself(name: str, height: int, width: int, seed: int, exponent: int) -> None:
    base = FORMATS[name]
    once = base.quantize(normal(height, width, seed=seed) * 2.0**exponent, double_quant=False)
    if name == "int8":  # Its largest code times a 127th of the scale may miss the scale by its last bit, once.
        again = base.quantize(base.dequantize(once), double_quant=False)
        assert torch.equal(again.tensors["codes"], once.tensors["codes"])
        once = again
    assert equal(base.quantize(base.dequantize(once), double_quant=False), once)


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=32, max_size=320).filter(lambda b: len(b) % 32 == 0), exponents, st.sampled_from(DTYPES))
def test_any_codes_survive(codes: bytes, exponent: int, dtype: torch.dtype) -> None:
    """All bytes, where each block has a value that makes its scale, through each dtype."""
    stored = torch.tensor(list(codes), dtype=torch.uint8)
    stored[::32] = stored[::32] % 16 + 0xF0
    scales = torch.full((len(codes) // 32,), 2.0 ** (exponent if dtype != torch.float16 else exponent / 4)).to(dtype)
    shape = (len(codes) // 32, 64)
    packed = Packed("nf4", shape, dtype, 64, False, {"codes": stored, "absmax": scales.float()})
    NF4.validate(packed)
    assert equal(NF4.quantize(NF4.dequantize(packed), double_quant=False), packed)


# What is refused.


def put(index: tuple[int, ...], value: float) -> Tensor:
    weight = normal(8, 64)
    weight[index] = value
    return weight


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (put((3, 5), float("nan")), "holds NaN or Inf"),
        (put((7, 63), float("-inf")), "holds NaN or Inf"),
        (normal(8, 64).double(), "is torch.float64 and cannot be stored as .*expected float32, bfloat16, float16"),
        (torch.ones(8, 64, dtype=torch.int8), "is torch.int8 and cannot"),
        (normal(64), r"has shape \(64,\) .*expected a matrix"),
        (normal(0, 64), r"has shape \(0, 64\)"),
    ],
    ids=["nan", "inf", "float64", "integers", "vector", "empty"],
)
@pytest.mark.parametrize("double_quant", [True, False])
def test_weights_that_cannot_be_stored(base: Format, weight: Tensor, message: str, double_quant: bool) -> None:
    with pytest.raises(lorafx.QuantizationError, match=rf"^layer 'q_proj' {message}"):
        base.quantize(weight, double_quant=double_quant if base.name == "nf4" else None, where="layer 'q_proj'")


def test_finite_weights_whose_scales_overflow() -> None:
    weight = torch.zeros(512, 64)
    weight[::2] = 3e38
    assert torch.equal(NF4.dequantize(NF4.quantize(weight, double_quant=False)), weight)
    with pytest.raises(lorafx.QuantizationError, match=r"holds values up to 3e\+38, whose scales overflow"):
        NF4.quantize(weight)  # their mean does


def test_scales_at_the_end_of_a_dtype() -> None:
    weight = torch.zeros(512, 64, dtype=torch.float16)
    weight[::2] = torch.finfo(torch.float16).max
    kept = NF4.quantize(weight)
    assert torch.equal(NF4.dequantize(kept)[::2], weight[::2])
    NF4.validate(kept)


def test_settings_that_a_format_does_not_have() -> None:
    with pytest.raises(lorafx.SpecError, match=r"block_size=48 is not allowed: nf4 has 32, 64"):
        NF4.quantize(normal(8, 48), block_size=48)
    with pytest.raises(lorafx.SpecError, match=r"block_size=64 is not allowed: int8 has one scale for each row"):
        INT8.quantize(normal(8, 48), block_size=64)
    with pytest.raises(lorafx.SpecError, match=r"double_quant=True is not allowed: int8 keeps its scales"):
        INT8.quantize(normal(8, 48), double_quant=True)
    assert all(NF4.quantize(normal(9, 50), block_size=size).block_size == size for size in BLOCK_SIZES)


def state_of(**changes: object) -> Tensor:
    """NF4's JSON for an [8, 64] weight, with changes; None takes a key away."""
    text = bytes(NF4.state_dict(NF4.quantize(normal(8, 64)))[NF4.mark].tolist())
    state = {**json.loads(text), **changes}
    return torch.tensor(list(json.dumps({k: v for k, v in state.items() if v is not None}).encode()), dtype=torch.uint8)


Change = Callable[[dict[str, Tensor]], object]


def short(key: str) -> Change:
    return lambda state: state.update({key: state[key][:-1]})


def gone(key: str) -> Change:
    return lambda state: state.pop(key)


def now(key: str, value: Tensor) -> Change:
    return lambda state: state.update({key: value})


def grown(factor: float) -> Change:
    return lambda state: state["weight.nested_absmax"].mul_(factor)


DAMAGE: dict[str, tuple[Format, Change, str]] = {
    "codes too short": (NF4, short("weight"), r"codes is .*\(255,\); .*\(8, 64\) expected torch.uint8 \(256,\)"),
    "scales too short": (NF4, short("weight.absmax"), r"absmax is torch.uint8 \(7,\)"),
    "scales of another kind": (NF4, now("weight.absmax", torch.ones(8)), r"absmax is torch.float32 \(8,\)"),
    "no scales": (NF4, gone("weight.absmax"), "weight.absmax is missing"),
    "no nested scales": (NF4, gone("weight.nested_absmax"), "weight.nested_absmax is missing"),
    "negative scale": (NF4, now("weight.nested_absmax", torch.tensor([-1.0])), "nested_absmax holds a value that is"),
    "scales that come out negative": (NF4, grown(1e3), "with nested_absmax and offset, holds a value that is neg"),
    "scales that float16 lacks": (NF4, now(NF4.mark, state_of(nested_offset=1e30, dtype="float16")), "of 1e.30, and"),
    "scale NaN": (NF4, now("weight.nested_absmax", torch.tensor([torch.nan])), "nested_absmax holds a value"),
    "another table": (NF4, now("weight.quant_map", TABLE.flip(0)), "weight.quant_map is not the table of nf4"),
    "nested table NaN": (NF4, now("weight.nested_quant_map", torch.full((256,), torch.nan)), "no table of 256 finite"),
    "unknown tensor": (NF4, now("weight.zero_point", TABLE), "does not account for weight.zero_point"),
    "no JSON tensor": (NF4, gone(NF4.mark), "bitsandbytes__nf4 is missing"),
    "JSON cut off": (NF4, short(NF4.mark), "is no JSON text"),
    "JSON not text": (NF4, now(NF4.mark, torch.tensor([0xFF, 0xFE], dtype=torch.uint8)), "is no JSON text"),
    "JSON a list": (NF4, now(NF4.mark, torch.tensor(list(b"[1]"), dtype=torch.uint8)), "is no JSON object"),
    "JSON as floats": (NF4, now(NF4.mark, torch.ones(3)), "expected the bytes of a JSON text"),
    "JSON without a key": (NF4, now(NF4.mark, state_of(dtype=None)), "expected blocksize, dtype, nested_blocksize"),
    "JSON with more keys": (NF4, now(NF4.mark, state_of(version=2)), "has the keys .*version"),
    "another type": (NF4, now(NF4.mark, state_of(quant_type="fp4")), "quant_type='fp4'; expected 'nf4'"),
    "another block size": (NF4, now(NF4.mark, state_of(blocksize=48)), "blocksize=48; expected one of"),
    "another dtype": (NF4, now(NF4.mark, state_of(dtype="int8")), "dtype='int8'; expected one of"),
    "another shape": (NF4, now(NF4.mark, state_of(shape=[8, 63])), r"shape \(8, 63\) expected torch.uint8 \(252,\)"),
    "no shape": (NF4, now(NF4.mark, state_of(shape=[512])), r"shape=\[512\]; expected \[out, in\]"),
    "negative shape": (NF4, now(NF4.mark, state_of(shape=[-8, -64])), "expected .out, in."),
    "offset NaN": (NF4, now(NF4.mark, state_of(nested_offset=float("nan"))), "nested_offset=nan; expected a finite"),
    "offset a text": (NF4, now(NF4.mark, state_of(nested_offset="1")), "nested_offset='1'; expected a finite"),
    "nested dtype": (NF4, now(NF4.mark, state_of(nested_dtype="float16")), "nested_dtype='float16'; expected"),
    "int8 codes cut off": (INT8, short("weight"), r"absmax is torch.float32 \(8,\); .*\(7, 64\)"),
    "int8 no scales": (INT8, gone("SCB"), "SCB is missing"),
    "int8 scale Inf": (INT8, now("SCB", torch.full((8,), torch.inf)), "absmax holds a value that is negative, NaN"),
    "int8 code": (INT8, now("weight", torch.full((8, 64), -128, dtype=torch.int8)), "codes holds -128"),
    "int8 order": (INT8, now("weight_format", torch.tensor(1)), "weight_format is 1, and only 0"),
    "int8 floats": (INT8, now("weight", torch.ones(8, 64)), "codes is torch.float32"),
    "int8 a row": (INT8, now("weight", torch.ones(64, dtype=torch.int8)), r"weight has shape \(64,\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_states_are_named(case: str) -> None:
    base, change, message = DAMAGE[case]
    state = base.state_dict(base.quantize(normal(8, 64)))
    change(state)
    prefixed = {f"model.q_proj.{key}": tensor for key, tensor in state.items()}
    with pytest.raises(
        lorafx.QuantizationError, match=rf"^model\.q_proj cannot be read as {base.name}: .*{message}"
    ) as e:
        base.from_state_dict(prefixed, "model.q_proj.")
    assert "\n" not in str(e.value)


def test_fp4_is_named_for_what_it_is() -> None:
    state = NF4.state_dict(NF4.quantize(normal(8, 64)))
    state["weight.quant_state.bitsandbytes__fp4"] = state.pop(NF4.mark)
    with pytest.raises(lorafx.QuantizationError, match="stored as fp4, another format"):
        NF4.from_state_dict(state)


def test_tensors_of_another_format_are_refused(base: Format) -> None:
    packed = base.quantize(normal(8, 64))
    with pytest.raises(lorafx.QuantizationError, match="it has codes where it must have"):
        base.validate(replace(packed, tensors={"codes": packed.tensors["codes"]}))
    meta = {**packed.tensors, "absmax": packed.tensors["absmax"].to("meta")}
    with pytest.raises(lorafx.QuantizationError, match="several devices: "):
        base.validate(replace(packed, tensors=meta))


@pytest.mark.parametrize("change", ["table", "blocks"])
def test_scales_quantised_in_another_way_are_kept_as_float32(change: str) -> None:
    """bitsandbytes before 0.50 set the table's first entry to -1 on the CPU; other sizes of nested blocks exist."""
    packed = NF4.quantize(normal(64, 1024))
    state = NF4.state_dict(packed)
    if change == "table":
        state["weight.nested_quant_map"][0] = -1.0
    else:
        text = json.loads(bytes(state[NF4.mark].tolist()))
        state[NF4.mark] = torch.tensor(list(json.dumps({**text, "nested_blocksize": 512}).encode()), dtype=torch.uint8)
        state["weight.nested_absmax"] = state["weight.nested_absmax"][::2].contiguous()
    found = NF4.from_state_dict(state)
    assert not found.double_quant
    table, absmax = state["weight.nested_quant_map"].numpy(), state["weight.nested_absmax"].numpy()
    codes = packed.tensors["absmax"].numpy()
    expected = table[codes] * np.repeat(absmax, 1024 // len(absmax)) + packed.tensors["offset"].numpy()
    assert NF4.scales(found).tolist() == expected.tolist()
    assert torch.equal(found.tensors["codes"], packed.tensors["codes"])
