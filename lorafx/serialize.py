"""A graph as plain data, so that a captured module can be pickled.

``torch.fx`` pickles generated code and traces it again, which loses metadata; here every node is
written as data and made again as it was. Operators are stored by name, functions by module and name.
Shapes seen while tracing (fake tensors) are not stored.
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from lorafx.errors import PassError


@dataclass(frozen=True)
class NodeRef:
    """Stands for a node among another node's arguments."""

    name: str


@dataclass(frozen=True)
class NodeRecord:
    """One node: what :meth:`torch.fx.Graph.create_node` needs, and the metadata that is kept."""

    op: str
    name: str
    target: str
    args: Any
    kwargs: Any
    meta: dict[str, Any]


@dataclass(frozen=True)
class GraphRecord:
    """A whole graph as data."""

    nodes: tuple[NodeRecord, ...]

    @classmethod
    def from_graph(cls, graph: Graph) -> GraphRecord:
        """Write down a graph.

        Raises:
            PassError: a node calls something that has no importable name.
        """
        records = []
        for node in graph.nodes:
            target = node.target if isinstance(node.target, str) else target_name(node.target)
            kept = {k: node.meta[k] for k in ("custom", "stack_trace") if k in node.meta}
            args, kwargs = (map_aggregate(v, _refer) for v in (node.args, node.kwargs))
            records.append(
                NodeRecord(node.op, node.name, target, plain_containers(args), plain_containers(kwargs), kept)
            )
        return cls(tuple(records))

    def to_graph(self) -> Graph:
        """Make the graph again, with the same node names."""
        graph = Graph()
        made: dict[str, Node] = {}
        for record in self.nodes:
            target: Any = record.target
            if record.op == "call_function":
                target = find_target(record.target)
            args, kwargs = (_resolve(v, made) for v in (record.args, record.kwargs))
            node = graph.create_node(record.op, target, args, kwargs, name=record.name)
            node.meta.update(record.meta)
            made[record.name] = node
        return graph


def _refer(value: Any) -> Any:
    return NodeRef(value.name) if isinstance(value, Node) else value


def plain_containers(value: Any) -> Any:
    """fx's immutable containers as ordinary ones."""
    if isinstance(value, dict):
        return {k: plain_containers(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        if hasattr(value, "_fields"):
            return type(value)(*(plain_containers(v) for v in value))
        return (tuple if isinstance(value, tuple) else list)(plain_containers(v) for v in value)
    return value


def _resolve(value: Any, made: dict[str, Node]) -> Any:
    if isinstance(value, NodeRef):
        return made[value.name]
    if isinstance(value, dict):
        return {k: _resolve(v, made) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_resolve(v, made) for v in value]
        if hasattr(value, "_fields"):
            return type(value)(*items)
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, slice):
        return slice(*(_resolve(v, made) for v in (value.start, value.stop, value.step)))
    return value


def spec_to_plain(spec: pytree.TreeSpec) -> Any:
    """A tree of containers as nested tuples; None for a leaf (torch warns where its leaves are copied)."""
    if spec.is_leaf():
        return None
    return spec.type, spec.context, [spec_to_plain(spec.child(i)) for i in range(spec.num_children)]


def spec_from_plain(plain: Any) -> pytree.TreeSpec:
    """The inverse of :func:`spec_to_plain`."""
    if plain is None:
        return pytree.treespec_leaf()
    kind, context, children = plain
    return pytree.TreeSpec(kind, context, [spec_from_plain(child) for child in children])


def target_name(target: Callable[..., Any]) -> str:
    """A stable name of a node's target: ``ops:aten.linear.default`` or ``module:name``.

    Raises:
        PassError: the name does not lead back to the target.
    """
    if isinstance(target, torch._ops.OpOverload):
        return f"ops:{target}"
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"ops:higher_order.{target}"
    module = getattr(target, "__module__", "") or ""
    name = getattr(target, "__qualname__", getattr(target, "__name__", ""))
    for candidate in (module, operator.__name__, "torch", "torch._C"):
        try:
            if _attribute(importlib.import_module(candidate), name) is target:
                return f"{candidate}:{name}"
        except (ImportError, AttributeError, ValueError):
            continue
    raise PassError(f"pickle: the graph calls {target!r}, which has no importable name; define it at module level")


def find_target(text: str) -> Callable[..., Any]:
    """The inverse of :func:`target_name`."""
    scheme, _, path = text.partition(":")
    root: Any = torch.ops if scheme == "ops" else importlib.import_module(scheme)
    found: Callable[..., Any] = _attribute(root, path)
    return found


def _attribute(root: Any, path: str) -> Any:
    for atom in path.split("."):
        root = getattr(root, atom)
    return root
