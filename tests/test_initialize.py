"""Starting from data: EVA's directions and LoRA-GA's gradients, against PEFT and against their definitions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import EvaConfig, LoraGAConfig, initialize_lora_eva_weights, preprocess_loraga
from torch import Tensor, nn

import kinds
import lorafx
from conftest import Zoo, loss_of, same
from lorafx import AdapterError, LoraSpec, initialize
from lorafx.checkpoint import load_checkpoint, save_checkpoint
from lorafx.graph import CapturedModule, get_path
from lorafx.ir import find_adapter, format_graph
from lorafx.passes.initialize import _FACTORS
from lorafx.passes.residual import plain_factors
from lorafx.variants.inits import INITS
from tolerances import assert_close, error
from zoo import FAMILIES


class Net(nn.Module):
    """Two layers with the same input, one after them, and dropout, which data-driven starts must not see."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(20, 16), nn.Linear(20, 16)
        self.dropout = nn.Dropout(0.5)
        self.c = nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.c(self.dropout(self.a(x).tanh() * self.b(x)))
        return found


def stretched(*rows: int) -> Tensor:
    """Rows with a mean and a few directions of clearly different lengths."""
    lengths = torch.tensor([30.0, 15.0, 8.0, 4.0, 2.0, 1.0, *[0.1] * 14])
    directions, _ = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(5)))
    return (torch.randn(*rows, 20) * lengths) @ directions.mT + 3.0


BATCHES = [stretched(40) for _ in range(4)]


def adapted(init: str, dtype: torch.dtype = torch.float32, **fields: Any) -> tuple[Net, CapturedModule]:
    model = Net().to(dtype)
    spec = LoraSpec(**{"r": 3, "alpha": 4, "init": init, "target_modules": ["a", "b", "c"], **fields})
    return model, lorafx.apply(model, spec, (torch.randn(5, 20, dtype=dtype),))


def tensors(gm: CapturedModule, layer: str) -> dict[str, Tensor]:
    site = next(s for s in lorafx.sites(gm) if s.name == layer)
    return {n: p.detach() for n, p in site.parameters(gm).items()}


def square(outputs: Tensor, batch: object) -> Tensor:
    return outputs.square().mean()


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Between the rows of two matrices, whatever their signs."""
    return nn.functional.cosine_similarity(a, b, dim=1).abs()


# EVA


def test_eva_is_the_principal_directions_of_the_activations() -> None:
    model, gm = adapted("eva")
    initialize(gm, BATCHES)
    rows = torch.cat(BATCHES)
    model.eval()
    for layer, given in {"a": rows, "b": rows, "c": model.a(rows).tanh() * model.b(rows)}.items():
        _, _, vh = torch.linalg.svd((given - given.mean(0)).detach(), full_matrices=False)
        found = tensors(gm, layer)
        assert_close("peft", found["lora_A"] @ found["lora_A"].mT, torch.eye(3))
        assert_close("peft", cosines(found["lora_A"], vh[:3]), torch.ones(3))
        assert not found["lora_B"].any()
    x = torch.randn(6, 20)
    assert torch.equal(gm.eval()(x), model(x))


@pytest.mark.parametrize(("name", "names"), [("llama", ["k_proj", "up_proj"]), ("gpt2", ["c_attn", "c_fc"])])
def test_eva_is_pefts(zoo: Zoo, name: str, names: list[str]) -> None:
    """Directions of clearly different lengths are the same; padding counts for neither. GPT-2's sites are Conv1D."""
    family = FAMILIES[name]
    model = zoo.eager(family)
    config = peft.LoraConfig(
        r=3, init_lora_weights="eva", target_modules=names, eva_config=EvaConfig(rho=1.0, tau=0.999)
    )
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    initialize_lora_eva_weights(theirs, [family.inputs()], show_progress_bar=False)
    gm = zoo.adapted(family, LoraSpec(r=3, init="eva", target_modules=names))
    initialize(gm, [family.inputs()])
    for site in lorafx.sites(gm):
        wanted = theirs.get_parameter(f"base_model.model.{site.name}.lora_A.default.weight").detach()
        found = site.parameters(gm)["lora_A"].detach()
        *first, last = torch.linalg.svdvals(found @ wanted.mT).tolist()  # cosines of the angles between the spaces
        assert min(first) > 0.999
        assert last > 0.98  # PEFT keeps only r directions from round to round, and loses some of the last one


