"""Each error is raised by a realistic mistake, says what is wrong and what to do, and changes nothing.

InputError's cases are in test_capture.py, QuantizationError's in test_bases.py; AdapterError's, CheckpointError's,
ExportError's and ParityError's are with the code that raises them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorafx
from lorafx import LoraSpec, errors
from lorafx.graph import get_path, notes
from lorafx.ir import Stage, verify

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))


def adapted() -> Any:
    return lorafx.apply(model(), LoraSpec(r=2), (X,))


class LoopsOverData(nn.Module):
    """Stops when a value says so."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        while x.norm() > 1:
            x = self.layer(x)
        return x


class Star(nn.Module):
    def forward(self, *tensors: Tensor) -> Tensor:
        return torch.stack(tensors).sum(0)


def broken_parameter() -> None:
    gm = adapted()
    gm.get_submodule("0.lora_A").default = nn.Parameter(torch.zeros(3, 6))
    lorafx.merge(gm)


def swapped_parameters() -> None:
    gm = adapted()
    node = next(n for n in gm.graph.nodes if "call" in notes(n))
    node.update_arg(3, list(reversed(node.args[3])))
    verify(gm, Stage.INSERTED)


def stray_operator() -> None:
    gm = adapted()
    node = next(n for n in gm.graph.nodes if "call" in notes(n))
    node.meta["custom"] = {}
    verify(gm, Stage.INSERTED)


def not_a_number() -> None:
    gm = adapted()
    get_path(gm, "0.lora_B.default").data[0, 0] = torch.nan
    lorafx.merge(gm)


def damaged_weight() -> None:
    base = model()
    base.get_parameter("0.weight").data[0, 0] = torch.nan
    lorafx.merge(lorafx.apply(base, LoraSpec(r=2), (X,)))


@dataclass(frozen=True)
class Case:
    """A mistake, and the parts that its message must have."""

    error: type[errors.LorafxError]
    call: Callable[[], Any]
    parts: tuple[str, ...]


