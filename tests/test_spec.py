"""LoraSpec: checks, lookups, and its way through dicts, JSON and PEFT's config, with PEFT as the oracle."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora.config import LoraRuntimeConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from lorafx import peft_config, spec
from lorafx.errors import LorafxError, SpecError
from lorafx.spec import LoraSpec, as_spec, as_specs, matches
from lorafx.variants import SELECTABLE as VARIANTS

PARTS = st.sampled_from(["model", "layers", "0", "11", "attn", "q_proj", "proj", "v"])
NAMES = st.lists(PARTS, min_size=1, max_size=4).map(".".join)
NAME_LISTS = st.lists(NAMES, min_size=1, max_size=4, unique=True)
REGEXES = st.sampled_from([r".*\.(q|v)_proj", r"model\..*", "proj", r"(.*\.)?\d+"])
PATTERN_KEYS = NAMES | st.sampled_from([r"layers\.\d+\.attn", "^model.layers", "q_proj|v", ".*_proj"])
NUMBERS = st.integers(1, 512) | st.floats(0.125, 512)
METADATA = st.fixed_dictionaries(
    {},
    optional={
        "task_type": st.sampled_from(["CAUSAL_LM", "SEQ_CLS"]),
        "auto_mapping": st.just({"base_model_class": "Net", "parent_library": "lib"}),
        "peft_version": st.just("0.11.0"),
        "base_model_name_or_path": st.text(max_size=8),
        "revision": st.just("main"),
        "inference_mode": st.just(True),
        "fan_in_fan_out": st.just(True),
    },
)

Fields = dict[str, st.SearchStrategy[Any]]

# What a LoraSpec and each of PEFT's configs can both say.
CONFIGS: dict[str, Any] = {"LORA": peft.LoraConfig, "ADALORA": peft.AdaLoraConfig, "VERA": peft.VeraConfig}
TARGETS = st.just("all-linear") | REGEXES | NAME_LISTS
NUMBERED = st.fixed_dictionaries(
    {"target_modules": NAME_LISTS, "layers_to_transform": st.lists(st.integers(0, 12), min_size=1, unique=True)},
    optional={"layers_pattern": st.lists(st.sampled_from(["layers", "h"]), min_size=1, unique=True)},
)
TOKENS = st.lists(st.integers(0, 99), max_size=4, unique=True)
COMMON_FIELDS: Fields = {
    "r": st.integers(1, 512),
    "target_modules": TARGETS,
    "dropout": st.floats(0, 0.99),
    "bias": st.sampled_from(["none", "all", "lora_only"]),
    "modules_to_save": NAME_LISTS | st.just(()),
    "metadata": METADATA,
}
LORA_FIELDS: Fields = {
    **COMMON_FIELDS,
    "alpha": NUMBERS,
    "exclude_modules": st.none() | REGEXES | NAME_LISTS,
    "rslora": st.booleans(),
    "variant": st.sampled_from(["lora", "dora"]),
    "init": st.sampled_from(["kaiming", "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora"]),
    "rank_pattern": st.dictionaries(PATTERN_KEYS, st.integers(1, 64), max_size=3),
    "alpha_pattern": st.dictionaries(PATTERN_KEYS, NUMBERS, max_size=3),
    "target_parameters": NAME_LISTS | st.just(()),
    "trainable_token_indices": TOKENS | st.dictionaries(NAMES, TOKENS, max_size=2),
    "tied": st.sampled_from(["refuse", "tie"]),
}
LORA_BIAS_FIELDS: Fields = {**LORA_FIELDS, "variant": st.just("lora_bias"), "init": st.just("kaiming")}
ADALORA_FIELDS: Fields = {
    **COMMON_FIELDS,
    "r": st.integers(8, 32),
    "alpha": NUMBERS,
    "exclude_modules": st.none() | REGEXES | NAME_LISTS,
    "variant": st.just("adalora"),
    "rank_pattern": st.dictionaries(NAMES.map(lambda name: "^" + re.escape(name)), st.integers(0, 8), max_size=3),
    "options": st.fixed_dictionaries(
        {"total_step": st.integers(40, 99), "tinit": st.integers(0, 9)},
        optional={"tfinal": st.integers(0, 9), "deltaT": st.integers(1, 9), "beta1": st.floats(0.1, 0.9)},
    ),
}
VERA_FIELDS: Fields = {
    **COMMON_FIELDS,
    "variant": st.just("vera"),
    "options": st.fixed_dictionaries(
        {},
        optional={
            "projection_prng_key": st.integers(0, 99),
            "save_projection": st.booleans(),
            "d_initial": st.floats(-1, 1),
        },
    ),
}
OWN_FIELDS: Fields = {
    **LORA_FIELDS,
    "adapter_dtype": st.sampled_from([None, "bfloat16", torch.float64]),
    "tied": st.sampled_from(["refuse", "untie", "tie"]),
}


def specs(fields: Fields) -> st.SearchStrategy[LoraSpec]:
    """Some of the fields; variants and their options always, and the numbers of layers beside names."""
    always = {name: fields[name] for name in ("variant", "options") if name in fields}
    drawn = st.fixed_dictionaries(always, optional={n: s for n, s in fields.items() if n not in always})
    return st.builds(lambda own, numbered: LoraSpec(**{**own, **numbered}), drawn, st.just({}) | NUMBERED)


LORA_SPECS = specs(LORA_FIELDS) | specs(LORA_BIAS_FIELDS)
PEFT_SPECS = LORA_SPECS | specs(ADALORA_FIELDS) | specs(VERA_FIELDS)
SPECS = specs(OWN_FIELDS) | specs(ADALORA_FIELDS) | specs(VERA_FIELDS)

few = settings(max_examples=60, deadline=None)


def lora_config(**settings: Any) -> Any:
    return peft.LoraConfig(**settings)  # whose methods have no types


def peft_config_of(settings: dict[str, Any]) -> Any:
    """PEFT's config object for the keywords that ``to_peft`` gives."""
    return CONFIGS[settings["peft_type"]](**settings)


