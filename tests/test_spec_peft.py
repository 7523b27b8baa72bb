"""LoraSpec's way to PEFT's configs and back, with PEFT as the oracle."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
from hypothesis import given
from peft.tuners.lora.config import LoraRuntimeConfig

from lorafx import peft_config
from lorafx.errors import SpecError
from lorafx.spec import LoraSpec, as_spec
from lorafx.variants import SELECTABLE as VARIANTS
from specs import CONFIGS, PEFT_SPECS, few, identical, lora_config, peft_config_of


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
