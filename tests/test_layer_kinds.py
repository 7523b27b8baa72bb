"""Every kind of layer against PEFT: the same adapter weights give the same outputs, gradients and merged weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import lorafx
from conftest import Zoo, leaves, randomize
from lorafx import LoraSpec, MatchError
from lorafx.graph import CapturedModule
from lorafx.ir import Site
from lorafx.passes.insert import Insert
from lorafx.passes.match import match
from tolerances import assert_close
from zoo import FAMILIES

VARIANTS: Mapping[str, dict[str, Any]] = {
    "lora": {"r": 4, "alpha": 6},
    "rslora": {"r": 4, "alpha": 3, "rslora": True},
    "dora": {"r": 2, "alpha": 3, "variant": "dora"},
}


class Headed(nn.Module):
    """A layer of interest, and a head behind it that no case adapts."""

    def __init__(self, layer: nn.Module, features: int) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.layer(x))
        out: Tensor = self.head(h.flatten(1))
        return out


class Scaled(nn.Module):
    """Code of its own around a bare parameter, which it also reads elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix) / self.matrix.norm()


class Experts(nn.Module):
    """A mixture of experts whose weights are stacks, stored as transformers' are, or as GPT-OSS's are."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        up, down = ((3, 6, 5), (3, 5, 6)) if transposed else ((3, 5, 6), (3, 6, 5))
        self.up, self.down = (nn.Parameter(torch.randn(shape)) for shape in (up, down))
        self.is_transposed = transposed

    def forward(self, x: Tensor) -> Tensor:
        up, down = (self.up, self.down) if self.is_transposed else (self.up.mT, self.down.mT)
        each: Tensor = torch.tanh(x @ up) @ down  # [experts, batch, 6]
        return each.permute(1, 0, 2)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x)[0]
        return out


class CrossAttention(SelfAttention):
    """Keys and values from elsewhere: the projection's weight is split before it is used."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x[:, :2], x[:, 2:], x[:, 2:])[0]
        return out


def qwen_moe() -> nn.Module:
    sizes: dict[str, Any] = {"vocab_size": 21, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1}
    experts: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "batched_mm"}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "use_cache": False}
    config = hf.Qwen3MoeConfig(**sizes, **experts, **heads, moe_intermediate_size=12, initializer_range=0.2)
    return hf.Qwen3MoeForCausalLM(config).eval()


