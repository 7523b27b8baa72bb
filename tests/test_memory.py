"""Who writes in place, and in whose memory a result lies: of operators, functions, methods and modules."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.nn import functional as F

import lorafx
from conftest import randomize
from lorafx import LoraSpec
from lorafx.graph import CapturedModule
from lorafx.memory import memory_of, written
from lorafx.passes.group import find_groups
from tolerances import assert_close

aten = torch.ops.aten
WIDTH = 8
X = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(0))
BACKENDS = ("auto", "torch")


def unknown(h: Tensor) -> Tensor:
    """Somebody's function, in a graph as it is."""
    return h.mul_(3.0)


torch.fx.wrap("unknown")
LIBRARY = torch.library.Library("lorafx_test_memory", "DEF")
LIBRARY.define("grow(Tensor(a!) x) -> ()")


class Hooked(nn.Module):
    """A layer with a hook that writes to what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Identity()
        self.layer.register_forward_pre_hook(lambda module, given: (given[0].add_(1.0),))


def call(target: Any, *args: Any, module: nn.Module | None = None, **kwargs: Any) -> tuple[Node, Node]:
    """A node ``h``, and one that reads it as the first argument."""
    graph = Graph()
    h = graph.placeholder("h")
    op = "call_function" if callable(target) else "call_method"
    if module is not None:
        op, target = "call_module", "m"
    node = graph.create_node(op, target, (h, *args), kwargs)
    graph.output(node)
    root = nn.Module()
    root.m = module
    GraphModule(root, graph)
    return h, node


WRITES: dict[str, tuple[Any, ...]] = {
    "operator": (aten.relu_.default,),
    "method": ("relu_",),
    "method __iadd__": ("__iadd__", 1),
    "function": (torch.relu_,),
    "positional": (F.relu, True),
    "positional, of four": (F.dropout, 0.1, True, True),
    "operator.iadd": (operator.iadd, 1),
    "item": (operator.setitem, 0, 1.0),
    "statistics": (F.batch_norm, None, None),
    "unknown": (unknown,),
    "unknown overload": (torch.ops.lorafx_test_memory.grow,),
}


@pytest.mark.parametrize("case", WRITES)
def test_what_writes(case: str) -> None:
    h, node = call(*WRITES[case])
    assert written(node) == [h]
    assert memory_of(node) == [h]


@pytest.mark.parametrize("function", [F.relu, F.silu, F.dropout])
def test_a_flag_decides(function: Callable[..., Tensor]) -> None:
    for flag in (True, False):
        h, node = call(function, inplace=flag)
        assert written(node) == ([h] if flag else [])
    h, node = call(torch.add, 1)
    assert (written(node), memory_of(node)) == ([], [])
    node.update_kwarg("out", h)
    assert written(node) == [h]


MODULES: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "relu": (nn.ReLU, False),
    "relu in place": (lambda: nn.ReLU(inplace=True), True),
    "norm": (lambda: nn.LayerNorm(WIDTH), False),
    "embedding": (lambda: nn.Embedding(4, WIDTH), False),
    "embedding that renormalises": (lambda: nn.Embedding(4, WIDTH, max_norm=1.0), True),
    "below": (lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Hardswish(inplace=True)), True),
    "hooked": (lambda: Hooked().layer, True),
    "unknown": (Hooked, True),
    "a graph": (lambda: torch.fx.symbolic_trace(nn.Sequential(nn.ReLU())), False),
    "a graph that writes": (lambda: torch.fx.symbolic_trace(nn.Sequential(nn.ReLU(inplace=True))), True),
}


@pytest.mark.parametrize("case", MODULES)
def test_modules(case: str) -> None:
    make, writes = MODULES[case]
    h, node = call(None, module=make())
    assert written(node) == ([h] if writes else [])
    node.graph.owning_module = None
    assert written(node) == [h], "without its module the worst is assumed"


def test_operators_say_what_they_write_to() -> None:
    graph = Graph()
    h, g, mean, variance = (graph.placeholder(n) for n in ("h", "g", "mean", "variance"))
    make = graph.call_function
    assert written(make(aten._foreach_add_.Scalar, ([h, g], 1.0))) == [h, g]
    assert written(make(aten.add.out, (h, 1.0), {"out": g})) == [g]
    norm = make(aten.batch_norm.default, (h, None, None, mean, variance, True, 0.1, 1e-5, False))
    assert (written(norm), memory_of(norm)) == ([mean, variance], [])
    assert written(make(aten.add.Tensor, (h, g))) == []


RETURN_THEIRS: dict[str, tuple[Any, ...]] = {
    "dropout": (aten.dropout.default, 0.5, False),
    "dropout of nothing": (aten.dropout.default, 0.0, True),
    "alpha_dropout": (aten.alpha_dropout.default, 0.5, False),
    "feature_dropout": (aten.feature_dropout.default, 0.5, False),
    "feature_alpha_dropout": (aten.feature_alpha_dropout.default, 0.5, False),
    "contiguous": (aten.contiguous.default,),
    "to": (aten.to.dtype, torch.float32),
    "type_as": (aten.type_as.default, torch.ones(())),
    "reshape": (aten.reshape.default, [-1]),
    "flatten": (aten.flatten.using_ints,),
    "expand_as": (aten.expand_as.default, X),
    "atleast_2d": (aten.atleast_2d.default,),
    "sum_to_size": (aten.sum_to_size.default, [6, WIDTH]),
    "conj_physical": (aten.conj_physical.default,),
    "to_dense": (aten.to_dense.default,),
    "unsafe_chunk": (aten.unsafe_chunk.default, 2),
    "numpy_T": (aten.numpy_T.default,),
    "method": ("view", -1),
    "method of no operator": ("float",),
    "attribute": (getattr, "T"),
    "item": (operator.getitem, 0),
    "plus": (operator.pos,),
    "function": (F.dropout, 0.5, False),
}


@pytest.mark.parametrize("case", RETURN_THEIRS)
def test_whose_memory_is_returned(case: str) -> None:
    target, *rest = RETURN_THEIRS[case]
    h = X.clone()
    made = getattr(h, target)(*rest) if isinstance(target, str) else target(h, *rest)
    first = made[0] if isinstance(made, (list, tuple)) else made
    assert first.untyped_storage().data_ptr() == h.untyped_storage().data_ptr(), "torch does so"
    value, node = call(target, *rest)
    assert value in memory_of(node)
    assert written(node) == []


def test_einsum_of_lists_of_nodes() -> None:
    graph = Graph()
    h = graph.placeholder("h")
    assert torch.einsum("ij->ji", X).data_ptr() == X.data_ptr()
    assert memory_of(graph.call_function(aten.einsum.default, ("ij->ji", [h]))) == [h]


@pytest.mark.parametrize(
    "case", [(operator.mul, 2), (operator.truediv, 2), (torch.add, 2), (F.softmax, -1), ("mean",), (aten.relu.default,)]
)
def test_arithmetic_has_memory_of_its_own(case: tuple[Any, ...]) -> None:
    _, node = call(*case)
    assert (written(node), memory_of(node)) == ([], [])


# What follows from it, in graphs without example inputs.


class Between(nn.Module):
    """``a`` and ``b`` read the same value, which is another one in between."""

    def __init__(self, write: Callable[[Any, Tensor], object]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.act, self.hooked, self.write = nn.ReLU(inplace=True), Hooked().layer, write

    def forward(self, x: Tensor) -> Tensor:
        h = x * 2
        y: Tensor = self.a(h)
        self.write(self, h)
        return y + self.b(h)


BETWEEN: dict[str, Callable[[Any, Tensor], object]] = {
    "module": lambda m, h: m.act(h),
    "hook": lambda m, h: m.hooked(h),
    "method": lambda m, h: h.relu_(),
    "through a view": lambda m, h: h.view(-1).relu_(),
    "flag": lambda m, h: F.relu(h, inplace=True),
    "positional flag": lambda m, h: F.relu(h, True),
    "function": lambda m, h: torch.relu_(h),
    "out": lambda m, h: torch.add(h, 1.0, out=h),
    "unknown": lambda m, h: unknown(h),
}


@pytest.mark.parametrize("case", BETWEEN)
def test_writes_of_a_symbolic_graph_stay_where_they_are(case: str) -> None:
    torch.manual_seed(0)
    model = Between(BETWEEN[case])
    for backend in ("reference", *BACKENDS):
        gm = lorafx.apply(model, LoraSpec(r=2, target_modules=["a", "b"]), backend=backend)
        assert torch.equal(gm(X), model(X)), backend
        assert [len(group) for group in find_groups(gm.graph)] == [1, 1]
        assert torch.equal(copy.deepcopy(gm)(X), model(X))
        assert torch.equal(lorafx.merge(gm)(X), model(X))


class Harmless(Between):
    """What a symbolic graph may call between two readers that are served together."""

    def __init__(self) -> None:
        super().__init__(lambda m, h: None)
        self.norm, self.drop, self.gelu = nn.LayerNorm(WIDTH), nn.Dropout(0.1), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        y: Tensor = self.drop(self.gelu(self.a(h))).view(x.shape[0], -1).softmax(-1)
        return torch.cat([F.silu(y), y.transpose(0, 1).transpose(0, 1)])[: x.shape[0]] / math.sqrt(2) + self.b(h)


def test_what_writes_nothing_keeps_groups_together() -> None:
    gm = lorafx.apply(Harmless(), LoraSpec(r=2, target_modules=["a", "b"]))
    assert [len(group) for group in find_groups(gm.graph)] == [2]


# The gradient of DoRA's magnitudes reads a layer's result again, which others may write to.


class Residual(nn.Module):
    """In eval mode dropout gives its input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.drop(self.a(x))
        h += x
        return h.sin()


