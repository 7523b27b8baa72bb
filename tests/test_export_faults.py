"""What can go wrong while a file is written: whoever reads it finds the old pair or the new one, whole."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import nn

import lorafx
from disk import room_for
from lorafx.errors import ExportError
from lorafx.export import uncached
from lorafx.export.commit import draft
from lorafx.graph import CapturedModule

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork, POSIX signals and limits")

#: How often an export is killed; benchmarks/export_kills.py asks for more.
KILLS = int(os.environ.get("LORAFX_KILLS", "20"))
#: Models that exports are told apart by.
SEEDS = 40


def model(seed: int, name: str = "y") -> ir.Model:
    """``y = x W0 W1``, with weights that the seed tells."""
    generator = np.random.default_rng(seed)
    x = ir.Value(name="x", shape=ir.Shape(["n", 64]), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([x], [], nodes=[], name="g", opset_imports={"": 20})
    last = x
    for index in range(2):
        array = generator.standard_normal((64, 64)).astype(np.float32)
        weight = ir.Value(name=f"w{index}", shape=ir.Shape([64, 64]), type=ir.TensorType(ir.DataType.FLOAT))
        weight.const_value = ir.tensor(array, name=f"w{index}")
        graph.initializers.add(weight)
        node = ir.node("MatMul", [last, weight])
        graph.append(node)
        last = node.outputs[0]
        last.name = name if index else "h"
        last.shape, last.type = ir.Shape(["n", 64]), ir.TensorType(ir.DataType.FLOAT)
    graph.outputs.append(last)
    return ir.Model(graph, ir_version=10)


def export(path: Path, seed: int, data_name: str | None = None) -> None:
    with draft(path, data_name) as file:
        file.write(model(seed), True, lambda done: None)
        file.check()
        file.commit()


def seed_of(path: Path) -> int | None:
    """Which model a file is, to the bit and run; None if there is none."""
    if not path.exists():
        return None
    weights = {n: v.const_value for n, v in ir.load(path).graph.initializers.items()}
    x = np.eye(64, dtype=np.float32)
    found = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    for seed in range(SEEDS):
        wanted = {n: v.const_value for n, v in model(seed).graph.initializers.items()}
        if all(np.array_equal(weights[n].numpy(), w.numpy()) for n, w in wanted.items()):  # type: ignore[union-attr]
            assert np.allclose(found, wanted["w0"].numpy() @ wanted["w1"].numpy(), atol=1e-4)  # type: ignore[union-attr]
            return seed
    raise AssertionError("a mix of two exports")


def contents(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.is_file()}


def forever(path: Path, data_name: str | None) -> None:
    """Export one model after the other."""
    seed = 0
    while True:
        seed = (seed + 1) % SEEDS
        export(path, seed, data_name)


@pytest.mark.parametrize("data_name", [None, "weights.data"], ids=["by content", "by name"])
def test_killed_at_any_moment(data_name: str | None, tmp_path: Path) -> None:
    """Many times, by SIGKILL: the pair there is one export's, run and compared; the next one cleans up what is left."""
    path = tmp_path / "model.onnx"
    chance = random.Random(0)
    export(path, 0, data_name)
    seen, left = set(), 0
    for _ in range(KILLS):
        process = multiprocessing.get_context("fork").Process(target=forever, args=(path, data_name))
        process.start()
        time.sleep(chance.uniform(0.005, 0.08))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        seen.add(seed_of(path))
        left += len(list(tmp_path.iterdir())) > 2
    assert len(seen) > 1
    assert left > 0, "never killed half way"
    export(path, 7, data_name)
    assert seed_of(path) == 7
    assert len(list(tmp_path.iterdir())) == 2


def merged(number: int) -> CapturedModule:
    torch.manual_seed(number)
    layers = nn.Sequential(nn.Linear(64, 256, bias=False), nn.ReLU(), nn.Linear(256, 64, bias=False))
    gm = lorafx.apply(layers, {"r": 2, "target_modules": ["0", "2"]}, (torch.eye(64),)).eval()
    with torch.no_grad():
        for parameter in (p for p in gm.parameters() if p.requires_grad):
            parameter.normal_(std=0.1)
    return gm


def merge_forever(path: Path, graphs: Sequence[CapturedModule], data_name: str | None) -> None:
    for gm in itertools.cycle(graphs):
        lorafx.merge_and_export(gm, path, external_data=True, data_name=data_name)


