"""AdaLoRA's ranks: PEFT's numbers while they are masked, smaller parameters afterwards, the same run when resumed."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, AdamW

import lorafx
from conftest import Zoo, leaves, loss_of, same
from lorafx import AdapterError, LoraSpec, PassError, RankScheduler, SpecError
from lorafx.checkpoint import load_checkpoint, save_checkpoint
from lorafx.graph import CapturedModule
from lorafx.integrations.huggingface import LoraTrainer, RankSchedulerCallback
from planted import PLACES, planted
from tolerances import TOLERANCES, assert_close
from zoo import FAMILIES

MLP, BERT = FAMILIES["mlp"], FAMILIES["bert"]
OPTIONS = {"target_r": 2, "tinit": 2, "tfinal": 4, "total_step": 16, "beta1": 0.8, "beta2": 0.7}


def spec(**options: Any) -> LoraSpec:
    return LoraSpec(variant="adalora", r=6, alpha=9, options={**OPTIONS, **options})


class Run:
    """A model that trains, one batch a step."""

    def __init__(self, gm: CapturedModule, **options: Any) -> None:
        self.gm = gm
        self.optimizer = AdamW([p for p in gm.parameters() if p.requires_grad], lr=1e-2)
        self.scheduler = RankScheduler(gm, self.optimizer, **options)

    def step(self) -> Tensor:
        """The loss before the step, without the penalty."""
        loss = loss_of(self.gm.eval(), MLP)
        (loss + self.scheduler.penalty()).backward()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return loss.detach()

    @property
    def ranks(self) -> list[int]:
        """Of the parameters, masked or not."""
        return [site.r for site in lorafx.sites(self.gm)]


# Against PEFT


@pytest.mark.parametrize("delta", [1, 3])
def test_scores_budgets_and_masks_are_those_of_peft(zoo: Zoo, delta: int) -> None:
    """PEFT's allocator gets our weights and gradients at every step."""
    gm = zoo.adapted(BERT, spec(deltaT=delta)).eval()
    optimizer = AdamW([p for p in gm.parameters() if p.requires_grad], lr=1e-2)
    ours = RankScheduler(gm, optimizer, shrink=False)
    config = peft.AdaLoraConfig(
        init_r=6, target_modules=[s.name for s in lorafx.sites(gm)], **{**OPTIONS, "deltaT": delta}
    )
    twin = peft.get_peft_model(zoo.eager(BERT), config)
    theirs = twin.base_model.rankallocator
    parameters = dict(twin.named_parameters())
    pairs = {
        name: (p, parameters[f"base_model.model.{name}"])
        for site in lorafx.sites(gm)
        for name, p in zip(site.parameter_names.values(), site.parameters(gm).values(), strict=True)
    }
    for step in range(1, 17):
        optimizer.zero_grad()
        loss_of(gm, BERT).backward()
        optimizer.step()
        with torch.no_grad():
            for mine, other in pairs.values():
                other.copy_(mine)
                other.grad = None if mine.grad is None else mine.grad.clone()
        ours.step()
        twin.base_model.update_and_allocate(step)
        assert ours.budget == theirs.budget_schedule(step)[0]
        state = ours.state_dict()
        for name, (mine, other) in pairs.items():
            if step < 12:
                assert_close("peft", state["tensors"][f"sensitivity.{name}"], theirs.exp_avg_ipt[name])
                assert_close("peft", state["tensors"][f"uncertainty.{name}"], theirs.exp_avg_unc[name])
            if "lora_E" in name:
                assert torch.equal(mine, other)
                kept = (twin.peft_config["default"].rank_pattern or {}).get(name)
                assert state["kept"].get(name.removesuffix(".lora_E.default")) == kept
    assert sum(ours.ranks.values()) == 2 * len(lorafx.sites(gm))
    assert len(set(ours.ranks.values())) > 1


