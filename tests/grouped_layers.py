"""Groups of adapted layers that read one input: random operands, and what they mean in float64."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from lorafx.kernels.base import quantised
from lorafx.kernels.grouped import Arguments, grouped
from lorafx.ops import ADAPTED, LAYERS, STORAGE, updates
from lorafx.variants import VARIANTS

#: The dtypes of each provider that runs here; torch's has all. Triton's is interpreted (tests/test_triton_kernels.py
#: runs the tests of all providers so), where bfloat16 is not what it is on a device.
DTYPES = {
    "torch": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "cpu": (torch.float32, torch.bfloat16),
}
if os.environ.get("TRITON_INTERPRET") == "1":
    DTYPES["triton"] = (torch.float32, torch.float16)


@dataclass(frozen=True)
class Adapter:
    """One adapter of one sibling; ``dtype``: of its tensors, None for the layer's."""

    variant: str = "lora"
    r: int = 3
    scaling: float = 1.5
    p: float = 0.0
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Sibling:
    """One layer: ``trains`` names those of ``weight`` and ``bias`` that require gradients."""

    out: int
    adapters: tuple[Adapter, ...] = (Adapter(),)
    bias: bool = True
    kind: str = "linear"
    trains: frozenset[str] = frozenset()
    training: bool = True


