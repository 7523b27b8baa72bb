"""Shared by the tests: the zoo, captured once a session; and ``--update-golden``.

Run with ``--dist loadgroup`` under xdist: the tests of one family, and otherwise of one file, then share a worker
and its captures.
"""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.config
from _pytest.nodeid import coerce_node_id
from torch import Tensor, nn
from torch.onnx._internal.exporter._registration import ONNXRegistry
from torch.utils import _pytree as pytree

from lorafx.api import captured
from lorafx.errors import FixedDimensionWarning
from lorafx.graph import CapturedModule
from lorafx.passes.huggingface import configs
from lorafx.passes.insert import Insert
from lorafx.passes.lower import lower
from lorafx.passes.match import match
from lorafx.spec import LoraSpec
from zoo import FAMILIES, Family

GOLDEN = Path(__file__).parent / "golden"


def pytest_configure(config: pytest.Config) -> None:
    # Most models here are freshly initialised on purpose; the tests of the warning ask for it.
    config.addinivalue_line("filterwarnings", "ignore:.*looks freshly initialised:UserWarning")
    # It pays from about ten layers on; captures of these models are a third faster without.
    torch._dynamo.config.fake_tensor_cache_enabled = False


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files anew")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``family`` runs over the zoo (``hf_family``: its Hugging Face models), grouped for xdist."""
    for fixture, plain in (("family", True), ("hf_family", False)):
        if fixture in metafunc.fixturenames:
            chosen = [f for f in FAMILIES.values() if plain or f.task != "plain"]
            marked = [pytest.param(f, marks=pytest.mark.xdist_group(f.name), id=f.name) for f in chosen]
            metafunc.parametrize(fixture, marked)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let the groups take effect, of which a file without marks is one.

    xdist 3.8 writes them where pytest 9.2 no longer looks (https://github.com/pytest-dev/pytest-xdist/issues/1386).
    """
    if config.getoption("loadgroup", False):
        for item in items:
            mark = item.get_closest_marker("xdist_group")
            item._id = coerce_node_id(f"{item.nodeid}@{mark.args[0] if mark else item.path.stem}")


def pytest_collection_finish() -> None:
    """What is imported by now stays: a quarter of a million objects that no garbage collection need look at."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def one_registry() -> Iterator[None]:
    """torch parses the source of all its ONNX operators at each export, which is half its time: here once."""
    build = cache(ONNXRegistry.from_torchlib)

    def from_torchlib(opset_version: int) -> ONNXRegistry:
        registry = copy.copy(build(opset_version))
        registry.functions = {target: [*found] for target, found in registry.functions.items()}
        return registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(from_torchlib))
        yield


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Each test starts from the same random state, whatever ran before it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with the file of that name, or write it with ``--update-golden``."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--update-golden"):
            path.write_text(text, encoding="utf-8")
        assert text == path.read_text(encoding="utf-8")

    return check


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that lorafx must leave alone, and the random state."""
    return {
        "parameters": {
            n: (id(p), p.data_ptr(), p.requires_grad, p.detach().clone())
            for n, p in model.named_parameters(remove_duplicate=False)
        },
        "buffers": {n: (id(b), b.data_ptr(), b.clone()) for n, b in model.named_buffers(remove_duplicate=False)},
        "modes": {n: (id(m), m.training) for n, m in model.named_modules(remove_duplicate=False)},
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules(remove_duplicate=False)},
        "configs": [copy.deepcopy(vars(c)) for c in configs(model)],
        "random": torch.get_rng_state(),
    }


def both(gm: nn.Module, model: nn.Module, call: Callable[[nn.Module], Any]) -> tuple[Any, Any]:
    """What a call gives on each from the same random state, which must also be left the same."""
    torch.manual_seed(7)
    actual, after = call(gm), torch.get_rng_state()
    torch.manual_seed(7)
    expected = call(model)
    assert torch.equal(after, torch.get_rng_state()), "the graph draws other random numbers than the model"
    return actual, expected


def same(a: Any, b: Any) -> bool:
    """Whether two nests of values are of the same classes and hold equal (bit for bit) values."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def mixed_modes(model: nn.Module) -> None:
    """Put every third module in train mode and the others in eval mode."""
    for index, module in enumerate(model.modules()):
        module.training = index % 3 == 0


@dataclass(frozen=True)
class Capture:
    """A model, its capture, and the model's state before and after."""

    model: nn.Module
    gm: CapturedModule
    before: Mapping[str, Any]
    after: Mapping[str, Any]


class Zoo:
    """The families, built and captured once each; what tests may change is copied."""

    @cache  # noqa: B019  # lives as long as the session
    def capture(self, family: Family) -> Capture:
        """Captured with its inputs, all dimensions dynamic. Shared: don't change it."""
        model = family.build()
        mixed_modes(model)
        before = state_of(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error", FixedDimensionWarning)
            gm = captured(model, family.inputs(), None)
        return Capture(model, gm, before, state_of(model))

    def captured(self, family: Family) -> CapturedModule:
        """A capture to change: shares nothing with the others."""
        return copy.deepcopy(self.capture(family).gm)

    def eager(self, family: Family) -> nn.Module:
        """The model itself, in eval mode, without caches (which no graph returns)."""
        model = copy.deepcopy(self.capture(family).model).eval()
        for config in configs(model):
            if hasattr(config, "use_cache"):
                config.use_cache = False
        return model

    def adapted(self, family: Family, spec: LoraSpec, seed: int = 0) -> CapturedModule:
        """What ``lorafx.apply`` returns, from the cached capture."""
        gm = self.captured(family)
        specs = (spec,)
        generator = torch.Generator().manual_seed(seed)
        Insert(match(gm, specs), specs, generator)(gm)
        lower(gm)
        return gm

    @cache  # noqa: B019  # lives as long as the session
    def trained(self, family: Family) -> tuple[CapturedModule, tuple[float, ...]]:
        """Adapted and trained for three steps, in eval mode, and the losses. Shared: don't change it."""
        gm = self.adapted(family, LoraSpec(r=4, alpha=8, dropout=0.05))
        losses = train(gm, family, steps=3)
        return gm.eval(), losses


@pytest.fixture(scope="session")
def zoo() -> Zoo:
    return Zoo()


def loss_of(model: nn.Module, family: Family) -> Tensor:
    """The family's loss on its own inputs and labels."""
    if family.task == "plain":
        return nn.functional.cross_entropy(model(**family.inputs()), family.labels())
    loss: Tensor = model(**family.inputs(), labels=family.labels()).loss
    return loss


def train(gm: nn.Module, family: Family, steps: int, rate: float = 1e-2) -> tuple[float, ...]:
    """Train in train mode; the loss before and after each step, measured in eval mode."""
    optimizer = torch.optim.AdamW([p for p in gm.parameters() if p.requires_grad], lr=rate)
    losses = [loss_of(gm.eval(), family).item()]
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(gm.train(), family).backward()
        optimizer.step()
        losses.append(loss_of(gm.eval(), family).item())
    return tuple(losses)


def randomize(gm: nn.Module, scale: float = 0.3) -> None:
    """Fill what trains (adapters above all) with values far from their first ones."""
    with torch.no_grad():
        for parameter in gm.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=scale)


def leaves(outputs: Any) -> list[Tensor]:
    """The tensors of a model's outputs."""
    found: list[Tensor] = pytree.tree_leaves(outputs)
    return found
