"""Ranks before training: they go where the gain is, cost what was allowed, and make a spec that applies."""

from __future__ import annotations

import json
import math
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.eva import get_eva_state_dict
from torch import Tensor, nn

import lorafx
from conftest import Zoo, loss_of, randomize, same, state_of
from lorafx import AdapterError, Allocation, LoraSpec, MatchError, SpecError, allocate_ranks, with_ranks
from lorafx.passes.observe import Directions
from planted import DEPTH, PLACES, RANK, Task, planted_fields
from tolerances import assert_close
from zoo import FAMILIES

MLP, BERT, LLAMA = FAMILIES["mlp"], FAMILIES["bert"], FAMILIES["llama"]
EACH = LoraSpec(r=1, alpha=2, target_modules=r"layers\.\d+")
BATCH_ONLY: dict[str, Any] = {"dynamic_shapes": {"x": {0: "batch"}}}


@pytest.fixture(scope="module")
def task() -> Task:
    return planted_fields()


def allocated(task: Task, method: Any, spec: LoraSpec = EACH, **options: Any) -> Allocation:
    """From two batches."""
    halves = [(task.inputs[:512],), (task.inputs[512:],)]

    def loss(outputs: Tensor, batch: tuple[Tensor]) -> Tensor:
        targets = task.targets[:512] if batch[0] is halves[0][0] else task.targets[512:]
        return nn.functional.mse_loss(outputs, targets)

    return allocate_ranks(
        task.base,
        spec,
        iter(halves),
        method=method,
        loss_fn=loss,
        example_inputs=task.inputs[:4],
        **{**BATCH_ONLY, **options},
    )