CASES = {
    "no rank": Case(
        errors.SpecError, lambda: LoraSpec(r=0), ("LoraSpec.r=0 is not allowed", "an integer of at least 1")
    ),
    "unknown field": Case(
        errors.SpecError,
        lambda: lorafx.apply(model(), {"r": 2, "lora_alpha": 4}, (X,)),
        ("unknown key 'lora_alpha'", "alpha"),
    ),
    "no such file": Case(
        errors.SpecError, lambda: lorafx.apply(model(), "spec.json", (X,)), ("spec.json: no such file", "Give a JSON")
    ),
    "unknown variant": Case(
        errors.SpecError,
        lambda: lorafx.apply(model(), LoraSpec(variant="lorra"), (X,)),
        ("variant='lorra' is not allowed", "did you mean 'lora'"),
    ),
    "data-dependent loop": Case(
        errors.CaptureError,
        lambda: lorafx.apply(LoopsOverData(), LoraSpec(), (X,)),
        ("cannot trace LoopsOverData at test_errors.py:", "in forward: `while x.norm() > 1:`", "What to do"),
    ),
    "data-dependent loop, no inputs": Case(
        errors.CaptureError,
        lambda: lorafx.apply(LoopsOverData(), LoraSpec()),
        ("in forward: `while x.norm() > 1:`", "What to do: give example_inputs"),
    ),
    "wrong number of examples": Case(
        errors.CaptureError,
        lambda: lorafx.apply(model(), LoraSpec(), (X, X)),
        ("do not fit Sequential.forward(input)", "too many positional arguments", "Give a tuple"),
    ),
    "unnamed inputs": Case(
        errors.CaptureError,
        lambda: lorafx.apply(Star(), LoraSpec(), (X, X)),
        ("Star.forward takes *tensors", "named parameters"),
    ),
    "wrong width": Case(
        errors.CaptureError,
        lambda: lorafx.apply(model(), LoraSpec(), (torch.randn(4, 7),)),
        ("torch.export cannot trace Sequential", "7"),
    ),
    "misspelt target": Case(
        errors.MatchError,
        lambda: lorafx.apply(
            nn.ModuleDict({"q_proj": nn.Linear(6, 6)})["q_proj"], LoraSpec(target_modules=["q"]), (X,)
        ),
        ("target_modules names 'q'", "no such layer"),
    ),
    "nothing to adapt": Case(
        errors.MatchError,
        lambda: lorafx.apply(nn.Sequential(nn.Linear(6, 2)), LoraSpec(), (X,)),
        ("'all-linear' leaves nothing to adapt", "output layer"),
    ),
    "merged twice": Case(
        errors.PassError,
        lambda: lorafx.merge(lorafx.merge(adapted())),
        ("merge: needs a graph that is adapted, this one is merged", "export_base"),
    ),
    "the model instead of the graph": Case(
        errors.PassError,
        lambda: lorafx.merge(model()),
        ("expected a graph made by lorafx.apply, got Sequential", "call lorafx.apply(model, spec)"),
    ),
    "replaced parameter": Case(
        errors.VerifyError, broken_parameter, ("site 0: lora_A is (3, 6), its shape must be (2, 6)",)
    ),
    "swapped parameters": Case(
        errors.VerifyError, swapped_parameters, ("site 0: node %linear reads ['0.lora_B.default', '0.lora_A.default']",)
    ),
    "operator without a site": Case(
        errors.VerifyError, stray_operator, ("node %linear calls lorafx.linear.default but belongs to no layer",)
    ),
    "adapter in a merged graph": Case(
        errors.VerifyError,
        lambda: verify(adapted(), Stage.MERGED),
        ("node %linear calls lorafx.linear.default, which no merged graph may hold",),
    ),
    "unknown backend": Case(
        errors.LoweringError,
        lambda: lorafx.lower(adapted(), "tritn"),
        ("there is no backend 'tritn'", "did you mean 'triton'", "choose one of ('auto', 'reference', "),
    ),
    "a backend for another machine": Case(
        errors.LoweringError,
        lambda: lorafx.lower(adapted(), "triton"),
        ("backend 'triton' cannot serve '0'", "Choose 'auto'"),
    ),
    "diverged training": Case(
        errors.MergeError, not_a_number, ("site '0': lora_B holds NaN or Inf", "lower the learning rate")
    ),
    "damaged weight": Case(
        errors.NotFiniteError, damaged_weight, ("weight '0.weight' holds NaN or Inf", "Copy the checkpoint again")
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_message(case: Case) -> None:
    with pytest.raises(case.error) as caught:
        case.call()
    assert type(caught.value) is case.error
    message = str(caught.value)
    for part in case.parts:
        assert part in message
    assert "\n" not in message, "an error is one line"


def test_every_error_class_has_a_case() -> None:
    elsewhere = {"LorafxError", "InputError", "AdapterError", "CheckpointError", "ExportError", "ParityError"}
    elsewhere |= {"QuantizationError"}
    classes = {n for n, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, errors.LorafxError)}
    assert {c.error.__name__ for c in CASES.values()} == classes - elsewhere


def test_errors_are_what_a_caller_expects_them_to_be() -> None:
    """``except ValueError`` for a wrong setting, ``except TypeError`` for a wrong call, LorafxError for all."""
    assert issubclass(errors.SpecError, ValueError)
    assert issubclass(errors.InputError, TypeError)
    assert issubclass(errors.InputError, errors.CaptureError)
    assert issubclass(errors.VerifyError, errors.PassError)
    assert issubclass(errors.ParityError, errors.ExportError)
    public = {n for n in lorafx.__all__ if n.endswith(("Error", "Warning"))}
    assert public == {n for n, c in inspect.getmembers(errors, inspect.isclass)}