def test_eva_in_parts_is_eva_at_once() -> None:
    whole = torch.cat(BATCHES)
    found = []
    for batches in (BATCHES, [whole], [whole[:1], whole[1:7], whole[7:]]):
        torch.manual_seed(0)
        _, gm = adapted("eva")
        initialize(gm, batches)
        found.append(tensors(gm, "a")["lora_A"])
    for other in found[1:]:
        assert_close("peft", cosines(found[0], other), torch.ones(3))


def test_eva_of_many_directions_is_near_the_exact_one() -> None:
    """More directions than are kept between the parts: their sum is only nearly that of the whole."""
    torch.manual_seed(1)
    lengths = 0.9 ** torch.arange(120)
    model = nn.Sequential(nn.Linear(120, 8))
    batches = [torch.randn(150, 120) * lengths for _ in range(6)]
    gm = lorafx.apply(model, LoraSpec(r=4, init="eva", target_modules=["0"]), (batches[0],))
    initialize(gm, batches)
    rows = torch.cat(batches)
    _, _, vh = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    a = lorafx.sites(gm)[0].parameters(gm)["lora_A"].detach()
    assert float(torch.linalg.svdvals(a @ vh[:4].mT).min()) > 0.97


def test_eva_leaves_out_what_the_mask_hides(zoo: Zoo) -> None:
    family = FAMILIES["llama"]
    spec = LoraSpec(r=3, init="eva", target_modules=["layers.0.self_attn.q_proj"])
    given = family.inputs()
    gm, other = (zoo.adapted(family, spec) for _ in range(2))
    initialize(gm, [given])
    hidden = given["input_ids"].masked_fill(given["attention_mask"] == 0, 17)
    assert not torch.equal(hidden, given["input_ids"])
    initialize(other, [{**given, "input_ids": hidden}])
    (site,) = lorafx.sites(gm)
    assert same(*(site.parameters(g)["lora_A"].detach() for g in (gm, other)))


# LoRA-GA


def gradient(model: Net, layer: str, batches: list[Tensor]) -> Tensor:
    model = copy.deepcopy(model).eval()
    for batch in batches:
        square(model(batch), batch).backward()
    found = model.get_parameter(f"{layer}.weight").grad
    assert found is not None
    return found


@pytest.mark.parametrize("variant", ["lora", "dora", "lora_bias"])
@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
def test_lora_ga_is_the_gradients_singular_vectors(variant: str, rslora: bool) -> None:
    """arXiv 2407.05000, algorithm 1: A from the first r right vectors, B from the next r left ones."""
    model, gm = adapted("lora_ga", variant=variant, rslora=rslora)
    initialize(gm, BATCHES, loss_fn=square)
    for site in lorafx.sites(gm):
        u, _, vh = torch.linalg.svd(gradient(model, site.name, BATCHES))
        size = site.out_features**0.25 / 4.0
        a, b = (tensors(gm, site.name)[n] for n in ("lora_A", "lora_B"))
        for rows, length in ((a, 3), (b.mT, 3)):
            assert_close("peft", rows @ rows.mT, size**2 * torch.eye(length))
        assert_close("peft", cosines(a, vh[:3]), torch.ones(3))
        assert_close("peft", cosines(b.mT, u.mT[3:6]), torch.ones(3))
        own = get_path(gm, find_adapter(gm).own_name(site.weight))
        assert_close("fold", own + site.scaling * b @ a, model.get_parameter(site.weight).detach())
    x = torch.randn(6, 20)
    assert_close("model", gm.eval()(x), model.eval()(x))
    assert_close("model", lorafx.merge(gm)(x), model(x))


