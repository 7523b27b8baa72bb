"""From a graph for inference to an ONNX model that holds no weights yet.

    graph --repeated blocks taken out--> short graph --shapes--> program --torch.onnx--> ONNX
          --weights' values taken out--> --optimizer--> --blocks put back--> --weights folded as expressions-->
          --named--> model: nodes and names that depend on structure only

Whatever is in the state dict is a weight, and no decision looks at a weight's value: equal weights are
not merged, zero biases not dropped, norms not fused. Two graphs that differ in weights only become the
same model. Constants (buffers that are not saved, tensors in the model's code) keep their values, since
those follow from the model's configuration.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import onnx_ir as ir
import torch
from onnxscript.optimizer import optimize_ir
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from lorafx.bases.tensor import QuantizedTensor
from lorafx.errors import ExportError
from lorafx.export.names import all_values, call_as_module, name_dimensions, name_values, read_call
from lorafx.export.operators import spell_out, translations
from lorafx.export.pack import DENSE, PackedWeight, Plan, pack_weights
from lorafx.export.program import make_program
from lorafx.export.repeat import CALL, drop_repeats, find_repeats, number_calls, unroll
from lorafx.export.weights import Folded, fold_weights
from lorafx.graph import CapturedModule, get_path, named_tensors, notes
from lorafx.ir import format_graph
from lorafx.passes.example import make_example


@dataclass(frozen=True)
class Translation:
    """An ONNX model without weights.

    ``weights`` maps the names in the state dict to the values that stand for them, ``folded`` are
    the initializers that are made from weights. ``dims`` names each input's dynamic
    dimensions. ``fixed`` lists the dimensions that the graph has dynamic and the model has not. ``packed`` are the
    weights that the model holds packed, which ``weights`` has not; ``dense`` is why other quantized ones are not.
    """

    model: ir.Model
    weights: Mapping[str, ir.Value]
    folded: tuple[Folded, ...]
    dims: Mapping[str, Mapping[int, str]]
    fixed: tuple[str, ...]
    packed: Mapping[str, PackedWeight] = field(default_factory=dict)
    dense: Mapping[str, str] = field(default_factory=dict)

    @property
    def values(self) -> frozenset[ir.Value]:
        """What stands for weights, or is made from them; initializers are among these."""
        operands = (value for weight in self.packed.values() for value in weight.values)
        return frozenset((*self.weights.values(), *(f.value for f in self.folded), *operands))


def translate(
    gm: CapturedModule,
    example: Mapping[str, Tensor],
    dims: Mapping[str, Mapping[int, str]],
    opset: int | None = None,
    packing: Plan = DENSE,
) -> Translation:
    """Translate a graph that :func:`lorafx.passes.inference.inference` returned.

    Args:
        gm: the graph; its weights' values are not read.
        example: a tensor for each placeholder. Sizes of 1 are traced as 2.
        dims: the name of each dimension that should be dynamic, by placeholder.
        opset: the version of ONNX's operators; None: torch's default.
        packing: which weights to hold packed.

    Raises:
        ExportError: torch cannot express the graph in ONNX (names the operator), or not in this opset.
    """
    weights = gm.state_dict().keys()
    flat = _flat(gm)
    with _quiet():
        model = _shortened(gm, flat, example, dims, opset) or _optimized(gm, flat, example, dims, opset)
    spell_out(model)
    folded = fold_weights(model, [v for v in model.graph.initializers.values() if v.name in weights])
    packed, folded, dense = pack_weights(model, folded, packing)
    operands = {v for p in packed.values() for v in p.values}
    named = _tensor_names(gm, folded) | {str(v.name) for v in operands}
    name_values(model, gm.signature.placeholders, output_names(gm), named, _modules(gm, flat))
    symbols: dict[str, str] = {}
    for value in model.graph.inputs:
        roles = dims.get(str(value.name), {})
        symbols |= {symbol: roles[dim] for dim, symbol in _dynamic(value).items() if dim in roles}
    name_dimensions(model, symbols)
    _clean(model)
    dynamic = {str(v.name): _dynamic(v) for v in model.graph.inputs}
    fixed = tuple(
        f"dimension {dim} of '{name}' ({role})"
        for name, roles in dims.items()
        for dim, role in roles.items()
        if dim not in dynamic.get(name, {})
    )
    values = (*(v for f in folded for v in f.inputs), *model.graph.initializers.values())
    held = {str(v.name): v for v in values if v.name in weights and v not in operands}
    return Translation(model, held, folded, dynamic, fixed, packed, dense)


def structure(gm: CapturedModule) -> str:
    """All that a translation depends on, as text: equal texts mean equal models, names included."""
    lines = [format_graph(gm)]
    first: dict[int, str] = {}
    weights = gm.state_dict().keys()
    for name, tensor in named_tensors(gm):
        alias = first.setdefault(id(tensor), name)
        value = "a weight" if name in weights else _digest(tensor)
        lines.append(f"{name}: {tensor.dtype}{list(tensor.shape)}, {value}, first seen as {alias}")
    return "\n".join(lines)


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data.tobytes()).hexdigest()


def _flat(gm: CapturedModule) -> Graph:
    """The graph with plain inputs and outputs, its calls numbered."""
    graph = Graph()
    outputs = graph.graph_copy(gm.graph, {})
    assert isinstance(outputs, tuple)
    graph.output(tuple(value for value in outputs if value is not None))
    names: dict[int, str] = {}
    for node in graph.find_nodes(op="get_attr"):  # of a tensor's names the first
        node.target = names.setdefault(id(get_path(gm, str(node.target))), str(node.target))
    number_calls(graph)
    return graph


def _shortened(
    gm: CapturedModule,
    flat: Graph,
    example: Mapping[str, Tensor],
    dims: Mapping[str, Mapping[int, str]],
    opset: int | None,
) -> ir.Model | None:
    """What :func:`_optimized` gives, by way of a graph with fewer of its repeated blocks; None if that is no way."""
    repeats = find_repeats(flat, gm, gm.state_dict().keys())
    if not repeats:
        return None
    short = _flat(gm)
    kept = drop_repeats(short, repeats)
    try:
        model = _optimized(gm, short, example, dims, opset)
    except ExportError:  # blocks that change the sizes of what they pass on lead to others without some of them
        return None
    return model if unroll(model.graph, repeats, kept) else None


def _optimized(
    gm: CapturedModule,
    graph: Graph,
    example: Mapping[str, Tensor],
    dims: Mapping[str, Mapping[int, str]],
    opset: int | None,
) -> ir.Model:
    """The ONNX model of a graph over a module's tensors, optimised without a look at its weights.

    Its nodes say in their ``meta`` which call they come from.
    """
    weights = gm.state_dict().keys()
    kwargs, _ = make_example(dict(example), {}, {name: dims.get(name, {}) for name in example}).trace_inputs()
    try:
        program = make_program(_over_plain_tensors(gm, graph), kwargs, dims)
        for node in program.graph.nodes:
            node.meta["nn_module_stack"] = call_as_module(notes(node).get("call"))
        converted = torch.onnx.export(
            program,
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=opset,
            custom_translation_table={**translations()},
        )
    except ExportError:
        raise
    except Exception as error:  # whatever torch, or an operator's translation, raises ends up here
        raise _not_expressible(error, example) from error
    assert converted is not None
    model = converted.model
    if opset is not None and model.opset_imports[""] != opset:
        found = model.opset_imports[""]
        other = "a newer one" if opset < found else f"one between it and {opset}"
        raise ExportError(
            f"opset={opset} is not available: torch translates this graph to opset {found}. Ask for that one or {other}"
        )
    for name, value in model.graph.initializers.items():
        if name in weights:
            value.const_value = None
    optimize_ir(model)
    for node in model.graph.all_nodes():
        node.meta[CALL] = read_call(node)
    return model


def _over_plain_tensors(gm: CapturedModule, graph: Graph) -> GraphModule:
    """The graph over a module's tensors, packed ones as plain tensors that hold nothing: torch would look into them."""

    def plain(value: Any) -> Any:
        if not isinstance(value, QuantizedTensor):
            return value
        held = torch.empty_strided(value.shape, (0,) * value.dim(), dtype=value.dtype, device=value.device)
        return nn.Parameter(held, requires_grad=False)

    read = {str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module")}
    return GraphModule({name: plain(get_path(gm, name)) for name in read}, graph)


def _modules(gm: CapturedModule, flat: Graph) -> Callable[[int | None], list[tuple[str, str]]]:
    """For a call's number the modules that it is inside of: path and class, from the root on."""
    scopes = {notes(node).get("call"): str(notes(node).get("scope") or "") for node in flat.nodes}
    known = {name.partition(".")[0] for name, _ in gm.named_modules()}

    @cache
    def inside(scope: str) -> list[tuple[str, str]]:
        atoms = scope.split(".") if scope.partition(".")[0] in known and scope else []
        return [(path, _class_at(gm, path)) for path in (".".join(atoms[:i]) for i in range(len(atoms) + 1))]

    return lambda call: inside(scopes.get(call, ""))


def _class_at(gm: nn.Module, path: str) -> str:
    try:
        module = get_path(gm, path)
    except AttributeError:  # a bare parameter's functional call, or a layer the graph keeps no module of
        return ""
    return str(getattr(module, "origin", "") or type(module).__name__)


def output_names(gm: CapturedModule) -> tuple[str, ...]:
    """The names of the outputs that an ONNX file has: those that are no None."""
    returned: Any = gm.graph.output_node().args[0]
    return tuple(n for n, v in zip(gm.signature.outputs, returned, strict=True) if v is not None)


def _tensor_names(gm: nn.Module, folded: Sequence[Folded]) -> set[str]:
    """The names that initializers may have: those of tensors, and of what is made of them."""
    return {*(name for name, _ in named_tensors(gm)), *(str(f.value.name) for f in folded)}


def _dynamic(value: ir.Value) -> dict[int, str]:
    """The dimensions of a value that have a name instead of a size."""
    dims = {d: size.value for d, size in enumerate(value.shape or ()) if isinstance(size, ir.SymbolicDim)}
    return {d: size for d, size in dims.items() if size is not None and not size.isdecimal()}


def _clean(model: ir.Model) -> None:
    """Leave nothing of the exporting machine in the model."""
    model.doc_string = model.graph.doc_string = None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for value in all_values(model):
        value.metadata_props.clear()
        value.doc_string = None
    for node in model.graph.all_nodes():
        node.doc_string = None


def _not_expressible(error: Exception, example: Mapping[str, Tensor]) -> ExportError:
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    lines = [line for line in str(root).strip().splitlines() if line.strip()]
    inputs = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in example.items())
    return ExportError(
        f"torch cannot express the graph in ONNX: {lines[0] if lines else type(root).__name__}. Replace the "
        "operator in the model (in Hugging Face models another attn_implementation or experts_implementation "
        f"may do), try a newer opset, or give example_inputs that the model takes, if it does not take {inputs}"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' logs off the user's screen; what matters in them comes as errors."""
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
