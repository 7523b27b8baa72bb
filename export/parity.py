"""ONNX Runtime beside torch: on the example inputs, and on random inputs at other sizes.

The tolerance is fixed here, before anything is measured. The measure is the largest absolute difference
of an output against the output's largest magnitude (a difference of nearly equal numbers has no relative
error to speak of). Rounding errors of size u (half a unit in the last place) enter at every operation and
add up like a random walk: a few hundred layers and an amplification of about a hundred make 1e-4 of
float32's u = 6e-8. float16 (u = 5e-4), whose users accept a shorter walk, gets 40 u. bfloat16 (u = 2e-3) is
run with nothing rounded but the merged weights (see :mod:`lorafx.export.widen`): 25 u.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NotImplementedByRuntime
from torch import Tensor
from torch.utils import _pytree as pytree

from lorafx.errors import ExportError, InputError, ParityError
from lorafx.export.report import OutputParity, Parity
from lorafx.graph import CapturedModule, named_tensors

#: The longest size of a bounded dimension that is tried out (in a batch of one).
_LONGEST = 1024


@dataclass(frozen=True)
class Tolerance:
    """|torch - ONNX Runtime| <= atol + rtol * max |torch|, per output.

    Raises:
        ExportError: one of them is no number from 0 on.
    """

    atol: float
    rtol: float

    def __post_init__(self) -> None:
        given: Mapping[str, Any] = {"atol": self.atol, "rtol": self.rtol}
        for name, value in given.items():
            number = isinstance(value, Real) and not isinstance(value, bool)
            if not (number and value >= 0):  # NaN is not
                raise ExportError(f"{name}={value!r} is no tolerance: give a number from 0 on, as {name}=1e-3")


#: By the coarsest floating dtype of a graph's weights. Integer and boolean outputs must be equal.
TOLERANCES: Mapping[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(atol=1e-12, rtol=1e-10),
    torch.float32: Tolerance(atol=1e-6, rtol=1e-4),
    torch.float16: Tolerance(atol=1e-3, rtol=2e-2),
    torch.bfloat16: Tolerance(atol=1e-3, rtol=5e-2),
}


@dataclass(frozen=True)
class Case:
    """Inputs to compare on, by placeholder, and the sizes of their dynamic dimensions."""

    origin: str
    inputs: Mapping[str, Tensor]
    sizes: Mapping[str, int]


def precision(gm: CapturedModule) -> torch.dtype:
    """The coarsest floating dtype among a graph's tensors: what its outputs can be expected to agree to."""
    found = {t.dtype for _, t in named_tensors(gm)} & TOLERANCES.keys()
    return max(found, key=lambda d: torch.finfo(d).eps, default=torch.float32)


def make_cases(
    example: Mapping[str, Tensor],
    dims: Mapping[str, Mapping[int, str]],
    ranges: Mapping[str, tuple[int, int | None]],
) -> list[Case]:
    """The example inputs, and random ones at the smallest, other, and largest sizes.

    Integers are drawn from the example's range, floats from a normal distribution with its mean and
    spread. Masks are rows of ones followed by zeros, as many at most as the example has (at least one is
    allowed): a row that is masked as a whole, or for as long as a sliding window, means nothing. Seeds are
    fixed.
    """
    first = {name: int(example[leaf].shape[d]) for leaf, held in dims.items() for d, name in held.items()}
    cases = [Case("example", example, first)]
    for seed, sizes in enumerate(_sizes(first, ranges)):
        generator = torch.Generator().manual_seed(seed)
        inputs = {}
        for leaf, tensor in example.items():
            shape = [sizes.get(dims.get(leaf, {}).get(d, ""), n) for d, n in enumerate(tensor.shape)]
            inputs[leaf] = random_like(leaf, tensor, shape, generator)
        cases.append(Case("random", inputs, sizes))
    return cases


def _sizes(first: Mapping[str, int], ranges: Mapping[str, tuple[int, int | None]]) -> Iterator[dict[str, int]]:
    def fit(name: str, size: int) -> int:
        low, high = ranges.get(name, (1, None))
        return max(low, size if high is None else min(high, size))

    smallest = {name: fit(name, 1) for name in first}
    other = {name: fit(name, 2 * size + 1) for name, size in first.items()}
    tried = [smallest, other]
    if "batch" in first:
        tried.append({**other, "batch": smallest["batch"]})
    for name, size in first.items():
        _, high = ranges.get(name, (1, None))
        if high is not None and size < high <= _LONGEST:
            tried.append({**smallest, name: high})
    # Without a dynamic dimension all of these are {}: other values at the same sizes.
    yield from (dict(sizes) for sizes in dict.fromkeys(tuple(sizes.items()) for sizes in tried))


def random_like(name: str, example: Tensor, shape: list[int], generator: torch.Generator) -> Tensor:
    """A random tensor of ``shape`` with the character of ``example``."""
    values = example.detach().cpu()
    if "mask" in name and bool(((values == 0) | (values == 1)).all()):
        length = shape[-1] if shape else 1
        padding = int((values == 0).sum(-1).max()) if values.dim() else 0
        shortest = max(1, length - max(1, padding))
        ones = torch.randint(shortest, length + 1, (*shape[:-1], 1), generator=generator)
        return (torch.arange(length) < ones).reshape(shape).to(example.dtype)
    if values.is_floating_point():
        noise = torch.randn(shape, generator=generator)
        spread = float(values.float().std(correction=0)) if values.numel() else 0.0
        return (noise * (spread or 1.0) + float(values.float().mean())).to(example.dtype)
    low, high = (int(values.min()), int(values.max())) if values.numel() else (0, 1)
    if low < 0:  # such as labels' -100: a number between might mean nothing
        seen = values.reshape(-1)
        return seen[torch.randint(len(seen), shape, generator=generator)]
    return torch.randint(low, high + 1, shape, generator=generator).to(example.dtype)


