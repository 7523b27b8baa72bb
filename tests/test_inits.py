"""How adapters start: PEFT's factors from the same weights, outputs unchanged, and the way back to plain LoRA."""

from __future__ import annotations

import copy
import pickle
from functools import cache
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import kinds
import lorafx
from conftest import same
from lorafx import LoraSpec, MatchError, SpecError
from lorafx.api import captured
from lorafx.graph import CapturedModule, get_path
from lorafx.ir import adapters, find_adapter, format_graph
from lorafx.passes.insert import Insert
from lorafx.passes.match import match
from lorafx.passes.residual import plain_factors, rebuild_residual, start_names
from lorafx.variants.inits import find_init, leading_singular
from tolerances import assert_close, error

#: Those that take a part of the weight.
TAKING = ("pissa", "pissa_niter_2", "olora")
VARIANTS = ("lora", "lora_bias", "dora")


class Layer(nn.Module):
    """One layer called ``layer``, as PEFT and the rest name it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x)
        return found


def linear_layer() -> Layer:
    return Layer(nn.Linear(70, 60))


def conv1d_layer() -> Layer:
    layer = Conv1D(60, 70)
    nn.init.normal_(layer.weight)
    return Layer(layer)


def twins(model: Layer, spec: LoraSpec, x: Tensor) -> tuple[CapturedModule, nn.Module]:
    """Our graph and PEFT's model of the same base, whose factors are drawn from the same random state."""
    config = peft.LoraConfig(**spec.to_peft(), fan_in_fan_out=isinstance(model.layer, Conv1D))
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    layer = theirs.base_model.model.layer
    torch.manual_seed(3)
    if spec.init == "orthogonal":
        layer.orthogonal_init("default")
    elif spec.init in ("kaiming", "gaussian"):
        layer.reset_lora_parameters("default", config.init_lora_weights)
    torch.manual_seed(3)
    return lorafx.apply(model, spec, (x,)), theirs


def factors(gm: CapturedModule) -> tuple[Tensor, Tensor]:
    (site,) = lorafx.sites(gm)
    tensors = site.parameters(gm)
    return tensors["lora_A"].detach(), tensors["lora_B"].detach()


def their_factors(theirs: nn.Module) -> tuple[Tensor, Tensor]:
    layer = theirs.base_model.model.layer
    return layer.lora_A.default.weight.detach(), layer.lora_B.default.weight.detach()


# The same as PEFT's


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", "gaussian", "kaiming"])
def test_factors_residual_and_output_are_pefts(init: str, rslora: bool, variant: str) -> None:
    model, x = linear_layer(), torch.randn(9, 70)
    spec = LoraSpec(r=4, alpha=6, rslora=rslora, init=init, variant=variant, target_modules=["layer"])
    gm, theirs = twins(model, spec, x)
    (a, b), (their_a, their_b) = factors(gm), their_factors(theirs)
    signs = torch.sign((a * their_a).sum(1)) if init == "pissa" else torch.ones(4)
    assert_close("peft", a * signs.unsqueeze(1), their_a)
    assert_close("peft", b * signs, their_b)
    own = find_adapter(gm).own_name("layer.weight")
    if find_init(init).changes_base:
        assert_close("fold", gm.get_parameter(own).detach(), theirs.base_model.model.layer.base_layer.weight.detach())
    else:
        assert own not in gm.state_dict()
    if variant == "dora":
        m = lorafx.sites(gm)[0].parameters(gm)["lora_magnitude_vector"].detach()
        assert_close("fold", m, theirs.base_model.model.layer.lora_magnitude_vector.default.weight.detach())
    assert_close("peft", gm(x), theirs(x))


def test_pissa_of_a_conv1d_is_pefts() -> None:
    model, x = conv1d_layer(), torch.randn(3, 70)
    gm, theirs = twins(model, LoraSpec(r=4, init="pissa", target_modules=["layer"]), x)
    (a, b), (their_a, their_b) = factors(gm), their_factors(theirs)
    assert_close("peft", b @ a, their_b @ their_a)
    own = gm.get_parameter(find_adapter(gm).own_name("layer.weight")).detach()
    assert own.shape == model.layer.weight.shape
    assert_close("peft", own, theirs.base_model.model.layer.base_layer.weight.detach())
    assert_close("peft", gm(x), theirs(x))