def test_lora_ga_has_pefts_directions() -> None:
    """PEFT scales B by the gradient's singular values, so that it depends on the loss's size; the paper does not."""
    model, gm = adapted("lora_ga", target_modules=["c"])
    model.eval()
    config = peft.LoraConfig(
        r=3, lora_alpha=4, init_lora_weights="lora_ga", target_modules=["c"], lora_ga_config=LoraGAConfig()
    )
    theirs = copy.deepcopy(model)
    theirs.dropout.p = 0.0  # PEFT goes by train mode

    def step() -> None:
        for batch in BATCHES:
            square(theirs(batch), batch).backward()

    preprocess_loraga(theirs, config, step)
    layer = peft.get_peft_model(theirs, config).base_model.model.c
    initialize(gm, BATCHES, loss_fn=square)
    ours = tensors(gm, "c")
    assert_close("peft", cosines(ours["lora_A"], layer.lora_A.default.weight.detach()), torch.ones(3))
    assert_close("peft", cosines(ours["lora_B"].mT, layer.lora_B.default.weight.detach().mT), torch.ones(3))


def test_lora_ga_does_not_depend_on_the_size_of_the_loss() -> None:
    found = []
    for factor in (1.0, 1000.0):
        torch.manual_seed(0)
        _, gm = adapted("lora_ga", dtype=torch.float64)
        initialize(gm, [b.double() for b in BATCHES], loss_fn=lambda y, _, f=factor: f * square(y, _))
        found.append(tensors(gm, "a"))
    assert_close("layer", *(f["lora_B"] @ f["lora_A"] for f in found))


def first_step(model: Net, gm: CapturedModule, batches: list[Tensor]) -> float:
    """The cosine between the change of W by a small step of A and B, and the step that full fine-tuning would take."""
    (site,) = lorafx.sites(gm)
    for batch in batches:
        square(gm(batch), batch).backward()
    before = tensors(gm, site.name)
    a, b = (before[n] - 1e-4 * site.parameters(gm)[n].grad for n in ("lora_A", "lora_B"))
    change = b @ a - before["lora_B"] @ before["lora_A"]
    wanted = -gradient(model, site.name, batches)
    return float(nn.functional.cosine_similarity(change.flatten(), wanted.flatten(), dim=0))


def test_the_first_step_from_lora_ga_follows_the_full_gradient_more_closely() -> None:
    """What the method is for (theorem 3.1): it has r of the gradient's directions on either side."""
    model, gm = adapted("lora_ga", torch.float64, target_modules=["c"])
    batches = [batch.double() for batch in BATCHES]
    random = first_step(model, gm.eval(), batches)
    gm.zero_grad()
    initialize(gm, batches, loss_fn=square)
    assert first_step(model, gm, batches) > max(0.9, random + 0.1)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_lora_ga_by_the_models_own_loss(zoo: Zoo, name: str) -> None:
    """With labels among the inputs."""
    family = FAMILIES[name]
    gm = zoo.adapted(family, LoraSpec(r=2, init="lora_ga")).eval()
    before = loss_of(gm, family)
    initialize(gm, [{**family.inputs(), "labels": family.labels()}])
    adapter = find_adapter(gm)
    assert set(adapter.residual) == {s.weight for s in adapter.sites}
    assert_close("model", loss_of(gm, family), before)
    for site in adapter.sites:
        a, b = plain_factors(gm, adapter, site)
        assert a.shape[0] == 4
        assert error(b[:, :2] @ a[:2], -(b[:, 2:] @ a[2:])) == 0.0


