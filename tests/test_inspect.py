"""Inspecting adapters: the numbers against decompositions of the whole changes, on disk and in graphs."""

from __future__ import annotations

import copy
import json
import math
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import peft
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import kinds
import lorafx
from conftest import Zoo
from lorafx import AdapterError, Inspection, LoraSpec, inspect_adapter, plot_inspection
from lorafx.api import captured
from lorafx.graph import CapturedModule
from lorafx.inspection.plot import PlotError, grid, place
from lorafx.inspection.report import SiteInspection, effective_rank
from lorafx.ir import adapters
from lorafx.passes.resize import resize
from lorafx.spec import as_spec
from tolerances import assert_close
from zoo import FAMILIES

pytestmark = pytest.mark.xdist_group("inspect")

LAYERS = ["embed", "conv", "up", "down", "head"]
SPECS: dict[str, LoraSpec] = {
    "lora": LoraSpec(r=2, alpha=3, target_modules=LAYERS, rank_pattern={"up": 4}, alpha_pattern={"conv": 7}),
    "rslora": LoraSpec(r=3, alpha=5, rslora=True, target_modules=LAYERS),
    "bias": LoraSpec(r=2, variant="lora_bias", target_modules=["conv", "up"]),
    "attention": LoraSpec(r=2, target_modules=["attn"]),
    "experts": LoraSpec(r=2, alpha=6, target_modules=["up"], target_parameters=["stack"]),
    "adalora": LoraSpec(r=3, variant="adalora", target_modules=["up", "down"], options={"total_step": 9}),
    "adalora experts": LoraSpec(r=3, variant="adalora", target_modules=["conv"], target_parameters=["stack"]),
    "head": LoraSpec(r=2, target_modules=["up"], modules_to_save=["head"]),
    "dora": LoraSpec(r=2, variant="dora", target_modules=["conv", "up"]),
    "vera": LoraSpec(r=4, variant="vera", target_modules=["up", "down"]),
    "tokens": LoraSpec(r=2, target_modules=["up"], trainable_token_indices={"embed": [1, 5]}),
}
#: What the files of these do not say by themselves.
NEED_BASE = ("dora", "vera", "tokens")


@cache
def graph() -> CapturedModule:
    """The graph without adapters. Shared: copied before it is changed."""
    return captured(kinds.build(), kinds.inputs(), None)


@cache
def adapted(key: str) -> CapturedModule:
    gm = copy.deepcopy(graph())
    lorafx.add_adapter(gm, SPECS[key], "default", seed=0)
    lorafx.set_adapter(gm, "default")
    return kinds.fill(gm)


def saved(key: str, directory: Path) -> Path:
    lorafx.save_adapter(adapted(key), directory)
    return directory


def assert_alike(found: SiteInspection, wanted: SiteInspection) -> None:
    """The same numbers, but for rounding to the file's dtype and back."""
    assert (found.site, found.variant, found.rank) == (wanted.site, wanted.variant, wanted.rank)
    length = min(len(found.singular_values), len(wanted.singular_values))
    for one, other in (
        (found.singular_values[:length], wanted.singular_values[:length]),
        (
            (found.norm, found.spectral_norm, found.effective_rank),
            (wanted.norm, wanted.spectral_norm, wanted.effective_rank),
        ),
    ):
        assert_close("model", torch.tensor(one, dtype=torch.float64), torch.tensor(other, dtype=torch.float64))


# The numbers


@pytest.mark.parametrize("key", SPECS)
def test_a_graph_shows_what_merging_changes(key: str) -> None:
    gm = adapted(key)
    found = {s.site: s for s in inspect_adapter(gm).sites}
    changes, base = kinds.deltas(gm, "default"), lorafx.unadapted(gm).state_dict()
    assert found.keys() == {s.name for s in adapters(gm)["default"].sites}
    for site in adapters(gm)["default"].sites:
        matrix, said = site.matrix(changes[site.weight]), found[site.name]
        values = torch.linalg.svdvals(matrix)
        several = values.reshape(-1, values.shape[-1])
        ranks = torch.stack([effective_rank(row) for row in several])
        wanted = SiteInspection(
            site.name,
            site.variant,
            site.r,
            site.scaling,
            site.shape,
            tuple(several.square().mean(0).sqrt().tolist()),
            float(matrix.norm()),
            float(values.max()),
            float(ranks.mean()),
        )
        assert_alike(said, wanted)
        assert said.shape == site.shape
        assert said.share == pytest.approx(float(matrix.norm() / site.matrix(base[site.weight]).norm()), rel=1e-9)