@dataclass(frozen=True)
class Group:
    """What reads an input ``[*batch, k]``."""

    k: int
    siblings: tuple[Sibling, ...]
    batch: tuple[int, ...] = (7,)
    x_trains: bool = True

    def make(self, dtype: torch.dtype, seed: int = 1, *, fresh: bool = False) -> Operands:
        """Random operands; ``fresh``: the adapters at their first values, which change nothing."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64)

        made = Operands(self, draw(*self.batch, self.k).to(dtype).requires_grad_(self.x_trains))
        for sibling in self.siblings:
            storage = STORAGE[sibling.kind]
            matrix = draw(sibling.out, self.k) / math.sqrt(self.k)
            weight = storage.stored(matrix, matrix.t().shape if sibling.kind == "addmm" else matrix.shape).to(dtype)
            made.weights.append(weight.requires_grad_("weight" in sibling.trains))
            bias = draw(sibling.out).to(dtype).requires_grad_("bias" in sibling.trains) if sibling.bias else None
            made.biases.append(bias)
            for adapter in sibling.adapters:
                own = _tensors(adapter, storage.matrix(weight.detach()), adapter.dtype or dtype, draw, fresh=fresh)
                made.adapters.append(own)
        return made


def _tensors(
    adapter: Adapter, matrix: Tensor, dtype: torch.dtype, draw: Callable[..., Tensor], *, fresh: bool
) -> dict[str, Tensor]:
    variant, (n, k), r = VARIANTS[adapter.variant], matrix.shape, adapter.r
    shapes = {**variant.shapes(n, k, r)}
    found = {name: (draw(*shape) / math.sqrt(r)).to(dtype) for name, shape in shapes.items()}
    if fresh:
        zero = {"lora": "lora_B", "dora": "lora_B", "lora_bias": "lora_B", "vera": "vera_lambda_b", "adalora": "lora_E"}
        found[zero[adapter.variant]].zero_()
        if "lora_B_bias" in found:
            found["lora_B_bias"].zero_()
    if variant.scales_rows:
        wide = torch.promote_types(dtype, torch.float32)
        norm = (matrix.double() + adapter.scaling * found["lora_B"].double() @ found["lora_A"].double()).norm(dim=1)
        off = torch.ones(n, dtype=torch.float64) if fresh else 1 + 0.2 * draw(n)
        found["lora_magnitude_vector"] = (norm * off).to(wide)
        if fresh:
            first = next(updates(matrix, iter(found.values()), [adapter.variant], [adapter.scaling])).gain
            assert first is not None
            found["lora_magnitude_vector"] /= first
    found = {name: tensor.requires_grad_() for name, tensor in found.items()}
    return {**found, **variant.share([(n + 1, k + 2)], r, {"projection_prng_key": 0}, dtype)}


@dataclass
class Operands:
    """The tensors of a group; ``adapters`` has those of all siblings, one after the other."""

    group: Group
    x: Tensor
    weights: list[Tensor] = field(default_factory=list)
    biases: list[Tensor | None] = field(default_factory=list)
    adapters: list[dict[str, Tensor]] = field(default_factory=list)

    @property
    def tensors(self) -> list[Tensor]:
        return [t for own in self.adapters for t in own.values()]

    @property
    def trained(self) -> dict[str, Tensor]:
        """All that requires gradients, by name."""
        named = {"x": self.x}
        named |= {f"weight {i}": w for i, w in enumerate(self.weights)}
        named |= {f"bias {i}": b for i, b in enumerate(self.biases) if b is not None}
        named |= {f"{n} {i}": t for i, own in enumerate(self.adapters) for n, t in own.items()}
        return {n: t for n, t in named.items() if t.requires_grad}

    def of(self, index: int) -> tuple[Sibling, list[dict[str, Tensor]]]:
        """A sibling and its adapters' tensors."""
        counts = [len(s.adapters) for s in self.group.siblings]
        start = sum(counts[:index])
        return self.group.siblings[index], self.adapters[start : start + counts[index]]

    def double(self) -> Operands:
        """The same values in float64, with leaves of their own."""

        def wide(tensor: Tensor) -> Tensor:
            return tensor.detach().double().requires_grad_(tensor.requires_grad)

        return Operands(
            self.group,
            wide(self.x),
            [wide(w) for w in self.weights],
            [None if b is None else wide(b) for b in self.biases],
            [{n: wide(t) for n, t in own.items()} for own in self.adapters],
        )

    def layers(self) -> list[Tensor]:
        """The outputs of the layers alone."""
        outputs = []
        for sibling, weight, bias in zip(self.group.siblings, self.weights, self.biases, strict=True):
            outputs.append(LAYERS[sibling.kind].target(*_own(sibling.kind, self.x, weight, bias)))
        return outputs

    def by(self, provider: str) -> list[Tensor]:
        """The outputs as the operator of lowering gives them."""
        siblings = self.group.siblings
        adapters = [a for s in siblings for a in s.adapters]
        given = Arguments(
            x=self.x,
            kinds=[s.kind for s in siblings],
            weights=self.weights,
            biases=self.biases,
            counts=[len(s.adapters) for s in siblings],
            training=[s.training for s in siblings],
            tensors=self.tensors,
            variants=[a.variant for a in adapters],
            scaling=[a.scaling for a in adapters],
            dropout=[a.p for a in adapters],
            provider=provider,
            sources=[],
            recipe="",
        )
        outputs: list[Tensor] = grouped(*given)
        return outputs

    def by_twins(self) -> list[Tensor]:
        """The outputs of the reference's operators, one after the other."""
        outputs = []
        for index, sibling in enumerate(self.group.siblings):
            own = _own(sibling.kind, self.x, self.weights[index], self.biases[index])
            if not sibling.adapters:
                outputs.append(LAYERS[sibling.kind].target(*own))
                continue
            tensors = [t for mine in self.of(index)[1] for t in mine.values()]
            lists = zip(*((a.variant, a.scaling, a.p) for a in sibling.adapters), strict=True)
            outputs.append(ADAPTED[sibling.kind](*own, tensors, *map(list, lists), sibling.training, None))
        return outputs

    def by_formula(self, factors: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The outputs by the formula of :mod:`lorafx.ops`, the input of each adapter multiplied by its ``factors``."""
        given = iter(factors or [torch.ones_like(self.x)] * len(self.adapters))
        outputs = []
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            sibling, own = self.of(index)
            matrix = STORAGE[sibling.kind].matrix(weight)
            plain = F.linear(self.x, matrix)
            y = plain if bias is None else plain + bias
            for adapter, tensors in zip(sibling.adapters, own, strict=True):
                (update,) = updates(matrix, iter(tensors.values()), [adapter.variant], [adapter.scaling])
                branch = F.linear(F.linear(self.x * next(given), update.right), update.left)
                if update.gain is not None:
                    branch = (update.gain - 1) * plain + update.gain * branch
                y = y + branch if update.shift is None else y + branch + update.shift
            outputs.append(y)
        return outputs


def _own(kind: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, ...]:
    return (bias, x, weight) if kind == "addmm" else (x, weight, bias)


def gradients(operands: Operands, outputs: Sequence[Tensor], dys: Sequence[Tensor | None]) -> dict[str, Tensor | None]:
    """Of ``sum_i <outputs_i, dys_i>`` by all that trains; None: that output is not used."""
    pairs = [(y, dy.to(y.dtype)) for y, dy in zip(outputs, dys, strict=True) if dy is not None]
    found = torch.autograd.grad(
        [y for y, _ in pairs], list(operands.trained.values()), [dy for _, dy in pairs], allow_unused=True
    )
    return dict(zip(operands.trained, found, strict=True))


def factors(provider: str, group: Group) -> list[Tensor]:
    """What the dropout of each adapter multiplies an input with, from the random state that now is: float64.

    Taken from the operator itself, by operands for which its outputs are ``D(1)``.
    """
    ones = torch.ones(*group.batch, group.k)
    probes = [
        replace(
            s, out=group.k, bias=False, kind="linear", adapters=(replace(a, variant="lora", r=group.k, scaling=1.0),)
        )
        for s in group.siblings
        for a in s.adapters
    ]
    probe = Operands(replace(group, siblings=tuple(probes)), ones)
    for _ in probes:
        probe.weights.append(torch.zeros(group.k, group.k))
        probe.biases.append(None)
        probe.adapters.append({"lora_A": torch.eye(group.k), "lora_B": torch.eye(group.k)})
    chances = [a.p if s.training else 0.0 for s in group.siblings for a in s.adapters]
    return [(y != 0).double() / (1 - quantised(p)) for y, p in zip(probe.by(provider), chances, strict=True)]


def dys_of(outputs: Sequence[Tensor], seed: int = 5) -> Iterator[Tensor]:
    """A random gradient for each output."""
    generator = torch.Generator().manual_seed(seed)
    for y in outputs:
        yield torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