def test_gradients_of_embeddings_convolutions_and_experts() -> None:
    model = kinds.build()
    spec = LoraSpec(
        r=2,
        init="lora_ga",
        variant="dora",
        target_modules=["embed", "conv", "attn.q", "attn.v", "up"],
        target_parameters=["experts.stack"],
    )
    gm = lorafx.apply(model, spec, kinds.inputs()).eval()
    given = kinds.inputs()
    expected = gm(*given)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    initialize(gm, [given], loss_fn=lambda y, _: y.square().mean())
    assert_close("model", gm(*given), expected)
    assert_close("model", lorafx.merge(gm)(*given), expected)
    assert same(dict(model.state_dict()), state)
    assert set(find_adapter(gm).residual) == {s.weight for s in lorafx.sites(gm)}


# Both


@pytest.mark.parametrize("init", ["eva", "lora_ga"])
def test_it_starts_harmlessly_and_leaves_all_else_alone(init: str) -> None:
    model, gm = adapted(init)
    x = torch.randn(6, 20)
    assert torch.equal(gm.eval()(x), model.eval()(x))  # a call that was forgotten does no harm
    gm.train()
    gm.dropout.eval()
    model.train()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    objects = {n: id(get_path(gm, n)) for s in lorafx.sites(gm) for n in s.parameter_names.values()}
    random = torch.get_rng_state()
    initialize(gm, BATCHES, loss_fn=square)
    assert torch.equal(torch.get_rng_state(), random)
    assert {n: id(get_path(gm, n)) for n in objects} == objects
    assert (gm.training, gm.a.training, gm.dropout.training) == (True, True, False)
    assert same(dict(model.state_dict()), state)
    assert all(p.grad is None for p in (*gm.parameters(), *model.parameters()))
    assert {n for n, p in gm.named_parameters() if p.requires_grad} == set(objects)


@pytest.mark.parametrize("init", ["eva", "lora_ga"])
def test_one_of_several_adapters(init: str) -> None:
    model, gm = adapted("kaiming", target_modules=["a"])
    lorafx.add_adapter(gm, LoraSpec(r=2, init=init, target_modules=["a", "c"]), "data")
    kept = {n: t.clone() for n, t in tensors(gm, "a").items()}
    initialize(gm, BATCHES, adapter="data", loss_fn=square)
    assert same(tensors(gm, "a"), kept)
    x = torch.randn(3, 20)
    for names in (["data"], ["default", "data"]):
        lorafx.set_adapter(gm, names)
        assert_close("model", gm.eval()(x), model.eval()(x))


def test_every_initialisation_by_data_has_its_method() -> None:
    assert set(_FACTORS) == {name for name, init in INITS.items() if init.by_data}


def test_a_checkpoint_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """The start values are loaded, and the weights that they were taken from follow."""
    model, first = adapted("lora_ga", variant="dora")
    second = lorafx.apply(model, find_adapter(first).specs[0], (BATCHES[0],))
    optimizers = []
    for gm, batches in ((first, BATCHES), (second, BATCHES[:1])):
        initialize(gm, batches, loss_fn=square)
        optimizers.append(torch.optim.AdamW([p for p in gm.parameters() if p.requires_grad], lr=0.01))

    def train(gm: CapturedModule, optimizer: torch.optim.Optimizer) -> Tensor:
        for batch in BATCHES:
            optimizer.zero_grad()
            square(gm.eval()(batch), batch).backward()
            optimizer.step()
        return gm(BATCHES[0]).detach()

    train(first, optimizers[0])
    save_checkpoint(first, tmp_path, optimizers[0])
    load_checkpoint(second, tmp_path, optimizers[1])
    assert torch.equal(train(first, optimizers[0]), train(second, optimizers[1]))


def test_the_method_can_be_named() -> None:
    _, gm = adapted("kaiming")
    initialize(gm, BATCHES, method="eva")
    assert_close("peft", tensors(gm, "a")["lora_A"] @ tensors(gm, "a")["lora_A"].mT, torch.eye(3))


