"""Every variant and kind of layer in PEFT's files: PEFT computes what we saved, and we what it saved."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorafx
from conftest import Zoo, leaves, loss_of, randomize, same
from lorafx import AdapterError, LoraSpec, sites
from lorafx.graph import CapturedModule, get_path
from lorafx.ir import find_adapter
from lorafx.passes.resize import resize
from lorafx.spec import as_spec
from lorafx.state import adapter_state_dict, load_adapter, save_adapter
from tolerances import assert_close
from zoo import FAMILIES, Family

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CONFIGS: dict[str, Any] = {"LORA": peft.LoraConfig, "ADALORA": peft.AdaLoraConfig, "VERA": peft.VeraConfig}
MLP = FAMILIES["mlp"]

STEPS = {"options": {"total_step": 50}}
CONVS = ["features.0", "features.3", "hidden"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    # variants on linear layers; patterns, biases and modules_to_save with them
    "dora": ("mlp", {"variant": "dora", "rslora": True, "rank_pattern": {"3": 2}}),
    "lora_bias": ("mlp", {"variant": "lora_bias", "bias": "lora_only"}),
    "vera": ("mlp", {"variant": "vera", "alpha": 3, "bias": "lora_only", "modules_to_save": ["5"]}),
    "adalora": ("mlp", {"variant": "adalora", **STEPS, "bias": "all"}),
    "bert dora": ("bert", {"variant": "dora", "modules_to_save": ["classifier"], "alpha_pattern": {"query": 2}}),
    "bert vera": ("bert", {"variant": "vera", "alpha": 3, "target_modules": ["query", "output.dense"]}),
    "bert adalora": ("bert", {"variant": "adalora", **STEPS, "modules_to_save": ["classifier"]}),
    "gpt2 dora": ("gpt2", {"variant": "dora"}),
    "gpt2 vera": ("gpt2", {"variant": "vera", "alpha": 3}),
    "gpt2 adalora": ("gpt2", {"variant": "adalora", **STEPS}),
    "llama some layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "rslora": True}),
    # kinds of layers
    "embedding": ("bert", {"target_modules": ["word_embeddings", "query"], "rank_pattern": {".*embeddings": 2}}),
    "embedding dora": ("bert", {"target_modules": ["word_embeddings"], "variant": "dora"}),
    "conv": ("convnet", {"target_modules": CONVS, "alpha_pattern": {"hidden": 1.5}}),
    "conv dora": ("convnet", {"target_modules": CONVS, "variant": "dora"}),
    "conv lora_bias": ("convnet", {"target_modules": CONVS, "variant": "lora_bias"}),
    "conv adalora": ("convnet", {"target_modules": CONVS, "variant": "adalora", **STEPS}),
    "experts": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "one parameter": ("mixtral", {"target_modules": [], "target_parameters": EXPERTS[1:], "rslora": True}),
    "router": ("mixtral", {"target_modules": ["q_proj", "mlp.gate"]}),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 5, 1]}}),
    "tied tokens": ("gpt2", {"target_modules": ["c_attn"], "trainable_token_indices": [7]}),
    "tied": ("gpt2", {"target_modules": ["wte", "c_attn"], "tied": "tie"}),
    "tied, by the head": ("gpt2", {"target_modules": ["lm_head"], "tied": "tie"}),
    # starts that change the base
    "pissa": ("mlp", {"init": "pissa", "rank_pattern": {"3": 2}}),
    "fast pissa": ("bert", {"init": "pissa_niter_4", "rslora": True, "target_modules": ["query", "value"]}),
    "olora with dora": ("mlp", {"init": "olora", "variant": "dora"}),
}
BOTH_WAYS = [
    pytest.param(FAMILIES[family], fields, marks=pytest.mark.xdist_group(family), id=name)
    for name, (family, fields) in CASES.items()
]


def assert_same_outputs(ours: nn.Module, theirs: nn.Module, family: Family) -> None:
    actual, expected = (leaves(model.eval()(**family.inputs())) for model in (ours, theirs))
    for a, e in zip(actual, expected, strict=True):
        assert_close("peft", a, e)


def peft_loads(base: nn.Module, directory: Path) -> Any:
    """PEFT's model from ``directory``; its warnings about missing tensors and the like are failures."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        # One flag for layers of both kinds, which PEFT sets right for each by itself.
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)
        # Said of AdaLoRA's pattern, which has keys of another form, and of parameters' names, which are not looked at.
        warnings.filterwarnings("ignore", ".*rank_pattern keys did not match", RuntimeWarning)
        return peft.PeftModel.from_pretrained(base, str(directory)).eval()


