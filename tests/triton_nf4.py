"""Weights in NF4 under Triton's kernels: their values bit for bit, models on them, and other base formats.

Run as tests/triton_kernels.py is; that file has the cases in NF4 beside the dense ones.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

import lorafx
from lorafx.bases import FORMATS
from lorafx.bases.ops import describe
from lorafx.bases.tensor import QuantizedTensor
from lorafx.kernels.triton.ops import arguments, packed_linear, packed_mm, packed_rows
from lorafx.kernels.triton.tiles import interpreted, recorded
from lorafx.kernels.triton.weights import stored
from triton_cases import BF16, DEVICE, F16, F32, PROVIDER, Case, check, dense, make
from triton_kernels import INPUT, Block, step_of

#: Rows, columns, block size, double quantisation: blocks that start with rows or run over their ends, one short block,
#: an odd number of values, and more scales than share one of their own.
SHAPES = [
    (33, 64, 64, True),
    (5, 96, 32, True),
    (70, 256, 64, True),
    (20, 256, 256, False),
    (7, 35, 64, True),
    (33, 130, 64, False),
    (90, 100, 32, True),
    (1, 1, 64, True),
]


@pytest.mark.parametrize("dtype", [F32, F16] if interpreted() else [F32, F16, BF16])
@pytest.mark.parametrize(("n", "k", "block_size", "double_quant"), SHAPES)
def test_values_are_the_formats_bit_for_bit(
    n: int, k: int, block_size: int, double_quant: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(n * k)
    weight = torch.randn(n, k, generator=generator).to(DEVICE, dtype)
    packed = FORMATS["nf4"].quantize(weight, block_size=block_size, double_quant=double_quant)
    expected = FORMATS["nf4"].dequantize(packed)
    assert torch.equal(packed_rows(*describe(packed), 0, n), expected)
    assert torch.equal(packed_rows(*describe(packed), n // 2, n - n // 4), expected[n // 2 : n - n // 4])


def test_layers_without_adapters() -> None:
    """The operators of CUDA: forward and backward of a frozen layer."""
    generator = torch.Generator().manual_seed(0)
    x, bias, weight, dy = (torch.randn(s, generator=generator).to(DEVICE) for s in ((9, 64), (20,), (20, 64), (9, 20)))
    for name in ("nf4", "int8"):
        packed = FORMATS[name].quantize(weight)
        values = FORMATS[name].dequantize(packed).double()
        check(packed_linear(x, bias, *describe(packed)), x.double() @ values.mT + bias.double(), F32)
        check(packed_linear(x, None, *describe(packed)), x.double() @ values.mT, F32)
        check(packed_mm(dy, *describe(packed)), dy.double() @ values, F32)
    for name in ("packed_rows", "packed_linear", "packed_mm"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lorafx::{name}", "CUDA")


@contextmanager
def dense_weights() -> Iterator[list[int]]:
    """How many weights that a format's reading made dense were alive, each time there was a new one."""
    alive, counts, reading = WeakIdKeyDictionary(), list[int](), QuantizedTensor.dequantize

    def watched(self: QuantizedTensor) -> Tensor:
        found = reading(self)
        alive[found] = True
        counts.append(len(alive))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QuantizedTensor, "dequantize", watched)
        yield counts


def test_formats_that_the_kernels_do_not_know() -> None:
    """int8 and turned weights, among others: dense for one product each, one at a time."""
    case = Case(9, 64, (20, 18, 20, 24), (3, 2, 4, 5), (0.0,) * 4, F16, block_sizes=(0, 64, 64, 0))
    run = make(case)
    first, nf4, _, last = run.layers
    int8 = QuantizedTensor(FORMATS["int8"].quantize(dense(first.weight).to(F16)))
    turned = QuantizedTensor(FORMATS["nf4"].quantize(dense(run.layers[2].weight).to(F16).mT.contiguous())).t()
    weights = [int8, nf4.weight, turned, last.weight]
    run.layers = [layer._replace(weight=w) for layer, w in zip(run.layers, weights, strict=True)]
    values = [dense(w) for w in weights]
    with dense_weights() as counts:
        run.run()
    assert counts == [1] * 4  # of two weights, forward and backward
    x = run.x.double()
    for layer, w, y, r in zip(run.layers, values, run.ys, run.adapters.columns, strict=True):
        low = run.s[:, r].double() @ layer.left(run.adapters).double().mT
        check(y, x @ w.mT + low + layer.bias.double(), F16)
    low = run.ds.double() @ torch.cat([*run.rights]).double()
    check(run.dx, sum((dy.double() @ w for dy, w in zip(run.dys, values, strict=True)), low), F16)
    with dense_weights() as counts:  # nothing that the kernel could read
        dx = PROVIDER.grad_x([run.dys[0]], [int8], run.ds, run.rights, run.adapters, None)
    assert counts == [1]
    check(dx, run.dys[0].double() @ values[0] + low, F16)


def quantized_model(variant: str, p: float, backend: str, dense: bool = False) -> Any:
    torch.manual_seed(2)
    block = Block().to(DEVICE)
    names = ["q", "out"] if dense else ["q", "k", "out"]
    spec = lorafx.LoraSpec(r=5, alpha=8, dropout=p, target_modules=names, variant=variant, base="nf4", block_size=32)
    gm = lorafx.apply(block, spec, (INPUT,), seed=0, backend=backend)
    with torch.no_grad():
        for name, parameter in gm.named_parameters():
            if "lora_B" in name or "vera" in name or "lora_E" in name:
                parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape).to(INPUT) % 7 / 20)
    return gm


@pytest.mark.parametrize(("variant", "some"), [("lora", True), ("dora", False), ("vera", False), ("adalora", True)])
def test_lowered_model(variant: str, some: bool) -> None:
    """Siblings of which all, or some, are quantised and adapted."""
    found = {backend: step_of(quantized_model(variant, 0.0, backend, some)) for backend in ("reference", "triton")}
    for actual, expected in zip(found["triton"], found["reference"], strict=True):
        check(actual, expected.double(), F32)


def test_compiled_model() -> None:
    """The tensors of NF4 go to the kernels as they are: nothing is made dense, compiled or not."""
    gm, launched = quantized_model("lora", 0.3, "triton").train(), list[str]()

    def run(kernel: Any, grid: Any, args: Any, options: Any) -> None:
        launched.append(kernel.__name__)
        kernel[tuple(grid)](*args, **options)

    with recorded(run), dense_weights() as counts:
        expected = step_of(gm, seed=3)
        once = list(launched)
        actual = step_of(torch.compile(copy.deepcopy(gm), fullgraph=True, backend="aot_eager"), seed=3)
    assert all(map(torch.equal, actual, expected))
    assert {"up_kernel", "dx_kernel"} <= set(once)
    assert "dequantize_kernel" not in launched
    assert not counts


def test_arguments() -> None:
    """What is dense goes as it is; NF4 of the dtype asked for by its tensors."""
    weight = torch.randn(6, 64, device=DEVICE)
    one = QuantizedTensor(FORMATS["nf4"].quantize(weight))
    tensors, layouts = arguments([weight, one], F32)
    assert layouts == [1, 6, 64, 0, 4, 6, 64, 64]
    assert tensors[0] is weight
    assert all(a is b for a, b in zip(tensors[1:], one.packed.tensors.values(), strict=True))
    assert arguments([one], F16)[1] == [1, 6, 64, 0]
    plain, packed = stored(tensors, layouts)
    assert plain.tensors == (weight,)
    assert packed.tensors == tuple(tensors[1:])
