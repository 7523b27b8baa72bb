"""transformers' Trainer: the stock one trains, evaluates and predicts; LoraTrainer also keeps adapters on disk."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor

import lorafx
from conftest import Zoo, same
from lorafx import AdapterError, LoraSpec, PassError, QuantizationError
from lorafx.graph import CapturedModule
from lorafx.integrations.huggingface import LoraTrainer
from lorafx.state import adapter_state_dict
from tolerances import assert_close
from zoo import FAMILIES, Family

pytestmark = pytest.mark.xdist_group("trainer")

SPEC = LoraSpec(r=3, alpha=6, dropout=0.1)
BERT = FAMILIES["bert"]


def tied() -> hf.PreTrainedModel:
    """The zoo's Llama with one tensor for the input and the output embedding."""
    config = copy.deepcopy(FAMILIES["llama"].build().config)
    config.tie_word_embeddings = True
    return hf.LlamaForCausalLM(config).eval()


TIED_LLAMA = dataclasses.replace(FAMILIES["llama"], name="tied llama", build=tied)


def rows(family: Family, copies: int) -> list[dict[str, Tensor]]:
    """A dataset: the rows of the family's two samples, each with its label."""
    inputs = {**family.inputs(), "labels": family.labels()}
    return [{n: v[i] for n, v in inputs.items()} for i in range(len(inputs["labels"]))] * copies


def arguments(directory: Path, **options: Any) -> hf.TrainingArguments:
    defaults: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return hf.TrainingArguments(output_dir=str(directory), **(defaults | options))


def losses(trainer: hf.Trainer, key: str = "loss") -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def run(gm: CapturedModule, directory: Path, cls: type[hf.Trainer] = hf.Trainer, **options: Any) -> hf.Trainer:
    family = TIED_LLAMA if "lm_head.weight" in gm.state_dict() else BERT
    data = {"train_dataset": rows(family, 6), "eval_dataset": rows(family, 4)}
    return cls(gm, arguments(directory, **options), **data)


@pytest.mark.parametrize("chosen", [BERT, TIED_LLAMA], ids=lambda f: f.name)
def test_the_stock_trainer_trains_evaluates_and_predicts(zoo: Zoo, chosen: Family, tmp_path: Path) -> None:
    gm = zoo.adapted(chosen, SPEC)
    before = {n: v.clone() for n, v in gm.state_dict().items()}
    trainer = run(gm, tmp_path)
    assert trainer.label_names == ["labels"]
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < start
    changed = {n for n, v in gm.state_dict().items() if not torch.equal(v, before[n])}
    assert changed == set(adapter_state_dict(gm))

    data = rows(chosen, 2)
    predicted = trainer.predict(data)
    with torch.no_grad():
        expected = gm.eval()(**{n: torch.stack([row[n] for row in data]) for n in chosen.inputs()}).logits
    assert isinstance(predicted.predictions, np.ndarray), "the logits and nothing else"
    assert np.array_equal(predicted.predictions, expected)
    assert np.array_equal(predicted.label_ids, torch.stack([row["labels"] for row in data]))


@pytest.mark.parametrize("chosen", [BERT, TIED_LLAMA], ids=lambda f: f.name)
def test_bf16_and_activation_checkpointing(zoo: Zoo, chosen: Family, tmp_path: Path) -> None:
    """Recomputing changes no loss; autocast does, and less than training."""
    options = {"half": {"bf16": True}, "recomputed": {"bf16": True, "activation_checkpointing": True}, "single": {}}
    found = {}
    for name, chosen_options in options.items():
        trainer = run(zoo.adapted(chosen, SPEC), tmp_path, **chosen_options)
        trainer.train()
        found[name] = torch.tensor([*losses(trainer), trainer.evaluate()["eval_loss"]])
    assert torch.equal(found["recomputed"], found["half"])
    assert not torch.equal(found["half"], found["single"])
    assert_close("autocast", found["half"], found["single"])


def test_what_a_bf16_run_leaves_merges_in_full_precision(zoo: Zoo, tmp_path: Path) -> None:
    """Accelerate leaves autocast on the module it trained; a merged graph has none of it."""
    gm = zoo.adapted(BERT, SPEC)
    run(gm, tmp_path, bf16=True).train()
    merged = lorafx.merge(gm).eval()
    twin = copy.deepcopy(gm).eval()
    assert_close("model", merged(**BERT.inputs()).logits, twin(**BERT.inputs()).logits)


SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}