def identical(a: LoraSpec, b: LoraSpec) -> bool:
    return a == b and a.metadata == b.metadata  # == leaves the metadata out


# Checks


def test_every_field_is_checked() -> None:
    assert set(spec._CHECKS) == {f.name for f in dataclasses.fields(LoraSpec)}


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("r", 0, "an integer of at least 1"),
        ("r", 8.0, "an integer of at least 1"),
        ("r", True, "an integer of at least 1"),
        ("alpha", 0, "a finite number above 0"),
        ("alpha", math.nan, "a finite number above 0"),
        ("alpha", "16", "a finite number above 0"),
        ("target_modules", None, "a list of module names"),
        ("target_modules", ["q_proj", 3], "a non-empty string"),
        ("target_modules", ["all-linear"], "give it alone"),
        ("target_modules", "(q_proj", "unterminated subpattern"),
        ("exclude_modules", "*.head", "nothing to repeat"),
        ("exclude_modules", "all-linear", "it would leave nothing to adapt"),
        ("exclude_modules", 7, "a list of module names"),
        ("dropout", 1.0, "at least 0 and below 1"),
        ("dropout", -0.1, "at least 0 and below 1"),
        ("rslora", 1, "True or False"),
        ("variant", "", "expected one of 'lora', 'lora_bias', 'dora', 'vera', 'adalora'"),
        ("variant", "adlora", "(did you mean 'adalora' or 'lora' or 'dora'?)"),
        ("init", "kaimin", "variant 'lora' starts by 'kaiming' or 'gaussian' or "),
        ("init", "kaimin", "(did you mean 'kaiming'?)"),
        ("layers_to_transform", -1, "an integer of at least 0"),
        ("target_parameters", "experts", "a list of module names"),
        ("trainable_token_indices", 7, "a list of row numbers"),
        ("trainable_token_indices", [1, 1], "a row stands in it twice"),
        ("trainable_token_indices", {0: [1]}, "a mapping from names of embeddings"),
        ("bias", "lora", "'none', 'all', 'lora_only'"),
        ("bias", None, "'none', 'all', 'lora_only'"),
        ("tied", True, "'refuse', 'untie', 'tie'"),
        ("modules_to_save", "classifier", "a list of module names"),
        ("adapter_dtype", torch.int8, "'float32', 'bfloat16'"),
        ("adapter_dtype", "fp16", "'float32', 'bfloat16'"),
        ("rank_pattern", [("q", 4)], "a mapping"),
        ("metadata", {"revision": object()}, "values that JSON can hold"),
        ("metadata", {"revision": math.inf}, "values that JSON can hold"),
        ("metadata", ["revision"], "a mapping"),
    ],
)
def test_bad_value_names_field_value_and_allowed(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(SpecError) as error:
        LoraSpec(**{field: value})
    message = str(error.value)
    assert message.startswith(f"LoraSpec.{field}={value!r} is not allowed: ")
    assert allowed in message


def test_fields_that_do_not_go_together() -> None:
    with pytest.raises(SpecError, match=r"target_modules=\(\) is not allowed: .* \(or target_parameters\)"):
        LoraSpec(target_modules=[])
    with pytest.raises(SpecError, match="target_modules='' is not allowed: expected module names"):
        LoraSpec(target_modules="")
    assert LoraSpec(target_modules=[], target_parameters=["experts.down_proj"]).target_modules == ()
    with pytest.raises(SpecError, match=r"layers_pattern=\('h',\) is not allowed: it goes with layers_to_transform"):
        LoraSpec(target_modules=["q"], layers_pattern="h")


def test_bad_pattern_names_its_key() -> None:
    with pytest.raises(SpecError, match=r"LoraSpec\.rank_pattern key='q\(' is not allowed: .* subpattern"):
        LoraSpec(rank_pattern={"q(": 4})
    with pytest.raises(SpecError, match=r"LoraSpec\.rank_pattern\['q_proj'\]=0 is not allowed"):
        LoraSpec(rank_pattern={"v_proj": 4, "q_proj": 0})
    with pytest.raises(SpecError, match=r"LoraSpec\.alpha_pattern\['q_proj'\]=-1 is not allowed"):
        LoraSpec(alpha_pattern={"q_proj": -1})


def test_spec_error_is_a_value_error_of_ours() -> None:
    assert issubclass(SpecError, LorafxError)
    assert issubclass(SpecError, ValueError)


def test_what_is_kept() -> None:
    kept = LoraSpec(
        target_modules={"v_proj", "q_proj"},
        exclude_modules=(),
        modules_to_save=["score", "classifier", "score"],
        adapter_dtype=torch.bfloat16,
    )
    assert kept.target_modules == ("q_proj", "v_proj")  # sorted: a set of names
    assert kept.exclude_modules is None
    assert kept.modules_to_save == ("score", "classifier")
    assert kept.adapter_dtype == "bfloat16"
    assert LoraSpec(target_modules="All-Linear") == LoraSpec()


def test_is_immutable() -> None:
    pattern = {"q_proj": 4}
    frozen: Any = LoraSpec(rank_pattern=pattern, metadata={"auto_mapping": {"base_model_class": "Net"}})
    pattern["q_proj"] = 5
    assert frozen.rank_pattern == {"q_proj": 4}
    with pytest.raises(dataclasses.FrozenInstanceError):
        frozen.r = 4
    for mapping in (frozen.rank_pattern, frozen.metadata["auto_mapping"]):
        with pytest.raises(TypeError, match="does not support item assignment"):
            mapping["q_proj"] = 5


def test_order_of_patterns_counts() -> None:
    one = LoraSpec(rank_pattern={"q_proj": 4, ".*proj": 2})
    other = LoraSpec(rank_pattern={".*proj": 2, "q_proj": 4})
    assert (one.rank_for("a.q_proj"), other.rank_for("a.q_proj")) == (4, 2)
    assert one != other


# Lookups


def test_scaling() -> None:
    patterns: dict[str, Any] = {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {r"layers\.1\..*": 6}}
    lora = LoraSpec(r=16, alpha=32, **patterns)
    rslora = dataclasses.replace(lora, rslora=True)
    for site, r, alpha in [
        ("layers.0.k_proj", 16, 32),
        ("layers.0.q_proj", 4, 32),
        ("layers.1.q_proj", 4, 6),
    ]:
        assert (lora.rank_for(site), lora.alpha_for(site)) == (r, alpha)
        assert lora.scaling_for(site) == alpha / r
        assert rslora.scaling_for(site) == alpha / math.sqrt(r)


@few
@given(LORA_SPECS | specs(ADALORA_FIELDS), st.lists(NAMES, min_size=1, max_size=4, unique=True))
def test_targets_ranks_and_alphas_are_pefts(ours: LoraSpec, names: list[str]) -> None:
    theirs = peft_config_of({**ours.to_peft(), "modules_to_save": None})
    for name in names:
        if ours.target_modules != "all-linear":  # which PEFT, too, resolves by the layers' kinds
            taken = matches(name, ours.target_modules) and not matches(name, ours.exclude_modules or ())
            assert (taken and ours.takes_layer(name)) == bool(check_target_module_exists(theirs, name))
        if ours.variant != "adalora":
            assert ours.rank_for(name) == theirs.rank_pattern.get(get_pattern_key(theirs.rank_pattern, name), theirs.r)
            alpha_key = get_pattern_key(theirs.alpha_pattern, name)
            assert ours.alpha_for(name) == theirs.alpha_pattern.get(alpha_key, theirs.lora_alpha)
        elif theirs.rank_pattern:
            kept = theirs.rank_pattern.get(f"{name}.lora_E", [True] * theirs.init_r)
            assert (ours.rank_for(name), ours.r) == (sum(kept), len(kept))


@pytest.mark.parametrize("rslora", [False, True])
def test_scaling_of_layers_is_pefts(rslora: bool) -> None:
    ours = LoraSpec(r=4, alpha=6, rslora=rslora, rank_pattern={"mid": 9}, alpha_pattern={"^out": 5})
    net = torch.nn.ModuleDict({name: torch.nn.Linear(3, 3) for name in ("inp", "mid", "out")})
    adapted: Any = peft.inject_adapter_in_model(lora_config(**ours.to_peft()), net)
    for name in net:
        layer = adapted[name]
        assert layer.scaling["default"] == ours.scaling_for(name)
        assert layer.lora_A["default"].weight.shape[0] == ours.rank_for(name)


def test_matches() -> None:
    assert matches("layers.0.q_proj", ["q_proj"])
    assert matches("q_proj", ["q_proj"])
    assert not matches("layers.0.aq_proj", ["q_proj"])
    assert matches("layers.0.q_proj", r".*\.q_proj")
    assert not matches("layers.0.q_proj", "q_proj")  # a string is for the full name


def test_dtype_for() -> None:
    for base, expected in [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ]:
        assert LoraSpec().dtype_for(base) == expected
    assert LoraSpec(adapter_dtype="float16").dtype_for(torch.float32) == torch.float16


def test_pattern_matches_whole_names_or_after_a_dot() -> None:
    pattern = LoraSpec(r=8, rank_pattern={"proj": 2})
    assert [pattern.rank_for(site) for site in ("proj", "layers.0.proj", "q_proj", "proj.0")] == [2, 2, 8, 8]


# Copies, dicts and JSON


def test_metadata_does_not_count_in_equality() -> None:
    noted = LoraSpec(metadata={"revision": "main"})
    assert noted == LoraSpec()
    assert hash(noted) == hash(LoraSpec())
    assert noted.metadata == {"revision": "main"}


@few
@given(SPECS)
def test_copies_are_equal(original: LoraSpec) -> None:
    through_json = as_spec(json.loads(json.dumps(original.to_dict())))
    pickled = pickle.loads(pickle.dumps(original))  # noqa: S301  # the bytes are our own
    for other in (copy.deepcopy(original), pickled, through_json, LoraSpec.from_json(original.to_json())):
        assert identical(other, original)
        assert hash(other) == hash(original)


def test_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "spec.json"
    text = LoraSpec(r=4).to_json(path)
    assert path.read_text() == text
    assert as_spec(str(path)) == LoraSpec(r=4)

    def full_disk(self: Path, *_: object, **__: object) -> int:
        self.write_bytes(b"{")
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="no space left"):
        LoraSpec(r=5).to_json(path)
    assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


