"""Triton's kernels against a float64 reference of the provider's interface.

Not collected by itself: tests/test_triton_kernels.py runs this file in a process of its own, since Triton decides at
its first import whether it interprets. With a GPU the same tests run on it; without, in the interpreter, where bfloat16
is computed from float32 operands and stored truncated.
"""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.nn import functional as F

import lorafx
from lorafx.bases.ops import describe
from lorafx.bases.tensor import quantized
from lorafx.kernels.base import Adapters
from lorafx.kernels.triton.device import Device, pretend
from lorafx.kernels.triton.dropout import Plan, mask, plan
from lorafx.kernels.triton.grad_down import grad_x
from lorafx.kernels.triton.launches import Launch
from lorafx.kernels.triton.ops import arguments, packed_linear
from lorafx.kernels.triton.row_norm import row_norm
from lorafx.kernels.triton.tiles import interpreted, recorded
from lorafx.kernels.triton.traffic import traffic
from lorafx.kernels.triton.up import up
from lorafx.kernels.triton.weights import dequantize, stored
from lorafx.variants.row_norm import compute_norm, compute_squares
from tolerances import assert_close
from triton_cases import BF16, DEVICE, F16, F32, PROVIDER, Case, Run, check, dense, make, masks

CASES = [
    Case(1, 1, (1,), (1,), (0.0,), F32),
    Case(37, 50, (33,), (3,), (0.0,), F32, bias=False),
    Case(37, 50, (33,), (3,), (0.25,), F32, gain=True, transposed=True),
    Case(70, 130, (65, 40, 20), (1, 17, 8), (0.1, 0.0, 0.5), F32, gain=True),
    Case(70, 130, (65, 40, 20), (8, 8, 8), (0.0, 0.0, 0.1), F16, gain=True),
    Case(65, 70, (130, 7), (64, 3), (0.1, 0.3), F16, adapters=F16, transposed=True),
    Case(33, 65, (48,), (70,), (0.1,), F32, bias=False),
    Case(21, 40, (33, 18), (1, 17), (0.1, 0.0), F16),
    Case(21, 40, (33, 18), (17, 1), (0.0, 0.2), F16, adapters=F16, gain=True, transposed=True),
    Case(50, 64, (48, 80), (17, 64), (0.0, 0.0), BF16),
    Case(50, 64, (48, 80), (8, 1), (0.1, 0.1), BF16, adapters=BF16, gain=True),
    Case(260, 264, (40,), (8,), (0.1,), F32),  # every sum is split
    Case(16, 48, (32,) * 4, (60,) * 4, (0.1, 0.2, 0.3, 0.4), F32),  # more ranks than one launch takes
    Case(1, 1, (1,), (1,), (0.0,), F32, block_sizes=(64,)),
    Case(37, 65, (33,), (3,), (0.25,), F32, gain=True, block_sizes=(64,), double_quant=False),
    Case(20, 70, (34, 10, 18), (1, 17, 8), (0.1, 0.0, 0.5), F32, gain=True, block_sizes=(64, 0, 32)),
    Case(33, 128, (66, 7), (64, 3), (0.1, 0.3), F16, bias=False, block_sizes=(64, 32)),
    Case(21, 96, (17, 18), (17, 1), (0.0, 0.2), F16, adapters=F16, gain=True, block_sizes=(32, 64), double_quant=False),
    Case(20, 64, (24, 40), (17, 64), (0.0, 0.1), BF16, gain=True, block_sizes=(64, 0)),
    Case(18, 128, (70,), (8,), (0.0,), F32, block_sizes=(32,)),  # more scales than one block of them
]
NF4 = [case for case in CASES if case.block_sizes]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_outputs_and_gradients(case: Case) -> None:
    run, dtype = make(case).run(), case.dtype
    x, loss = run.x.double().requires_grad_(), torch.zeros((), dtype=torch.float64, device=DEVICE)
    rights = [right.to(dtype).double().requires_grad_() for right in run.rights]
    lefts = [left.to(dtype).double().requires_grad_() for left in run.lefts]
    for i, (layer, dy, found) in enumerate(zip(run.layers, run.dys, run.ups, strict=True)):
        zero, one = (torch.full(dy.shape[1:], v, dtype=torch.float64, device=DEVICE) for v in (0.0, 1.0))
        bias = zero if layer.bias is None else layer.bias.double()
        gain = one if layer.gain is None else layer.gain.double()
        s = (x * masks(run)[i]) @ rights[i].mT
        y = gain * (x @ dense(layer.weight).mT) + run.adapters.scales[i] * s @ lefts[i].mT + bias
        loss = loss + (y * dy.double()).sum()
        check(run.s[:, run.adapters.columns[i]], s.detach(), dtype)  # here the scale is at left
        check(run.ys[i], y.detach(), dtype)
        check(found.base, gain * dy.double(), dtype)
        if layer.bias is None:
            assert found.total is None
        else:
            check(found.total, dy.double().sum(0), F32)
        if layer.gain is None:
            assert found.dot is None
            assert found.base is dy
        else:
            check(found.dot, (dy.double() * run.ys[i].double()).sum(0), F32)
    leaves = [*rights, *lefts]
    dx, *expected = torch.autograd.grad(loss, [x, *leaves])
    check(run.dx, dx, dtype)
    actuals = [*run.drights, *(found.dlefts[0] for found in run.ups)]
    given = [*run.rights, *run.lefts]
    for actual, gradient, value in zip(actuals, expected, given, strict=True):
        check(actual, gradient, dtype)
        assert actual.dtype == value.dtype


