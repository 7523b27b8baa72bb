"""What a lowered graph keeps for backward, and that what it computes again instead is the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import lorafx
from conftest import Zoo, leaves, randomize
from lorafx import LoraSpec
from lorafx.graph import CapturedModule
from lorafx.kernels.grouped import Arguments
from lorafx.kernels.recipe import Value, recompute, write_recipe
from lorafx.passes import lower
from lorafx.passes.recompute import Kept, trained_nodes
from tolerances import assert_close
from zoo import FAMILIES

aten = torch.ops.aten
WIDTH = 12
X = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))


@dataclass
class Bytes:
    """The storages that autograd keeps, without those of parameters and buffers."""

    own: set[int]
    sizes: dict[int, int] = field(default_factory=dict)
    alive: list[Tensor] = field(default_factory=list)

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.sizes[storage.data_ptr()] = storage.nbytes()
            self.alive.append(tensor)  # so that no address is used twice
        return tensor

    @property
    def total(self) -> int:
        return sum(self.sizes.values())


def kept_by(gm: nn.Module, call: Callable[[], Any]) -> int:
    """The bytes kept for backward."""
    tensors = [*gm.parameters(), *gm.buffers()]
    found = Bytes({t.untyped_storage().data_ptr() for t in tensors})
    with torch.autograd.graph.saved_tensors_hooks(found.pack, lambda tensor: tensor):
        call()
    return found.total


class Drawn(TorchDispatchMode):
    """The bytes of each ``s`` and its masks, as they are made."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.lorafx.cpu_group.default:
            self.sizes.append(sum(t.untyped_storage().nbytes() for t in found[:2]))
        return found


#: Rows of each family's inputs: batch times tokens.
FAMILY_ROWS = {"bert": 22, "llama": 22, "gpt2": 22, "vit": 20}

#: Of each family the parameter below its first layer, trained so that gradients pass through everything; and how many
#: inputs of layers are kept besides, since no operator keeps what they could be computed from: BERT's first one is
#: behind a dropout, and the pooler's is a part of the last hidden state.
FIRST = {
    "bert": ("bert.embeddings.word_embeddings.weight", 2),
    "llama": ("model.embed_tokens.weight", 0),
    "gpt2": ("transformer.wte.weight", 0),
    "vit": ("vit.embeddings.cls_token", 0),
}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.xdist_group(n)) for n in FIRST])
def test_only_what_is_low_rank_is_kept_besides(zoo: Zoo, name: str, dropout: float) -> None:
    """Beside what the frozen model keeps: the low-rank inputs, the masks, and the factors with their scaling.

    Without the model's own dropout, with which the attention keeps its output no longer; only adapters drop.
    """
    family, (first, inputs) = FAMILIES[name], FIRST[name]
    gm = zoo.adapted(family, LoraSpec(r=2, dropout=dropout))
    frozen, reference = lorafx.unadapted(gm), copy.deepcopy(gm)
    lorafx.lower(reference, "reference")
    lorafx.lower(gm, "cpu")
    counts = {}
    for what, module in (("frozen", frozen), ("reference", reference), ("lowered", gm)):
        module.get_parameter(first).requires_grad_()
        module.eval()
        for site in lorafx.sites(gm):
            module.get_submodule(site.name).train()
        module.recompile()
        counts[what] = kept_by(module, lambda module=module: module(**family.inputs()))  # type: ignore[misc]
    with Drawn() as drawn:
        gm(**family.inputs())
    hidden = 4 * FAMILY_ROWS[name] * gm.get_parameter(first).shape[-1]
    least = counts["frozen"] + sum(drawn.sizes) + 4 * sum(site.r * site.out_features for site in lorafx.sites(gm))
    assert sum(drawn.sizes) > 0
    assert counts["lowered"] <= least + inputs * hidden
    assert counts["reference"] > least + (inputs + 4) * hidden, "the reference keeps many more"


