"""Checkpoints: a run that stops and goes on is the run that never stopped, bit for bit; any other run is refused."""

from __future__ import annotations

import contextlib
import copy
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import lr_scheduler

import lorafx
from conftest import Zoo, loss_of, same
from lorafx import AdapterError, LoraSpec
from lorafx.checkpoint import CHECKPOINT_NAME, load_checkpoint, save_checkpoint
from lorafx.graph import CapturedModule, get_path
from lorafx.ir import adapters, find_adapter
from lorafx.plain import pack, unpack
from lorafx.rank_scheduler import RankScheduler
from zoo import FAMILIES, Family

MLP, CONVNET = FAMILIES["mlp"], FAMILIES["convnet"]

DROPOUT: dict[str, Any] = {"r": 3, "alpha": 5, "dropout": 0.2}


def trained(gm: nn.Module) -> list[nn.Parameter]:
    return [p for p in gm.parameters() if p.requires_grad]


def adamw(gm: CapturedModule) -> torch.optim.Optimizer:
    """With a group of its own for the last two parameters, as without weight decay for biases."""
    first, last = trained(gm)[:-2], trained(gm)[-2:]
    return torch.optim.AdamW([{"params": first}, {"params": last, "weight_decay": 0.0}], lr=1e-2)


def sgd(gm: CapturedModule) -> torch.optim.Optimizer:
    return torch.optim.SGD(trained(gm), lr=1e-2, momentum=0.9, nesterov=True)


def cosine(optimizer: torch.optim.Optimizer) -> Any:
    return lr_scheduler.CosineAnnealingLR(optimizer, T_max=6)


def warmup(optimizer: torch.optim.Optimizer) -> Any:
    return lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4))


def steps(optimizer: torch.optim.Optimizer) -> Any:
    """Whose state has a Counter with numbers for keys, and infinity."""
    after = lr_scheduler.MultiStepLR(optimizer, milestones=[2, 4], gamma=0.5)
    return lr_scheduler.SequentialLR(optimizer, [warmup(optimizer), after], milestones=[1])


@dataclass
class Run:
    """A training run, made as a script would make it."""

    gm: CapturedModule
    family: Family = MLP
    optimizer: Callable[[CapturedModule], torch.optim.Optimizer] = adamw
    scheduler: Callable[[torch.optim.Optimizer], Any] = cosine
    losses: list[float] = field(default_factory=list)
    ranks: RankScheduler | None = None

    def __post_init__(self) -> None:
        self.opt = self.optimizer(self.gm)
        self.sched = self.scheduler(self.opt)

    def train(self, count: int) -> None:
        self.gm.train()
        for _ in range(count):
            self.opt.zero_grad()
            loss = loss_of(self.gm, self.family)
            (loss if self.ranks is None else loss + self.ranks.penalty()).backward()
            self.opt.step()
            if self.ranks is not None:
                self.ranks.step()
            self.sched.step()
            self.losses.append(loss.item())

    def extras(self) -> dict[str, Any]:
        return {} if self.ranks is None else {"ranks": self.ranks}

    def save(self, directory: Path, step: int = 3) -> None:
        save_checkpoint(self.gm, directory, self.opt, self.sched, step=step, extras=self.extras())

    def load(self, directory: Path) -> int:
        return load_checkpoint(self.gm, directory, self.opt, self.sched, extras=self.extras())

    def state(self) -> Any:
        """All of it, for comparing."""
        return dict(self.gm.state_dict()), self.opt.state_dict(), self.sched.state_dict(), torch.get_rng_state()


def assert_resumes(make: Callable[[int], Run], directory: Path) -> Run:
    """Six steps in one go against three, a checkpoint, all made anew from another seed, and three more."""
    torch.manual_seed(1)
    whole = make(0)
    whole.train(3)
    whole.save(directory)
    whole.train(3)
    torch.manual_seed(2)
    resumed = make(5)
    resumed.train(1)  # what is there before counts for nothing
    resumed.losses.clear()
    assert resumed.load(directory) == 3
    resumed.train(3)
    assert resumed.losses == whole.losses[3:]
    assert same(resumed.state(), whole.state())
    return resumed


VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "patterns": {"rank_pattern": {"3": 2}, "alpha_pattern": {"0": 1.5}, "rslora": True, "bias": "all"},
    "dora": {"variant": "dora", "modules_to_save": ["5"]},
    "vera": {"variant": "vera"},
    "lora_bias": {"variant": "lora_bias"},
    "adalora": {"variant": "adalora", "options": {"total_step": 9}},
    "pissa": {"init": "pissa"},
    "bfloat16": {"adapter_dtype": "bfloat16"},
}