# PEFT's configs


@pytest.mark.parametrize("peft_type", peft_config.METHODS)
def test_every_peft_key_is_classified_once_with_pefts_default(peft_type: str) -> None:
    """A key that a new PEFT adds, or a default that it changes, fails here instead of being dropped."""
    method = peft_config.METHODS[peft_type]
    tables = [
        {key: t.default for key, t in method.translated.items()},
        method.choosing,
        method.options,
        method.starts,
        method.ignored,
        peft_config.METADATA,
        method.unsupported,
    ]
    assert len(method.keys) == sum(map(len, tables)), "a key stands in two tables"
    theirs = {}
    for f in dataclasses.fields(CONFIGS[peft_type]):
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        theirs[f.name] = dataclasses.asdict(default) if isinstance(default, LoraRuntimeConfig) else default
    del theirs["peft_type"]
    gone_from_peft = {"enable_lora": None, "merge_weights": False} if peft_type == "LORA" else {}
    assert method.keys == {**theirs, **gone_from_peft}


def test_options_have_pefts_names_and_defaults() -> None:
    for method in peft_config.METHODS.values():
        for variant in method.variants:
            ours = {name: option.default for name, option in VARIANTS[variant].options.items()}
            assert {name: ours[name] for name in method.options} == method.options
    assert {v for m in peft_config.METHODS.values() for v in m.variants} == set(VARIANTS)


