"""Capture: a model becomes a :class:`~lorafx.graph.CapturedModule` that behaves as the model does.

    model --trace, in train and in eval--> two traces --canonicalize--> --align--> one graph
          --outline the loss--> graph --weights by storage, frozen--> CapturedModule

The user's model is left as it was: weights are shared, never re-flagged; modes, configuration and the
random state are put back.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import keyword
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.nn.modules.conv import _ConvTransposeNd
from torch.utils import _pytree as pytree

from lorafx.errors import CaptureError, FixedDimensionWarning
from lorafx.graph import ROOT_MODE, CapturedModule, Scope, get_path, mark_own, named_tensors
from lorafx.passes import optional
from lorafx.passes.bitsandbytes import settle_dtypes, with_packed_layers
from lorafx.passes.canonical import canonicalize
from lorafx.passes.example import Example, ExampleInputs, bind, make_example
from lorafx.passes.frontends import Trace, export_trace, symbolic_trace
from lorafx.passes.huggingface import (
    capture_config,
    initializer_range,
    input_embedding,
    output_layers,
    synthesize_inputs,
    synthesize_labels,
)
from lorafx.passes.mode_reads import same_in_eval, watch_mode_reads
from lorafx.passes.modes import align
from lorafx.passes.original import Call, Original
from lorafx.signature import Argument, Signature, SignatureCodeGen

_LABELS = frozenset({"labels", "start_positions", "end_positions", "next_sentence_label"})


def capture(
    model: nn.Module,
    example_inputs: ExampleInputs = None,
    *,
    dynamic_shapes: Mapping[str, Any] | None = None,
    eval_only: bool = False,
) -> CapturedModule:
    """Capture ``model`` as one graph for both modes.

    Args:
        model: any module; Hugging Face models get their own example inputs when none are given. Layers of bitsandbytes
            come out as linear layers on their packed weights (:mod:`lorafx.passes.bitsandbytes`).
        example_inputs: a tuple of positional or a dict of keyword arguments (or one tensor). ``None``:
            synthesised for Hugging Face models, otherwise the model is traced symbolically.
        dynamic_shapes: per argument ``{dim: name}`` (or torch.export's own form) instead of the default;
            ``{}`` for an argument makes it static.
        eval_only: capture eval mode alone: a graph that is the same in both modes, and nothing to train.

    Raises:
        CaptureError: the model is no module; it cannot be traced, with the line of its code and what to do; its modes
            cannot be reconciled; or a module or tensor has a name that no graph can have.
        QuantizationError: the state of a layer of bitsandbytes is damaged.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"expected a torch.nn.Module, not {type(model).__name__}. A folder with a checkpoint is for "
            "lorafx.load_pretrained, or for lorafx.export_checkpoint"
        )
    _refuse_keywords(model)
    model = with_packed_layers(model)
    with capture_config(model), _unchanged(model):
        gm = _captured(model, example_inputs, dynamic_shapes, eval_only)
        gm.meta["original"] = Original(model, Call(example_inputs, dynamic_shapes))
    settle_dtypes(gm, model)
    for name, module in model.named_modules(remove_duplicate=False):
        gm.get_submodule(name).training = module.training
    gm.get_submodule(ROOT_MODE).training = model.training
    return gm


def _refuse_keywords(model: nn.Module) -> None:
    """Refuse what is called by a keyword of Python, as keys of an ``nn.ModuleDict`` may be.

    The code that torch.fx writes for a graph, torch.export's too, reads tensors by their paths, and quotes only what is
    no identifier: ``self.heads.class.weight``.
    """
    paths = [n for named in (model.named_modules(), model.named_parameters(), model.named_buffers()) for n, _ in named]
    for path in paths:
        found = next((name for name in path.split(".") if keyword.iskeyword(name)), None)
        if found is not None:
            raise CaptureError(
                f"'{path}' cannot be captured: '{found}' is a keyword of Python, and neither torch.export nor torch.fx "
                f"can write a graph that reads it. Give it another name in the model ('{found}_') and its checkpoint"
            )


def _captured(
    model: nn.Module, example_inputs: ExampleInputs, dynamic_shapes: Mapping[str, Any] | None, eval_only: bool
) -> CapturedModule:
    given = example_inputs if example_inputs is not None else synthesize_inputs(model)
    if given is None:
        return _capture_symbolic(model)
    bound, parameters = bind(model, given)
    labels = frozenset(_LABELS & bound.keys())
    example = make_example(bound, parameters, dynamic_shapes, labels)
    if not labels and (synthetic := synthesize_labels(model, bound)) is not None:
        try:
            extended = make_example({**bound, "labels": synthetic}, parameters, dynamic_shapes, frozenset({"labels"}))
            return _capture_export(model, extended, example, eval_only)
        except CaptureError:
            pass  # the model's loss cannot be captured; without labels it may well be
    return _capture_export(model, example, example, eval_only)