class NoKernelError(ExportError):
    """ONNX Runtime has no kernel for an operator with these types."""


class Session:
    """ONNX Runtime on the CPU, with its default optimizations.

    Raises:
        NoKernelError: an operator has no kernel for its types.
        ExportError: ONNX Runtime cannot load the file.
    """

    def __init__(self, path: Path, ran: str) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 4  # failures come as exceptions
        self.ran = ran
        self.run_options: ort.RunOptions | None = None  # what adapters are active
        try:
            self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except NotImplementedByRuntime as error:
            raise NoKernelError(f"ONNX Runtime has no kernel for an operator of the file: {error}") from error
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise ExportError(f"ONNX Runtime cannot load the exported file: {error}") from error

    def __call__(self, inputs: Mapping[str, Tensor]) -> list[np.ndarray[Any, Any]]:
        feed = {i.name: _as_declared(inputs[i.name], i.type).numpy() for i in self.session.get_inputs()}
        try:
            found: list[np.ndarray[Any, Any]] = self.session.run(None, feed, self.run_options)
        except Exception as error:  # onnxruntime's exceptions share no base class
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in feed.items())
            raise ParityError(f"ONNX Runtime cannot run the exported file on {shapes}: {error}") from error
        return found


def _as_declared(tensor: Tensor, kind: str) -> Tensor:
    """A floating input in the precision that the file takes, which need not be the torch graph's."""
    wanted = {"tensor(float16)": torch.float16, "tensor(float)": torch.float32}.get(kind)
    tensor = tensor.detach().cpu()
    return tensor if wanted is None or not tensor.is_floating_point() else tensor.to(wanted)


def run_case(
    case: Case,
    names: tuple[str, ...],
    session: Session,
    graph: CapturedModule,
    reference: str,
    tolerance: Tolerance,
    prepare: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Parity:
    """Run both on one case.

    Args:
        case: the inputs, which ``prepare`` brings to the dtypes that both take.
        names: the names of the outputs.
        session: the ONNX file.
        graph: the torch graph, for inference; called with flat inputs.
        reference: what the graph is, for the report.
        tolerance: what is allowed.

    Raises:
        InputError: the graph does not take the example inputs.
        ParityError: ONNX Runtime refuses the inputs, or gives other shapes than torch.
    """
    inputs = {name: prepare(tensor) for name, tensor in case.inputs.items()}
    try:
        expected = run_torch(graph, inputs)
    except (RuntimeError, IndexError, ValueError, InputError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if case.origin == "example":
            sizes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in inputs.items())
            raise InputError(f"the graph cannot run on the example inputs ({sizes}): {reason}") from error
        return Parity(case.origin, case.sizes, reference, "", refused=reason)
    found = session(inputs)
    rows = [difference(n, t, o, tolerance) for n, t, o in zip(names, expected, found, strict=True)]
    return Parity(case.origin, case.sizes, reference, session.ran, tuple(rows))


def run_torch(graph: CapturedModule, inputs: Mapping[str, Tensor]) -> list[np.ndarray[Any, Any]]:
    """The outputs that are tensors, flat, of a graph for inference called with flat inputs."""
    device = next((t.device for _, t in named_tensors(graph)), torch.device("cpu"))
    arguments = {
        a.name: pytree.tree_unflatten([inputs[leaf].to(device) for leaf in a.leaves], a.spec)
        for a in graph.signature.arguments
    }
    with torch.no_grad():
        outputs = pytree.tree_leaves(graph(**arguments))
    return [_array(o) for o in outputs if o is not None]


def _array(value: Any) -> np.ndarray[Any, Any]:
    tensor = torch.as_tensor(value).detach().cpu()
    return (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()


def difference(
    name: str, expected: np.ndarray[Any, Any], found: np.ndarray[Any, Any], tolerance: Tolerance
) -> OutputParity:
    """How far ``found`` is from ``expected``; infinitely far where only one of them is NaN or infinite.

    Raises:
        ParityError: the shapes differ.
    """
    if expected.shape != found.shape:
        raise ParityError(f"output '{name}' is {list(found.shape)}, and that of the reference {list(expected.shape)}")
    exact = not np.issubdtype(expected.dtype, np.floating)
    a, b = expected.astype(np.float64), found.astype(np.float64)
    finite = np.isfinite(a) & np.isfinite(b)
    alike = finite | (a == b) | (np.isnan(a) & np.isnan(b))
    gap = float(np.abs(a[finite] - b[finite]).max(initial=0.0)) if alike.all() else float("inf")
    largest = float(np.abs(a[finite]).max(initial=0.0))
    allowed = 0.0 if exact else tolerance.atol + tolerance.rtol * largest
    return OutputParity(name, gap, gap / largest if largest else gap, allowed)
