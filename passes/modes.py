"""Two captures of one model, in train and in eval mode, become one graph that follows the mode.

    train:  d = dropout(x, 0.1, True)           one:  m = <encoder.dropout>            # the module
    eval:   d = dropout(x, 0.1, False)                f = by_mode(m, True, False)
                                                      d = dropout(x, 0.1, f)

The train capture is the superset. Where the eval capture lacks a node that only moves data
(``contiguous``), the node stays; a dropout it lacks is switched off; an update of a buffer is by nothing.
Anything else that differs is refused, and the first difference named.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from lorafx.errors import CaptureError
from lorafx.graph import ROOT_MODE, annotate, by_mode, notes
from lorafx.passes.frontends import Trace

aten = torch.ops.aten

#: Operators that change how values lie in memory, never the values.
LAYOUT_ONLY = frozenset(
    {
        aten.contiguous.default,
        aten.clone.default,
        aten.alias.default,
        aten.detach.default,
        aten.lift_fresh_copy.default,
    }
)
ACCUMULATE = (aten.add_.Tensor, operator.iadd)
_LITERALS = (bool, int, float, type(None))


@dataclass
class _Alignment:
    """``twin`` maps each eval node to its train node; ``flips`` are literals that differ by mode."""

    train: Trace
    evaluated: Trace
    twin: dict[Node, Node] = field(default_factory=dict)
    flips: list[tuple[Node, str | int, Any, Any]] = field(default_factory=list)


def align(train: Trace, evaluated: Trace) -> None:
    """Make ``train``'s graph follow the mode, in place.

    Raises:
        CaptureError: the modes differ in more than what can be switched.
    """
    state = _Alignment(train, evaluated)
    t_nodes, e_nodes = (_operations(t.graph) for t in (train, evaluated))
    t_index = e_index = 0
    while t_index < len(t_nodes) or e_index < len(e_nodes):
        t = t_nodes[t_index] if t_index < len(t_nodes) else None
        e = e_nodes[e_index] if e_index < len(e_nodes) else None
        if t is not None and e is not None and (flips := _same(state, t, e)) is not None:
            state.twin[e] = t
            state.flips.extend(flips)
            t_index, e_index = t_index + 1, e_index + 1
        elif t is not None and _switch_off(state, t):
            t_index += 1
        elif e is not None and e.target in LAYOUT_ONLY:
            state.twin[e] = _resolve(state, e.args[0])
            e_index += 1
        else:
            raise _irreconcilable(t, e)
    _insert_switches(train.graph, state.flips)


def _operations(graph: Graph) -> list[Node]:
    return [n for n in graph.nodes if n.op not in ("placeholder", "get_attr")]


def _resolve(state: _Alignment, node: Any) -> Any:
    return state.twin.get(node, node)


def _through_layout(node: Node) -> Iterator[Node]:
    """The node, and what it copies if it only moves data: any of them stands for the same value."""
    yield node
    while node.target in LAYOUT_ONLY or notes(node).get("off_in_eval"):
        node = node.args[0]  # type: ignore[assignment]
        yield node


def _same(state: _Alignment, t: Node, e: Node) -> list[tuple[Node, str | int, Any, Any]] | None:
    """None if the nodes are different computations, else the literals in which they differ."""
    if t.op != e.op or t.target != e.target:
        return None
    t_args, e_args = _named_arguments(t), _named_arguments(e)
    if t_args.keys() != e_args.keys():
        return None
    flips: list[tuple[Node, str | int, Any, Any]] = []
    for key, (t_value, place) in t_args.items():
        e_value, _ = e_args[key]
        if _equal(state, t_value, e_value):
            continue
        if isinstance(t_value, _LITERALS) and isinstance(e_value, _LITERALS):
            flips.append((t, place, t_value, e_value))
            continue
        return None
    return flips


def _named_arguments(node: Node) -> dict[str | int, tuple[Any, str | int]]:
    """Arguments by name with defaults filled in, and where in the node each one is written."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        named: dict[str | int, tuple[Any, str | int]] = {i: (a, i) for i, a in enumerate(node.args)}
        return named | {k: (v, k) for k, v in node.kwargs.items()}
    named = {}
    for index, argument in enumerate(schema.arguments):
        if index < len(node.args):
            named[argument.name] = (node.args[index], index)
        else:
            value = node.kwargs.get(argument.name, argument.default_value)
            named[argument.name] = (value, argument.name)
    return named


