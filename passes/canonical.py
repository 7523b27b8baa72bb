"""Bring a trace into lorafx's canonical form. Every rewrite keeps values and gradients exactly.

_assert_tensor_metadata(x, dtype=float32)       ->  (gone: it would refuse autocast and other devices)
wrap_with_set_grad_enabled(False, sub, x)       ->  sub's nodes inline, outputs detached   # and autocast: regions.py
sym_size(labels, 1)                             ->  sym_size(input_ids, 1)   # the same symbol
linear(x, <embed.weight>)  # called by lm_head  ->  linear(x, <lm_head.weight>)   # its own alias
matmul(x, numpy_T(<q.weight>))  # the code of q ->  linear(x, <q.weight>)   # where q is an nn.Linear
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from lorafx.graph import annotate, named_tensors, notes
from lorafx.memory import written
from lorafx.passes.frontends import Trace
from lorafx.passes.regions import inline_regions

aten = torch.ops.aten


def canonicalize(trace: Trace, model: nn.Module, last_inputs: frozenset[str] = frozenset()) -> None:
    """Rewrite ``trace`` in place. Sizes are read from ``last_inputs`` only where no other input has them."""
    graph = trace.graph
    for node in graph.find_nodes(op="call_function", target=aten._assert_tensor_metadata.default):
        graph.erase_node(node)
    inline_regions(graph, trace.holder)
    _name_modules_once(graph, model)
    share_sizes(graph, last_inputs)
    _name_weights_by_use(graph, model)
    _call_linear_layers(graph, model)
    for node in reversed(list(graph.nodes)):
        drop = node.op == "get_attr" or (node.op == "call_function" and not _matters(node))
        if drop and not node.users:
            graph.erase_node(node)


def _matters(node: Node) -> bool:
    """Whether a node without users must stay: it writes, checks, or draws random numbers."""
    if node.is_impure() or written(node):
        return True
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags


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


def _call_linear_layers(graph: Graph, model: nn.Module) -> None:
    """Write the product of a subclass of ``nn.Linear`` that multiplies itself, as Falcon's does, as other ones'.

    A bias that its code adds stays an addition.
    """
    for node in graph.find_nodes(op="call_function", target=aten.matmul.default):
        x, factor = node.args
        if not isinstance(factor, Node) or factor.target is not aten.numpy_T.default:
            continue
        (weight,) = factor.all_input_nodes
        path, _, name = str(weight.target).rpartition(".")
        if weight.op != "get_attr" or name != "weight" or path != notes(node).get("scope"):
            continue
        if isinstance(model.get_submodule(path), nn.Linear):
            node.target, node.args = aten.linear.default, (x, weight)