def loss_after_training(task: Task, spec: LoraSpec) -> tuple[float, int]:
    """And the number of parameters that trained."""
    gm = lorafx.apply(task.base, spec, task.inputs[:4], **BATCH_ONLY, seed=0)
    trained = [p for p in gm.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for rows in torch.randint(len(task.inputs), (150, 128), generator=torch.Generator().manual_seed(0)):
        optimizer.zero_grad()
        task.loss(gm, rows).backward()
        optimizer.step()
    return task.loss(gm).item(), sum(p.numel() for p in trained)


@pytest.mark.filterwarnings("ignore::lorafx.FrozenHeadWarning")
@pytest.mark.parametrize("method", ["eva", "gradient"])
def test_the_budget_goes_to_the_layers_that_have_something_to_learn(task: Task, method: str) -> None:
    """A shift of rank 6 in two of twelve layers; as many ranks as layers."""
    found = allocated(task, method, max_rank=RANK)
    ranks = {row.site: row.r for row in found.rows}
    assert ranks == {f"layers.{i}": RANK if f"layers.{i}" in PLACES else 0 for i in range(DEPTH)}
    (everywhere, parameters), (there, no_more) = (loss_after_training(task, spec) for spec in (EACH, found.spec))
    assert parameters == no_more == found.parameters
    assert there < 0.01 * everywhere


# Gains


def test_shares_of_variance_are_those_of_all_rows_at_once() -> None:
    rows = torch.randn(200, 30) * torch.logspace(0, -2, 30) + torch.randn(30)
    centred = (rows - rows.mean(0)).double()
    expected = torch.linalg.svdvals(centred).square() / centred.square().sum()
    directions = Directions(30)
    for part in rows.split([7, 1, 60, 132]):
        directions.add(part)
    assert_close("layer", torch.tensor(directions.explained(30)).float(), expected.float())


def test_eva_gives_the_ranks_that_peft_gives(zoo: Zoo) -> None:
    """One batch, over and over, which is what makes PEFT's converge; rho and the budget are the defaults of both."""
    torch.manual_seed(3)
    x = torch.randn(300, 19) * torch.logspace(0, -1.5, 19)
    model = zoo.eager(MLP)
    config = peft.LoraConfig(
        r=4, target_modules=["0", "3"], init_lora_weights="eva", eva_config=peft.EvaConfig(rho=2.0, tau=0.999)
    )
    theirs = get_eva_state_dict(
        model,
        [x],
        config,
        forward_fn=lambda module, inputs: module(inputs),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    found = allocate_ranks(model, LoraSpec(r=4, target_modules=["0", "3"]), [x], example_inputs=x[:2])
    assert {row.site: row.r for row in found.rows} == {name: len(a) for name, a in theirs.items()}
    assert len({row.r for row in found.rows}) == 2


@pytest.mark.xdist_group("bert")
def test_ranks_are_bought_by_the_gradients_of_all_batches(zoo: Zoo) -> None:
    """Each rank that was bought is worth more, for its price, than each that could have been bought instead."""
    batches = [{**inputs(), "labels": torch.arange(n)} for n, inputs in ((2, BERT.inputs), (3, BERT.other_inputs))]
    spec = LoraSpec(r=2, target_modules=["query", "intermediate.dense"])
    found = allocate_ranks(zoo.captured(BERT), spec, batches, method="gradient", budget=900)
    model = zoo.eager(BERT)
    for batch in batches:
        model(**batch).loss.backward()
    bought, others = [], []
    for row in found.rows:
        gains = torch.linalg.svdvals(model.get_submodule(row.site).weight.grad)[:4].square()
        assert_close("peft", torch.tensor(row.gain), gains[: row.r].sum() / gains.sum())
        worth = (gains / sum(row.shape)).tolist()
        bought += worth[: row.r]
        if sum(row.shape) <= found.budget - found.parameters:  # it could still be paid
            others += worth[row.r :]
    assert 0 < len(bought) < 16
    assert min(bought) >= max(others, default=0.0)


@pytest.mark.xdist_group("llama")
def test_sites_with_the_same_inputs_have_the_same_ranks(zoo: Zoo) -> None:
    spec = LoraSpec(r=3, target_modules=["q_proj", "k_proj", "v_proj"])
    found = allocate_ranks(zoo.captured(LLAMA), spec, [LLAMA.inputs()])
    by_layer = {layer: {row.r for row in found.rows if f"layers.{layer}." in row.site} for layer in (0, 1)}
    assert all(max(ranks) - min(ranks) <= 1 for ranks in by_layer.values())
    assert sum(row.r for row in found.rows) == 18


@pytest.mark.xdist_group("bert")
def test_hidden_rows_are_not_looked_at(zoo: Zoo) -> None:
    """Another token where the mask is 0 changes nothing, which it would change in the embeddings' layer."""
    spec = LoraSpec(r=3, target_modules=["layer.0.attention.self.query", "intermediate.dense"])
    inputs = BERT.inputs()
    other = {**inputs, "input_ids": torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], 7)}
    gm = zoo.captured(BERT)
    gains = [[row.gain for row in allocate_ranks(gm, spec, [batch]).rows] for batch in (inputs, other)]
    assert_close("model", torch.tensor(gains[1]), torch.tensor(gains[0]))


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        pytest.param(name, targets, marks=pytest.mark.xdist_group(name), id=name)
        for name, targets in {
            "convnet": {"target_modules": ["features.3", "hidden"]},
            "mixtral": {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
            "gpt2": {"target_modules": ["c_attn", "c_proj"]},
        }.items()
    ],
)
def test_gradients_tell_the_ranks_of_every_kind_of_layer(zoo: Zoo, name: str, targets: Any) -> None:
    family, spec = FAMILIES[name], LoraSpec(r=3, **targets)
    batch = family.inputs() if family.task == "plain" else {**family.inputs(), "labels": family.labels()}
    loss: Any = None
    if family.task == "plain":

        def loss(outputs: Tensor, batch: Any) -> Tensor:
            return nn.functional.cross_entropy(outputs, family.labels())

    found = allocate_ranks(zoo.captured(family), spec, [batch], method="gradient", loss_fn=loss, budget=1500)
    assert 0 < found.parameters <= 1500
    gm = zoo.adapted(family, found.spec)
    assert sum(p.numel() for p in gm.parameters() if p.requires_grad) == found.parameters
    assert {s.name: s.r for s in lorafx.sites(gm)} == {row.site: row.r for row in found.rows if row.r}
    loss_of(gm, family).backward()


# Budgets


@pytest.mark.parametrize("variant", ["lora", "lora_bias", "dora"])
@pytest.mark.parametrize("budget", [400, 1000])
def test_a_budget_of_parameters_is_kept_and_used(zoo: Zoo, variant: str, budget: int) -> None:
    spec = LoraSpec(r=4, variant=variant, target_modules=["0", "3"])
    found = allocate_ranks(zoo.captured(MLP), spec, [torch.randn(50, 19)], budget=budget, max_rank=19)
    gm = zoo.adapted(MLP, found.spec)
    assert sum(p.numel() for p in gm.parameters() if p.requires_grad) == found.parameters <= budget
    assert budget - found.parameters < max(sum(row.shape) for row in found.rows) + 33


