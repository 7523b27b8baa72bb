"""A captured graph as a program that torch.onnx takes, without tracing the model again.

torch.export would run the graph once to find out shapes, and torch.onnx twice more to take apart the operators that
ONNX does not have. But a captured graph consists of plain calls already. So shapes are found out here, and the few
calls that ONNX has no operator for are taken apart one by one, by torch's own rules: an :class:`ExportedProgram` like
any other, made in a fraction of the time. A graph for which this is not enough (it writes to memory that has other
names, or holds graphs) goes to torch.export.

This is the one place that reaches below torch's public surface: for fake tensors, and for which operators torch never
leaves whole.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._export.utils import _is_cia_op, _is_preservable_cia_op
from torch._ops import OpOverload
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
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext, is_concrete_int
from torch.fx.node import map_arg

from lorafx.errors import ExportError
from lorafx.graph import get_path

aten = torch.ops.aten
_NUMEL = aten.sym_numel.default

#: What takes operands of one dtype only, and in ONNX too.
_ONE_DTYPE = frozenset(
    {"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention"}
    | {"conv1d", "conv2d", "conv3d", "convolution"}
)


class _Program(ExportedProgram):
    """A program whose calls are decomposed one by one, where :class:`ExportedProgram` traces all of it again."""

    def run_decompositions(
        self, decomp_table: dict[Any, Callable[..., Any]] | None = None, decompose_custom_triton_ops: bool = False
    ) -> ExportedProgram:
        """Take apart, in place, what the table has a rule for, and what torch never leaves whole."""
        table = dict(decomp_table or {})
        values = (node.meta.get("val") for node in self.graph.nodes)
        mode = next(value.fake_mode for value in values if isinstance(value, FakeTensor))
        with torch.no_grad(), mode, enable_python_dispatcher():
            for node in list(self.graph.nodes):
                if node.op == "call_function" and (node.target in table or _never_whole(node.target)):
                    _decompose(node, table)
            for node in self.graph.find_nodes(op="call_function", target=_NUMEL):  # a reshape to -1 comes to one, too
                _spell_numel(node)
        self.graph_signature.output_specs = _output_specs(self.graph)
        self.graph.eliminate_dead_code()
        self.graph.lint()
        return self


def make_program(
    graph: GraphModule, example: Mapping[str, Tensor], dynamic: Mapping[str, Collection[int]]
) -> ExportedProgram:
    """Make a program of a graph for inference. lorafx's notes on its nodes stay.

    Args:
        graph: calls of operators on tensors, their result a tuple of tensors. Not changed.
        example: a tensor for each placeholder, with no dynamic size below 2.
        dynamic: the dimensions of each that may have any size.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    inputs = {name: _fake(mode, tensor, dynamic.get(name, ())) for name, tensor in example.items()}
    lifted, specs, tensors = _lifted(graph, mode)
    for node in lifted.find_nodes(op="placeholder"):
        if node.target in inputs:
            node.meta["val"] = inputs[node.target]
            specs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None))
    with mode:
        _equate_sizes(inputs, {str(n.target): n.meta.get("val") for n in graph.graph.find_nodes(op="placeholder")})
    written = _without_writes(lifted)
    plain = all(_is_plain(node) for node in lifted.nodes)
    if plain:
        _find_shapes(lifted, mode)
        if any(isinstance(size, torch.SymInt) and is_concrete_int(size) for size in _sizes(lifted)):
            _find_shapes(lifted, mode)  # with what later calls told about earlier ones' sizes
        _refuse_mixed(lifted)
        plain = all(_same_kind(result.meta["val"], node.meta["val"]) for result, node in written.items())
    if not plain:
        shapes = {name: dict.fromkeys(dynamic.get(name, ()), Dim.AUTO) for name in example}
        return torch.export.export(graph, (), dict(example), dynamic_shapes=shapes, strict=False)
    saved = {s.target for s in specs if s.kind is InputKind.PARAMETER or s.persistent}
    return _Program(
        root=nn.Module(),
        graph=lifted,
        graph_signature=ExportGraphSignature(specs, _output_specs(lifted)),
        state_dict={name: tensor for name, tensor in tensors.items() if name in saved},
        range_constraints={},
        module_call_graph=[ModuleCallEntry("")],
        constants={name: tensor for name, tensor in tensors.items() if name not in saved},
    )


