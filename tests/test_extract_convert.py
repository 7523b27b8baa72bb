"""Adapters from full fine-tunings, and from adapters of other kinds."""

from __future__ import annotations

import copy
import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kinds
import lorafx
from lorafx import AdapterError, LoraSpec, MatchError, SpecError, convert, extract_adapter
from lorafx.api import captured
from lorafx.graph import CapturedModule
from lorafx.ir import adapters
from tolerances import assert_close

pytestmark = pytest.mark.xdist_group("extract")

# Extracting

ALL = {"target_modules": ["embed", "conv", "attn", "up", "down", "head"], "target_parameters": ["stack"]}


def tuned_copy(base: nn.Module, *names: str, rank: int | None = None, scale: float = 0.1) -> nn.Module:
    """A copy in which these tensors (all, if none is named) were trained; at a rank, if one is given."""
    tuned = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if names and name not in names:
                continue
            change = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale
            if rank is not None and parameter.dim() > 1:
                left = torch.randn(len(parameter), rank, generator=generator, dtype=torch.float64)
                change = (left @ change.flatten(1)[:rank]).reshape(parameter.shape)
            parameter += change.to(parameter)
    return tuned


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down, self.head = (
            nn.Embedding(11, 8),
            nn.Linear(8, 10),
            nn.Linear(10, 8),
            nn.Linear(8, 4),
        )

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.down(torch.tanh(self.up(self.embed(ids)))))
        return logits


IDS = (torch.arange(12).reshape(3, 4) % 11,)


def small(dtype: torch.dtype = torch.float64) -> Small:
    torch.manual_seed(0)
    return Small().to(dtype).eval()


def test_full_rank_is_the_fine_tuned_model() -> None:
    base = kinds.build()
    tuned = tuned_copy(base, *(n for n, _ in base.named_parameters() if not n.endswith("bias")))
    before = copy.deepcopy(base.state_dict())
    gm, report = extract_adapter(base, tuned, LoraSpec(**ALL), kinds.inputs(), rank=99)
    assert_close("model", gm(*kinds.inputs()), tuned(*kinds.inputs()))
    assert report.error < 1e-12
    assert report.left_out == ()
    assert all(torch.equal(before[n], t) for n, t in base.state_dict().items())
    assert {n for n, p in gm.named_parameters() if p.requires_grad} == set(adapters(gm)["default"].parameter_names)


def test_biases_go_along_when_asked_for() -> None:
    base, tuned = kinds.build(), tuned_copy(kinds.build())
    spec = LoraSpec(**ALL, bias="all")
    gm, report = extract_adapter(base, tuned, spec, kinds.inputs(), energy=1.0)
    assert_close("model", gm(*kinds.inputs()), tuned(*kinds.inputs()))
    assert report.left_out == ()
    layers = LoraSpec(variant="lora_bias", target_modules=["conv", "up", "down", "head"])
    gm, report = extract_adapter(base, tuned, layers, kinds.inputs(), energy=1.0)
    merged = lorafx.merge(gm).state_dict()
    assert_close("model", merged["up.bias"], tuned.up.bias.detach())
    left = ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"]
    assert {n for n, _ in report.left_out} == {"embed.weight", "experts.stack", *(f"attn.{n}" for n in left)}


def test_a_rank_is_the_nearest_of_it_and_what_is_left_is_told() -> None:
    base = small()
    tuned = tuned_copy(base, "up.weight", "down.weight", "down.bias", "embed.weight")
    gm, report = extract_adapter(base, tuned, LoraSpec(target_modules=["up", "down", "head"]), IDS, rank=3)
    assert [s.site for s in report.sites] == ["up", "down"]
    for said in report.sites:
        change = tuned.get_parameter(f"{said.site}.weight") - base.get_parameter(f"{said.site}.weight")
        values = torch.linalg.svdvals(change.detach())
        assert said.rank == 3
        assert_close("layer", number(said.norm), values.norm())
        assert_close("layer", number(1 + said.error), 1 + values[3:].norm() / values.norm())
        a, b = (gm.get_parameter(f"{said.site}.{f}.default").detach() for f in ("lora_A", "lora_B"))
        assert_close("layer", torch.linalg.svdvals(a), torch.linalg.svdvals(b))  # balanced
    told = dict(report.left_out)
    assert told.keys() == {"head", "down.bias", "embed.weight"}
    assert told["head"] == "unchanged"
    assert "of its norm" in told["embed.weight"]
    assert "not in it: down.bias" in str(report)


