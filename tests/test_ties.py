"""Weights with several uses: refused, kept apart by the fold (untie), or adapted in all uses alike (tie)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lorafx
from conftest import Zoo, randomize
from lorafx import LoraSpec, MatchError
from lorafx.passes.match import match
from tolerances import assert_close
from zoo import FAMILIES

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Tied(nn.Module):
    """Two modules with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.two(self.one(x).tanh()).tanh())
        return out


class ReadElsewhere(nn.Module):
    """A weight that the model also reads without its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        penalty = torch.cat([self.one.weight, self.one.weight.t()]).square().mean()
        out: Tensor = self.head(self.one(x).tanh()) + penalty
        return out


class PartRead(ReadElsewhere):
    """Half of a fused weight, sliced, as models that split q from kv do."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.one(x).tanh() + F.linear(x, self.one.weight[:3]).repeat(1, 2))
        return out


class Viewed(ReadElsewhere):
    """Another parameter over the same storage."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(self.one.weight.detach()[1:3])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.one(x).tanh()) + self.rows.sum()
        return out


class EmbeddingTied(nn.Module):
    """An output projection by the embedding's own weight, called functionally."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.one = nn.Embedding(9, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x[:, 0].abs().long().clamp(max=8))
        return F.linear(h + self.one(h).tanh(), self.embed.weight)


class CastRead(ReadElsewhere):
    """A float64 weight, cast for the call and read uncast elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.one.weight = nn.Parameter(self.one.weight.detach().double())

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.one.weight.to(x.dtype), self.one.bias)
        out: Tensor = self.head(h.tanh()) + self.one.weight.sum().to(x.dtype)
        return out


#: The model, the site's name, its weight's, the name that the other use has it by, and a description of that use.
ELSEWHERE: list[tuple[type[nn.Module], str, str, str, str]] = [
    (Tied, "one", "one.weight", "two.weight", r"aten.linear.default in 'two' \(as 'two.weight'\)"),
    (
        ReadElsewhere,
        "one",
        "one.weight",
        "one.weight",
        r"aten.\w+.default in 'the model's own forward' \(as 'one.weight'\)",
    ),
    (PartRead, "one", "one.weight", "one.weight", r"aten.slice.Tensor in 'the model's own forward'"),
    (Viewed, "one", "one.weight", "rows", r"\(as 'rows'\)"),
    (
        EmbeddingTied,
        "embed.weight",
        "embed.weight",
        "embed.weight",
        r"aten.embedding.default in 'embed' \(as 'embed.weight'\)",
    ),
    (
        CastRead,
        "one",
        "one.weight",
        "one.weight",
        r"aten.sum.* in 'the model's own forward' \(as 'one.weight'\)",
    ),
]
elsewhere = pytest.mark.parametrize(
    ("build", "site", "weight", "other", "place"), ELSEWHERE, ids=[case[0].__name__ for case in ELSEWHERE]
)


@elsewhere
def test_a_weight_used_elsewhere_is_refused_with_both_places(
    build: type[nn.Module], site: str, weight: str, other: str, place: str
) -> None:
    with pytest.raises(
        MatchError, match=rf"site '{site}' multiplies by '{weight}', which .*elsewhere: .*{place}"
    ) as caught:
        lorafx.apply(build(), LoraSpec(target_modules=[site]), (X,))
    assert f"exclude_modules=['{site}']" in str(caught.value)
    assert 'tied="untie"' in str(caught.value)
    assert 'tied="tie"' in str(caught.value)


@elsewhere
def test_untied_the_fold_leaves_the_other_use_alone(
    build: type[nn.Module], site: str, weight: str, other: str, place: str
) -> None:
    model = build()
    gm = lorafx.apply(model, LoraSpec(r=2, target_modules=[site], tied="untie"), (X,))
    assert torch.equal(gm(X), model(X))
    (found,) = lorafx.sites(gm)
    assert found.apart
    randomize(gm)
    merged = lorafx.merge(gm)
    assert_close("model", merged(X), gm(X))
    assert torch.equal(merged.get_parameter(other), model.get_parameter(other))
    assert torch.equal(lorafx.unadapted(gm)(X), model(X))
    with pytest.raises(
        lorafx.MergeError, match=rf"site '{site}': its weight '{weight}' has another use and was kept apart"
    ):
        lorafx.merged_state_dict(gm)


def test_both_of_two_tied_layers_untied() -> None:
    model = Tied()
    gm = lorafx.apply(model, LoraSpec(r=2, tied="untie"), (X,))
    assert [s.name for s in lorafx.sites(gm)] == ["one", "two"]
    randomize(gm)
    assert_close("model", lorafx.merge(gm)(X), gm(X))


def test_a_tied_weight_that_the_graph_reads_once_is_folded_under_each_name() -> None:
    """Nothing else uses it, so it may be adapted; the state dict then has W' under both names."""

    class OneCalled(Tied):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.one(x).tanh())
            return out

    model = OneCalled()
    gm = lorafx.apply(model, LoraSpec(r=2), (X,))
    randomize(gm)
    values, adapted_outputs = lorafx.merged_state_dict(gm), gm(X)
    assert torch.equal(values["one.weight"], values["two.weight"])
    model.load_state_dict(values)
    assert_close("model", model(X), adapted_outputs)


def test_a_tied_lm_head_is_refused_or_untied(zoo: Zoo) -> None:
    family = FAMILIES["gpt2"]
    with pytest.raises(
        MatchError,
        match=r"site 'lm_head' multiplies by 'lm_head.weight', .*aten.embedding.default in 'transformer.wte'",
    ):
        match(zoo.capture(family).gm, (LoraSpec(target_modules=["lm_head"]),))
    gm = zoo.adapted(family, LoraSpec(r=2, target_modules=["lm_head"], tied="untie")).eval()
    randomize(gm)
    merged = lorafx.merge(gm)
    inputs = family.inputs()
    assert_close("model", merged(**inputs).logits, gm(**inputs).logits)
    assert torch.equal(merged.transformer.wte.weight, gm.transformer.wte.weight)
