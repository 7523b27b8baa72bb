"""Dropout by every provider is dropout: which elements are dropped, how many, and independently of what.

The statistics are in standard deviations of what independent draws give. That they would notice a generator that is
not one, the broken masks show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

import lorafx
from conftest import Zoo, loss_of, randomize, same
from grouped_layers import DTYPES, Adapter, Group, Operands, Sibling, factors
from lorafx import LoraSpec
from lorafx.graph import CapturedModule
from lorafx.kernels.base import quantised
from tolerances import assert_close
from zoo import FAMILIES

each = pytest.mark.parametrize("name", DTYPES)

#: More would be a chance of less than 1 in 10^7 for each of the statistics, which are a few hundred here.
SIGMAS = 5.3

P = 0.25


def masks(name: str, rows: int, k: int, *p: float, siblings: bool = False) -> list[Tensor]:
    """What is kept of ``[rows, k]`` by adapters with these p, of one layer or of one layer each: bool."""
    adapters = [Adapter(p=chance) for chance in p]
    groups = [(a,) for a in adapters] if siblings else [tuple(adapters)]
    return [f != 0 for f in factors(name, Group(k, tuple(Sibling(1, g) for g in groups), (rows,)))]


def share(kept: Tensor, p: float) -> float:
    """How far the number of kept elements is from its expectation."""
    n = kept.numel()
    return float((int(kept.sum()) - n * (1 - p)) / math.sqrt(n * p * (1 - p)))


def correlation(a: Tensor, b: Tensor, p: float) -> float:
    """Of two masks, element by element."""
    score = ((a.double() - (1 - p)) * (b.double() - (1 - p))).mean() / (p * (1 - p))
    return float(score) * math.sqrt(a.numel())


def spread(kept: Tensor, p: float, dim: int) -> float:
    """The chi-square of the sums along ``dim``: too even, or too uneven."""
    sums = kept.double().sum(dim)
    n = kept.shape[dim]
    chi = float(((sums - n * (1 - p)).square() / (n * p * (1 - p))).sum())
    return (chi - len(sums)) / math.sqrt(2 * len(sums))


def pairs(kept: Tensor, p: float) -> float:
    """The chi-square of how often each pattern of 8 neighbours in a row occurs."""
    rows = kept[:, : kept.shape[1] // 8 * 8].reshape(-1, 8).long()
    found = torch.bincount((rows << torch.arange(8)).sum(1), minlength=256).double()
    ones = torch.tensor([bin(i).count("1") for i in range(256)]).double()
    expected = len(rows) * (1 - p) ** ones * p ** (8 - ones)
    chi = float(((found - expected).square() / expected).sum())
    return (chi - 255) / math.sqrt(2 * 255)


LAGS = (*range(1, 65), 96, 127, 128, 129, 192, 256)


def statistics(kept: Tensor, p: float) -> dict[str, float]:
    """Everything about one mask ``[rows, k]``, k over 256."""
    found = {
        "share": share(kept, p),
        "rows": spread(kept, p, 1),
        "columns": spread(kept, p, 0),
        "pairs": pairs(kept, p),
    }
    for lag in LAGS:
        found[f"lag {lag} in a row"] = correlation(kept[:, lag:], kept[:, :-lag], p)
        found[f"lag {lag} of rows"] = correlation(kept[lag:], kept[:-lag], p)
        found[f"lag {lag} along a diagonal"] = correlation(kept[lag:, lag:], kept[:-lag, :-lag], p)
    return found


def suspicious(found: Mapping[str, float]) -> dict[str, float]:
    return {n: v for n, v in found.items() if abs(v) > SIGMAS}


@each
def test_a_mask_is_independent_of_itself(name: str) -> None:
    (kept,) = masks(name, 700, 333, P)
    assert not suspicious(statistics(kept, P))


def _tiled(rows: int, k: int) -> Callable[[Tensor], Tensor]:
    return lambda kept: kept[:rows, :k].repeat(-(-len(kept) // rows), -(-kept.shape[1] // k))[
        : len(kept), : kept.shape[1]
    ]


def _even(kept: Tensor) -> Tensor:
    """One of each 4 neighbours dropped, always."""
    rows, k = kept.shape
    dropped = torch.randint(4, (rows, k // 4 + 1, 1))
    return (torch.arange(4) != dropped).reshape(rows, -1)[:, :k]


#: What is wrong with a mask, and a statistic that must notice.
BROKEN: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "one mask for all rows": (lambda m: m[:1].expand_as(m), "lag 1 of rows"),
    "one mask for all columns": (lambda m: m[:, :1].expand_as(m), "lag 1 in a row"),
    "a period of 64 columns": (_tiled(700, 64), "lag 64 in a row"),
    "a period of 128 columns": (_tiled(700, 128), "lag 128 in a row"),
    "a period of 64 rows": (_tiled(64, 333), "lag 64 of rows"),
    "rows shifted by one": (lambda m: torch.stack([m[0].roll(i) for i in range(len(m))]), "lag 1 along a diagonal"),
    "too even": (_even, "pairs"),
    "every row as many": (lambda m: m.sort(1).values[:, torch.randperm(m.shape[1])], "columns"),
    "a p of 0.26": (lambda m: m & (torch.rand(m.shape) > 0.0133), "share"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_mask_is_noticed(how: str) -> None:
    breaks, statistic = BROKEN[how]
    kept = torch.rand(700, 333) >= P
    assert not suspicious(statistics(kept, P)), "an honest mask is not"
    assert statistic in suspicious(statistics(breaks(kept), P))


@each
@pytest.mark.parametrize("siblings", [True, False], ids=["siblings", "adapters of one layer"])
def test_adapters_and_steps_draw_their_own(name: str, siblings: bool) -> None:
    """Between three adapters, and between these and those of the next two steps, also shifted against each other."""
    drawn = [m for _ in range(3) for m in masks(name, 300, 150, P, P, P, siblings=siblings)]
    for i, one in enumerate(drawn):
        for other in drawn[i + 1 :]:
            found = {"same place": correlation(one, other, P)}
            for lag in (1, 2, 8, 16, 64, 128):
                found[f"{lag} columns on"] = correlation(one[:, lag:], other[:, :-lag], P)
                found[f"{lag} rows on"] = correlation(one[lag:], other[:-lag], P)
            assert not suspicious(found)
    assert correlation(drawn[0], drawn[0], P) > SIGMAS, "one mask for two would be noticed"


@each
@pytest.mark.parametrize("p", [0.001, 0.05, 0.1, 0.5, 0.9, 0.999])
def test_the_share_of_kept_elements(name: str, p: float) -> None:
    (kept,) = masks(name, 1500, 200, p)
    assert abs(share(kept, p)) < SIGMAS


@each
def test_the_probability_is_exact_to_one_in_65536(name: str) -> None:
    """Of fewer random bits another share would be dropped, or none."""
    p = 3 / 65536
    (kept,) = masks(name, 1 << 19, 32, p)
    assert abs(share(kept, p)) < 3
    assert min(abs(share(kept, other / 65536)) for other in (2, 4)) > SIGMAS


K = 50
UNIT = Group(
    K,
    (
        Sibling(K, (Adapter(r=K, scaling=1.0, p=0.3), Adapter(r=K, scaling=1.0, p=0.6)), bias=False),
        Sibling(K, (Adapter(r=K, scaling=1.0),), bias=False),
        Sibling(K, (Adapter(r=K, scaling=1.0, p=0.5),), bias=False),
    ),
    (K,),
)


def unit(index: int) -> Operands:
    """Of the four adapters only this one does anything, and its output is what its dropout makes of ones."""
    operands = Operands(UNIT, torch.ones(K, K, requires_grad=True), [torch.zeros(K, K)] * 3, [None] * 3)
    for i in range(4):
        matrix = torch.eye(K) if i == index else torch.zeros(K, K)
        operands.adapters.append({n: matrix.clone().requires_grad_() for n in ("lora_A", "lora_B")})
    return operands


@each
def test_forward_and_both_gradients_drop_the_same(name: str) -> None:
    for index, layer in enumerate((0, 0, 1, 2)):
        operands, chance = unit(index), (0.3, 0.6, 0.0, 0.5)[index]
        drawn = []
        for dy in (torch.ones(K, K), torch.eye(K)):
            torch.manual_seed(11)
            y = operands.by(name)[layer]
            drawn.append((y, *torch.autograd.grad(y, (operands.x, operands.adapters[index]["lora_A"]), dy)))
        (y, dx, _), (again, _, da) = drawn
        expected = y != 0
        assert bool(expected.all()) == (chance == 0.0)
        for found in (y, dx, again, da):
            assert torch.equal(found != 0, expected)
            assert_close("layer", found, expected / (1 - quantised(chance)))


@each
def test_the_random_state_tells_the_masks(name: str) -> None:
    torch.manual_seed(4)
    first, second = masks(name, 20, 40, 0.5), masks(name, 20, 40, 0.5)
    torch.manual_seed(4)
    assert same([first, second], [masks(name, 20, 40, 0.5), masks(name, 20, 40, 0.5)])
    assert not same(first, second)
    torch.manual_seed(5)
    assert not same(first, masks(name, 20, 40, 0.5))


@each
def test_nothing_is_drawn_where_nothing_is_dropped(name: str) -> None:
    group = Group(8, (Sibling(5, (Adapter(p=0.5),), training=False), Sibling(5)), (9,))
    operands = group.make(torch.float32)
    state = torch.get_rng_state()
    first = operands.by(name)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, first, operands.by(name)))


@each
def test_a_sibling_without_dropout_sees_all_beside_one_with(name: str) -> None:
    siblings = (Sibling(9, (Adapter(p=0.5), Adapter())), Sibling(9), Sibling(9, (Adapter(p=0.7),), training=False))
    operands = Group(21, siblings, (40,)).make(torch.float32)
    plain = Operands(Group(21, (Sibling(9),) * 2, (40,)), operands.x, operands.weights[1:], operands.biases[1:])
    plain.adapters = operands.adapters[2:]
    for actual, expected in zip(operands.by(name)[1:], plain.by(name), strict=True):
        assert_close("layer", actual, expected)


# on a graph


class TwoSites(nn.Module):
    """Two layers that read different values, in two numbered layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(K, K, bias=False) for _ in range(2))

    def forward(self, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        return self.layers[0](x), self.layers[1](other)


def two_sites(backend: str) -> CapturedModule:
    """A graph whose outputs are what the sites' dropouts make of its inputs."""
    inputs = (torch.ones(K, K), torch.ones(K, K))
    gm = lorafx.apply(TwoSites(), LoraSpec(r=K, alpha=K, dropout=P, target_modules=["0", "1"]), inputs, backend=backend)
    with torch.no_grad():
        for name, value in gm.named_parameters():
            value.copy_(torch.eye(K) if "lora" in name else torch.zeros(K, K))
    return gm


@each
def test_sites_and_steps_of_a_graph_draw_their_own(name: str) -> None:
    gm, ones = two_sites(name).train(), torch.ones(200, K)
    drawn = [y != 0 for _ in range(3) for y in gm(ones, ones)]
    for i, one in enumerate(drawn):
        assert abs(share(one, P)) < SIGMAS
        for other in drawn[i + 1 :]:
            assert abs(correlation(one, other, P)) < SIGMAS
    gm.eval()
    for y in gm(ones, ones):
        assert torch.equal(y, ones)


@each
def test_each_site_has_the_mode_of_its_layer(name: str) -> None:
    gm, ones = two_sites(name).train(), torch.ones(20, K)
    gm.get_submodule("layers.1").eval()
    dropped, whole = gm(ones, ones)
    assert not torch.equal(dropped, ones)
    assert torch.equal(whole, ones)


@each
@pytest.mark.xdist_group("llama")
def test_a_layer_that_runs_again_draws_the_same(zoo: Zoo, name: str) -> None:
    family = FAMILIES["llama"]
    gm = zoo.adapted(family, LoraSpec(r=3, dropout=0.3)).train()
    lorafx.lower(gm, name)
    randomize(gm)

    def run(seed: int) -> tuple[Tensor, list[Tensor | None]]:
        gm.zero_grad()
        torch.manual_seed(seed)
        loss = loss_of(gm, family)
        loss.backward()
        return loss.detach(), [None if p.grad is None else p.grad.clone() for p in gm.parameters() if p.requires_grad]

    expected = run(1)
    assert not same(run(2), expected)
    gm.activation_checkpointing_enable()
    assert same(run(1), expected)