@dataclass(frozen=True)
class Case:
    """A model with one kind of layer, and how the two are told to adapt it.

    ``wrapper`` maps a site's name to the path of what PEFT wraps. ``twice`` are sites whose update PEFT (0.21.2,
    ``lora.MultiheadAttention.merge``) adds to the weight twice, the second time out of autograd's sight: with half of
    B there it computes the same, with half of the gradients.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    spec: Mapping[str, Any] = field(default_factory=lambda: {"target_modules": ["layer"]})
    config: Mapping[str, Any] = field(default_factory=lambda: {"target_modules": ["layer"]})
    variants: tuple[str, ...] = tuple(VARIANTS)
    wrapper: Callable[[str], str] = lambda name: name
    twice: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)


def headed(layer: Callable[[], nn.Module], features: int, *shape: int, **rest: Any) -> Case:
    return Case(lambda: Headed(layer(), features), lambda: {"x": torch.randn(2, *shape)}, **rest)


def targeting(*names: str) -> dict[str, Any]:
    return {"target_modules": (), "target_parameters": names}


def experts_wrapper(name: str) -> str:
    """PEFT wraps a module once for each parameter, the first one inmost."""
    module, _, parameter = name.rpartition(".")
    return f"{module}.base_layer" if parameter in ("up", "gate_up_proj") else module


def attention_wrapper(name: str) -> str:
    return name.replace(".out_proj", ".base_layer.out_proj")


NO_DORA = ("lora", "rslora")
ATTENTION: dict[str, Any] = {
    "spec": {"target_modules": ["attention"]},
    "config": {"target_modules": ["attention"]},
    "variants": NO_DORA,  # PEFT has none there
    "wrapper": attention_wrapper,
    "twice": ("layer.attention.out_proj",),
}
EXPERTS: dict[str, Any] = {
    "spec": targeting("layer.up", "layer.down"),
    "config": {"target_modules": [], "target_parameters": ["layer.up", "layer.down"]},
    "variants": NO_DORA,
    "wrapper": experts_wrapper,
}
#: The norms of these models compute in float32, whatever the inputs.
STACKS: dict[str, Any] = {
    "spec": targeting("experts.gate_up_proj", "experts.down_proj"),
    "config": {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "variants": ("lora",),
    "wrapper": experts_wrapper,
}
CASES: dict[str, Case] = {
    "linear": headed(lambda: nn.Linear(6, 5), 5, 6),
    "parameter": headed(
        Scaled, 5, 6,
        spec=targeting("layer.matrix"),
        config={"target_modules": [], "target_parameters": ["layer.matrix"]},
        variants=NO_DORA,
        wrapper=lambda name: name.rpartition(".")[0],
    ),
    "Conv1D": headed(
        lambda: Conv1D(5, 6), 5, 6, config={"target_modules": ["layer"], "fan_in_fan_out": True}
    ),
    "embedding": Case(
        lambda: Headed(nn.Embedding(9, 4, padding_idx=0), 20),
        lambda: {"x": torch.tensor([[1, 2, 0, 8, 1], [0, 0, 3, 2, 7]])},
    ),
    "conv1d": headed(lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), 16, 3, 8),
    "conv2d": headed(lambda: nn.Conv2d(3, 4, 3, padding=1), 64, 3, 4, 4),
    "conv2d 1x1": headed(lambda: nn.Conv2d(3, 4, 1, bias=False), 64, 3, 4, 4),
    "conv2d same": headed(lambda: nn.Conv2d(3, 4, (3, 2), padding="same"), 64, 3, 4, 4),
    "conv3d": headed(lambda: nn.Conv3d(2, 4, (1, 2, 2)), 48, 2, 3, 3, 3),
    "self-attention": headed(SelfAttention, 30, 5, 6, **ATTENTION),
    "cross-attention": headed(CrossAttention, 12, 5, 6, **ATTENTION),
    "experts": headed(lambda: Experts(False), 18, 6, **EXPERTS),
    "transposed experts": headed(lambda: Experts(True), 18, 6, **EXPERTS),
    "qwen-moe": Case(
        qwen_moe, lambda: {"input_ids": torch.arange(14).reshape(2, 7)}, **STACKS, dtypes=(torch.float32,),
    ),
    "mixtral": Case(
        FAMILIES["mixtral"].build, FAMILIES["mixtral"].inputs, **STACKS, dtypes=(torch.float32,),
    ),
}  # fmt: skip
each_case = pytest.mark.parametrize(
    ("name", "variant", "dtype"),
    [
        pytest.param(name, variant, dtype, id=f"{name}-{variant}-{dtype}")
        for name, case in CASES.items()
        for variant in case.variants
        for dtype in case.dtypes
    ],
)


@cache
def captured(zoo: Zoo, name: str, dtype: torch.dtype) -> tuple[nn.Module, CapturedModule, dict[str, Tensor]]:
    """A case's model, its capture and its inputs. Shared: don't change them."""
    if name in FAMILIES:
        return zoo.eager(FAMILIES[name]), zoo.captured(FAMILIES[name]), FAMILIES[name].inputs()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, given = CASES[name].build().to(dtype), CASES[name].inputs()
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}
    return model, lorafx.api.captured(model, inputs, None), inputs


def adapted(zoo: Zoo, name: str, variant: str, dtype: torch.dtype = torch.float32) -> CapturedModule:
    gm = copy.deepcopy(captured(zoo, name, dtype)[1])
    specs = (LoraSpec(**VARIANTS[variant], **CASES[name].spec),)
    gm = Insert(match(gm, specs), specs)(gm).gm
    randomize(gm)
    return gm


def call(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    return leaves(model(**inputs))[0]


def in_peft(case: Case, site: Site, parameter: str, theirs: Mapping[str, nn.Parameter]) -> nn.Parameter:
    """PEFT's parameter for one of a site's."""
    embedding = {"lora_A": "lora_embedding_A.default", "lora_B": "lora_embedding_B.default"}
    leaf = embedding.get(parameter) if site.kind == "embedding" else None
    return theirs[f"base_model.model.{case.wrapper(site.name)}.{leaf or f'{parameter}.default.weight'}"]


def as_in_peft(site: Site, parameter: str, value: Tensor, shape: torch.Size) -> Tensor:
    """A value (or gradient) of ours in PEFT's layout; of stacked experts, B has the experts' number last."""
    if value.dim() == 3 and parameter == "lora_B":
        value = value.permute(1, 2, 0)
    return value.reshape(shape)


def peft_twin(zoo: Zoo, name: str, variant: str, dtype: torch.dtype, gm: CapturedModule) -> peft.PeftModel:
    case, settings = CASES[name], VARIANTS[variant]
    config = peft.LoraConfig(
        r=settings["r"],
        lora_alpha=settings["alpha"],
        use_rslora=settings.get("rslora", False),
        use_dora=settings.get("variant") == "dora",
        **case.config,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = peft.get_peft_model(copy.deepcopy(captured(zoo, name, dtype)[0]), config)
    theirs = dict(twin.named_parameters())
    found = set()
    with torch.no_grad():
        for site in lorafx.sites(gm):
            for parameter, value in site.parameters(gm).items():
                target = in_peft(case, site, parameter, theirs)
                halved = 0.5 if site.name in case.twice and parameter == "lora_B" else 1.0
                target.copy_(as_in_peft(site, parameter, value, target.shape) * halved)
                found.add(id(target))
    assert not [n for n, p in theirs.items() if "lora_" in n and id(p) not in found], "PEFT adapts other layers"
    return twin


@each_case
def test_outputs_gradients_and_merged_weights_are_pefts(zoo: Zoo, name: str, variant: str, dtype: torch.dtype) -> None:
    case, (model, _, inputs) = CASES[name], captured(zoo, name, dtype)
    before = model.state_dict()
    gm = adapted(zoo, name, variant, dtype)
    twin = peft_twin(zoo, name, variant, dtype, gm)
    for training in (True, False):
        outputs = [call(each.train(training), inputs) for each in (gm, twin)]
        assert_close("peft", *outputs)
        for each, output in zip((gm, twin), outputs, strict=True):
            each.zero_grad()
            output.square().mean().backward()
        theirs = dict(twin.named_parameters())
        for site in lorafx.sites(gm):
            for parameter, value in site.parameters(gm).items():
                assert value.grad is not None
                expected = in_peft(case, site, parameter, theirs).grad
                assert expected is not None
                assert bool(expected.any())
                halved = 0.5 if site.name in case.twice and parameter == "lora_A" else 1.0
                assert_close("peft", as_in_peft(site, parameter, value.grad, expected.shape) * halved, expected)
    merged, expected = lorafx.merged_state_dict(gm), twin.merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    changed = {site.weight for site in lorafx.sites(gm)}
    for key, value in expected.items():
        assert_close("peft", merged[key], value)
        if key in changed:
            assert not torch.equal(value, before[key])


#: Not those that test_export.py exports, and one of each two that differ in a number only.
EXPORTED = [
    n for n in CASES if n not in (*FAMILIES, "qwen-moe", "linear", "Conv1D", "conv2d 1x1", "transposed experts")
]


@pytest.mark.parametrize("name", EXPORTED)
def test_merged_and_exported(zoo: Zoo, name: str, tmp_path: Path) -> None:
    """With DoRA, which PEFT does not have at every kind, and whose fold has every form that a fold can have."""
    gm = adapted(zoo, name, "dora").eval()
    lorafx.merge_and_export(gm, tmp_path / "model.onnx", verify=True)
    inputs = captured(zoo, name, torch.float32)[2]
    assert_close("model", call(lorafx.merge(gm), inputs), call(gm, inputs))


# What is silently wrong in PEFT, or refused there.


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "groups": (
        lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1),
        "PEFT's A sees all channels and its B is grouped: no update of the weight, so that it cannot be merged",
    ),
    "depthwise": (lambda: nn.Conv1d(4, 4, 3, groups=4), "as above; and ranks must be multiples of the groups"),
    "dilation": (
        lambda: nn.Conv2d(4, 6, 3, dilation=2, padding="same"),
        "PEFT's A is not dilated: the merged layer computes something else",
    ),
    "reflected": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        "PEFT's A pads with zeros: the merged layer computes something else",
    ),
}


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_an_adapted_convolution_is_the_one_with_the_updated_weight(name: str, variant: str) -> None:
    """Whatever its groups, dilation and padding: ``W' = W + s B A``, W as ``[out, in / groups * kernel]``."""
    layer, _ = CONVOLUTIONS[name]
    model = nn.Sequential(layer(), nn.Tanh()).double()
    x = torch.randn(2, *((4, 8) if isinstance(model[0], nn.Conv1d) else (4, 7, 8)), dtype=torch.float64)
    gm = lorafx.apply(model, LoraSpec(r=3, alpha=5, variant=variant, target_modules=["0"]), (x,))
    assert torch.equal(gm(x), model(x))
    randomize(gm)
    (site,) = lorafx.sites(gm)
    a, b = (site.parameters(gm)[p].detach() for p in ("lora_A", "lora_B"))
    weight = model[0].weight.detach()
    updated = weight + site.scaling * (b @ a).reshape(weight.shape)
    if variant == "dora":
        norm = updated.flatten(1).norm(dim=1)
        updated *= (site.parameters(gm)["lora_magnitude_vector"].detach() / norm).reshape(-1, *[1] * (weight.dim() - 1))
    twin = copy.deepcopy(model)
    twin[0].weight = nn.Parameter(updated)
    assert_close("layer", gm(x), twin(x))
    assert_close("layer", lorafx.merge(gm)(x), twin(x))


