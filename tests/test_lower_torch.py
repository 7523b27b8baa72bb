"""A lowered graph below torch's own machinery: the compiler, autocast, ``torch.func``, autograd's modes."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import lorafx
from lorafx import LoraSpec
from lorafx.bases import FORMATS
from lorafx.bases.ops import describe
from lorafx.graph import CapturedModule
from lorafx.kernels.grouped import Arguments, grouped
from lorafx.kernels.providers import provider
from lowered import WIDTH, Model, X, applied, assert_equal_results, derived, grads, run
from tolerances import TOLERANCES, assert_close, error


def compiled_twice(gm: CapturedModule, backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(gm, fullgraph=True, dynamic=True, backend=backend)
    other = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(3))
    for training in (True, False):
        compiled.train(training)
        assert_equal_results(run(compiled, X), run(gm, X))
        with torch.compiler.set_stance("fail_on_recompile"):
            assert_equal_results(run(compiled, other), run(gm, other))


@pytest.mark.parametrize(
    ("backend", "variant", "checkpointed"),
    [
        ("reference", "dora", True),
        ("torch", "dora", True),
        ("torch", "lora", False),
        ("cpu", "lora", True),
        ("cpu", "dora", False),
    ],
)
def test_compiles_as_one_graph(backend: str, variant: str, checkpointed: bool) -> None:
    """In both modes, with dropout, at any size, before lowering and after; the masks are those of the eager graph."""
    gm = applied(backend, variant=variant, dropout=0.2)
    if checkpointed:
        gm.activation_checkpointing_enable()
    compiled_twice(gm, "aot_eager")


@pytest.mark.parametrize("training", [False, True])
def test_compiles_with_inductor(training: bool) -> None:
    """With torch's random numbers, for which Inductor has its own otherwise."""
    gm = applied("cpu", target_modules=("q", "k"), dropout=0.2).train(training)
    torch._dynamo.reset()
    compiled = torch.compile(gm, fullgraph=True, options={"fallback_random": True})
    assert_equal_results(run(compiled), run(gm))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize(
    "settings", [{"dropout": 0.2}, {"variant": "dora"}, {"target_modules": ("q", "down")}], ids=str
)
def test_backward_compiles_as_one_graph(backend: str, settings: dict[str, Any]) -> None:
    """By compiled autograd; of layers that train beside ones that do not, too."""
    gm = applied(backend, **settings)
    torch._dynamo.reset()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        found = run(gm)
    assert_equal_results(found, run(gm))


AUTOCAST = [
    *(("cpu", b, d) for b in ("torch", "cpu") for d in (torch.bfloat16, torch.float16)),
    *(
        pytest.param("cuda", b, d, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))
        for b in ("torch", "triton")
        for d in (torch.bfloat16, torch.float16)
    ),
]


@pytest.mark.parametrize(("device", "backend", "dtype"), AUTOCAST, ids=str)
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_autocast_gives_the_dtypes_of_the_frozen_model(
    variant: str, device: str, backend: str, dtype: torch.dtype
) -> None:
    gm, reference = (applied("reference", variant=variant).eval().to(device) for _ in range(2))
    lorafx.lower(gm, backend)
    outputs: list[Tensor] = []
    for module in (gm, reference, Model(1).to(device)):
        x = X.clone().to(device).requires_grad_()
        with torch.autocast(device, dtype):
            y = module(x)
        y.float().square().mean().backward()
        assert y.dtype == dtype
        assert x.grad is not None
        assert x.grad.dtype == torch.float32
        outputs.append(y.detach())
    assert_close("model", outputs[0], outputs[1])
    found, expected = grads(gm), grads(reference)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert found[name].dtype == torch.float32
        assert_close("autocast", found[name], gradient)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_fresh_adapters_change_no_bit_under_autocast(backend: str) -> None:
    torch.manual_seed(0)
    model = Model().eval()
    for variant in ("lora", "dora"):
        gm = lorafx.apply(model, LoraSpec(r=2, variant=variant), (X,), backend=backend).eval()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(gm(X), model(X))


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_bfloat16_models(variant: str, backend: str) -> None:
    """Outputs and gradients are near those of the same model in float64: on average no less than the reference's.

    The factors are such that attention is not saturated, where any rounding would decide what is attended to.
    """
    gm, reference = (applied(b, dtype=torch.bfloat16, layers=2, variant=variant).eval() for b in (backend, "reference"))
    exact = applied("reference", dtype=torch.float64, layers=2, variant=variant).eval()
    state = {n: 0.2 * t if "lora_B" in n else t for n, t in gm.state_dict().items()}
    for module in (gm, reference, exact):
        module.load_state_dict({n: t.double() if module is exact else t for n, t in state.items()})
    assert set(derived(gm)) == {backend}
    x = X.bfloat16()
    found, plain, expected = run(gm, x), run(reference, x), run(exact, x.double())
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == (x.dtype if name == "output" else gm.get_parameter(name).dtype)
    off, usual = ([error(got[n].double(), v, by_norm=True) for n, v in expected.items()] for got in (found, plain))
    assert max(off) <= TOLERANCES["gradient", torch.bfloat16].error
    assert statistics.mean(off) <= 2 * statistics.mean(usual)


