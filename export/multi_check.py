"""What an export of many tasks checks of its drafts: what the files hold, and each adapter, and none, beside torch.

model, adapters --read--> what was to be written? --> ONNX Runtime = torch: outputs, or tokens where there is a cache?
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from lorafx.errors import ParityError
from lorafx.export.adapter_file import load_adapter_file, write_adapter
from lorafx.export.commit import Draft
from lorafx.export.decoder import Continued, continue_prompts, make_prompts
from lorafx.export.example import flat_example
from lorafx.export.job import Job
from lorafx.export.parity import Session, Tolerance, make_cases
from lorafx.export.report import Parity
from lorafx.export.translate import Translation
from lorafx.export.verify import Runtime, check_weights, compare_numbers, open_runtime
from lorafx.export.widen import widen_graph
from lorafx.graph import CapturedModule
from lorafx.passes.decoder import longest_sequence
from lorafx.passes.inference import inference


@dataclass(frozen=True)
class TaskDraft:
    """A task's file before it gets its name: ``graph`` has its adapter active alone, it is to hold ``values``."""

    name: str
    graph: CapturedModule
    values: Mapping[str, ir.TensorProtocol]
    path: Path


@dataclass
class Checked:
    """What was found: of each check what people are told, and the runs of each task (None: without an adapter)."""

    checks: dict[str, str] = field(default_factory=dict)
    parity: dict[str | None, tuple[Parity, ...]] = field(default_factory=dict)


def check_tasks(
    job: Job,
    translation: Translation,
    file: Draft,
    tasks: Sequence[TaskDraft],
    tolerance: Tolerance,
    progress: Callable[[float], None],
) -> Checked:
    """Hold drafts to what they were made of, and what ONNX Runtime makes of them to torch.

    Args:
        job: what was exported.
        translation: the model, its weights filled in.
        file: the base.
        tasks: the adapters.
        tolerance: how far numbers may be off.
        progress: called with the share of the adapters that is done.

    Raises:
        ParityError: the first that fails.
        ExportError: ONNX Runtime or torch cannot run what there is.
    """
    found = Checked()
    count = check_weights(ir.load(file.path), translation.model)
    for task in tasks:
        _check_values(task)
    found.checks["same weights"] = f"{count} initializers in the file, to the bit, and all that adapters hold"
    base = inference(job.written)
    runtime = open_runtime(file.path, widen_graph(base) if job.is_cast else base, job.dtype, file.path.parent)
    compare = (_Numbers if job.captured.step is None else _Tokens)(job, translation, base)
    found.parity[None] = compare(replace(runtime, reference="base"), tolerance)
    for done, task in enumerate(tasks, 1):
        progress(done / (len(tasks) + 1))
        twin = runtime.note is not None
        graph = inference(task.graph)
        graph = widen_graph(graph) if twin or job.is_cast else graph
        with _active(runtime.session, _widened(task) if twin else task.path):
            found.parity[task.name] = compare(
                replace(runtime, graph=graph, reference=f"adapter '{task.name}'"), tolerance
            )
    found.checks |= compare.told
    if runtime.note is not None:
        found.checks["not run"] = runtime.note
    return found


class _Comparison(Protocol):
    """How a file is run beside torch, with whatever adapter is active in both."""

    def __call__(self, runtime: Runtime, tolerance: Tolerance) -> tuple[Parity, ...]: ...

    @property
    def told(self) -> Mapping[str, str]:
        """All that was compared, for people."""


class _Numbers(_Comparison):
    """Outputs, at several sizes."""

    def __init__(self, job: Job, translation: Translation, base: CapturedModule) -> None:
        self.cases = make_cases(job.example.compared, translation.dims, base.signature.ranges)
        self.agreed = 0

    def __call__(self, runtime: Runtime, tolerance: Tolerance) -> tuple[Parity, ...]:
        found = compare_numbers(runtime, self.cases, tolerance, lambda done: None)
        self.agreed += sum(p.refused is None for p in found)
        return found

    @property
    def told(self) -> Mapping[str, str]:
        return {"same numbers": f"{self.agreed} runs agree with torch, without an adapter and with each"}


class _Tokens(_Comparison):
    """Prompts, continued greedily with the cache."""

    def __init__(self, job: Job, translation: Translation, base: CapturedModule) -> None:
        given = flat_example(base.signature, job.trained.meta.get("example"), job.settings.example_inputs)
        self.prompts = make_prompts(given, longest_sequence(job.trained))
        self.found: list[Continued] = []

    def __call__(self, runtime: Runtime, tolerance: Tolerance) -> tuple[Parity, ...]:
        found = continue_prompts(runtime, self.prompts, tolerance, lambda done: None)
        self.found.append(found)
        return found.parity

    @property
    def told(self) -> Mapping[str, str]:
        all_of_them = Continued((), sum(f.same for f in self.found), sum(f.count for f in self.found))
        return {"same tokens": f"{all_of_them.text}; without an adapter and with each"}


@contextmanager
def _active(session: Session, adapter: Path) -> Iterator[None]:
    """Runs of a session with an adapter."""
    loaded = ort.LoraAdapter()  # which run options refer to, and do not keep
    loaded.Load(str(adapter))
    session.run_options = ort.RunOptions()
    session.run_options.add_active_adapter(loaded)
    try:
        yield
    finally:
        session.run_options = None


def _widened(task: TaskDraft) -> Path:
    """An adapter for the float32 twin."""
    wide = {
        name: ir.tensor(t.numpy().astype(np.float32)) if t.dtype.is_floating_point() else t
        for name, t in task.values.items()
    }
    return write_adapter(task.path.with_name(f"twin_{task.path.name}"), wide, 0)


def _check_values(task: TaskDraft) -> None:
    """Hold what a file has to what was to be written, bit for bit."""
    found = load_adapter_file(task.path)
    held = task.values
    if set(found.values) != set(held) or any(found.data(name) != value.tobytes() for name, value in held.items()):
        raise ParityError(f"the file of '{task.name}' does not hold what was written to it")
