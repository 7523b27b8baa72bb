"""A graph in another precision: what the model, converted before it was captured, would have given.

    W: float32 parameter                               W: bfloat16
    h = to(x, float32)     # x.to(torch.float32)  ->   h = to(x, float32)
    y = to(h, float32)     # h.to(input_dtype)         y = to(h, bfloat16)

A capture has dtypes where the model's code may have asked for the dtype of something. In a half-precision graph its own
dtype is that of something; in a float32 graph the line of code tells, with what its function assigns to the variables
in it, or the cast is refused.
"""

from __future__ import annotations

import ast
import linecache
import re
import textwrap
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from lorafx.errors import ExportError
from lorafx.graph import CapturedModule, get_path, named_tensors, rebind, share

#: The precisions that a file can have, by what one may call them.
DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
}
_CASTS = frozenset({"to", "float", "half", "bfloat16", "double", "type", "type_as", "_to_copy"})
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
aten = torch.ops.aten


def file_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype meant.

    Raises:
        ExportError: it is none that a file's weights can have.
    """
    found = DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in DTYPES.values():
        raise ExportError(f"dtype={dtype!r} is none of {', '.join(map(repr, DTYPES))}, or the torch.dtype of that name")
    return found


def weights_dtype(gm: CapturedModule) -> torch.dtype | None:
    """The one floating dtype of the graph's weights; None where it has none, or several."""
    weights = gm.state_dict()
    found = {t.dtype for t in weights.values() if t.is_floating_point()}
    return found.pop() if len(found) == 1 else None


def cast_graph(gm: CapturedModule, dtype: torch.dtype) -> CapturedModule:
    """A graph for inference as that of the model in another precision; its weights hold no values, and take no memory.

    What its code does in one precision only (``if x.dtype == torch.float16: clamp``) is as in the captured one.
    Buffers that are computed, not saved, keep their dtype under a float32 model, as ``from_pretrained(dtype=...)`` has
    it; those of a half-precision model are converted with it.

    Raises:
        ExportError: the weights have several dtypes; or a node's dtype may or may not be the weights' (names the line).
    """
    old = weights_dtype(gm)
    if old is dtype:
        return gm
    if old is None:
        raise ExportError(
            f"dtype={dtype}: the model's weights have several dtypes, so it is open which of its casts are to change. "
            "Convert the model and apply again"
        )
    twin = share(gm)
    for node in twin.graph.nodes:
        if node.target is aten._assert_tensor_metadata.default or not (node.users or node.op == "output"):
            continue  # states the dtype it was traced with; or is left of the loss
        if any(a is old for a in _atoms(node)) and not (old.itemsize >= 4 and _asks_for(node, old, dtype)):
            _replace(node, old, dtype)
        _replace_limits(node, old, dtype)
    for node in [n for n in twin.graph.nodes if n.target is aten._assert_tensor_metadata.default]:
        twin.graph.erase_node(node)
    kept = {id(t) for t in gm.state_dict(keep_vars=True).values()}
    inside = {s for g in twin.modules() if isinstance(g, GraphModule) and g is not twin for s in g.modules()}
    if any(n.op == "call_module" for n in twin.graph.nodes) or any(t.dtype is old for s in inside for t in s.buffers()):
        raise ExportError(f"dtype={dtype}: the graph calls modules whole. Convert the model and apply again")
    for name, tensor in list(named_tensors(twin)):
        if get_path(twin, name) is tensor and tensor.dtype is old and (id(tensor) in kept or old.itemsize < 4):
            value = _like(tensor, dtype) if id(tensor) in kept else tensor.detach().to(dtype)
            rebind(twin, tensor, value)
    twin.recompile()
    return twin