def test_every_field_is_written_to_peft_or_has_no_key_there() -> None:
    written = {t.field for t in peft_config.METHODS["LORA"].translated.values()} | {"variant", "metadata", "options"}
    unwritten = {"adapter_dtype", "block_size", "double_quant"}
    assert {f.name for f in dataclasses.fields(LoraSpec)} - written == unwritten


@few
@given(PEFT_SPECS)
def test_spec_to_peft_and_back(ours: LoraSpec) -> None:
    theirs = peft_config_of(ours.to_peft())
    back = as_spec(theirs)
    assert identical(back, dataclasses.replace(ours, metadata={**_written_by_peft(theirs), **ours.metadata}))
    again = peft_config_of(back.to_peft())
    assert again.to_dict() == theirs.to_dict()


@pytest.mark.parametrize(
    ("fields", "lost"),
    [
        ({"variant": "vera", "alpha": 3.0}, "VERA has no key for LoraSpec.alpha=3.0"),
        (
            {"variant": "vera", "exclude_modules": ["head"], "rslora": True},
            "exclude_modules=['head'], LoraSpec.rslora=",
        ),
        ({"variant": "vera", "tied": "tie"}, "VERA has no key for LoraSpec.tied='tie'"),
        ({"variant": "adalora", "alpha_pattern": {"q": 1}}, "ADALORA has no key for LoraSpec.alpha_pattern={'q': 1}"),
        ({"variant": "adalora", "rank_pattern": {"q": 1}}, "AdaLoRA's says which of the 8 ranks each module has kept"),
        ({"layers_to_transform": 1}, "beside target_modules='all-linear': PEFT takes it with a list of names only"),
    ],
)
def test_what_a_config_has_no_place_for_is_refused(fields: dict[str, Any], lost: str) -> None:
    with pytest.raises(SpecError) as error:
        LoraSpec(**fields).to_peft()
    assert lost in str(error.value)