@pytest.mark.parametrize("case", [CASES[2], CASES[11], NF4[2]], ids=lambda case: case.id)
def test_the_same_inputs_give_the_same_bits(case: Case) -> None:
    once, again = make(case).run(), make(case).run()
    assert all(torch.equal(a, b) for a, b in zip(once.outputs, again.outputs, strict=True))


def test_no_rows() -> None:
    run = make(Case(0, 8, (4,), (2,), (0.1,), F32, gain=True)).run()
    assert run.ys[0].shape == (0, 4)
    assert run.dx.shape == (0, 8)
    for sums in (*run.ups[0].dlefts, run.ups[0].total, run.ups[0].dot, *run.drights):
        assert sums is not None
        assert not sums.any()


def test_everything_dropped() -> None:
    run = make(Case(20, 24, (16,), (4,), (1.0,), F32)).run()
    assert not run.s.any()
    assert not run.drights[0].any()
    check(run.dx, run.dys[0].double() @ run.weights[0].double(), F32)


@pytest.mark.parametrize("case", [CASES[3], CASES[5], CASES[10], NF4[3]], ids=lambda case: case.id)
def test_both_ways_to_multiply(case: Case) -> None:
    """The library's product with the rest added to it, and one kernel for both: equal to rounding."""
    run = make(case).run()
    for fused in (True, False):
        for actual, expected in zip(multiplied(run, fused), (*run.ys, run.dx), strict=True):
            check(actual, expected.double(), case.dtype)


def multiplied(run: Run, fused: bool) -> list[Tensor]:
    """What has large products: y of each layer, and dx."""
    weights = stored(*arguments(run.weights, run.case.dtype))
    found = []
    for layer, weight in zip(run.layers, weights, strict=True):
        own = (run.s[:, layer.columns(run.adapters)], layer.left(run.adapters), layer.gain)
        found.append(up(run.x, weight, layer.bias, *own, fused=fused))
    bases, right = [u.base for u in run.ups], torch.cat(list(run.rights))
    return [*found, grad_x(bases, weights, run.ds, right, plan(run.case.ranks, run.case.p), run.seed, fused)]


@pytest.mark.parametrize("case", [CASES[3], CASES[4], CASES[10], NF4[3]], ids=lambda case: case.id)
def test_an_adapter_that_changes_nothing_keeps_the_frozen_bits(case: Case) -> None:
    run = make(case)
    s = torch.ones(case.m, sum(case.ranks), dtype=case.dtype, device=DEVICE)
    for gain in (False, True):
        layers = [
            la._replace(gain=torch.ones(n, device=DEVICE) if gain else None, lefts=[torch.zeros_like(la.lefts[0])])
            for n, la in zip(case.widths, run.layers, strict=True)
        ]
        for y, layer in zip(PROVIDER.up(run.x, s, layers, run.adapters), layers, strict=True):
            assert torch.equal(y, frozen(run.x, layer.weight, layer.bias))