@pytest.mark.xdist_group("mlp")
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_goes_on_bit_for_bit(zoo: Zoo, variant: str, tmp_path: Path) -> None:
    spec = LoraSpec(**DROPOUT | VARIANTS[variant])
    assert_resumes(lambda seed: Run(zoo.adapted(MLP, spec, seed)), tmp_path)


@pytest.mark.xdist_group("mlp")
@pytest.mark.parametrize("scheduler", [cosine, warmup, steps])
@pytest.mark.parametrize("optimizer", [adamw, sgd])
def test_optimizers_and_schedulers_go_on(zoo: Zoo, optimizer: Any, scheduler: Any, tmp_path: Path) -> None:
    spec = LoraSpec(**DROPOUT)
    assert_resumes(lambda seed: Run(zoo.adapted(MLP, spec, seed), MLP, optimizer, scheduler), tmp_path)


@pytest.mark.xdist_group("convnet")
def test_statistics_of_the_base_that_training_moves_go_on(zoo: Zoo, tmp_path: Path) -> None:
    """BatchNorm's buffers, which are in no adapter's file."""
    spec = LoraSpec(**DROPOUT, target_modules=["features.3", "hidden"])
    run = assert_resumes(lambda seed: Run(zoo.adapted(CONVNET, spec, seed), CONVNET), tmp_path)
    saved = load_file(tmp_path / CHECKPOINT_NAME)
    assert int(saved["model.features.1.num_batches_tracked"]) == 3
    assert int(get_path(run.gm, "features.1.num_batches_tracked")) == 6
    weights = {n for n, p in run.gm.named_parameters() if not p.requires_grad}
    assert not {f"model.{n}" for n in weights} & saved.keys(), "nothing of the base is in it"


@pytest.mark.xdist_group("mlp")
def test_ranks_that_training_took_away_stay_away(zoo: Zoo, tmp_path: Path) -> None:
    spec = LoraSpec(r=4, variant="adalora", dropout=0.2, target_modules=["0", "3"])

    def make(seed: int) -> Run:
        run = Run(zoo.adapted(MLP, spec, seed), optimizer=sgd)
        run.ranks = RankScheduler(run.gm, run.opt, total_steps=7, target_r=1, shrink="always")
        return run

    resumed = assert_resumes(make, tmp_path)
    assert sum(site.r for site in find_adapter(resumed.gm).sites) == 2
    saved = load_file(tmp_path / CHECKPOINT_NAME)
    assert 2 < sum(len(saved[f"model.{n}.lora_E.default"]) for n in ("0", "3")) < 8


@pytest.mark.xdist_group("mlp")
def test_all_adapters_of_a_graph_are_in_it(zoo: Zoo, tmp_path: Path) -> None:
    def make(seed: int) -> Run:
        gm = zoo.adapted(MLP, LoraSpec(**DROPOUT), seed)
        lorafx.add_adapter(gm, LoraSpec(r=2, variant="dora", target_modules=["3"]), "other", seed=seed)
        return Run(gm)

    resumed = assert_resumes(make, tmp_path)
    assert list(adapters(resumed.gm)) == ["default", "other"]
    lorafx.set_adapter(resumed.gm, "other")
    with pytest.raises(AdapterError, match=r"- active adapters: \['default'\] there, \['other'\] here"):
        resumed.load(tmp_path)
    lorafx.merge(resumed.gm, inplace=True)
    for go in (resumed.load, resumed.save):
        with pytest.raises(AdapterError, match="adapter 'other' is merged into the weights; call unmerge"):
            go(tmp_path)


@pytest.mark.xdist_group("mlp")
def test_without_an_optimizer_and_without_the_random_state(zoo: Zoo, tmp_path: Path) -> None:
    gm = zoo.adapted(MLP, LoraSpec(**DROPOUT))
    save_checkpoint(gm, tmp_path, rng=False)
    other = zoo.adapted(MLP, LoraSpec(**DROPOUT), seed=1)
    before = torch.get_rng_state()
    assert load_checkpoint(other, tmp_path) == 0
    assert same(dict(other.state_dict()), dict(gm.state_dict()))
    assert torch.equal(torch.get_rng_state(), before)


# What is not the same run


def with_spec(**fields: Any) -> Callable[[Zoo], Run]:
    return lambda zoo: Run(zoo.adapted(MLP, LoraSpec(**DROPOUT | fields)))


def one_group(gm: CapturedModule) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained(gm), lr=1e-2)


