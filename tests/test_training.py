"""An adapted graph in a loop of one's own: what trains, in which precision, compiled, copied, recomputed."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import peft
import pytest
import torch
from torch import Tensor, nn

import lorafx
from conftest import Zoo, loss_of, randomize, same, train
from lorafx import LoraSpec, PassError
from lorafx.graph import CapturedModule
from lorafx.ir import format_graph
from tolerances import assert_close
from zoo import FAMILIES, Family

SPEC = LoraSpec(r=3, alpha=6, dropout=0.1)
BERT, LLAMA = FAMILIES["bert"], FAMILIES["llama"]
on_bert, on_llama = (pytest.mark.xdist_group(f.name) for f in (BERT, LLAMA))


def over(*names: str) -> pytest.MarkDecorator:
    """Run a test over some families, each where the family's capture is cached."""
    chosen = [pytest.param(FAMILIES[n], marks=pytest.mark.xdist_group(n), id=n) for n in names]
    return pytest.mark.parametrize("chosen", chosen)


def trainable(gm: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in gm.named_parameters() if p.requires_grad}


def gradients(gm: nn.Module, family: Family) -> dict[str, Tensor]:
    """Of the family's loss, in the mode that the module is in, with the same random draws each time."""
    gm.zero_grad()
    torch.manual_seed(1)
    loss_of(gm, family).backward()
    return grads(gm)


def grads(gm: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in trainable(gm).items():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.clone()
    return found


def changed_by_training(gm: CapturedModule, family: Family) -> set[str]:
    before = {n: v.clone() for n, v in gm.state_dict().items()}
    losses = train(gm, family, steps=3)
    assert losses[-1] < losses[0]
    return {n for n, v in gm.state_dict().items() if not torch.equal(v, before[n])}


@over("bert", "llama", "mlp")
def test_a_plain_loop_lowers_the_loss_and_changes_adapters_only(zoo: Zoo, chosen: Family) -> None:
    gm = zoo.adapted(chosen, SPEC)
    adapters = {n for site in lorafx.sites(gm) for n in site.parameter_names.values()}
    assert set(trainable(gm)) == adapters
    assert changed_by_training(gm, chosen) == adapters


@on_bert
def test_modules_to_save_and_biases_train_and_the_model_keeps_its_own() -> None:
    model = BERT.build()
    before = copy.deepcopy(model.state_dict())
    spec = LoraSpec(r=3, target_modules=["query", "dense"], modules_to_save=["classifier"], bias="all")
    gm = lorafx.apply(model, spec, BERT.inputs(), seed=0)
    adapters = {n for site in lorafx.sites(gm) for n in site.parameter_names.values()}
    whole = {f"_adapters.default.{n}" for n in before if n.endswith("bias") or n.startswith("classifier.")}
    assert set(trainable(gm)) == adapters | whole
    without_effect = {n for n in whole if n.endswith("key.bias")}  # softmax takes them away: only rounding is left
    assert changed_by_training(gm, BERT) | without_effect == adapters | whole
    assert same(model.state_dict(), before)


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    mlp = FAMILIES["mlp"]
    inputs, labels = mlp.inputs()["input"].double(), mlp.labels()
    gm = lorafx.apply(mlp.build().double(), SPEC, (inputs,)).eval()
    randomize(gm)

    def mean_loss(rows: slice) -> Tensor:
        return nn.functional.cross_entropy(gm(inputs[rows]), labels[rows])

    mean_loss(slice(None)).backward()
    whole = grads(gm)
    gm.zero_grad()
    for row in range(len(labels)):
        (mean_loss(slice(row, row + 1)) / len(labels)).backward()
    for name, gradient in grads(gm).items():
        assert_close("joint batch", gradient, whole[name])


@over("bert", "llama", "qwen3")
def test_autocast_agrees_with_peft(zoo: Zoo, chosen: Family) -> None:
    gm = zoo.adapted(chosen, LoraSpec(r=3, alpha=6)).eval()
    randomize(gm, 0.1)
    targets = [site.name for site in lorafx.sites(gm)]
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets)
    oracle = peft.get_peft_model(zoo.eager(chosen), config).eval()
    theirs = dict(oracle.named_parameters())
    pairs = {n: (p, theirs[f"base_model.model.{n}.weight"]) for n, p in trainable(gm).items()}
    with torch.no_grad():
        for ours, other in pairs.values():
            other.copy_(ours)
    losses = []
    for module in (gm, oracle):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(module, chosen)
        loss.backward()
        losses.append(loss.detach())
    assert_close("autocast", *losses)
    for ours, other in pairs.values():
        assert ours.grad is not None
        assert other.grad is not None
        assert_close("autocast", ours.grad, other.grad)
    with torch.autocast("cpu", torch.bfloat16):
        half = gm(**chosen.inputs()).logits.float()
    assert not torch.equal(half, gm(**chosen.inputs()).logits), "nothing was computed in bfloat16"