def test_energy_gives_each_site_its_own_rank() -> None:
    base = small()
    tuned = tuned_copy(tuned_copy(base, "up.weight", rank=1), "down.weight", rank=4)
    gm, report = extract_adapter(base, tuned, None, IDS, energy=0.999999)
    assert {s.site: s.rank for s in report.sites} == {"up": 1, "down": 4}
    (spec,) = adapters(gm)["default"].specs
    assert (spec.rank_for("up"), spec.rank_for("down")) == (1, 4)
    assert (spec.scaling_for("up"), spec.scaling_for("down")) == (1.0, 1.0)
    assert report.error <= math.sqrt(1 - 0.999999)


def test_what_trains_whole_is_taken_whole() -> None:
    base = small()
    tuned = tuned_copy(base, "up.weight", "head.weight", "head.bias", "embed.weight")
    spec = LoraSpec(r=8, target_modules=["up"], modules_to_save=["head"], trainable_token_indices={"embed": [2, 4]})
    gm, report = extract_adapter(base, tuned, spec, IDS)
    merged = lorafx.merge(gm).state_dict()
    assert torch.equal(merged["head.weight"], tuned.head.weight)
    assert torch.equal(merged["embed.weight"][[2, 4]], tuned.embed.weight[[2, 4]])
    assert torch.equal(merged["embed.weight"][[0, 1, 3]], base.embed.weight[[0, 1, 3]])
    assert [n for n, _ in report.left_out] == ["embed.weight"], "the rows that nobody took are told"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    base = small(dtype)
    tuned = tuned_copy(base, "up.weight", "embed.weight")
    spec = LoraSpec(target_modules=["up", "embed"])
    gm, report = extract_adapter(base, tuned, spec, IDS, rank=99)
    assert {p.dtype for p in gm.parameters() if p.requires_grad} == {torch.float32}
    merged = lorafx.merge(gm).state_dict()
    assert report.error < 1e-6
    for name in ("up.weight", "embed.weight"):
        assert merged[name].dtype == dtype
        assert_close("layer", merged[name], tuned.get_parameter(name).detach())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mid, self.out = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.out(self.mid(self.embed(ids)))
        return logits


def test_tied_weights() -> None:
    ids = torch.arange(6).reshape(2, 3)
    base = Tied().double()
    tuned = tuned_copy(base)
    everything = LoraSpec(r=9, target_modules=["embed", "mid", "out"], bias="all")
    with pytest.raises(MatchError, match="also uses elsewhere"):
        extract_adapter(base, tuned, everything, (ids,))
    with_ties = LoraSpec(r=9, target_modules=["embed", "mid"], bias="all", tied="tie")
    gm, report = extract_adapter(base, tuned, with_ties, (ids,))
    assert_close("model", gm(ids), tuned(ids))
    assert report.left_out == ()

    apart = copy.deepcopy(tuned)
    apart.out.weight = nn.Parameter(tuned.out.weight.detach() + 0.1)
    with pytest.raises(AdapterError, match=r"one tensor in the base model and differ in the fine-tuned one.*untie"):
        extract_adapter(base, apart, with_ties, (ids,))
    untied = LoraSpec(r=9, target_modules=["embed", "mid", "out"], bias="all", tied="untie")
    gm, report = extract_adapter(base, apart, untied, (ids,))
    assert_close("model", gm(ids), apart(ids))
    assert report.left_out == ()


