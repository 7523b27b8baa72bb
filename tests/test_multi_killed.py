"""Many tasks, one model: an export that is killed leaves nothing that computes something else than it says."""

from __future__ import annotations

import copy
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lorafx
from lorafx import AdapterSession
from lorafx.graph import CapturedModule
from several import IDS, several

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and POSIX signals")

TASKS = {"d": "dora", "s": "small"}
#: The renames and removals of a commit: weights, the model and two adapters come; of another base, two adapters go
#: first, and the old weights at last.
OPERATIONS = {True: 4, False: 7}


def versions() -> list[CapturedModule]:
    """Two adapters of one base, and two of another."""
    found = []
    for number in range(4):
        gm = copy.deepcopy(several())
        if number > 1:
            gm.load_state_dict({"norm.weight": torch.full((6,), 2.0)}, strict=False)
        with torch.no_grad():
            for adapter in TASKS.values():
                gm.get_parameter(f"down.lora_B.{adapter}").mul_(number + 1)
        found.append(gm)
    return found


def outputs(gm: CapturedModule) -> dict[str | None, Any]:
    with torch.no_grad():
        with lorafx.disable_adapters(gm):
            found: dict[str | None, Any] = {None: gm(IDS).numpy()}
        for task, adapter in TASKS.items():
            lorafx.set_adapter(gm, adapter)
            found[task] = gm(IDS).numpy()
    return found


def export(gm: CapturedModule, path: Path) -> lorafx.MultiReport:
    return lorafx.export_multi(gm, path, TASKS, verify=False, external_data=True)


def killed_at(number: int, gm: CapturedModule, path: Path) -> None:
    """Export, and be killed just before this rename or removal."""
    torch.set_num_threads(1)  # those of a fork's parent are gone
    done = itertools.count()

    def watched(real: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        if path.parent == Path(os.fspath(arguments[-1])).parent and next(done) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)

    os.replace, os.unlink = partial(watched, os.replace), partial(watched, os.unlink)  # type: ignore[assignment]
    export(gm, path)


def forever(gms: Sequence[CapturedModule], path: Path) -> None:
    torch.set_num_threads(1)
    for gm in itertools.cycle(gms):
        export(gm, path)


def forked(target: Callable[..., None], *arguments: Any) -> Any:
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


def found_in(path: Path, known: Sequence[dict[str | None, Any]]) -> tuple[set[int], dict[str, set[int]]]:
    """Which versions the base is of, and each adapter that a session takes; that it is of one is what is held."""
    session = AdapterSession(path)
    seen: dict[str | None, set[int]] = {}
    for task in (None, *session.adapters):
        value = session.run({"ids": IDS.numpy()}, task)["output"]
        seen[task] = {n for n, wanted in enumerate(known) if np.allclose(value, wanted[task], rtol=1e-4, atol=1e-5)}
        assert seen[task], f"{task} computes what no version does"
        assert seen[task] <= seen[None], f"{task} is for another base"
    base = seen.pop(None)
    return base, {str(task): numbers for task, numbers in seen.items()}


@pytest.mark.parametrize(("old", "new"), [(0, 1), (0, 2)], ids=["same base", "another base"])
def test_killed_before_each_file_operation(old: int, new: int, tmp_path: Path) -> None:
    gms = versions()
    known = [outputs(gm) for gm in gms]
    (tmp_path / "old").mkdir()
    export(gms[old], tmp_path / "old" / "model.onnx")
    for number in itertools.count():
        path = shutil.copytree(tmp_path / "old", tmp_path / str(number)) / "model.onnx"
        process = forked(killed_at, number, gms[new], path)
        process.join()
        base, adapters = found_in(path, known)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        assert base in ({0, 1}, {2, 3})
        assert all(numbers in ({old}, {new}) for numbers in adapters.values())
        if new in base and old in base:  # nothing is missing at any time
            assert adapters.keys() == TASKS.keys()
    assert adapters == {task: {new} for task in TASKS}
    assert number == OPERATIONS[old // 2 == new // 2]
    assert len(list(path.parent.iterdir())) == 4


def test_killed_at_any_moment(tmp_path: Path) -> None:
    gms = versions()
    known = [outputs(gm) for gm in gms]
    path = tmp_path / "model.onnx"
    start = time.perf_counter()
    export(gms[0], path)
    took, chance = time.perf_counter() - start, random.Random(0)
    for _ in range(6):
        process = forked(forever, gms[::-1], path)
        time.sleep(chance.uniform(0, 2 * took))
        process.kill()
        process.join()
        found_in(path, known)
    export(gms[1], path)
    assert found_in(path, known) == ({0, 1}, {"d": {1}, "s": {1}})
    assert len(list(tmp_path.iterdir())) == 4
