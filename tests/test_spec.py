"""LoraSpec: checks, lookups, and its way through dicts and JSON, with PEFT as the oracle."""

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
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from lorafx import spec
from lorafx.errors import LorafxError, SpecError
from lorafx.spec import LoraSpec, as_spec, as_specs, matches
from specs import ADALORA_FIELDS, LORA_SPECS, NAMES, SPECS, few, identical, lora_config, peft_config_of, specs

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
