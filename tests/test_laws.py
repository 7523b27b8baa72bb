"""What every variant must keep at a linear layer, whatever its formula. A new variant is tested by these as it is."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lorafx
from adapted_layers import LINEAR, Shape, fits, linear, operands, started
from conftest import randomize
from lorafx import LoraSpec
from lorafx.ops import ADAPTED
from lorafx.variants import SELECTABLE as VARIANTS
from lorafx.variants.base import StartRequest
from lorafx.variants.row_norm import row_norm
from tolerances import assert_close, assert_rounded_once

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALF = (torch.bfloat16, torch.float16)

variants = pytest.mark.parametrize("name", VARIANTS)
rslora = pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
layers = pytest.mark.parametrize("shape", LINEAR.values(), ids=LINEAR)


@variants
@rslora
@dtypes
@layers
def test_identity_at_init(name: str, rslora: bool, dtype: torch.dtype, shape: Shape) -> None:
    """Bit for bit where B A is zero; an initialisation that takes from the weight leaves a rounding of it."""
    given = operands(name, shape, dtype)
    expected = given.layer()
    for init in VARIANTS[name].inits:
        if VARIANTS[name].misfit(init, "linear", tuple(given.matrix.shape), shape.r, False):
            continue
        one, start = started(given, name, init, shape.r, rslora=rslora)
        fresh = given.with_weight(start.base).with_adapters(one)
        if start.base is None and init != "orthogonal":
            for dropout, training in ((0.0, True), (0.5, True), (0.5, False)):
                assert torch.equal(fresh(dropout, training), expected), init
        elif expected.numel():
            assert_close("layer", fresh(), expected)


@variants
@dtypes
@layers
def test_first_values_have_the_shapes_and_dtypes_asked_for(name: str, dtype: torch.dtype, shape: Shape) -> None:
    given = operands(name, shape, dtype)
    wanted = dict(VARIANTS[name].shapes(*given.matrix.shape, shape.r))
    for init in VARIANTS[name].inits:
        if VARIANTS[name].misfit(init, "linear", tuple(given.matrix.shape), shape.r, False):
            continue
        _, start = started(given, name, init, shape.r)
        assert {n: tuple(p.shape) for n, p in start.parameters.items()} == wanted
        assert tuple(start.parameters) == VARIANTS[name].parameters
        assert {p.dtype for p in start.parameters.values()} == {LoraSpec().dtype_for(dtype)}
        assert start.base is None or (start.base.dtype, start.base.shape) == (dtype, given.matrix.shape)


@pytest.mark.parametrize(("name", "size"), [(n, size) for n in VARIANTS for size, s in LINEAR.items() if fits(n, s)])
@rslora
@dtypes
def test_the_folded_layer_equals_the_adapted_one(name: str, size: str, rslora: bool, dtype: torch.dtype) -> None:
    given = operands(name, LINEAR[size], dtype, rslora=rslora)
    folded = given.folded()
    assert folded.weight.shape == given.weight.shape
    actual = given()
    assert actual.dtype == dtype
    if actual.numel():
        assert not torch.equal(folded.weight, given.weight)
        assert_close("layer", actual, folded.layer())


@variants
@layers
def test_rslora_is_another_scaling_and_nothing_else(name: str, shape: Shape) -> None:
    (plain,), (stabilised,) = (operands(name, shape, torch.float64, rslora=s).adapters for s in (False, True))
    assert stabilised.scaling == pytest.approx(plain.scaling * math.sqrt(shape.r), rel=1e-4)  # AdaLoRA adds 1e-5 to r
    assert all(torch.equal(plain.tensors[n], stabilised.tensors[n]) for n in plain.tensors)


@variants
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_gradcheck(name: str, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """First and second derivatives by x, the base's weight and bias, and the parameters; DoRA's norm is a constant."""
    given = operands(name, linear((2, 2), 4, 5, 2, bias=bias), torch.float64)
    (one,) = given.adapters
    if VARIANTS[name].scales_rows:
        norm = row_norm(given.matrix, one.tensors["lora_A"], one.tensors["lora_B"], one.scaling)
        monkeypatch.setattr("lorafx.variants.dora.row_norm", lambda *_: norm)
    count = 3 if bias else 2
    inputs = [t.clone().requires_grad_() for t in (*given.own[:count], *given.parameters)]

    def call(*tensors: Tensor) -> Tensor:
        own = (*tensors[:count], *given.own[count:])
        parameters = dict(zip(VARIANTS[name].parameters, tensors[count:], strict=True))
        moved = type(one)(name, one.scaling, {**one.tensors, **parameters})
        return type(given)("linear", own, (moved,))(training=True)

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@variants
def test_dropout_is_true_dropout_in_training(name: str) -> None:
    """With one input feature a row's branch is either there, scaled by 1 / (1 - p), or not."""
    p, rows = 0.3, 20_000
    given = operands(name, linear((rows,), 3, 1, 1), torch.float64)
    (one,) = given.adapters
    update = VARIANTS[name].update(given.matrix, one.tensors, one.scaling)
    low_rank = F.linear(given.own[0], update.left @ update.right) * (1.0 if update.gain is None else update.gain)
    without = given() - low_rank
    difference = given(p, training=True) - without
    dropped = difference.abs().amax(1) < 1e-12 * low_rank.abs().amax()
    assert_close("layer", difference[~dropped], low_rank[~dropped] / (1 - p))
    spread = math.sqrt(p * (1 - p) / rows)
    assert abs(float(dropped.double().mean()) - p) < 5 * spread