def _fake(mode: FakeTensorMode, tensor: Tensor, dynamic: Collection[int]) -> FakeTensor:
    sizes = [DimDynamic.DYNAMIC if dim in dynamic else DimDynamic.STATIC for dim in range(tensor.dim())]
    return mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))


def _equate_sizes(inputs: Mapping[str, FakeTensor], captured: Mapping[str, Any]) -> None:
    """Tell that sizes are equal which the capture found to be: not every operator that relies on it says so."""
    first: dict[str, torch.SymInt] = {}
    for name, tensor in inputs.items():
        found = captured.get(name)
        sizes: Sequence[Any] = tensor.shape if isinstance(found, Tensor) else ()
        for size, known in zip(sizes, getattr(found, "shape", ()), strict=False):
            if isinstance(size, torch.SymInt) and isinstance(known, torch.SymInt):
                torch._check(size == first.setdefault(str(known), size))  # type: ignore[no-untyped-call]


def _lifted(graph: GraphModule, mode: FakeTensorMode) -> tuple[Graph, list[InputSpec], dict[str, Tensor]]:
    """A copy of the graph that takes its tensors as inputs, what it takes for each, and the tensors by name."""
    saved, lifted = graph.state_dict().keys(), Graph()
    copies: dict[Node, Node] = {}
    first: dict[str, Node] = {}
    specs: list[InputSpec] = []
    tensors: dict[str, Tensor] = {}
    for node in graph.graph.find_nodes(op="get_attr"):
        name, tensor = str(node.target), get_path(graph, str(node.target))
        if not isinstance(tensor, Tensor):  # a graph, for torch.export to deal with
            continue
        if name in first:
            copies[node] = first[name]
            continue
        copies[node] = first[name] = copy = lifted.placeholder(node.name)
        copy.meta["val"] = mode.from_tensor(tensor.detach(), static_shapes=True)
        tensors[name] = tensor
        if isinstance(tensor, nn.Parameter):
            specs.append(InputSpec(InputKind.PARAMETER, TensorArgument(copy.name), name))
        else:
            specs.append(InputSpec(InputKind.BUFFER, TensorArgument(copy.name), name, persistent=name in saved))
    lifted.output(lifted.graph_copy(graph.graph, copies))
    return lifted, specs, tensors


def _output_specs(graph: Graph) -> list[OutputSpec]:
    results: Any = graph.output_node().args[0]
    return [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in results]


# Calls that write.


