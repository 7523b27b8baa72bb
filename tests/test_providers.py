"""Every provider means what the reference means: outputs and all gradients, beside float64.

Where elements are dropped, the formula is given the provider's own masks (what they are: test_dropout.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from grouped_layers import DTYPES, Adapter, Group, Operands, Sibling, dys_of, factors, gradients
from lorafx.kernels.providers import provider
from lorafx.ops import updates
from tolerances import assert_close

EVERYTHING = frozenset({"weight", "bias"})
LORA, DORA = Adapter(), Adapter("dora", r=4, scaling=0.5)

#: Groups that differ in everything that a group may differ in.
GROUPS = {
    "one": Group(33, (Sibling(20),), (63,)),
    "one of each size": Group(1, (Sibling(1, (Adapter(r=1),)),), (1,)),
    "no bias": Group(100, (Sibling(63, bias=False),), (7, 5)),
    "everything trains": Group(24, (Sibling(17, trains=EVERYTHING), Sibling(9, (), trains=EVERYTHING)), (12,)),
    "input does not train": Group(24, (Sibling(17, (DORA,), trains=EVERYTHING), Sibling(16)), (12,), x_trains=False),
    "ranks and scales": Group(
        48,
        (Sibling(32, (Adapter(r=1),)), Sibling(7, (Adapter(r=64, scaling=0.1),)), Sibling(40, (Adapter(r=17),))),
        (33,),
    ),
    "siblings without adapters": Group(31, (Sibling(8, ()), Sibling(5), Sibling(16, (), bias=False)), (3, 11)),
    "variants": Group(
        40,
        (
            Sibling(24, (Adapter("vera", r=9, scaling=0.3),)),
            Sibling(24, (DORA,), trains=frozenset({"bias"})),
            Sibling(24, (Adapter("adalora"),), bias=False),
            Sibling(24, (Adapter("lora_bias"),)),
            Sibling(24, (DORA,), bias=False, trains=frozenset({"weight"})),
        ),
        (2, 19),
    ),
    "several at a site": Group(
        36,
        (
            Sibling(21, (LORA, Adapter("lora_bias", r=2), Adapter(r=5, scaling=-0.7))),
            Sibling(13, (DORA, LORA, Adapter("dora", r=2)), trains=EVERYTHING),
            Sibling(13, (LORA, DORA)),
        ),
        (29,),
    ),
    "stored [in, out]": Group(
        27, (Sibling(30, kind="addmm", trains=EVERYTHING), Sibling(9, (DORA,), kind="addmm"), Sibling(11)), (18,)
    ),
    "vector": Group(19, (Sibling(23), Sibling(6, (DORA,))), ()),
    "four dimensions": Group(18, (Sibling(23), Sibling(6, (DORA,))), (2, 3, 1, 4)),
    "one row": Group(100, (Sibling(63), Sibling(6, (DORA,))), (1,)),
    "no rows": Group(19, (Sibling(23, trains=EVERYTHING), Sibling(6, (DORA,), trains=EVERYTHING)), (0,)),
    "no rows of several": Group(19, (Sibling(23), Sibling(6, ())), (2, 0)),
    "a rank above the widths": Group(5, (Sibling(3, (Adapter(r=40),)), Sibling(2, (Adapter("dora", r=33),))), (130,)),
    "dropout": Group(
        70,
        (
            Sibling(20, (Adapter(p=0.1), Adapter(p=0.5, r=20))),
            Sibling(33, (Adapter("dora", p=0.3, r=9), LORA), trains=EVERYTHING),
            Sibling(7, (Adapter(p=0.4),), training=False),
            Sibling(16, ()),
            Sibling(16, (Adapter("lora_bias", p=0.9),)),
            Sibling(16, (Adapter("vera", r=5, p=0.2),)),
        ),
        (3, 27),
    ),
    "dropout, input does not train": Group(17, (Sibling(5, (Adapter(p=0.2),)),), (9,), x_trains=False),
    "dropout, no rows": Group(17, (Sibling(5, (Adapter(p=0.2),)),), (0,)),
    "dropout of a vector": Group(17, (Sibling(5, (Adapter("dora", p=0.2),)),), ()),
    "a full tile": Group(128, (Sibling(64, (Adapter(r=16, p=0.1),)), Sibling(64, (Adapter("dora", r=16),))), (64,)),
}

by_each = pytest.mark.parametrize(
    ("name", "dtype"),
    [pytest.param(n, d, id=f"{n}-{str(d).removeprefix('torch.')}") for n, dtypes in DTYPES.items() for d in dtypes],
)
each = pytest.mark.parametrize("name", DTYPES)


def expected_of(
    operands: Operands, name: str, dys: list[Tensor | None]
) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """Outputs and gradients in float64, with the masks that the next call of the provider will draw."""
    drops = any(a.p and s.training for s in operands.group.siblings for a in s.adapters)
    exact = operands.double()
    with torch.random.fork_rng(devices=[]):
        outputs = exact.by_formula(factors(name, operands.group) if drops else None)
    return outputs, gradients(exact, outputs, dys)


def check(operands: Operands, name: str, dys: list[Tensor | None] | None = None) -> None:
    """The law itself."""
    if dys is None:
        dys = list(dys_of(operands.layers()))
    expected, wanted = expected_of(operands, name, dys)
    outputs = operands.by(name)
    layers = operands.layers()
    for actual, layer, exact in zip(outputs, layers, expected, strict=True):
        assert (actual.dtype, actual.shape) == (layer.dtype, layer.shape)
        assert_close("layer", actual, exact.to(actual.dtype))
    for what, gradient in gradients(operands, outputs, dys).items():
        value, exact_gradient = operands.trained[what], wanted[what]
        if exact_gradient is None:
            assert gradient is None or not gradient.any(), what
            continue
        assert gradient is not None, what
        assert (gradient.dtype, gradient.shape) == (value.dtype, value.shape), what
        narrow = exact_gradient.to(operands.x.dtype)  # float32 adapters beside bfloat16 are as exact as bfloat16
        assert_close("layer", gradient.to(operands.x.dtype), narrow)


@by_each
@pytest.mark.parametrize("case", GROUPS.values(), ids=GROUPS)
def test_outputs_and_all_gradients(case: Group, name: str, dtype: torch.dtype) -> None:
    check(case.make(dtype), name)


@pytest.mark.parametrize("case", GROUPS.values(), ids=GROUPS)
def test_the_formula_is_the_reference(case: Group) -> None:
    """So that what the providers are held to is what the twins of :mod:`lorafx.ops` mean."""
    still = tuple(replace(s, training=False) for s in case.siblings)
    operands = replace(case, siblings=still).make(torch.float64)
    dys: list[Tensor | None] = list(dys_of(operands.layers()))
    pairs = [(o, gradients(operands, o, dys)) for o in (operands.by_twins(), operands.by_formula())]
    (twins, wanted), (formula, found) = pairs
    for actual, expected in zip(formula, twins, strict=True):
        assert_close("layer", actual, expected)
    for what, gradient in wanted.items():
        other = found[what]
        assert gradient is not None
        assert other is not None
        assert_close("layer", other, gradient)


@by_each
@pytest.mark.parametrize("case", GROUPS.values(), ids=GROUPS)
def test_fresh_adapters_change_no_bit(case: Group, name: str, dtype: torch.dtype) -> None:
    operands = case.make(dtype, fresh=True)
    for sibling, actual, expected in zip(case.siblings, operands.by(name), operands.layers(), strict=True):
        assert torch.equal(actual, expected), sibling


@each
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["variants", "several at a site", "dropout", "stored [in, out]"])
def test_float32_adapters_beside_half_activations(case: str, name: str, half: torch.dtype) -> None:
    if half not in DTYPES[name]:
        name = "torch"
    siblings = [
        replace(s, adapters=tuple(replace(a, dtype=torch.float32) for a in s.adapters)) for s in GROUPS[case].siblings
    ]
    group = replace(GROUPS[case], siblings=tuple(siblings))
    check(group.make(half), name)
    fresh = group.make(half, fresh=True)
    for actual, expected in zip(fresh.by(name), fresh.layers(), strict=True):
        assert torch.equal(actual, expected)


@by_each
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "gains", [(0.0, 1e-30, -1e-12, 1e-4, 0.03, 0.0624, 0.0626, -0.1, 0.5, 1.0), (-1.0, 2.0, 500.0)]
)
def test_lengths_near_zero_and_far_from_the_rows(
    gains: tuple[float, ...], bias: bool, name: str, dtype: torch.dtype
) -> None:
    """The gradient of ``m`` is the frozen layer's share of the output, of which nothing is left where m is 0."""
    operands = Group(40, (Sibling(len(gains), (Adapter("dora", r=4, scaling=0.5),), bias=bias),), (63,)).make(dtype)
    own = operands.adapters[0]
    (update,) = updates(operands.weights[0], iter(own.values()), ["dora"], [0.5])
    assert update.gain is not None
    with torch.no_grad():
        own["lora_magnitude_vector"].mul_(torch.tensor(gains).to(update.gain) / update.gain)
    check(operands, name)