def peft_saves(base: nn.Module, directory: Path, settings: dict[str, Any]) -> Any:
    """PEFT's model of these settings, with an adapter that was trained a lot, saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, CONFIGS[settings["peft_type"]](**settings))
        randomize(model, 0.2)
        model.save_pretrained(str(directory))
    return model


def adapted(zoo: Zoo, family: Family, **fields: Any) -> CapturedModule:
    gm = zoo.adapted(family, LoraSpec(**{"r": 3, "alpha": 5, **fields}))
    randomize(gm, 0.2)
    return gm


@pytest.mark.parametrize(("model", "fields"), BOTH_WAYS)
def test_both_ways(zoo: Zoo, model: Family, fields: dict[str, Any], tmp_path: Path) -> None:
    gm = adapted(zoo, model, **fields)
    save_adapter(gm, tmp_path / "ours")
    theirs = peft_loads(zoo.eager(model), tmp_path / "ours")
    assert_same_outputs(gm, theirs, model)
    given, taken = load_file(tmp_path / "ours" / WEIGHTS), peft.get_peft_model_state_dict(theirs)
    assert all(torch.equal(taken[key], given[key]) for key in given)

    again = zoo.adapted(model, as_spec(tmp_path / "ours"))
    load_adapter(again, tmp_path / "ours")
    assert_same_outputs(again, gm, model)
    if find_adapter(gm).residual == ():
        own = zoo.adapted(model, LoraSpec(**{"r": 3, "alpha": 5, **fields}), seed=1)
        load_adapter(own, tmp_path / "ours")
        assert same(adapter_state_dict(own), adapter_state_dict(gm))

    settings = {**json.loads((tmp_path / "ours" / CONFIG).read_text()), "inference_mode": False}
    theirs = peft_saves(zoo.eager(model), tmp_path / "theirs", settings)
    gm = zoo.adapted(model, as_spec(tmp_path / "theirs"))
    load_adapter(gm, tmp_path / "theirs")
    assert_same_outputs(gm, theirs, model)


# What a config has no place for


@pytest.mark.xdist_group("mlp")
@pytest.mark.parametrize(
    ("fields", "folded"),
    [
        ({"variant": "vera", "alpha": 9, "rank_pattern": {"3": 2}, "alpha_pattern": {"3": 1}}, "vera_lambda_b"),
        ({"variant": "vera", "alpha": 2, "rslora": True, "exclude_modules": ["3"]}, "vera_lambda_b"),
        ({"variant": "adalora", **STEPS, "alpha_pattern": {"3": 1.5}, "rank_pattern": {"3": 2}}, "lora_E"),
        ({"variant": "adalora", "options": {"tinit": 3}, "rslora": True}, "lora_E"),
    ],
)
def test_scalings_and_ranks_go_into_the_tensors(zoo: Zoo, fields: dict[str, Any], folded: str, tmp_path: Path) -> None:
    gm = adapted(zoo, MLP, **fields)
    save_adapter(gm, tmp_path)
    assert_same_outputs(gm, peft_loads(zoo.eager(MLP), tmp_path), MLP)
    again = adapted(zoo, MLP, **fields)
    load_adapter(again, tmp_path)
    for name, value in adapter_state_dict(gm).items():
        if folded in name:
            assert_close("peft", adapter_state_dict(again)[name], value)
        else:
            assert torch.equal(adapter_state_dict(again)[name], value)


@pytest.mark.xdist_group("mlp")
def test_ranks_that_adalora_took_away(zoo: Zoo, tmp_path: Path) -> None:
    """Down to none: PEFT has the first rank, and which of it each module kept."""
    gm = adapted(zoo, MLP, variant="adalora", target_modules=["0", "3", "5"], **STEPS)
    resize(gm, {"0": [2], "3": []})
    assert [site.r for site in find_adapter(gm).sites] == [1, 0, 3]
    save_adapter(gm, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["init_r"], config["rank_pattern"]) == (
        3, {"0.lora_E": [True, False, False], "3.lora_E": [False, False, False]},
    )  # fmt: skip
    theirs = peft_loads(zoo.eager(MLP), tmp_path)
    assert_same_outputs(gm, theirs, MLP)

    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = zoo.adapted(MLP, as_spec(tmp_path / "theirs"))
    load_adapter(again, tmp_path / "theirs")
    assert sites(again) == find_adapter(gm).sites
    assert_same_outputs(again, gm, MLP)
    with pytest.raises(AdapterError, match=r"site '0': adalora, r=3, .* in the graph; adalora, r=1, "):
        load_adapter(adapted(zoo, MLP, variant="adalora", target_modules=["0", "3", "5"], **STEPS), tmp_path)


@pytest.mark.xdist_group("mlp")
def test_ranks_that_peft_took_away(zoo: Zoo, tmp_path: Path) -> None:
    """Which of the first ranks are left is any of them there."""
    spec = LoraSpec(r=4, variant="adalora", options={"total_step": 5, "target_r": 2}, target_modules=["0", "3"])
    theirs: Any = peft.get_peft_model(zoo.eager(MLP), peft.AdaLoraConfig(**spec.to_peft()))
    optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=1.0)
    for step in range(1, 7):
        optimizer.zero_grad()
        loss_of(theirs, MLP).backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
    theirs.save_pretrained(str(tmp_path))
    masks = json.loads((tmp_path / CONFIG).read_text())["rank_pattern"]
    assert sum(map(sum, masks.values())) == 4
    gm = zoo.adapted(MLP, as_spec(tmp_path))
    load_adapter(gm, tmp_path)
    assert {f"{s.name}.lora_E": s.r for s in find_adapter(gm).sites} == {n: sum(mask) for n, mask in masks.items()}
    assert_same_outputs(gm, theirs, MLP)


@pytest.mark.xdist_group("mlp")
class TestProjections:
    """VeRA's shared matrices: drawn from a seed, in the file if asked for."""

    def vera(self, zoo: Zoo, seed: int = 0, **options: Any) -> CapturedModule:
        return adapted(zoo, MLP, variant="vera", alpha=3, options={"projection_prng_key": seed, **options})

    def test_they_are_in_the_file_and_read_from_it(self, zoo: Zoo, tmp_path: Path) -> None:
        gm = self.vera(zoo, seed=4)
        save_adapter(gm, tmp_path)
        assert {tuple(load_file(tmp_path / WEIGHTS)[f"base_model.vera_{n}"].shape) for n in "AB"} == {(3, 33), (33, 3)}
        other = self.vera(zoo)  # of another seed: what counts is what was loaded
        load_adapter(other, tmp_path)
        assert_same_outputs(other, gm, MLP)
        other = self.vera(zoo, save_projection=False)
        load_adapter(other, tmp_path)
        save_adapter(other, tmp_path / "again")  # nor is it lost because a seed would not give it
        assert_same_outputs(gm, peft_loads(zoo.eager(MLP), tmp_path / "again"), MLP)

    def test_they_are_drawn_from_the_seed(self, zoo: Zoo, tmp_path: Path) -> None:
        gm = self.vera(zoo, seed=4, save_projection=False)
        save_adapter(gm, tmp_path)
        assert not [key for key in load_file(tmp_path / WEIGHTS) if "vera_A" in key]
        with pytest.warns(UserWarning, match="Specified to not (save|load) vera_A and vera_B"):
            theirs = peft.PeftModel.from_pretrained(zoo.eager(MLP), str(tmp_path))
        assert_same_outputs(gm, theirs, MLP)
        again = zoo.adapted(MLP, as_spec(tmp_path))
        load_adapter(again, tmp_path)
        assert_same_outputs(again, gm, MLP)
        with pytest.raises(
            AdapterError, match=r"projection_prng_key=0 in the graph, 4 in adapter_config\.json, and no"
        ):
            load_adapter(self.vera(zoo), tmp_path)

    def test_values_of_ranks_that_a_site_has_not_are_refused(self, zoo: Zoo, tmp_path: Path) -> None:
        save_adapter(self.vera(zoo), tmp_path)
        narrow = adapted(zoo, MLP, variant="vera", alpha=3, rank_pattern={"0": 2})
        with pytest.raises(AdapterError, match=r"0\.vera_lambda_d: has values beyond the site's rank of 2"):
            load_adapter(narrow, tmp_path)