def test_checkpoints_hold_the_adapter_only(zoo: Zoo, tmp_path: Path) -> None:
    gm = zoo.adapted(TIED_LLAMA, SPEC)
    trainer = run(gm, tmp_path, LoraTrainer, **SAVING)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    files = {p.name for p in (tmp_path / "checkpoint-2").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "trainer_state.json"} <= files
    assert "model.safetensors" not in files
    assert "checkpoint.safetensors" not in {p.name for p in (tmp_path / "final").iterdir()}, "it is for going on"
    saved = load_file(tmp_path / "final" / "adapter_model.safetensors")
    own = {"base_model.model." + n.replace(".default", ".weight"): v for n, v in adapter_state_dict(gm).items()}
    assert saved.keys() == own.keys()
    assert all(torch.equal(saved[n], own[n]) for n in own)


def test_the_stock_trainer_cannot_save_tied_weights(zoo: Zoo, tmp_path: Path) -> None:
    """Why LoraTrainer is needed even where size does not matter."""
    trainer = run(zoo.adapted(TIED_LLAMA, SPEC), tmp_path)
    with pytest.raises(RuntimeError, match="share memory"):
        trainer.save_model(str(tmp_path / "final"))


def test_the_stock_trainer_is_told_that_it_cannot_save_quantized_weights(zoo: Zoo, tmp_path: Path) -> None:
    gm = zoo.adapted(BERT, SPEC)
    lorafx.quantize(gm)
    trainer = run(gm, tmp_path, **SAVING)
    with pytest.raises(QuantizationError, match="LoraTrainer does, in place of transformers' Trainer"):
        trainer.train()


SPECS: dict[str, dict[str, Any]] = {
    "lora": {"modules_to_save": ("classifier",)},
    "dora": {"variant": "dora"},
    "vera": {"variant": "vera", "alpha": 12},
    "pissa": {"init": "pissa"},
    "lora on nf4": {},
}


@pytest.mark.parametrize(
    ("cls", "variant"),
    [(hf.Trainer, "lora"), *((LoraTrainer, name) for name in SPECS)],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_a_resumed_run_repeats_the_uninterrupted_one(
    zoo: Zoo, cls: type[hf.Trainer], variant: str, tmp_path: Path
) -> None:
    """Dropout included, in the base and in the adapters: every later loss is the same number."""
    spec = dataclasses.replace(SPEC, **SPECS[variant])
    gm, other = (zoo.adapted(BERT, spec, seed=seed) for seed in (0, 1))
    if variant.endswith("nf4"):
        assert lorafx.quantize(gm) == lorafx.quantize(other)
    whole = run(gm, tmp_path, cls, **SAVING)
    whole.train()
    resumed = run(other, tmp_path, cls, **SAVING)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.state.global_step == 6
    for key in ("loss", "eval_loss"):
        assert losses(resumed, key) == losses(whole, key)
    assert same(other.state_dict(), gm.state_dict())


def test_a_checkpoint_of_the_model_only_is_an_adapter(zoo: Zoo, tmp_path: Path) -> None:
    gm = zoo.adapted(BERT, SPEC)
    run(gm, tmp_path, LoraTrainer, **SAVING, save_only_model=True).train()
    assert not (tmp_path / "checkpoint-6" / "checkpoint.safetensors").exists()
    other = zoo.adapted(BERT, SPEC, seed=1)
    run(other, tmp_path, LoraTrainer)._load_from_checkpoint(str(tmp_path / "checkpoint-6"))
    assert same(adapter_state_dict(other), adapter_state_dict(gm))


def test_the_best_model_comes_back_at_the_end(zoo: Zoo, tmp_path: Path) -> None:
    """With the worst counted as the best, that is not the last."""
    gm = zoo.adapted(TIED_LLAMA, SPEC)
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = run(gm, tmp_path, LoraTrainer, **SAVING, **best)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert trainer.evaluate()["eval_loss"] == losses(trainer, "eval_loss")[0]


def test_what_lora_trainer_cannot_train_or_load_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    gm = zoo.adapted(BERT, SPEC)
    with pytest.raises(PassError, match=r"^LoraTrainer: this graph is merged; train what lorafx\.apply"):
        run(lorafx.merge(gm), tmp_path, LoraTrainer)
    with pytest.raises(PassError, match=r"^expected a graph made by lorafx\.apply, got Bert"):
        LoraTrainer(BERT.build(), arguments(tmp_path))
    two = zoo.adapted(BERT, SPEC)
    lorafx.add_adapter(two, SPEC, "other")
    lorafx.set_adapter(two, ["default", "other"])
    with pytest.raises(AdapterError, match=r"which adapter is meant\? Active: default, other"):
        run(two, tmp_path, LoraTrainer)
    run(gm, tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        run(gm, tmp_path, LoraTrainer).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