def frozen(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What the layer is without an adapter: on CUDA, whose operators on packed weights are these kernels' too."""
    packed = quantized(weight)
    found: Tensor = F.linear(x, weight, bias) if packed is None else packed_linear(x, bias, *describe(packed))
    return found


class Block(nn.Module):
    """Siblings, and a layer alone."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(24, 20), nn.Linear(24, 20, bias=False), nn.Linear(20, 24)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.out(self.q(x) * self.k(x)).square().mean()
        return found


INPUT = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(1)).to(DEVICE)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_lowered_model(variant: str) -> None:
    found = {backend: step_of(adapted(variant, 0.0, backend)) for backend in ("reference", "triton")}
    for actual, expected in zip(found["triton"], found["reference"], strict=True):
        check(actual, expected.double(), F32)


@pytest.mark.parametrize(("variant", "p"), [("lora", 0.0), ("lora", 0.3), ("dora", 0.0), ("dora", 0.3)])
def test_compiled_model(variant: str, p: float) -> None:
    """Traced, all is operators and nothing is launched; run, it is what runs uncompiled, masks included."""
    gm, called, launched, at_compilation = adapted(variant, p, "triton").train(), set[str](), list[str](), list[int]()

    def compiler(graph: torch.fx.GraphModule, _: Sequence[Tensor]) -> Any:
        called.update(str(node.target) for node in graph.graph.nodes)
        at_compilation.append(len(launched))
        return make_boxed_func(graph.forward)

    def run(kernel: Any, grid: Any, args: Any, options: Any) -> None:
        launched.append(kernel.__name__)
        kernel[tuple(grid)](*args, **options)

    expected, other = step_of(gm, seed=3), step_of(gm, seed=4)
    with recorded(run):
        actual = step_of(torch.compile(gm, fullgraph=True, backend=aot_autograd(fw_compiler=compiler)), seed=3)
    assert all(map(torch.equal, actual, expected))
    assert all(map(torch.equal, other, expected)) == (p == 0.0)
    assert at_compilation[0] == 0
    assert launched
    names = {"triton_down", "triton_up", "triton_grad_up", "triton_grad_x", "triton_grad_right"}
    names |= {"row_norm"} if variant == "dora" else set()
    assert called >= {f"lorafx.{name}.default" for name in names}


def adapted(variant: str, p: float, backend: str) -> Any:
    """A block whose adapters change something."""
    torch.manual_seed(2)
    spec = lorafx.LoraSpec(r=5, alpha=8, dropout=p, target_modules=["q", "k", "out"], variant=variant)
    gm = lorafx.apply(Block().to(DEVICE), spec, (INPUT,), seed=0, backend=backend)
    with torch.no_grad():
        for name, parameter in gm.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape).to(INPUT) % 7 / 20)
    return gm


def step_of(gm: Any, seed: int = 0) -> list[Tensor]:
    """The output, and all gradients of it."""
    torch.manual_seed(seed)
    x = INPUT.clone().requires_grad_()
    loss = gm(x)
    return [loss.detach(), *torch.autograd.grad(loss, [x, *(p for p in gm.parameters() if p.requires_grad)])]


# Masks


def keep_of(seed: int, branch: int = 0, p: float = 0.5, shape: tuple[int, int] = (256, 512)) -> Tensor:
    return mask(torch.tensor([seed], device=DEVICE), branch, p, shape).cpu()


def deviation(kept: Tensor, p: float) -> Tensor:
    """By how many standard deviations the share kept along the last dimension is off."""
    count = kept.shape[-1]
    return (kept.double().mean(-1) - (1 - p)).abs() / (p * (1 - p) / count) ** 0.5


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_of_rows_columns_and_all(p: float) -> None:
    kept = keep_of(11, p=p)
    assert deviation(kept.flatten(), p) < 4
    for lines in (kept, kept.mT):
        off = deviation(lines, p)
        assert off.max() < 5
        assert abs(float(off.square().mean()) - 1) < 0.4  # their spread is a binomial's, too


def correlation(one: Tensor, other: Tensor) -> float:
    """In standard deviations, of independent fair bits."""
    agree = (one == other).double().mean()
    return abs(float(agree) - 0.5) * 2 * one.numel() ** 0.5


def test_independent_of_neighbours() -> None:
    kept = keep_of(12)
    for lag in (1, 2, 3, 4, 7, 8, 9, 16, 64):
        assert correlation(kept[:, lag:], kept[:, :-lag]) < 4.5
        assert correlation(kept[lag:], kept[:-lag]) < 4.5
        assert correlation(kept[lag:, lag:], kept[:-lag, :-lag]) < 4.5


def test_independent_of_siblings_and_seeds() -> None:
    seeds, shape = (1, 2, 1 + 2**32, 2 + 2**62, -1), (128, 256)
    kept = [keep_of(seed, branch, shape=shape) for seed in seeds for branch in (0, 1, 2)]
    for i, one in enumerate(kept):
        for other in kept[:i]:
            assert correlation(one, other) < 4.5


def test_mask_depends_on_place_and_seed_only() -> None:
    large = keep_of(5, p=0.1, shape=(70, 300))
    assert torch.equal(keep_of(5, p=0.1, shape=(33, 129)), large[:33, :129])
    # From the kernels' own tiles: with right the identity, s is x where it is kept.
    x, right = torch.ones(70, 40, device=DEVICE), torch.eye(40, device=DEVICE)
    for rows in (70, 3):
        s, _ = PROVIDER.down(x[:rows], [right], Adapters((1,), (40,), (0.1,), (1.0,)), torch.tensor([5], device=DEVICE))
        assert torch.equal(s.cpu() != 0, large[:rows, :40])


def test_probability_is_exact_to_16_bits() -> None:
    assert plan((4,), (0.3,)).drops == (round(0.3 * 65536),)
    # A mask with a larger p keeps a subset, and one more step of 2^-16 drops an element now and then.
    smaller, larger = keep_of(3, p=1000 / 65536), keep_of(3, p=1064 / 65536)
    assert bool((smaller | ~larger).all())
    expected = 64 / 65536 * smaller.numel()
    assert abs(int((smaller & ~larger).sum()) - expected) < 4 * expected**0.5


def test_plan() -> None:
    both = plan((8, 4, 70), (0.0, 0.0, 0.5))
    assert both == Plan((0, 12, 76), (12, 76, 82), (16, 64, 16), (0, 2, 2), (0, 32768, 32768))
    assert [p.starts for p in both.packs(80)] == [(0, 12), (76,)]
    assert [p.starts for p in both.packs(1)] == [(0,), (12,), (76,)]


# DoRA's norm


@pytest.mark.parametrize(
    ("shape", "r", "dtype", "adapters"),
    [((45, 70), 5, F32, F32), ((33, 140), 40, F16, F32), ((20, 33), 3, BF16, BF16)],
)
def test_row_norm(shape: tuple[int, int], r: int, dtype: torch.dtype, adapters: torch.dtype) -> None:
    n, k = shape
    weight, a, b = (
        torch.randn(size).to(DEVICE, of) for size, of in (((n, k), dtype), ((r, k), adapters), ((n, r), adapters))
    )
    weight[1], b[1] = 0, 0
    squares = compute_squares(weight)
    found = row_norm(weight, a, b, squares, 0.3)
    check(found, (weight.double() + 0.3 * b.double() @ a.double()).norm(dim=1), F32)
    assert found[1] == 0
    # Where the change is zero, the base's norm bit for bit: a gain of 1 is 1 at any provider.
    unchanged = row_norm(weight, a, torch.zeros_like(b), squares, 0.3)
    assert torch.equal(unchanged, squares.sqrt().float())
    assert torch.equal(unchanged, compute_norm(squares, weight, a, torch.zeros_like(b), 0.3))


def test_the_operator_of_dora_is_the_kernel() -> None:
    weight, a, b = (torch.randn(size, device=DEVICE) for size in ((20, 33), (3, 33), (20, 3)))
    exact = (weight.double() + 0.7 * b.double() @ a.double()).norm(dim=1)
    launched: list[str] = []

    def run(kernel: Any, grid: Any, args: Any, options: Any) -> None:
        launched.append(kernel.__name__)
        kernel[tuple(grid)](*args, **options)

    with recorded(run):
        check(torch.ops.lorafx.row_norm.default(weight, a, b, 0.7), exact, F32)
        assert launched == ["row_norm_kernel"]
        wide = torch.ops.lorafx.row_norm.default(weight.double(), a, b, 0.7)  # nothing for the kernel
        stack = torch.ops.lorafx.row_norm.default(weight.expand(2, 20, 33), a.expand(2, 3, 33), b.expand(2, 20, 3), 0.7)
    assert launched == ["row_norm_kernel"]
    assert wide.dtype is torch.float64
    check(wide, exact, F32)
    check(stack[1], exact, F32)


# Traffic


@contextmanager
def counted() -> Iterator[list[tuple[Launch, dict[str, int]]]]:
    """Each launch, run, and the bytes its ``tl.load`` and ``tl.store`` moved in the interpreter."""
    from triton.runtime.interpreter import InterpreterBuilder

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    found: list[tuple[Launch, dict[str, int]]] = []

    def counting_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        _count(found[-1][1], "load", ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def counting_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        _count(found[-1][1], "store", ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    def run(kernel: Any, grid: Any, args: Any, options: Any) -> None:
        found.append((Launch(kernel, tuple(grid), args, options), {"load": 0, "store": 0}))
        kernel[tuple(grid)](*args, **options)

    with pytest.MonkeyPatch.context() as patch, recorded(run):
        patch.setattr(InterpreterBuilder, "create_masked_load", counting_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", counting_store)
        yield found


def _count(counts: dict[str, int], what: str, ptrs: Any, mask: Any) -> None:
    counts[what] += int(mask.data.sum()) * ptrs.get_element_ty().primitive_bitwidth // 8


@pytest.mark.skipif(not interpreted(), reason="bytes are counted by the interpreter")
@pytest.mark.parametrize(
    "case",
    [
        Case(150, 140, (130, 70), (8, 17), (0.1, 0.0), F16, gain=True),
        Case(140, 150, (70,), (70,), (0.0,), F32, bias=False),
        Case(40, 48, (48,) * 4, (60,) * 4, (0.1,) * 4, BF16),
        Case(70, 128, (130, 34), (8, 17), (0.1, 0.0), F16, gain=True, block_sizes=(64, 32)),
        Case(20, 70, (34, 18), (3, 4), (0.0, 0.0), F32, block_sizes=(64, 0), double_quant=False),
        Case(20, 70, (18,), (3,), (0.0,), F32, block_sizes=(32,)),
    ],
    ids=lambda case: case.id,
)
def test_model_of_traffic(case: Case) -> None:
    """Of both ways to multiply: after the library's product, and fused with it, as docs/kernels.md's figures are."""
    run = make(case)
    with counted() as launches:
        run.run()
        multiplied(run, fused=True)
        weight = dense(run.weights[0]).to(case.dtype)
        if case.block_sizes:
            dequantize(stored(*arguments(run.weights, case.dtype))[0], case.dtype)
        row_norm(weight, run.rights[0], run.lefts[0], compute_squares(weight), 2.0)
    names = {launch.name for launch, _ in launches}
    assert names >= {"down", "up", "grad_up", "dx", "dright", "row_norm"}
    assert ("dequantize" in names) == bool(case.block_sizes)
    flags = [launch.args[launch.kernel.arg_names.index("BASE_GIVEN")] for launch, _ in launches if launch.name == "up"]
    assert flags.count(False) >= len(case.widths)
    assert "reduce" in names or case.m < 100  # small sums are not split
    for launch, counts in launches:
        model = traffic(launch)
        for seen, expected in ((counts["load"], model.loaded), (counts["store"], model.stored)):
            assert abs(seen - expected) <= 0.01 * seen, f"{launch.name}: {seen} bytes, not {expected}"
        assert model.dram <= model.loaded + model.stored


GPU = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "gpu.py"))


def test_check_of_the_gpu_benchmark() -> None:
    """What benchmarks/gpu.py does before it times anything, at a size for the interpreter."""
    checks = list(GPU["check"](torch.device(DEVICE), [(9, 20, 17)], [3], ["fp32", "fp16"]))
    assert {c.what for c in checks} >= {"s", "y0", "y1", "dleft0", "dot1", "total0", "dx", "dright1", "row norm"}
    assert all(c.right for c in checks), [c for c in checks if not c.right]


class Event:
    """A clock that advances by a millisecond at each look at it: of the device, where there is none."""

    now = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        Event.now += 1
        self.at = Event.now

    def elapsed_time(self, end: Event) -> float:
        return float(end.at - self.at)


@pytest.mark.parametrize(("base", "dora"), [("dense", True), ("nf4", False)])
def test_timing_of_the_gpu_benchmark(base: str, dora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every method runs, forward and backward; without a GPU its clock and its memory are made up."""
    compile_, device = torch.compile, torch.device(DEVICE)
    monkeypatch.setattr(torch, "compile", lambda model: compile_(model, backend="aot_eager"))
    if device.type == "cpu":
        for name, value in (("synchronize", None), ("reset_peak_memory_stats", None), ("memory_allocated", 3)):
            monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 10)
        monkeypatch.setattr(torch.cuda, "Event", Event)
    timings = GPU["time_block"](3, 32, 2, "fp32", 0.1, base, dora, 2, device)
    others = (
        ["PEFT", "PEFT, compiled"]
        if base == "dense"
        else ["PEFT, bitsandbytes"] * (find_spec("bitsandbytes") is not None)
    )
    assert [t.method for t in timings] == ["frozen", "frozen, compiled", *others, "lorafx", "lorafx, compiled"]
    assert all((t.m, t.features, t.r, t.dtype, t.p, t.base) == (3, 32, 2, "fp32", 0.1, base) for t in timings)
    assert all(t.milliseconds > 0 and t.quartiles[0] <= t.milliseconds <= t.quartiles[1] for t in timings)
    assert timings[0].over_frozen == 1.0
    if device.type == "cpu":
        assert {(t.milliseconds, t.step_bytes) for t in timings} == {(1.0, 7)}