@each
def test_all_lengths_zero(name: str) -> None:
    operands = Group(16, (Sibling(5, (DORA,)),), (21,)).make(torch.float32)
    with torch.no_grad():
        operands.adapters[0]["lora_magnitude_vector"].zero_()
    check(operands, name)
    gradient = gradients(operands, operands.by(name), [torch.ones(21, 5)])["lora_magnitude_vector 0"]
    assert gradient is not None
    assert bool(gradient.abs().min() > 0)


@by_each
@pytest.mark.parametrize("fresh", [False, True])
def test_siblings_with_one_factor(name: str, dtype: torch.dtype, fresh: bool) -> None:
    """VeRA's A is all layers' own: its product with x may be had once, but for what drops or scales otherwise."""
    vera = Adapter("vera", r=9, scaling=0.3)
    kinds = [(vera,), (LORA,), (vera, replace(vera, p=0.2), vera), (replace(vera, scaling=0.5),), (), (vera, LORA)]
    operands = Group(40, tuple(Sibling(24, kind) for kind in kinds), (2, 19)).make(dtype, fresh=fresh)
    for own in operands.adapters:
        if "vera_A" in own:
            own["vera_A"] = operands.adapters[0]["vera_A"]
    check(operands, name)
    if fresh:
        for actual, expected in zip(operands.by(name), operands.layers(), strict=True):
            assert torch.equal(actual, expected)


