"""The base formats beside bitsandbytes: its bytes both ways, and where it is wrong on the CPU (seen with 0.50.2).

A test named ``..._wrong_...`` holds for as long as bitsandbytes does; when one fails, the docs that say so are old.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lorafx.bases import FORMATS
from lorafx.bases.base import Packed
from lorafx.bases.nf4 import NESTED_TABLE, TABLE, Nf4

bnb: Any = pytest.importorskip(
    "bitsandbytes", reason="the oracle of these tests; it has wheels for some platforms only"
)

NF4, INT8 = Nf4(), FORMATS["int8"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# It computes its table of nested scales by torch.linspace wherever it runs. Scales of another table are read exactly,
# but come back as float32 (test_bases.py).
usual_table = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    reason="its nested table has other last bits where torch runs without fused multiply-add",
)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def quantized(weight: Tensor, size: int = 64, nested: bool = False, **settings: Any) -> tuple[Tensor, Any]:
    found: tuple[Tensor, Any] = bnb.functional.quantize_4bit(
        weight, blocksize=size, quant_type="nf4", compress_statistics=nested, **settings
    )
    return found


def state_dict(codes: Tensor, state: Any) -> dict[str, Tensor]:
    """As ``Linear4bit`` has it."""
    return {"weight": codes, **{f"weight.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key


def by_definition(packed: Packed) -> Tensor:
    """Table entry times scale, value by value, on nothing of the implementation's but the stored scales."""
    codes = torch.stack([packed.tensors["codes"] >> 4, packed.tensors["codes"] & 15], 1).flatten()[: packed.numel]
    scales = packed.tensors["absmax"].repeat_interleave(packed.block_size)[: packed.numel]
    return (TABLE[codes.int()] * scales).view(packed.shape).to(packed.dtype)


# Where it is right: the same bytes.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [32, 64, 1024])
@pytest.mark.parametrize("shape", [(64, 128), (48, 96), (7, 9), (33, 321)], ids=str)
def test_the_same_codes_scales_and_state_dict(shape: tuple[int, int], size: int, dtype: torch.dtype) -> None:
    weight = normal(*shape, dtype=dtype)
    theirs = state_dict(*quantized(weight, size))
    packed = NF4.quantize(weight, block_size=size, double_quant=False)
    same(NF4.state_dict(packed), theirs)
    same(NF4.state_dict(NF4.from_state_dict(theirs)), theirs)


@usual_table
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nested_state_dict_is_kept_to_the_bit_and_read_as_it_reads_it(dtype: torch.dtype) -> None:
    codes, state = quantized(normal(96, 512, dtype=dtype), nested=True)
    theirs = state_dict(codes, state)
    packed = NF4.from_state_dict(theirs)
    same(NF4.state_dict(packed), theirs)
    assert packed.tensors["codes"].data_ptr() == codes.data_ptr()
    assert torch.equal(NF4.dequantize(packed), bnb.functional.dequantize_4bit(codes, state))


@pytest.mark.parametrize("nested", [True, False])
def test_it_reads_what_we_stored(nested: bool) -> None:
    packed = NF4.quantize(normal(96, 512, dtype=torch.bfloat16), double_quant=nested)
    ours = NF4.state_dict(packed)
    codes = ours.pop("weight")
    state = bnb.functional.QuantState.from_dict({k.removeprefix("weight."): v for k, v in ours.items()}, "cpu")
    assert torch.equal(bnb.functional.dequantize_4bit(codes, state), NF4.dequantize(packed))


def test_a_linear4bit_s_state_dict() -> None:
    weight = normal(64, 128, dtype=torch.bfloat16)
    layer = bnb.nn.Linear4bit(128, 64, quant_type="nf4", compress_statistics=False)
    layer.weight = bnb.nn.Params4bit(weight.clone(), quant_type="nf4", compress_statistics=False)
    layer.to("cpu")
    packed = NF4.from_state_dict({f"0.{k}": v for k, v in layer.state_dict().items()}, "0.")
    assert packed.shape == (64, 128)
    assert packed.tensors["codes"].data_ptr() == layer.weight.data_ptr()
    same(NF4.state_dict(packed), NF4.state_dict(NF4.quantize(weight, double_quant=False)))


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32], ids=str)
def test_codes_that_fsdp_stores_as_floats(storage: torch.dtype) -> None:
    weight = normal(64, 128)
    codes, state = quantized(weight, quant_storage=storage)
    assert codes.dtype == storage
    packed = NF4.from_state_dict(state_dict(codes, state))
    assert packed.tensors["codes"].data_ptr() == codes.data_ptr()
    same(NF4.state_dict(packed), NF4.state_dict(NF4.quantize(weight, double_quant=False)))