def _without_writes(graph: Graph) -> dict[Node, Node]:
    """Let calls that write to a value that has its memory to itself return a new one; which they are, and for what."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    written: dict[Node, Node] = {}
    for node in list(graph.nodes):
        functional = _functional(node.target)
        held = node.args[0] if functional is not None and node.args else None
        if isinstance(held, Node) and _is_new(held) and all(_is_new(user) for user in held.users if user is not node):
            node.target = functional
            held.replace_all_uses_with(node, lambda user, at=order[node]: order[user] > at)  # type: ignore[misc]
            written[node] = held
            for view in [user for user in node.users if user.users and not _is_new(user)]:
                min(view.users, key=order.__getitem__).prepend(view)  # where torch's functionalisation makes it
    return written


def _functional(target: Any) -> OpOverload[..., Any] | None:
    """The operator that returns what this one writes to its first argument."""
    if not isinstance(target, OpOverload) or not target._schema.is_mutable:
        return None
    writes = [argument.alias_info is not None and argument.alias_info.is_write for argument in target._schema.arguments]
    packet = getattr(getattr(torch.ops, target.namespace), target._opname.removesuffix("_"), None)
    found = getattr(packet, target._overloadname, None)
    if writes != [True] + [False] * (len(writes) - 1) or not isinstance(found, OpOverload):
        return None
    return None if found._schema.is_mutable else found


def _is_new(node: Node) -> bool:
    """Whether the value of a call shares its memory with no other."""
    if isinstance(node.target, OpOverload):
        return all(returned.alias_info is None for returned in node.target._schema.returns)
    return node.target is operator.getitem and isinstance(node.args[0], Node) and _is_new(node.args[0])


def _same_kind(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.dim() == b.dim() and all(m == n for m, n in zip(a.shape, b.shape, strict=True))


def _is_plain(node: Node) -> bool:
    """Whether a call can be taken as it is: it writes nothing and holds no graph."""
    if node.op != "call_function":
        return node.op in ("placeholder", "output")
    if isinstance(node.target, OpOverload):
        return not node.target._schema.is_mutable
    return getattr(node.target, "__module__", None) in ("_operator", "math")


# Shapes, and operators that ONNX lacks.


def _find_shapes(graph: Graph, mode: FakeTensorMode) -> None:
    with torch.no_grad(), mode, enable_python_dispatcher():
        for node in graph.nodes:
            if node.op == "call_function":
                node.meta["val"] = _call(node, {operand: operand.meta["val"] for operand in node.all_input_nodes})


def _refuse_mixed(graph: Graph) -> None:
    """Refuse products of values of several dtypes; fake tensors multiply them, and a model's own code never does.

    Raises:
        ExportError: there is one: the graph was cast, and a value that the model computes in its own dtype whatever
            that of its weights, such as a buffer that is not saved, met one of theirs.
    """
    for node in graph.nodes:
        if not isinstance(node.target, OpOverload) or node.target._schema.name.removeprefix("aten::") not in _ONE_DTYPE:
            continue
        values = [operand.meta["val"] for operand in node.all_input_nodes]
        found = {v.dtype for v in values if isinstance(v, Tensor) and v.is_floating_point()}
        if len(found) > 1:
            dtypes = sorted(map(str, found), key=lambda name: name == "torch.float32")
            line = ((node.meta.get("stack_trace") or "").strip().splitlines() or [node.name])[-1].strip()
            raise ExportError(
                f"dtype={dtypes[0]}: '{line}' multiplies {' by '.join(dtypes)} once the graph is cast: one of "
                "them is computed in a dtype of its own, not in that of the weights. Convert the model "
                f"(model.to({dtypes[0]})), apply and load the adapter there; adapters stay in float32"
            )


def _call(node: Node, values: Mapping[Node, Any]) -> Any:
    target: Any = node.target
    args: Any = map_arg(node.args, values.__getitem__)
    kwargs: Any = map_arg(node.kwargs, values.__getitem__)
    return target(*args, **kwargs)


def _sizes(graph: Graph) -> Iterator[int | torch.SymInt]:
    for node in graph.nodes:
        if isinstance(value := node.meta.get("val"), Tensor):
            yield from value.shape


def _spell_numel(node: Node) -> None:
    """Replace the number of a tensor's elements, for which torch.onnx has no translation, by the product of its sizes.

    ::

        n = sym_numel(x)   ->   n = mul(sym_size(x, 0), sym_size(x, 1))
    """
    tensor: Any = node.args[0]
    shape = tensor.meta["val"].shape
    count: Any = math.prod(size for size in shape if isinstance(size, int))
    product: Any = count
    with node.graph.inserting_before(node):
        for dim, size in enumerate(shape):
            if isinstance(size, torch.SymInt):
                factor = node.graph.call_function(aten.sym_size.int, (tensor, dim))
                factor.meta = {**node.meta, "val": size}
                count = count * size
                product = node.graph.call_function(operator.mul, (product, factor))
                product.meta = {**node.meta, "val": count}
    node.replace_all_uses_with(product)
    node.graph.erase_node(node)


def _never_whole(target: Any) -> bool:
    """Whether torch always takes this operator apart: those that may return their argument, and some that write."""
    composite = isinstance(target, OpOverload) and target is not _NUMEL and _is_cia_op(target)
    return composite and not _is_preservable_cia_op(target)


def _decompose(node: Node, table: Mapping[Any, Callable[..., Any]]) -> None:
    """Replace a call by those that it comes to, and these by what they come to by the table."""
    operands = node.all_input_nodes
    traced = make_fx(lambda *values: _call(node, dict(zip(operands, values, strict=True))), decomposition_table=table)
    inner = traced(*(operand.meta["val"] for operand in operands)).graph
    copies = dict(zip(inner.find_nodes(op="placeholder"), operands, strict=True))
    with node.graph.inserting_before(node):
        for step in inner.nodes:
            if step.op == "call_function":
                copies[step] = copy = node.graph.node_copy(step, copies.__getitem__)
                copy.meta = {**node.meta, "val": step.meta["val"]}
    results: Any = inner.output_node().args[0]
    if isinstance(results, Node):
        node.replace_all_uses_with(copies[results])
    else:  # several, which operator.getitem picks from
        for user in list(node.users):
            user.replace_all_uses_with(copies[results[user.args[1]]])
            node.graph.erase_node(user)
    node.graph.erase_node(node)
