"""What every variant must keep, whatever its formula. A new line in ``VARIANTS`` is tested by these as it stands."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lorafx
from conftest import randomize
from lorafx import LoraSpec
from lorafx.variants import VARIANTS, Variant
from tolerances import assert_close

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Layer:
    """Sizes of an adapted layer and of its input ``[*batch, in]``: none a multiple of a tile, some 1."""

    batch: tuple[int, ...]
    out_features: int
    in_features: int
    r: int
    bias: bool = True


LAYERS = (
    Layer((1,), 1, 1, 1),
    Layer((63,), 100, 33, 3),
    Layer((7, 5), 63, 100, 8, bias=False),
    Layer((2, 1, 3), 1, 63, 5),
    Layer((), 33, 17, 40),  # a rank above both widths
    Layer((0,), 5, 7, 2),
)


def spec_for(name: str, rslora: bool, r: int) -> LoraSpec:
    return LoraSpec(variant=name, rslora=rslora, r=r, alpha=1.5)


@dataclass(frozen=True)
class Operands:
    """The operands of one call of a variant's operator."""

    variant: Variant
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    parameters: dict[str, Tensor]
    scaling: float

    def call(self, dropout: float = 0.0, training: bool = False) -> Tensor:
        values = (self.parameters[n] for n in self.variant.parameters)
        return self.variant.op(self.x, self.weight, self.bias, *values, self.scaling, dropout, training)

    def merged(self, dtype: torch.dtype) -> Tensor:
        return self.variant.merge(self.weight.to(dtype), self.parameters, self.scaling)


def operands(
    name: str, layer: Layer, dtype: torch.dtype, *, rslora: bool = False, init: str = "kaiming", fresh: bool = False
) -> Operands:
    """Random operands; the parameters at their initial values (``fresh``) or anywhere."""
    variant, spec = VARIANTS[name], spec_for(name, rslora, layer.r)
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weight = (draw(layer.out_features, layer.in_features) / math.sqrt(layer.in_features)).to(dtype)
    bias = draw(layer.out_features).to(dtype) if layer.bias else None
    kept = spec.dtype_for(dtype)
    parameters = variant.init(weight, layer.r, init, kept, generator)
    if not fresh:
        parameters = {n: (draw(*p.shape) / math.sqrt(layer.r)).to(kept) for n, p in parameters.items()}
    x = draw(*layer.batch, layer.in_features).to(dtype)
    return Operands(variant, x, weight, bias, parameters, spec.scaling_for("any"))


variants = pytest.mark.parametrize("name", VARIANTS)
rslora = pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
layers = pytest.mark.parametrize("layer", LAYERS, ids=str)


@variants
@rslora
@dtypes
@layers
def test_identity_at_init(name: str, rslora: bool, dtype: torch.dtype, layer: Layer) -> None:
    for init in VARIANTS[name].inits:
        given = operands(name, layer, dtype, rslora=rslora, init=init, fresh=True)
        expected = F.linear(given.x, given.weight, given.bias)
        for dropout, training in ((0.0, True), (0.5, True), (0.5, False)):
            assert torch.equal(given.call(dropout, training), expected)


@variants
@dtypes
@layers
def test_initial_parameters_have_the_shapes_and_dtype_asked_for(name: str, dtype: torch.dtype, layer: Layer) -> None:
    variant = VARIANTS[name]
    for init in variant.inits:
        given = operands(name, layer, dtype, init=init, fresh=True)
        shapes = variant.shapes(layer.out_features, layer.in_features, layer.r)
        assert {n: tuple(p.shape) for n, p in given.parameters.items()} == dict(shapes)
        assert tuple(given.parameters) == variant.parameters
        assert {p.dtype for p in given.parameters.values()} == {LoraSpec().dtype_for(dtype)}


@variants
def test_initial_values_do_not_depend_on_the_dtype(name: str) -> None:
    """One seed, one adapter: a bfloat16 adapter starts as the float32 one, rounded."""
    variant, weight = VARIANTS[name], torch.randn(9, 7)
    for init in variant.inits:
        wide, narrow = (
            variant.init(weight, 3, init, dtype, torch.Generator().manual_seed(5))
            for dtype in (torch.float32, torch.bfloat16)
        )
        assert all(torch.equal(wide[n].bfloat16(), narrow[n]) for n in variant.parameters)


