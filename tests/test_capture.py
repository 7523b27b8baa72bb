"""A captured graph behaves as the model it came from, in both modes, at any size, and leaves it alone."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lorafx
from conftest import Zoo, both, loss_of, mixed_modes, same, state_of
from lorafx.api import captured
from lorafx.errors import FixedDimensionWarning, InputError, PassError
from lorafx.graph import CapturedModule
from lorafx.ir import format_graph
from tolerances import assert_close
from zoo import FAMILIES, Family, Inputs

SAMPLES: dict[str, Callable[[Family], Inputs]] = {
    "inputs": lambda family: family.inputs(),
    "other_inputs": lambda family: family.other_inputs(),
    "one": lambda family: smallest(family),
}
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
samples = pytest.mark.parametrize("sample", SAMPLES)


def smallest(family: Family) -> Inputs:
    """The inputs cut down to a batch of one and a sequence of one."""
    return {n: t[:1, :1] if t.dim() == 2 and not t.is_floating_point() else t[:1] for n, t in family.inputs().items()}


# Over the zoo.


@modes
@samples
def test_outputs_equal_the_models(zoo: Zoo, family: Family, sample: str, training: bool) -> None:
    inputs = SAMPLES[sample](family)
    gm, model = zoo.captured(family).train(training), zoo.eager(family).train(training)
    if family.name == "convnet" and sample == "one" and training:
        inputs = family.inputs()  # torch refuses BatchNorm's statistics of one value
    actual, expected = both(gm, model, lambda m: m(**inputs))
    assert same(actual, expected)
    assert same(gm.state_dict(), model.state_dict())  # BatchNorm's buffers among it


@modes
def test_loss_and_gradients_equal_the_models(zoo: Zoo, family: Family, training: bool) -> None:
    """With labels: the loss, and each parameter's gradient, once all are let train."""
    gm, model = zoo.captured(family).train(training), zoo.eager(family).train(training)
    for module in (gm, model):
        module.requires_grad_(True)  # whisper's positions are frozen in the model
    actual, expected = both(gm, model, lambda m: loss_of(m, family))
    assert same(actual, expected)
    actual.backward()
    expected.backward()
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    found = {n: p.grad for n, p in gm.named_parameters() if p.grad is not None}
    assert wanted
    assert same(found, wanted)


def test_labels_are_optional_and_change_nothing_else(zoo: Zoo, hf_family: Family) -> None:
    gm, inputs = zoo.captured(hf_family).eval(), hf_family.inputs()
    without, labelled = gm(**inputs), gm(**inputs, labels=hf_family.labels())
    assert without.loss is None
    assert labelled.loss is not None
    assert type(without) is type(labelled)
    assert same(without.logits, labelled.logits)
    assert same(gm(**inputs, labels=None), without)


@modes
def test_modules_have_modes_of_their_own(zoo: Zoo, family: Family, training: bool) -> None:
    """Every module in turn may be put in the other mode (frozen BatchNorm, dropout kept in eval)."""
    gm, model = zoo.captured(family), zoo.eager(family)
    gm.train(training)
    model.train(training)
    for name, child in model.named_children():
        gm.get_submodule(name).train(not training)
        child.train(not training)
        actual, expected = both(gm, model, lambda m: m(**family.inputs()))
        assert same(actual, expected), name


def test_modes_start_as_the_models_are(zoo: Zoo, family: Family) -> None:
    capture = zoo.capture(family)
    flags = {n: m.training for n, m in capture.model.named_modules(remove_duplicate=False)}
    assert len(set(flags.values())) == 2
    assert {n: m.training for n, m in capture.gm.named_modules(remove_duplicate=False) if n in flags} == flags


def test_the_model_is_left_as_it_was(zoo: Zoo, family: Family) -> None:
    capture = zoo.capture(family)
    for what, before in capture.before.items():
        assert same(before, capture.after[what]), what