def test_where_peft_can_merge_a_convolution_its_merged_weight_is_ours() -> None:
    """Dilated: PEFT's layer computes one thing before it is merged and, from then on, ours."""
    model = nn.Sequential(nn.Conv2d(4, 6, 3, dilation=2, padding="same"), nn.Tanh())
    x = torch.randn(2, 4, 7, 8)
    gm = lorafx.apply(model, LoraSpec(r=3, alpha=5, target_modules=["0"]), (x,))
    randomize(gm)
    twin = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"]))
    theirs = twin.base_model.model[0]
    (site,) = lorafx.sites(gm)
    with torch.no_grad():
        for p, value in site.parameters(gm).items():
            target = getattr(theirs, p)["default"].weight
            target.copy_(value.reshape(target.shape))
    assert_close("peft", gm(x), twin.merge_and_unload()(x))


def test_a_transposed_convolution_cannot_be_adapted() -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.ConvTranspose1d(4, 5, 3), nn.Linear(8, 2))
    x = torch.randn(2, 4, 8)
    with pytest.raises(MatchError, match="target_modules names '1': '1' is a transposed convolution, which cannot be"):
        lorafx.apply(model, LoraSpec(target_modules=["0", "1"]), (x,))
    rows = {
        row.site: (row.kind, row.shape, row.reason)
        for row in lorafx.plan(model, LoraSpec(target_modules=["0"]), (x,)).rows
    }
    assert rows == {
        "0": ("conv1d", (4, 12), ""),
        "2": ("linear", (2, 8), "not in target_modules"),
        "1": ("transposed convolution", (4, 5, 3), "a transposed convolution, which cannot be adapted"),
    }


@pytest.mark.parametrize("name", ["linear", "embedding", "conv2d 1x1", "parameter", "cross-attention", "experts"])
def test_a_bias_on_b_needs_a_bias(zoo: Zoo, name: str) -> None:
    gm = captured(zoo, name, torch.float32)[1]
    specs = (LoraSpec(variant="lora_bias", **CASES[name].spec),)
    if name == "linear":
        assert match(gm, specs)[0].site is not None
    else:
        with pytest.raises(MatchError, match=r"variant 'lora_bias' adds to .* leave it out \(exclude_modules\)"):
            match(gm, specs)