def _like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor that nobody reads or writes: its memory is asked for and never touched."""
    return torch.empty(tensor.shape, dtype=dtype, device=tensor.device)


def _atoms(node: Node) -> Iterator[Any]:
    found: list[Any] = []
    map_aggregate((node.args, node.kwargs), lambda a: found.append(a))
    return iter(found)


def _replace(node: Node, old: Any, new: Any) -> None:
    def swap(value: Any) -> Any:
        return new if type(value) is type(old) and value == old else value

    args, kwargs = map_aggregate(node.args, swap), map_aggregate(node.kwargs, swap)
    assert isinstance(args, tuple)
    assert isinstance(kwargs, dict)
    node.args, node.kwargs = args, kwargs


def _replace_limits(node: Node, old: torch.dtype, new: torch.dtype) -> None:
    """The least and largest numbers of a dtype, which masks are filled with, do not fit into another."""
    for name in ("min", "max"):
        _replace(node, getattr(torch.finfo(old), name), getattr(torch.finfo(new), name))


def _asks_for(node: Node, old: torch.dtype, new: torch.dtype) -> bool:
    """Whether the line of code that a node comes from names the dtype, or else asks for that of something.

    Raises:
        ExportError: it does both, or the line does not tell.
    """
    trace = node.meta.get("stack_trace") or ""
    line = (trace.strip().splitlines() or [""])[-1].strip()
    casts, others = _dtypes_of(line, str(old).removeprefix("torch."), _assigned(trace))
    is_cast = str(node.target).removeprefix("aten.").partition(".")[0] in _CASTS
    named = casts if is_cast or not others else others
    if set(named) in ({True}, {False}):
        return bool(named[0])
    raise ExportError(
        f"dtype={new}: '{line or node.name}' casts to {old}, which may be what it names or the model's own dtype. "
        f"Convert the model (model.to({new})), apply and load the adapter there; adapters stay in float32"
    )


def _dtypes_of(
    line: str, name: str, assigned: Mapping[str, list[ast.expr]]
) -> tuple[list[bool | None], list[bool | None]]:
    """For each dtype in a line of code whether it is named (None: open); for those of casts, and of other calls."""
    try:
        tree = ast.parse(textwrap.dedent(line).rstrip(":"))
    except SyntaxError:  # a part of a statement
        return [], []
    known = {name, "float" if name == "float32" else name}

    def names(node: ast.expr) -> bool | None:
        if isinstance(node, ast.Name):
            told = {v.attr if isinstance(v, ast.Attribute) else "" for v in assigned.get(node.id, ())}
        else:
            told = {node.attr} if isinstance(node, ast.Attribute) else set()
        if not told:
            return None
        return True if told <= known else False if told == {"dtype"} else None

    casts: list[bool | None] = []
    others: list[bool | None] = []
    for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
        function = call.func.attr if isinstance(call.func, ast.Attribute) else ""
        given = [*call.args, *(k.value for k in call.keywords if k.arg == "dtype")]
        if function in ("float", "type_as"):
            casts.append(function == "float")
        elif function in _CASTS:
            found = [names(value) for value in given if not _is_elsewhere(value)]
            # Where only a device is given, the dtype stays what it is.
            casts.append(next((f for f in found if f is not None), None) if found else False)
        elif dtype := next((k.value for k in call.keywords if k.arg == "dtype"), None):
            others.append(names(dtype))
    return casts, others


def _is_elsewhere(argument: ast.expr) -> bool:
    """Whether an argument of a cast is a device, or a flag."""
    name = argument.attr if isinstance(argument, ast.Attribute) else getattr(argument, "id", None)
    return name == "device" or isinstance(argument, ast.Constant)


def _assigned(trace: str) -> dict[str, list[ast.expr]]:
    """What the function that a trace ends in assigns to each of its variables, as far as its source is there."""
    frames = _FRAME.findall(trace)
    if not frames:
        return {}
    file, number = frames[-1]
    inside = [f for f in _functions(file) if f.lineno <= int(number) <= (f.end_lineno or f.lineno)]
    found: dict[str, list[ast.expr]] = {}
    for node in ast.walk(max(inside, key=lambda f: f.lineno)) if inside else ():
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    found.setdefault(target.id, []).append(node.value)
    return found


@cache
def _functions(file: str) -> list[ast.FunctionDef]:
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:  # the source has changed, or is none
        return []
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
