"""The two ways from a model to a flat fx graph: ``torch.export`` and ``torch.fx.symbolic_trace``.

Both give a :class:`Trace` in the mode the model is in. Each node notes the module whose code made it
(``scope``, and its class), which is how the passes know a layer by its name.

    symbolic:  fc = call_module[fc](x)    ->   linear = aten.linear(x, fc.weight, fc.bias)
"""

from __future__ import annotations

import inspect
import logging
import operator
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized
from torch.utils import _pytree as pytree

from lorafx.errors import CaptureError
from lorafx.graph import annotate
from lorafx.passes.bitsandbytes import PackedLinear
from lorafx.passes.casts import CastsApart, without_copies
from lorafx.passes.example import Example
from lorafx.serialize import plain_containers

aten = torch.ops.aten


@dataclass(frozen=True)
class Trace:
    """One mode of a model as a graph.

    ``holder`` has what the graph refers to beyond the model's own tensors (lifted constants,
    subgraphs); ``leaves`` names the placeholders of each argument; ``ranges`` bounds each symbolic size.
    """

    graph: Graph
    holder: nn.Module
    leaves: Mapping[str, tuple[str, ...]]
    in_specs: Mapping[str, pytree.TreeSpec]
    out_spec: pytree.TreeSpec
    ranges: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)


def export_trace(model: nn.Module, example: Example) -> Trace:
    """Trace with ``torch.export`` (not strict), dynamic dimensions as the example says.

    Raises:
        CaptureError: names the line of the model's code that cannot be traced.
    """
    kwargs, shapes = example.trace_inputs()
    with _quiet():
        try:
            with CastsApart():
                program = torch.export.export(model, (), kwargs, dynamic_shapes=shapes, strict=False)
            module = program.module(check_guards=False)
        except Exception as error:  # whatever the model's own code raises under tracing ends up here
            raise _not_traceable(model, error, "torch.export") from error
    without_copies(module)
    graph = module.graph
    leaves, specs = _name_placeholders(graph, kwargs, example)
    for node in graph.nodes:
        note_scope(node)
    out_spec = program.call_spec.out_spec
    assert out_spec is not None
    ranges = {
        str(symbol): (int(bounds.lower), int(bounds.upper) if bounds.upper.is_Integer else None)
        for symbol, bounds in program.range_constraints.items()
    }
    return Trace(graph, module, leaves, specs, out_spec, ranges)


