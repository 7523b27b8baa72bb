"""Triton's kernels against a float64 reference of the provider's interface.

Not collected by itself: tests/test_triton_kernels.py runs this file in a process of its own, since Triton decides at
its first import whether it interprets. With a GPU the same tests run on it; without, in the interpreter, where bfloat16
is computed from float32 operands and stored truncated.
"""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorafx
from lorafx.kernels.base import Dropout, GradUp
from lorafx.kernels.triton.device import Device, pretend
from lorafx.kernels.triton.dropout import Plan, mask, plan
from lorafx.kernels.triton.launches import Launch
from lorafx.kernels.triton.provider import TritonProvider
from lorafx.kernels.triton.row_norm import row_gain
from lorafx.kernels.triton.tiles import interpreted, recorded
from lorafx.kernels.triton.traffic import traffic
from lorafx.variants.row_norm import compute_norm, compute_squares
from tolerances import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROVIDER = TritonProvider()
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Case:
    """A group: M rows of k features, siblings with their widths, ranks and dropouts."""

    m: int
    k: int
    widths: tuple[int, ...]
    ranks: tuple[int, ...]
    p: tuple[float, ...]
    dtype: torch.dtype
    adapters: torch.dtype = F32
    gain: bool = False
    bias: bool = True
    transposed: bool = False  # weights stored [k, n], x with a gap between its rows
    seed: int = 2**40 + 7

    @property
    def id(self) -> str:
        """For the test's name."""
        return f"{self.m}x{self.k}-r{'_'.join(map(str, self.ranks))}-{str(self.dtype)[6:]}"


@dataclass
class Run:
    """The operands of a case, and what the provider makes of them."""

    case: Case
    x: Tensor
    right: Tensor
    weights: list[Tensor]
    lefts: list[Tensor]
    biases: list[Tensor | None]
    gains: list[Tensor | None]
    dys: list[Tensor]
    dropout: Dropout
    seed: Tensor
    s: Tensor = field(init=False)
    ys: list[Tensor] = field(default_factory=list)
    ups: list[GradUp] = field(default_factory=list)
    dx: Tensor | None = None
    dright: Tensor = field(init=False)

    def run(self) -> Run:
        """Forward and backward, as the autograd function does it."""
        self.s, kept = PROVIDER.down(self.x, self.right, self.dropout, self.seed)
        first = 0
        for weight, left, bias, gain, dy in zip(
            self.weights, self.lefts, self.biases, self.gains, self.dys, strict=True
        ):
            s = self.s[:, first : first + left.shape[1]]
            y = PROVIDER.up(self.x, weight, bias, s, left, gain)
            self.ys.append(y)
            self.ups.append(PROVIDER.grad_up(dy, s, left, gain, None if gain is None else y, bias is not None))
            first += left.shape[1]
        ds = torch.cat([up.ds for up in self.ups], dim=1)
        bases = [up.base for up in self.ups]
        self.dx = PROVIDER.grad_x(bases, self.weights, ds, self.right, self.dropout, kept)
        self.dright = PROVIDER.grad_right(self.x, ds, self.dropout, kept)
        return self

    @property
    def outputs(self) -> list[Tensor]:
        """Everything that was computed."""
        parts = [t for up in self.ups for t in (up.ds, up.dleft, up.base, up.total, up.dot) if t is not None]
        assert self.dx is not None
        return [self.s, *self.ys, *parts, self.dx, self.dright]