def test_names_ties_and_storage_are_the_models(zoo: Zoo, family: Family) -> None:
    model, gm = zoo.capture(family).model, zoo.capture(family).gm
    assert list(gm.state_dict()) == list(model.state_dict())
    assert [n for n, _ in gm.named_parameters()] == [n for n, _ in model.named_parameters()]
    ours, theirs = (dict(m.named_parameters(remove_duplicate=False)) for m in (gm, model))
    for name, parameter in theirs.items():
        assert ours[name].data_ptr() == parameter.data_ptr(), name
        assert ours[name] is not parameter, name
        assert not ours[name].requires_grad, name
        assert [n for n in ours if ours[n] is ours[name]] == [n for n in theirs if theirs[n] is parameter]
    mine, others = (dict(m.named_buffers(remove_duplicate=False)) for m in (gm, model))
    for name, buffer in others.items():
        assert mine[name].data_ptr() != buffer.data_ptr(), f"{name} is the model's own buffer"


def test_running_the_graph_never_writes_into_the_model(zoo: Zoo, family: Family) -> None:
    capture = zoo.capture(family)
    before = state_of(capture.model)
    gm = captured(capture.model, family.inputs(), None) if family.task == "plain" else capture.gm
    training = gm.training
    with torch.random.fork_rng(devices=[]):
        gm.train()(**family.inputs())
        gm.train(training)
    mixed_modes(gm)
    assert same(before, state_of(capture.model))


def test_calls_bind_as_the_models_forward_does(zoo: Zoo, family: Family) -> None:
    """By position, in the order of the model's forward; by keyword, in any order."""
    gm, model, inputs = zoo.captured(family).eval(), zoo.eager(family), family.inputs()
    order = list(inspect.signature(model.forward).parameters)
    shown = list(inspect.signature(gm.forward).parameters)
    assert shown == [n for n in order if n in shown], "the signature has another order"
    assert {*inputs} <= {*shown}
    last = max(order.index(n) for n in inputs)
    positional = [inputs.get(n) for n in order[: last + 1]]
    expected = model(**inputs)
    assert same(gm(*positional), expected)
    assert same(
        gm(*positional[:1], **{n: inputs[n] for n in reversed(order) if n in inputs and n != order[0]}), expected
    )


def test_a_wrong_call_says_what_is_wrong(zoo: Zoo, family: Family) -> None:
    gm, inputs = zoo.captured(family).eval(), family.inputs()
    first, *rest = inputs
    captured_with = r"the graph was captured with \(.*\); this call is different "
    with pytest.raises(InputError, match=captured_with + rf"\(missing: {first}\)\. Call it with the captured"):
        gm(**{n: inputs[n] for n in rest})
    with pytest.raises(InputError, match=captured_with + r"\(not captured: head_mask_of_mine\)"):
        gm(**inputs, head_mask_of_mine=torch.ones(1))
    with pytest.raises(InputError, match=rf"missing: {first}; not captured: inputs_of_mine"):
        gm(**{n: inputs[n] for n in rest}, inputs_of_mine=torch.ones(1))
    if rest:
        with pytest.raises(InputError, match=captured_with + rf"\(missing: {', '.join(rest)}\)"):
            gm(inputs[first])


def test_dimensions_have_names_and_bounds(zoo: Zoo, family: Family) -> None:
    signature = zoo.capture(family).gm.signature
    maximum = {"bert": 48, "distilbert": 48}.get(family.name)
    for name, value in family.inputs().items():
        dims = {0: "batch"}
        if not value.is_floating_point():
            dims[1] = "decoder_sequence" if name.startswith("decoder_") else "sequence"
        assert signature.dims[name] == dims
    assert signature.ranges["batch"] == (1, None)
    if "sequence" in signature.ranges:
        assert signature.ranges["sequence"] == (1, maximum)


def test_outputs_have_the_names_a_user_knows(zoo: Zoo, family: Family) -> None:
    expected = {"plain": ("output",), "text2text-generation": ("loss", "logits", "encoder_last_hidden_state")}
    assert zoo.capture(family).gm.signature.outputs == expected.get(family.task, ("loss", "logits"))


def test_an_example_of_one_stays_dynamic(zoo: Zoo, family: Family) -> None:
    """torch.export freezes sizes of 1 without a word; the user's own example is kept as it is."""
    model, example = zoo.eager(family), smallest(family)
    if family.task != "plain":
        labels = family.labels()
        example["labels"] = labels[:1, :1] if labels.dim() == 2 else labels[:1]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FixedDimensionWarning)
        gm = captured(model, example, None)
    assert same(gm.meta["example"], example)
    for training in (True, False):
        gm.train(training)
        model.train(training)
        for sample in ("inputs", "other_inputs", "one"):
            if family.name == "convnet" and sample == "one" and training:
                continue  # torch refuses BatchNorm's statistics of one value
            actual, expected = both(gm, model, lambda m, s=sample: m(**SAMPLES[s](family)))
            assert same(actual, expected), sample
        actual, expected = both(gm, model, lambda m: loss_of(m, family))
        assert same(actual, expected)


