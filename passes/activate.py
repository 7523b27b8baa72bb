"""Activate: rewrite the calls of adapted layers so that they go through the adapters asked for, and no others.

    none:    linear = aten.linear(x, <q.weight>, <q.bias>)
    "fr":    a, b   = <q.lora_A.fr>, <q.lora_B.fr>
             train  = by_mode(<q>, True, False)                       # only with dropout
             linear = lorafx.linear(x, <q.weight>, <q.bias>, [a, b], ["lora"], [scaling], [dropout], train, None)
    a bare parameter, or some rows of one:
             w      = <experts.down_proj>
             w'     = lorafx.weight(w, [a, b], ["lora"], [scaling], "parameter", [None])    # and everyone reads w'

An adapter's own version of a base tensor (``modules_to_save``, trained biases, what PiSSA leaves of a weight)
is read in the base's stead. An adapter that is not active has no node, so it costs nothing. Nodes are edited
in place and keep their names, so that without adapters the graph is the captured one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from lorafx.errors import AdapterError
from lorafx.graph import CapturedModule, Scope, annotate, batch_rows, by_mode, erase, get_path, notes, unannotate
from lorafx.ir import FOLDED, ROWS, Adapter, Site, active_layers, find_adapter, layer_nodes
from lorafx.ops import ADAPTED, adapted_weight
from lorafx.passes.layers import call_layer, call_twin
from lorafx.passes.modes import scope_node
from lorafx.variants import VARIANTS

aten = torch.ops.aten


def activate(gm: CapturedModule, names: Sequence[str], by_row: bool = False) -> None:
    """Make these the active adapters of ``gm``, in place; without names the graph is the base's.

    Several are summed: each adds what it would add to the frozen model alone. ``by_row`` gives each row of a
    batch to the one that the buffer ``_rows`` says. Needs a ``recompile`` afterwards.

    Raises:
        AdapterError: there is no such adapter, it is merged in place, or two have their own version of one
            tensor. Nothing is changed.
    """
    chosen = [find_adapter(gm, name) for name in names]
    own = own_tensors(gm, chosen, gm.meta.get("merged", ()), gm.meta.get("folded", ()))
    deactivate(gm)
    gm.meta["active"] = tuple(names)
    gm.meta["by_row"] = by_row
    _read_own(gm, own)
    nodes = layer_nodes(gm)
    index = {name: i for i, name in enumerate(names)}
    rows = _batch_rows(gm) if by_row else None
    for layer, found in active_layers(gm).items():
        if found[0].kind in ADAPTED:
            _call_twins(gm, nodes[layer], found, index, rows)
        else:
            _update_parameter(gm, nodes[layer], found)


def deactivate(gm: CapturedModule) -> None:
    """Bring the graph of ``gm`` back to what was captured, in place; every adapter's tensors stay."""
    graph = gm.graph
    for node in graph.nodes:
        if "call" in notes(node):
            call_layer(node)
        elif node.target is adapted_weight:
            node.replace_all_uses_with(node.args[0])
        elif (base := notes(node).get("base")) is not None:
            node.target = base
            unannotate(node, "base")
    for node in reversed(list(graph.nodes)):
        if notes(node).get("inserted") and not node.users:
            erase(graph, node)
    for node in list(graph.find_nodes(op="get_attr")):
        if not node.users:  # a scope that only adapters' dropout reads
            erase(graph, node)
    gm.meta["active"] = ()
    gm.meta["by_row"] = False


def own_tensors(
    gm: CapturedModule, chosen: Sequence[Adapter], merged: Collection[str], folded: Collection[str]
) -> dict[str, str]:
    """Where what is read in the stead of tensors of the base lies, by their names in the base.

    ``merged`` are the adapters that are merged in place, ``folded`` the tensors that hold them.

    Raises:
        AdapterError: see :func:`activate`.
    """
    owners = dict.fromkeys(folded, "what is merged in place")
    own = {name: f"{FOLDED}.{name}" for name in folded}
    for adapter in chosen:
        if adapter.name in merged:
            raise AdapterError(f"adapter '{adapter.name}' is merged into the weights already; call unmerge(gm) first")
        for name in (*adapter.trained, *adapter.residual):
            if name in owners:
                raise AdapterError(
                    f"adapter '{adapter.name}' cannot be active together with {owners[name]}: each has its own version "
                    f"of '{name}' (modules_to_save, bias, or an initialisation that changes the weight). Activate "
                    "one of them"
                )
            owners[name] = f"adapter '{adapter.name}'"
            own[name] = adapter.own_name(name)
    for adapter in chosen:
        for site in adapter.sites:
            read, mine = own.get(site.weight), adapter.own_name(site.weight)
            if VARIANTS[site.variant].scales_rows and read not in (None, mine):
                raise AdapterError(
                    f"adapter '{adapter.name}' rescales the rows of '{site.weight}' ({site.variant}), relative to the "
                    f"base, and {owners[site.weight]} puts another weight in its place. Activate one of them; what is "
                    "merged in place goes by unmerge(gm)"
                )
    _refuse_mixed(gm, chosen)
    return own