# Parameters


class Experts(nn.Module):
    """Two stacks ``[experts, in, out]`` as GPT-OSS has them, and one ``[experts, out, in]``; all used by the module."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.second = nn.Parameter(torch.randn(3, 4, 6))
        self.first = nn.Parameter(torch.randn(3, 6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.first).tanh() @ self.second


class Mixture(nn.Module):
    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"experts": Experts(is_transposed)})
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.block["experts"](x).mean(0))
        return out


def own_family(name: str, build: Callable[[], nn.Module], *shape: int) -> Family:
    def built() -> nn.Module:
        torch.manual_seed(0)
        return build().eval()

    def inputs() -> dict[str, Tensor]:
        return {"x": torch.randn(*shape, generator=torch.Generator().manual_seed(0))}

    return dataclasses.replace(MLP, name=name, build=built, inputs=inputs)


@pytest.mark.parametrize("is_transposed", [True, False])
def test_stacks_of_parameters_as_pefts_nested_wrappers(zoo: Zoo, is_transposed: bool, tmp_path: Path) -> None:
    family = own_family("experts", lambda: Mixture(is_transposed), 5, 6)
    fields = {
        "target_modules": ["head"],
        "target_parameters": ["experts.first", "second"],
        "rank_pattern": {"second": 2},
    }
    gm = adapted(zoo, family, **fields)
    save_adapter(gm, tmp_path)
    assert_same_outputs(gm, peft_loads(zoo.eager(family), tmp_path), family)
    ranks = {"base_layer.": 2, "": 3}  # the module has "second" first: PEFT wraps it first
    for wrapper, r in ranks.items():
        assert len(load_file(tmp_path / WEIGHTS)[f"base_model.model.block.experts.{wrapper}lora_A.weight"]) == 3 * r


@pytest.mark.parametrize("transposed", [False, True])
def test_a_matrix_that_its_module_computes_with(zoo: Zoo, transposed: bool, tmp_path: Path) -> None:
    """PEFT takes any matrix for ``[out, in]``; where it is used the other way round, the factors change places."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(6, 4) if transposed else torch.randn(4, 6))

        def forward(self, x: Tensor) -> Tensor:
            zero = torch.zeros(4)
            return torch.addmm(zero, x, self.matrix) if transposed else nn.functional.linear(x, self.matrix)

    family = own_family(f"matrix {transposed}", lambda: nn.Sequential(nn.Linear(6, 6), Inner()), 5, 6)
    family = replace(family, inputs=lambda: {"input": torch.ones(5, 6)})
    gm = adapted(zoo, family, target_modules=["0", "1.matrix"])
    assert {site.kind for site in sites(gm)} == {"linear", *(["addmm"] if transposed else [])}
    save_adapter(gm, tmp_path)
    assert_same_outputs(gm, peft_loads(zoo.eager(family), tmp_path), family)