@pytest.mark.parametrize("data_name", [None, "weights.data"], ids=["by content", "by name"])
def test_killed_at_any_moment_of_merge_and_export(data_name: str | None, tmp_path: Path) -> None:
    """As above, and the whole call: capture, merge, translation, checks and commit."""
    path = tmp_path / "model.onnx"
    chance = random.Random(1)
    graphs = [merged(number) for number in range(2)]
    wanted = [gm(torch.eye(64)).detach().numpy() for gm in graphs]
    lorafx.merge_and_export(graphs[0], path, external_data=True, data_name=data_name)
    seen, left = set(), 0
    for _ in range(KILLS // 2):
        work = (path, graphs[:: chance.choice((1, -1))], data_name)
        process = multiprocessing.get_context("fork").Process(target=merge_forever, args=work)
        process.start()
        time.sleep(chance.uniform(0.2, 1.6))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        (name,) = (i.name for i in session.get_inputs())
        found = session.run(None, {name: np.eye(64, dtype=np.float32)})[0]
        (number,) = (i for i, y in enumerate(wanted) if np.allclose(found, y, atol=1e-5))
        seen.add(number)
        left += len(list(tmp_path.iterdir())) > 2
    assert seen == {0, 1}
    assert left > 0, "never killed half way"
    lorafx.merge_and_export(graphs[0], path, external_data=True, data_name=data_name)
    assert len(list(tmp_path.iterdir())) == 2


def killed_at_rename(path: Path, number: int, seed: int = 2) -> None:
    """Export, and be killed just before this rename of the commit."""
    done, real = itertools.count(), os.replace

    def replace(*arguments: Any) -> None:
        if next(done) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        real(*arguments)

    os.replace = replace  # type: ignore[assignment]
    export(path, seed, "weights.data")


@pytest.mark.parametrize("before", [None, "content", "name"])
@pytest.mark.parametrize("number", [0, 1])
def test_killed_between_the_renames_of_a_fixed_name(before: str | None, number: int, tmp_path: Path) -> None:
    """Whoever looks finds the old pair, or none; the next export succeeds and leaves nothing else."""
    path = tmp_path / "model.onnx"
    if before is not None:
        export(path, 1, "weights.data" if before == "name" else None)
    process = multiprocessing.get_context("fork").Process(target=killed_at_rename, args=(path, number))
    process.start()
    process.join()
    if before == "name" and number == 1:  # the one rename of an equal graph's weights is all
        assert (process.exitcode, seed_of(path)) == (0, 2)
    else:
        assert (process.exitcode, seed_of(path)) == (-signal.SIGKILL, None if before is None else 1)
    export(path, 3, "weights.data")
    assert seed_of(path) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "weights.data"]


