"""DoRA: its formula and gradient, its first output, and that its norm is computed when it must be, and only then."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

import lorafx
from conftest import randomize
from lorafx import LoraSpec
from lorafx.graph import CapturedModule
from lorafx.ops import ADAPTED
from lorafx.variants import row_norm as norms
from lorafx.variants.row_norm import row_norm
from tolerances import assert_close

SPEC = LoraSpec(variant="dora", r=3, alpha=5, target_modules=["0", "2"])


def small_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 7)).to(dtype)


@pytest.fixture
def model() -> nn.Sequential:
    return small_model()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 12)


@pytest.fixture
def gm(model: nn.Sequential, x: Tensor) -> CapturedModule:
    found = lorafx.apply(model, SPEC, (x,))
    randomize(found)
    return found


class Count:
    """How often norms, and the base's part of them, were computed."""

    def __init__(self) -> None:
        self.norms = self.squares = 0

    def take(self) -> tuple[int, int]:
        """The counts since the last time."""
        found = self.norms, self.squares
        self.norms = self.squares = 0
        return found


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Iterator[Count]:
    counted = Count()
    compute_norm, compute_squares = norms.compute_norm, norms.compute_squares

    def norm(*arguments: object) -> Tensor:
        counted.norms += 1
        return compute_norm(*arguments)  # type: ignore[arg-type]

    def squares(weight: Tensor) -> Tensor:
        counted.squares += 1
        return compute_squares(weight)

    monkeypatch.setattr(norms, "compute_norm", norm)
    monkeypatch.setattr(norms, "compute_squares", squares)
    return counted


# What it computes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("stack", [(), (3,)], ids=["matrix", "stack"])
def test_the_norm_is_that_of_the_sum(dtype: torch.dtype, stack: tuple[int, ...]) -> None:
    """To float32's (float64's) last places; beside half precision A is as the layer multiplies with it."""
    weight = torch.randn(*stack, 40, 30).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    a, b = torch.randn(*stack, 5, 30, dtype=wide), torch.randn(*stack, 40, 5, dtype=wide)
    norm = row_norm(weight, a, b, 0.7)
    assert norm.dtype == wide
    if dtype.itemsize == 2:
        a = a.to(dtype)
    exact = torch.linalg.vector_norm(weight.double() + 0.7 * (b.double() @ a.double()), dim=-1)
    assert_close("layer", norm, exact.to(wide))


