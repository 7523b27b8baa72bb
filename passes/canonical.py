"""Bring a trace into lorafx's canonical form. Every rewrite keeps values and gradients exactly.

_assert_tensor_metadata(x, dtype=float32)       ->  (gone: it would refuse autocast and other devices)
wrap_with_set_grad_enabled(False, sub, x)       ->  sub's nodes inline, outputs detached
sym_size(labels, 1)                             ->  sym_size(input_ids, 1)   # the same symbol
linear(x, <embed.weight>)  # called by lm_head  ->  linear(x, <lm_head.weight>)   # its own alias
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from lorafx.graph import annotate, named_tensors, notes
from lorafx.passes.frontends import Trace, note_scope

aten = torch.ops.aten


def canonicalize(trace: Trace, model: nn.Module, last_inputs: frozenset[str] = frozenset()) -> None:
    """Rewrite ``trace`` in place. Sizes are read from ``last_inputs`` only where no other input has them."""
    graph = trace.graph
    for node in graph.find_nodes(op="call_function", target=aten._assert_tensor_metadata.default):
        graph.erase_node(node)
    _inline_grad_regions(graph, trace.holder)
    _name_modules_once(graph, model)
    share_sizes(graph, last_inputs)
    _name_weights_by_use(graph, model)
    for node in reversed(list(graph.nodes)):
        drop = node.op == "get_attr" or (node.op == "call_function" and not _matters(node))
        if drop and not node.users:
            graph.erase_node(node)


def _matters(node: Node) -> bool:
    """Whether a node without users must stay: it writes, checks, or draws random numbers."""
    if node.is_impure():
        return True
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags


def _inline_grad_regions(graph: Graph, holder: nn.Module) -> None:
    wrap = torch.ops.higher_order.wrap_with_set_grad_enabled
    while regions := graph.find_nodes(op="call_function", target=wrap):
        for call in regions:
            enabled, region, *operands = call.args
            assert isinstance(region, Node)
            body = getattr(holder, str(region.target))
            assert isinstance(body, GraphModule)
            outputs = _inline(graph, call, body.graph, operands)
            if not enabled:
                outputs = [_detached(graph, call, o) for o in outputs]
            for user in list(call.users):
                # the region's results are always taken apart by getitem
                user.replace_all_uses_with(outputs[user.args[1]])
                graph.erase_node(user)
            graph.erase_node(call)
            if not region.users:
                graph.erase_node(region)


def _inline(graph: Graph, before: Node, body: Graph, operands: list[Any]) -> list[Any]:
    made = dict(zip(body.find_nodes(op="placeholder"), operands, strict=True))
    with graph.inserting_before(before):
        for node in body.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                return [made[n] if isinstance(n, Node) else n for n in node.args[0]]
            if node.target is aten._assert_tensor_metadata.default:
                continue
            made[node] = graph.node_copy(node, lambda n: made[n])
            note_scope(made[node])
            if "scope" not in notes(node):
                made[node].meta.setdefault("custom", before.meta.get("custom", {}))
    raise AssertionError("a graph has an output")


def _detached(graph: Graph, before: Node, value: Any) -> Any:
    if not isinstance(value, Node) or not isinstance(value.meta.get("val"), Tensor):
        return value
    if not value.meta["val"].is_floating_point():
        return value
    with graph.inserting_before(before):
        detached = graph.call_function(aten.detach.default, (value,))
    detached.meta = dict(value.meta)
    return detached


def share_sizes(graph: Graph, last_inputs: frozenset[str]) -> None:
    """Read each symbolic size of ``last_inputs`` from the first input that has it; these come after all others."""
    inputs = sorted(graph.find_nodes(op="placeholder"), key=lambda n: n.target in last_inputs)
    source: dict[str, tuple[Node, int]] = {}
    for node in inputs:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            for dim, size in enumerate(value.shape):
                source.setdefault(str(size), (node, dim))
    for size in graph.find_nodes(op="call_function", target=aten.sym_size.int):
        tensor, dim = size.args
        if isinstance(tensor, Node) and tensor.target in last_inputs:
            size.args = source.get(str(tensor.meta["val"].shape[dim]), (tensor, dim))


def _name_modules_once(graph: Graph, model: nn.Module) -> None:
    """Call a module that has several paths by its first, whichever of them the code called it by."""
    first = {id(module): path for path, module in model.named_modules()}
    paths = {path: first[id(m)] for path, m in model.named_modules(remove_duplicate=False)}
    for node in graph.nodes:
        scope = notes(node).get("scope")
        if scope is not None and paths.get(scope, scope) != scope:
            annotate(node, scope=paths[scope])


def _name_weights_by_use(graph: Graph, model: nn.Module) -> None:
    """Where a tensor has several names, call it by the one that belongs to the module that uses it."""
    names: dict[int, list[str]] = {}
    by_name: dict[str, Tensor] = {}
    for name, tensor in named_tensors(model):
        names.setdefault(id(tensor), []).append(name)
        by_name[name] = tensor
    for node in graph.find_nodes(op="get_attr"):
        aliases = names.get(id(by_name.get(str(node.target))), [])
        if len(aliases) < 2:
            continue
        made: dict[str, Node] = {}
        for user in list(node.users):
            scope = notes(user).get("scope")
            alias = next((a for a in aliases if a.rpartition(".")[0] == scope), aliases[0])
            if alias not in made:
                with graph.inserting_before(node):
                    made[alias] = graph.create_node("get_attr", alias)
                made[alias].meta = dict(node.meta)
            user.replace_input_with(node, made[alias])