def test_command_line_of_the_gpu_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it prints and writes; a wrong output and nothing is timed."""
    timing = GPU["Timing"]("lorafx", 8, 64, 2, "bf16", 0.0, 1.5, (1.0, 2.0), 1.25, 2**20)
    errors = [0.0]
    monkeypatch.setitem(
        GPU["main"].__globals__, "check", lambda *given: [GPU["Check"]("dx", 1, 2, 3, 4, "fp32", 0.1, errors[0], 1e-4)]
    )
    monkeypatch.setitem(GPU["main"].__globals__, "time_block", lambda *given: [timing])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="a device"))
    path = tmp_path / "results.json"
    arguments = ["--features", "64", "--ranks", "2", "--json", str(path)]
    assert GPU["main"](arguments) == 0
    found = json.loads(path.read_text())
    assert found["device"] == "a device"
    assert [t["method"] for t in found["timings"]] == ["lorafx"] * 4  # two dropouts, two bases
    assert "1.500 ms, 1.250 of frozen, 1 MiB" in capsys.readouterr().out
    errors[0] = float("nan")
    assert GPU["main"](arguments) == 1
    assert json.loads(path.read_text())["timings"] == []
    assert "dx: error nan > 0.0001 at M=1 k=2 n=3 r=4 fp32 dense" in capsys.readouterr().out


def test_splits_follow_the_processors() -> None:
    """More processors, more parts; the sums stay what they are."""
    case = CASES[11]
    few, many = [], []
    with pretend(Device(processors=1)), recorded(lambda *launch: few.append(Launch(*launch))):
        make(case).run()
    with pretend(Device(processors=1000)), recorded(lambda *launch: many.append(Launch(*launch))):
        make(case).run()
    assert "reduce" in {launch.name for launch in many}
    assert len(few) < len(many)
    with pretend(Device(processors=1)):
        one = make(case).run()
    for a, b in zip(one.outputs, make(case).run().outputs, strict=True):
        assert_close("layer", a, b)