class Norms(nn.Module):
    """Layers behind each of the operators that are computed again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.rms = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.a, self.b = nn.Linear(WIDTH, 20), nn.Linear(WIDTH, 20)
        self.gate, self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
        self.after_gelu, self.after_tanh, self.after_relu = (nn.Linear(20, WIDTH) for _ in range(3))
        self.scaled, self.own_gate = nn.Linear(WIDTH, WIDTH), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        h = self.norm(x)
        x = x + self.after_gelu(F.gelu(self.a(h))) + self.after_tanh(F.gelu(self.b(h), approximate="tanh"))
        h = self.rms(x)
        x = x + self.down(F.silu(self.gate(h)) * self.up(h)) + self.after_relu(torch.relu(self.b(h)))
        both = self.gate(x)
        x = x + self.own_gate(F.silu(both) * both)  # two gradients for one source
        own = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        result: Tensor = self.scaled(own * 0.5)
        return result


TARGETS = ["a", "b", "gate", "up", "down", "after_gelu", "after_tanh", "after_relu", "scaled", "own_gate", "first"]


def norms(backend: str, variant: str = "lora") -> CapturedModule:
    torch.manual_seed(0)
    gm = lorafx.apply(Norms(), LoraSpec(r=2, variant=variant, target_modules=TARGETS), (X,), seed=0, backend=backend)
    randomize(gm)
    return gm


def grouped_nodes(gm: CapturedModule) -> list[Node]:
    graph = gm.meta["lowering"].derive(gm, gm.graph)
    return [n for n in graph.nodes if str(n.target) == "lorafx.grouped.default"]


def results(gm: CapturedModule, x: Tensor = X) -> list[Tensor | None]:
    gm.zero_grad()
    given = x.clone().requires_grad_()
    y = gm(given)
    y.square().mean().backward()
    return [y.detach(), given.grad, *(p.grad for p in gm.parameters())]


@pytest.fixture
def without_recipes(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on every input is kept as it is."""
    return lambda: monkeypatch.setattr(lower, "_input", lambda *_: ([], "", ""))


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_recomputed_inputs_are_the_same(backend: str, variant: str, without_recipes: Callable[[], None]) -> None:
    """Bit for bit, but where a provider differentiates an activation itself."""
    gm = norms(backend, variant)
    assert sum(Arguments(*n.args).recipe != "" for n in grouped_nodes(gm)) >= 6, "or there is nothing to compare"
    exact = all(Arguments(*n.args).activation == "" for n in grouped_nodes(gm))
    assert exact == (backend == "torch")
    found = results(gm)
    without_recipes()
    kept = norms(backend, variant)
    assert all(Arguments(*n.args).recipe == "" for n in grouped_nodes(kept))
    for actual, expected in zip(found, results(kept), strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None and expected is not None:
            assert_close("model", actual, expected)
            assert torch.equal(actual, expected) or not exact


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_less_is_kept_than_without_recipes(backend: str, without_recipes: Callable[[], None]) -> None:
    x = X.repeat(40, 1)
    less = kept_by(gm := norms(backend), lambda: gm(x))
    without_recipes()
    more = kept_by(gm := norms(backend), lambda: gm(x))
    assert less < 0.75 * more


# recipes


def test_a_recipe_is_what_it_was_written_from() -> None:
    steps = [
        (aten.layer_norm.default, (Value(0), [WIDTH], Value(1), None, 1e-5, False), {}),
        (aten.gelu.default, (Value(2),), {"approximate": "tanh"}),
        (aten.mul.Tensor, (Value(3), Value(2)), {}),
        (aten.to.dtype, (Value(4), torch.bfloat16), {}),
    ]
    recipe = write_recipe(steps)
    assert recipe is not None
    weight = torch.rand(WIDTH)
    h = F.layer_norm(X, [WIDTH], weight)
    assert torch.equal(recompute(recipe, [X, weight]), (F.gelu(h, approximate="tanh") * h).bfloat16())


def test_what_no_text_can_hold_has_no_recipe() -> None:
    assert write_recipe([(aten.to.device, (Value(0), torch.device("cpu"), torch.float32), {})]) is None
    assert write_recipe([(aten.to.dtype, (Value(0), torch.int64), {})]) is None


class Between(nn.Module):
    """A trained layer behind some function of what another one gives."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.norm = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.drop, self.batch = nn.Dropout(0.5), nn.BatchNorm1d(WIDTH)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.function(self, self.first(x)))
        return result


#: What lies before a layer, and whether it may be computed again.
FUNCTIONS: dict[str, tuple[Callable[[Any, Tensor], Tensor], bool]] = {
    "a norm": (lambda m, h: m.norm(h), True),
    "a norm and a product": (lambda m, h: m.norm(h) * 2.0, True),
    "gelu": (lambda m, h: F.gelu(h), True),
    "dropout": (lambda m, h: m.drop(F.gelu(h)), False),
    "a norm of dropout": (lambda m, h: m.norm(m.drop(h)), True),
    "noise": (lambda m, h: F.gelu(h) + torch.rand_like(h), False),
    "batch norm": (lambda m, h: m.batch(h), False),
    "a long way": (lambda m, h: torch.sin(F.gelu(h)), False),
}


@pytest.mark.parametrize("what", FUNCTIONS)
def test_random_and_stateful_operators_run_once(what: str) -> None:
    """In train mode two runs of these would differ, or write a buffer again."""
    function, again = FUNCTIONS[what]
    found = []
    for backend in ("torch", "reference"):
        torch.manual_seed(0)
        model = Between(function)
        gm = lorafx.apply(model, LoraSpec(r=2, target_modules=["first", "last"]), (X,), seed=0, backend=backend)
        randomize(gm)
        if backend == "torch":
            *_, last = grouped_nodes(gm)
            assert (Arguments(*last.args).recipe != "" or Arguments(*last.args).activation != "") == again
            for word in ("dropout", "rand", "batch_norm"):
                assert word not in str(Arguments(*last.args).recipe)
        torch.manual_seed(1)
        tensors = [t for t in (*results(gm.train()), *gm.buffers()) if t is not None and t.is_floating_point()]
        found.append([t.clone() for t in tensors])
    for actual, expected in zip(*found, strict=True):
        assert_close("model", actual, expected)


def test_what_is_kept_is_known_from_the_graph() -> None:
    """The norm's input and the activation's: kept by these for their own gradients, if anything before them trains."""
    gm = norms("reference")
    by_name = {n.name: n for n in gm.graph.nodes}
    kept = Kept(gm.graph, trained_nodes(gm, gm.graph))
    assert not kept.keeps(by_name["layer_norm"])
    assert kept.keeps(by_name["layer_norm"].args[0])
    assert kept.keeps(by_name["gelu"].args[0])
    assert kept.keeps(by_name["norm_weight"])
    nothing = Kept(gm.graph, [])
    assert not nothing.keeps(by_name["gelu"].args[0])
    assert nothing.recipe(by_name["layer_norm"]) == ([], "")


def test_writes_after_the_fact_are_noticed() -> None:
    """A source that is written over before backward would give another input: autograd says so."""

    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.last, self.first = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            y = self.last(self.norm(h))
            h.mul_(2.0)
            result: Tensor = y + h
            return result

    for backend in ("torch", "reference"):
        gm = lorafx.apply(Written(), LoraSpec(r=2, target_modules=["last", "first"]), (X,), backend=backend)
        y = gm(X)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            leaves(y)[0].sum().backward()