def test_specs_of_several_methods() -> None:
    model = Net()
    specs = [LoraSpec(r=2, init=i, target_modules=[n]) for i, n in (("eva", "a"), ("lora_ga", "b"), ("kaiming", "c"))]
    gm = lorafx.apply(model, specs, (BATCHES[0],))
    before = {n: tensors(gm, n) for n in "abc"}
    kept = {n: {k: t.clone() for k, t in v.items()} for n, v in before.items()}
    initialize(gm, BATCHES, loss_fn=square)
    assert not tensors(gm, "a")["lora_B"].any()
    assert tensors(gm, "b")["lora_B"].any()
    assert same(tensors(gm, "c"), kept["c"])
    assert find_adapter(gm).residual == ("b.weight",)


def trained(gm: CapturedModule) -> None:
    with torch.no_grad():
        for site in lorafx.sites(gm):
            site.parameters(gm)["lora_B"].fill_(0.1)


def merged(gm: CapturedModule) -> None:
    lorafx.merge(gm, inplace=True)


ERRORS: dict[str, tuple[str, Callable[[CapturedModule], None], dict[str, Any], str]] = {
    "no batches": ("eva", lambda gm: None, {"batches": []}, "no batches"),
    "an unknown adapter": ("eva", lambda gm: None, {"adapter": "fr"}, "there is no adapter 'fr'"),
    "an unknown method": ("eva", lambda gm: None, {"method": "svd"}, "method='svd' .* there are 'eva', 'lora_ga'"),
    "no such site": ("kaiming", lambda gm: None, {}, "no site that starts from data: set init='eva'"),
    "trained": ("eva", trained, {}, "site 'a' is not at its start any more: .* Add a new adapter"),
    "twice": ("lora_ga", lambda gm: initialize(gm, BATCHES, loss_fn=square), {}, "not at its start any more"),
    "merged": ("eva", merged, {"adapter": "default"}, r"'default' is merged into the weights; call unmerge\(gm\)"),
    "too few rows": ("eva", lambda gm: None, {"batches": [BATCHES[0][:3]]}, r"'a': .* \(3 rows\) have fewer than r=3"),
    "no loss": ("lora_ga", lambda gm: None, {"loss_fn": None}, "needs a loss, .* put the labels into the batches"),
    "no gradient": (
        "lora_ga",
        lambda gm: None,
        {"loss_fn": lambda y, _: (0 * y).sum()},
        "site 'a': 'a.weight' gets a gradient that is zero",
    ),
    "too high a rank": ("kaiming", lambda gm: None, {"method": "lora_ga", "r": 7}, "site 'c': .* at most r=6"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_and_change_nothing(case: str) -> None:
    init, prepare, given, message = ERRORS[case]
    _, gm = adapted(init, r=given.get("r", 3))
    prepare(gm)
    text, state = format_graph(gm), {n: t.clone() for n, t in gm.state_dict().items()}
    arguments = {"batches": BATCHES, "loss_fn": square, **{k: v for k, v in given.items() if k != "r"}}
    with pytest.raises(AdapterError, match=message):
        initialize(gm, **arguments)
    assert format_graph(gm) == text
    assert same(dict(gm.state_dict()), state)


def test_rows_of_a_batch_through_several_adapters() -> None:
    model = Net()
    gm = lorafx.apply(
        model,
        LoraSpec(r=2, init="lora_ga", target_modules=["a"]),
        (torch.randn(4, 20),),
        dynamic_shapes={"x": {0: "batch"}},
    )
    lorafx.set_adapter_names(gm, ["default", None, "default", None])
    with pytest.raises(AdapterError, match="rows of a batch go through several adapters now: call set_adapter first"):
        initialize(gm, BATCHES, loss_fn=square)
    assert not find_adapter(gm, "default").residual


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        model, x = Net(), torch.empty(4, 20)
    gm = lorafx.apply(model, LoraSpec(r=2, init="eva", target_modules=["a"]), (x,))
    with pytest.raises(AdapterError, match="site 'a' is on the meta device"):
        initialize(gm, [x])