@each
def test_siblings_that_train_one_factor(name: str) -> None:
    operands = Group(40, (Sibling(24), Sibling(8, (DORA,)), Sibling(16), Sibling(8))).make(torch.float32)
    dys: list[Tensor | None] = [*dys_of(operands.layers())]
    dys[3] = None
    for own in operands.adapters[2:]:
        own["lora_A"] = operands.adapters[0]["lora_A"]
    outputs, wanted = expected_of(operands, name, dys)
    found = gradients(operands, operands.by(name), dys)
    for actual, exact in zip(operands.by(name), outputs, strict=True):
        assert_close("layer", actual, exact.float())
    first, other, summed = wanted["lora_A 0"], wanted["lora_A 2"], found["lora_A 0"]
    assert first is not None
    assert other is not None
    assert summed is not None
    assert_close("layer", summed, (first + other).float())


@each
@pytest.mark.parametrize("unused", [(0,), (1,), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("case", ["variants", "dropout", "several at a site"])
def test_outputs_that_nothing_reads(case: str, name: str, unused: tuple[int, ...]) -> None:
    operands = GROUPS[case].make(torch.float32)
    dys: list[Tensor | None] = list(dys_of(operands.layers()))
    for index in unused:
        dys[index] = None
    check(operands, name, dys)


@each
@pytest.mark.parametrize("what", ["lora_A", "lora_B", "lora_magnitude_vector", "x", "rank", "bias"])
@pytest.mark.parametrize("longer", [False, True])
def test_sizes_that_do_not_fit(what: str, longer: bool, name: str) -> None:
    """Kernels would read past the end of a tensor."""
    operands = Group(40, (Sibling(24), Sibling(24, (DORA,)))).make(torch.float32)
    off = 8 if longer else -2

    def resized(tensor: Tensor, dim: int) -> Tensor:
        shape = [*tensor.shape]
        shape[dim] += off
        return torch.ones(shape)

    own = operands.adapters[1]
    if what == "x":
        operands.x = resized(operands.x, -1)
    elif what == "bias":
        operands.biases[1] = torch.ones(2, 3, 24 + off)
    elif what == "rank":
        own["lora_B"] = resized(own["lora_B"], 1)
    else:
        own[what] = resized(own[what], {"lora_A": 1}.get(what, 0))
    with pytest.raises(RuntimeError):
        operands.by(name)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "columns apart": lambda t: torch.stack([t, t], -1)[..., 0],
    "rows apart": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "one row, expanded": lambda t: t[:1].clone().expand_as(t),
    "one element, expanded": lambda t: t[:1, :1].clone().expand_as(t),
    "an offset": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    "flipped": lambda t: t.flip(0),
}


@by_each
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_any_strides(view: str, p: float, name: str, dtype: torch.dtype) -> None:
    """Of the input, and of what comes back; ``y.sum()`` gives a gradient of which all elements are one."""
    siblings = (Sibling(20, (Adapter(p=p),), trains=EVERYTHING), Sibling(20, (Adapter("dora", p=p),)))
    operands = Group(35, siblings, (26,)).make(dtype)
    strided = VIEWS[view](operands.x.detach())
    operands.x = strided.requires_grad_()
    check(operands, name, [VIEWS[view](dy) for dy in dys_of(operands.layers())])
    fresh = replace(operands.group, x_trains=False).make(dtype, fresh=True)
    fresh.x = strided
    for actual, expected in zip(fresh.by(name), fresh.layers(), strict=True):
        assert torch.equal(actual, expected)


@each
@pytest.mark.parametrize("order", [(1, 0, 2), (0, 2, 1), (2, 1, 0)], ids=str)
def test_any_order_of_three_dimensions(name: str, order: tuple[int, ...]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for bias in (True, False):
            group = Group(10, (Sibling(8, bias=bias), Sibling(4, (), bias=bias)), (6, 5))
            operands, fresh = group.make(dtype), group.make(dtype, fresh=True)
            turned = operands.x.detach().permute(order).contiguous().permute(tuple(order.index(i) for i in range(3)))
            operands.x, fresh.x = turned.requires_grad_(), turned.detach()
            check(operands, name)
            for actual, expected in zip(fresh.by(name), fresh.layers(), strict=True):
                assert torch.equal(actual, expected), (dtype, bias)


@by_each
def test_two_runs_are_equal(name: str, dtype: torch.dtype) -> None:
    operands = GROUPS["dropout"].make(dtype)
    dys = list(dys_of(operands.layers()))

    def run() -> list[Tensor]:
        torch.manual_seed(3)
        outputs = operands.by(name)
        return [*outputs, *(g for g in gradients(operands, outputs, [*dys]).values() if g is not None)]

    assert all(map(torch.equal, run(), run()))


@by_each
def test_nothing_is_kept_where_nothing_trains(name: str, dtype: torch.dtype) -> None:
    operands = GROUPS["variants"].make(dtype)
    for value in operands.trained.values():
        value.requires_grad_(False)
    assert not any(y.requires_grad for y in operands.by(name))


@each
@pytest.mark.parametrize("frozen", ["lora_A 0", "lora_B 0", "lora_magnitude_vector 1", "x"])
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(name: str, frozen: str) -> None:
    group = Group(24, (Sibling(16, (Adapter(p=0.2),)), Sibling(9, (DORA,))), (31,))
    operands = group.make(torch.float32)
    operands.trained[frozen].requires_grad_(False)
    check(operands, name)


@each
@pytest.mark.parametrize("case", ["everything trains", "dropout", "variants"])
def test_accumulated_gradients(case: str, name: str) -> None:
    """Two backward passes add up, and neither changes what it was given."""
    operands = GROUPS[case].make(torch.float32)
    dys = list(dys_of(operands.layers()))
    kept = [t.detach().clone() for t in (*operands.trained.values(), *dys)]
    torch.manual_seed(3)
    once = gradients(operands, operands.by(name), [*dys])
    for _ in range(2):
        torch.manual_seed(3)
        torch.autograd.backward(operands.by(name), dys)
    for what, value in operands.trained.items():
        single = once[what]
        assert single is not None
        assert value.grad is not None
        assert torch.equal(value.grad, 2 * single)
    assert all(map(torch.equal, kept, (*operands.trained.values(), *dys)))


@each
def test_many_rows_and_threads_give_the_sums_of_one_thread(name: str) -> None:
    """Rows are shared out to threads, whose sums are added up."""
    operands = Group(31, (Sibling(18, (Adapter("dora", r=5, p=0.2),)), Sibling(9)), (700,)).make(torch.float32)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            check(operands, name)
    finally:
        torch.set_num_threads(threads)


@each
def test_a_weight_changed_before_backward_is_noticed(name: str) -> None:
    operands = GROUPS["one"].make(torch.float32)
    (y,) = operands.by(name)
    with torch.no_grad():
        operands.adapters[0]["lora_A"].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_compiled_provider_says_what_it_does_not_serve() -> None:
    assert provider("cpu").unavailable() is None, "the other tests of this file mean it"
    operands = GROUPS["one"].make(torch.float64)
    check(operands, "cpu")  # the operator falls back on torch's