@variants
def test_dropout_follows_the_seed(name: str) -> None:
    given = operands(name, linear((63,), 10, 33, 3), torch.float32)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return given(0.5, training=True)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


@variants
def test_no_dropout_and_no_random_numbers_in_eval(name: str) -> None:
    given = operands(name, linear((63,), 10, 33, 3), torch.float32)
    before = torch.get_rng_state()
    assert torch.equal(given(0.5, training=False), given())
    assert torch.equal(given(0.0, training=True), given())
    assert torch.equal(torch.get_rng_state(), before)


@variants
@dtypes
def test_autocast_gives_the_dtype_that_the_layer_gives(name: str, dtype: torch.dtype) -> None:
    given, fresh = (operands(name, linear((7,), 10, 33, 3), dtype, fresh=f) for f in (False, True))
    with torch.autocast("cpu", torch.bfloat16):
        assert given().dtype == given.layer().dtype
        assert torch.equal(fresh(), fresh.layer())


@variants
def test_autocast_gradients_have_the_parameters_dtypes(name: str) -> None:
    given = operands(name, linear((7,), 10, 33, 3), torch.float32)
    for value in given.parameters:
        value.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = given(0.1, training=True).float().square().sum()
    loss.backward()
    for value in given.parameters:
        assert value.grad is not None
        assert value.grad.dtype == value.dtype
        assert bool(torch.isfinite(value.grad).all())
        assert bool(value.grad.any())


@variants
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (63, 100)], ids=str)
def test_merge_rounds_once(name: str, dtype: torch.dtype, size: tuple[int, int]) -> None:
    """The stored weight is the exact one rounded: half a unit in the last place, and what the wide sum lost."""
    out_features, in_features = size
    model = nn.Sequential(nn.Linear(in_features, out_features)).to(dtype)
    gm = lorafx.apply(model, LoraSpec(variant=name, r=5, target_modules=["0"]))
    randomize(gm)
    (site,) = lorafx.sites(gm)
    weight = model[0].weight.detach().double()
    tensors = {n: t.detach().double() for n, t in site.tensors(gm).items()}
    exact = VARIANTS[name].update(weight, tensors, site.scaling).fold(weight)
    merged = lorafx.merge(gm).get_parameter("0.weight")
    assert merged.dtype == dtype
    assert_rounded_once(merged, exact, weight, site.r)


def small_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 3))


@variants
def test_the_base_gets_no_gradient(name: str) -> None:
    model, x = small_model(), torch.randn(5, 7)
    gm = lorafx.apply(model, LoraSpec(variant=name, r=2, target_modules=["0", "2"]), (x,))
    randomize(gm)
    gm(x).square().sum().backward()
    (first, second) = lorafx.sites(gm)
    adapters = {*first.parameter_names.values(), *second.parameter_names.values()}
    assert {n for n, p in gm.named_parameters() if p.requires_grad} == adapters
    assert {n for n, p in gm.named_parameters() if p.grad is not None} == adapters
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(bool(p.grad.any()) for n, p in gm.named_parameters() if n in adapters)


@variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    given = operands(name, linear((2, 3), 4, 5, 2), dtype)
    (one,) = given.adapters
    for value in given.parameters:
        value.requires_grad_()
    torch.library.opcheck(ADAPTED["linear"], (*given.own, [*one.tensors.values()], [name], [1.5], [0.0], True, None))


@variants
def test_export_keeps_one_node_a_site(name: str) -> None:
    x = torch.randn(5, 7)
    spec = LoraSpec(variant=name, r=2, target_modules=["0", "2"], dropout=0.1)
    gm = lorafx.apply(small_model(), spec, (x,)).eval()
    randomize(gm)
    lorafx.lower(gm, "reference")
    program = torch.export.export(gm, (), {"input": x}, strict=False)
    called = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert called.count(ADAPTED["linear"]) == 2
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
    model, spec = small_model(), LoraSpec(variant=name, r=2)
    by_seed = [lorafx.apply(model, spec, seed=3) for _ in range(2)]
    by_generator = lorafx.apply(model, spec, generator=torch.Generator().manual_seed(3))
    (site,) = lorafx.sites(by_generator)
    for first, second in itertools.pairwise([*by_seed, by_generator]):
        pairs = zip(*(site.tensors(gm).values() for gm in (first, second)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@variants
def test_another_seed_makes_another_adapter(name: str) -> None:
    """Where anything is drawn for a site at all (VeRA's projections have a key of their own)."""
    model = small_model()
    gms = [lorafx.apply(model, LoraSpec(variant=name, r=2), seed=seed) for seed in (3, 4)]
    (site,) = lorafx.sites(gms[0])
    drawn = [n for n, p in site.parameters(gms[0]).items() if p.unique().numel() > 1 and n != "lora_magnitude_vector"]
    assert all(not torch.equal(*(site.parameters(gm)[n] for gm in gms)) for n in drawn)
    assert drawn or name == "vera"


@variants
def test_first_values_do_not_depend_on_the_dtype(name: str) -> None:
    """One seed, one adapter: a bfloat16 adapter starts as the float32 one, rounded (magnitudes stay float32)."""
    variant, weight = VARIANTS[name], torch.randn(9, 7)
    for init in variant.inits:
        wide, narrow = (
            variant.start(
                StartRequest(weight, 2, 0.75, init, dtype, torch.Generator().manual_seed(5), {"d_initial": 0.1})
            )
            for dtype in (torch.float32, torch.bfloat16)
        )
        drawn = [n for n in variant.parameters if n != "lora_magnitude_vector"]
        assert all(torch.equal(wide.parameters[n].bfloat16(), narrow.parameters[n]) for n in drawn)
