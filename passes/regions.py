"""Inline what ``torch.export`` keeps as calls of subgraphs, so that passes see one flat graph.

wrap_with_set_grad_enabled(False, sub, x)       ->  sub's nodes, outputs detached
wrap_with_autocast(cpu, bfloat16, True, ...)    ->  sub's nodes, with the casts that autocast makes

Under autocast an operator of its lists computes in one dtype, to which its operands are cast: the dtype of its result
says which. So the casts are written as nodes, and a region is inlined where every node then gives the dtype that it
gave under autocast. What is not understood stays a call, and so does a region that switches autocast off: it also
keeps out an autocast around the graph's own call, which no cast can.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from lorafx.graph import notes
from lorafx.passes.frontends import note_scope

aten = torch.ops.aten

GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled
AUTOCAST = torch.ops.higher_order.wrap_with_autocast


def inline_regions(graph: Graph, holder: nn.Module) -> None:
    """Inline, in place, what can be; ``holder`` has the subgraphs, and gets those of nested regions that stay."""
    kept: set[Node] = set()
    while regions := [n for n in graph.nodes if n.target in (GRAD, AUTOCAST) and n not in kept]:
        for call in regions:
            *options, region, operands = _parts(call)
            body = getattr(holder, str(region.target))
            assert isinstance(body, GraphModule)
            if call.target is AUTOCAST and (not options[2] or not _spell_out(body.graph, options[0], operands)):
                kept.add(call)
                _forget_dtypes(body)
                continue
            outputs = _inline(graph, call, body, holder, operands)
            if call.target is GRAD and not options[0]:
                outputs = [_detached(graph, call, o) for o in outputs]
            for user in list(call.users):
                # the region's results are always taken apart by getitem
                user.replace_all_uses_with(outputs[user.args[1]])
                graph.erase_node(user)
            graph.erase_node(call)
            if not region.users:
                graph.erase_node(region)


def autocast_regions(graph: Graph) -> Iterator[tuple[Node, str]]:
    """The regions that stayed calls, each with how the model's code says it."""
    for call in graph.find_nodes(op="call_function", target=AUTOCAST):
        device, dtype, enabled, *_ = call.args
        yield call, f"torch.autocast('{device}', {dtype if enabled else 'enabled=False'})"


def _parts(call: Node) -> tuple[Any, ...]:
    """The options of a region's call, its subgraph, and its operands: ``(*options, region, operands)``."""
    count = 1 if call.target is GRAD else 4
    region = call.args[count]
    assert isinstance(region, Node)
    return (*call.args[:count], region, list(call.args[count + 1 :]))


def _inline(graph: Graph, before: Node, body: GraphModule, holder: nn.Module, operands: list[Any]) -> list[Any]:
    made = dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=True))
    with graph.inserting_before(before):
        for node in body.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                return [made[n] if isinstance(n, Node) else n for n in node.args[0]]
            if node.target is aten._assert_tensor_metadata.default:
                continue
            made[node] = graph.node_copy(node, lambda n: made[n])
            if node.op == "get_attr":  # the subgraph of a region within
                made[node].target = _adopt(holder, getattr(body, str(node.target)))
            note_scope(made[node])
            if "scope" not in notes(node):
                made[node].meta.setdefault("custom", before.meta.get("custom", {}))
    raise AssertionError("a graph has an output")


def _forget_dtypes(body: GraphModule) -> None:
    """Remove the checks of dtypes, which would refuse autocast around the graph's call, from a region that stays."""
    for module in (m for m in body.modules() if isinstance(m, GraphModule)):
        for node in module.graph.find_nodes(op="call_function", target=aten._assert_tensor_metadata.default):
            module.graph.erase_node(node)
        module.recompile()


def _adopt(holder: nn.Module, body: nn.Module) -> str:
    """Give ``holder`` a subgraph under a name that is free, and tell it."""
    name = next(name for i in range(len(holder._modules) + 1) if not hasattr(holder, name := f"region_{i}"))
    holder.add_module(name, body)
    return name


def _detached(graph: Graph, before: Node, value: Any) -> Any:
    if not isinstance(value, Node) or not isinstance(value.meta.get("val"), Tensor):
        return value
    if not value.meta["val"].is_floating_point():
        return value
    with graph.inserting_before(before):
        detached = graph.call_function(aten.detach.default, (value,))
    detached.meta = dict(value.meta)
    return detached


def _spell_out(graph: Graph, device: str, operands: list[Any]) -> bool:
    """Write the casts of autocast to the nodes of a region, in place; False, and nothing is written, if it cannot."""
    given = zip(graph.find_nodes(op="placeholder"), operands, strict=True)
    weights = {n for n, operand in given if isinstance(operand, Node) and operand.op == "get_attr"}
    casts: dict[Node, list[tuple[Node, torch.dtype]]] = {}
    for node in graph.nodes:
        if not isinstance(node.target, OpOverload) or node.target is aten._assert_tensor_metadata.default:
            continue
        wanted = _computed_in(node, device)
        casts[node] = [(n, wanted) for n in node.all_input_nodes if wanted is not None and _is_cast(n, device, wanted)]
        if not _gives_its_dtypes(node, dict(casts[node])):
            return False
    made: dict[tuple[Node, Node | None], Node] = {}
    for node, needed in casts.items():
        for source, wanted in needed:
            key = (source, None if source in weights else node)  # autocast keeps its casts of weights, and no others
            if key not in made or made[key].meta["val"].dtype != wanted:
                with graph.inserting_before(node):
                    cast = graph.call_function(aten.to.dtype, (source, wanted))
                cast.meta = {**node.meta, "val": source.meta["val"].to(wanted)}
                made[key] = cast
            node.replace_input_with(source, made[key])
    return True


def _computed_in(node: Node, device: str) -> torch.dtype | None:
    """The dtype in which autocast has an operator of its lists compute; None of any other."""
    key = f"Autocast{device.upper()}"
    assert isinstance(node.target, OpOverload)
    if not torch._C._dispatch_has_kernel_for_dispatch_key(node.target._name, key):
        return None
    result = node.meta.get("val")
    return result.dtype if isinstance(result, Tensor) and result.is_floating_point() else None


def _is_cast(node: Node, device: str, wanted: torch.dtype) -> bool:
    """Whether autocast casts an operand: what it leaves as it is are float64 and tensors elsewhere."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.device.type != device or not value.is_floating_point():
        return False
    return value.dtype not in (wanted, torch.float64)


def _gives_its_dtypes(node: Node, casts: Mapping[Node, torch.dtype]) -> bool:
    """Whether an operator, without autocast and with these casts, gives results of the dtypes that it gave with it."""

    def value(operand: Any) -> Any:
        if not isinstance(operand, Node):
            return operand
        found: Any = operand.meta.get("val")
        return found.to(casts[operand]) if operand in casts else found

    assert isinstance(node.target, OpOverload)
    args, kwargs = map_aggregate((node.args, node.kwargs), value)
    mode = detect_fake_mode([n.meta.get("val") for n in (node, *node.all_input_nodes)])
    shapes = nullcontext() if mode is None or mode.shape_env is None else mode.shape_env.suppress_guards()
    with mode or nullcontext(), shapes:
        found = node.target(*args, **kwargs)
    return _dtypes(found) == _dtypes(node.meta.get("val"))


def _dtypes(value: Any) -> list[torch.dtype | None]:
    return [leaf.dtype if isinstance(leaf, Tensor) else None for leaf in pytree.tree_leaves(value)]