@pytest.mark.parametrize("key", [k for k in SPECS if k not in NEED_BASE])
def test_a_file_shows_what_the_graph_does(key: str, tmp_path: Path) -> None:
    """Without the base model; PEFT's own name for a site where it has one for several of the graph's."""
    wanted = {s.site: s for s in inspect_adapter(adapted(key)).sites}
    found = inspect_adapter(saved(key, tmp_path))
    assert {s.site for s in found.sites} == wanted.keys()
    for site in found.sites:
        assert_alike(site, wanted[site.site])
        assert site.scaling is not None
        assert site.share is None
    assert [n.startswith("trained whole: head.") for n in found.notes] == ([True] if key == "head" else [])


@pytest.mark.parametrize("key", SPECS)
def test_with_the_base_model_all_is_known(key: str, tmp_path: Path) -> None:
    wanted = {s.site: s for s in inspect_adapter(adapted(key)).sites}
    found = inspect_adapter(saved(key, tmp_path), base=kinds.build(), example_inputs=kinds.inputs())
    assert {s.site for s in found.sites} == wanted.keys()
    for site in found.sites:
        assert_alike(site, wanted[site.site])
        assert site.share == pytest.approx(wanted[site.site].share, rel=1e-9)


@pytest.mark.parametrize("key", NEED_BASE)
def test_what_needs_the_base_model_says_so(key: str, tmp_path: Path) -> None:
    found = inspect_adapter(saved(key, tmp_path))
    missing = [s for s in found.sites if s.norm is None]
    assert {s.site for s in missing} == ({"embed"} if key == "tokens" else {s.site for s in found.sites})
    ranks = {s.name: s.r for s in adapters(adapted(key))["default"].sites}
    assert all("give the base model" in s.note and s.rank == ranks[s.site] for s in missing)
    assert "no numbers for" in str(found)


def test_pefts_files_of_every_variant(zoo: Zoo, tmp_path: Path) -> None:
    """As PEFT itself computes the changes."""
    mlp, targets = FAMILIES["mlp"], ["0", "3"]
    configs: dict[str, peft.PeftConfig] = {
        "lora": peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, rank_pattern={"3": 2}),
        "rslora": peft.LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=targets),
        "dora": peft.LoraConfig(r=3, use_dora=True, target_modules=targets),
        "adalora": peft.AdaLoraConfig(init_r=3, target_modules=targets, total_step=9),
        "vera": peft.VeraConfig(r=8, target_modules=targets),
    }
    for key, config in configs.items():
        theirs = peft.get_peft_model(zoo.eager(mlp), config)
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.3)
        theirs.save_pretrained(tmp_path / key)
        base = zoo.eager(mlp)
        merged = theirs.merge_and_unload().state_dict()
        found = inspect_adapter(tmp_path / key, base=base, example_inputs=mlp.inputs())
        assert len(found.sites) == 2
        for site in found.sites:
            weight = base.state_dict()[f"{site.site}.weight"]
            values = torch.linalg.svdvals(merged[f"{site.site}.weight"].double() - weight.double())
            assert_close("peft", torch.tensor(site.norm), values.norm().float())
            kept = site.singular_values[:3]
            assert_close("peft", torch.tensor(kept), values[: len(kept)].float())
            assert_close("peft", torch.tensor(site.share), (values.norm() / weight.norm()).float())