def _written_by_peft(config: Any) -> dict[str, Any]:
    """In the order of LoraConfig's fields, what PEFT notes down: the version always, the rest as told."""
    return {
        key: getattr(config, key) for key, default in peft_config.METADATA.items() if getattr(config, key) != default
    }


@pytest.mark.parametrize(
    "config",
    [
        lora_config(target_modules=["q_proj", "v_proj"]),
        lora_config(target_modules="all-linear", task_type=peft.TaskType.SEQ_CLS, modules_to_save=["score"]),
        lora_config(
            r=3,
            lora_alpha=5,
            lora_dropout=0.1,
            target_modules=r".*\.(c_attn|c_fc)",
            exclude_modules=["lm_head"],
            fan_in_fan_out=True,
            bias="lora_only",
            use_rslora=True,
            init_lora_weights="gaussian",
            rank_pattern={"b": 2, "a": 4},
            alpha_pattern={"a": 1},
            base_model_name_or_path="gpt2",
            revision="main",
            inference_mode=True,
            auto_mapping={"base_model_class": "Net", "parent_library": "lib"},
        ),
    ],
)
def test_peft_to_spec_and_back(config: Any, tmp_path: Path) -> None:
    assert lora_config(**as_spec(config).to_peft()).to_dict() == config.to_dict()
    config.save_pretrained(str(tmp_path))
    saved = as_spec(tmp_path)
    assert identical(saved, LoraSpec.from_json(tmp_path / "adapter_config.json"))
    assert lora_config(**saved.to_peft()).to_dict() == config.to_dict()
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved.to_peft()))
    assert peft.LoraConfig.from_pretrained(str(tmp_path)).to_dict() == config.to_dict()


