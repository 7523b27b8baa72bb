"""A graph in another precision: what the model, converted before it was captured, would have given.

    recaptured code + the places of the graph's weights  ->  the graph that is written

Its weights hold no values: they are rounded once, from the graph's, while the file is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from lorafx.errors import ExportError
from lorafx.export.run import Run
from lorafx.export.settings import Settings
from lorafx.graph import CapturedModule, get_path, named_tensors, set_tensor, share
from lorafx.ir import Stage, stage
from lorafx.passes.decoder import capture_decoder
from lorafx.passes.layers import find_operands, readers
from lorafx.passes.merge import read_instead, unadapted
from lorafx.passes.original import blank_like
from lorafx.passes.recapture import recaptured

aten = torch.ops.aten
#: What a precision has more or less of than another: casts, and what states the dtype it was traced with.
_OF_DTYPES = frozenset({"to", "_to_copy", "type_as", "_assert_tensor_metadata", "detach_", "float", "half", "bfloat16"})


def weights_dtype(gm: CapturedModule) -> torch.dtype | None:
    """The one floating dtype of the graph's weights; None where it has none, or several."""
    found = {t.dtype for t in gm.state_dict().values() if t.is_floating_point()}
    return found.pop() if len(found) == 1 else None


class Captures(NamedTuple):
    """What an export may need beside the graph, each if it does: a step with a cache; what is written, in its dtype."""

    step: CapturedModule | None = None
    twin: CapturedModule | None = None


def captures(gm: CapturedModule, settings: Settings, run: Run) -> Captures:
    """Trace the model's code once more, where the settings ask for another graph than ``gm``.

    Raises:
        ExportError, CaptureError: the model's code cannot be captured so.
    """
    kv_cache, dtype = settings.kv_cache, settings.precision
    if not kv_cache and dtype is None:
        return Captures()
    with run.phase("capture"):
        return Captures(capture_decoder(gm) if kv_cache else None, capture_in(gm, dtype, kv_cache=kv_cache))


def capture_in(gm: CapturedModule, dtype: torch.dtype | None, *, kv_cache: bool = False) -> CapturedModule | None:
    """The model that ``gm`` was captured from in another precision, as a step with a cache if asked for.

    None where ``gm`` is in this precision.

    Raises:
        ExportError, CaptureError: the weights have several dtypes; or the code cannot be captured so.
    """
    base = unadapted(gm) if stage(gm) is Stage.INSERTED else gm
    old = weights_dtype(base)
    if dtype in (None, old):
        return None
    assert dtype is not None
    if old is None:
        raise ExportError(
            f"dtype={dtype}: the model's weights have several dtypes, so it is open which of them are to change. "
            "Convert the model and apply again"
        )
    return (capture_decoder if kv_cache else recaptured)(base, dtype)


def cast_graph(plain: CapturedModule, twin: CapturedModule) -> CapturedModule:
    """The graph of ``twin`` over weights like those of ``plain``: the same names, ties and calls that read them.

    Args:
        plain: a graph for inference without adapters.
        twin: :func:`capture_in` in another precision, for inference.

    Raises:
        ExportError: ``plain`` does something else than the model's code; names the first difference.
    """
    dtype = weights_dtype(twin)
    assert dtype is not None
    _check_same(plain, twin, dtype)
    result = share(twin)
    blank: dict[int, Tensor] = {}
    for name, tensor in named_tensors(plain):
        if not is_computed(plain, name) and tensor.is_floating_point():
            set_tensor(result, name, blank.setdefault(id(tensor), blank_like(tensor, dtype)))
    calls = {node.name: node for node in result.graph.nodes}
    known = {name for name, _ in named_tensors(twin)}
    for read in plain.graph.find_nodes(op="get_attr"):
        for reader in readers(read) if read.target not in known else ():  # kept apart from the weight's other use
            operands = find_operands(calls[reader.name])
            assert operands is not None
            calls[reader.name].replace_input_with(operands.weight, read_instead(operands.weight, str(read.target)))
    for node in [n for n in result.graph.nodes if n.target is aten._assert_tensor_metadata.default]:
        result.graph.erase_node(node)
    result.recompile()
    return result


def is_computed(gm: CapturedModule, name: str) -> bool:
    """Whether a tensor is none of the weights: a constant, or a buffer that is not saved."""
    path, _, leaf = name.rpartition(".")
    return leaf in gm.get_submodule(path)._non_persistent_buffers_set


def written_source(plain: CapturedModule, graph: CapturedModule, name: str) -> Tensor:
    """What a tensor of the graph that is written is made of: weights are those of ``plain``."""
    found: Tensor = get_path(graph if is_computed(graph, name) else plain, name)
    return found


def _check_same(plain: CapturedModule, twin: CapturedModule, dtype: torch.dtype) -> None:
    """Hold a graph to its model's code: a precision of half the width may have what is done in it only."""
    wide = (weights_dtype(plain) or torch.float32).itemsize >= torch.float32.itemsize
    few, many = (plain, twin) if wide else sorted((plain, twin), key=lambda gm: len([*_calls(gm)]))
    rest = iter([str(node.target) for node in _calls(many)])
    for node in _calls(few):
        if str(node.target) not in rest:
            raise ExportError(
                f"dtype={dtype}: the graph is no longer that of the model's code, which it is captured from once more "
                f"in this precision: '{node.name}' has no counterpart. Convert the model (model.to({dtype})), apply "
                "and load the adapter there, and edit that graph"
            )


def _calls(gm: CapturedModule) -> Iterator[Node]:
    for node in gm.graph.nodes:
        name = str(node.target).removeprefix("aten.").partition(".")[0]
        if node.op.startswith("call") and name not in _OF_DTYPES:
            yield node
