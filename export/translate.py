"""From a graph for inference to an ONNX model that holds no weights yet.

    graph --torch.export--> program --torch.onnx--> ONNX --weights' values taken out--> --optimizer-->
          --weights folded as expressions--> model: nodes and names that depend on structure only

Whatever is in the state dict is a weight, and no decision looks at a weight's value: equal weights are
not merged, zero biases not dropped, norms not fused. Two graphs that differ in weights only become the
same model. Constants (buffers that are not saved, tensors in the model's code) keep their values, since
those follow from the model's configuration.
"""

from __future__ import annotations

import hashlib
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnxscript.optimizer import optimize_ir
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node

from lorafx.errors import ExportError
from lorafx.export.weights import Folded, fold_weights
from lorafx.graph import CapturedModule, get_path, named_tensors, notes
from lorafx.ir import format_graph
from lorafx.passes.example import make_example

#: The node metadata that stays: where in the module tree a node comes from. The rest holds file paths.
_KEPT_METADATA = frozenset({"namespace", "pkg.torch.onnx.class_hierarchy", "pkg.torch.onnx.name_scopes"})
_SYMBOL = re.compile(r"(?<!\w)[su]\d+(?!\w)")


@dataclass(frozen=True)
class Translation:
    """An ONNX model without weights.

    ``weights`` maps the names in the state dict to the values that stand for them, ``folded`` are
    the initializers that are made from weights. ``dims`` names each input's dynamic
    dimensions. ``fixed`` lists the dimensions that the graph has dynamic and the model has not.
    """

    model: ir.Model
    weights: Mapping[str, ir.Value]
    folded: tuple[Folded, ...]
    dims: Mapping[str, Mapping[int, str]]
    fixed: tuple[str, ...]


def translate(
    gm: CapturedModule,
    example: Mapping[str, Tensor],
    dims: Mapping[str, Mapping[int, str]],
    opset: int | None = None,
) -> Translation:
    """Translate a graph that :func:`lorafx.passes.inference.inference` returned.

    Args:
        gm: the graph; its weights' values are not read.
        example: a tensor for each placeholder. Sizes of 1 are traced as 2.
        dims: the name of each dimension that should be dynamic, by placeholder.
        opset: the version of ONNX's operators; None: torch's default.

    Raises:
        ExportError: torch cannot express the graph in ONNX (names the operator), or not in this opset.
    """
    with _quiet():
        try:
            program = _program(gm, example, dims)
            converted = torch.onnx.export(program, dynamo=True, optimize=False, verbose=False, opset_version=opset)
        except Exception as error:  # whatever torch, or an operator's translation, raises ends up here
            raise _not_expressible(error) from error
        assert converted is not None
        model = converted.model
        if opset is not None and model.opset_imports[""] != opset:
            raise ExportError(
                f"opset={opset} is not available: torch translates this graph to opset {model.opset_imports['']}. "
                "Ask for that one or a newer one"
            )
        weights = {n: v for n, v in model.graph.initializers.items() if n in gm.state_dict()}
        for value in weights.values():
            value.const_value = None
        optimize_ir(model)
    folded = fold_weights(model, weights.values())
    _name_values(model, gm)
    symbols: dict[str, str] = {}
    for value in model.graph.inputs:
        roles = dims.get(str(value.name), {})
        symbols |= {symbol: roles[dim] for dim, symbol in _dynamic(value).items() if dim in roles}
    _name_dimensions(model, symbols)
    _clean(model)
    named = {str(v.name): _dynamic(v) for v in model.graph.inputs}
    fixed = tuple(
        f"dimension {dim} of '{name}' ({role})"
        for name, roles in dims.items()
        for dim, role in roles.items()
        if dim not in named.get(name, {})
    )
    return Translation(model, weights, folded, named, fixed)


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