def test_absent_keys_have_pefts_defaults() -> None:
    minimal = {"peft_type": "LORA", "target_modules": ["q_proj"]}
    assert as_spec(minimal) == LoraSpec(r=8, alpha=8, target_modules=["q_proj"])


def test_config_of_early_peft() -> None:
    old: dict[str, Any] = {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "target_modules": ["q"],
        "bias": "none",
        "modules_to_save": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "enable_lora": None,
        "merge_weights": False,
    }
    spec_of_old = LoraSpec(alpha=16, dropout=0.05, target_modules=["q"], metadata={"inference_mode": True})
    assert identical(as_spec(old), spec_of_old)
    with pytest.raises(SpecError, match=r"enable_lora=\[True, False\]"):
        as_spec({**old, "enable_lora": [True, False]})


@pytest.mark.parametrize(
    ("peft_type", "key"), [(name, key) for name, method in peft_config.METHODS.items() for key in method.unsupported]
)
def test_unsupported_setting_is_refused_by_name(peft_type: str, key: str) -> None:
    default = peft_config.METHODS[peft_type].unsupported[key]
    config = {"peft_type": peft_type, "target_modules": ["q"], key: default}
    assert as_spec(config).target_modules == ("q",)
    config[key] = not default if isinstance(default, bool) else {"some": "setting"}
    with pytest.raises(SpecError, match=rf"not supported by lorafx: {key}="):
        as_spec(config)


def test_unsupported_settings_of_an_object_are_all_named() -> None:
    config = lora_config(
        target_modules=["q"],
        alora_invocation_tokens=[1],
        use_qalora=True,
        runtime_config=LoraRuntimeConfig(ephemeral_gpu_offload=True),
    )
    with pytest.raises(SpecError) as error:
        as_spec(config)
    for named in (
        "alora_invocation_tokens=[1]",
        "use_qalora=True",
        "runtime_config={'ephemeral_gpu_offload': True}",
    ):
        assert named in str(error.value)


@pytest.mark.parametrize(
    ("settings", "variant"), [({}, "lora"), ({"use_dora": True}, "dora"), ({"lora_bias": True}, "lora_bias")]
)
def test_variants_of_a_lora_config(settings: dict[str, Any], variant: str) -> None:
    config = lora_config(target_modules=["q"], **settings)
    ours = as_spec(config)
    assert ours.variant == variant
    assert lora_config(**ours.to_peft()).to_dict() == config.to_dict()
    with pytest.raises(SpecError, match="not supported by lorafx: use_dora=True, lora_bias=True"):
        as_spec({"peft_type": "LORA", "target_modules": ["q"], "use_dora": True, "lora_bias": True})


def test_what_peft_ignores_is_ignored() -> None:
    """AdaLoRA has init_r, and no scaling but one; how an adapter started says nothing of one that has trained."""
    adalora = {"peft_type": "ADALORA", "target_modules": ["q"], "r": 64, "use_rslora": True, "alpha_pattern": {"q": 2}}
    assert as_spec(adalora) == LoraSpec(variant="adalora", r=12, alpha=8, target_modules=["q"])
    eva = lora_config(target_modules=["q"], init_lora_weights="eva")
    assert eva.eva_config is not None
    assert as_spec(eva) == LoraSpec(alpha=8, init="eva", target_modules=["q"])