def refused(base: nn.Module, tuned: nn.Module, *arguments: Any, **options: Any) -> None:
    extract_adapter(base, tuned, *arguments, **{"example_inputs": IDS, **options})


def test_extracting_is_refused() -> None:
    base = small()
    tuned = tuned_copy(base)
    with pytest.raises(SpecError, match=r"rank=None is not allowed: give a rank, the energy to hold, or a spec"):
        refused(base, tuned)
    with pytest.raises(SpecError, match=r"energy=1\.5 is not allowed"):
        refused(base, tuned, energy=1.5)
    with pytest.raises(SpecError, match=r"variant='dora' is not allowed"):
        refused(base, tuned, LoraSpec(variant="dora"))
    with pytest.raises(AdapterError, match=r"equal weights at all [23] sites, so there is nothing to extract"):
        refused(base, copy.deepcopy(base), rank=2)
    other = copy.deepcopy(tuned)
    other.up = nn.Linear(8, 12)
    other.more = nn.Linear(2, 2)
    with pytest.raises(AdapterError, match=r"not of one architecture: 'more\.weight' is only in the fine-tuned model"):
        refused(base, other, rank=2)
    del other.more
    with pytest.raises(
        AdapterError, match=r"'up\.weight' is \(10, 8\) in the base model and \(12, 8\) in the fine-tuned"
    ):
        refused(base, other, rank=2)
    broken = copy.deepcopy(tuned)
    with torch.no_grad():
        broken.up.weight[0, 0] = float("inf")
    with pytest.raises(AdapterError, match=r"'up\.weight' of the fine-tuned model holds NaN or Inf"):
        refused(base, broken, rank=2)
    with torch.device("meta"):
        empty = Small()
    with pytest.raises(AdapterError, match=r"'up\.weight' of the fine-tuned model has no data"):
        refused(base, empty, rank=2)


# Converting


@cache
def graph() -> CapturedModule:
    """The graph without adapters. Shared: copied before it is changed."""
    return captured(kinds.build(), kinds.inputs(), None)


def adapted(spec: LoraSpec) -> CapturedModule:
    gm = copy.deepcopy(graph())
    lorafx.add_adapter(gm, spec, "default", seed=0)
    return gm


def through(gm: CapturedModule, name: str) -> Tensor:
    lorafx.set_adapter(gm, name)
    result: Tensor = gm(*kinds.inputs()).detach()
    return result


EXACT: dict[str, LoraSpec] = {
    "rslora": LoraSpec(r=3, alpha=5, rslora=True, **ALL),
    "bias": LoraSpec(r=2, variant="lora_bias", target_modules=["conv", "up"]),
    "vera": LoraSpec(r=5, variant="vera", target_modules=["embed", "conv", "up", "down"]),
    "adalora": LoraSpec(r=3, variant="adalora", **ALL),
    "tokens": LoraSpec(r=3, target_modules=["up"], trainable_token_indices={"embed": [0, 3]}),
    "head": LoraSpec(r=2, target_modules=["up"], modules_to_save=["head"], bias="all"),
}


@pytest.mark.parametrize("key", EXACT)
def test_what_has_factors_is_converted_exactly(key: str) -> None:
    gm = kinds.fill(adapted(EXACT[key]))
    report = convert(gm, "default", "plain")
    plain, source = adapters(gm)["plain"], adapters(gm)["default"]
    assert torch.equal(through(gm, "plain"), through(gm, "default"))
    assert report.error < 1e-14
    assert {s.variant for s in plain.sites} <= {"lora", "lora_bias", "tokens"}
    assert {s.scaling for s in plain.sites} == {1.0}
    assert [s.r for s in plain.sites] == [s.r for s in source.sites]
    assert plain.trained == source.trained
    before = through(gm, "plain")
    with torch.no_grad():
        for name in source.parameter_names:
            gm.state_dict()[name].zero_()
    assert torch.equal(through(gm, "plain"), before), "it shares no memory with what it was made of"


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4"])
def test_a_start_that_took_from_the_weight_is_twice_the_rank_on_the_original(init: str) -> None:
    gm = adapted(LoraSpec(r=2, alpha=5, init=init, **ALL))
    with torch.no_grad():
        for site in adapters(gm)["default"].sites:
            for parameter in site.parameters(gm).values():
                parameter += 0.1 * torch.randn_like(parameter)
    report = convert(gm, "default", "plain")
    assert {s.rank for s in report.sites} == {4}
    assert adapters(gm)["plain"].residual == ()
    assert_close("model", through(gm, "plain"), through(gm, "default"))


