"""How many weights are dense at once."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def most_dense(call: Callable[[], object], weight: int) -> float:
    """How many weights of so many bytes the tensors of a weight's size came to that were there at once."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    assert found.profiler is not None
    events: Any = found.profiler.kineto_results
    changes = sorted((e.start_ns(), e.nbytes()) for e in events.events() if e.name() == "[memory]")
    assert len(changes) > 50
    live = most = 0
    for _, size in changes:
        if abs(size) > weight // 2:
            live += size
            most = max(most, live)
    return most / weight
