"""Runs Triton's tests in processes of their own: Triton decides at its first import whether it interprets.

Of the tests that hold all providers, those that take the interpreter the longest are left out (a half type stands for
float32; what the masks are, tests/triton_kernels.py asks of the masks themselves). All of them are run by

    TRITON_INTERPRET=1 python -m pytest tests/test_providers.py tests/test_dropout.py -k triton
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

LONG = (
    "triton-float32", "many_rows", "independent_of_itself", "adapters_and_steps", "share_of_kept", "one_in_65536",
    "two_runs", "accumulated", "outputs_that_nothing_reads", "runs_again", "sites_and_steps", "[dropout-torch.float16",
)  # fmt: skip


@pytest.mark.parametrize(
    ("interpret", "arguments"),
    [
        pytest.param(not torch.cuda.is_available(), ["triton_kernels.py", "triton_nf4.py"], id="kernels"),
        pytest.param(
            True,
            ["test_providers.py", "test_dropout.py", "-k", " and not ".join(["triton", *LONG])],
            id="laws of all providers",
        ),
    ],
)
def test_kernels(interpret: bool, arguments: list[str], tmp_path: Path, request: pytest.FixtureRequest) -> None:
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "LORAFX_AUTOTUNE": "0",
        "TRITON_INTERPRET": str(int(interpret)),
    }
    if interpret:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-c", str(request.config.inipath), "--rootdir", str(here.parent)]
    command += [str(here / a) if a.endswith(".py") else a for a in arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
