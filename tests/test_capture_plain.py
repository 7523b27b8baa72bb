"""Plain modules, captured through both front ends: what they do, their dimensions, and what is refused."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

import lorafx
from conftest import both, same, state_of
from lorafx.api import captured
from lorafx.errors import CaptureError, FixedDimensionWarning, InputError
from lorafx.passes.huggingface import configs
from zoo import FAMILIES

modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


class Net(nn.Module):
    """Layers of every kind that matters to a capture, called in every way."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.4)
        self.matrix = nn.Parameter(torch.randn(8, 8) / 3)
        self.register_buffer("offset", torch.randn(8))
        self.block = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        h = self.drop(self.norm(self.first(x)))
        h = h + self.block(F.linear(h, self.matrix)) + self.offset
        h = self.block(F.dropout(h, 0.2, self.training))
        return {"logits": self.head(h), "hidden": [h, F.linear(input=h, weight=self.matrix)]}


EXAMPLES = {"export": (torch.randn(4, 6, generator=torch.Generator().manual_seed(0)),), "symbolic": None}
front_ends = pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)


@modes
@front_ends
def test_plain_modules_run_as_in_eager(example: tuple[Tensor] | None, training: bool) -> None:
    model = Net()
    gm = captured(model, example, None).train(training)
    twin = copy.deepcopy(model).train(training)
    before = state_of(model)
    for rows in (2, 5, 9):
        actual, expected = both(gm, twin, lambda m, n=rows: m(torch.ones(n, 6).cumsum(0)))
        assert same(actual, expected)
        assert same(gm.state_dict(), twin.state_dict())
    assert same(before["buffers"], state_of(model)["buffers"])
    advanced = not torch.equal(gm.norm.running_mean, model.norm.running_mean)
    assert advanced == training
    assert int(gm.norm.num_batches_tracked) == (3 if training else 0)


def test_front_ends_agree() -> None:
    """The same layers under the same names, the same outputs, the same state dict."""
    model, x = Net(), torch.randn(5, 6)
    spec = lorafx.LoraSpec(r=2, target_modules=["first", "matrix", "block.0", "block.2"])
    exported, symbolic = (lorafx.apply(model, spec, example, seed=1) for example in EXAMPLES.values())
    assert lorafx.sites(exported) == lorafx.sites(symbolic)
    assert exported.signature.outputs == symbolic.signature.outputs == ("logits", "hidden.0", "hidden.1")
    assert list(exported.state_dict()) == list(symbolic.state_dict())
    for training in (True, False):
        actual, expected = both(symbolic.train(training), exported.train(training), lambda m: m(x))
        assert same(actual, expected)


@front_ends
def test_capture_starts_in_the_models_modes(example: tuple[Tensor] | None) -> None:
    model = Net().train()
    model.norm.eval()
    gm = lorafx.apply(model, lorafx.LoraSpec(dropout=0.5, target_modules=["first"]), example)
    actual, expected = both(captured(model, example, None), copy.deepcopy(model), lambda m: m(torch.ones(4, 6)))
    assert same(actual, expected)
    assert gm.training
    assert gm.first.training
    assert not gm.norm.training


@front_ends
def test_forward_hooks_are_part_of_the_model(example: tuple[Tensor] | None) -> None:
    """A hook on a layer changes what eager computes, so the graph computes it too."""
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)), torch.randn(4, 6)
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    gm = captured(model, example, None)
    assert torch.equal(gm(x), model(x))


@front_ends
def test_parametrized_layers_run_as_in_eager(example: tuple[Tensor] | None) -> None:
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
    model, x = nn.Sequential(normed, nn.Tanh(), nn.Linear(6, 2)), torch.randn(4, 6)
    gm = captured(model, example, None)
    assert torch.equal(gm(x), model(x))
    assert list(gm.state_dict()) == list(model.state_dict())


class WithDefaults(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0, *, flip: bool = False, **extra: Any
    ) -> Tensor:
        h = self.layer(x)
        h = h if mask is None else h * mask
        out: Tensor = self.head(-h if flip else h) * scale
        return out