# Attention


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.attention(x, x, x, need_weights=False)[0])
        return out


ATTENTION = own_family("attention", Attention, 2, 5, 8)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["attention"]},
        {"target_modules": ["attention"], "rank_pattern": {"attention": 2}},
        {"target_modules": ["attention.q", "attention.v"], "rslora": True},
        {"target_modules": ["attention.k", "out_proj", "head"], "rank_pattern": {"out_proj": 5}},
        {"target_modules": ["attention.out_proj"]},
    ],
)
def test_attention_as_a_whole(zoo: Zoo, fields: dict[str, Any], tmp_path: Path) -> None:
    """PEFT adapts the projections of an attention together or not at all: what has no adapter gets zeros."""
    gm = adapted(zoo, ATTENTION, **fields)
    save_adapter(gm, tmp_path / "ours")
    theirs = peft_loads(zoo.eager(ATTENTION), tmp_path / "ours")
    assert_same_outputs(gm, theirs, ATTENTION)
    own = adapted(zoo, ATTENTION, **fields)
    load_adapter(own, tmp_path / "ours")
    for name, value in adapter_state_dict(gm).items():  # their scalings differ, of which PEFT has one for all
        assert_close("peft", adapter_state_dict(own)[name], value)

    settings = {**json.loads((tmp_path / "ours" / CONFIG).read_text()), "inference_mode": False}
    theirs = peft_saves(zoo.eager(ATTENTION), tmp_path / "theirs", settings)
    again = zoo.adapted(ATTENTION, as_spec(tmp_path / "theirs"))
    load_adapter(again, tmp_path / "theirs")
    assert_same_outputs(again, theirs, ATTENTION)
    if len(fields["target_modules"]) > 1:
        with pytest.raises(AdapterError, match="adapts more than the sites that the graph has of this attention"):
            load_adapter(own, tmp_path / "theirs")