class WithLoss(nn.Module):
    """Two layers, and outputs with a loss of zero."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(7, 5), nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(loss=0.0 * self.b(self.a(x)).sum())


def test_the_penalty_is_that_of_peft() -> None:
    """PEFT adds it to the outputs' loss."""
    targets = ["a", "b"]
    twin = peft.get_peft_model(
        WithLoss(), peft.AdaLoraConfig(init_r=6, target_modules=targets, orth_reg_weight=0.3, **OPTIONS)
    )
    names = dict(zip("01", targets, strict=True))
    adalora = LoraSpec(variant="adalora", r=6, target_modules=["0", "1"], options={**OPTIONS, "orth_reg_weight": 0.3})
    gm = lorafx.apply(nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 6)), adalora)
    with torch.no_grad():
        for site in lorafx.sites(gm):
            for parameter, value in site.parameters(gm).items():
                value.normal_()
                twin.get_parameter(f"base_model.model.{names[site.name]}.{parameter}.default").copy_(value)
    scheduler = Run(gm).scheduler
    penalty = scheduler.penalty()
    assert_close("peft", penalty, twin.base_model(torch.randn(3, 7)).loss)

    penalty.backward()
    expected = {n: p.grad.clone() for n, p in gm.named_parameters() if p.grad is not None}
    scheduler.add_penalty_gradient(2.0)
    for name, gradient in expected.items():
        found = gm.get_parameter(name).grad
        assert found is not None
        assert_close("peft", found, 3.0 * gradient)


# What shrinks


def test_ranks_shrink_at_the_last_allocation_and_outputs_stay(zoo: Zoo) -> None:
    masked, sliced = (Run(zoo.adapted(MLP, spec()), shrink=shrink) for shrink in (False, "end"))
    for step in range(1, 17):
        assert torch.equal(masked.step(), sliced.step()) or step > 12
        assert masked.scheduler.ranks == sliced.scheduler.ranks
        if step < 12:
            assert sliced.ranks == [6, 6]
        if step == 12:
            assert sliced.ranks == list(sliced.scheduler.ranks.values()) != [6, 6]
            assert sum(sliced.ranks) == 4
            outputs = [run.gm(**MLP.inputs()) for run in (masked, sliced)]
            assert_close("model", outputs[1], outputs[0])
    assert masked.ranks == [6, 6]
    before = masked.gm(**MLP.inputs())
    masked.scheduler.finish()
    assert masked.ranks == sliced.ranks
    assert_close("model", masked.gm(**MLP.inputs()), before)
    with pytest.raises(AdapterError, match=r"^RankScheduler: finish\(\) was called"):
        masked.scheduler.step()


def test_ranks_can_shrink_at_every_allocation(zoo: Zoo) -> None:
    run = Run(zoo.adapted(MLP, spec(deltaT=2)), shrink="always")
    found, losses = [], []
    for _ in range(16):
        losses.append(run.step())
        found.append(sum(run.ranks))
        assert list(run.scheduler.ranks.values()) == run.ranks
    assert found == [12, 12, 12, 8, 8, 5, 5, 4, 4, 4, 4, 4, 4, 4, 4, 4]
    assert losses[-1] < losses[0]


def test_the_importance_of_what_is_left_is_kept(zoo: Zoo) -> None:
    masked, sliced = (Run(zoo.adapted(MLP, spec(deltaT=4)), shrink=shrink) for shrink in (False, "always"))
    for _ in range(4):
        masked.step()
        sliced.step()
    kept = masked.scheduler.state_dict()["kept"]
    before, after = (run.scheduler.state_dict()["tensors"] for run in (masked, sliced))
    assert 0 < sum(map(sum, kept.values())) < 12
    for name, left in after.items():
        _, site, parameter, _ = name.split(".")
        index = torch.tensor(kept[site]).nonzero().squeeze(1)
        assert torch.equal(left, before[name].index_select(-1 if parameter == "lora_B" else -2, index))
    assert {name.split(".")[1] for name in after} == {site for site, mask in kept.items() if any(mask)}


def test_ranks_that_are_masked_can_come_back(zoo: Zoo) -> None:
    """Until the last allocation; this is why it alone slices by default."""
    run = Run(zoo.adapted(MLP, spec(tinit=0, total_step=40)))
    masks = []
    for _ in range(35):
        run.step()
        masks.append([kept for mask in run.scheduler.state_dict()["kept"].values() for kept in mask])
    back = [now and not before for a, b in itertools.pairwise(masks) for before, now in zip(a, b, strict=True)]
    assert any(back)


