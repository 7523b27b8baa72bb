"""Example inputs: bound to the model's ``forward``, given dynamic dimensions, made big enough to trace.

Tracing specialises any size of 1 silently, so batches and sequences of one are traced as two; the
user's own example is kept as it is for later checks.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from lorafx.errors import CaptureError, InputError

ExampleInputs = Mapping[str, Any] | Sequence[Any] | Tensor | None

#: Inputs ``[batch, features, frames]`` of audio models, whose frames are padded to a size the model fixes.
_FRAMES = frozenset({"input_features"})

_PLAIN = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class Example:
    """Example inputs by argument name.

    ``tensors`` holds the arguments made of tensors, ``constants`` the other arguments that were
    given (captured as they are), ``roles`` the name of each dimension that should stay dynamic, per
    argument and leaf, ``overrides`` what ``dynamic_shapes`` said instead (torch.export's own form).
    """

    tensors: Mapping[str, Any]
    constants: Mapping[str, Any]
    roles: Mapping[str, tuple[Mapping[int, str], ...]]
    parameters: Mapping[str, inspect.Parameter]
    optional: frozenset[str] = frozenset()
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def order(self) -> tuple[str, ...]:
        """Every parameter a call may name: captured ones, and those with a plain default."""
        named = [n for n, p in self.parameters.items() if n in self.tensors or _has_plain_default(n, p, self)]
        return (*named, *(n for n in self.tensors if n not in self.parameters))

    @property
    def positional(self) -> int:
        """How many of :attr:`order` may be given by position (up to the first that cannot be named)."""
        count = 0
        for name, parameter in self.parameters.items():
            if name not in self.order or parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                break
            count += 1
        return count

    @property
    def uncaptured(self) -> dict[str, Any]:
        """Parameters that are no input of the graph, with the value that was captured."""
        return {n: self.constants.get(n, self.parameters[n].default) for n in self.order if n not in self.tensors}

    def trace_inputs(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Keyword arguments for tracing, and torch.export's ``dynamic_shapes`` for them."""
        kwargs: dict[str, Any] = {}
        shapes: dict[str, Any] = {}
        for name, value in self.tensors.items():
            leaves, spec = pytree.tree_flatten(value)
            roles = self.roles[name]
            # Cloned: torch.export makes one input of two arguments that are the same tensor.
            grown = [_grow(leaf, role).clone() for leaf, role in zip(leaves, roles, strict=True)]
            kwargs[name] = pytree.tree_unflatten(grown, spec)
            marks = [dict.fromkeys(role, Dim.AUTO) for role in roles]
            shapes[name] = self.overrides.get(name, pytree.tree_unflatten(marks, spec))
        for name, value in self.constants.items():
            kwargs[name], shapes[name] = value, None
        return kwargs, shapes


def _has_plain_default(name: str, parameter: inspect.Parameter, example: Example) -> bool:
    return type(example.constants.get(name, parameter.default)) in _PLAIN


def _grow(tensor: Tensor, roles: Mapping[int, str]) -> Tensor:
    for dim in roles:
        if tensor.shape[dim] == 1:
            tensor = torch.cat([tensor, tensor], dim)
    return tensor


def arguments_of(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and the keyword arguments that example inputs are.

    Raises:
        InputError: they are none.
    """
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if example_inputs is not None and not isinstance(example_inputs, (tuple, list)):
        raise InputError(
            f"example_inputs are of type {type(example_inputs).__name__}: give a tuple of positional arguments, a dict "
            "of keyword arguments, or one tensor"
        )
    return tuple(example_inputs or ()), {}


def bind(model: nn.Module, example_inputs: ExampleInputs) -> tuple[dict[str, Any], dict[str, inspect.Parameter]]:
    """Example inputs by parameter name, and the parameters of ``forward`` that have names.

    Raises:
        CaptureError: the inputs do not fit ``forward``, or ``forward`` takes ``*args``.
    """
    positional, keyword = arguments_of(example_inputs)
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*positional, **keyword)
    except TypeError as error:
        raise CaptureError(
            f"example_inputs do not fit {type(model).__name__}.forward{signature}: {error}. Give a tuple of its "
            "positional arguments or a dict of its keyword arguments"
        ) from error
    kinds = {n: p.kind for n, p in signature.parameters.items()}
    given: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        if kinds[name] is inspect.Parameter.VAR_POSITIONAL:
            raise CaptureError(
                f"{type(model).__name__}.forward takes *{name}, whose inputs have no names; give the model a forward "
                "with named parameters"
            )
        given.update(value if kinds[name] is inspect.Parameter.VAR_KEYWORD else {name: value})
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = {n: p for n, p in signature.parameters.items() if p.kind not in variadic}
    return {n: v for n, v in given.items() if v is not None}, named


def make_example(
    given: Mapping[str, Any],
    parameters: Mapping[str, inspect.Parameter],
    dynamic_shapes: Mapping[str, Any] | None = None,
    optional: frozenset[str] = frozenset(),
) -> Example:
    """Sort bound inputs into tensors and constants, and name their dynamic dimensions.

    ``dynamic_shapes`` maps argument names to ``{dim: name}``, or to whatever torch.export accepts;
    arguments it leaves out keep the default: dimension 0 is ``batch``, dimension 1 of integer
    matrices and of float ``[batch, sequence, features]`` inputs is ``sequence``.

    Raises:
        CaptureError: an argument mixes tensors with other values, or an override names no argument.
    """
    tensors: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    for name, value in given.items():
        leaves = pytree.tree_leaves(value)
        if leaves and all(isinstance(leaf, Tensor) for leaf in leaves):
            tensors[name] = value
        elif isinstance(value, _PLAIN):
            constants[name] = value
        else:
            raise CaptureError(
                f"example input '{name}' is a {type(value).__name__}; inputs are tensors, containers of tensors "
                "only, or plain constants"
            )
    overrides = dict(dynamic_shapes or {})
    unknown = sorted(set(overrides) - set(tensors))
    if unknown:
        raise CaptureError(
            f"dynamic_shapes names {', '.join(unknown)}; the tensor inputs are {', '.join(tensors) or '(none)'}"
        )
    decoder = any(name.startswith("decoder_") for name in tensors)
    roles: dict[str, tuple[Mapping[int, str], ...]] = {}
    for name, value in tensors.items():
        wanted = overrides.get(name)
        if wanted is None and name in overrides:
            wanted = {}
        if isinstance(wanted, Mapping) and all(isinstance(v, str) for v in wanted.values()):
            del overrides[name]
            roles[name] = tuple(dict(wanted) for _ in pytree.tree_leaves(value))
        else:
            roles[name] = tuple(_roles(name, leaf, decoder) for leaf in pytree.tree_leaves(value))
        if name in overrides and isinstance(wanted, Mapping):
            dims = {d: getattr(v, "__name__", None) or roles[name][0].get(d, f"dim{d}") for d, v in wanted.items()}
            roles[name] = tuple(dims for _ in pytree.tree_leaves(value))
    return Example(tensors, constants, roles, parameters, optional, overrides)


def _roles(name: str, tensor: Tensor, decoder: bool) -> dict[int, str]:
    if tensor.dim() == 0:
        return {}
    roles = {0: "batch"}
    whole = not tensor.is_floating_point() and not tensor.is_complex()
    tokens = tensor.dim() == 2 and (whole or "mask" in name)
    if tokens or (tensor.dim() == 3 and not whole and name not in _FRAMES):
        target = decoder and (name.startswith("decoder_") or name == "labels")
        roles[1] = "decoder_sequence" if target else "sequence"
    return roles