def swapped_groups(gm: CapturedModule) -> torch.optim.Optimizer:
    return torch.optim.AdamW([{"params": trained(gm)[:1]}, {"params": trained(gm)[1:]}], lr=1e-2)


def other_base(zoo: Zoo) -> Run:
    model = MLP.build()
    with torch.no_grad():
        model.get_parameter("3.weight")[0] += 1
    return Run(lorafx.apply(model, LoraSpec(**DROPOUT), MLP.inputs()))


OTHERS: dict[str, tuple[Callable[[Zoo], Run], str]] = {
    "sites": (with_spec(target_modules=["0"]), r"- adapter 'default': site '3' is only there\n"),
    "rank": (
        with_spec(r=2),
        r"- adapter 'default': site '0': r=3 there and 2 here, scaling=1\.666.* there and 2\.5 here",
    ),
    "shape": (
        with_spec(r=2),
        r"- tensor '0\.lora_A\.default': torch\.float32 \[3, 19\] there, torch\.float32 \[2, 19\] here",
    ),
    "dtype": (with_spec(adapter_dtype="float64"), r"- tensor '3\.lora_B\.default': torch\.float32 .* torch\.float64"),
    "scaling": (with_spec(alpha=6), r"site '3': scaling=1\.66.* there and 2\.0 here"),
    "dropout": (with_spec(dropout=0.0), r"site '0': dropout=0\.2 there and 0\.0 here"),
    "variant": (with_spec(variant="dora"), r"site '0': variant='lora' there and 'dora' here"),
    "trained modules": (with_spec(modules_to_save=["5"]), r"- tensor '_adapters\.default\.5\.bias' is only here"),
    "base": (other_base, r"- base weight '3\.weight' has other values: the run was on another base model"),
    "number of groups": (
        lambda zoo: Run(zoo.adapted(MLP, LoraSpec(**DROPOUT)), optimizer=one_group),
        r"- optimizer: 2 groups of parameters there, 1 here",
    ),
    "groups": (
        lambda zoo: Run(zoo.adapted(MLP, LoraSpec(**DROPOUT)), optimizer=swapped_groups),
        r"- optimizer: group 0: parameter '0\.lora_B\.default' is only there\n",
    ),
    "optimizer": (
        lambda zoo: Run(zoo.adapted(MLP, LoraSpec(**DROPOUT)), optimizer=sgd),
        r"- optimizer: AdamW there, SGD here",
    ),
    "scheduler": (
        lambda zoo: Run(zoo.adapted(MLP, LoraSpec(**DROPOUT)), scheduler=warmup),
        r"- scheduler: CosineAnnealingLR there, LambdaLR here",
    ),
}


@pytest.mark.xdist_group("mlp")
@pytest.mark.parametrize("other", OTHERS)
def test_another_run_is_refused_and_nothing_is_changed(zoo: Zoo, other: str, tmp_path: Path) -> None:
    make, message = OTHERS[other]
    run = with_spec()(zoo)
    run.train(1)
    run.save(tmp_path)
    found = make(zoo)
    before = copy.deepcopy(found.state())
    with pytest.raises(AdapterError, match=f"(?s)not a checkpoint of this run; nothing was loaded:.*{message}"):
        found.load(tmp_path)
    assert same(found.state(), before)


@pytest.mark.xdist_group("mlp")
def test_what_is_given_must_be_what_was_saved(zoo: Zoo, tmp_path: Path) -> None:
    run = with_spec()(zoo)
    run.save(tmp_path)
    with pytest.raises(AdapterError, match=r"- optimizer: AdamW there, none here\n.*- scheduler: Cosine.* none here"):
        load_checkpoint(run.gm, tmp_path)
    with pytest.raises(AdapterError, match=r"- extra 'ranks' is only here"):
        load_checkpoint(run.gm, tmp_path, run.opt, run.sched, extras={"ranks": run.sched})