def in_place() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH))


class Flat(nn.Module):
    """The result is a view of the layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).view(2, -1)


WRITTEN: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...] | None]] = {
    "dropout in eval": (Residual, (X,)),
    "module in a symbolic graph": (in_place, None),
    "module in an exported graph": (in_place, (X,)),
    "a view": (Flat, (X,)),
    "a view in a symbolic graph": (Flat, None),
}


def gradients(gm: CapturedModule) -> dict[str, Tensor]:
    y = gm(X)
    y.div_(2)  # as one divides logits by a temperature
    y.square().sum().backward()
    found = {n: p.grad for n, p in gm.named_parameters() if p.grad is not None}
    return {"output": y.detach(), **found}


@pytest.mark.parametrize("case", WRITTEN)
def test_results_of_dora_may_be_written_to(case: str) -> None:
    make, example = WRITTEN[case]
    torch.manual_seed(0)
    gm = lorafx.apply(make(), LoraSpec(r=2, variant="dora", target_modules=".*"), example, seed=0, backend="reference")
    randomize(gm.eval())
    expected = gradients(copy.deepcopy(gm))
    assert any("magnitude" in name for name in expected)
    for backend in BACKENDS:
        lorafx.lower(gm, backend)
        assert {row.provider for row in lorafx.explain(gm).rows} <= {"cpu", "torch"}
        found = gradients(copy.deepcopy(gm))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_close("layer", found[name], value)


def test_only_what_may_change_is_copied() -> None:
    """A copy of a result costs memory: where nobody can write to it, and for plain LoRA, there is none."""
    torch.manual_seed(0)

    def copies(model: nn.Module, variant: str) -> int:
        gm = lorafx.apply(model, LoraSpec(r=2, variant=variant, target_modules=".*"), (X,))
        derived = gm.meta["lowering"].derive(gm, gm.graph)
        return len(derived.find_nodes(op="call_function", target=aten.clone.default))

    between = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH))
    assert copies(between, "dora") == 0
    assert copies(in_place(), "dora") == 2
    assert copies(in_place(), "lora") == 0
