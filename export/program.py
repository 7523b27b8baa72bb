"""A captured graph as a program that torch.onnx takes, without tracing the model again.

torch.export would run the graph once to find out shapes, and torch.onnx twice more to break up operators that ONNX does
not have. A captured graph is one of plain operators already: so shapes are found in one run, and only the few calls
that ONNX lacks an operator for are broken up, each by itself, by torch's own rules. A graph that this is not enough for
(it writes in place, has graphs inside) is left to torch.export.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._export.utils import _is_cia_op, _is_preservable_cia_op
from torch._ops import OperatorBase, OpOverload
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.export import Dim, ExportedProgram, ModuleCallEntry
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.node import map_arg

from lorafx.graph import get_path


class _Program(ExportedProgram):
    """A program whose calls are decomposed one by one, where :class:`ExportedProgram` traces all of it again."""

    def run_decompositions(
        self,
        decomp_table: dict[OperatorBase, Callable[..., Any]] | None = None,
        decompose_custom_triton_ops: bool = False,
    ) -> ExportedProgram:
        table = dict(decomp_table or {})
        values = [node.meta.get("val") for node in self.graph.nodes]
        mode = next(value.fake_mode for value in values if isinstance(value, FakeTensor))
        with torch.no_grad(), mode, enable_python_dispatcher():
            for node in list(self.graph.nodes):
                if node.op == "call_function" and (node.target in table or _never_whole(node.target)):
                    _decompose(node, table)
        self.graph_signature.output_specs = _outputs(self.graph)
        self.graph.eliminate_dead_code()
        self.graph.lint()
        return self


def make_program(
    graph: GraphModule, example: Mapping[str, Tensor], dynamic: Mapping[str, Collection[int]]
) -> ExportedProgram:
    """Make a program of a graph for inference. Notes of lorafx on its nodes stay.

    Args:
        graph: calls of operators on tensors; its result is a tuple of tensors.
        example: a tensor for each placeholder.
        dynamic: the dimensions of each that may have any size.
    """
    if not all(_is_plain(node) for node in graph.graph.nodes):
        shapes = {name: dict.fromkeys(dynamic.get(name, ()), Dim.AUTO) for name in example}
        return torch.export.export(graph, (), dict(example), dynamic_shapes=shapes, strict=False)
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    inputs = {name: _fake(mode, tensor, dynamic.get(name, ())) for name, tensor in example.items()}
    lifted, specs, tensors = _lifted(graph, mode)
    for node in lifted.find_nodes(op="placeholder"):
        if node.target in inputs:
            node.meta["val"] = inputs[node.target]
            specs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None))
    _find_shapes(lifted, mode)
    if mode.shape_env.replacements:  # sizes that turned out to be equal, which now makes all others simpler
        _find_shapes(lifted, mode)
    return _Program(
        root=torch.nn.Module(),
        graph=lifted,
        graph_signature=ExportGraphSignature(specs, _outputs(lifted)),
        state_dict={s.target: tensors[s.target] for s in specs if s.persistent or s.kind is InputKind.PARAMETER},
        range_constraints={},
        module_call_graph=[ModuleCallEntry("")],
        constants={s.target: tensors[s.target] for s in specs if s.kind is InputKind.BUFFER and not s.persistent},
    )


def _fake(mode: FakeTensorMode, tensor: Tensor, dynamic: Collection[int]) -> FakeTensor:
    sizes = [DimDynamic.DYNAMIC if dim in dynamic else DimDynamic.STATIC for dim in range(tensor.dim())]
    return mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))


def _lifted(graph: GraphModule, mode: FakeTensorMode) -> tuple[Graph, list[InputSpec], dict[str, Tensor]]:
    """A copy of the graph that takes its tensors as inputs, what it takes for each, and the tensors."""
    saved, lifted = graph.state_dict().keys(), Graph()
    copies: dict[Node, Node] = {}
    specs: list[InputSpec] = []
    tensors: dict[str, Tensor] = {}
    first: dict[int, Node] = {}
    for node in graph.graph.find_nodes(op="get_attr"):
        name, tensor = str(node.target), get_path(graph, str(node.target))
        if id(tensor) not in first:
            first[id(tensor)] = copy = lifted.placeholder(node.name)
            kind = InputKind.PARAMETER if isinstance(tensor, torch.nn.Parameter) else InputKind.BUFFER
            specs.append(InputSpec(kind, TensorArgument(copy.name), name, None if kind is InputKind.PARAMETER else name in saved))
            tensors[name] = tensor
            copy.meta["val"] = mode.from_tensor(tensor.detach(), static_shapes=True)
        copies[node] = first[id(tensor)]
    result = lifted.graph_copy(graph.graph, copies)
    lifted.output(result)
    return lifted, specs, tensors


def _find_shapes(graph: Graph, mode: FakeTensorMode) -> None:
    with torch.no_grad(), mode, enable_python_dispatcher():
        for node in graph.nodes:
            if node.op == "call_function":
                args, kwargs = map_arg((node.args, node.kwargs), lambda operand: operand.meta["val"])
                node.meta["val"] = node.target(*args, **kwargs)


def _outputs(graph: Graph) -> list[OutputSpec]:
    results = graph.output_node().args[0]
    return [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in results]


def _decompose(node: Node, table: dict[OperatorBase, Callable[..., Any]]) -> None:
    """Replace a call by what it comes to by the table, and what that comes to."""
    operands = node.all_input_nodes

    def call(*values: Any) -> Any:
        given = dict(zip(operands, values, strict=True))
        args, kwargs = map_arg((node.args, node.kwargs), lambda operand: given[operand])
        return node.target(*args, **kwargs)

    values = [operand.meta["val"] for operand in operands]
    inner = make_fx(call, decomposition_table=table)(*values)
    copies = dict(zip(inner.graph.find_nodes(op="placeholder"), operands, strict=True))
    with node.graph.inserting_before(node):
        for step in inner.graph.nodes:
            if step.op == "call_function":
                copies[step] = copy = node.graph.node_copy(step, copies.__getitem__)
                copy.meta = {**node.meta, "val": step.meta["val"]}
    results = inner.graph.output_node().args[0]
    if isinstance(results, Node):
        node.replace_all_uses_with(copies[results])
    else:  # several, which are taken apart by operator.getitem
        for user in list(node.users):
            user.replace_all_uses_with(copies[results[user.args[1]]])
            node.graph.erase_node(user)
    node.graph.erase_node(node)


def _never_whole(target: Any) -> bool:
    """Whether torch always replaces this by what it is made of: where it may return its argument, or write to it."""
    return isinstance(target, OpOverload) and _is_cia_op(target) and not _is_preservable_cia_op(target)


def _is_plain(node: Node) -> bool:
    """Whether a call needs neither functionalisation nor a look inside."""
    if node.op != "call_function":
        return node.op in ("placeholder", "get_attr", "output")
    if isinstance(node.target, OpOverload):
        return not node.target._schema.is_mutable
    return getattr(node.target, "__module__", None) in ("_operator", "math")