class _Tracer(torch.fx.Tracer):
    """Looks into parametrized layers, whose weight is computed, and not into our own linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.autocasts = _autocasts()

    def create_node(self, kind: str, *arguments: Any, **options: Any) -> Node:
        if kind.startswith("call") and _autocasts() != self.autocasts:
            raise RuntimeError("such a graph would not keep the model's own torch.autocast")
        return super().create_node(kind, *arguments, **options)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaf = isinstance(m, PackedLinear) or super().is_leaf_module(m, module_qualified_name)
        return leaf and not is_parametrized(m)


def _autocasts() -> int:
    """In how many contexts of autocast this is called."""
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def symbolic_trace(model: nn.Module, parameters: tuple[str, ...]) -> Trace:
    """Trace with ``torch.fx`` when there are no inputs to run with; ``parameters`` become the inputs.

    Raises:
        CaptureError: names the line of the model's code that cannot be traced, and asks for inputs.
    """
    tracer = _Tracer()
    concrete = {
        n: p.default for n, p in _forward_parameters(model).items() if p.default is not p.empty and n not in parameters
    }
    try:
        graph = tracer.trace(model, concrete_args=concrete or None)
    except Exception as error:  # whatever the model's own code raises under tracing ends up here
        raise _not_traceable(model, error, "torch.fx.symbolic_trace without example inputs") from error
    for node in graph.nodes:
        note_scope(node)
    for node in graph.find_nodes(op="placeholder"):
        if node.target not in parameters:
            _drop_default(model, node)
    _linear_modules_to_calls(graph, model)
    output = graph.output_node()
    flat, out_spec = pytree.tree_flatten(plain_containers(output.args[0]))
    output.args = (tuple(flat),)
    leaf = pytree.tree_flatten(0)[1]
    return Trace(graph, model, {n: (n,) for n in parameters}, dict.fromkeys(parameters, leaf), out_spec)


def _drop_default(model: nn.Module, placeholder: Node) -> None:
    """Remove a parameter that keeps its default, with fx's check that a call gives no other value.

    Raises:
        CaptureError: the graph reads it (as it would ``**kwargs``).
    """
    graph = placeholder.graph
    checks = (operator.eq, torch._assert, torch.fx._symbolic_trace._assert_is_none)
    for user in [*placeholder.users, *(u for n in placeholder.users for u in n.users)][::-1]:
        if user.target in checks and not user.users:
            graph.erase_node(user)
    if placeholder.users:
        raise CaptureError(f"{type(model).__name__}.forward reads '{placeholder.target}': give example_inputs")
    graph.erase_node(placeholder)


def _forward_parameters(model: nn.Module) -> Mapping[str, Any]:
    return inspect.signature(model.forward).parameters


def _linear_modules_to_calls(graph: Graph, model: nn.Module) -> None:
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is F.linear:
            names = ("input", "weight", "bias")
            given = dict(zip(names, node.args, strict=False)) | node.kwargs
            node.target = aten.linear.default
            node.args, node.kwargs = tuple(given[n] for n in names if given.get(n) is not None), {}
        if node.op != "call_module":
            continue
        layer = model.get_submodule(str(node.target))
        annotate(node, scope=node.target, kind=_class_name(type(layer)))
        hooked = layer._forward_hooks or layer._forward_pre_hooks
        if type(layer).forward not in (nn.Linear.forward, PackedLinear.forward) or hooked:
            continue  # with its hooks the module does more than its weight and bias say
        with graph.inserting_before(node):
            operands = [graph.get_attr(f"{node.target}.weight")]
            if layer.bias is not None:
                operands.append(graph.get_attr(f"{node.target}.bias"))
            call = graph.call_function(aten.linear.default, (*node.args, *node.kwargs.values(), *operands))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.erase_node(node)


def _name_placeholders(
    graph: Graph, kwargs: Mapping[str, Any], example: Example
) -> tuple[dict[str, tuple[str, ...]], dict[str, pytree.TreeSpec]]:
    """Name each placeholder after its argument, and drop those of constants."""
    nodes = iter(list(graph.find_nodes(op="placeholder")))
    leaves: dict[str, tuple[str, ...]] = {}
    specs: dict[str, pytree.TreeSpec] = {}
    for name, value in kwargs.items():
        flat, spec = pytree.tree_flatten(value)
        held = [next(nodes) for _ in flat]
        if name in example.constants:
            for node in held:
                graph.erase_node(node)
            continue
        names = (name,) if spec.is_leaf() else tuple(f"{name}_{i}" for i in range(len(flat)))
        for node, leaf in zip(held, names, strict=True):
            node.target = leaf
        leaves[name], specs[name] = names, spec
    return leaves, specs


def _class_name(cls: Any) -> str:
    return cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}"


def note_scope(node: Node) -> None:
    """Note the module whose code made a node, from what the tracer wrote down, and drop the latter."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    if stack:
        path, cls = stack[-1]
        # torch marks the second call of a module "name@1"
        annotate(node, scope=re.sub(r"@\d+", "", path), kind=_class_name(cls))
    for key in ("nn_module_stack", "from_node", "torch_fn", "tensor_meta"):
        node.meta.pop(key, None)


def _not_traceable(model: nn.Module, error: BaseException, by: str) -> CaptureError:
    library = str(Path(torch.__file__).parent)
    ours = [str(Path(f).resolve().parent) for f in (__file__, inspect.getfile(CaptureError))]
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if not f.filename.startswith((library, "<")) and str(Path(f.filename).resolve().parent) not in ours
    ]
    where = ""
    if frames:
        last = frames[-1]
        where = f" at {Path(last.filename).name}:{last.lineno} in {last.name}: `{(last.line or '').strip()}`"
    reason = next((line for line in str(error).strip().splitlines() if line.strip()), type(error).__name__)
    advice = (
        "give example_inputs so that torch.export can run the model"
        if "symbolic" in by
        else "branch on shapes or configuration instead of on tensor values there, or check the inputs"
    )
    return CaptureError(f"{by} cannot trace {type(model).__name__}{where} ({reason}). What to do: {advice}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's own log of what it traces away from the user's screen."""
    names = ("torch.export", "torch.fx", "torch._dynamo", "torch._subclasses")
    loggers = [logging.getLogger(n) for n in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        # torch.export prints the graph it had when it failed
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