@pytest.mark.xdist_group("mixtral")
def test_pefts_experts_with_several_parameters(zoo: Zoo, tmp_path: Path) -> None:
    """Which parameter a tensor of the file is for, only the model tells."""
    mixtral, parameters = FAMILIES["mixtral"], ["gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=[], target_parameters=parameters)
    theirs = peft.get_peft_model(zoo.eager(mixtral), config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    theirs.save_pretrained(tmp_path)
    gm = zoo.adapted(mixtral, as_spec(tmp_path))
    lorafx.load_adapter(gm, tmp_path)
    whole, alone = inspect_adapter(gm), inspect_adapter(tmp_path)
    base, merged = zoo.eager(mixtral).state_dict(), theirs.merge_and_unload().state_dict()
    for site in whole.sites:
        change = {n.replace(".base_layer", ""): t for n, t in merged.items()}[site.site] - base[site.site]
        assert_close("peft", torch.tensor(site.norm), change.norm())
    assert [s.site.rpartition(".")[2] for s in alone.sites] == [f"experts (parameter {i} of 2)" for i in (1, 2, 1, 2)]
    for found, wanted in zip(alone.sites, whole.sites, strict=True):
        assert_alike(replace(found, site=wanted.site), wanted)


def test_the_product_is_never_formed(tmp_path: Path) -> None:
    """It would have 160 GB. The factors' columns are orthogonal, so that the answer is known."""
    size = 200_000
    a, b = torch.zeros(2, size), torch.zeros(size, 2)
    a[0, :4], a[1, 4:8], b[:9, 0], b[9:18, 1] = 1.0, 0.5, 2.0, 1.0
    LoraSpec(r=2, alpha=2, target_modules=["wide"]).to_json(tmp_path / "adapter_config.json")
    tensors = {"base_model.model.wide.lora_A.weight": a, "base_model.model.wide.lora_B.weight": b}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (site,) = inspect_adapter(tmp_path).sites
    assert site.shape == (size, size)
    assert_close("layer", torch.tensor(site.singular_values, dtype=torch.float64), torch.tensor([12.0, 3.0]).double())
    assert site.effective_rank == pytest.approx(math.exp(-0.8 * math.log(0.8) - 0.2 * math.log(0.2)), rel=1e-12)


@pytest.mark.parametrize(
    ("values", "rank"),
    [([3.0], 1.0), ([2.0, 2.0, 2.0, 2.0], 4.0), ([1.0, 0.0, 0.0], 1.0), ([0.0, 0.0], 0.0), ([0.5, 0.25, 0.25], 2**1.5)],
)
def test_the_effective_rank(values: list[float], rank: float) -> None:
    assert_close("layer", effective_rank(torch.tensor(values).double()), torch.tensor(rank, dtype=torch.float64))


def test_a_start_that_took_from_the_weights_is_noted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 9))
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa")
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    (note,) = inspect_adapter(tmp_path).notes
    assert "it started by pissa" in note


# The table, the data and the picture


def test_the_table_and_the_data(tmp_path: Path) -> None:
    found = inspect_adapter(saved("lora", tmp_path / "my"), base=kinds.build())
    shown = str(found)
    assert "adapter my" in shown
    assert all(s.site in shown and f"{s.share:.2%}" in shown for s in found.sites)
    data = json.loads(json.dumps(found.to_dict()))
    assert data["norm"] == found.norm
    assert [s["site"] for s in data["sites"]] == [s.site for s in found.sites]
    assert data["sites"][0]["singular_values"] == list(found.sites[0].singular_values)


@pytest.mark.parametrize(
    ("site", "kind", "layer"),
    [
        ("model.layers.3.mlp.up_proj", "mlp.up_proj", 3),
        ("transformer.h.11.attn.c_attn", "attn.c_attn", 11),
        ("model.layers.0.experts.7.w1", "experts.7.w1", 0),
        ("lm_head", "lm_head", None),
        ("classifier.dense", "classifier.dense", None),
        ("3", "layer", 3),
        ("features.4", "features", 4),
    ],
)
def test_where_a_site_is(site: str, kind: str, layer: int | None) -> None:
    assert place(site) == (kind, layer)


def site_of(
    name: str, norm: float = 1.0, share: float | None = None, values: tuple[float, ...] = (1.0, 0.1)
) -> SiteInspection:
    return SiteInspection(name, "lora", 2, 1.0, (4, 4), values, norm, values[0], 1.4, share)


def test_layers_are_in_the_order_of_their_numbers() -> None:
    names = [f"layers.{i}.{kind}" for i in (0, 10, 2) for kind in ("q", "up")] + ["embed"]
    rows, columns, cells = grid([site_of(n) for n in names])
    assert rows == ["q", "up", "embed"]
    assert columns == ["0", "2", "10", "–"]
    assert cells["q", "10"].site == "layers.10.q"
    assert cells["embed", "–"].site == "embed"
    rows, _, cells = grid([site_of("encoder.layers.0.q"), site_of("decoder.layers.0.q")])
    assert rows == ["encoder.layers: q", "decoder.layers: q"]
    assert len(cells) == 2


@pytest.mark.parametrize("share", [None, 0.02])
def test_a_picture_is_drawn(share: float | None, tmp_path: Path) -> None:
    kinds_of = ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"]
    sites = [site_of(f"layers.{i}.{k}", 1.0 + i, share) for i in range(12) for k in kinds_of]
    zero = SiteInspection("embed", "lora", 2, 1.0, (4, 4), (0.0, 0.0), 0.0, 0.0, 0.0, share)
    unknown = SiteInspection("head", "dora", 2, 1.0, None, note="give the base model")
    path = tmp_path / "learned.png"
    plot_inspection(Inspection("mine", (*sites, zero, unknown)), path)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.width > 1000
        assert picture.height > 600
        colors = picture.convert("RGB").getcolors(maxcolors=1 << 20)
    assert colors is not None
    assert len(colors) > 50