def test_a_mean_rank_a_least_and_a_largest_are_kept(task: Task) -> None:
    found = allocated(task, "eva", mean_rank=2.5, min_rank=1, max_rank=5)
    ranks = [row.r for row in found.rows]
    assert sum(ranks) == 30
    assert min(ranks) == 1
    assert max(ranks) == 5


def test_a_large_budget_gives_each_its_largest_rank_and_says_what_is_left(task: Task) -> None:
    found = allocated(task, "eva", budget=10**6)
    assert {row.r for row in found.rows} == {2}
    assert str(found).splitlines()[-1] == "24 ranks, 1,152 parameters; the budget is 1,000,000 parameters."
    assert "layers.11 " in str(found)


@pytest.mark.parametrize(("init", "largest"), [("orthogonal", [8, 8]), ("lora_ga", [9, 9]), ("pissa", [9, 9])])
def test_only_ranks_with_which_the_adapter_can_start_are_given(zoo: Zoo, init: str, largest: list[int]) -> None:
    """Weights of 33 x 19 and 27 x 33; lora_ga has at most half as many directions."""
    spec = LoraSpec(r=4, init=init, target_modules=["0", "3"])
    found = allocate_ranks(zoo.captured(MLP), spec, [torch.randn(60, 19)], budget=10**5, max_rank=9)
    assert [row.r for row in found.rows] == largest
    zoo.adapted(MLP, found.spec)
    if init != "orthogonal":
        found = allocate_ranks(zoo.captured(MLP), spec, [torch.randn(60, 19)], budget=10**5, max_rank=60)
        assert [row.r for row in found.rows] == ([9, 13] if init == "lora_ga" else [19, 27])
        zoo.adapted(MLP, found.spec)


# The pattern


@pytest.mark.parametrize("rslora", [False, True])
def test_the_pattern_can_be_saved_and_edited_and_keeps_the_scaling(zoo: Zoo, rslora: bool) -> None:
    spec = LoraSpec(
        r=4, alpha=6, rslora=rslora, alpha_pattern={"3": 5}, rank_pattern={"3": 2}, target_modules=["0", "3"]
    )
    found = allocate_ranks(zoo.captured(MLP), spec, [torch.randn(60, 19)])
    loaded = json.loads(json.dumps(found.rank_pattern))
    assert with_ranks(spec, loaded) == found.spec
    found.rank_pattern.update({"^0": 3, "^3": 7})
    edited = zoo.adapted(MLP, found.spec)
    assert {s.name: s.r for s in lorafx.sites(edited)} == {"0": 3, "3": 7}
    for site in lorafx.sites(edited):
        assert math.isclose(site.scaling, spec.scaling_for(site.name), rel_tol=1e-15)


@pytest.mark.parametrize("excluded", [None, ["intermediate.dense"], r".*\.intermediate\.dense"])
def test_sites_without_a_rank_are_left_out(zoo: Zoo, excluded: Any) -> None:
    spec = LoraSpec(r=2, exclude_modules=excluded)
    gm = zoo.captured(BERT)
    first = allocate_ranks(gm, spec, [BERT.inputs()])
    wanted = {row.site: (index % 3) for index, row in enumerate(first.rows)}
    first.rank_pattern.update({f"^{name.replace('.', chr(92) + '.')}": r for name, r in wanted.items()})
    found = {s.name: s.r for s in lorafx.sites(zoo.adapted(BERT, first.spec))}
    assert found == {name: r for name, r in wanted.items() if r}
    assert any("intermediate" in name for name in found) == (excluded is None)


@pytest.mark.parametrize("method", ["eva", "gradient"])
def test_nothing_is_changed_and_adapters_are_not_looked_at(zoo: Zoo, method: Any) -> None:
    model = MLP.build()
    model[2].train()
    before, options = state_of(model), {"method": method, "loss_fn": lambda outputs, batch: outputs.square().sum()}
    gm = lorafx.apply(model, PLAIN, X[:4], seed=0)
    randomize(gm)
    of_gm = {n: (id(p), p.requires_grad, p.grad) for n, p in gm.named_parameters()}
    modes = [module.training for module in gm.modules()]
    by_graph, by_model = allocate_ranks(gm, PLAIN, [X], **options), allocate_ranks(model, PLAIN, [X], **options)
    assert by_graph == by_model
    assert {n: (id(p), p.requires_grad, p.grad) for n, p in gm.named_parameters()} == of_gm
    assert [module.training for module in gm.modules()] == modes
    after = state_of(model)
    assert all(same(after[n], before[n]) for n in before if n != "random")