@front_ends
def test_arguments_with_defaults(example: tuple[Tensor] | None) -> None:
    """What has a default may be left out or given that value; another value is another graph."""
    model, x = WithDefaults(), torch.randn(4, 6)
    gm = captured(model, example, None)
    for call in (lambda m: m(x), lambda m: m(x, None, 2.0), lambda m: m(x=x, scale=2.0, flip=False)):
        assert torch.equal(call(gm), call(model))
    for arguments, name in (({"mask": torch.ones(6)}, "mask"), ({"scale": 3.0}, "scale"), ({"flip": True}, "flip")):
        with pytest.raises(InputError, match=rf"captured with \(x\); this call is different \(not captured: {name}\)"):
            gm(x, **arguments)
    with pytest.raises(InputError, match="not captured: colour"):
        gm(x, colour=torch.ones(1))


def test_arguments_given_as_examples_are_captured() -> None:
    model, x, mask = WithDefaults(), torch.randn(4, 6), torch.randn(6)
    shapes = {"mask": {}}
    gm = captured(model, {"x": x, "mask": mask, "scale": 3.0, "flip": True}, shapes)
    assert [a.name for a in gm.signature.arguments] == ["x", "mask"]
    assert torch.equal(gm(x, mask), model(x, mask, 3.0, flip=True))
    with pytest.raises(InputError, match="not captured: scale"):
        gm(x, mask, 2.0)
    with pytest.raises(InputError, match="missing: mask"):
        gm(x)


def test_structured_inputs_and_outputs() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, pair: tuple[Tensor, Tensor], named: dict[str, Tensor]) -> tuple[Any, ...]:
            h = self.layer(pair[0]) + pair[1] * named["gain"]
            return h, {"sum": h.sum(), "same": [pair[0]]}

    model, x = Nested(), torch.randn(4, 6)
    gm = captured(model, ((x, x.clone()), {"gain": x.clone()}), None)
    given = ((torch.randn(3, 6), torch.randn(3, 6)), {"gain": torch.randn(3, 6)})
    assert same(gm(*given), model(*given))
    assert gm.signature.outputs == ("output_0", "output_1.sum", "output_1.same.0")
    for wrong in (([x, x], {"gain": x}), ((x,), {"gain": x}), ((x, x), {"loss": x})):
        with pytest.raises(InputError, match=r"^argument '(pair|named)' was captured as .* and was given as .*$"):
            gm(*wrong)


# Dimensions.