def test_gradients_accumulate() -> None:
    gm, reference = applied(variant="dora"), applied("reference", variant="dora")
    for module in (gm.eval(), reference.eval()):
        for part in X.split(1):
            (module(part).square().mean() / len(X)).backward()
    assert_equal_results(grads(gm), grads(reference))


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_function_transforms(variant: str) -> None:
    gm, reference = applied(variant=variant).eval(), applied("reference", variant=variant).eval()
    parameters = {n: p.detach() for n, p in gm.named_parameters() if p.requires_grad}

    def loss(module: nn.Module, values: dict[str, Tensor], x: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(module, values, (x,)).square().mean()
        return result

    def transformed(module: nn.Module) -> dict[str, Tensor]:
        per_row = torch.func.vmap(torch.func.grad(lambda v, x: loss(module, v, x[None])), in_dims=(None, 0))
        return {
            **torch.func.grad(lambda v: loss(module, v, X))(parameters),
            **{f"{n} by row": g for n, g in per_row(parameters, X).items()},
        }

    assert_equal_results(transformed(gm), transformed(reference))


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_vmap_outermost(variant: str, backend: str) -> None:
    """Over inputs; and over the adapters of an ensemble, with the gradient of each member."""
    gm = applied(backend, variant=variant).eval()
    inputs = torch.stack([X, X.flip(0), X * 2])
    assert_close("model", torch.vmap(gm)(inputs), torch.stack([gm(x) for x in inputs]))

    parameters = {n: p.detach() for n, p in gm.named_parameters() if p.requires_grad}
    members = [{n: p * factor for n, p in parameters.items()} for factor in (0.9, 1.0, 1.2)]
    stacked = {n: torch.stack([member[n] for member in members]) for n in parameters}

    def call(values: dict[str, Tensor]) -> Tensor:
        result: Tensor = torch.func.functional_call(gm, values, (X,))
        return result

    assert_close("model", torch.vmap(call)(stacked), torch.stack([call(member) for member in members]))
    slope = torch.func.grad(lambda values: call(values).square().mean())
    found = torch.vmap(slope)(stacked)
    for index, member in enumerate(members):
        assert_equal_results({n: t[index] for n, t in found.items()}, slope(member))


def test_vmap_drops_for_each_member_or_for_all_alike() -> None:
    gm = applied(dropout=0.5).train()
    alike, different = (torch.vmap(gm, randomness=r)(torch.stack([X, X])) for r in ("same", "different"))
    assert_close("model", alike[0], alike[1])
    assert error(different[0], different[1]) > 0.1


@pytest.mark.parametrize("loss", [lambda y: y.square().mean(), lambda y: y.sum()], ids=["square", "linear"])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_double_backward_is_refused_or_right(backend: str, loss: Callable[[Tensor], Tensor]) -> None:
    """The lowered form is differentiated once, and says what to do; the reference again and again."""
    gm = applied(backend).eval()
    x = X.clone().requires_grad_()

    def penalised() -> Tensor:
        value = loss(gm(x))
        (first,) = torch.autograd.grad(value, x, create_graph=True)
        return value + first.square().sum()

    with pytest.raises(RuntimeError, match=r'differentiated once.* lorafx\.lower\(gm, "reference"\)$'):
        penalised().backward()
    torch.autograd.grad(loss(gm(x)), x, create_graph=True)  # by itself it may be asked for
    lorafx.lower(gm, "reference")
    gm.zero_grad()
    penalised().backward()
    assert all(g.isfinite().all() for g in grads(gm).values())


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_batch_of_gradients_is_refused_or_right(backend: str) -> None:
    """A vectorised Jacobian goes by the reference."""
    gm = applied().eval()
    lorafx.lower(gm, backend)

    def jacobian(vectorize: bool) -> Tensor:
        found: Tensor = torch.autograd.functional.jacobian(gm, X[:1], vectorize=vectorize)
        return found

    with pytest.raises(RuntimeError, match=r'not a batch of them.* lorafx\.lower\(gm, "reference"\)$'):
        jacobian(vectorize=True)
    one_by_one = jacobian(vectorize=False)
    lorafx.lower(gm, "reference")
    assert_close("model", one_by_one, jacobian(vectorize=True))


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_forward_mode(variant: str) -> None:
    """It goes by the reference, as under ``torch.func``."""
    gm = applied(variant=variant).eval()
    tangent = torch.randn(X.shape)
    with forward_ad.dual_level():
        y = forward_ad.unpack_dual(gm(forward_ad.make_dual(X, tangent)))
    assert y.tangent is not None
    assert_close("model", y.primal, gm(X))
    x = X.clone().requires_grad_()
    dy = torch.randn(y.primal.shape)
    (dx,) = torch.autograd.grad(gm(x), x, dy)
    assert_close("model", (y.tangent * dy).sum(), (dx * tangent).sum())


def test_inference_mode_and_no_grad() -> None:
    for variant in ("lora", "dora"):
        gm = applied(variant=variant).eval()
        expected = gm(X).detach()
        with torch.inference_mode():
            assert torch.equal(gm(X), expected)
        with torch.no_grad():
            y = gm(X)
        assert torch.equal(y, expected)
        assert not y.requires_grad


def test_a_frozen_graph_keeps_nothing_for_backward() -> None:
    gm = applied().eval()
    for parameter in gm.parameters():
        parameter.requires_grad_(False)
    assert not gm(X).requires_grad


@pytest.mark.parametrize("name", ["torch", "cpu"])
def test_factors_that_are_inputs_may_have_symbols_for_ranks(name: str) -> None:
    def low(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        given = Arguments(
            x=x,
            kinds=["linear"],
            weights=[weight],
            biases=[None],
            counts=[1],
            training=[True],
            tensors=[a, b],
            variants=["lora"],
            scaling=[1.5],
            dropout=[0.0],
            provider=name,
            sources=[],
            recipe="",
        )
        found: list[Tensor] = grouped(*given)
        return found[0]

    compiled = torch.compile(low, dynamic=True, backend="aot_eager", fullgraph=True)
    for rows, r in ((5, 3), (9, 4)):
        given = torch.randn(rows, 8), torch.randn(6, 8), torch.randn(r, 8), torch.randn(6, r)
        assert_close("layer", compiled(*given), low(*given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_compiled_operators_are_well_behaved(dtype: torch.dtype) -> None:
    """What is said of their results before they run is so, and none returns what it was given."""
    assert provider("cpu").unavailable() is None
    ops = torch.ops.lorafx
    x, weight, dy, bias = torch.randn(7, 33), torch.randn(5, 33), torch.randn(7, 5), torch.randn(5)
    x, weight, dy, bias = (t.to(dtype) for t in (x, weight, dy, bias))
    a, b, gain, seed = torch.randn(3, 33), torch.randn(5, 3), torch.randn(5), torch.tensor([7])
    biases, counts = [bias, None], [1, 1]
    one = ([a, a], counts, [0.25, 0.0], [0.5, 1.0])
    packed = FORMATS["nf4"].quantize(weight)
    tensors, name, layout, _ = describe(packed)
    weights = [weight, *tensors], ["", name], [len(tensors), *layout]
    forward = (x, *weights, biases, [gain, None], [b, b], *one, seed)
    s, bits, y, _ = ops.cpu_group(*forward)
    some = [True, False, True, True, False, True, False, True, False, True, False]
    other, third = [False, *[True] * 3, *[False] * 3, *[True] * 4], [True, *[False] * 6, *[True] * 4]
    plain = ([weight, weight], ["", ""], [], biases, [None, None], [b, b], [a, a], [1, 1], [0.0, 0.0], [1.0, 1.0])
    for operator, given in (
        (ops.cpu_group, forward),
        (ops.cpu_group, (x, [weight], [""], [], [None], [None], [], [], [0], [], [], None)),
        (
            ops.cpu_group_backward,
            ([dy, dy], [y, None], s, bits, [x], "", *weights, biases, [gain, None], [b, b], *one, some),
        ),
        (ops.packed_linear, (x, bias, *describe(packed))),
        (ops.packed_mm, (dy, *describe(packed))),
        (ops.packed_rows, (*describe(packed), 1, 4)),
        (
            ops.cpu_group_backward,
            ([None, dy], [None, None], s, None, [x], "", *plain, other),
        ),
        (
            ops.cpu_group_backward,
            ([dy, dy], [None, None], s, None, [x, x], "silu_mul", *plain, third),
        ),
    ):
        torch.library.opcheck(operator.default, given)
