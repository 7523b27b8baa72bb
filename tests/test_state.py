"""Adapters on disk: PEFT reads ours, we read PEFT's, and a file that does not fit changes nothing."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import lorafx
from conftest import Zoo, leaves, randomize, same
from lorafx import AdapterError, LoraSpec, sites
from lorafx.graph import CapturedModule, get_path
from lorafx.spec import as_spec
from lorafx.state import adapter_state_dict, load_adapter, save_adapter
from tolerances import assert_close
from zoo import FAMILIES, Family

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

DISK = [pytest.param(FAMILIES[n], marks=pytest.mark.xdist_group(n), id=n) for n in ("bert", "llama", "gpt2")]
MLP, CONVNET = FAMILIES["mlp"], FAMILIES["convnet"]

# What the three families call their parts.
ATTENTION = ["query", "value", "q_proj", "v_proj", "c_attn"]
WHOLE = {"bert": "classifier", "llama": "lm_head", "gpt2": "ln_f"}


def some_layers(family: Family, **fields: Any) -> LoraSpec:
    """A spec whose targets are names that this family has."""
    names = [n for n, _ in family.build().named_modules()]
    targets = [t for t in ATTENTION if any(n.endswith(f".{t}") for n in names)]
    return LoraSpec(**{"r": 3, "alpha": 5, "target_modules": targets, **fields})


SPECS: dict[str, Callable[[Family], LoraSpec]] = {
    "all-linear": lambda family: LoraSpec(r=3, alpha=5),
    "patterns": lambda family: LoraSpec(
        r=4,
        alpha=6,
        rslora=True,
        dropout=0.1,
        init="gaussian",
        rank_pattern={r".*1\..*(query|q_proj|c_attn)": 2},
        alpha_pattern={".*(dense|o_proj|c_proj)": 1.5},
    ),
    "lora_only": lambda family: some_layers(family, bias="lora_only"),
    "all_biases": lambda family: some_layers(family, bias="all"),
    "modules_to_save": lambda family: some_layers(family, modules_to_save=[WHOLE[family.name]]),
    "both": lambda family: some_layers(family, bias="all", modules_to_save=[WHOLE[family.name]]),
}


def assert_same_outputs(ours: nn.Module, theirs: nn.Module, family: Family) -> None:
    actual, expected = (leaves(model.eval()(**family.inputs())) for model in (ours, theirs))
    for a, e in zip(actual, expected, strict=True):
        assert_close("peft", a, e)


def peft_loads(base: nn.Module, directory: Path) -> peft.PeftModel:
    """PEFT's model from ``directory``; its warnings about missing tensors and the like are failures."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        return peft.PeftModel.from_pretrained(base, str(directory))