def _refuse_mixed(gm: CapturedModule, chosen: Sequence[Adapter]) -> None:
    """Refuse adapters of which one adapts a layer and one its weight, since not both would be relative to the base."""
    first: dict[int, tuple[Adapter, Site]] = {}
    for adapter in chosen:
        for site in adapter.sites:
            other, known = first.setdefault(id(get_path(gm, site.weight)), (adapter, site))
            if known.layer != site.layer and not (known.kind in ADAPTED and site.kind in ADAPTED):
                raise AdapterError(
                    f"adapters '{other.name}' and '{adapter.name}' cannot be active together: they adapt "
                    f"'{site.weight}' in different ways, as {known.layer} and as {site.layer}. Activate one of them"
                )


def _read_own(gm: CapturedModule, own: Mapping[str, str]) -> None:
    """Let the graph read these tensors of the base, under whatever name, from elsewhere."""
    by_id = {id(get_path(gm, name)): target for name, target in own.items()}
    for node in gm.graph.nodes:
        target = None
        if node.op == "get_attr":
            target = by_id.get(id(get_path(gm, str(node.target))))
        if node.op == "call_module":  # called whole: there is a copy of the module around the other tensors
            inside = (t.removesuffix(n) + str(node.target) for n, t in own.items() if n.startswith(f"{node.target}."))
            target = next(inside, None)
        if target is not None:
            annotate(node, base=node.target)
            node.target = target


def _call_twins(
    gm: CapturedModule, nodes: Sequence[Node], found: Sequence[Site], index: Mapping[str, int], rows: Node | None
) -> None:
    graph = gm.graph
    _hold(gm, found[0].path)
    with graph.inserting_before(nodes[0]):
        tensors = [_made(graph.get_attr(n)) for site in found for n in site.tensor_names.values()]
    for node in nodes:
        training: Any = False
        mine = None
        if any(site.dropout > 0.0 for site in found):
            scope = scope_node(graph, found[0].path)
            with graph.inserting_before(node):
                training = _made(graph.call_function(by_mode, (scope, True, False)))
        if rows is not None:
            with graph.inserting_before(node):
                mine = _rows_of_layer(graph, rows, [index[site.adapter] for site in found])
        call_twin(
            node,
            [
                tensors,
                [site.variant for site in found],
                [site.scaling for site in found],
                [site.dropout for site in found],
                training,
                mine,
            ],
        )


def _batch_rows(gm: CapturedModule) -> Node:
    """The buffer with each row's adapter, once the batch is seen to have as many rows."""
    graph = gm.graph
    inputs = graph.find_nodes(op="placeholder")
    with graph.inserting_after(inputs[-1]):
        rows = _made(graph.get_attr(ROWS))
    with graph.inserting_after(rows):
        return _made(graph.call_function(batch_rows, (rows, inputs[0])))


def _rows_of_layer(graph: Graph, rows: Node, indices: Sequence[int]) -> Node:
    """Which of a layer's adapters each row goes through. A layer that not all adapters have counts its own."""
    if list(indices) == list(range(len(indices))):
        return rows
    known = _made(graph.call_function(aten.full_like.default, (rows, -1)))
    for position, number in enumerate(indices):
        mine = _made(graph.call_function(aten.eq.Scalar, (rows, number)))
        known = _made(graph.call_function(aten.masked_fill.Scalar, (known, mine, position)))
    return known


def _update_parameter(gm: CapturedModule, nodes: Sequence[Node], found: Sequence[Site]) -> None:
    graph = gm.graph
    with graph.inserting_before(nodes[0]):
        tensors = [_made(graph.get_attr(n)) for site in found for n in site.tensor_names.values()]
        rows = [None if site.rows is None else _made(graph.get_attr(site.index_name)) for site in found]
    for node in nodes:
        with graph.inserting_before(min(node.users)):  # the first: until there nothing need be dense
            arguments = (
                node,
                tensors,
                [site.variant for site in found],
                [site.scaling for site in found],
                found[0].kind,
                rows,
            )
            updated = _made(graph.call_function(adapted_weight))
            annotate(updated, layers=(found[0].layer,), scope=found[0].weight.rpartition(".")[0])
        node.replace_all_uses_with(updated)
        updated.args = arguments


def _hold(gm: CapturedModule, path: str) -> None:
    """See that there is a module at a path."""
    parent, _, name = path.rpartition(".")
    if name not in get_path(gm, parent)._modules:
        gm.set_submodule(path, Scope())


def _made(node: Node) -> Node:
    """Mark a node as an adapter's, to go when the adapter goes."""
    annotate(node, inserted=True)
    return node