def test_ranks_that_adalora_has_kept() -> None:
    masks = {"layers.0.q.lora_E": [True, False, True], "layers.1.q.lora_E": [False, False, False]}
    config = peft.AdaLoraConfig(init_r=3, lora_alpha=6, total_step=9, target_modules=["q"], rank_pattern=masks)
    ours = as_spec(config)
    assert [ours.rank_for(f"layers.{i}.q") for i in range(3)] == [2, 0, 3]
    assert {ours.scaling_for(f"layers.{i}.q") for i in range(3)} == {6 / (3 + 1e-5)}
    assert ours.to_peft()["rank_pattern"] == {
        "layers.0.q.lora_E": [True, True, False],  # which of them no longer matters
        "layers.1.q.lora_E": [False, False, False],
    }
    with pytest.raises(SpecError, match=r"rank_pattern\['q'\]=0 is not allowed: expected an integer of at least 1"):
        LoraSpec(rank_pattern={"q": 0})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"init_lora_weights": False},
            "init_lora_weights=False is not supported; supported are True, 'gaussian', 'orthogonal', 'pissa',",
        ),
        ({"init_lora_weights": "corda"}, "init_lora_weights='corda' is not supported"),
        ({"peft_type": "VERA", "init_weights": False}, "init_weights=False is not supported; supported is True"),
        ({"target_modules": None}, "target_modules=None leaves the choice to PEFT"),
        ({"peft_type": "LOHA"}, "peft_type='LOHA' is not supported; supported are 'LORA', 'ADALORA', 'VERA'"),
        ({"peft_type": "VERA", "lora_alpha": 2}, "unknown key 'lora_alpha'"),
        ({"lora_alhpa": 4}, "unknown key 'lora_alhpa' (did you mean 'lora_alpha'"),
        ({"r": 0}, "LoraSpec.r=0 is not allowed"),
    ],
)
def test_bad_peft_config(config: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as error:
        as_spec({"peft_type": "LORA", "target_modules": ["q"], **config})
    assert message in str(error.value)


def test_other_peft_methods_are_refused() -> None:
    with pytest.raises(SpecError, match="peft_type='IA3' is not supported"):
        as_spec(peft.IA3Config(target_modules=["q"]))


def test_variant_that_peft_lacks_cannot_be_written() -> None:
    fields = {**LoraSpec().to_dict(), "variant": "mine"}
    with pytest.raises(SpecError, match="variant='mine' cannot be written as a PEFT config; PEFT has 'lora', 'dora', "):
        peft_config.peft_from_fields(fields, fields)


# What is taken for a spec


def test_as_specs(tmp_path: Path) -> None:
    encoder = LoraSpec(r=4, target_modules=r"encoder\..*")
    encoder.to_json(tmp_path / "encoder.json")
    decoder: dict[str, Any] = {"r": 2, "target_modules": [r"decoder.q"]}
    both = (encoder, LoraSpec(**decoder))
    assert as_specs([tmp_path / "encoder.json", decoder]) == both
    assert as_specs(both) == both
    assert as_specs(decoder) == both[1:]
    assert as_specs(str(tmp_path / "encoder.json")) == both[:1]
    with pytest.raises(SpecError, match="at least one spec"):
        as_specs([])


def test_unknown_fields_are_listed_with_near_matches() -> None:
    with pytest.raises(SpecError) as error:
        as_spec({"lora_alpha": 16, "xyz": 1})
    assert "'lora_alpha' (did you mean 'alpha'?), 'xyz'; known are adapter_dtype, alpha, " in str(error.value)
    with pytest.raises(SpecError, match=r"LoraSpec\.metadata: unknown key 'task' \(did you mean 'task_type'\?\)"):
        LoraSpec(metadata={"task": "CAUSAL_LM"})


@pytest.mark.parametrize("bad", [3, None, LoraSpec, peft.LoraConfig, peft.TaskType.CAUSAL_LM.__class__])
def test_what_is_no_spec(bad: Any) -> None:
    with pytest.raises(SpecError, match="a spec was expected, got"):
        as_spec(bad)
    with pytest.raises(SpecError, match=r"a peft\.LoraConfig or the dict of one was expected"):
        LoraSpec.from_peft(bad)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"r": 8,', "not valid JSON"),
        (b"[8]", "a JSON object was expected"),
        (b'{"r": 0}', r"LoraSpec\.r=0 is not allowed"),
        (b'{"r": "\xff"}', "utf-8"),
    ],
)
def test_bad_file_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "spec.json").write_bytes(content)
    with pytest.raises(SpecError, match=rf"spec\.json: .*{message}"):
        as_spec(tmp_path / "spec.json")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"adapter_config\.json: no such file"):
        as_spec(tmp_path)
    with pytest.raises(SpecError, match="all-linear: no such file"):
        as_spec("all-linear")