def test_peft_adds_the_update_of_an_attentions_output_twice(zoo: Zoo, tmp_path: Path) -> None:
    """Which the file therefore means: half of it is in there. When PEFT changes that, this fails."""
    gm = adapted(zoo, ATTENTION, target_modules=["attention.out_proj"])
    save_adapter(gm, tmp_path)
    given = load_file(tmp_path / WEIGHTS)["base_model.model.attention.base_layer.out_proj.lora_B.weight"]
    assert torch.equal(2 * given, get_path(gm, "attention.out_proj.lora_B.default"))
    assert_same_outputs(gm, peft_loads(zoo.eager(ATTENTION), tmp_path), ATTENTION)


def test_an_attention_by_another_variant_has_no_place(zoo: Zoo, tmp_path: Path) -> None:
    gm = adapted(zoo, ATTENTION, target_modules=["attention"], variant="dora")
    with pytest.raises(
        AdapterError, match=r"PEFT adapts 'attention' \(nn\.MultiheadAttention\) by LoRA only, not by dora"
    ):
        save_adapter(gm, tmp_path)


# What PEFT lacks, and says so


@pytest.mark.xdist_group("llama")
@pytest.mark.parametrize(
    "fields", [{"trainable_token_indices": {"embed_tokens": [1]}}, {"target_parameters": ["up_proj.weight"]}]
)
def test_what_a_config_has_no_key_for_is_refused(zoo: Zoo, fields: dict[str, Any], tmp_path: Path) -> None:
    gm = adapted(zoo, FAMILIES["llama"], variant="vera", target_modules=["q_proj"], **fields)
    message = rf"the adapter cannot be written: .* VERA has no key for LoraSpec\.{next(iter(fields))}=.* convert it"
    with pytest.raises(AdapterError, match=message):
        save_adapter(gm, tmp_path)
    assert not list(tmp_path.iterdir())


def test_grouped_convolutions_keep_to_the_rules_and_peft_refuses_them(tmp_path: Path) -> None:
    """Its adapter of such a layer reads the channels of all groups, so that no kernel could hold it."""
    model = nn.Sequential(nn.Conv1d(4, 6, 3, groups=2), nn.Flatten())
    x = torch.randn(2, 4, 7)
    with pytest.warns(lorafx.FixedDimensionWarning):
        gm, again = (lorafx.apply(model, LoraSpec(r=2, target_modules=["0"]), x) for _ in range(2))
    randomize(gm)
    save_adapter(gm, tmp_path)
    load_adapter(again, tmp_path)
    assert same(adapter_state_dict(again), adapter_state_dict(gm))
    with pytest.raises(RuntimeError, match=r"size mismatch for .*lora_A"), warnings.catch_warnings(action="ignore"):
        peft.PeftModel.from_pretrained(model, str(tmp_path))


# Starts that change the base


@pytest.mark.xdist_group("mlp")
def test_a_start_that_changed_the_base_is_saved_as_plain_lora_of_the_original(zoo: Zoo, tmp_path: Path) -> None:
    gm = adapted(zoo, MLP, init="pissa", rank_pattern={"3": 2})
    save_adapter(gm, tmp_path / "plain")
    plain = as_spec(tmp_path / "plain")
    assert (plain.init, [plain.rank_for(n) for n in ("0", "3")]) == ("kaiming", [6, 4])
    message = r"relative to what init='pissa' leaves of it in the graph, and to the weight itself in the file"
    with pytest.raises(AdapterError, match=message):
        load_adapter(gm, tmp_path / "plain")

    # PEFT's own file of a PiSSA adapter is relative to what is left, which it computes anew when it loads one.
    theirs = peft_saves(
        zoo.eager(MLP), tmp_path / "raw", LoraSpec(r=3, init="pissa", target_modules=["0", "3"]).to_peft()
    )
    for init, here in (("kaiming", "the weight itself"), ("olora", "what init='olora' leaves of it")):
        with pytest.raises(AdapterError, match=rf"relative to {here} in the graph, and to what init='pissa' leaves of"):
            load_adapter(adapted(zoo, MLP, init=init), tmp_path / "raw")
    config = json.loads((tmp_path / "raw" / CONFIG).read_text())
    (tmp_path / "raw" / CONFIG).write_text(json.dumps({**config, "init_lora_weights": "lora_ga"}))
    with pytest.raises(
        AdapterError, match=r"to what init='lora_ga' leaves of it in the file, which depends on the data"
    ):
        load_adapter(zoo.adapted(MLP, as_spec(tmp_path / "raw")), tmp_path / "raw")
    (tmp_path / "raw" / CONFIG).write_text(json.dumps(config))
    again = zoo.adapted(MLP, as_spec(tmp_path / "raw"))
    load_adapter(again, tmp_path / "raw")
    assert_same_outputs(again, theirs, MLP)


