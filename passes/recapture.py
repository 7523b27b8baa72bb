"""The model's own code captured once more, in another precision.

    W: float32 parameter                               W: bfloat16
    h = to(x, float32)     # x.to(torch.float32)  ->   h = to(x, float32)
    y = to(h, float32)     # h.to(input_dtype)         y = to(h, bfloat16)

A float32 graph does not tell a dtype that the code names from one that it asks something for. The code does, wherever
the dtype comes from, and what it does in one precision only (``if x.dtype == torch.float16: clamp``) is there too.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from lorafx.errors import CaptureError, ExportError, FixedDimensionWarning
from lorafx.graph import CapturedModule, named_tensors, rebind
from lorafx.passes.capture import capture
from lorafx.passes.original import blank_like, original_of


def recaptured(gm: CapturedModule, dtype: torch.dtype) -> CapturedModule:
    """What the model that ``gm`` was captured from gives, converted first; its weights hold no values.

    Where the code does something in float16 only that depends on values (BART looks for infinities), it is what the
    code does in bfloat16, in float16; ``meta["note"]`` then says so.

    Args:
        gm: a graph without adapters; not changed.
        dtype: the precision of weights and floating inputs.

    Raises:
        ExportError: the code does not run in it, or ``gm`` was in a pickle and no longer knows its model.
    """
    try:
        return _captured_in(gm, dtype)
    except CaptureError as error:
        if dtype is torch.float16:
            with suppress(CaptureError):
                twin = _as_float16(_captured_in(gm, torch.bfloat16))
                twin.meta["note"] = (
                    f"what the model's code does in float16 only cannot be captured, and is left out: {error}"
                )
                return twin
        raise ExportError(
            f"dtype={dtype}: the model's code cannot be captured in it: {error}. Choose another dtype"
        ) from error


def _captured_in(gm: CapturedModule, dtype: torch.dtype) -> CapturedModule:
    original = original_of(gm, f"dtype={dtype}")
    model, call = original.filled(gm, dtype), original.call
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FixedDimensionWarning)  # said when gm was captured
        return capture(model, call.inputs(dtype, device), dynamic_shapes=call.dynamic_shapes).eval()


def _as_float16(twin: CapturedModule) -> CapturedModule:
    """A graph of bfloat16, which is then the dtype of something, in float16. In place."""
    old, new = torch.bfloat16, torch.float16
    swaps = [
        (old, new),
        *((getattr(torch.finfo(old), n), getattr(torch.finfo(new), n)) for n in ("min", "max", "tiny")),
    ]

    def swap(value: Any) -> Any:
        return next((b for a, b in swaps if type(value) is type(a) and value == a), value)

    for node in _nodes(twin):
        args, kwargs = map_aggregate(node.args, swap), map_aggregate(node.kwargs, swap)
        assert isinstance(args, tuple)
        assert isinstance(kwargs, dict)
        node.args, node.kwargs = args, kwargs
    weights = {id(t) for t in twin.state_dict(keep_vars=True).values()}
    for tensor in {id(t): t for _, t in named_tensors(twin)}.values():
        if tensor.dtype is old:
            rebind(twin, tensor, blank_like(tensor, new) if id(tensor) in weights else tensor.detach().to(new))
    twin.recompile()
    return twin


def _nodes(twin: CapturedModule) -> Iterator[Node]:
    for module in twin.modules():
        if isinstance(module, GraphModule):
            yield from module.graph.nodes
