"""Two processes on parts of a batch train as one process on all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tolerances import TOLERANCES

WORKER = Path(__file__).with_name("ddp_worker.py")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two gloo processes under torchrun leave behind."""
    directory = tmp_path_factory.mktemp("ddp")
    # a port that is free, and the loopback interface whatever the machine's own name resolves to
    launch = ["--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *launch, str(WORKER), str(directory)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        cwd=directory,
        check=True,
        timeout=300,
    )
    return directory


@pytest.fixture(scope="module")
def found(directory: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((directory / "found.json").read_text())
    return read


@pytest.mark.xdist_group("ddp")
def test_gradients_are_those_of_one_process_on_the_joint_batch(found: dict[str, Any]) -> None:
    assert found["providers"] == ["torch"], "the graph is lowered; in float64, which the compiled provider has not"
    assert found["same_parameters"]
    assert found["gradient_error"] <= TOLERANCES["joint batch", torch.float64].error


@pytest.mark.xdist_group("ddp")
def test_modes_reach_the_graph_through_the_wrapper(found: dict[str, Any]) -> None:
    assert found["eval_draws_nothing"]
    assert found["train_drops"]


@pytest.mark.xdist_group("ddp")
def test_processes_stay_together_with_recomputed_layers(found: dict[str, Any]) -> None:
    assert found["processes_agree_after_a_step"]


@pytest.mark.xdist_group("ddp")
def test_switching_below_a_wrapper_is_refused_and_after_it_right(found: dict[str, Any]) -> None:
    assert "Delete the wrapper, switch, and wrap the graph again" in found["switch_refused"]
    assert found["switched_parameters"]
    assert all(name.endswith(".other") for name in found["switched_parameters"])
    assert found["processes_agree_after_switching"]


@pytest.mark.xdist_group("ddp")
def test_the_trainer_runs_in_two_processes_and_saves_once(found: dict[str, Any], directory: Path) -> None:
    assert found["processes_agree_after_the_trainer"]
    saved = {path.name for path in (directory / "run" / "checkpoint-2").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "rng_state_0.pth", "rng_state_1.pth"} <= saved
    assert "model.safetensors" not in saved