# Files with more in them, and adapters by name


@pytest.mark.xdist_group("llama")
def test_the_weight_of_an_adapted_embedding_that_peft_adds_must_be_the_bases(zoo: Zoo, tmp_path: Path) -> None:
    llama = FAMILIES["llama"]
    peft_saves(zoo.eager(llama), tmp_path, LoraSpec(r=2, target_modules=["embed_tokens"]).to_peft())
    tensors, key = load_file(tmp_path / WEIGHTS), "base_model.model.model.embed_tokens.base_layer.weight"
    gm = zoo.adapted(llama, as_spec(tmp_path))
    load_adapter(gm, tmp_path)
    save_file({**tensors, key: tensors[key] + 1}, tmp_path / WEIGHTS)
    with pytest.raises(AdapterError, match=rf"{key}: a weight of the base, which differs from the graph's"):
        load_adapter(gm, tmp_path)


@pytest.mark.xdist_group("mlp")
def test_adapters_of_a_graph_by_name(zoo: Zoo, tmp_path: Path) -> None:
    gm = adapted(zoo, MLP)
    vera = LoraSpec(r=2, variant="vera", target_modules=["3"], modules_to_save=["5"])
    lorafx.add_adapter(gm, vera, "fr")
    lorafx.set_adapter(gm, "fr")
    randomize(gm)
    for name in ("default", "fr"):
        save_adapter(gm, tmp_path / name, name)
    before = {name: copy.deepcopy(adapter_state_dict(gm, name)) for name in ("default", "fr")}
    theirs = peft_loads(zoo.eager(MLP), tmp_path / "fr")
    assert_same_outputs(gm, theirs, MLP)

    lorafx.add_adapter(gm, tmp_path / "fr", "again")
    load_adapter(gm, tmp_path / "fr", "again")
    lorafx.set_adapter(gm, "again")
    assert_same_outputs(gm, theirs, MLP)
    assert same({name: adapter_state_dict(gm, name) for name in before}, before)
    with pytest.raises(AdapterError, match="there is no adapter 'fe'"):
        load_adapter(gm, tmp_path / "fr", "fe")
    with pytest.raises(AdapterError, match=r"site '0': lora, r=3, .* in the graph; vera, r=2, "):
        load_adapter(gm, tmp_path / "fr", "default")
    lorafx.set_adapter(gm, "fr")
    lorafx.merge(gm, inplace=True)
    with pytest.raises(AdapterError, match=r"adapter 'fr' is merged into the weights; call unmerge"):
        load_adapter(gm, tmp_path / "fr", "fr")


@pytest.mark.xdist_group("mlp")
def test_several_specs_of_one_variant_become_one_config(zoo: Zoo, tmp_path: Path) -> None:
    for variant, options in (("dora", {}), ("vera", {}), ("adalora", STEPS["options"])):
        common: dict[str, Any] = {"variant": variant, "options": options}
        specs = [LoraSpec(r=2, alpha=3, target_modules=["0"], **common), LoraSpec(r=4, target_modules=["3"], **common)]
        gm = lorafx.apply(MLP.build(), specs, MLP.inputs())
        randomize(gm, 0.2)
        save_adapter(gm, tmp_path / variant)
        assert_same_outputs(gm, peft_loads(zoo.eager(MLP), tmp_path / variant), MLP)