def _program(
    gm: CapturedModule, example: Mapping[str, Tensor], dims: Mapping[str, Mapping[int, str]]
) -> ExportedProgram:
    """The graph with plain inputs and outputs, exported. No node keeps the place in a file it came from."""
    graph = Graph()
    outputs = graph.graph_copy(gm.graph, {})
    assert isinstance(outputs, tuple)
    graph.output(tuple(value for value in outputs if value is not None))
    flat = GraphModule(gm, graph)
    traced = make_example(dict(example), {}, {name: dims.get(name, {}) for name in example})
    kwargs, shapes = traced.trace_inputs()
    program = torch.export.export(flat, (), kwargs, dynamic_shapes=shapes, strict=False)
    for node in program.graph.nodes:
        _note_modules(node, gm)
    return program


def _note_modules(node: Node, gm: nn.Module) -> None:
    """Tell torch.onnx the modules of the original that a node is inside of, by path and class."""
    atoms = str(notes(node).get("scope") or "").split(".")
    paths = ["", *(".".join(atoms[: i + 1]) for i in range(len(atoms)) if atoms[0])]
    node.meta["nn_module_stack"] = {path: (path, _class_at(gm, path)) for path in paths}


def _class_at(gm: nn.Module, path: str) -> str:
    try:
        module = get_path(gm, path)
    except AttributeError:  # a bare parameter's functional call, or a layer the graph keeps no module of
        return ""
    return str(getattr(module, "origin", "") or type(module).__name__)


def _name_values(model: ir.Model, gm: CapturedModule) -> None:
    """Give inputs and outputs the names that a user knows; what else has such a name gives way."""
    names = (*gm.signature.placeholders, *output_names(gm))
    values = (*model.graph.inputs, *model.graph.outputs)
    for value in _all_values(model):
        if value.name in names and value not in values:
            value.name = f"{value.name}.inner"
    for value, name in zip(values, names, strict=True):
        value.name = name


def output_names(gm: CapturedModule) -> tuple[str, ...]:
    """The names of the outputs that an ONNX file has: those that are no None."""
    returned: Any = gm.graph.output_node().args[0]
    return tuple(n for n, v in zip(gm.signature.outputs, returned, strict=True) if v is not None)


def _dynamic(value: ir.Value) -> dict[int, str]:
    """The dimensions of a value that have a name instead of a size."""
    dims = {d: size.value for d, size in enumerate(value.shape or ()) if isinstance(size, ir.SymbolicDim)}
    return {d: size for d, size in dims.items() if size is not None and not size.isdecimal()}


def _name_dimensions(model: ir.Model, symbols: Mapping[str, str]) -> None:
    """Write torch's symbols (``s72*s31``) as names (``batch*sequence``)."""

    def name(size: int | ir.SymbolicDim) -> int | str | None:
        if isinstance(size, int) or size.value is None:
            return size if isinstance(size, int) else None
        if size.value.isdecimal():  # torch writes a symbol that turned out to be a number like this
            return int(size.value)
        return _SYMBOL.sub(lambda match: symbols.get(match[0], match[0]), size.value)

    for value in _all_values(model):
        if value.shape is not None:
            value.shape = ir.Shape([name(size) for size in value.shape])


def _all_values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for node in model.graph.all_nodes():
        yield from node.outputs


def _clean(model: ir.Model) -> None:
    """Leave nothing of the exporting machine in the model."""
    model.doc_string = model.graph.doc_string = None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for value in _all_values(model):
        value.metadata_props.clear()
        value.doc_string = None
    for node in model.graph.all_nodes():
        node.doc_string = None
        for key in node.metadata_props.keys() - _KEPT_METADATA:
            del node.metadata_props[key]


def _not_expressible(error: Exception) -> ExportError:
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    lines = [line for line in str(root).strip().splitlines() if line.strip()]
    return ExportError(
        f"torch cannot express the graph in ONNX: {lines[0] if lines else type(root).__name__}. Replace the "
        "operator in the model (in Hugging Face models another attn_implementation or experts_implementation "
        "may do), or try a newer opset"
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