@over("mlp", "bert")
def test_compiles_as_one_graph_in_both_modes_at_any_size(zoo: Zoo, chosen: Family) -> None:
    gm = zoo.adapted(chosen, SPEC)
    randomize(gm)
    if chosen is not BERT:
        gm.activation_checkpointing_enable()
    torch._dynamo.reset()
    compiled = torch.compile(gm, fullgraph=True, dynamic=True, backend="aot_eager")

    def run(module: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        gm.zero_grad()
        torch.manual_seed(1)
        outputs = module(**inputs)
        logits: Tensor = outputs if isinstance(outputs, Tensor) else outputs.logits
        logits.square().mean().backward()
        return logits.detach(), grads(gm)

    for training in (True, False):
        compiled.train(training)
        assert same(run(compiled, chosen.inputs()), run(gm, chosen.inputs()))
        with torch.compiler.set_stance("fail_on_recompile"):
            assert same(run(compiled, chosen.other_inputs()), run(gm, chosen.other_inputs()))


def saved_and_loaded(value: object) -> object:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@on_bert
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v)), saved_and_loaded],  # noqa: S301  # our own bytes
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copy_made_while_training_goes_on_the_same(zoo: Zoo, copied: Callable[[object], object]) -> None:
    gm = zoo.adapted(BERT, SPEC).train()
    gm.activation_checkpointing_enable()

    def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(trainable(module).values(), lr=1e-2)

    def steps(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
        torch.manual_seed(2)
        losses = []
        for _ in range(2):
            optimizer.zero_grad()
            loss = loss_of(module, BERT)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    optimizer = optimizer_of(gm)
    steps(gm, optimizer)
    twin = copied(gm)
    assert isinstance(twin, CapturedModule)
    other = optimizer_of(twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert steps(twin, other) == steps(gm, optimizer)
    assert same(twin.state_dict(), gm.state_dict())


def kept_bytes(run: Callable[[], Tensor]) -> int:
    """What autograd keeps for backward, each storage once."""
    storages: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        alive.append(tensor)  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storages.values())


def test_recomputing_layers_gives_the_same_gradients_from_less_memory(zoo: Zoo, hf_family: Family) -> None:
    gm = zoo.adapted(hf_family, SPEC).train()
    randomize(gm, 0.1)
    text = format_graph(gm)
    expected, everything = gradients(gm, hf_family), kept_bytes(lambda: loss_of(gm, hf_family))
    gm.activation_checkpointing_enable()
    assert format_graph(gm) == text, "passes must see the flat graph"
    assert same(gradients(gm, hf_family), expected)
    assert kept_bytes(lambda: loss_of(gm, hf_family)) < 0.3 * everything
    gm.activation_checkpointing_disable()
    assert kept_bytes(lambda: loss_of(gm, hf_family)) == everything


@on_llama
def test_every_other_layer_can_be_recomputed(zoo: Zoo) -> None:
    gm = zoo.adapted(LLAMA, SPEC).train()

    def kept(every_n_layers: int) -> int:
        gm.activation_checkpointing_enable(every_n_layers=every_n_layers)
        return kept_bytes(lambda: loss_of(gm, LLAMA))

    assert kept(1) < 0.6 * kept(2)


@on_bert
def test_the_mode_at_backward_does_not_matter(zoo: Zoo) -> None:
    gm = zoo.adapted(BERT, SPEC).train()
    randomize(gm)
    expected = gradients(gm, BERT)
    gm.gradient_checkpointing_enable({"use_reentrant": False})
    gm.zero_grad()
    torch.manual_seed(1)
    loss = loss_of(gm, BERT)
    gm.eval()
    loss.backward()
    assert same(grads(gm), expected)
    gm.gradient_checkpointing_disable()


@pytest.mark.xdist_group("convnet")
def test_layers_that_write_buffers_are_not_recomputed(zoo: Zoo) -> None:
    """The head of the conv net has no number; its features are numbered, and BatchNorm is among them."""
    family = FAMILIES["convnet"]
    gm = zoo.adapted(family, SPEC)
    twin = copy.deepcopy(gm)
    gm.activation_checkpointing_enable()
    assert same(gradients(gm.train(), family), gradients(twin.train(), family))
    assert same(gm.state_dict(), twin.state_dict()), "running statistics"


class Unnumbered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(x))


@on_llama
def test_what_cannot_be_recomputed_is_refused(zoo: Zoo) -> None:
    gm = zoo.adapted(LLAMA, SPEC)
    with pytest.raises(ValueError, match=r"^use_reentrant=True loses the gradients .*; leave it out$"):
        gm.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match=r"^offload=True is not supported"):
        gm.activation_checkpointing_enable(offload=True)
    with pytest.raises(ValueError, match=r"^every_n_layers=0 must be 1 or more$"):
        gm.activation_checkpointing_enable(every_n_layers=0)
    flat = lorafx.apply(Unnumbered(), LoraSpec(r=1, target_modules=["fc"]), (torch.randn(3, 4),))
    with pytest.raises(PassError, match=r"has no numbered layers \(such as model\.layers\.0\)"):
        flat.activation_checkpointing_enable()


@over("llama", "t5")
def test_a_move_to_another_device_takes_the_graph_along(zoo: Zoo, chosen: Family) -> None:
    """The devices that the trace wrote into the graph and into its loss; seen on the device without data."""
    gm = zoo.adapted(chosen, SPEC).train()
    gm.activation_checkpointing_enable()
    gm.to("meta")
    inputs = {n: v.to("meta") for n, v in chosen.inputs().items()}
    loss = gm(**inputs, labels=chosen.labels().to("meta")).loss
    loss.backward()
    assert {t.device.type for t in (loss, *grads(gm).values())} == {"meta"}
    assert lorafx.merge(gm)(**inputs).logits.device.type == "meta"


@over("llama", "gpt2")
def test_the_users_own_model_generates_what_the_graph_predicts(zoo: Zoo, chosen: Family) -> None:
    """Merged weights load into a copy of the model, whose ``generate`` takes the graph's greedy choices."""
    gm = zoo.adapted(chosen, SPEC).eval()
    randomize(gm, 0.2)
    model = copy.deepcopy(zoo.capture(chosen).model).eval()
    model.load_state_dict(lorafx.merged_state_dict(gm))
    prompt = chosen.inputs()["input_ids"][:1, :5]
    written = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
    tokens = prompt
    while tokens.shape[1] < written.shape[1]:
        logits = gm(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(tokens, written)
    assert not torch.equal(tokens, zoo.eager(chosen).generate(prompt, max_new_tokens=6, do_sample=False))
