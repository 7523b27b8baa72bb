"""The Triton kernels, compiled to machine code for parts that need not be here."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from lorafx.kernels.triton.aot import PARTS, compile_launch  # noqa: E402 - after the check for Triton

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

#: ranks, dtype, dropout, aligned. Aligned are x, dy and W; ranks that are no multiples of 16 make kernels of their own
#: even so, since s, left and ds are then read element by element.
CASES = {
    "bf16": ((16, 16, 16), torch.bfloat16, 0.1, True),
    "bf16, odd": ((17, 17, 17), torch.bfloat16, 0.1, False),
    "fp16, odd ranks, no dropout": ((17,), torch.float16, 0.0, True),
    "fp32": ((64,), torch.float32, 0.1, True),
}
#: float32 where it takes the most registers, as three products of TF32.
COMPILED = [(part, case) for part in PARTS for case in CASES if case != "fp32" or part == "sm_90"]
#: Kernels that nearly fill the registers: part, dtype, ranks, aligned, kernel.
FULL = [
    ("sm_80", torch.float32, (64,), False, "up"),
    ("sm_80", torch.float32, (64,), True, "row_norm"),
    ("sm_80", torch.float32, (256,), True, "dright"),
    ("sm_100", torch.float32, (16, 16, 16), False, "down"),
    ("gfx942", torch.float32, (64,), True, "grad_up"),
    ("sm_100", torch.bfloat16, (256,), True, "dright"),
    ("gfx942", torch.bfloat16, (256,), False, "down"),
    ("gfx942", torch.bfloat16, (8, 3), False, "down"),
    ("gfx942", torch.bfloat16, (48, 48), True, "down"),
    ("gfx942", torch.bfloat16, (32,), True, "grad_up"),
    ("gfx942", torch.float32, (17,), True, "grad_up"),
    ("gfx942", torch.float32, (17,), False, "grad_up"),
    ("sm_80", torch.float32, (32,), True, "grad_up"),
    ("sm_80", torch.bfloat16, (33,), True, "grad_up"),
    ("sm_90", torch.float32, (16,), False, "dequantize"),
    # several masks beside one large accumulator, or several
    ("sm_80", torch.bfloat16, (3, 17, 1), True, "down"),
    ("sm_90", torch.float32, (8, 64, 16), True, "down"),
    ("sm_80", torch.float32, (100, 100), False, "dright"),
    ("gfx942", torch.bfloat16, (64, 64, 64), True, "down"),
    ("gfx942", torch.bfloat16, (32, 32, 32), True, "dright"),
    *((part, torch.float32, (5,), True, kernel) for part in PARTS for kernel in ("grad_up", "up")),
]


@pytest.fixture(scope="module")
def table() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "aot_table.py"
    spec = importlib.util.spec_from_file_location("aot_table", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("part", "case"), COMPILED)
def test_machine_code(part: str, case: str, table: ModuleType) -> None:
    ranks, dtype, p, aligned = CASES[case]
    found = list(table.binaries(PARTS[part], dtype, aligned, ranks, p))
    assert {"down", "up", "grad_up", "dx", "dright", "row_norm", "reduce"} == {b.launch.name for b in found}
    for binary in found:
        assert not binary.faults, f"{binary.launch.name}: {binary.faults}"
        arguments = dict(zip(binary.launch.kernel.arg_names, binary.launch.args, strict=True))
        streams = binary.launch.name != "reduce" and not arguments.get("BASE_GIVEN")  # has a product of large operands
        if binary.launch.name in ("grad_up", "dright"):  # read s or ds in their loops
            streams = streams and all(r % 16 == 0 for r in ranks)
        if aligned and streams and not PARTS[part].amd:
            assert binary.asynchronous, f"{binary.launch.name} has no asynchronous copies"


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("part", PARTS)
def test_machine_code_on_nf4(part: str, aligned: bool, table: ModuleType) -> None:
    ranks = (16, 16, 16) if aligned else (16,)
    found = list(table.binaries(PARTS[part], torch.bfloat16, aligned, ranks, 0.1, (), 64))
    assert {"up", "dx", "dequantize"} == {b.launch.name for b in found}
    for binary in found:
        assert not binary.faults, f"{binary.launch.name}: {binary.faults}"
        if aligned and binary.launch.name != "dequantize" and not PARTS[part].amd:
            assert binary.asynchronous, f"{binary.launch.name} has no asynchronous copies"


@pytest.mark.parametrize("part", ["sm_80", "gfx942"])
def test_scales_are_rounded_at_each_step(part: str, table: ModuleType) -> None:
    """What reads double quantisation has no fused multiply-add, which a compiler left alone would make."""
    (binary,) = table.binaries(PARTS[part], torch.bfloat16, True, (16,), 0.0, {"dequantize"}, 64)
    contracted = re.compile(r"fma\.rn|v_(pk_)?(fma|mad)\w*_f32")
    assert not contracted.search(binary.assembly)
    assert PARTS[part].amd or "cvt.rn.bf16x2.f32" in binary.assembly  # the value, to nearest
    fused = replace(binary.launch, options={"num_warps": binary.launch.options["num_warps"]})
    assert contracted.search(compile_launch(fused, PARTS[part]).assembly)


@pytest.mark.parametrize(("part", "dtype", "ranks", "aligned", "kernel"), FULL)
def test_nothing_spills_where_registers_are_short(
    part: str, dtype: torch.dtype, ranks: tuple[int, ...], aligned: bool, kernel: str, table: ModuleType
) -> None:
    block_size = 64 if kernel == "dequantize" else 0
    found = list(table.binaries(PARTS[part], dtype, aligned, ranks, 0.1, {kernel}, block_size))
    assert found
    for binary in found:
        assert not binary.faults, binary.faults


def test_table(table: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--parts",
        "sm_90",
        "--dtypes",
        "bf16",
        "--ranks",
        "16",
        "16",
        "16",
        "--weights",
        "dense",
        "--markdown",
    ]
    assert table.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len({line.count("|") for line in lines}) == 1
    aligned = next(line for line in lines if "| aligned | dense | up |" in line)
    assert "wgmma" in aligned
    assert "128" in aligned
    assert table.main([*arguments, "--kernels", "down", "reduce", "--no-dora", "--dropout", "0"]) == 0
    assert {line.split("|")[5].strip() for line in capsys.readouterr().out.splitlines()[2:]} == {"down", "reduce"}