class FixesBatch(nn.Module):
    """The batch size decides what is computed."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.layer, self.head = how, nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "reshape":
            x = x.reshape(4, 6)
        if (self.how == "branch" and x.shape[0] == 4) or (self.how == "limit" and x.shape[0] > 3):
            x = -x
        out: Tensor = self.head(self.layer(x))
        return out + torch.ones(4, 2) if self.how == "add" else out


@pytest.mark.parametrize("how", ["reshape", "branch", "add"])
def test_a_dimension_that_came_out_fixed_is_reported(how: str) -> None:
    x = torch.randn(4, 6)
    with pytest.warns(FixedDimensionWarning, match=r"dimension 0 of 'x' \(batch\) came out fixed at 4") as caught:
        gm = lorafx.apply(FixesBatch(how), lorafx.LoraSpec(target_modules=["layer"]), (x,))
    assert caught[0].filename == __file__, "the warning points elsewhere than at the call"
    assert gm.signature.dims == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        captured(FixesBatch(how), (x,), {"x": {}})  # said to be meant


def test_a_dimension_that_came_out_limited_is_reported() -> None:
    """Below four the model's code takes the other branch, which the graph does not have."""
    with pytest.warns(FixedDimensionWarning, match=r"dimension 0 of 'x' \(batch\) came out limited to 4 or more"):
        gm = captured(FixesBatch("limit"), (torch.randn(5, 6),), None)
    assert gm.signature.ranges == {"batch": (4, None)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        captured(FixesBatch("limit"), (torch.randn(5, 6),), {"x": {0: torch.export.Dim("batch", min=4)}})


def test_dynamic_shapes_override_the_default() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    example = torch.randn(2, 3, 5, 6)
    named = captured(model, (example,), {"input": {0: "images", 2: "columns"}})
    assert named.signature.dims == {"input": {0: "images", 2: "columns"}}
    x = torch.randn(4, 3, 7, 6)
    assert torch.equal(named(x), model(x))
    bounded = captured(model, (example,), {"input": {0: torch.export.Dim("images", min=1, max=9)}})
    assert bounded.signature.dims == {"input": {0: "images"}}
    assert bounded.signature.ranges == {"images": (1, 9)}
    assert captured(model, (example,), {"input": {}}).signature.dims == {}
    assert captured(model, (example,), None).signature.dims == {"input": {0: "batch"}}
    with pytest.raises(CaptureError, match=r"dynamic_shapes names image; the tensor inputs are input"):
        captured(model, (example,), {"image": {0: "batch"}})


# What cannot be captured.


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.layer(x)
        if h.sum() > 0:
            h = -h
        return h


@front_ends
def test_a_branch_on_data_names_the_line(example: tuple[Tensor] | None, capfd: pytest.CaptureFixture[str]) -> None:
    lines, first = inspect.getsourcelines(Branches.forward)
    number = first + next(i for i, line in enumerate(lines) if "if h.sum()" in line)
    model = Branches().train()
    before = state_of(model)
    with pytest.raises(
        CaptureError, match=rf"Branches at test_capture_plain.py:{number} in forward: `if h.sum\(\) > 0:`"
    ) as caught:
        captured(model, example, None)
    assert "What to do: " + ("branch on shapes" if example else "give example_inputs") in str(caught.value)
    assert same(before, state_of(model))
    assert capfd.readouterr() == ("", ""), "torch's own report reached the user's screen"


class DiffersByMode(Branches):
    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.layer(x)
        return h.sin() if self.training else h.cos()


@front_ends
def test_modes_that_differ_are_refused(example: tuple[Tensor] | None) -> None:
    with pytest.raises(CaptureError, match=r"First difference: train has .*sin.*eval has .*cos") as caught:
        captured(DiffersByMode(), example, None)
    assert "layerdrop" in str(caught.value)


@front_ends
@pytest.mark.parametrize("path", ["heads.class", "None", "layer.lambda"], ids=["module", "buffer", "parameter"])
def test_names_that_are_keywords_are_refused(example: tuple[Tensor] | None, path: str) -> None:
    """torch.fx writes ``self.heads.class.weight``, which is no Python."""
    model = Branches()
    model.register_module("heads", nn.ModuleDict({"class": nn.Linear(6, 6)} if path == "heads.class" else {}))
    if path == "None":
        model.register_buffer(path, torch.ones(6))
    if path == "layer.lambda":
        model.layer.register_parameter("lambda", nn.Parameter(torch.ones(6)))
    message = rf"'{path}' cannot be captured: '(\w+)' is a keyword of Python, .* another name in the model \('\1_'\)"
    with pytest.raises(CaptureError, match=message):
        captured(model, example, None)


def test_examples_that_do_not_fit_are_refused() -> None:
    model, x = nn.Sequential(nn.Linear(6, 6)), torch.randn(4, 6)
    with pytest.raises(CaptureError, match=r"do not fit Sequential.forward\(input\): too many positional"):
        captured(model, (x, x), None)
    with pytest.raises(CaptureError, match=r"missing a required argument: 'input'"):
        captured(model, {"x": x}, None)
    with pytest.raises(CaptureError, match=r"example input 'input' is a object; inputs are tensors"):
        captured(model, (object(),), None)


def whisper(**settings: Any) -> nn.Module:
    sizes = {"vocab_size": 30, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 1, "decoder_attention_heads": 1}
    widths = {"d_model": 8, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "num_mel_bins": 4, "max_source_positions": 6}
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(**sizes, **layers, **widths, **settings))


@pytest.mark.parametrize(
    ("settings", "field", "advice"),
    [
        ({"encoder_layerdrop": 0.1}, "WhisperConfig.encoder_layerdrop is 0.1", r"Set config.encoder_layerdrop = 0.0"),
        ({"decoder_layerdrop": 0.2}, "WhisperConfig.decoder_layerdrop is 0.2", r"Set config.decoder_layerdrop = 0.0"),
        (
            {"apply_spec_augment": True, "mask_time_prob": 0.05},
            "WhisperConfig.mask_time_prob is 0.05",
            r"Set config.apply_spec_augment = False",
        ),
    ],
    ids=["encoder_layerdrop", "decoder_layerdrop", "spec_augment"],
)
def test_randomness_outside_the_graph_is_refused(settings: dict[str, Any], field: str, advice: str) -> None:
    model = whisper(**settings)
    before = state_of(model)
    with pytest.raises(CaptureError, match=rf"^{field}: .*{advice}"):
        captured(model, None, None)
    assert same(before, state_of(model))


def test_cache_settings_are_put_back() -> None:
    family = FAMILIES["llama"]
    model = family.build()
    assert [c.use_cache for c in configs(model)] == [True]
    gm = captured(model, family.inputs(), None)
    assert [c.use_cache for c in configs(model)] == [True]
    assert "past_key_values" not in gm(**family.inputs())
