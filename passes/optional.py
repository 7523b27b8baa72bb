"""Make the loss an optional part of the graph: called without labels, none of it runs.

view = view(logits, [-1, 64])                      loss = call_module[loss](labels, logits)
loss = cross_entropy(view, labels)        ->       return (loss, logits)     # loss is None without labels
return (loss, logits)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from lorafx.errors import CaptureError, InputError

#: The submodule that holds the part of the graph which needs labels.
LOSS = "loss_from_labels"


class LossFromLabels(nn.Module):
    """The nodes that need labels, run only when they are given.

    ``names``, ``dtypes`` and ``ranks`` describe the labels it was captured with.
    """

    def __init__(self, body: GraphModule, labels: tuple[Node, ...], results: int) -> None:
        super().__init__()
        self.body = body
        self.names = tuple(str(n.target) for n in labels)
        self.dtypes = tuple(n.meta["val"].dtype for n in labels)
        self.ranks = tuple(n.meta["val"].dim() for n in labels)
        self.results = results

    def forward(self, labels: tuple[Tensor | None, ...], *values: Any) -> tuple[Any, ...]:
        """The outputs that need labels, or as many None.

        Raises:
            InputError: the labels are of another kind than those captured (another loss would be due).
        """
        if any(label is None for label in labels):
            return (None,) * self.results
        for label, name, dtype, rank in zip(labels, self.names, self.dtypes, self.ranks, strict=True):
            assert label is not None
            if label.is_floating_point() != dtype.is_floating_point or label.dim() != rank:
                raise InputError(
                    f"'{name}' was captured as a {dtype} tensor of {rank} dimensions, this one is {label.dtype} of "
                    f"{label.dim()}: the captured loss is another one. Put such labels into the example inputs"
                )
        return tuple(self.body(*labels, *values))


def serve_the_loss_only(graph: Graph, optional: frozenset[str]) -> bool:
    """Whether nothing but scalar outputs depends on these inputs.

    False for an encoder-decoder that makes its decoder's input from the labels: there they are no option.
    """
    tail = _dependents(graph, [n for n in graph.find_nodes(op="placeholder") if n.target in optional])
    outputs: Any = graph.output_node().args[0]
    return all(n.meta["val"].dim() == 0 for n in outputs if n in tail)


def outline(graph: Graph, holder: nn.Module, optional: frozenset[str]) -> None:
    """Move what depends on the ``optional`` inputs into :class:`LossFromLabels`, in place.

    Raises:
        CaptureError: an output other than the loss depends on them in every call.
    """
    labels = [n for n in graph.find_nodes(op="placeholder") if n.target in optional]
    tail = _dependents(graph, labels)
    output = graph.output_node()
    outputs: Any = output.args[0]
    results: list[Node] = [n for n in outputs if n in tail or n in labels]
    if not tail or not results:
        return
    if any(n in labels for n in results):
        raise CaptureError(f"an output of the model is its input {[str(n.target) for n in labels]} unchanged")
    outside = list(dict.fromkeys(a for n in tail for a in n.all_input_nodes if a not in tail and a not in labels))
    body = Graph()
    made: dict[Node, Node] = {n: body.placeholder(n.name) for n in [*labels, *outside]}
    for node in graph.nodes:
        if node in tail:
            made[node] = body.node_copy(node, made.__getitem__)
    body.output(tuple(made[n] for n in results))
    # Weights and modules that the loss reads are handed in, so that the graph has one of each.
    module = LossFromLabels(GraphModule(nn.Module(), body), tuple(labels), len(results))
    setattr(holder, LOSS, module)
    with graph.inserting_before(output):
        call = graph.call_module(LOSS, (tuple(labels), *outside))
        for index, node in enumerate(results):
            item = graph.call_function(getitem, (call, index))
            item.meta = dict(node.meta)
            output.replace_input_with(node, item)
    for node in reversed(list(tail)):
        graph.erase_node(node)


def getitem(values: tuple[Any, ...], index: int) -> Any:
    """One of the results of :class:`LossFromLabels`."""
    return values[index]


def drop(graph: Graph) -> None:
    """Remove the loss and the labels from a graph, in place: the outputs they gave become None."""
    for call in [n for n in graph.nodes if n.op == "call_module" and n.target == LOSS]:
        labels = list(call.args[0])
        for item in list(call.users):
            for user in list(item.users):
                user.args = tuple(tuple(None if a is item else a for a in arg) for arg in user.args)
            graph.erase_node(item)
        graph.erase_node(call)
        for label in labels:
            graph.erase_node(label)
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users and not node.is_impure():
            graph.erase_node(node)


def _dependents(graph: Graph, roots: list[Node]) -> dict[Node, None]:
    found: dict[Node, None] = {}
    for node in graph.nodes:
        if node.op != "output" and any(a in found or a in roots for a in node.all_input_nodes):
            found[node] = None
    return found
