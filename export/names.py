"""Names in an ONNX model: of values, nodes, dimensions and modules; and the order of its initializers.

They follow from what the model is, never from how it came to be translated. What a node computes is called by the
module that computes it and the operator: ``encoder.layer.0.output.dense/MatMul``, and a second one there
``encoder.layer.0.output.dense/MatMul_1``. Weights keep their names, constants are numbered. Initializers stand in
the order in which they are used.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import onnx_ir as ir

from lorafx.export.repeat import CALL

#: torch's own metadata of a node: the modules that it is inside of by path, and by class, and both in one.
SCOPES, CLASSES, NAMESPACE = "pkg.torch.onnx.name_scopes", "pkg.torch.onnx.class_hierarchy", "namespace"

_SYMBOL = re.compile(r"(?<!\w)[su]\d+(?!\w)")


def all_values(model: ir.Model) -> Iterator[ir.Value]:
    """Inputs, initializers and what nodes compute."""
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for graph in model.graph.subgraphs():
        yield from graph.inputs
    for node in model.graph.all_nodes():
        yield from node.outputs


def name_values(
    model: ir.Model,
    inputs: Sequence[str],
    outputs: Sequence[str],
    tensors: Collection[str],
    modules: Callable[[int | None], Sequence[tuple[str, str]]],
) -> None:
    """Name all nodes and values, in place, and note what modules nodes belong to.

    Args:
        model: its nodes have the number of the call that they come from in ``meta[CALL]``, where it is known.
        inputs, outputs: the names of its inputs and outputs.
        tensors: names that initializers keep.
        modules: path and class of each module that a call is inside of, from the root on.
    """
    graph = model.graph
    taken = {*inputs, *outputs, *tensors}
    counts: Counter[str] = Counter()

    def unique(base: str) -> str:
        while True:
            name = f"{base}_{counts[base]}" if counts[base] else base
            counts[base] += 1
            if name not in taken:
                return name

    initializers = _in_order_of_use(graph)
    graph.initializers.clear()
    for value in initializers:
        if value.name not in tensors:
            value.name = unique("constant")
        graph.initializers.add(value)
    for node in graph.all_nodes():
        path = modules(node.meta.get(CALL))
        node.name = unique(f"{path[-1][0]}/{node.op_type}")
        for index, value in enumerate(node.outputs):
            if value.name != "":  # an output that is left out
                value.name = node.name if len(node.outputs) == 1 else f"{node.name}:{index}"
        for attribute in node.attributes.values():
            for subgraph in _subgraphs(attribute):
                for index, value in enumerate(subgraph.inputs):
                    value.name = f"{node.name}.{attribute.name}:{index}"
        _note_modules(node, path)
    for value, name in zip((*graph.inputs, *graph.outputs), (*inputs, *outputs), strict=True):
        value.name = name


def name_dimensions(model: ir.Model, symbols: Mapping[str, str]) -> None:
    """Write torch's symbols (``s72*s31``) as names (``batch*sequence``)."""

    def name(size: int | ir.SymbolicDim) -> int | str | None:
        if isinstance(size, int) or size.value is None:
            return size if isinstance(size, int) else None
        if size.value.isdecimal():  # torch writes a symbol that turned out to be a number like this
            return int(size.value)
        return _SYMBOL.sub(lambda match: symbols.get(match[0], match[0]), size.value)

    for value in all_values(model):
        if value.shape is not None:
            value.shape = ir.Shape([name(size) for size in value.shape])


def read_call(node: ir.Node) -> int | None:
    """The number of a call, which torch.onnx was told as the name of a module (see :func:`call_as_module`)."""
    scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
    return int(scopes[0]) if scopes and scopes[0].isdecimal() else None


def call_as_module(number: int | None) -> dict[str, tuple[str, str]]:
    """A stack of modules for torch.onnx that makes the nodes which a call becomes say its number."""
    return {} if number is None else {"": (str(number), "")}


def _in_order_of_use(graph: ir.Graph) -> list[ir.Value]:
    read = [v for node in graph.all_nodes() for v in node.inputs if v is not None]
    return [v for v in dict.fromkeys((*read, *graph.outputs)) if v.is_initializer()]


def _subgraphs(attribute: ir.Attr) -> Sequence[ir.Graph]:
    if attribute.type is ir.AttributeType.GRAPH:
        return (attribute.as_graph(),)
    return attribute.as_graphs() if attribute.type is ir.AttributeType.GRAPHS else ()


def _note_modules(node: ir.Node, path: Sequence[tuple[str, str]]) -> None:
    """Replace a node's metadata, of which torch wrote most for this machine only."""
    assert node.name is not None
    classes = ast.literal_eval(node.metadata_props.get(CLASSES, "[]"))
    steps = [*path, (node.name.rpartition("/")[2], classes[-1] if classes else "")]
    node.metadata_props.clear()
    node.metadata_props[NAMESPACE] = "/".join(f"{name}: {kind}" for name, kind in steps)
    node.metadata_props[CLASSES] = repr([kind for _, kind in steps])
    node.metadata_props[SCOPES] = repr([name for name, _ in steps])
