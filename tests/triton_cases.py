"""Cases for Triton's kernels: their operands, and what the provider makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorafx.bases import FORMATS
from lorafx.bases.tensor import QuantizedTensor
from lorafx.kernels.base import Adapters, quantised
from lorafx.kernels.steps import GradUp, Layer, Upstream
from lorafx.kernels.triton.dropout import mask
from lorafx.kernels.triton.provider import TritonProvider
from tolerances import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROVIDER = TritonProvider()
SCALES = (0.5, -1.3, 2.0, 0.9)
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
    block_sizes: tuple[int, ...] = ()  # of each weight in NF4, 0 of a dense one; all are dense if there are none
    double_quant: bool = True

    @property
    def id(self) -> str:
        """For the test's name."""
        base = f"-nf4_{'_'.join(map(str, self.block_sizes))}" if self.block_sizes else ""
        return f"{self.m}x{self.k}-r{'_'.join(map(str, self.ranks))}-{str(self.dtype)[6:]}{base}"


@dataclass
class Run:
    """The operands of a case, and what the provider makes of them."""

    case: Case
    x: Tensor
    rights: Sequence[Tensor]
    layers: Sequence[Layer]
    dys: list[Tensor]
    adapters: Adapters
    seed: Tensor
    s: Tensor = field(init=False)
    ys: list[Tensor] = field(init=False)
    ds: Tensor = field(init=False)
    ups: list[GradUp] = field(init=False)
    dx: Tensor = field(init=False)
    drights: list[Tensor] = field(init=False)

    def run(self) -> Run:
        """Forward and backward, as the autograd function does it."""
        layers, adapters = self.layers, self.adapters
        self.s, kept = PROVIDER.down(self.x, self.rights, adapters, self.seed)
        self.ys = PROVIDER.up(self.x, self.s, layers, adapters)
        given = zip(self.dys, self.ys, layers, strict=True)
        upstream = [Upstream(dy, None if la.gain is None else y, la.bias is not None) for dy, y, la in given]
        self.ds, ups = PROVIDER.grad_up(upstream, self.s, layers, adapters)
        self.ups = [up for up in ups if up is not None]
        bases = [up.base for up in self.ups]
        self.dx = PROVIDER.grad_x(bases, self.weights, self.ds, self.rights, adapters, kept)
        self.drights = PROVIDER.grad_right(self.x, self.ds, self.rights, adapters, kept)
        return self

    @property
    def weights(self) -> list[Tensor]:
        """Of all layers."""
        return [layer.weight for layer in self.layers]

    @property
    def lefts(self) -> list[Tensor]:
        """Of all adapters: one a layer."""
        return [left for layer in self.layers for left in layer.lefts]

    @property
    def outputs(self) -> list[Tensor]:
        """Everything that was computed."""
        parts = [t for up in self.ups for t in (*up.dlefts, up.base, up.total, up.dot) if t is not None]
        return [self.s, *self.ys, self.ds, *parts, self.dx, *self.drights]


def make(case: Case) -> Run:
    """Operands of a case, of size 1 in the sums."""
    generator = torch.Generator().manual_seed(sum(case.ranks) + case.m)

    def normal(*shape: int, of: torch.dtype = case.dtype, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(DEVICE, of)

    def weight(i: int, n: int) -> Tensor:
        shape = (case.k, n) if case.transposed else (n, case.k)
        held = normal(*shape, scale=case.k**-0.5)
        block_size = case.block_sizes[i] if case.block_sizes else 0
        if block_size:
            packed = FORMATS["nf4"].quantize(held, block_size=block_size, double_quant=case.double_quant)
            return QuantizedTensor(packed)
        return held.mT if case.transposed else held

    layers = [
        Layer(
            weight(i, n),
            normal(n) if case.bias else None,
            1 + normal(n, of=case.adapters, scale=0.1) if case.gain else None,
            [normal(n, r, of=case.adapters, scale=r**-0.5)],
            slice(i, i + 1),
        )
        for i, (n, r) in enumerate(zip(case.widths, case.ranks, strict=True))
    ]
    return Run(
        case,
        normal(case.m, case.k + 3)[:, : case.k] if case.transposed else normal(case.m, case.k),
        [normal(r, case.k, of=case.adapters, scale=case.k**-0.5) for r in case.ranks],
        layers,
        [normal(case.m, n) for n in case.widths],
        Adapters((1,) * len(case.ranks), case.ranks, case.p, SCALES[: len(case.ranks)]),
        torch.tensor([case.seed], device=DEVICE),
    )


def dense(weight: Tensor) -> Tensor:
    """Its values, in float64."""
    return (weight.dequantize() if isinstance(weight, QuantizedTensor) else weight).double()


def masks(run: Run) -> list[Tensor]:
    """``[M, k]`` for each sibling: 0 where dropped, otherwise what an element is multiplied with."""
    shape = (run.case.m, run.case.k)
    found = []
    for branch, p in enumerate(run.case.p):
        kept = mask(run.seed, branch, p, shape).double() if p else torch.ones(shape, device=DEVICE).double()
        found.append(kept / (1 - quantised(p)))
    return found


def check(actual: Tensor | None, expected: Tensor, dtype: torch.dtype) -> None:
    """Within the table's tolerance of one layer in this dtype."""
    assert actual is not None
    assert_close("layer", actual.to(dtype), expected.to(dtype))