def peft_saves(base: nn.Module, directory: Path, **config: Any) -> peft.PeftModel:
    """PEFT's model with an adapter that was trained a lot, saved."""
    model = peft.get_peft_model(base, peft.LoraConfig(**config))
    randomize(model)
    model.save_pretrained(str(directory))
    return model


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("model", DISK)
def test_peft_loads_what_we_save(zoo: Zoo, model: Family, spec: str, tmp_path: Path) -> None:
    gm = zoo.adapted(model, SPECS[spec](model))
    randomize(gm)
    save_adapter(gm, tmp_path)
    theirs = peft_loads(zoo.eager(model), tmp_path)

    adapted = {n for n, m in theirs.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert adapted == {s.name for s in sites(gm)}
    given = load_file(tmp_path / WEIGHTS)
    taken = peft.get_peft_model_state_dict(theirs)
    assert all(torch.equal(taken[key], given[key]) for key in given)
    assert_same_outputs(gm, theirs, model)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("model", DISK)
def test_we_load_what_peft_saves(zoo: Zoo, model: Family, spec: str, tmp_path: Path) -> None:
    config = SPECS[spec](model).to_peft()
    if config["target_modules"] == "all-linear":
        config["target_modules"] = list(some_layers(model).target_modules)
    theirs = peft_saves(zoo.eager(model), tmp_path, **config)
    gm = zoo.adapted(model, as_spec(tmp_path))
    load_adapter(gm, tmp_path)
    assert_same_outputs(gm, theirs, model)


@pytest.mark.xdist_group("bert")
def test_a_task_type_brings_the_head_that_peft_trains_with_it(zoo: Zoo, tmp_path: Path) -> None:
    bert = FAMILIES["bert"]
    theirs = peft_saves(zoo.eager(bert), tmp_path / "theirs", target_modules=["query"], task_type="SEQ_CLS")
    gm = zoo.adapted(bert, as_spec(tmp_path / "theirs"))
    load_adapter(gm, tmp_path / "theirs")
    assert_same_outputs(gm, theirs, bert)
    save_adapter(gm, tmp_path / "ours")
    again = peft_loads(zoo.eager(bert), tmp_path / "ours")
    assert isinstance(again, peft.PeftModelForSequenceClassification)
    assert_same_outputs(gm, again, bert)


@pytest.mark.xdist_group("convnet")
def test_buffers_of_modules_to_save_go_along_both_ways(zoo: Zoo, tmp_path: Path) -> None:
    spec = LoraSpec(r=2, modules_to_save=["features"])
    gm = zoo.adapted(CONVNET, spec)
    for _ in range(3):
        gm.train()(**CONVNET.inputs())  # moves BatchNorm's statistics
    save_adapter(gm, tmp_path)
    theirs = peft_loads(zoo.eager(CONVNET), tmp_path)
    assert_same_outputs(gm, theirs, CONVNET)
    model = zoo.eager(CONVNET)
    before = copy.deepcopy(model.state_dict())
    again = lorafx.apply(model, spec, CONVNET.inputs())
    load_adapter(again, tmp_path)
    assert same(dict(again.state_dict()), dict(gm.state_dict()))
    assert same(model.state_dict(), before)


@pytest.mark.xdist_group("gpt2")
def test_tied_modules_to_save_stay_tied(zoo: Zoo, tmp_path: Path) -> None:
    gpt2 = FAMILIES["gpt2"]
    spec = some_layers(gpt2, modules_to_save=["wte", "lm_head"])
    gm = zoo.adapted(gpt2, spec)
    randomize(gm)
    save_adapter(gm, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    names = "base_model.model.lm_head.weight", "base_model.model.transformer.wte.weight"
    assert torch.equal(*(tensors[n] for n in names))
    again = zoo.adapted(gpt2, spec)
    load_adapter(again, tmp_path)
    assert get_path(again, "lm_head.weight") is get_path(again, "transformer.wte.weight")
    assert_same_outputs(again, gm, gpt2)

    save_file({**tensors, names[0]: tensors[names[0]] + 1}, tmp_path / WEIGHTS)
    with pytest.raises(AdapterError, match=r"one tensor in the graph and differ in the file"):
        load_adapter(again, tmp_path)


@pytest.mark.xdist_group("llama")
def test_specs_that_differ_in_targets_and_ranks_become_one_config(zoo: Zoo, tmp_path: Path) -> None:
    llama = FAMILIES["llama"]
    specs = (
        LoraSpec(r=2, alpha=3, target_modules=["q_proj"], rank_pattern={"layers.1.*": 6}),
        LoraSpec(r=4, alpha=9, target_modules=["up_proj", "down_proj"], modules_to_save=["lm_head"]),
    )
    gm = lorafx.apply(zoo.eager(llama), specs, llama.inputs())
    randomize(gm)
    save_adapter(gm, tmp_path)
    assert_same_outputs(gm, peft_loads(zoo.eager(llama), tmp_path), llama)
    again = zoo.adapted(llama, as_spec(tmp_path))
    load_adapter(again, tmp_path)
    assert_same_outputs(gm, again, llama)


def adapted_mlp(zoo: Zoo, **fields: Any) -> CapturedModule:
    gm = zoo.adapted(MLP, LoraSpec(**{"r": 3, "alpha": 5, **fields}))
    randomize(gm)
    return gm


def same_adapter(a: CapturedModule, b: CapturedModule) -> bool:
    return sites(a) == sites(b) and same(adapter_state_dict(a), adapter_state_dict(b))


@pytest.mark.xdist_group("mlp")
class TestSaving:
    def test_a_round_trip_is_exact_and_keeps_parameters_and_metadata(self, zoo: Zoo, tmp_path: Path) -> None:
        gm = adapted_mlp(zoo, metadata={"revision": "main", "task_type": "FEATURE_EXTRACTION"})
        save_adapter(gm, tmp_path, metadata={"base_model_name_or_path": "some/base", "task_type": None})
        assert as_spec(tmp_path).target_modules == ("0", "3")  # PEFT's "all-linear" would take the head too
        assert dict(as_spec(tmp_path).metadata) == {
            "revision": "main",
            "base_model_name_or_path": "some/base",
            "inference_mode": True,
        }
        again = zoo.adapted(MLP, as_spec(tmp_path))
        held = dict(again.named_parameters())
        load_adapter(again, tmp_path)
        assert same(dict(again.state_dict()), dict(gm.state_dict()))
        assert all(p is held[n] for n, p in again.named_parameters())

    def test_settings_that_peft_understands_are_written_as_given(self, zoo: Zoo, tmp_path: Path) -> None:
        spec = LoraSpec(target_modules="(0|3|5)", exclude_modules=["5"], rank_pattern={"3": 2}, bias="lora_only")
        save_adapter(zoo.adapted(MLP, spec), tmp_path)
        assert as_spec(tmp_path) == spec

    def test_half_precision_is_kept_in_the_file_and_cast_to_the_graph(self, zoo: Zoo, tmp_path: Path) -> None:
        gm = adapted_mlp(zoo, adapter_dtype="bfloat16")
        save_adapter(gm, tmp_path)
        assert {t.dtype for t in load_file(tmp_path / WEIGHTS).values()} == {torch.bfloat16}
        wide = adapted_mlp(zoo)
        load_adapter(wide, tmp_path)
        assert same(adapter_state_dict(wide), {n: t.float() for n, t in adapter_state_dict(gm).items()})

    def test_other_files_in_the_directory_are_kept(self, zoo: Zoo, tmp_path: Path) -> None:
        (tmp_path / "README.md").write_text("a model card")
        save_adapter(adapted_mlp(zoo), tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", CONFIG, WEIGHTS]
        assert (tmp_path / "README.md").read_text() == "a model card"

    def test_nan_is_refused_before_a_good_adapter_is_overwritten(self, zoo: Zoo, tmp_path: Path) -> None:
        gm = adapted_mlp(zoo)
        save_adapter(gm, tmp_path)
        before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
        with torch.no_grad():
            next(p for p in gm.parameters() if p.requires_grad)[0, 0] = float("nan")
        with pytest.raises(AdapterError, match=r"0\.lora_A\.default: holds NaN or Inf as torch\.float32"):
            save_adapter(gm, tmp_path)
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before

    def test_a_path_that_cannot_be_written_is_an_adapter_error(self, zoo: Zoo, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(AdapterError, match=r"file: the adapter could not be written: .*exists"):
            save_adapter(adapted_mlp(zoo), tmp_path / "file")

    def test_a_merged_graph_has_no_adapter_to_save(self, zoo: Zoo, tmp_path: Path) -> None:
        with pytest.raises(AdapterError, match="the graph is merged and has no adapters"):
            save_adapter(lorafx.merge(adapted_mlp(zoo)), tmp_path)

    def test_specs_that_one_config_cannot_hold_are_refused(self, zoo: Zoo, tmp_path: Path) -> None:
        specs = LoraSpec(target_modules=["0"]), LoraSpec(target_modules=["3"], dropout=0.1, rslora=True)
        gm = lorafx.apply(MLP.build(), specs, MLP.inputs())
        with pytest.raises(AdapterError, match=r"2 specs that differ in rslora, dropout, .* one value"):
            save_adapter(gm, tmp_path)
        assert not list(tmp_path.iterdir())

    def test_metadata_of_several_specs_may_not_contradict(self, zoo: Zoo, tmp_path: Path) -> None:
        specs = [LoraSpec(target_modules=[n], metadata={"revision": n}) for n in ("0", "3")]
        gm = lorafx.apply(MLP.build(), specs, MLP.inputs())
        with pytest.raises(AdapterError, match=r"differ in metadata\['revision'\]"):
            save_adapter(gm, tmp_path)
        save_adapter(gm, tmp_path, metadata={"revision": "main"})
        assert as_spec(tmp_path).metadata["revision"] == "main"

    def test_a_task_type_for_a_head_that_did_not_train_is_refused(self, tmp_path: Path) -> None:
        model = nn.Sequential()
        model.add_module("hidden", nn.Linear(5, 4))
        model.add_module("classifier", nn.Linear(4, 3))
        gm = lorafx.apply(model, LoraSpec(target_modules=["hidden"]), torch.ones(2, 5))
        with pytest.raises(AdapterError, match=r"take \['classifier'\] for trained whole .* task_type='SEQ_CLS'"):
            save_adapter(gm, tmp_path, metadata={"task_type": "SEQ_CLS"})


class Died(BaseException):
    """Stands for the end of the process."""


def renames(patch: pytest.MonkeyPatch, allowed: int, error: BaseException, *, once: bool) -> None:
    """Let this many renames succeed; then raise at the next one, or at all that follow."""
    rename, calls = Path.replace, 0

    def counted(path: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == allowed + 1 or (calls > allowed and not once):
            raise error
        return rename(path, target)

    patch.setattr(Path, "replace", counted)


@pytest.mark.xdist_group("mlp")
@pytest.mark.parametrize(
    ("alpha", "expected"),
    [(5, ["old", "new"]), (50, ["old", "none", "none", "none", "new"])],
    ids=["same settings", "new settings"],
)
def test_a_process_that_dies_while_saving_leaves_a_whole_adapter_or_none(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alpha: float, expected: list[str]
) -> None:
    adapters = {"old": adapted_mlp(zoo), "new": adapted_mlp(zoo, alpha=alpha)}
    outcomes = []
    for survived in range(len(expected)):
        save_adapter(adapters["old"], tmp_path)
        with monkeypatch.context() as patch, contextlib.suppress(Died):
            renames(patch, survived, Died(), once=False)  # nor does a dead process put anything back
            save_adapter(adapters["new"], tmp_path)
        if not (tmp_path / CONFIG).exists():
            with pytest.raises(AdapterError, match=rf"{CONFIG}: no such file"):
                load_adapter(adapters["old"], tmp_path)
            outcomes.append("none")
            continue
        found = zoo.adapted(MLP, as_spec(tmp_path))
        load_adapter(found, tmp_path)
        outcomes += [n for n, gm in adapters.items() if same_adapter(gm, found)]
    assert outcomes == expected


@pytest.mark.xdist_group("mlp")
def test_an_error_while_saving_puts_the_old_adapter_back(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(adapted_mlp(zoo), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    new = adapted_mlp(zoo, alpha=50)
    for allowed in range(4):
        with monkeypatch.context() as patch:
            renames(patch, allowed, OSError("disk on fire"), once=True)
            with pytest.raises(AdapterError, match="could not be written: disk on fire"):
                save_adapter(new, tmp_path)
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


# Faults: what is done to the directory of a good adapter, and what is said of it.

Damage = Callable[[Path], object]
A, B = "base_model.model.0.lora_A.weight", "base_model.model.0.lora_B.weight"


def weights(change: Callable[[bytes], bytes]) -> Damage:
    return lambda d: (d / WEIGHTS).write_bytes(change((d / WEIGHTS).read_bytes()))


def flipped(at: int) -> Damage:
    return weights(lambda data: data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])


def config(**changes: Any) -> Damage:
    return lambda d: (d / CONFIG).write_text(json.dumps({**json.loads((d / CONFIG).read_text()), **changes}))


def tensors(changes: Mapping[str, Callable[[Tensor], Tensor] | None]) -> Damage:
    """Tensors by name become something else (None: are removed; new names start as ones)."""

    def damage(directory: Path) -> None:
        given = load_file(directory / WEIGHTS)
        for name, change in changes.items():
            old = given.pop(name, torch.ones(2))
            if change is not None:
                given[name] = change(old).contiguous()
        save_file(given, directory / WEIGHTS)

    return damage


def only_a_pickle(directory: Path) -> None:
    (directory / WEIGHTS).rename(directory / "adapter_model.bin")


FAULTS: Mapping[str, tuple[Damage, str]] = {
    "cut off": (
        weights(lambda data: data[:-7]),
        r"safetensors: not a whole safetensors file \(.*copy it again",
    ),
    "header length flipped": (flipped(7), "not a whole safetensors file"),
    "header flipped": (flipped(12), "not a whole safetensors file"),
    "empty": (weights(lambda data: b""), "not a whole safetensors file"),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), r"adapter_model\.safetensors: no such file"),
    "pickle": (only_a_pickle, r"adapter_model\.bin is not read: a pickle can run any code.*convert it"),
    "no directory": (shutil.rmtree, "no such directory"),
    "no config": (lambda d: (d / CONFIG).unlink(), r"adapter_config\.json: no such file"),
    "config cut off": (lambda d: (d / CONFIG).write_text("{"), r"adapter_config\.json: not valid JSON"),
    "another method": (config(peft_type="IA3"), "peft_type='IA3' is not supported"),
    "setting not supported": (config(use_qalora=True), "not supported by lorafx: use_qalora=True"),
    "another variant": (config(use_dora=True), r"site '0': lora, r=3, .* in the graph; dora, r=3, "),
    "another start": (
        config(init_lora_weights="pissa"),
        r"relative to the weight itself in the graph, and to what init='pissa'",
    ),
    "another rank": (
        config(rank_pattern={"3": 4}),
        r"site '3': lora, r=3, scaling=1\.66667 in the graph; lora, r=4, scaling=1\.25 in adapter_config",
    ),
    "another scaling": (config(use_rslora=True), r"site '0': .* in the graph; .* scaling=2\.88675"),
    "missing": (tensors({A: None}), r"missing: base_model\.model\.0\.lora_A\.weight"),
    "extra": (tensors({"9": torch.ones_like}), "not of this graph's adapter: '9'"),
    "wrong shape": (tensors({B: Tensor.t}), r"0\.lora_B\.weight: shape \(3, 33\), expected \(33, 3\)"),
    "integers": (tensors({A: Tensor.int}), r"0\.lora_A\.weight: dtype torch\.int32, expected torch\.float32"),
    "NaN": (tensors({A: lambda t: t * float("nan")}), r"0\.lora_A\.weight: holds NaN or Inf"),
    "too large": (tensors({A: lambda t: t.double() * 1e300}), r"holds NaN or Inf as torch\.float32"),
}


@pytest.mark.xdist_group("mlp")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_does_not_fit_changes_nothing(zoo: Zoo, tmp_path: Path, fault: str) -> None:
    damage, message = FAULTS[fault]
    save_adapter(adapted_mlp(zoo), tmp_path)
    damage(tmp_path)
    gm = adapted_mlp(zoo)
    before = copy.deepcopy(dict(gm.state_dict()))
    with pytest.raises(AdapterError, match=f"(?s){message}"):
        load_adapter(gm, tmp_path)
    assert same(dict(gm.state_dict()), before)


@pytest.mark.xdist_group("mlp")
def test_everything_that_does_not_fit_is_said_at_once(zoo: Zoo, tmp_path: Path) -> None:
    save_adapter(adapted_mlp(zoo), tmp_path)
    config(rank_pattern={"3": 4})(tmp_path)
    tensors({A: None, B: Tensor.t, "8": torch.ones_like, "9": torch.ones_like})(tmp_path)
    gm = adapted_mlp(zoo)
    before = copy.deepcopy(dict(gm.state_dict()))
    with pytest.raises(AdapterError) as caught:
        load_adapter(gm, tmp_path)
    assert str(caught.value).splitlines() == [
        f"{tmp_path}: the adapter does not fit this graph; nothing was loaded:",
        "  - site '3': lora, r=3, scaling=1.66667 in the graph; lora, r=4, scaling=1.25 in adapter_config.json",
        f"  - missing: {A}",
        f"  - {B}: shape (3, 33), expected (33, 3)",
        "  - not of this graph's adapter: '8'",
        "  - not of this graph's adapter: '9'",
        "Adapt the model that it was trained on, with its settings: apply(model, directory)",
    ]
    assert same(dict(gm.state_dict()), before)


# Names: what PEFT would take for something else.


class Named(nn.Module):
    """Linear layers whose names end other names, with and without a dot; and a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 6)
        self.block = nn.ModuleDict({"head": nn.Linear(6, 6), "subhead": nn.Linear(6, 6)})
        self.matrix = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.block["subhead"](self.block["head"](self.head(x)).relu())
        return F.linear(y, self.matrix).relu()


def adapted_named(**fields: Any) -> tuple[Named, CapturedModule, Tensor]:
    model, x = Named().eval(), torch.randn(3, 6)
    gm = lorafx.apply(model, LoraSpec(r=2, **fields), x)
    randomize(gm)
    return model, gm.eval(), x


@pytest.mark.parametrize(
    "fields",
    [{"target_modules": "head"}, {"target_modules": ["head"], "exclude_modules": ["block.head"]}],
    ids=["regex", "exclusion"],
)
def test_a_site_whose_name_ends_another_one_is_told_apart(fields: dict[str, Any], tmp_path: Path) -> None:
    model, gm, x = adapted_named(**fields)
    save_adapter(gm, tmp_path)
    theirs = peft_loads(model, tmp_path).eval()
    assert_close("peft", gm(x), theirs(x))


def test_targets_of_several_specs_become_a_regex_where_names_would_mean_more(tmp_path: Path) -> None:
    model, x = Named().eval(), torch.randn(3, 6)
    specs = LoraSpec(target_modules="head", r=2), LoraSpec(target_modules=["subhead"], r=3)
    gm = lorafx.apply(model, specs, x).eval()
    randomize(gm)
    save_adapter(gm, tmp_path)
    assert as_spec(tmp_path).target_modules == r"block\.subhead|head"
    theirs = peft_loads(model, tmp_path).eval()
    assert_close("peft", gm(x), theirs(x))


def test_modules_to_save_whose_name_ends_another_ones(tmp_path: Path) -> None:
    model, gm, x = adapted_named(target_modules=["subhead"], modules_to_save=["block.head"])
    save_adapter(gm, tmp_path)
    theirs = peft_loads(model, tmp_path).eval()
    assert_close("peft", gm(x), theirs(x))

    _, gm, _ = adapted_named(target_modules=["subhead"], modules_to_save=["head"])
    with pytest.raises(AdapterError, match=r"take \['block\.subhead'\] for trained whole .* the ends of names"):
        save_adapter(gm, tmp_path)


def test_a_parameter_that_its_module_does_not_compute_with_has_no_place_in_pefts_format(tmp_path: Path) -> None:
    _, gm, _ = adapted_named(target_modules=["matrix", "head"])
    message = r"site 'matrix' has no place in PEFT's format: .*the model's own forward .*exclude_modules=\['matrix'\]"
    with pytest.raises(AdapterError, match=message):
        save_adapter(gm, tmp_path)
    assert not list(tmp_path.iterdir())
    kept = {n: t.clone() for n, t in adapter_state_dict(gm).items()}
    assert "matrix_adapter.lora_A.default" in kept
    randomize(gm)
    gm.load_state_dict(kept, strict=False)
    assert same(adapter_state_dict(gm), kept)
