"""Specialise a graph to inference: the one mode, the one way of calling it that an ONNX file has.

    m = <encoder.dropout>                                   d = dropout(x, 0.1, False)
    f = by_mode(m, True, False)                       ->    return (head,)
    d = dropout(x, 0.1, f)
    n = add_(<bn.num_batches_tracked>, by_mode(m, 1, 0))
    return (loss_from_labels(labels, head), head)

Values stay what ``gm.eval()`` gives without labels, to the bit.
"""

from __future__ import annotations

import dataclasses

from torch.fx import Graph, Node
from torch.fx.node import Argument, map_aggregate
from torch.utils import _pytree as pytree

from lorafx.graph import CapturedModule, by_mode, share
from lorafx.passes import optional
from lorafx.passes.modes import ACCUMULATE
from lorafx.signature import Signature, SignatureCodeGen


def inference(gm: CapturedModule, *, keep_loss: bool = False) -> CapturedModule:
    """A copy of ``gm`` that shares its tensors and only knows eval mode.

    Args:
        gm: a captured graph, in either mode; not changed.
        keep_loss: keep the loss, and the labels as inputs that every call must give. By default both go,
            with every node that only served them.
    """
    twin = share(gm).eval()
    graph, signature = twin.graph, twin.signature
    if keep_loss:
        arguments = tuple(dataclasses.replace(a, optional=False) for a in signature.arguments)
        signature = dataclasses.replace(signature, arguments=arguments)
    else:
        optional.drop(graph)
        signature = _without_optional(signature)
    for switch in graph.find_nodes(op="call_function", target=by_mode):
        _resolve(switch, switch.args[2])
        graph.erase_node(switch)
    for update in [n for n in graph.nodes if _adds_nothing(n)]:
        update.replace_all_uses_with(update.args[0])
        graph.erase_node(update)
    signature = _without_empty_outputs(graph, signature)
    graph.set_codegen(SignatureCodeGen(signature))
    for node in graph.find_nodes(op="get_attr"):
        if not node.users:
            graph.erase_node(node)
    twin.recompile()
    twin.check()
    return twin


def _resolve(switch: Node, literal: Argument) -> None:
    def put(argument: Argument) -> Argument:
        return literal if argument is switch else argument

    for user in list(switch.users):
        args, kwargs = map_aggregate(user.args, put), map_aggregate(user.kwargs, put)
        assert isinstance(args, tuple)
        assert isinstance(kwargs, dict)
        user.args, user.kwargs = args, kwargs


def _adds_nothing(node: Node) -> bool:
    """Whether this updates a buffer by 0, as an update gated by the mode does in eval."""
    amount = node.args[1] if node.target in ACCUMULATE else None
    return isinstance(amount, (int, float)) and amount == 0


def _without_optional(signature: Signature) -> Signature:
    """Optional arguments become ones that a call may only leave out or give as None."""
    dropped = [a for a in signature.arguments if a.optional]
    leaves = {leaf for a in dropped for leaf in a.leaves}
    dims = {leaf: dims for leaf, dims in signature.dims.items() if leaf not in leaves}
    used = {name for held in dims.values() for name in held.values()}
    return dataclasses.replace(
        signature,
        arguments=tuple(a for a in signature.arguments if not a.optional),
        uncaptured={**signature.uncaptured, **dict.fromkeys((a.name for a in dropped), None)},
        dims=dims,
        ranges={name: bounds for name, bounds in signature.ranges.items() if name in used},
    )


def _without_empty_outputs(graph: Graph, signature: Signature) -> Signature:
    """Drop the fields that are None from an output class that leaves such fields out (HF's do)."""
    output = graph.output_node()
    values = list(output.args[0])  # type: ignore[arg-type]
    slots = [None if value is None else index for index, value in enumerate(values)]
    kept, spec = pytree.tree_flatten(pytree.tree_unflatten(slots, signature.out_spec))
    if len(kept) == len(values):
        return signature
    output.args = (tuple(values[index] for index in kept),)
    names = tuple(signature.outputs[index] for index in kept)
    return dataclasses.replace(signature, outputs=names, out_spec=spec)
