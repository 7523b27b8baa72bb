"""The Triton kernels, compiled to machine code for parts that need not be here."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from lorafx.kernels.triton.aot import PARTS, compile_launch, unique  # noqa: E402 - after the check for Triton
from lorafx.kernels.triton.launches import step  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

#: ranks, dtype, dropout, aligned. Ranks of 16 and 17 are one kernel but for the alignment of their strides.
CASES = {
    "bf16": ((16, 16, 16), torch.bfloat16, 0.1, True),
    "bf16, odd": ((17, 17, 17), torch.bfloat16, 0.1, False),
    "fp16, no dropout": ((64,), torch.float16, 0.0, True),
    "fp32": ((64,), torch.float32, 0.1, True),
}
#: float32 where it takes the most registers, as three products of TF32.
COMPILED = [(part, case) for part in PARTS for case in CASES if case != "fp32" or part == "sm_90"]


@pytest.mark.parametrize(("part", "case"), COMPILED)
def test_machine_code(part: str, case: str) -> None:
    ranks, dtype, p, aligned = CASES[case]
    off, to = (0 if aligned else 1), PARTS[part]
    widths = [4096 - 7 * off for _ in ranks]
    launches = step(to.device, 8192 - 3 * off, 4096 - 5 * off, widths, ranks, dtype, p, dora=True, aligned=aligned)
    found = [compile_launch(launch, to) for launch in unique(launches)]
    assert {"down", "up", "grad_up", "dx", "dright", "row_gain", "reduce"} == {b.launch.name for b in found}
    for binary in found:
        assert not binary.faults, f"{binary.launch.name}: {binary.faults}"
        arguments = dict(zip(binary.launch.kernel.arg_names, binary.launch.args, strict=True))
        streams = binary.launch.name != "reduce" and not arguments.get("BASE_GIVEN")  # has a product of large operands
        if aligned and streams and not to.amd:
            assert binary.asynchronous, f"{binary.launch.name} has no asynchronous copies"


@pytest.fixture
def table() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "aot_table.py"
    spec = importlib.util.spec_from_file_location("aot_table", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_table(table: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--parts", "sm_90", "--dtypes", "bf16", "--ranks", "16", "16", "16", "--markdown"]
    assert table.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len({line.count("|") for line in lines}) == 1
    aligned = next(line for line in lines if "| aligned | up |" in line)
    assert "wgmma" in aligned
    assert "128" in aligned