def make(case: Case) -> Run:
    """Operands of a case, of size 1 in the sums."""
    generator = torch.Generator().manual_seed(sum(case.ranks) + case.m)

    def normal(*shape: int, of: torch.dtype = case.dtype, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(DEVICE, of)

    def weight(n: int) -> Tensor:
        shape = (case.k, n) if case.transposed else (n, case.k)
        stored = normal(*shape, scale=case.k**-0.5)
        return stored.mT if case.transposed else stored

    x = normal(case.m, case.k + 3)[:, : case.k] if case.transposed else normal(case.m, case.k)
    return Run(
        case,
        x,
        normal(sum(case.ranks), case.k, of=case.adapters, scale=case.k**-0.5),
        [weight(n) for n in case.widths],
        [normal(n, r, of=case.adapters, scale=r**-0.5) for n, r in zip(case.widths, case.ranks, strict=True)],
        [normal(n) if case.bias else None for n in case.widths],
        [1 + normal(n, of=case.adapters, scale=0.1) if case.gain else None for n in case.widths],
        [normal(case.m, n) for n in case.widths],
        Dropout(case.ranks, case.p),
        torch.tensor([case.seed], device=DEVICE),
    )


def masks(run: Run) -> list[Tensor]:
    """``[M, k]`` for each sibling: 0 where dropped, otherwise what an element is multiplied with."""
    shape = (run.case.m, run.case.k)
    found = []
    for branch, p in enumerate(run.case.p):
        drop = round(p * 65536)
        kept = mask(run.seed, branch, p, shape).double() if drop else torch.ones(shape, device=DEVICE).double()
        found.append(kept * 65536 / (65536 - drop))
    return found


def check(actual: Tensor | None, expected: Tensor, dtype: torch.dtype) -> None:
    """Within the table's tolerance of one layer in this dtype."""
    assert actual is not None
    assert_close("layer", actual.to(dtype), expected.to(dtype))


CASES = [
    Case(1, 1, (1,), (1,), (0.0,), F32),
    Case(37, 50, (33,), (3,), (0.0,), F32, bias=False),
    Case(37, 50, (33,), (3,), (0.25,), F32, gain=True, transposed=True),
    Case(70, 130, (65, 40, 20), (1, 17, 8), (0.1, 0.0, 0.5), F32, gain=True),
    Case(70, 130, (65, 40, 20), (8, 8, 8), (0.0, 0.0, 0.1), F16, gain=True),
    Case(65, 70, (130, 7), (64, 3), (0.1, 0.3), F16, adapters=F16, transposed=True),
    Case(33, 65, (48,), (70,), (0.1,), F32, bias=False),
    Case(50, 64, (48, 80), (17, 64), (0.0, 0.0), BF16),
    Case(50, 64, (48, 80), (8, 1), (0.1, 0.1), BF16, adapters=BF16, gain=True),
    Case(260, 264, (40,), (8,), (0.1,), F32),  # every sum is split
    Case(16, 48, (32,) * 4, (60,) * 4, (0.1, 0.2, 0.3, 0.4), F32),  # more ranks than one launch takes
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_outputs_and_gradients(case: Case) -> None:
    run, dtype = make(case).run(), case.dtype
    x = run.x.double().requires_grad_()
    right = run.right.to(dtype).double().requires_grad_()
    first, loss = 0, torch.zeros((), dtype=torch.float64, device=DEVICE)
    leaves = []
    for i, (weight, dy, up, b, g) in enumerate(
        zip(run.weights, run.dys, run.ups, run.biases, run.gains, strict=True)
    ):  # fmt: skip
        left, n = run.lefts[i].to(dtype).double().requires_grad_(), weight.shape[0]
        mine = slice(first, first := first + left.shape[1])
        bias = torch.zeros(n, dtype=torch.float64, device=DEVICE) if b is None else b.double()
        gain = torch.ones(n, dtype=torch.float64, device=DEVICE) if g is None else g.double()
        s = (x * masks(run)[i]) @ right[mine].mT
        y = gain * (x @ weight.double().mT) + s @ left.mT + bias
        loss = loss + (y * dy.double()).sum()
        check(run.s[:, mine], s.detach(), dtype)
        check(run.ys[i], y.detach(), dtype)
        check(up.base, gain * dy.double(), dtype)
        leaves.append(left)
        if b is None:
            assert up.total is None
        else:
            check(up.total, dy.double().sum(0), F32)
        if g is None:
            assert up.dot is None
            assert up.base is dy
        else:
            check(up.dot, (dy.double() * run.ys[i].double()).sum(0), F32)
    dx, dright, *dlefts = torch.autograd.grad(loss, [x, right, *leaves])
    check(run.dx, dx, dtype)
    check(run.dright, dright, dtype)
    for up, left, dleft in zip(run.ups, run.lefts, dlefts, strict=True):
        check(up.dleft, dleft, dtype)
        assert up.dleft.dtype == left.dtype
    assert run.dright.dtype == F32


@pytest.mark.parametrize("case", [CASES[2], CASES[9]], ids=lambda case: case.id)
def test_the_same_inputs_give_the_same_bits(case: Case) -> None:
    once, again = make(case).run(), make(case).run()
    assert all(torch.equal(a, b) for a, b in zip(once.outputs, again.outputs, strict=True))


def test_no_rows() -> None:
    run = make(Case(0, 8, (4,), (2,), (0.1,), F32, gain=True)).run()
    assert run.ys[0].shape == (0, 4)
    assert run.dx is not None
    assert run.dx.shape == (0, 8)
    for sums in (run.ups[0].dleft, run.ups[0].total, run.ups[0].dot, run.dright):
        assert sums is not None
        assert not sums.any()


def test_everything_dropped() -> None:
    run = make(Case(20, 24, (16,), (4,), (1.0,), F32)).run()
    assert not run.s.any()
    assert not run.dright.any()
    check(run.dx, run.dys[0].double() @ run.weights[0].double(), F32)


def test_library_products_take_the_same_rest() -> None:
    """float32 takes the vendor's GEMM by default, half types Triton's: here the other way round."""
    from lorafx.kernels.triton import config, grad_down, up

    case = CASES[3]
    with pytest.MonkeyPatch.context() as patch:
        tiles = lambda *_: [config.Config(32, 32, 16, 4, 2)]  # noqa: E731 - a stand-in
        patch.setattr(up, "gemm_configs", tiles)
        patch.setattr(grad_down, "gemm_configs", tiles)
        patch.setattr(config, "_CHOSEN", {})
        fused = make(case).run()
    library = make(case).run()
    for one, other in zip(fused.outputs, library.outputs, strict=True):
        check(one, other.double(), F32)


def test_library_products_keep_the_frozen_bits() -> None:
    run = make(CASES[3])
    for weight, left, bias in zip(run.weights, run.lefts, run.biases, strict=True):
        s = torch.ones(run.case.m, left.shape[1], device=DEVICE)
        one = torch.ones(weight.shape[0], device=DEVICE)
        for gain in (None, one):
            y = PROVIDER.up(run.x, weight, bias, s, torch.zeros_like(left), gain)
            assert torch.equal(y, torch.nn.functional.linear(run.x, weight, bias))


class Block(nn.Module):
    """Siblings, and a layer alone."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(24, 20), nn.Linear(24, 20, bias=False), nn.Linear(20, 24)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.out(self.q(x) * self.k(x)).square().mean()
        return found


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_lowered_model(variant: str) -> None:
    model, x = Block().to(DEVICE), torch.randn(2, 9, 24, device=DEVICE)
    spec = lorafx.LoraSpec(r=5, target_modules=["q", "k", "out"], variant=variant)
    found: dict[str, dict[str, Tensor]] = {}
    for backend in ("reference", "triton"):
        gm = lorafx.apply(model, spec, (x,), seed=0, backend=backend)
        trained = {n: p for n, p in gm.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for name, parameter in trained.items():
                if "lora_B" in name:
                    parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape).to(x) % 7 / 20)
        x.requires_grad_()
        loss = gm(x)
        grads = torch.autograd.grad(loss, [x, *trained.values()])
        found[backend] = dict(zip(["loss", "x", *trained], [loss.detach(), *grads], strict=True))
    for name, expected in found["reference"].items():
        check(found["triton"][name], expected.double(), F32)


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
        s, _ = PROVIDER.down(x[:rows], right, Dropout((40,), (0.1,)), torch.tensor([5], device=DEVICE))
        assert torch.equal(s.cpu() != 0, large[:rows, :40])


def test_probability_is_exact_to_16_bits() -> None:
    assert plan(Dropout((4,), (0.3,))).drops == (round(0.3 * 65536),)
    # A mask with a larger p keeps a subset, and one more step of 2^-16 drops an element now and then.
    smaller, larger = keep_of(3, p=1000 / 65536), keep_of(3, p=1064 / 65536)
    assert bool((smaller | ~larger).all())
    expected = 64 / 65536 * smaller.numel()
    assert abs(int((smaller & ~larger).sum()) - expected) < 4 * expected**0.5


def test_plan() -> None:
    both = plan(Dropout((8, 4, 70), (0.0, 0.0, 0.5)))
    assert both == Plan((0, 12, 76), (12, 76, 82), (16, 64, 16), (0, 2, 2), (0, 32768, 32768))
    assert [p.starts for p in both.packs(80)] == [(0, 12), (76,)]
    assert [p.starts for p in both.packs(1)] == [(0,), (12,), (76,)]


# DoRA's norm


@pytest.mark.parametrize(
    ("shape", "r", "dtype", "adapters"),
    [((45, 70), 5, F32, F32), ((33, 140), 40, F16, F32), ((20, 33), 3, BF16, BF16)],
)
def test_row_gain(shape: tuple[int, int], r: int, dtype: torch.dtype, adapters: torch.dtype) -> None:
    n, k = shape
    weight, a = torch.randn(n, k).to(DEVICE, dtype), torch.randn(r, k).to(DEVICE, adapters)
    b, magnitude = torch.randn(n, r).to(DEVICE, adapters), torch.rand(n).to(DEVICE)
    weight[1], b[1] = 0, 0
    squares = compute_squares(weight)
    found = row_gain(weight, a, b, squares, magnitude)
    expected = (weight.double() + b.double() @ a.double()).norm(dim=1)
    check(found.norm, expected, F32)
    check(found.norm, compute_norm(squares, weight, a, b, 1.0).double(), F32)
    gain = magnitude.double() / torch.where(expected > 0, expected, 1.0)
    check(found.gain, gain, F32)
    assert found.gain[1] == magnitude[1]
    check(found.left, gain[:, None] * b.double(), adapters)


def test_norm_of_an_unchanged_weight_is_the_base_norm() -> None:
    weight, a = torch.randn(20, 48).to(DEVICE, F16), torch.randn(4, 48, device=DEVICE)
    squares = compute_squares(weight)
    zero = torch.zeros(20, 4, device=DEVICE)
    assert torch.equal(row_gain(weight, a, zero, squares, squares.sqrt().float()).norm, squares.sqrt().float())


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
    ],
    ids=lambda case: case.id,
)
def test_model_of_traffic(case: Case) -> None:
    run = make(case)
    with counted() as launches:
        run.run()
        row_gain(run.weights[0], run.right, torch.zeros(case.widths[0], sum(case.ranks)),
                 compute_squares(run.weights[0]), torch.ones(case.widths[0]))  # fmt: skip
    names = {launch.name for launch, _ in launches}
    assert names >= {"down", "up", "grad_up", "dx", "dright", "row_gain"}
    assert "reduce" in names or case.m < 100  # small sums are not split
    for launch, counts in launches:
        model = traffic(launch)
        for seen, expected in ((counts["load"], model.loaded), (counts["store"], model.stored)):
            assert abs(seen - expected) <= 0.01 * seen, f"{launch.name}: {seen} bytes, not {expected}"
        assert model.dram <= model.loaded + model.stored


def test_check_of_the_gpu_benchmark() -> None:
    """What benchmarks/gpu.py does before it times anything, at a size for the interpreter."""
    path = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
    gpu = runpy.run_path(str(path))
    checks = list(gpu["check"](torch.device(DEVICE), [(9, 20, 17)], [3], ["fp32", "fp16"]))
    assert {c.what for c in checks} >= {"s", "y0", "y1", "dleft0", "dot1", "total0", "dx", "dright"}
    assert all(c.right for c in checks), [c for c in checks if not c.right]


def test_splits_follow_the_processors() -> None:
    """More processors, more parts; the sums stay what they are."""
    case = CASES[9]
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