@variants
@rslora
@dtypes
@layers
def test_merged_layer_equals_the_adapted_one(name: str, rslora: bool, dtype: torch.dtype, layer: Layer) -> None:
    given = operands(name, layer, dtype, rslora=rslora)
    merged = given.merged(torch.float64).to(dtype)
    assert merged.shape == given.weight.shape
    expected = F.linear(given.x, merged, given.bias)
    actual = given.call()
    assert actual.dtype == dtype
    if actual.numel():
        assert not torch.equal(merged, given.weight)
        assert_close("layer", actual, expected)


@variants
@layers
def test_rslora_is_another_scaling_and_nothing_else(name: str, layer: Layer) -> None:
    plain, stabilised = (operands(name, layer, torch.float64, rslora=s) for s in (False, True))
    assert stabilised.scaling == pytest.approx(plain.scaling * math.sqrt(layer.r), rel=1e-15)
    assert all(torch.equal(plain.parameters[n], stabilised.parameters[n]) for n in plain.variant.parameters)


@variants
@pytest.mark.parametrize("layer", [Layer((3,), 4, 5, 2), Layer((2, 2), 1, 3, 1, bias=False)], ids=str)
def test_gradcheck(name: str, layer: Layer) -> None:
    given = operands(name, layer, torch.float64)
    tensors = [given.x, given.weight, *([given.bias] if layer.bias else []), *given.parameters.values()]
    inputs = [t.clone().requires_grad_() for t in tensors]

    def call(x: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
        bias, parameters = (rest[0], rest[1:]) if layer.bias else (None, rest)
        return given.variant.op(x, weight, bias, *parameters, given.scaling, 0.0, True)

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    for layer in (Layer((3,), 4, 5, 2), Layer((2, 3), 4, 5, 2, bias=False)):
        given = operands(name, layer, dtype)
        trained = [p.requires_grad_() for p in given.parameters.values()]
        arguments = (given.x, given.weight, given.bias, *trained, given.scaling, 0.0, True)
        torch.library.opcheck(given.variant.op, arguments)


@variants
def test_dropout_is_true_dropout_in_training(name: str) -> None:
    """With one input feature a row's branch is either there, scaled by 1 / (1 - p), or not."""
    p, rows = 0.3, 20_000
    given = operands(name, Layer((rows,), 3, 1, 1), torch.float64)
    base = F.linear(given.x, given.weight, given.bias)
    branch = given.call() - base
    difference = given.call(p, training=True) - base
    dropped = (difference == 0).all(dim=1)
    assert_close("layer", difference[~dropped], branch[~dropped] / (1 - p))
    spread = math.sqrt(p * (1 - p) / rows)
    assert abs(float(dropped.double().mean()) - p) < 5 * spread


@variants
def test_dropout_follows_the_seed(name: str) -> None:
    given = operands(name, Layer((63,), 10, 33, 3), torch.float32)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return given.call(0.5, training=True)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


@variants
def test_no_dropout_and_no_random_numbers_in_eval(name: str) -> None:
    given = operands(name, Layer((63,), 10, 33, 3), torch.float32)
    before = torch.get_rng_state()
    assert torch.equal(given.call(0.5, training=False), given.call())
    assert torch.equal(given.call(0.0, training=True), given.call())
    assert torch.equal(torch.get_rng_state(), before)


@variants
@dtypes
def test_autocast_gives_the_dtype_that_a_linear_layer_gives(name: str, dtype: torch.dtype) -> None:
    given = operands(name, Layer((7,), 10, 33, 3), dtype)
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.linear(given.x, given.weight, given.bias)
        actual = given.call()
    assert actual.dtype == expected.dtype
    fresh = operands(name, Layer((7,), 10, 33, 3), dtype, fresh=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fresh.call(), F.linear(fresh.x, fresh.weight, fresh.bias))


@variants
def test_autocast_gradients_have_the_parameters_dtypes(name: str) -> None:
    given = operands(name, Layer((7,), 10, 33, 3), torch.float32)
    for value in given.parameters.values():
        value.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = given.call(0.1, training=True).float().square().sum()
    loss.backward()
    for value in given.parameters.values():
        assert value.grad is not None
        assert value.grad.dtype == value.dtype
        assert bool(torch.isfinite(value.grad).all())
        assert bool(value.grad.any())


def half_ulp(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the distance between neighbours of ``dtype`` at each value of ``exact`` (float64)."""
    limits = torch.finfo(dtype)
    exponent = torch.frexp(exact.abs().clamp_min(limits.tiny)).exponent - 1
    return torch.ldexp(torch.full_like(exact, limits.eps / 2), exponent)


@variants
@rslora
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (63, 100), (100, 33)], ids=str)
def test_merge_rounds_once(name: str, rslora: bool, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """The stored weight is the exact one rounded: half a unit in the last place, and what the wide sum lost."""
    out_features, in_features = shape
    model = nn.Sequential(nn.Linear(in_features, out_features)).to(dtype)
    spec = LoraSpec(variant=name, rslora=rslora, r=5, target_modules=["0"])
    gm = lorafx.apply(model, spec)
    randomize(gm)
    (site,) = lorafx.sites(gm)
    parameters = {n: p.detach().double() for n, p in site.parameters(gm).items()}
    exact = VARIANTS[name].merge(model[0].weight.detach().double(), parameters, site.scaling)
    merged = lorafx.merge(gm).get_parameter("0.weight")
    assert merged.dtype == dtype
    wide = torch.finfo(torch.float32 if dtype in HALF else torch.float64).eps
    largest = float(exact.abs().max() + model[0].weight.detach().abs().max())
    lost = 4 * (site.r + 2) * wide * largest
    assert bool(((merged.double() - exact).abs() <= half_ulp(exact, dtype) + lost).all())


def small_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 3))


@variants
@rslora
def test_the_base_gets_no_gradient(name: str, rslora: bool) -> None:
    model, x = small_model(), torch.randn(5, 7)
    gm = lorafx.apply(model, LoraSpec(variant=name, rslora=rslora, r=2, target_modules=["0", "2"]), (x,))
    randomize(gm)
    gm(x).square().sum().backward()
    (first, second) = lorafx.sites(gm)
    adapters = {*first.parameter_names.values(), *second.parameter_names.values()}
    assert {n for n, p in gm.named_parameters() if p.requires_grad} == adapters
    assert {n for n, p in gm.named_parameters() if p.grad is not None} == adapters
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(bool(p.grad.any()) for n, p in gm.named_parameters() if n in adapters)


@variants
def test_export_keeps_one_node_a_site(name: str) -> None:
    x = torch.randn(5, 7)
    spec = LoraSpec(variant=name, r=2, target_modules=["0", "2"], dropout=0.1)
    gm = lorafx.apply(small_model(), spec, (x,)).eval()
    randomize(gm)
    program = torch.export.export(gm, (), {"input": x}, strict=False)
    called = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert called.count(VARIANTS[name].op) == 2
    assert torch.equal(program.module()(input=x), gm(x))


@variants
@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_a_graph_break(name: str, training: bool) -> None:
    x = torch.randn(5, 7)
    gm = lorafx.apply(small_model(), LoraSpec(variant=name, r=2, target_modules=["0", "2"]), (x,)).train(training)
    randomize(gm)
    compiled = torch.compile(gm, backend="aot_eager", fullgraph=True)
    assert_close("layer", compiled(x), gm(x))
    torch.autograd.backward(compiled(x).sum())
    assert all(p.grad is not None for p in gm.parameters() if p.requires_grad)


@variants
def test_a_seed_makes_the_same_adapter(name: str) -> None:
    spec = LoraSpec(variant=name, r=2)
    by_seed = [lorafx.apply(small_model(), spec, seed=3) for _ in range(2)]
    by_generator = lorafx.apply(small_model(), spec, generator=torch.Generator().manual_seed(3))
    other = lorafx.apply(small_model(), spec, seed=4)
    (site,) = lorafx.sites(other)
    for first, second in itertools.pairwise([*by_seed, by_generator]):
        assert all(
            torch.equal(a, b) for a, b in zip(*(site.parameters(g).values() for g in (first, second)), strict=True)
        )
    pairs = zip(site.parameters(by_generator).values(), site.parameters(other).values(), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)