def test_experts_give_up_a_rank_together(zoo: Zoo) -> None:
    family = FAMILIES["mixtral"]
    experts = LoraSpec(
        variant="adalora", r=4, target_modules=["q_proj"], target_parameters=["experts.down_proj"], options=OPTIONS
    )
    gm = zoo.adapted(family, experts).eval()
    optimizer = AdamW([p for p in gm.parameters() if p.requires_grad], lr=1e-2)
    scheduler = RankScheduler(gm, optimizer)
    for _ in range(13):
        (loss_of(gm, family) + scheduler.penalty()).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert {s.name: s.r for s in lorafx.sites(gm)} == scheduler.ranks
    assert sum(scheduler.ranks.values()) == 2 * len(scheduler.ranks)


def test_the_budget_goes_to_the_layers_that_have_something_to_learn() -> None:
    """A shift of rank 6 in two of twelve layers, and a budget of one rank a layer."""
    task = planted()
    options = {"target_r": 1, "tinit": 50, "tfinal": 100, "deltaT": 5, "total_step": 300, "orth_reg_weight": 0.01}
    adalora = LoraSpec(variant="adalora", r=6, alpha=12, target_modules=r"layers\.\d+", options=options)
    gm = lorafx.apply(task.base, adalora, task.inputs[:8], seed=0)
    optimizer = AdamW([p for p in gm.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    scheduler = RankScheduler(gm, optimizer)
    start = task.loss(gm)
    for rows in torch.randint(len(task.inputs), (300, 128)):
        (task.loss(gm, rows) + scheduler.penalty()).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    ranks = {site.name: site.r for site in lorafx.sites(gm)}
    assert sum(ranks.values()) == 12
    assert sum(ranks[place] for place in PLACES) >= 9, ranks
    assert sum(r == 0 for r in ranks.values()) >= 6
    assert task.loss(gm) < 0.05 * start


# Checkpoints


@pytest.mark.parametrize("shrink", ["end", "always", False])
@pytest.mark.parametrize("at", [1, 7, 13])
def test_a_resumed_run_repeats_the_uninterrupted_one(zoo: Zoo, shrink: Any, at: int, tmp_path: Path) -> None:
    whole = Run(zoo.adapted(MLP, spec()), shrink=shrink)
    for _ in range(at):
        whole.step()
    torch.save(
        {n: x.state_dict() for n, x in {"gm": whole.gm, "o": whole.optimizer, "s": whole.scheduler}.items()},
        tmp_path / "checkpoint.pt",
    )
    rest = [whole.step() for _ in range(16 - at)]

    resumed = Run(zoo.adapted(MLP, spec(), seed=1), shrink=shrink)
    states = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed.scheduler.load_state_dict(states["s"])
    resumed.gm.load_state_dict(states["gm"])
    resumed.optimizer.load_state_dict(states["o"])
    assert [resumed.step() for _ in range(16 - at)] == rest
    assert same(resumed.gm.state_dict(), whole.gm.state_dict())
    assert same(resumed.scheduler.state_dict(), whole.scheduler.state_dict())
    json.dumps({n: v for n, v in whole.scheduler.state_dict().items() if n != "tensors"})


@pytest.mark.parametrize("at", [7, 13])
def test_a_checkpoint_keeps_it_as_an_extra(zoo: Zoo, at: int, tmp_path: Path) -> None:
    whole, resumed = (Run(zoo.adapted(MLP, spec(), seed=seed), shrink="always") for seed in (0, 1))
    for _ in range(at):
        whole.step()
    save_checkpoint(whole.gm, tmp_path, whole.optimizer, step=at, extras={"ranks": whole.scheduler})
    assert load_checkpoint(resumed.gm, tmp_path, resumed.optimizer, extras={"ranks": resumed.scheduler}) == at
    assert [resumed.step() for _ in range(16 - at)] == [whole.step() for _ in range(16 - at)]
    assert same(resumed.gm.state_dict(), whole.gm.state_dict())


def test_a_state_of_another_run_is_refused_and_nothing_is_changed(zoo: Zoo) -> None:
    run, other = Run(zoo.adapted(MLP, spec())), Run(zoo.adapted(MLP, spec()), target_r=1, shrink=False)
    for _ in range(3):
        run.step()
    state = run.scheduler.state_dict()
    with pytest.raises(AdapterError, match="not of this run: target_r is 2 there and 1 here; shrink is 'end' there"):
        other.scheduler.load_state_dict(state)
    fresh = Run(zoo.adapted(MLP, spec()))
    before = fresh.scheduler.state_dict()
    with pytest.raises(AdapterError, match="it has no steps, ranks"):
        fresh.scheduler.load_state_dict({n: v for n, v in state.items() if n not in ("steps", "ranks")})
    with pytest.raises(AdapterError, match="site 'x' is only there; site '3' is only here"):
        fresh.scheduler.load_state_dict({**state, "ranks": {"0": 6, "x": 6}})
    tensors = {**state["tensors"], "sensitivity.0.lora_A.default": torch.zeros(6, 20)}
    with pytest.raises(AdapterError, match=r"site '0': sensitivity of lora_A is \[6, 20\] there and \[6, 19\] here"):
        fresh.scheduler.load_state_dict({**state, "tensors": tensors})
    assert same(fresh.scheduler.state_dict(), before)


# A trainer


def steady_bert() -> nn.Module:
    """Without dropout, whose masks would be others for half batches."""
    config = BERT.build().config
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    torch.manual_seed(0)
    return hf.BertForSequenceClassification(config)


STEADY = dataclasses.replace(BERT, name="bert without dropout", build=steady_bert)


def trainer(
    gm: CapturedModule,
    directory: Path,
    cls: type[hf.Trainer] = LoraTrainer,
    shrink: Any = "end",
    **settings: Any,
) -> tuple[hf.Trainer, RankSchedulerCallback]:
    inputs = {**BERT.inputs(), "labels": BERT.labels()}
    rows = [{n: v[i] for n, v in inputs.items()} for i in range(2)] * 16
    defaults: dict[str, Any] = {
        "max_steps": 16, "per_device_train_batch_size": 2, "train_sampling_strategy": "sequential",
        "learning_rate": 1e-2, "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no",
        "report_to": [], "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    arguments = hf.TrainingArguments(output_dir=str(directory), **(defaults | settings))
    callback = RankSchedulerCallback(shrink=shrink)
    return cls(gm, arguments, train_dataset=rows, eval_dataset=rows[:2], callbacks=[callback]), callback


def losses(run: hf.Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.xdist_group("trainer")
def test_under_the_trainer_it_is_the_plain_loop(zoo: Zoo, tmp_path: Path) -> None:
    """Penalty, accumulation and clipping included: half batches in the trainer, whole ones in the loop."""
    gm, plain = zoo.adapted(STEADY, spec()), zoo.adapted(STEADY, spec())
    run, callback = trainer(
        gm, tmp_path, hf.Trainer, per_device_train_batch_size=1, gradient_accumulation_steps=2, max_grad_norm=0.5
    )
    run.train()
    trained = [p for p in plain.parameters() if p.requires_grad]
    optimizer = AdamW(trained, lr=1e-2, weight_decay=0.0)
    scheduler = RankScheduler(plain, optimizer)
    for _ in range(16):
        (loss_of(plain.train(), STEADY) + scheduler.penalty()).backward()
        nn.utils.clip_grad_norm_([p for p in plain.parameters() if p.requires_grad], 0.5)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert callback.scheduler is not None
    assert callback.scheduler.steps == 16
    assert callback.scheduler.ranks == scheduler.ranks
    assert [site.r for site in lorafx.sites(gm)] == list(scheduler.ranks.values())
    for actual, expected in zip(leaves(gm(**BERT.inputs())), leaves(plain(**BERT.inputs())), strict=True):
        assert_close("model", actual, expected)


@pytest.mark.xdist_group("trainer")
@pytest.mark.parametrize(("shrink", "at"), [("end", 4), ("end", 14), ("always", 6)])
def test_a_trainer_resumes_before_and_after_ranks_have_shrunk(zoo: Zoo, shrink: str, at: int, tmp_path: Path) -> None:
    gm, other = zoo.adapted(BERT, spec()), zoo.adapted(BERT, spec(), seed=1)
    whole, _ = trainer(gm, tmp_path, shrink=shrink, save_strategy="steps", save_steps=2)
    whole.train()
    resumed, _ = trainer(other, tmp_path, shrink=shrink)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    assert losses(resumed) == losses(whole)
    assert same(other.state_dict(), gm.state_dict())
    assert [s.r for s in lorafx.sites(other)] == [s.r for s in lorafx.sites(gm)]


@pytest.mark.xdist_group("trainer")
@pytest.mark.parametrize("only", [False, True], ids=["checkpoint", "adapter"])
def test_the_best_model_comes_back_with_the_ranks_that_it_had(zoo: Zoo, only: bool, tmp_path: Path) -> None:
    """With the worst counted as the best, that is the first one, whose ranks were all there."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    saving = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    gm = zoo.adapted(BERT, spec())
    run, _ = trainer(gm, tmp_path, **saving, **best, learning_rate=1e-3, save_only_model=only)
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert {s.r for s in lorafx.sites(gm)} == {6}
    assert run.evaluate()["eval_loss"] == next(e["eval_loss"] for e in run.state.log_history if "eval_loss" in e)


@pytest.mark.xdist_group("trainer")
def test_what_a_trainer_cannot_schedule_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    gm = zoo.adapted(BERT, spec())
    with pytest.raises(
        SpecError, match=r"^RankScheduler\.total_steps=16 is not allowed: the training has only 9 steps"
    ):
        trainer(gm, tmp_path, max_steps=9)[0].train()
    run, _ = trainer(gm, tmp_path, hf.Trainer, max_steps=16, save_strategy="steps", save_steps=16)
    run.train()
    with pytest.raises(PassError, match="does not say how far the ranks have come"):
        trainer(gm, tmp_path, hf.Trainer, max_steps=17)[0].train(str(tmp_path / "checkpoint-16"))


class Scaled(SGD):
    """What the trainer hands its callbacks under float16, which it has on a GPU only."""

    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    step_was_skipped = False


def test_a_grad_scaler_is_followed(zoo: Zoo) -> None:
    gm, reference = zoo.adapted(MLP, spec()), Run(zoo.adapted(MLP, spec()))
    optimizer = Scaled([p for p in gm.parameters() if p.requires_grad], lr=0.1)
    optimizer.scaler.scale(torch.zeros(()))  # it has its scale from the first loss on
    callback, state, control = RankSchedulerCallback(), hf.TrainerState(max_steps=16), hf.TrainerControl()
    arguments: Any = None
    callback.on_train_begin(arguments, state, control, model=gm, optimizer=optimizer)
    callback.on_step_begin(arguments, state, control, optimizer=optimizer)
    reference.scheduler.add_penalty_gradient()
    for name, parameter in reference.gm.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(gm.get_parameter(name).grad, 8.0 * parameter.grad)
    assert callback.scheduler is not None
    loss_of(gm, MLP).backward()
    for skipped, steps in ((True, 0), (False, 1)):
        optimizer.step_was_skipped = skipped
        callback.on_optimizer_step(arguments, state, control, optimizer=optimizer)
        assert callback.scheduler.steps == steps


# Two processes


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two gloo processes under torchrun leave behind."""
    directory = tmp_path_factory.mktemp("ranks")
    launch = ["--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    worker = Path(__file__).with_name("rank_scheduler_worker.py")
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *launch, str(worker), str(directory)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        cwd=directory,
        check=True,
        timeout=300,
    )
    read: dict[str, Any] = json.loads((directory / "found.json").read_text())
    return read


@pytest.mark.xdist_group("ddp")
def test_processes_agree_on_the_ranks_and_only_mask_them(found: dict[str, Any]) -> None:
    assert found["masks_agree"]
    assert set(found["first"]) == {3}
    assert found["masked"] == found["ranks"] == found["ranks_of_one_process"]
    assert sum(found["ranks"].values()) == 12


@pytest.mark.xdist_group("ddp")
def test_parameters_that_ddp_holds_are_not_replaced(found: dict[str, Any]) -> None:
    assert "shrink='always' would replace parameters while 2 processes train together" in found["refusal"]
    assert "call finish() after training" in found["refusal"]


@pytest.mark.xdist_group("ddp")
def test_after_training_they_are_and_a_new_wrapper_trains_them(found: dict[str, Any]) -> None:
    assert found["finished"] == found["ranks"]
    assert found["change"] <= TOLERANCES["model", torch.float32].error
    assert found["after"].startswith("RankScheduler: finish() was called")
    assert found["agree_when_wrapped_anew"]


# What is refused


def test_settings_that_leave_nothing_to_schedule_are_refused(zoo: Zoo) -> None:
    gm = zoo.adapted(MLP, spec())
    with pytest.raises(SpecError, match=r"^RankScheduler\.target_r=6 is not allowed: the sites start with r=6, so no"):
        Run(gm, target_r=6)
    with pytest.raises(SpecError, match=r"total_steps=6, tinit=2 and tfinal=4 leave no steps"):
        Run(gm, total_steps=6)
    with pytest.raises(
        SpecError, match=r"^RankScheduler\.beta1=1 is not allowed: expected a number above 0 and below 1"
    ):
        Run(gm, beta1=1)
    with pytest.raises(SpecError, match=r"^RankScheduler\.shrink='never' is not allowed"):
        Run(gm, shrink="never")
    with pytest.raises(SpecError, match=r"^RankScheduler\.total_steps is missing"):
        Run(zoo.adapted(MLP, spec(total_step=None)))


def test_what_does_not_train_is_refused(zoo: Zoo) -> None:
    with pytest.raises(AdapterError, match=r"^adapter 'default' has no AdaLoRA sites.*variant=\"adalora\""):
        Run(zoo.adapted(MLP, LoraSpec()))
    gm = zoo.adapted(MLP, spec())
    first, *others = (p for p in gm.parameters() if p.requires_grad)
    with pytest.raises(AdapterError, match=r"^'0\.lora_A\.default' is not in the optimizer: make"):
        RankScheduler(gm, SGD(others, lr=0.1))
    first.requires_grad_(False)
    with pytest.raises(AdapterError, match=r"^'0\.lora_A\.default' does not require a gradient"):
        RankScheduler(gm, SGD([first, *others], lr=0.1))


def test_a_step_without_its_gradients_is_refused_and_changes_nothing(zoo: Zoo) -> None:
    run = Run(zoo.adapted(MLP, spec()))
    run.step()
    before = run.scheduler.state_dict()
    with pytest.raises(AdapterError, match=r"'0\.lora_A\.default' has no gradient. Call step\(\) after loss\.backward"):
        run.scheduler.step()
    loss_of(run.gm, MLP).backward()
    gradient = run.gm.get_parameter("3.lora_B.default").grad
    assert gradient is not None
    gradient[0, 0] = torch.inf
    with pytest.raises(AdapterError, match=r"the gradient of '3\.lora_B\.default' holds NaN or Inf"):
        run.scheduler.step()
    assert same(run.scheduler.state_dict(), before)


def test_an_optimizer_whose_state_has_other_shapes_is_refused_at_the_first_step(zoo: Zoo) -> None:
    gm = zoo.adapted(MLP, spec())
    optimizer = Adafactor([p for p in gm.parameters() if p.requires_grad])
    sliced, masked = RankScheduler(gm, optimizer), RankScheduler(gm, optimizer, shrink=False)
    loss_of(gm, MLP).backward()
    optimizer.step()
    with pytest.raises(AdapterError, match=r"the optimizer's 'row_var' is \[6, 1\].*or let ranks be masked only"):
        sliced.step()
    assert sliced.steps == 0
    masked.step()
