"""LoftQ: what is stored and what starts, by the algorithm's own lines; nearer than the base alone; files; refusals."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils.loftq_utils import _low_rank_decomposition
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorafx
from conftest import randomize
from kinds import build as build_kinds
from kinds import inputs as kinds_inputs
from lorafx import AdapterError, LoraSpec, MatchError, QuantizationError, SpecError
from lorafx.api import captured
from lorafx.bases import FORMATS
from lorafx.bases.tensor import QuantizedTensor
from lorafx.graph import CapturedModule
from lorafx.ir import Site
from lorafx.passes.insert import Insert
from lorafx.passes.loftq import loftq
from lorafx.passes.match import match
from tolerances import assert_close, error

X = torch.linspace(-1, 1, 7 * 160).view(7, 160).sin()
BASES = {"nf4": {"double_quant": True}, "nf4, plain scales": {"double_quant": False}, "int8": {}}


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(160, 96), nn.Tanh(), nn.Linear(96, 80)).eval()


def spec(base: str = "nf4", **fields: Any) -> LoraSpec:
    settings = {"base": base.partition(",")[0], **BASES.get(base, {})}
    return LoraSpec(**{"r": 4, "init": "loftq", "target_modules": ["0", "2"], **settings, **fields})


def adapted(base: str = "nf4", **fields: Any) -> CapturedModule:
    return lorafx.apply(model(), spec(base, **fields), X, seed=0).eval()


def parts(gm: CapturedModule, site: Site) -> tuple[Tensor, Tensor, Tensor]:
    """What the base has kept ``[out, in]``, and A and B."""
    weight, tensors = gm.get_parameter(site.weight), site.parameters(gm)
    assert isinstance(weight, QuantizedTensor)
    return site.matrix(weight.dequantize()), tensors["lora_A"].detach(), tensors["lora_B"].detach()


def off(found: Tensor, exact: Tensor) -> float:
    return error(found, exact, by_norm=True)


def kept(form: str, weight: Tensor, **settings: Any) -> Tensor:
    return FORMATS[form].dequantize(FORMATS[form].quantize(weight, **settings))


@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
@pytest.mark.parametrize("base", BASES)
def test_base_and_factors_are_the_algorithms(base: str, rslora: bool) -> None:
    """Algorithm 1 by induction over rounds; the nearest of a rank is the sum with small singular values cut off."""
    low = dict.fromkeys(("0.weight", "2.weight"), torch.zeros(()).double())
    for init in ("loftq", "loftq_2", "loftq_3"):
        gm = adapted(base, init=init, rslora=rslora, alpha=3)
        for site in lorafx.sites(gm):
            weight = model().get_parameter(site.weight).detach()
            quantized, a, b = parts(gm, site)
            expected = kept(base.partition(",")[0], (weight - low[site.weight]).float(), **BASES[base])
            assert torch.equal(quantized, expected)
            low[site.weight] = site.scaling * (b.double() @ a.double())
            u, s, vh = torch.linalg.svd((weight - quantized).double(), full_matrices=False)
            nearest = u @ torch.diag(torch.where(torch.arange(len(s)) < site.r, s, 0.0)) @ vh
            assert_close("peft", low[site.weight].float(), nearest.float())
            assert_close("peft", (a @ a.mT).diagonal(), (b.mT @ b).diagonal())  # the value's root on both sides


def pefts_loop(weight: Tensor, r: int, rounds: int) -> tuple[Tensor, Tensor]:
    """What PEFT's ``loftq_init`` alternates (``scaling`` 1), with our nf4 in the place of a GPU's."""
    left = weight
    for _ in range(rounds):
        quantized = kept("nf4", left, double_quant=False)
        found = _low_rank_decomposition(weight - quantized, reduced_rank=r)
        left = weight - found["L"] @ found["R"]
    return quantized, found["L"] @ found["R"]


def test_pefts_decomposition_gives_the_same() -> None:
    for site in lorafx.sites(one := adapted("nf4, plain scales", alpha=4)):
        quantized, low = pefts_loop(model().get_parameter(site.weight).detach(), site.r, 1)
        found, a, b = parts(one, site)
        assert torch.equal(found, quantized)
        assert_close("peft", b @ a, low)
    for site in lorafx.sites(five := adapted("nf4, plain scales", alpha=4, init="loftq_5")):
        weight = model().get_parameter(site.weight).detach()
        found, a, b = parts(five, site)
        # Values halfway between two codes go either way by the last bit of L R; what is reached does not.
        assert off(found + b @ a, weight) == pytest.approx(off(sum(pefts_loop(weight, site.r, 5)), weight), rel=0.01)


@pytest.mark.parametrize("init", ["loftq", "loftq_5"])
@pytest.mark.parametrize("base", BASES)
def test_it_starts_nearer_than_the_base_alone_and_the_nearer_the_higher_the_rank(base: str, init: str) -> None:
    """In each weight; and, for one round, whose base is the same at every rank, in what the model says."""
    dense, x = model(), torch.randn(256, 160, generator=torch.Generator().manual_seed(0))

    def errors(gm: CapturedModule) -> list[float]:
        found = []
        for site in lorafx.sites(gm):
            quantized, a, b = parts(gm, site)
            found.append(off(quantized + site.scaling * b @ a, dense.get_parameter(site.weight).detach()))
        return [*found, off(gm(x), dense(x))]

    alone = errors(adapted(base, init="kaiming"))
    started = [errors(adapted(base, r=r, init=init)) for r in (8, 16, 64)]
    for values in list(zip(alone, *started, strict=True))[: 3 if init == "loftq" else 2]:
        assert values == tuple(sorted(values, reverse=True))
        assert values[-1] < 0.7 * values[0]


@pytest.mark.parametrize("variant", ["lora", "lora_bias", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_variant_trains_and_merges_on_it(variant: str, dtype: torch.dtype) -> None:
    x = X.to(dtype)
    gm = lorafx.apply(model().to(dtype), spec(variant=variant), x, seed=0)
    assert gm.get_parameter("0.weight").dtype == dtype
    assert off(gm(x).float(), model()(X)) < 0.95 * off(lorafx.unadapted(gm)(x).float(), model()(X))
    gm(x).float().square().sum().backward()
    grads = {n: p.grad for n, p in gm.named_parameters() if p.requires_grad}
    assert grads
    assert all(g is not None and bool(g.any()) for g in grads.values())
    assert_close("layer", lorafx.merge(gm)(x), gm(x))


def started(bare: CapturedModule, chosen: LoraSpec) -> CapturedModule:
    gm = copy.deepcopy(bare)
    choices = match(gm, (chosen,))
    return Insert(choices, (chosen,), factors=loftq(gm, choices))(gm).gm


def test_slices_of_one_weight_and_experts() -> None:
    """All slices are taken off before the whole is stored again; a stack is taken one by one."""
    bare = captured(build_kinds(torch.float32), kinds_inputs(torch.float32), None)
    targets = {"target_modules": ["attn.q", "attn.v"], "target_parameters": ["experts.stack"]}
    one, two = (started(bare, LoraSpec(r=2, base="nf4", init=init, **targets)) for init in ("loftq", "loftq_2"))
    by_weight: dict[str, list[Site]] = {}
    for site in lorafx.sites(one):
        by_weight.setdefault(site.weight, []).append(site)
    assert sorted(map(len, by_weight.values())) == [1, 2]
    for name, members in by_weight.items():
        exact = bare.get_parameter(name).detach()
        assert torch.equal(one.get_parameter(name).dequantize(), kept("nf4", exact))
        left = exact.double()
        for site in members:
            quantized, a, b = parts(one, site)
            assert off(quantized + site.scaling * b @ a, site.matrix(exact)) < 0.97 * off(quantized, site.matrix(exact))
            rows = slice(None) if site.rows is None else list(site.rows)
            left[rows] -= site.scaling * (b.double() @ a.double())
        assert torch.equal(two.get_parameter(name).dequantize(), kept("nf4", left.float()))


def test_a_weight_stored_transposed() -> None:
    dense = nn.Sequential(Conv1D(96, 160))
    gm = lorafx.apply(dense, spec(target_modules=["0"]), X)
    (site,) = lorafx.sites(gm)
    exact = dense[0].weight.detach().mT
    quantized, a, b = parts(gm, site)
    assert torch.equal(quantized, kept("nf4", exact))
    assert off(quantized + site.scaling * b @ a, exact) < 0.97 * off(quantized, exact)


def test_the_users_model_is_left_alone() -> None:
    dense = model()
    before = {n: (p.data_ptr(), p._version) for n, p in dense.named_parameters()}
    lorafx.apply(dense, spec(init="loftq_2"), X)
    assert {n: (p.data_ptr(), p._version) for n, p in dense.named_parameters()} == before


# Files


@pytest.mark.parametrize("init", ["loftq", "loftq_3"])
@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_a_saved_adapter_comes_back_on_the_dense_model(base: str, init: str, tmp_path: Path) -> None:
    gm = adapted(base, init=init)
    first = [t.clone() for s in lorafx.sites(gm) for t in s.parameters(gm).values()]
    randomize(gm)
    lorafx.save_adapter(gm, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["init_lora_weights"] == "loftq"
    assert config["loftq_config"] == {"loftq_bits": {"nf4": 4, "int8": 8}[base], "loftq_iter": 3 if "_" in init else 1}
    again = lorafx.apply(model(), tmp_path, X, seed=5).eval()
    assert all(
        torch.equal(*pair)
        for pair in zip(first, (t for s in lorafx.sites(again) for t in s.parameters(again).values()), strict=True)
    )
    lorafx.load_adapter(again, tmp_path)
    assert torch.equal(again(X), gm(X))
    wrong = {
        "the weight itself": spec(base, init="kaiming"),
        "the base that init='loftq_2' stores": spec(base, init="loftq_2"),
        "stores as": spec({"nf4": "int8", "int8": "nf4"}[base], init=init),
    }
    for message, other in wrong.items():
        with pytest.raises(AdapterError, match=f"relative to .*{message}.* in the graph, and to the base that init="):
            lorafx.load_adapter(lorafx.apply(model(), other, X), tmp_path)


def test_peft_reads_the_file_on_the_stored_base(tmp_path: Path) -> None:
    gm = adapted()
    lorafx.save_adapter(gm, tmp_path)
    dense = model()
    dense.load_state_dict({n: t.dequantize() if isinstance(t, QuantizedTensor) else t for n, t in base_of(gm).items()})
    config = peft.LoraConfig.from_pretrained(tmp_path)
    config.init_lora_weights = True
    theirs = peft.PeftModel.from_pretrained(dense, tmp_path, config=config)
    assert_close("peft", theirs(X), gm(X))


def base_of(gm: CapturedModule) -> dict[str, Tensor]:
    return dict(lorafx.unadapted(gm).state_dict())


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize(("base", "init"), [("nf4", "loftq"), ("nf4", "loftq_7"), ("int8", "loftq_2")])
def test_the_config_is_pefts(base: str, init: str, variant: str) -> None:
    ours = LoraSpec(base=base, init=init, variant=variant, target_modules=["0"])
    theirs = peft.LoraConfig(**ours.to_peft())
    assert LoraSpec.from_peft(theirs) == ours
    assert LoraSpec.from_peft(theirs.to_dict()) == ours
    given = peft.LoraConfig(init_lora_weights="loftq", loftq_config=peft.LoftQConfig(), target_modules=["0"])
    assert (LoraSpec.from_peft(given).base, LoraSpec.from_peft(given).init) == ("nf4", "loftq")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loftq_bits": 2}, r"loftq_config\['loftq_bits'\]=2 is not supported; supported is 4 or 8"),
        ({"loftq_iter": 0}, r"loftq_config\['loftq_iter'\]=0 .* at least 1"),
        ({"loftq_itre": 3}, "unknown key 'loftq_itre'.*did you mean 'loftq_iter'"),
    ],
)
def test_a_config_that_is_none(settings: dict[str, int], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        LoraSpec.from_peft({"target_modules": ["q"], "init_lora_weights": "loftq", "loftq_config": settings})


# What is refused


@pytest.mark.parametrize("init", ["loftq", "loftq_4"])
def test_without_a_base_there_is_nothing_to_make_up_for(init: str) -> None:
    with pytest.raises(SpecError, match=rf"LoraSpec\.init='{init}'.*give one \(base='nf4' or 'int8'\)"):
        LoraSpec(init=init)


@pytest.mark.parametrize("name", ["loftq_0", "loftq_1", "loftq_", "LoftQ"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(SpecError, match=r"LoraSpec\.init=.*'loftq'.*'loftq_5'"):
        LoraSpec(init=name, base="nf4")
    with pytest.raises(SpecError, match=r"LoraSpec\.init"):
        LoraSpec(init="loftq", base="nf4", variant="vera")


def test_sites_and_graphs_where_it_cannot_be() -> None:
    bare = captured(build_kinds(torch.float32), kinds_inputs(torch.float32), None)
    for target in ("embed", "conv"):
        with pytest.raises(MatchError, match=f"site '{target}': init='loftq' makes up for what base='nf4' loses"):
            started(bare, LoraSpec(r=2, base="nf4", init="loftq", target_modules=["up", target]))
    with pytest.raises(MatchError, match=r"init='loftq' has at most r=80 for a weight of 80 x 96, not r=81"):
        adapted(r=81)
    for start in (LoraSpec(target_modules=["0"]), spec()):
        gm = lorafx.apply(model(), start, X)
        before = gm(X)
        with pytest.raises(
            MatchError, match=r"site '0': init='loftq' stores the dense weight anew, as only lorafx\.apply"
        ):
            lorafx.add_adapter(gm, spec(), "second")
        assert torch.equal(gm(X), before)
    packed = model()
    packed[0].weight = nn.Parameter(QuantizedTensor(FORMATS["nf4"].quantize(packed[0].weight.detach())), False)
    with pytest.raises(QuantizationError, match=r"'0\.weight' is stored as nf4 already.*quantized from"):
        lorafx.apply(packed, spec(), X)
    exact = model()
    with torch.no_grad():
        exact[0].weight.copy_(kept("int8", exact[0].weight))
    with pytest.raises(QuantizationError, match=r"int8 loses nothing of '0\.weight'.*never train"):
        lorafx.apply(exact, spec("int8"), X)