def _capture_export(model: nn.Module, example: Example, user: Example, eval_only: bool) -> CapturedModule:
    model.train(not eval_only)
    with watch_mode_reads() as reads:
        train = export_trace(model, example)
    canonicalize(train, model, example.optional)
    if not eval_only and (reads.decisive or not same_in_eval(train.graph)):
        model.eval()
        evaluated = export_trace(model, example)
        canonicalize(evaluated, model, example.optional)
        if train.out_spec != evaluated.out_spec:
            raise CaptureError(
                f"train and eval mode return different outputs: {train.out_spec} and {evaluated.out_spec}. Make the "
                "model return the same fields in both modes"
            )
        align(train, evaluated)
    if not optional.serve_the_loss_only(train.graph, example.optional):
        if example is not user:
            raise CaptureError("labels that nobody gave would decide more than the loss")
        example = dataclasses.replace(example, optional=frozenset())
    dims, ranges, fixed, reports = _dimensions(train, example)
    for name, dim, role, sizes in reports:
        warnings.warn(
            f"dimension {dim} of '{name}' ({role}) came out {sizes}: the model's code depends on it, or another input "
            "of the same size is not dynamic. The graph is right at no other size. Pass dynamic_shapes to say that "
            "this is meant, or which dimensions vary",
            FixedDimensionWarning,
            stacklevel=6,
        )
    optional.outline(train.graph, train.holder, example.optional)
    signature = Signature(
        arguments=_arguments(train, example),
        outputs=_output_names(train.out_spec),
        out_spec=train.out_spec,
        uncaptured=example.uncaptured,
        order=example.order,
        positional=example.positional,
        dims=dims,
        ranges=ranges,
        fixed=fixed,
    )
    return _build(model, train, signature, dict(user.tensors))


def _capture_symbolic(model: nn.Module) -> CapturedModule:
    named = {
        n: p
        for n, p in inspect.signature(model.forward).parameters.items()
        if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }
    inputs = Example(dict.fromkeys(n for n, p in named.items() if p.default is p.empty), {}, {}, named)
    traces = []
    for training in (True, False):
        model.train(training)
        trace = symbolic_trace(model, tuple(inputs.tensors))
        canonicalize(trace, model)
        traces.append(trace)
    align(*traces)
    trace = traces[0]
    signature = Signature(
        arguments=_arguments(trace, inputs),
        outputs=_output_names(trace.out_spec),
        out_spec=trace.out_spec,
        uncaptured=inputs.uncaptured,
        order=inputs.order,
        positional=inputs.positional,
    )
    return _build(model, trace, signature, None)


def _arguments(trace: Trace, example: Example) -> tuple[Argument, ...]:
    order = [n for n in example.order if n in trace.leaves]
    return tuple(Argument(n, trace.leaves[n], trace.in_specs[n], n in example.optional) for n in order)


def _build(model: nn.Module, trace: Trace, signature: Signature, example: dict[str, Any] | None) -> CapturedModule:
    graph = trace.graph
    called = {str(n.target) for n in graph.nodes if n.op == "call_module"}
    root = mirror(model, called)
    root.add_module(ROOT_MODE, Scope())
    known = {name for name, _ in (*named_tensors(root), *root.named_modules(remove_duplicate=False))}
    for node in graph.nodes:
        path = str(node.target)
        if node.op not in ("get_attr", "call_module") or path in known:
            continue
        known.add(path)
        value = get_path(trace.holder, path)
        if isinstance(value, nn.Module):
            root.add_module(path, value)
        elif isinstance(value, Tensor):  # a constant: torch.export puts it below the module whose code makes it
            parent, _, name = path.rpartition(".")
            get_path(root, parent).register_buffer(name, value.detach().clone(), persistent=False)
    graph.set_codegen(SignatureCodeGen(signature))
    gm = CapturedModule(root, graph, type(model).__name__)
    gm.meta["example"] = example
    gm.meta["output_layers"] = output_layers(model)
    gm.meta["input_embedding"] = input_embedding(model)
    gm.meta["initializer_range"] = initializer_range(model)
    gm.check()
    return gm