def test_inputs_are_synthesised(zoo: Zoo, hf_family: Family) -> None:
    """Without example inputs a Hugging Face model gets its own, with a mask, and works on others."""
    model, before = zoo.eager(hf_family), torch.get_rng_state()
    gm = captured(model, None, None)
    assert torch.equal(before, torch.get_rng_state())
    names = [a.name for a in gm.signature.arguments]
    needed = {n for n in hf_family.inputs() if n != "decoder_attention_mask"}
    assert needed <= {*names}
    assert "labels" in names
    for sample in (hf_family.inputs, hf_family.other_inputs):
        inputs = {n: t for n, t in sample().items() if n in names}
        for training in (True, False):
            gm.train(training)
            model.train(training)
            actual, expected = both(gm, model, lambda m, i=inputs: m(**i))
            assert same(actual, expected)


def roundtrips(gm: CapturedModule) -> dict[str, CapturedModule]:
    stream = io.BytesIO()
    torch.save(gm, stream)
    stream.seek(0)
    return {
        "deepcopy": copy.deepcopy(gm),
        "pickle": pickle.loads(pickle.dumps(gm)),  # noqa: S301  # the bytes are our own
        "torch.save": torch.load(stream, weights_only=False),
    }


def test_copies_are_the_same_graph(zoo: Zoo, family: Family) -> None:
    gm = zoo.captured(family)
    modes = {n: m.training for n, m in gm.named_modules()}
    for how, twin in roundtrips(gm).items():
        assert format_graph(twin) == format_graph(gm), how
        assert twin.code == gm.code, how
        assert twin.signature == gm.signature, how
        assert same(twin.state_dict(), gm.state_dict()), how
        assert {n: m.training for n, m in twin.named_modules()} == modes, how
        groups = [
            [[n for n, p in held if p is q] for _, q in held]
            for held in (list(m.named_parameters(remove_duplicate=False)) for m in (gm, twin))
        ]
        assert groups[0] == groups[1], how
        pointers = {p.data_ptr() for p in gm.parameters()}
        assert not pointers & {p.data_ptr() for p in twin.parameters()}, how
        for training in (True, False):
            state = copy.deepcopy(gm.state_dict())
            actual, expected = both(twin.train(training), gm.train(training), lambda m: m(**family.inputs()))
            assert same(actual, expected), how
            gm.load_state_dict(state)
            twin.load_state_dict(state)


# Loading values.


