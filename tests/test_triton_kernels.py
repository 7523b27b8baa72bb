"""Runs tests/triton_kernels.py in a process of its own: Triton decides at its first import whether it interprets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheel for this platform")


def test_kernels(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    here = Path(__file__).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LORAFX_AUTOTUNE": "0"}
    environment["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-c", str(request.config.inipath), "--rootdir", str(here.parent), str(here / "triton_kernels.py")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