@pytest.mark.parametrize("data_name", [None, "weights.data"], ids=["by content", "by name"])
@pytest.mark.parametrize("why", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("number", [0, 1])
def test_interrupted_between_the_renames(
    data_name: str | None, why: type[BaseException], number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was put in its place goes again; the export may simply be repeated."""
    path = tmp_path / "model.onnx"
    done, real = itertools.count(), os.replace

    def replace(*arguments: Any) -> None:
        if next(done) == number:
            raise why
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(ExportError if why is OSError else why):
            export(path, 1, data_name)
    assert list(tmp_path.iterdir()) == []
    export(path, 2, data_name)
    assert seed_of(path) == 2


def test_weights_that_took_the_place_of_a_killed_exports_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    process = multiprocessing.get_context("fork").Process(target=killed_at_rename, args=(path, 1))
    process.start()
    process.join()
    (tmp_path / "weights.data").unlink()
    (tmp_path / "weights.data").write_bytes(b"another's")
    with pytest.raises(ExportError, match=r"weights\.data exists, and .*model\.onnx is not there"):
        export(path, 3, "weights.data")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"weights.data": b"another's"}


@pytest.mark.parametrize("data_name", [None, "weights.data"], ids=["by content", "by name"])
def test_a_session_is_of_one_export(data_name: str | None, tmp_path: Path) -> None:
    """Loaded again and again while another process exports without a pause: never a mix, never weights that are gone.

    That ONNX Runtime by itself has both is shown, too: otherwise this would hold nothing.
    """
    path = tmp_path / "model.onnx"
    x = np.eye(64, dtype=np.float32)
    wanted = [_product(seed) for seed in range(SEEDS)]

    def is_one(session: ort.InferenceSession) -> bool:
        found = session.run(None, {"x": x})[0]
        return any(np.allclose(found, product, atol=1e-4) for product in wanted)

    export(path, 0, data_name)
    process = multiprocessing.get_context("fork").Process(target=forever, args=(path, data_name))
    process.start()
    try:
        seen = 0
        end = time.monotonic() + 60
        while not seen and time.monotonic() < end:
            assert all(is_one(lorafx.open_session(path)) for _ in range(20))
            for _ in range(100):
                whole = False
                with contextlib.suppress(Exception):  # onnxruntime's exceptions share no base class
                    whole = is_one(ort.InferenceSession(path, providers=["CPUExecutionProvider"]))
                seen += not whole
        assert seen, "ONNX Runtime never met a commit"
    finally:
        process.kill()
        process.join()


def test_what_cannot_be_loaded_is_said(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(ExportError, match=r"cannot load .*model\.onnx: "):
        lorafx.open_session(path)
    export(path, 0, "weights.data")
    (tmp_path / "weights.data").unlink()
    with pytest.raises(ExportError, match=r"cannot load .*model\.onnx: .*weights\.data"):
        lorafx.open_session(path)


def _product(seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    first, second = (v.const_value for v in model(seed).graph.initializers.values())
    return np.asarray(first.numpy() @ second.numpy())  # type: ignore[union-attr]


def test_exports_to_one_target_at_once(tmp_path: Path) -> None:
    """Whichever is last, the pair is one export's; nothing of the others stays."""
    path = tmp_path / "model.onnx"
    workers = [multiprocessing.get_context("fork").Process(target=_few, args=(path, first)) for first in (0, 10, 20)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [w.exitcode for w in workers] == [0, 0, 0]
    assert seed_of(path) is not None
    assert len(list(tmp_path.iterdir())) == 2


def _few(path: Path, first: int) -> None:
    for seed in range(first, first + 6):
        export(path, seed)


def test_what_a_living_export_has_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with draft(path) as file:
        file.write(model(1), True, lambda done: None)
        export(path, 2)
        assert file.path.exists()
        file.commit()
    assert seed_of(path) == 1
    assert len(list(tmp_path.iterdir())) == 2


def test_a_session_outlives_the_file(tmp_path: Path) -> None:
    """Sessions that have the old file open go on with it; new ones have the new one."""
    path = tmp_path / "model.onnx"
    export(path, 1, "weights.data")
    x = {"x": np.eye(64, dtype=np.float32)}
    sessions = [ort.InferenceSession(path, providers=["CPUExecutionProvider"]) for _ in range(2)]
    before = sessions[0].run(None, x)[0]
    export(path, 2, "weights.data")
    assert all(np.array_equal(s.run(None, x)[0], before) for s in sessions)
    assert not np.array_equal(ort.InferenceSession(path).run(None, x)[0], before)


@pytest.mark.parametrize("data_name", [None, "weights.data"], ids=["by content", "by name"])
@pytest.mark.parametrize("limit", [700, 20_000], ids=["in the graph", "in the weights"])
@pytest.mark.parametrize("cached", [True, False])
def test_a_full_disk_leaves_the_old_file(
    cached: bool, limit: int, data_name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RLIMIT_FSIZE stands in for the disk: the write that goes beyond fails, by whichever thread it is made."""
    monkeypatch.setattr(uncached, "LIMIT", uncached.LIMIT if cached else 0)
    path = tmp_path / "model.onnx"
    export(path, 1, data_name)
    before = contents(tmp_path)
    message = r"cannot write .*File too large\. Give a path in a folder that .* has room"
    with pytest.raises(ExportError, match=message), room_for(limit):
        export(path, 2, data_name)
    assert contents(tmp_path) == before
    assert seed_of(path) == 1


def test_a_full_disk_leaves_old_adapters_and_reports(tmp_path: Path) -> None:
    """What is not written as a model is: ONNX Runtime writes adapters, and reports are text."""
    gm = lorafx.apply(nn.Sequential(nn.Linear(20, 20)).eval(), {"r": 400, "target_modules": ["0"]}, torch.ones(2, 20))
    lorafx.export_multi(gm, tmp_path / "tasks.onnx", {"a": "default"}, verify=False)
    report = lorafx.merge_and_export(gm, tmp_path / "model.onnx", verify=False)
    report.save_json(tmp_path / "report.json")
    before = contents(tmp_path)
    with torch.no_grad():
        for parameter in (p for p in gm.parameters() if p.requires_grad):
            parameter.add_(1.0)
    with pytest.raises(ExportError, match=r"cannot write a\.onnx_adapter, of 62\.5 KiB.* has room"), room_for(20_000):
        lorafx.export_multi(gm, tmp_path / "tasks.onnx", {"a": "default"}, verify=False)
    with pytest.raises(ExportError, match=r"cannot write .*report\.json: File too large"), room_for(10):
        report.save_json(tmp_path / "report.json")
    assert contents(tmp_path) == before


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """Also for root, for whom permissions mean nothing: a folder of the system that takes no files."""
    for folder, why in ((tmp_path / "missing", "No such file or directory"), (Path("/proc/self"), "")):
        if folder.parent.exists():
            with pytest.raises(
                ExportError, match=rf"cannot write .*{why}.*Give a path in a folder that exists, may be"
            ):
                export(folder / "model.onnx", 1)
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_a_value_is_the_one_that_is_raised(tmp_path: Path) -> None:
    """And ends the thread that writes."""
    broken = model(1)

    def fail() -> ir.TensorProtocol:
        raise ValueError("no such weight")

    value = broken.graph.initializers["w1"]
    value.const_value = ir.LazyTensor(fail, dtype=ir.DataType.FLOAT, shape=ir.Shape([64, 64]), name="w1")
    before = threading.active_count()
    for external in (True, False):
        with pytest.raises(ValueError, match="no such weight"), draft(tmp_path / "model.onnx") as file:
            file.write(broken, external, lambda done: None)
    assert threading.active_count() == before
    assert list(tmp_path.iterdir()) == []