def test_dora_is_factored_and_its_error_stated() -> None:
    gm = kinds.fill(adapted(LoraSpec(r=2, variant="dora", **ALL)))
    wanted = kinds.deltas(gm, "default")
    report = convert(gm, "default", "plain")
    assert {s.rank for s in report.sites} == {2}
    for site in adapters(gm)["plain"].sites:
        if site.rows is None and site.weight != "attn.in_proj_weight":
            said = next(s for s in report.sites if s.site == site.name)
            matrix = site.matrix(wanted[site.weight])
            left = torch.linalg.svdvals(matrix)[..., 2:].norm() / matrix.norm()
            assert_close("layer", number(1 + said.error), 1 + left)
    assert report.error > 0.1
    assert convert(gm, "default", "full", rank=99).error < 1e-12
    assert_close("model", through(gm, "full"), through(gm, "default"))
    assert convert(gm, "default", "most", energy=0.95).error <= math.sqrt(0.05)


def test_dora_that_starts_by_pissa_counts_from_the_original() -> None:
    gm = adapted(LoraSpec(r=2, variant="dora", init="pissa", target_modules=["up", "conv"]))
    with torch.no_grad():
        for site in adapters(gm)["default"].sites:
            for parameter in site.parameters(gm).values():
                parameter *= 1 + 0.2 * torch.rand_like(parameter)
    convert(gm, "default", "plain", rank=99)
    assert_close("model", through(gm, "plain"), through(gm, "default"))


def test_a_rank_that_is_asked_for_is_the_nearest(tmp_path: Any) -> None:
    gm = kinds.fill(adapted(EXACT["vera"]))
    report = convert(gm, "default", "small", rank=2)
    assert {s.rank for s in report.sites} == {2}
    assert report.error > 0.01
    lorafx.save_adapter(gm, tmp_path, "small")
    again = copy.deepcopy(graph())
    lorafx.add_adapter(again, tmp_path, "small")
    lorafx.load_adapter(again, tmp_path, "small")
    assert_close("layer", through(again, "small"), through(gm, "small"))


def test_sites_without_ranks_are_left_out() -> None:
    spec = LoraSpec(r=3, variant="adalora", target_modules=["up", "down"], rank_pattern={"down": 0})
    gm = kinds.fill(adapted(spec))
    report = convert(gm, "default", "plain")
    assert [s.site for s in report.sites] == ["up"]
    assert report.left_out == (("down", "no change"),)
    assert torch.equal(through(gm, "plain"), through(gm, "default"))


def test_converting_is_refused_before_anything_is_changed() -> None:
    gm = kinds.fill(adapted(EXACT["rslora"]))
    for error, message, call in (
        (AdapterError, "there is no adapter 'defalt'.*did you mean 'default'", ("defalt", "plain", {})),
        (AdapterError, "there is an adapter 'default' already", ("default", "default", {})),
        (SpecError, "variant='dora' is not allowed: expected one of 'lora'", ("default", "plain", {"variant": "dora"})),
        (SpecError, "rank=0 is not allowed", ("default", "plain", {"rank": 0})),
    ):
        with pytest.raises(error, match=message):
            convert(gm, call[0], call[1], **call[2])
    with torch.no_grad():
        gm.get_parameter("up.lora_B.default")[0, 0] = float("nan")
    with pytest.raises(AdapterError, match=r"site 'up': lora_B holds NaN or Inf"):
        convert(gm, "default", "plain")
    assert list(adapters(gm)) == ["default"]
