"""How a captured graph is called: the original's arguments in, the original's output classes out.

A graph has one placeholder per input *tensor*. :class:`Signature` says how the arguments of the
model's own ``forward`` map to those placeholders and how flat outputs become the original's output
class; :class:`SignatureCodeGen` writes both into the generated ``forward``, so a call costs no
binding at run time and ``torch.compile`` sees plain Python.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from lorafx.errors import InputError
from lorafx.serialize import spec_from_plain, spec_to_plain


class _Missing:
    """Stands for an argument that was not given; shows as ``...`` in the generated code's signature."""

    def __repr__(self) -> str:
        return "..."


MISSING = _Missing()


@dataclass(frozen=True)
class Argument:
    """One captured argument of ``forward``.

    ``leaves`` are the placeholder names of its tensors, in pytree order; ``spec`` rebuilds the
    argument from them. ``optional`` arguments (labels) may be left out of a call.
    """

    name: str
    leaves: tuple[str, ...]
    spec: pytree.TreeSpec
    optional: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        return _argument, (self.name, self.leaves, spec_to_plain(self.spec), self.optional)

    @property
    def is_tensor(self) -> bool:
        """Whether the argument is a single tensor rather than a nest of them."""
        return self.spec.is_leaf()


@dataclass(frozen=True)
class Signature:
    """The calling convention of a captured graph.

    ``arguments`` are the captured ones in the order of the original ``forward``; ``uncaptured`` maps
    the other parameters of that ``forward`` to the defaults that were in force, which are the only
    values a call may give them; ``order`` is the order of all of them. ``outputs`` names each flat
    output (``logits``; ``hidden_states.0``), and ``out_spec`` rebuilds the output class.
    ``dims`` names the dynamic dimensions of each placeholder (``{"input_ids": {0: "batch"}}``) and
    ``ranges`` gives each name's smallest and largest size (``None``: unbounded). ``fixed`` holds the sizes
    of dimensions that would have been dynamic, had the model's code not been traced for one size only.
    """

    arguments: tuple[Argument, ...]
    outputs: tuple[str, ...]
    out_spec: pytree.TreeSpec
    uncaptured: Mapping[str, Any] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    positional: int = 0
    dims: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    ranges: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)
    fixed: Mapping[str, Mapping[int, int]] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> Signature:
        return self  # never changed; a copy of a TreeSpec warns of torch's own deprecation

    def __reduce__(self) -> tuple[Any, ...]:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return _signature, (fields | {"out_spec": spec_to_plain(self.out_spec)},)

    @property
    def placeholders(self) -> tuple[str, ...]:
        """Placeholder names in the order of the arguments."""
        return tuple(leaf for argument in self.arguments for leaf in argument.leaves)

    def flatten(self, *args: Any, **kwargs: Any) -> list[Any]:
        """The flat placeholder values of a call; optional arguments left out become None.

        Raises:
            InputError: an argument is missing, extra or of another structure.
        """
        given = dict(zip(self.order[: self.positional], args, strict=False))
        check_call(self, {**dict.fromkeys(self.order, MISSING), **given}, args[self.positional :], kwargs)
        given.update(kwargs)
        flat: list[Any] = []
        for argument in self.arguments:
            flat.extend(flatten_argument(argument, given.get(argument.name)))
        for name, tensor in zip(self.placeholders, flat, strict=True):
            if tensor is not None:
                check_sizes(name, tuple(tensor.shape), self.fixed.get(name, {}))
        return flat

    def python_signature(self) -> inspect.Signature:
        """The signature of the class's ``forward``: ``self``, then the original's parameter names.

        A function's own ``self`` is dropped where a bound ``gm.forward`` is inspected.
        """
        by_name = {a.name: a for a in self.arguments}
        parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
        for index, name in enumerate(self.order):
            positional = index < self.positional
            kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if positional else inspect.Parameter.KEYWORD_ONLY
            captured = by_name.get(name)
            # Python wants no bare parameter after one with a default, so all are shown with one.
            default = self.uncaptured.get(name) if captured is None or captured.optional else MISSING
            parameters.append(inspect.Parameter(name, kind, default=default))
        return inspect.Signature(parameters)


def _argument(name: str, leaves: tuple[str, ...], spec: Any, optional: bool) -> Argument:
    return Argument(name, leaves, spec_from_plain(spec), optional)


def _signature(fields: dict[str, Any]) -> Signature:
    return Signature(**fields | {"out_spec": spec_from_plain(fields["out_spec"])})


def flatten_argument(argument: Argument, value: Any) -> list[Any]:
    """The tensors of one argument's value, in placeholder order.

    Raises:
        InputError: the value is nested differently from the captured one.
    """
    if value is None and argument.optional:
        return [None] * len(argument.leaves)
    leaves, spec = pytree.tree_flatten(value)
    if spec != argument.spec:
        was, now = (" ".join(str(s).split()) for s in (argument.spec, spec))  # on one line
        raise InputError(
            f"argument '{argument.name}' was captured as {was} and was given as {now}; pass the same structure, or "
            "capture again with example inputs of this one"
        )
    return list(leaves)