def mirror(model: nn.Module, kept: set[str]) -> nn.Module:
    """The module tree of ``model`` as scopes: frozen parameters over the same storage, ties kept.

    Buffers are copies (a graph in train mode writes them). The modules at the ``kept`` paths stay what
    they are, as shallow copies, since the graph calls them.
    """
    tensors: dict[int, Tensor] = {}
    modules: dict[int, nn.Module] = {}

    def frozen(parameter: nn.Parameter) -> nn.Parameter:
        if id(parameter) not in tensors:
            tensors[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
        found = tensors[id(parameter)]
        assert isinstance(found, nn.Parameter)
        return found

    def own(buffer: Tensor) -> Tensor:
        if id(buffer) not in tensors:
            tensors[id(buffer)] = buffer.detach().clone()
            mark_own(tensors[id(buffer)])
        return tensors[id(buffer)]

    def visit(source: nn.Module, path: str, real: bool) -> nn.Module:
        if id(source) in modules:
            return modules[id(source)]
        real = real or path in kept
        target: nn.Module
        if real:
            target = copy.copy(source)
            target._parameters, target._buffers, target._modules = {}, {}, {}
        else:
            transposed = getattr(source, "is_transposed", False) is True
            target = Scope(type(source).__name__, _kind(source), transposed)
        modules[id(source)] = target
        target.training = source.training
        for name, parameter in source._parameters.items():
            target._parameters[name] = None if parameter is None else frozen(parameter)
        for name, buffer in source._buffers.items():
            target._buffers[name] = None if buffer is None else own(buffer)
        target._non_persistent_buffers_set = set(source._non_persistent_buffers_set)
        for name, child in source._modules.items():
            inner = f"{path}.{name}" if path else name
            target._modules[name] = None if child is None else visit(child, inner, real)
        return target

    return visit(model, "", False)


def _kind(module: nn.Module) -> str:
    """The kind of a scope; transformers' Conv1D is a linear layer but in name."""
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
        return "linear"
    if isinstance(module, nn.MultiheadAttention):
        return "attention"
    return "transposed convolution" if isinstance(module, _ConvTransposeNd) else ""


def _dimensions(
    trace: Trace, example: Example
) -> tuple[
    dict[str, dict[int, str]],
    dict[str, tuple[int, int | None]],
    dict[str, dict[int, int]],
    list[tuple[str, int, str, str]],
]:
    """Names of the dimensions that stayed dynamic, each name's range, fixed sizes, and what to warn of."""
    values = {str(n.target): n.meta["val"] for n in trace.graph.find_nodes(op="placeholder")}
    dims: dict[str, dict[int, str]] = {}
    ranges: dict[str, tuple[int, int | None]] = {}
    fixed: dict[str, dict[int, int]] = {}
    reports: list[tuple[str, int, str, str]] = []
    for argument, leaves in trace.leaves.items():
        for leaf, roles in zip(leaves, example.roles[argument], strict=True):
            for dim, role in roles.items():
                size = values[leaf].shape[dim]
                if is_concrete_int(size):
                    reports.append((leaf, dim, role, f"fixed at {int(size)}"))
                    if argument not in example.optional:
                        fixed.setdefault(leaf, {})[dim] = int(size)
                    continue
                dims.setdefault(leaf, {})[dim] = role
                low, high = trace.ranges.get(str(size), (1, None))
                low = 1 if low <= 2 else low  # torch's lower bound of 2 says "not specialised to 0 or 1"
                if low > 1 and argument not in example.overrides:
                    reports.append((leaf, dim, role, f"limited to {low} or more"))
                old_low, old_high = ranges.get(role, (1, None))
                highs = [h for h in (high, old_high) if h is not None]
                ranges[role] = (max(low, old_low), min(highs) if highs else None)
    return dims, ranges, fixed, reports


def _output_names(spec: pytree.TreeSpec) -> tuple[str, ...]:
    """``logits``, ``hidden_states.0`` ... of a structure; a lone tensor is ``output``."""
    example = pytree.tree_unflatten([0] * spec.num_leaves, spec)
    paths = [path for path, _ in pytree.tree_flatten_with_path(example)[0]]
    names = []
    for path in paths:
        parts = [str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path]
        name = ".".join(parts) or "output"
        names.append(f"output_{name}" if name[0].isdigit() else name)
    return tuple(names)


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Put back each module's mode and the random state."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for module, training in modes:
            module.training = training