@pytest.mark.parametrize("name", ["gpt2", "convnet", "mlp"])
def test_loading_never_writes_through(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    gm = captured(model, family.inputs(), None)
    before = state_of(model)
    for holder in (gm, nn.ModuleDict({"inner": gm}), nn.Sequential(gm)):
        values = {n: t + 1 if t.is_floating_point() else t for n, t in holder.state_dict().items()}
        holder.load_state_dict(values)
        assert same(dict(holder.state_dict()), values)
        assert same(before, state_of(model)), type(holder).__name__
    theirs, ours = (dict(m.named_parameters(remove_duplicate=False)) for m in (model, gm))
    assert [[m for m in ours if ours[m] is ours[n]] for n in ours] == [
        [m for m in theirs if theirs[m] is theirs[n]] for n in theirs
    ]


def test_loading_the_same_values_keeps_sharing() -> None:
    family = FAMILIES["mlp"]
    model = family.build()
    gm = captured(model, family.inputs(), None)
    gm.load_state_dict(model.state_dict())
    assert {p.data_ptr() for p in gm.parameters()} == {p.data_ptr() for p in model.parameters()}


@pytest.mark.parametrize("convert", [nn.Module.double, nn.Module.half, lambda gm: gm.to("cpu", torch.bfloat16)])
@pytest.mark.parametrize("loaded", [False, True], ids=["", "values loaded"])
def test_the_dtype_cannot_be_changed_after_capture(convert: Callable[[nn.Module], nn.Module], loaded: bool) -> None:
    """Also where the base's tensors are the graph's own, and where the graph is a part of another module."""
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    gm = lorafx.apply(model, lorafx.LoraSpec(r=2, target_modules=["0"]), (torch.randn(4, 6),))
    if loaded:
        gm.load_state_dict({n: t + 1 for n, t in gm.state_dict().items()})
    before, of_graph = state_of(model), state_of(gm)
    for module in (gm, nn.Sequential(gm)):
        with pytest.raises(PassError, match=r"captured in torch.float32 .*\(model.to\(dtype\)\) and apply again"):
            convert(module)
    assert same(before, state_of(model))
    assert same(of_graph, state_of(gm))


def test_adapters_may_take_the_models_dtype() -> None:
    """They are float32 beside a half model; what PyTorch converts is a model's parameters, and so theirs too."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)).bfloat16(), torch.randn(4, 6).bfloat16()
    gm = lorafx.apply(model, lorafx.LoraSpec(r=2, target_modules=["0"], init="gaussian"), (x,))
    with torch.no_grad():
        gm.get_parameter("0.lora_B.default").normal_()
    expected = gm(x)
    assert {t.dtype for t in gm.parameters()} == {torch.bfloat16, torch.float32}
    assert {t.dtype for t in gm.to(torch.bfloat16).parameters()} == {torch.bfloat16}
    assert_close("layer", gm(x), expected)


# Labels of plain modules, and labels that are more than the loss's.


class WithLoss(nn.Module):
    """A loss with weights and dropout of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.register_buffer("class_weights", torch.tensor([1.0, 2.0, 3.0]))
        self.centers = nn.Embedding(3, 6)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        h = self.layer(x)
        logits = self.head(h)
        if labels is None:
            return {"logits": logits}
        distance = self.drop(h - self.centers(labels)).square().mean()
        return {"loss": F.cross_entropy(logits, labels, weight=self.class_weights) + distance, "logits": logits}


@modes
def test_a_loss_may_have_weights_of_its_own(training: bool) -> None:
    model, x, labels = WithLoss(), torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    gm = captured(model, {"x": x, "labels": labels}, None).train(training)
    model.train(training)
    before = copy.deepcopy(model.state_dict())
    assert list(gm.state_dict()) == list(model.state_dict())
    assert not any(p.requires_grad for p in gm.parameters())
    assert torch.equal(gm(x)["logits"], model(x)["logits"])
    actual, expected = both(gm, model, lambda m: m(x, labels))
    assert same(actual, expected)
    values = {n: t + 1 for n, t in gm.state_dict().items()}
    gm.load_state_dict(values)
    assert same(model.state_dict(), before)
    model.load_state_dict(values)
    actual, expected = both(gm, model, lambda m: m(x, labels))
    assert same(actual, expected)


@pytest.mark.xdist_group("t5")
def test_labels_that_make_the_decoders_input_are_an_input(zoo: Zoo) -> None:
    """T5 is mostly trained so: called with labels only, it shifts them into its decoder."""
    family = FAMILIES["t5"]
    model = zoo.eager(family)
    inputs = {n: t for n, t in family.inputs().items() if not n.startswith("decoder_")}
    inputs["labels"] = family.labels()
    gm = lorafx.apply(model, lorafx.LoraSpec(), inputs)
    assert [n for n in gm.state_dict() if "lora_" not in n] == list(model.state_dict())
    assert {s.name for s in lorafx.sites(gm)} == {s.name for s in lorafx.sites(zoo.adapted(family, lorafx.LoraSpec()))}
    for training in (True, False):
        gm.train(training)
        model.train(training)
        actual, expected = both(gm, model, lambda m: m(**inputs))
        assert same(actual, expected)
    del inputs["labels"]
    with pytest.raises(InputError, match="missing: labels"):
        gm(**inputs)


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(lorafx.CaptureError, match=r"expected a torch.nn.Module, not str\. .*load_pretrained"):
        lorafx.apply("checkpoint", {"r": 4})  # type: ignore[arg-type]
    with pytest.raises(lorafx.CaptureError, match=r"expected a torch.nn.Module, not str"):
        lorafx.export_base("checkpoint", "model.onnx")  # type: ignore[arg-type]