@usual_table
def test_the_nested_table_is_its() -> None:
    assert torch.equal(NESTED_TABLE, bnb.functional.create_dynamic_map())


def test_int8_has_the_same_codes_scales_and_state_dict_for_float16() -> None:
    weight = normal(24, 96, dtype=torch.float16)
    layer = bnb.nn.Linear8bitLt(96, 24, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    theirs = layer.to("cpu").state_dict()
    packed = INT8.quantize(weight)
    same(INT8.state_dict(packed), dict(theirs))
    same(INT8.state_dict(INT8.from_state_dict(theirs)), dict(theirs))


# Where it is not.


@pytest.mark.parametrize("width", [96, 160])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_its_weight_is_wrong_by_a_fifth_where_rows_end_within_blocks(width: int, dtype: torch.dtype) -> None:
    """Silently: its kernel for AVX-512 takes a row's first block for a new one. Ours is the definition's."""
    codes, state = quantized(normal(48, width, dtype=dtype))
    packed = NF4.from_state_dict(state_dict(codes, state))
    right = by_definition(packed)
    assert torch.equal(NF4.dequantize(packed), right)
    theirs = bnb.functional.dequantize_4bit(codes, state)
    off = float((theirs.double() - right.double()).norm() / right.double().norm())
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    assert off > 0.2 if wide else off < 1e-2


def test_its_nested_codes_are_wrong_as_they_are_not_the_nearest() -> None:
    """On the CPU it rounds to 16 bits first. Ours are the nearest, and so nearer in every case that differs."""
    weight = normal(2048, 1024)
    _, state = quantized(weight, nested=True)
    packed = NF4.quantize(weight)
    assert torch.equal(packed.tensors["nested_absmax"], state.state2.absmax)
    assert torch.equal(packed.tensors["offset"], state.offset)
    exact = weight.view(-1, 64).abs().amax(1).double() - state.offset.double()
    ours, theirs = packed.tensors["absmax"], state.absmax
    scale = state.state2.absmax.double().repeat_interleave(256)
    off = [(NESTED_TABLE.double()[codes.int()] * scale - exact).abs() for codes in (ours, theirs)]
    differ = ours != theirs
    assert 0 < int(differ.sum()) < len(ours) / 100
    assert bool((off[0] <= off[1] + 1e-9)[differ].all())
    assert float(off[0].sum()) < float(off[1].sum())


def test_a_float32_next_to_halfway_goes_wrong_as_it_multiplies_by_the_inverse() -> None:
    scale, value = float.fromhex("0x1.2252fcp+0"), float.fromhex("-0x1.ec721ap-1")
    weight = torch.zeros(1, 64)
    weight[0, 0], weight[0, 1] = scale, value
    codes, _ = quantized(weight)
    ours = NF4.quantize(weight, double_quant=False)
    found, other = int(ours.tensors["codes"][0]) & 15, int(codes[0]) & 15
    assert (found, other) == (1, 0)
    assert abs(value / scale - float(TABLE[found])) < abs(value / scale - float(TABLE[other]))


def test_a_short_last_block_of_zeros_has_no_scale() -> None:
    """bitsandbytes stores 1e-38 on the CPU, and reads zeros all the same."""
    weight = torch.zeros(3, 7)
    packed = NF4.quantize(weight, double_quant=False)
    codes, state = quantized(weight)
    assert torch.equal(codes.flatten(), packed.tensors["codes"])
    assert packed.tensors["absmax"].tolist() == [0.0]
    assert 0 < float(state.absmax) < 2e-38


def test_int8_is_wrong_where_float16_overflows() -> None:
    weight = normal(4, 64, dtype=torch.bfloat16)
    weight[1, 3] = 70000
    packed = INT8.quantize(weight)
    assert INT8.dequantize(packed)[1, 3] == weight[1, 3]
    theirs = bnb.nn.Int8Params(weight.clone(), requires_grad=False).to("cpu")
    assert theirs.SCB[1].isinf()


def test_an_inference_on_the_cpu_repacks_a_linear4bit() -> None:
    """What a state dict is then made of is bfloat16 scales: capture has to come before, or say so."""
    if not bnb.functional.has_avx512bf16():
        pytest.skip("bitsandbytes repacks on processors with AVX512-BF16 only")
    layer = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compress_statistics=False).to("cpu").eval()
    before = layer.state_dict()["weight.absmax"].clone()
    with torch.no_grad():
        layer(torch.randn(2, 128))
    assert layer.weight.quant_state.packing_format_for_cpu
    assert not torch.equal(layer.state_dict()["weight.absmax"].flatten().float(), before)