# What is refused

X = torch.randn(30, 19, generator=torch.Generator().manual_seed(0))
PLAIN = LoraSpec(r=4, target_modules=["0", "3"])


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (SpecError, r"^a budget of 51 parameters buys no rank; the cheapest costs 52", {"budget": 51}),
        (
            SpecError,
            r"^min_rank=4 at 2 sites takes 448 parameters, and the budget is 447",
            {"budget": 447, "min_rank": 4},
        ),
        (SpecError, "^a budget of 0 ranks buys no rank; the cheapest costs 1", {"mean_rank": 0.1}),
        (SpecError, r"budget \(parameters\) and mean_rank exclude each other", {"budget": 500, "mean_rank": 2}),
        (SpecError, r"^method='evs' is not allowed: expected one of 'eva', 'gradient'", {"method": "evs"}),
        (SpecError, r"^max_rank=0 is not allowed", {"max_rank": 0}),
        (SpecError, r"^budget=0 is not allowed", {"budget": 0}),
        (
            SpecError,
            r"'adalora' does not take ranks .*: it finds them itself",
            {"spec": LoraSpec(variant="adalora", r=12)},
        ),
        (SpecError, r"'vera' does not take ranks .*: all its sites share", {"spec": LoraSpec(variant="vera")}),
        (AdapterError, "^allocate_ranks was given no batches", {"batches": iter(())}),
        (AdapterError, "^allocate_ranks was given no batches", {"batches": [], "method": "gradient"}),
        (
            AdapterError,
            "^site '0': its inputs on these batches hold NaN or Inf",
            {"batches": [X.masked_fill(X > 2, math.nan)]},
        ),
        (
            AdapterError,
            r"^site '0': its inputs on these batches \(30 rows\) are all the same",
            {"batches": [torch.ones(30, 19)]},
        ),
        (AdapterError, "^the gradient needs a loss, and the outputs have none", {"method": "gradient"}),
        (
            AdapterError,
            "^site '0': '0.weight' gets a gradient with NaN or Inf",
            {"method": "gradient", "loss_fn": lambda outputs, batch: outputs.sum() * torch.nan},
        ),
        (
            AdapterError,
            "^the gradients of all sites are zero",
            {"method": "gradient", "loss_fn": lambda outputs, batch: outputs.sum() * 0.0},
        ),
    ],
)
def test_what_cannot_be_allocated_is_refused(
    zoo: Zoo, error: type[Exception], message: str, options: dict[str, Any]
) -> None:
    options = {"spec": PLAIN, "batches": [X], **options}
    with pytest.raises(error, match=message):
        allocate_ranks(zoo.captured(MLP), options.pop("spec"), options.pop("batches"), **options)


def test_eva_refuses_layers_that_multiply_no_activations(zoo: Zoo) -> None:
    family = FAMILIES["convnet"]
    with pytest.raises(MatchError, match=r"^site 'features\.3': method='eva' looks at .* of kind 'conv2d"):
        allocate_ranks(zoo.captured(family), LoraSpec(r=2, target_modules=["features.3"]), [family.inputs()])


def test_a_pattern_has_exact_names_and_ranks() -> None:
    with pytest.raises(SpecError, match=r"^rank_pattern\['layer\.0'\]: expected the exact name of a site"):
        with_ranks(PLAIN, {"layer.0": 3})
    with pytest.raises(SpecError, match=r"^rank_pattern\['\^0'\]=-1 is not allowed"):
        with_ranks(PLAIN, {"^0": -1})


def test_a_batch_may_hold_labels_for_the_loss_alone() -> None:
    model, x, target = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(6, 5), torch.randn(6, 3)

    def loss(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.mse_loss(outputs, batch["target"])

    spec = LoraSpec(r=2, target_modules=["0", "2"])
    given = allocate_ranks(
        model, spec, [{"input": x, "target": target}], method="gradient", loss_fn=loss, example_inputs=(x,)
    )
    apart = allocate_ranks(
        model,
        spec,
        [(x,)],
        method="gradient",
        loss_fn=lambda outputs, _: nn.functional.mse_loss(outputs, target),
        example_inputs=(x,),
    )
    assert given.rank_pattern == apart.rank_pattern