@pytest.mark.parametrize("zero", [False, True], ids=["anywhere", "zero magnitudes"])
def test_the_gradient_is_that_of_the_formula_with_a_constant_norm(zero: bool) -> None:
    """``W' = m (W + s B A) / c`` (arXiv 2402.09353, eq. 11): by x, A, B and m."""
    draw = torch.randn
    x, weight, bias = draw(6, 5, dtype=torch.float64), draw(4, 5, dtype=torch.float64), draw(4, dtype=torch.float64)
    a, b = draw(2, 5, dtype=torch.float64), draw(4, 2, dtype=torch.float64)
    m = torch.zeros(4, dtype=torch.float64) if zero else draw(4, dtype=torch.float64)
    c = torch.linalg.vector_norm(weight + 0.3 * b @ a, dim=1)
    given = [t.requires_grad_() for t in (x, a, b, m)]
    ours = ADAPTED["linear"](x, weight, bias, [a, b, m], ["dora"], [0.3], [0.0], True, None)
    formula = nn.functional.linear(x, m.unsqueeze(1) * (weight + 0.3 * b @ a) / c.unsqueeze(1), bias)
    assert_close("layer", ours, formula)
    weights = draw(6, 4, dtype=torch.float64)
    found, wanted = (torch.autograd.grad((y * weights).sum(), given) for y in (ours, formula))
    for actual, expected in zip(found, wanted, strict=True):
        assert_close("layer", actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_magnitudes_are_float32_or_better_and_the_first_output_is_the_bases(dtype: torch.dtype) -> None:
    model, x = small_model(dtype), torch.randn(64, 12).to(dtype)
    for adapter_dtype in (None, "float32" if dtype is torch.float64 else str(dtype).removeprefix("torch.")):
        spec = LoraSpec(variant="dora", r=3, target_modules=["0", "2"], adapter_dtype=adapter_dtype)
        gm = lorafx.apply(model, spec, (x,))
        for site in lorafx.sites(gm):
            m = site.parameters(gm)["lora_magnitude_vector"]
            assert m.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.equal(gm(x), model(x))
        assert torch.equal(gm.eval()(x), model(x))


def test_a_zero_row_has_no_direction_and_no_nan(x: Tensor) -> None:
    """A freshly zeroed layer: 0 / 0 would make every output NaN."""
    model = small_model()
    with torch.no_grad():
        model[0].weight[3] = 0
        model[2].weight.zero_()
    gm = lorafx.apply(model, SPEC, (x,))
    assert torch.equal(gm(x), model(x))
    optimizer = torch.optim.SGD([p for p in gm.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        gm(x).square().sum().backward()
        optimizer.step()
    assert bool(gm(x).isfinite().all())
    assert all(bool(p.grad.isfinite().all()) for p in gm.parameters() if p.grad is not None)


# When it computes its norm


def test_the_norm_is_computed_once_for_each_change_of_the_factors(gm: CapturedModule, x: Tensor, count: Count) -> None:
    optimizer = torch.optim.AdamW([p for p in gm.parameters() if p.requires_grad])
    for _ in range(3):  # micro-batches of one step
        gm(x).sum().backward()
    assert count.take() == (2, 0)  # the base's terms are known from the start
    optimizer.step()
    for _ in range(2):
        gm(x).sum().backward()
    assert count.take() == (2, 0)
    with torch.no_grad():
        gm.eval()(x)
    with torch.inference_mode():
        gm(x)
    with lorafx.disable_adapters(gm):
        gm(x)
    gm.train()(x)
    assert count.take() == (0, 0)


def test_the_magnitudes_have_no_part_in_the_norm(gm: CapturedModule, x: Tensor, count: Count) -> None:
    before = gm(x)
    with torch.no_grad():
        for site in lorafx.sites(gm):
            site.parameters(gm)["lora_magnitude_vector"].mul_(2)
    count.take()
    assert not torch.equal(gm(x), before)
    assert count.take() == (0, 0)


def test_a_norm_computed_in_inference_mode_serves_training(gm: CapturedModule, x: Tensor, count: Count) -> None:
    with torch.no_grad():
        for name in ("0.weight", "2.weight"):
            gm.get_parameter(name).mul_(2)
    with torch.inference_mode():
        gm(x)
    gm(x).sum().backward()
    assert count.take() == (2, 2)
    assert all(p.grad is not None for p in gm.parameters() if p.requires_grad)


def test_recomputed_activations_use_the_same_norm(gm: CapturedModule, x: Tensor, count: Count) -> None:
    gm(x).square().sum().backward()
    plain = [p.grad.clone() for p in gm.parameters() if p.grad is not None]
    gm.zero_grad()
    checkpoint(gm, x, use_reentrant=False).square().sum().backward()
    assert count.take() == (2, 0)
    found = [p.grad for p in gm.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def factor(name: str) -> Callable[[nn.Sequential, CapturedModule], Tensor]:
    return lambda model, gm: lorafx.sites(gm)[0].parameters(gm)[name]


TENSORS: dict[str, Callable[[nn.Sequential, CapturedModule], Tensor]] = {
    "A": factor("lora_A"),
    "B": factor("lora_B"),
    "the graph's base": lambda model, gm: gm.get_parameter("0.weight"),
    "the user's base": lambda model, gm: model[0].weight,
}


def add_in_place(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor[1, 2] += 0.5


def add_through_data(tensor: Tensor) -> None:
    tensor.data.add_(0.25)


def exchange_data(tensor: Tensor) -> None:
    tensor.data = tensor.data + 0.25


CHANGES = {"in place": add_in_place, "through data": add_through_data, "other data": exchange_data}


@pytest.mark.parametrize(
    ("what", "how"),
    # Other memory for the user's parameter is nothing to the graph, which keeps what it was made from.
    [(w, h) for w in TENSORS for h in CHANGES if (w, h) != ("the user's base", "other data")],
)
def test_every_change_is_seen(what: str, how: str, model: nn.Sequential, gm: CapturedModule, x: Tensor) -> None:
    """A copy of the graph has nothing to remember, so it computes anew."""
    before = gm(x)
    CHANGES[how](TENSORS[what](model, gm))
    assert not torch.equal(gm(x), before)
    assert torch.equal(gm(x), copy.deepcopy(gm)(x))


def test_one_changed_value_of_a_factor_is_seen_through_data(gm: CapturedModule, x: Tensor) -> None:
    (site, _) = lorafx.sites(gm)
    for name in ("lora_A", "lora_B"):
        gm(x)
        site.parameters(gm)[name].data[-1, -1] += 1e-3
        assert torch.equal(gm(x), copy.deepcopy(gm)(x))


def test_loading_a_base_is_seen(model: nn.Sequential, gm: CapturedModule, x: Tensor) -> None:
    gm(x)
    gm.load_state_dict({k: v * 2 for k, v in model.state_dict().items()}, strict=False)
    assert torch.equal(gm(x), copy.deepcopy(gm)(x))
    model.load_state_dict({k: v * 3 for k, v in model.state_dict().items()})  # no longer shared
    assert torch.equal(gm(x), copy.deepcopy(gm)(x))


def test_another_scaling_is_another_norm(count: Count) -> None:
    weight, a, b = (nn.Parameter(torch.randn(*s)) for s in ((6, 5), (2, 5), (6, 2)))
    first, second, again = (row_norm(weight, a, b, s) for s in (0.5, 0.25, 0.5))
    assert not torch.equal(first, second)
    assert torch.equal(first, again)
    assert count.take() == (3, 1)


def test_parts_of_one_weight_and_its_transpose_are_kept_apart(count: Count) -> None:
    weight = nn.Parameter(torch.randn(6, 6))
    a, b = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(3, 2))
    for part in (weight[:3], weight[3:], weight.mT[:3]) * 2:
        exact = torch.linalg.vector_norm(part.double() + 0.5 * b.double() @ a.double(), dim=1)
        assert_close("layer", row_norm(part, a, b, 0.5), exact.float())
    assert count.take() == (6, 3)


def test_two_adapters_of_one_layer_have_their_own_norms(gm: CapturedModule, x: Tensor, count: Count) -> None:
    lorafx.add_adapter(gm, SPEC, "second", seed=1)
    lorafx.set_adapter(gm, ["default", "second"])
    randomize(gm)
    first = gm(x)
    assert count.take() == (6, 0)  # two to start the new one, four in the call
    assert torch.equal(gm(x), first)
    assert count.take() == (0, 0)


def test_a_change_that_leaves_one_column_is_seen(count: Count) -> None:
    """However its width divides the distance between the values that are looked at."""
    weight, a, b = nn.Parameter(torch.randn(64, 64)), torch.randn(2, 64), torch.randn(64, 2)
    row_norm(weight, a, b, 0.5)
    for columns in (slice(1), slice(1, None)):
        weight.data[:, columns] *= 2
    assert_close("layer", row_norm(weight, a, b, 0.5), torch.linalg.vector_norm(weight + 0.5 * b @ a, dim=1).detach())


def test_whoever_asked_may_write_to_the_norm() -> None:
    """As compiled code does, which uses a buffer again."""
    weight, a, b = torch.randn(6, 5), torch.randn(2, 5), torch.randn(6, 2)
    first = row_norm(weight, a, b, 0.5)
    kept = first.clone()
    first.zero_()
    second = row_norm(weight, a, b, 0.5)
    assert torch.equal(second, kept)
    second.zero_()
    assert torch.equal(row_norm(weight, a, b, 0.5), kept)


# As one operator


def calls(graph: torch.fx.Graph) -> int:
    assert not any(n.target is torch.ops.aten.linalg_vector_norm.default for n in graph.nodes)
    return sum(n.target is torch.ops.lorafx.row_norm.default for n in graph.nodes)


def test_what_traces_records_a_call(gm: CapturedModule, x: Tensor) -> None:
    """What was kept would be a constant of the trace."""
    y = gm(x)
    (site, _) = lorafx.sites(gm)
    traced = make_fx(lambda t: gm(t))(x)
    exported = torch.export.export(gm, (), {"input": x}, strict=False).run_decompositions()
    assert calls(traced.graph) == calls(exported.graph) == 2
    assert not exported.constants
    assert torch.equal(traced(x), y)
    with torch.no_grad():
        site.parameters(gm)["lora_A"].data.add_(0.5)
    assert torch.equal(traced(x), gm(x))
    assert not torch.equal(traced(x), y)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_code_keeps_what_eager_code_does(backend: str, gm: CapturedModule, x: Tensor, count: Count) -> None:
    optimizer = torch.optim.SGD([p for p in gm.parameters() if p.requires_grad], lr=0.1)
    compiled = torch.compile(gm, backend=backend, fullgraph=True)
    for _ in range(2):
        found = torch.autograd.grad(compiled(x).square().sum(), optimizer.param_groups[0]["params"])
        assert count.take() == (2, 0)
        compiled(x)
        wanted = torch.autograd.grad(gm(x).square().sum(), optimizer.param_groups[0]["params"])
        assert count.take() == (0, 0)
        for parameter, actual, expected in zip(optimizer.param_groups[0]["params"], found, wanted, strict=True):
            assert_close("layer", actual, expected)
            parameter.grad = actual
        optimizer.step()
    with torch.no_grad():
        gm.get_parameter("0.weight")[3, 1] += 0.5
        assert_close("layer", compiled(x), copy.deepcopy(gm)(x))
    with torch.inference_mode():
        assert_close("layer", compiled(x), gm(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_a_well_behaved_operator(dtype: torch.dtype) -> None:
    for stack in ((), (3,)):
        weight = torch.randn(*stack, 5, 6).mT.to(dtype)
        arguments = (weight, torch.randn(*stack, 2, 5), torch.randn(*stack, 6, 2), 0.5)
        torch.library.opcheck(torch.ops.lorafx.row_norm.default, arguments)


def test_autocast_does_not_reach_it() -> None:
    weight, a, b = torch.randn(6, 5), torch.randn(2, 5), torch.randn(6, 2)
    with torch.autocast("cpu", torch.bfloat16):
        found = row_norm(weight, a, b, 0.5)
    assert torch.equal(found, row_norm(weight.clone(), a.clone(), b, 0.5))


def test_with_fake_tensors_and_tensors_that_wrap_others(count: Count) -> None:
    weight, a, b = torch.randn(6, 5), torch.randn(2, 5), torch.randn(6, 2)
    norm = row_norm(weight, a, b, 0.5)
    with FakeTensorMode() as mode:
        fake = row_norm(*(mode.from_tensor(t) for t in (weight, a, b)), 0.5)
    assert (fake.shape, fake.dtype) == (norm.shape, norm.dtype)
    count.take()
    wrapped = row_norm(TwoTensor(weight, weight), a, b, 0.5)
    assert_close("layer", wrapped.a, norm)  # in torch's operators: the kernels add up in another order
    assert count.take() == (1, 1)


def test_the_gradient_transform(gm: CapturedModule, x: Tensor) -> None:
    gm(x)
    parameters = {n: p.detach() for n, p in gm.named_parameters()}

    def loss(given: dict[str, Tensor]) -> Tensor:
        found: Tensor = torch.func.functional_call(gm, given, (x,)).square().sum()
        return found

    gradients = torch.func.grad(loss)(parameters)
    gm(x).square().sum().backward()
    for name, parameter in gm.named_parameters():
        if parameter.grad is not None:
            assert_close("layer", gradients[name], parameter.grad)


def test_batched_and_forward_transforms() -> None:
    """Of a base that the batch shares, and no derivative comes through."""
    weight, a, b = torch.randn(6, 5), torch.randn(4, 2, 5), torch.randn(6, 2, 4)
    found = torch.func.vmap(lambda a, b: row_norm(weight, a, b, 0.5), in_dims=(0, 2))(a, b)
    for i in range(4):
        assert_close("layer", found[i], row_norm(weight, a[i], b[..., i], 0.5))
    arguments = weight, a[0], b[..., 0]
    norm, tangent = torch.func.jvp(lambda *t: row_norm(*t, 0.5), arguments, arguments)
    assert torch.equal(norm, row_norm(*arguments, 0.5))
    assert not tangent.any()
    with forward_ad.dual_level():
        dual = row_norm(*(forward_ad.make_dual(t, t) for t in arguments), 0.25)
        assert forward_ad.unpack_dual(dual).tangent is None


def test_on_the_meta_device(x: Tensor) -> None:
    with torch.device("meta"):
        model = small_model()
        inputs = torch.empty(5, 12)
    gm = lorafx.apply(model, SPEC, (inputs,))
    assert gm(inputs).is_meta


def test_nothing_is_left_of_a_graph_that_is_gone(x: Tensor) -> None:
    """What is kept of the base is kept with the user's model, whose memory it is."""

    def sizes() -> tuple[int, int]:
        gc.collect()
        return len(norms._NORMS), len(norms._SQUARES)

    before = sizes()
    model = small_model()
    gm = lorafx.apply(model, SPEC, (x,))
    gm(x)
    assert sizes() == (before[0] + 2, before[1] + 2)
    storages = [weakref.ref(p.untyped_storage()) for p in gm.parameters()]
    del gm
    assert sizes() == (before[0], before[1] + 2)
    del model
    assert sizes() == before
    assert not any(storage() for storage in storages)


def test_memory_that_is_used_again_is_another_base() -> None:
    """Even where all values that are looked at are the same."""
    a, b, addresses = torch.zeros(1, 300), torch.zeros(300, 1), set()
    for i in range(20):
        weight = torch.zeros(300, 300)
        weight[0, 1] = i
        addresses.add(weight.data_ptr())
        assert row_norm(weight, a, b, 1.0)[0] == i
        del weight
    assert len(addresses) < 20


def test_threads_and_copies_do_no_harm(gm: CapturedModule, x: Tensor) -> None:
    copies = [gm, *(copy.deepcopy(gm) for _ in range(3))]
    expected = gm(x)
    with ThreadPoolExecutor(8) as pool:
        outputs = list(pool.map(lambda g: g(x), copies * 8))
    assert all(torch.equal(output, expected) for output in outputs)