def _equal(state: _Alignment, t: Any, e: Any) -> bool:
    if isinstance(t, Node) and isinstance(e, Node):
        if e.op == "get_attr":
            return t.op == "get_attr" and _same_attribute(state, t, e)
        if e.op == "placeholder":
            return any(n.op == "placeholder" and n.target == e.target for n in _through_layout(t))
        return _resolve(state, e) in set(_through_layout(t)) or t in set(_through_layout(_resolve(state, e)))
    if isinstance(t, (list, tuple)) and isinstance(e, (list, tuple)):
        return len(t) == len(e) and all(_equal(state, a, b) for a, b in zip(t, e, strict=True))
    if isinstance(t, dict) and isinstance(e, dict):
        return t.keys() == e.keys() and all(_equal(state, t[k], e[k]) for k in t)
    if isinstance(t, slice) and isinstance(e, slice):
        return all(_equal(state, getattr(t, k), getattr(e, k)) for k in ("start", "stop", "step"))
    return type(t) is type(e) and bool(t == e)


def _same_attribute(state: _Alignment, t: Node, e: Node) -> bool:
    values = [_maybe_attribute(s.holder, str(n.target)) for s, n in ((state.train, t), (state.evaluated, e))]
    if isinstance(values[0], GraphModule) and isinstance(values[1], GraphModule):
        return values[0].code == values[1].code
    if all(isinstance(v, torch.Tensor) for v in values) and t.target != e.target:
        return _is_constant(t) and _is_constant(e) and torch.equal(*values)
    return t.target == e.target


def _is_constant(node: Node) -> bool:
    """Whether torch.export lifted this tensor from the model's code (it numbers such by appearance)."""
    return "." not in str(node.target) and str(node.target).startswith(("lifted_tensor", "_tensor_constant"))


def _maybe_attribute(root: nn.Module, path: str) -> Any:
    value: Any = root
    for atom in path.split("."):
        value = getattr(value, atom, None)
    return value


def _switch_off(state: _Alignment, t: Node) -> bool:
    """Whether a node only the train mode has can be switched off in eval; if so, it is."""
    named = _named_arguments(t) if t.op == "call_function" else {}
    if t.target in LAYOUT_ONLY:
        return True
    if t.target is aten.dropout.default and named["train"][0] is True:
        annotate(t, off_in_eval=True)
        state.flips.append((t, named["train"][1], True, False))
        return True
    target = t.args[0] if t.args else None
    updates_buffer = t.target in ACCUMULATE and isinstance(target, Node) and target.op == "get_attr"
    if updates_buffer and isinstance(t.args[1], (int, float)):
        state.flips.append((t, 1, t.args[1], type(t.args[1])(0)))
        return True
    return False


def _insert_switches(graph: Graph, flips: list[tuple[Node, str | int, Any, Any]]) -> None:
    scopes: dict[str, Node] = {}
    for node, place, if_train, if_eval in flips:
        path = notes(node).get("scope", "")
        with graph.inserting_before(node):
            if path not in scopes:
                scopes[path] = scope_node(graph, path)
            value = graph.call_function(by_mode, (scopes[path], if_train, if_eval))
        if isinstance(place, int):
            node.update_arg(place, value)
        else:
            node.update_kwarg(place, value)


def scope_node(graph: Graph, path: str) -> Node:
    """A node for the module at ``path``, placed after the inputs; an existing one is used again."""
    target = path or ROOT_MODE
    existing: Node
    for existing in graph.find_nodes(op="get_attr"):
        if existing.target == target:
            return existing
    with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
        return graph.create_node("get_attr", target, name=target.replace(".", "_") + "_module")


def _irreconcilable(t: Node | None, e: Node | None) -> CaptureError:
    def show(node: Node | None) -> str:
        if node is None:
            return "nothing"
        scope = notes(node).get("scope") or "the model's own forward"
        lines = [line for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
        code = f", `{lines[-1].strip()}`" if lines else ""
        return f"{node.target} (in {scope}{code})"

    return CaptureError(
        f"train and eval mode compute different things. First difference: train has {show(t)}, eval has {show(e)}. "
        "Make the model's code do the same in both modes but for dropout and buffer updates, or set the "
        "configuration field behind it (such as layerdrop) to 0"
    )
