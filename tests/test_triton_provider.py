"""The Triton provider without a GPU: what it serves, when it is imported, and what the benchmark says."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorafx.kernels.base import Call
from lorafx.kernels.triton.provider import TritonProvider

GPU = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


def call(device: str = "cuda", dtype: torch.dtype = torch.bfloat16, r: int = 16) -> Call:
    return Call(torch.device(device), dtype, 64, (64, 32), r)


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_serves_cuda(dtype: torch.dtype) -> None:
    assert TritonProvider().rejects(call(dtype=dtype)) is None


@pytest.mark.parametrize(
    ("declined", "why"),
    [
        (call(device="cpu"), "not on cpu"),
        (call(dtype=torch.float64), "not in float64"),
        (call(r=0), "no ranks"),
    ],
)
def test_declines_with_a_reason(declined: Call, why: str) -> None:
    assert why in str(TritonProvider().rejects(declined))


def test_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert TritonProvider().unavailable() == "there is no CUDA device"
    monkeypatch.setattr("lorafx.kernels.triton.provider.find_spec", lambda name: None)
    assert TritonProvider().unavailable() == "Triton is not installed"


def test_kernels_are_imported_by_the_first_call_only() -> None:
    """(PyTorch's compiler imports Triton itself, so that Triton's name says nothing.)"""
    code = (
        "import sys, lorafx, lorafx.kernels.triton.provider as p;"
        "p.TritonProvider().unavailable();"
        "print(sorted(m for m in sys.modules if m.startswith('lorafx.kernels.triton.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['lorafx.kernels.triton.ops', 'lorafx.kernels.triton.provider']"


@pytest.fixture(scope="module")
def gpu() -> dict[str, Any]:
    return runpy.run_path(str(GPU))


def test_benchmark_arguments(gpu: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    options = gpu["parse"](["--features", "64", "--dtypes", "fp32", "--rounds", "3", "--json", "out.json"])
    assert (options.features, options.dtypes, options.json) == ([64], ["fp32"], Path("out.json"))
    assert gpu["parse"]([]).features == [4096, 5120, 8192]
    with pytest.raises(SystemExit):
        gpu["parse"](["--rounds", "1"])
    assert "at least 2" in capsys.readouterr().err


def test_benchmark_without_a_gpu(
    gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu["main"](["--json", str(tmp_path / "out.json")]) == 2
    assert "needs a GPU: there is no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_benchmark_writes_as_it_goes(gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What was measured before a failure is kept."""
    out = tmp_path / "out.json"
    timing = gpu["Timing"]("frozen", 1, 64, 8, "fp32", 0.0, 1.0, (0.9, 1.1), 1.0, 0)
    given = iter([[timing]])
    state = gpu["main"].__globals__
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="a device"))
    monkeypatch.setitem(state, "check", lambda *_: iter([gpu["Check"]("y", 1, 1, 1, 1, "fp32", 0.0, 0.0, 1e-4)]))
    monkeypatch.setitem(state, "time_block", lambda *_: next(given))
    with pytest.raises(StopIteration):
        gpu["main"](["--features", "64", "128", "--ranks", "8", "--dropout", "0", "--json", str(out)])
    found = json.loads(out.read_text(encoding="utf-8"))
    assert [c["right"] for c in found["checks"]] == [True]
    assert [t["features"] for t in found["timings"]] == [64]


def test_benchmark_knows_a_wrong_output(gpu: dict[str, Any]) -> None:
    assert gpu["Check"]("y", 1, 1, 1, 1, "fp32", 0.0, 1e-6, 1e-4).right
    assert not gpu["Check"]("y", 1, 1, 1, 1, "fp32", 0.0, float("nan"), 1e-4).right
