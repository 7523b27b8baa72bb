"""LoraSpec: checks, lookups, and its way through dicts, JSON and PEFT's config, with PEFT as the oracle."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
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

# What a LoraSpec and a peft.LoraConfig can both say.
SHARED_FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "r": st.integers(1, 512),
    "alpha": NUMBERS,
    "target_modules": st.just("all-linear") | REGEXES | NAME_LISTS,
    "exclude_modules": st.none() | REGEXES | NAME_LISTS,
    "dropout": st.floats(0, 0.99),
    "rslora": st.booleans(),
    "init": st.sampled_from(["kaiming", "gaussian"]),
    "rank_pattern": st.dictionaries(PATTERN_KEYS, st.integers(1, 64), max_size=3),
    "alpha_pattern": st.dictionaries(PATTERN_KEYS, NUMBERS, max_size=3),
    "bias": st.sampled_from(["none", "all", "lora_only"]),
    "modules_to_save": NAME_LISTS | st.just(()),
    "metadata": METADATA,
}
OWN_FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "variant": st.sampled_from(["lora", "some_variant"]),
    "adapter_dtype": st.sampled_from([None, "bfloat16", torch.float64]),
    "tied": st.sampled_from(["refuse", "untie"]),
}


def specs(fields: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[LoraSpec]:
    return st.fixed_dictionaries({}, optional=fields).map(lambda drawn: LoraSpec(**drawn))


SHARED_SPECS = specs(SHARED_FIELDS)
SPECS = specs({**SHARED_FIELDS, **OWN_FIELDS})

few = settings(max_examples=60, deadline=None)


def lora_config(**settings: Any) -> Any:
    return peft.LoraConfig(**settings)  # whose methods have no types


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
        ("target_modules", [], "expected module names"),
        ("target_modules", "", "expected module names"),
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
        ("variant", "", "the name of a variant"),
        ("variant", "my-lora", "the name of a variant"),
        ("init", "kaimin", "'kaiming', 'gaussian' (did you mean 'kaiming'?)"),
        ("bias", "lora", "'none', 'all', 'lora_only'"),
        ("bias", None, "'none', 'all', 'lora_only'"),
        ("tied", True, "'refuse', 'untie'"),
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
@given(SHARED_SPECS, st.lists(NAMES, min_size=1, max_size=4, unique=True))
def test_targets_ranks_and_alphas_are_pefts(ours: LoraSpec, names: list[str]) -> None:
    theirs = lora_config(**{**ours.to_peft(), "modules_to_save": None})
    for name in names:
        if ours.target_modules != "all-linear":  # which PEFT, too, resolves by the layers' kinds
            taken = matches(name, ours.target_modules) and not matches(name, ours.exclude_modules or ())
            assert taken == bool(check_target_module_exists(theirs, name))
        assert ours.rank_for(name) == theirs.rank_pattern.get(get_pattern_key(theirs.rank_pattern, name), theirs.r)
        alpha_key = get_pattern_key(theirs.alpha_pattern, name)
        assert ours.alpha_for(name) == theirs.alpha_pattern.get(alpha_key, theirs.lora_alpha)


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


# PEFT's config


def test_every_peft_key_is_classified_once_with_pefts_default() -> None:
    """A key that a new PEFT adds, or a default that it changes, fails here instead of being dropped."""
    tables = [
        {"peft_type": None},
        {key: t.default for key, t in peft_config.TRANSLATED.items()},
        peft_config.METADATA,
        peft_config.UNSUPPORTED,
    ]
    ours = {key: default for table in tables for key, default in table.items()}
    assert len(ours) == sum(map(len, tables)), "a key stands in two tables"
    theirs = {}
    for f in dataclasses.fields(peft.LoraConfig):
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        theirs[f.name] = dataclasses.asdict(default) if isinstance(default, LoraRuntimeConfig) else default
    gone_from_peft = {"enable_lora": None, "merge_weights": False}
    assert ours == {**theirs, **gone_from_peft}


def test_every_field_is_written_to_peft_or_has_no_key_there() -> None:
    written = {t.field for t in peft_config.TRANSLATED.values()} | {"variant", "metadata"}
    assert {f.name for f in dataclasses.fields(LoraSpec)} - written == {"adapter_dtype", "tied"}


@few
@given(SHARED_SPECS)
def test_spec_to_peft_and_back(ours: LoraSpec) -> None:
    theirs = lora_config(**ours.to_peft())
    back = as_spec(theirs)
    assert identical(back, dataclasses.replace(ours, metadata={**_written_by_peft(theirs), **ours.metadata}))
    again = lora_config(**back.to_peft())
    assert again.to_dict() == theirs.to_dict()


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


@pytest.mark.parametrize("key", sorted(peft_config.UNSUPPORTED))
def test_unsupported_setting_is_refused_by_name(key: str) -> None:
    default = peft_config.UNSUPPORTED[key]
    config = {"peft_type": "LORA", "target_modules": ["q"], key: default}
    assert as_spec(config) == LoraSpec(alpha=8, target_modules=["q"])
    config[key] = not default if isinstance(default, bool) else {"some": "setting"}
    with pytest.raises(SpecError, match=rf"not supported by lorafx: {key}="):
        as_spec(config)


def test_unsupported_settings_of_an_object_are_all_named() -> None:
    config = lora_config(
        target_modules=["q"],
        use_dora=True,
        layers_to_transform=[1],
        runtime_config=LoraRuntimeConfig(ephemeral_gpu_offload=True),
    )
    with pytest.raises(SpecError) as error:
        as_spec(config)
    for named in (
        "use_dora=True",
        "layers_to_transform=[1]",
        "runtime_config={'ephemeral_gpu_offload': True}",
    ):
        assert named in str(error.value)


def test_variant_of_peft_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    settings_of = {**peft_config.VARIANT_SETTINGS, "dora": {"use_dora": True}}
    monkeypatch.setattr(peft_config, "VARIANT_SETTINGS", settings_of)
    config = lora_config(target_modules=["q"], use_dora=True)
    dora = as_spec(config)
    assert dora.variant == "dora"
    assert lora_config(**dora.to_peft()).to_dict() == config.to_dict()
    assert as_spec(lora_config(target_modules=["q"])).variant == "lora"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"init_lora_weights": False},
            "init_lora_weights=False is not supported; supported are True or 'gaussian'",
        ),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not supported"),
        ({"target_modules": None}, "target_modules=None leaves the choice to PEFT"),
        ({"peft_type": "LOHA"}, "peft_type='LOHA' is not supported; supported is 'LORA'"),
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
    with pytest.raises(SpecError, match="variant='mine' cannot be written as a PEFT config; PEFT has 'lora'"):
        LoraSpec(variant="mine").to_peft()


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