def test_the_fast_decomposition_is_near_the_exact_one_and_no_worse_than_pefts() -> None:
    model, x = linear_layer(), torch.randn(9, 70)
    exact = torch.linalg.svdvals(model.layer.weight.detach())[:4]

    def values(a: Tensor, b: Tensor) -> Tensor:
        return torch.linalg.svdvals(b @ a)[:4]

    spec = LoraSpec(r=4, alpha=4, init="pissa_niter_4", target_modules=["layer"])
    gm, theirs = twins(model, spec, x)
    ours, peft_error = values(*factors(gm)), error(values(*their_factors(theirs)), exact)
    assert error(ours, exact) <= max(peft_error, 1e-6)
    assert error(ours, exact) < 0.05
    more = lorafx.apply(model, LoraSpec(r=4, alpha=4, init="pissa_niter_40", target_modules=["layer"]), (x,))
    assert_close("peft", values(*factors(more)), exact)


def test_the_fast_decomposition_follows_the_seed() -> None:
    model, x = linear_layer(), torch.randn(2, 70)
    spec = LoraSpec(r=4, init="pissa_niter_1", target_modules=["layer"])
    before = torch.get_rng_state()
    first, again, other = (factors(lorafx.apply(model, spec, (x,), seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert same(first, again)
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora", "orthogonal"])
def test_autocast_has_no_part_in_it(init: str) -> None:
    model, x = linear_layer(), torch.randn(2, 70)
    spec = LoraSpec(r=4, init=init, target_modules=["layer"])
    plain = factors(lorafx.apply(model, spec, (x,), seed=1))
    with torch.autocast("cpu", torch.bfloat16):
        assert same(factors(lorafx.apply(model, spec, (x,), seed=1)), plain)


def test_leading_singular_triplets() -> None:
    matrix = torch.randn(50, 3, dtype=torch.float64) @ torch.randn(3, 60, dtype=torch.float64)
    for count in (3, 30):  # from random directions, and exactly
        u, s, vh = leading_singular(matrix, count, 2, None)
        assert (u.shape, s.shape, vh.shape) == ((50, count), (count,), (count, 60))
        assert_close("layer", u @ torch.diag(s) @ vh, matrix)
        assert_close("layer", u.mT @ u, torch.eye(count, dtype=torch.float64))


# Outputs unchanged, at every kind of layer


EVERYWHERE = ["embed", "conv", "attn.q", "attn.v", "attn.out_proj", "up", "down", "head"]


@cache
def captured_kinds(dtype: torch.dtype) -> CapturedModule:
    """The capture of the model of all kinds; not to be changed."""
    return captured(kinds.build(dtype), kinds.inputs(dtype), None)


def bare_kinds(dtype: torch.dtype = torch.float64) -> CapturedModule:
    return copy.deepcopy(captured_kinds(dtype)).eval()


def kinds_graph(spec: LoraSpec, dtype: torch.dtype = torch.float64) -> tuple[kinds.Kinds, CapturedModule]:
    """A graph that shares nothing with the model, which has the same weights."""
    gm = copy.deepcopy(captured_kinds(dtype))
    Insert(match(gm, (spec,)), (spec,), torch.Generator().manual_seed(1))(gm)
    return kinds.build(dtype), gm.eval()


def everywhere(init: str, variant: str = "lora", **fields: Any) -> LoraSpec:
    targets = {"target_modules": ["conv", "up", "down", "head"]}
    if variant != "lora_bias":
        targets = {"target_modules": EVERYWHERE, "target_parameters": ["experts.stack"]}
    return LoraSpec(**{"r": 2, "alpha": 3, "init": init, "variant": variant, **targets, **fields})


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("init", [*TAKING, "orthogonal"])
def test_outputs_are_unchanged(init: str, variant: str) -> None:
    """Linear, embedding, grouped convolution, slices of an attention's projection, experts."""
    for dtype in (torch.float64, torch.float32):
        model, gm = kinds_graph(everywhere(init, variant), dtype)
        given = kinds.inputs(dtype)
        assert_close("model", gm(*given), model(*given))
        adapter = find_adapter(gm)
        taken = {s.weight for s in adapter.sites} if init in TAKING else set()
        assert set(adapter.residual) == taken
        for name in taken:
            assert not torch.equal(get_path(gm, adapter.own_name(name)), get_path(gm, name))
            assert not get_path(gm, adapter.own_name(name)).requires_grad
        assert_close("model", lorafx.merge(gm)(*given), model(*given))
        assert torch.equal(lorafx.unadapted(gm)(*given), bare_kinds(dtype)(*given))


@pytest.mark.parametrize("init", TAKING)
def test_the_users_model_is_left_alone(init: str) -> None:
    model = kinds.build()
    before = {n: (t.data_ptr(), t._version, t.clone()) for n, t in model.state_dict().items()}
    gm = lorafx.apply(model, everywhere(init), kinds.inputs())
    gm(*kinds.inputs()).sum().backward()
    lorafx.merge(gm, inplace=True)
    lorafx.unmerge(gm)
    assert same({n: (t.data_ptr(), t._version, t) for n, t in model.state_dict().items()}, before)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("init", TAKING)
def test_half_precision_bases_lose_one_rounding_of_the_weight(init: str, dtype: torch.dtype) -> None:
    model, x = linear_layer().to(dtype), torch.randn(9, 70).to(dtype)
    gm = lorafx.apply(model, LoraSpec(r=4, init=init, target_modules=["layer"]), (x,))
    (a, b), weight = factors(gm), model.layer.weight.detach()
    assert a.dtype == b.dtype == torch.float32
    own = get_path(gm, find_adapter(gm).own_name("layer.weight"))
    assert own.dtype == dtype
    exact = weight.double() - lorafx.sites(gm)[0].scaling * b.double() @ a.double()
    assert torch.equal(own, exact.to(dtype))
    assert_close("layer", gm(x), model(x))


def test_factors_rounded_to_the_adapters_dtype_are_what_the_base_is_left_without() -> None:
    model, x = linear_layer().double(), torch.randn(9, 70, dtype=torch.float64)
    spec = LoraSpec(r=4, init="pissa", adapter_dtype="bfloat16", target_modules=["layer"])
    gm = lorafx.apply(model, spec, (x,))
    a, b = (t.double() for t in factors(gm))
    own = get_path(gm, find_adapter(gm).own_name("layer.weight"))
    assert_close("layer", own + lorafx.sites(gm)[0].scaling * b @ a, model.layer.weight.detach())


@pytest.mark.parametrize("init", [*TAKING, "orthogonal", "eva", "lora_ga"])
def test_on_the_meta_device(init: str) -> None:
    with torch.device("meta"):
        model, x = linear_layer(), torch.empty(3, 70)
    gm = lorafx.apply(model, LoraSpec(r=4, init=init, variant="dora", target_modules=["layer"]), (x,))
    assert all(t.is_meta for t in gm.parameters())
    assert gm(x).is_meta


# What is refused


REFUSED = {
    "pissa of too high a rank": ({"init": "pissa", "r": 9}, r"site 'up': init='pissa' has at most r=8 .* not r=9"),
    "a fast one": ({"init": "pissa_niter_3", "rank_pattern": {"down": 12}}, r"site 'down': .* at most r=8 .* r=12"),
    "olora of too high a rank": ({"init": "olora", "r": 9}, r"at most r=8 for a weight of 10 x 8"),
    "gradients of too high a rank": ({"init": "lora_ga", "r": 5}, r"at most r=4 .*rank_pattern"),
    "an odd orthogonal rank": ({"init": "orthogonal", "r": 3}, "r=3 is odd: take an even one"),
    "activations of an embedding": ({"init": "eva", "target_modules": ["embed"]}, "site 'embed': .* kind 'embedding'"),
    "activations of a convolution": ({"init": "eva", "target_modules": ["conv"]}, "exclude_modules"),
    "activations of experts": (
        {"init": "eva", "target_modules": [], "target_parameters": ["experts.stack"]},
        "'parameter'",
    ),
    "a bias that is not there": ({"variant": "lora_bias", "target_modules": ["embed"]}, "embed.*bias"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_start_is_refused_before_anything_changes(case: str) -> None:
    fields, message = REFUSED[case]
    spec = LoraSpec(**{"r": 2, "target_modules": ["up", "down"], **fields})
    with pytest.raises(MatchError, match=message):
        kinds_graph(spec)
    _, gm = kinds_graph(LoraSpec(r=2, target_modules=["up"]))
    text, state = format_graph(gm), {n: t.clone() for n, t in gm.state_dict().items()}
    with pytest.raises(MatchError, match=message):
        lorafx.add_adapter(gm, spec, "second")
    assert format_graph(gm) == text
    assert same(dict(gm.state_dict()), state)


class Tied(nn.Module):
    """One weight for two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.head(self.embed(ids).tanh())
        return found


def test_taking_from_a_weight_with_another_use() -> None:
    """Kept apart it would be missing in the other use; adapted alike in both it is not."""
    model, ids = Tied(), torch.arange(6).reshape(2, 3)
    spec = {"r": 2, "init": "pissa", "target_modules": ["head"]}
    with pytest.raises(MatchError, match=r"site 'head': init='pissa' takes a part of the weight .* used elsewhere"):
        lorafx.apply(model, LoraSpec(**spec, tied="untie"), (ids,))
    gm = lorafx.apply(model, LoraSpec(**spec, tied="tie"), (ids,))
    assert_close("layer", gm(ids), model(ids))


@pytest.mark.parametrize("name", ["pissa_niter", "pissa_niter_x", "pissa_niter_-1", "Pissa", "svd"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(SpecError, match=r"LoraSpec\.init=.*'pissa'.*'olora'.*'pissa_niter_16'"):
        LoraSpec(init=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_fast_family_is_known_with_any_number(variant: str) -> None:
    assert LoraSpec(init="pissa_niter_7", variant=variant).init == "pissa_niter_7"
    with pytest.raises(SpecError):
        LoraSpec(init="pissa_niter_7", variant="vera")


# Several adapters


def test_one_that_takes_goes_with_plain_ones_only() -> None:
    _, gm = kinds_graph(LoraSpec(r=2, init="pissa", target_modules=["up"]))
    for name, spec in {
        "plain": LoraSpec(r=3, target_modules=["up"]),
        "dora": LoraSpec(r=3, variant="dora", target_modules=["up"]),
        "other": LoraSpec(r=3, init="olora", target_modules=["up"]),
    }.items():
        lorafx.add_adapter(gm, spec, name)
    kinds.fill(gm)
    changes = [kinds.deltas(gm, name)["up.weight"] for name in ("default", "plain")]
    assert_close("model", kinds.deltas(gm, "default", "plain")["up.weight"], changes[0] + changes[1])
    text = format_graph(gm)
    for names, message in {
        ("default", "dora"): "adapter 'dora' rescales the rows of 'up.weight'.*adapter 'default' puts another weight",
        ("dora", "other"): "adapter 'dora' rescales the rows",
        ("default", "other"): "each has its own version of 'up.weight'",
    }.items():
        with pytest.raises(lorafx.AdapterError, match=message):
            lorafx.set_adapter(gm, names)
    with pytest.raises(lorafx.AdapterError, match=r"its own version of 'up\.weight'"):
        lorafx.set_adapter_names(gm, ["default", "plain", None])
    assert format_graph(gm) == text


def test_switching_deleting_and_renaming_keep_the_base() -> None:
    model, gm = kinds_graph(everywhere("pissa"))
    given = kinds.inputs()
    names = set(gm.state_dict())
    expected = gm(*given)
    lorafx.rename_adapter(gm, "default", "first")
    assert torch.equal(gm(*given), expected)
    rebuild_residual(gm, find_adapter(gm, "first"))
    assert torch.equal(gm(*given), expected)
    with lorafx.disable_adapters(gm):
        assert torch.equal(gm(*given), bare_kinds()(*given))
    for made in (copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):  # noqa: S301  # our own bytes
        assert torch.equal(made(*given), expected)
    lorafx.delete_adapter(gm, "first")
    assert torch.equal(gm(*given), bare_kinds()(*given))
    assert set(gm.state_dict()) == set(model.state_dict()) < names


# Back to plain LoRA


def trained(spec: LoraSpec, dtype: torch.dtype = torch.float64) -> tuple[kinds.Kinds, CapturedModule]:
    """Trained for some steps, so that A and B are far from A0 and B0 but no accident."""
    model, gm = kinds_graph(spec, dtype)
    optimizer = torch.optim.Adam([p for p in gm.parameters() if p.requires_grad], lr=0.05)
    given = kinds.inputs(dtype)
    for _ in range(4):
        optimizer.zero_grad()
        gm(*given).square().sum().backward()
        optimizer.step()
    return model, gm


def plain_twin(gm: CapturedModule, spec: LoraSpec) -> CapturedModule:
    """An adapter on the original base with the plain factors of one that took from it: twice the rank, same scaling."""
    adapter = find_adapter(gm)
    made = {site.name: plain_factors(gm, adapter, site) for site in adapter.sites}
    factor = 2**0.5 if spec.rslora else 2
    plain = LoraSpec.from_dict(
        {
            **spec.to_dict(),
            "init": "kaiming",
            "r": 2 * spec.r,
            "alpha": factor * spec.alpha,
            "rank_pattern": {k: 2 * r for k, r in spec.rank_pattern.items()},
            "alpha_pattern": {k: factor * alpha for k, alpha in spec.alpha_pattern.items()},
        }
    )
    _, twin = kinds_graph(plain)
    with torch.no_grad():
        for site, old in zip(lorafx.sites(twin), adapter.sites, strict=True):
            assert site.scaling == pytest.approx(old.scaling, rel=1e-12)
            a, b = made[site.name]
            for name, tensor in site.parameters(twin).items():
                tensor.copy_({**old.parameters(gm), "lora_A": a, "lora_B": b}[name])
    return twin


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("init", TAKING)
def test_base_and_plain_lora_equal_the_trained_graph(init: str, variant: str) -> None:
    """Exact but for the rounding of what was left of each weight (here float64's); DoRA's magnitudes stay."""
    spec = everywhere(init, variant, rslora=True, rank_pattern={"up": 3}, alpha_pattern={"down|up": 5})
    model, gm = trained(spec)
    before, given = gm(*kinds.inputs()), kinds.inputs()
    assert error(before, model(*given)) > 0.1
    twin = plain_twin(gm, spec)
    assert not find_adapter(twin).residual
    assert_close("model", twin(*given), before)


def test_a_half_precision_base_differs_by_what_the_start_rounded() -> None:
    spec = LoraSpec(r=4, init="pissa", target_modules=["layer"])
    model, x = linear_layer().bfloat16(), torch.randn(9, 70).bfloat16()
    gm = lorafx.apply(model, spec, (x,))
    adapter = find_adapter(gm)
    (site,) = adapter.sites
    with torch.no_grad():
        for tensor in site.parameters(gm).values():
            tensor.add_(0.02 * torch.randn(tensor.shape))
    a, b = plain_factors(gm, adapter, site)
    plain = model.layer.weight.double() + site.scaling * b.double() @ a.double()
    own = get_path(gm, adapter.own_name("layer.weight"))
    exact = own.double() + site.scaling * (b[:, :4].double() @ a[:4].double())
    half_unit = torch.finfo(torch.bfloat16).eps / 2 * own.double().abs()
    assert bool(((plain - exact).abs() <= half_unit + 1e-12).all())


def test_peft_reads_it_as_lora_of_twice_the_rank() -> None:
    model, x = linear_layer(), torch.randn(9, 70)
    spec = LoraSpec(r=4, alpha=6, init="olora", target_modules=["layer"])
    gm = lorafx.apply(model, spec, (x,))
    with torch.no_grad():
        for tensor in lorafx.sites(gm)[0].parameters(gm).values():
            tensor.add_(0.1 * torch.randn(tensor.shape))
    adapter = find_adapter(gm)
    a, b = plain_factors(gm, adapter, adapter.sites[0])
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=8, lora_alpha=12, target_modules=["layer"]))
    with torch.no_grad():
        theirs.base_model.model.layer.lora_A.default.weight.copy_(a)
        theirs.base_model.model.layer.lora_B.default.weight.copy_(b)
    assert_close("peft", gm(x), theirs(x))


def test_start_values_stay_and_the_base_follows_from_them() -> None:
    _, gm = trained(everywhere("pissa"))
    _, fresh = kinds_graph(everywhere("pissa"))
    adapter = find_adapter(gm)
    for site in adapter.sites:
        for name, factor in zip(start_names(adapter, site), ("lora_A", "lora_B"), strict=True):
            assert torch.equal(get_path(gm, name), site.parameters(fresh)[factor])
            assert not torch.equal(get_path(gm, name), site.parameters(gm)[factor])
    kept = {n: get_path(gm, adapter.own_name(n)) for n in adapter.residual}
    values = {n: t.clone() for n, t in kept.items()}
    with torch.no_grad():
        for tensor in kept.values():
            tensor.zero_()
    rebuild_residual(gm, adapter)
    assert all(torch.equal(kept[n], values[n]) for n in kept)


def test_plain_factors_of_others() -> None:
    _, gm = kinds_graph(LoraSpec(r=2, target_modules=["up"]))
    (site,) = lorafx.sites(gm)
    assert same(plain_factors(gm, find_adapter(gm), site), tuple(t.detach() for t in site.parameters(gm).values()))
    _, gm = kinds_graph(LoraSpec(r=2, variant="vera", target_modules=["up"]))
    with pytest.raises(lorafx.AdapterError, match="site 'up': variant 'vera' is not LoRA's B A"):
        plain_factors(gm, find_adapter(gm), lorafx.sites(gm)[0])
    assert adapters(gm)