def check_call(
    signature: Signature, given: Mapping[str, Any], extra_args: Sequence[Any], extra: Mapping[str, Any]
) -> None:
    """Say what is wrong with a call; silent where nothing is.

    ``given`` maps parameter names to values (``MISSING`` where none was given).

    Raises:
        InputError: names what is missing, what is extra, and what the graph was captured with.
    """
    given = {**given, **{k: v for k, v in extra.items() if k in given}}
    missing = [a.name for a in signature.arguments if not a.optional and given[a.name] is MISSING]
    unexpected = [name for name, value in extra.items() if name not in given and value is not None]
    for name, default in signature.uncaptured.items():
        value = given.get(name, MISSING)
        same = value is default or (type(value) is type(default) and value == default)
        if value is not MISSING and value is not None and not same:
            unexpected.append(name)
    if extra_args:
        unexpected.append(f"{len(extra_args)} more positional argument{'s'[: len(extra_args) > 1]}")
    if not missing and not unexpected:
        return
    captured = ", ".join(a.name + (" (optional)" if a.optional else "") for a in signature.arguments)
    parts = [f"missing: {', '.join(missing)}"] * bool(missing) + [f"not captured: {', '.join(unexpected)}"] * bool(
        unexpected
    )
    raise InputError(
        f"the graph was captured with ({captured}); this call is different ({'; '.join(parts)}). Call it with the "
        "captured arguments, or capture again with example inputs that hold them all"
    )


def check_sizes(name: str, shape: tuple[int, ...], fixed: Mapping[int, int]) -> None:
    """Hold an input to the sizes that the graph is fixed at.

    Raises:
        InputError: names the input, the dimension and both sizes.
    """
    for dim, size in fixed.items():
        if shape[dim] != size:
            raise InputError(
                f"dimension {dim} of '{name}' is {shape[dim]}, and the graph was traced for {size}: the model's code "
                "depends on that size. Pad to it, or capture again with example inputs of the size you need"
            )


class SignatureCodeGen(CodeGen):
    """Generates ``forward(self, <the original's parameters>)`` for a graph with flat placeholders."""

    def __init__(self, signature: Signature) -> None:
        super().__init__()
        self.signature = signature

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, *, expanded_def: bool = False) -> str:
        signature = self.signature
        captured = {a.name: a for a in signature.arguments}
        present = {v.split(":")[0].split("=")[0].strip() for v in free_vars}
        parameters, wrong, binds = [], [], []
        for index, name in enumerate(signature.order):
            if index == signature.positional:
                parameters.append("*_extra_args")
            argument = captured.get(name)
            parameters.append(f"{name}=None" if argument and argument.optional else f"{name}=_missing")
            if argument is None:
                wrong.append(f"({name} is not _missing and {name} is not None)")
            elif not argument.optional:
                wrong.append(f"{name} is _missing")
            if argument is not None and not argument.is_tensor and present.intersection(argument.leaves):
                targets = ", ".join(argument.leaves)
                binds.append(f"{targets}, = self._call.flatten_argument('{name}', {name})")
        if signature.positional >= len(signature.order):
            parameters.append("*_extra_args")
        values = "{" + ", ".join(f"'{n}': {n}" for n in signature.order) + "}"
        condition = " or ".join(["_extra_args", "_extra", *wrong])
        lines = [
            f"def {self._func_name}(self, {', '.join([*parameters, '**_extra'])}){maybe_return_annotation}:",
            f"if {condition}: self._call.check({values}, _extra_args, _extra)",
            *binds,
            *(
                f"if {' or '.join(f'{name}.shape[{d}] != {n}' for d, n in sizes.items())}: "
                f"self._call.check_sizes('{name}', {name})"
                for name, sizes in signature.fixed.items()
                if name in present
            ),
        ]
        return "\n    ".join(lines)

    def generate_output(
        self,
        output_args: Any,
        *,
        descs: Sequence[str] | None = None,
        repr_fn: Callable[[object], str] | None = None,
    ) -> str:
        text = (repr_fn or repr)(output_args)
        if self.signature.out_spec.is_leaf():
            return f"return {text}[0]"
        return f"return pytree.tree_unflatten({text}, self._out_spec)"

    def process_inputs(self, *args: Any) -> Any:
        return self.signature.flatten(*args)

    def process_outputs(self, outputs: Any) -> Any:
        return pytree.tree_unflatten(list(outputs), self.signature.out_spec)

    def additional_globals(self) -> list[tuple[str, Any]]:
        return [("_missing", MISSING)]


class Call:
    """What the generated ``forward`` needs at hand: the module keeps one as ``_call``."""

    def __init__(self, signature: Signature) -> None:
        self.signature = signature
        self.arguments = {a.name: a for a in signature.arguments}

    def flatten_argument(self, name: str, value: Any) -> list[Any]:
        """See :func:`flatten_argument`."""
        return flatten_argument(self.arguments[name], value)

    def check_sizes(self, name: str, value: Tensor) -> None:
        """See :func:`check_sizes`."""
        check_sizes(name, tuple(value.shape), self.signature.fixed[name])

    def check(self, given: Mapping[str, Any], extra_args: Sequence[Any], extra: Mapping[str, Any]) -> None:
        """See :func:`check_call`."""
        _check_untraced(self.signature, given, extra_args, extra)


# A wrong call raises; nothing in it is worth tracing.
_check_untraced: Callable[..., None] = torch.compiler.disable(check_call)  # type: ignore[no-untyped-call]