@pytest.mark.xdist_group("mlp")
def test_what_cannot_be_kept_is_named_and_nothing_is_written(zoo: Zoo, tmp_path: Path) -> None:
    run = with_spec()(zoo)
    run.opt.param_groups[1]["hook"] = print
    with pytest.raises(
        AdapterError, match=r"^optimizer\.groups\.1\.settings\.hook is a builtin_function_or_method, which"
    ):
        run.save(tmp_path)
    del run.opt.param_groups[1]["hook"]
    run.opt.add_param_group({"params": [nn.Parameter(torch.ones(2, 3))]})
    with pytest.raises(AdapterError, match=r"^optimizer: parameter 0 of group 2, \[2, 3\], is not one of the graph's"):
        run.save(tmp_path)
    with pytest.raises(AdapterError, match="the graph is captured and has no adapters"):
        save_checkpoint(zoo.captured(MLP), tmp_path)
    with pytest.raises(AdapterError, match=r"model\.0\.lora_A\.default has no data \(it is on the meta device\)"):
        save_checkpoint(run.gm.to("meta"), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.xdist_group("mlp")
def test_states_in_a_wider_dtype_than_the_parameters_keep_it(zoo: Zoo, tmp_path: Path) -> None:
    """torch casts an optimizer's state to the dtype of the parameter when it loads one."""

    def wide(gm: CapturedModule) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(trained(gm), lr=1e-2, momentum=0.9)
        for parameter in trained(gm):
            optimizer.state[parameter]["momentum_buffer"] = torch.rand(parameter.shape)
        return optimizer

    gm = zoo.adapted(MLP, LoraSpec(**DROPOUT, adapter_dtype="bfloat16"))
    saved, other = wide(gm), wide(gm)
    save_checkpoint(gm, tmp_path, saved)
    load_checkpoint(gm, tmp_path, other)
    assert same(other.state_dict(), saved.state_dict())
    assert {s["momentum_buffer"].dtype for s in other.state.values()} == {torch.float32}


class Died(BaseException):
    """Stands for the end of the process."""


@pytest.mark.xdist_group("mlp")
def test_a_process_that_dies_while_saving_leaves_the_old_checkpoint(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = with_spec()(zoo)
    run.save(tmp_path, step=1)
    for place in ("lorafx.checkpoint.save_file", "pathlib.Path.replace"):
        with monkeypatch.context() as patch, contextlib.suppress(Died):

            def die(*_: object, **__: object) -> None:
                raise Died

            patch.setattr(place, die)
            run.save(tmp_path, step=2)
        assert run.load(tmp_path) == 1
    run.save(tmp_path, step=2)
    assert run.load(tmp_path) == 2
    assert [p.name for p in tmp_path.iterdir()] == [CHECKPOINT_NAME]


@pytest.mark.xdist_group("mlp")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "not a whole checkpoint .*; take an earlier one"),
        (lambda path: path.unlink(), "no such file; save_checkpoint writes it"),
        (lambda path: save_file(load_file(path), path), "tensors, but no checkpoint of lorafx's"),
        (
            lambda path: save_file(load_file(path), path, {"lorafx_checkpoint": json.dumps({"version": 9})}),
            "of version 9; this lorafx reads version 1",
        ),
    ],
)
def test_a_damaged_file_is_named(zoo: Zoo, damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    run = with_spec()(zoo)
    run.save(tmp_path)
    damage(tmp_path / CHECKPOINT_NAME)
    before = copy.deepcopy(run.state())
    with pytest.raises(AdapterError, match=rf"checkpoint\.safetensors: {message}"):
        run.load(tmp_path)
    assert same(run.state(), before)
    (tmp_path / "file").touch()
    with pytest.raises(AdapterError, match=r"file: the checkpoint could not be written: .*exists"):
        run.save(tmp_path / "file")


def test_the_header_is_json_that_people_can_read(zoo: Zoo, tmp_path: Path) -> None:
    with_spec()(zoo).save(tmp_path)
    with safe_open(tmp_path / CHECKPOINT_NAME, framework="pt") as file:  # type: ignore[no-untyped-call]
        header = json.loads(file.metadata()["lorafx_checkpoint"])
    assert header["graph"]["adapters"]["default"]["3"] == {"variant": "lora", "r": 3, "scaling": 5 / 3, "dropout": 0.2}


def test_plain_data_comes_back_as_it_was() -> None:
    value = {
        "betas": (0.9, [1, None, True], {}),
        "milestones": Counter({3: 1, 30: 2}),
        "by number": {1: {"exp_avg": torch.arange(3)}, 2: "two"},
        "best": float("inf"),
        "a.b": 0.1 + 0.2,
        "tensor": {"tensor": "not one"},
        "x": {"y": torch.ones(1)},
        "x.y": torch.zeros(1),
    }
    tensors: dict[str, Tensor] = {}
    packed = json.loads(json.dumps(pack(value, "state", tensors)))
    assert same(unpack(packed, tensors), value)
    assert list(tensors) == ["state.by number.1.exp_avg", "state.x.y", "state.x.y (2)"]
    for odd, name in (
        ({"a": {3}}, "state.a is a set"),
        ([b""], "state.0 is a bytes"),
        ({(1, 2): 3}, "state is a dict"),
    ):
        with pytest.raises(AdapterError, match=name):
            pack(odd, "state", {})