def test_a_picture_says_what_it_shows(tmp_path: Path) -> None:
    plot_inspection(inspect_adapter(adapted("lora")), tmp_path / "learned.svg")
    text = (tmp_path / "learned.svg").read_text()
    for words in (
        "adapter default: 5 sites",
        "share of the base weight's norm (%)",
        "Singular values",
        "effective rank",
    ):
        assert f"<!-- {words}" in text or words in text, words


# What is refused


def test_what_cannot_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = Inspection("mine", (SiteInspection("head", "dora", 2, 1.0, None, note="give the base model"),))
    with pytest.raises(PlotError, match="nothing to draw of adapter mine: give the base model"):
        plot_inspection(nothing, tmp_path / "a.png")
    some = Inspection("mine", (site_of("layers.0.q"),))
    with pytest.raises(PlotError, match="the picture cannot be written"):
        plot_inspection(some, tmp_path / "missing" / "a.png")
    with pytest.raises(PlotError, match="the picture cannot be written"):
        plot_inspection(some, tmp_path / "a.txt")
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PlotError, match=r"needs matplotlib: pip install 'lorafx\[plot\]'"):
        plot_inspection(some, tmp_path / "a.png")


def test_directories_that_cannot_be_inspected(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no such directory"):
        inspect_adapter(tmp_path / "missing")
    directory = saved("lora", tmp_path / "adapter")
    tensors = load_file(directory / "adapter_model.safetensors")

    def written(kept: dict[str, Tensor]) -> Path:
        save_file(kept, directory / "adapter_model.safetensors")
        return directory

    with pytest.raises(AdapterError, match=r"site 'up': the file lacks its lora_B"):
        inspect_adapter(written({k: t for k, t in tensors.items() if "up.lora_B" not in k}))
    odd = {**tensors, "base_model.model.up.lora_B.weight": torch.ones(10, 3)}
    with pytest.raises(AdapterError, match=r"site 'up': lora_B is \[10, 3\], which does not go with the others of it"):
        inspect_adapter(written(odd))
    with pytest.raises(AdapterError, match=r"has no site of an adapter, only head\.weight"):
        inspect_adapter(written({"base_model.model.head.weight": torch.ones(2, 2)}))
    written(tensors)
    with pytest.raises(AdapterError, match=r"site '.*' is not in the base model"):
        inspect_adapter(directory, base=nn.Sequential(nn.Linear(2, 2)))
    (directory / "adapter_model.safetensors").write_bytes(b"cut off")
    with pytest.raises(AdapterError, match="not a whole safetensors file"):
        inspect_adapter(directory)


def test_numbers_that_are_none(tmp_path: Path) -> None:
    directory = saved("lora", tmp_path)
    tensors = load_file(directory / "adapter_model.safetensors")
    tensors["base_model.model.up.lora_A.weight"][0, 0] = float("nan")
    save_file(tensors, directory / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"site 'up': lora_A holds NaN or Inf"):
        inspect_adapter(directory)


def test_sites_whose_ranks_are_all_gone(tmp_path: Path) -> None:
    """What a rank scheduler left nothing of is a change of zero, in graphs, files and pictures."""
    gm = copy.deepcopy(graph())
    spec = LoraSpec(r=3, variant="adalora", target_modules=["up", "conv"], target_parameters=["experts.stack"])
    lorafx.add_adapter(gm, spec, "default")
    lorafx.set_adapter(gm, "default")
    kinds.fill(gm)
    for gone in (["up", "experts.stack"], ["conv"]):
        resize(gm, {name: [] for name in gone})
        lorafx.save_adapter(gm, tmp_path / "adapter")
        with_base = inspect_adapter(tmp_path / "adapter", base=kinds.build(), example_inputs=kinds.inputs())
        for result in (inspect_adapter(gm), inspect_adapter(tmp_path / "adapter"), with_base):
            sites = {s.site: s for s in result.sites}
            assert sites.keys() == {"up", "conv", "experts.stack"}
            assert (sites["up"].rank, sites["up"].norm, sites["up"].effective_rank) == (0, 0.0, 0.0)
            assert sites["up"].singular_values == sites["experts.stack"].singular_values == ()
            assert (sites["conv"].norm == 0.0) == (gone == ["conv"])
            plot_inspection(result, tmp_path / "a.png")


def test_a_directory_holds_one_adapter(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"adapter='other' means nothing here.*by base=model"):
        inspect_adapter(saved("lora", tmp_path), "other")


def test_graphs_that_cannot_be_inspected() -> None:
    gm = adapted("lora")
    with pytest.raises(AdapterError, match=r"there is no adapter 'defalt'.*did you mean 'default'"):
        inspect_adapter(gm, "defalt")
    with pytest.raises(AdapterError, match="has no adapters"):
        inspect_adapter(lorafx.unadapted(gm))
