"""Translating a model shortened to a few of its blocks gives, byte for byte, what translating all of it gives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

import lorafx
import zoo
from lorafx.export import program, translate
from lorafx.export.example import flat_example
from lorafx.export.repeat import KEPT, Repeat, drop_repeats, find_repeats
from lorafx.export.weights import fill
from lorafx.graph import CapturedModule, get_path
from lorafx.passes.capture import capture
from lorafx.passes.decoder import capture_decoder
from lorafx.passes.inference import inference
from tolerances import assert_close


def translated(gm: CapturedModule, example: Mapping[str, Tensor]) -> bytes:
    """The model as a file, weights included."""
    graph = inference(gm)
    found = translate.translate(graph, example, graph.signature.dims)
    fill(found.weights, found.folded, lambda name: get_path(graph, name))
    data: bytes = ir.to_proto(found.model).SerializeToString(deterministic=True)
    return data


def repeats(gm: CapturedModule) -> list[Repeat]:
    graph = inference(gm)
    return find_repeats(translate._flat(graph), graph, graph.state_dict().keys())


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> Callable[[CapturedModule, Mapping[str, Tensor]], bytes]:
    """Translate without shortening."""

    def translate_whole(gm: CapturedModule, example: Mapping[str, Tensor]) -> bytes:
        with monkeypatch.context() as patch:
            patch.setattr(translate, "find_repeats", lambda *args: [])
            return translated(gm, example)

    return translate_whole


@pytest.fixture
def unrolled(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each shortened translation could be unrolled."""
    outcomes: list[bool] = []
    original = translate.unroll

    def unroll(*args: Any) -> bool:
        outcomes.append(original(*args))
        return outcomes[-1]

    monkeypatch.setattr(translate, "unroll", unroll)
    return outcomes


def deep(name: str, layers: int) -> nn.Module:
    """A model of the zoo with more layers."""
    shallow: Any = zoo.FAMILIES[name].build()
    config = copy.deepcopy(shallow.config)
    config.num_hidden_layers = layers
    if hasattr(config, "num_decoder_layers"):
        config.num_decoder_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = (config.layer_types * layers)[:layers]
    model: nn.Module = type(shallow)(config)
    return model.eval()


@cache
def capture_of(name: str, layers: int) -> CapturedModule:
    return capture(deep(name, layers), zoo.FAMILIES[name].inputs(), eval_only=True)


@pytest.mark.parametrize(
    ("name", "layers", "dropped"),
    [
        pytest.param(name, layers, dropped, id=name, marks=pytest.mark.xdist_group(name))
        for name, layers, dropped in [
            ("bert", 5, [1]),
            ("llama", 5, [1]),
            ("gpt2", 5, [2]),
            ("vit", 5, [1]),
            ("t5", 5, [1, 1]),
            ("mixtral", 5, [1]),
            ("modernbert", 9, [1]),
        ]
    ],
)
def test_unrolled_model_is_the_model_to_the_byte(
    name: str, layers: int, dropped: list[int], whole: Callable[..., bytes], unrolled: list[bool]
) -> None:
    """Encoders and decoders, both at once, and layers that alternate between two kinds of attention."""
    example = zoo.FAMILIES[name].inputs()
    gm = capture_of(name, layers)
    assert [repeat.dropped for repeat in repeats(gm)] == dropped
    assert translated(gm, example) == whole(gm, example)
    assert unrolled == [True]


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.xdist_group(n)) for n in ("llama", "gpt2")])
def test_unrolled_step_is_the_step_to_the_byte(name: str, whole: Callable[..., bytes], unrolled: list[bool]) -> None:
    """Each layer has inputs and results of its own; with keys shared by heads and without."""
    step = capture_decoder(capture_of(name, 5))
    example = flat_example(step.signature, step.meta["example"], None)
    (repeat,) = repeats(step)
    assert repeat.results[0].items() >= {3: 5, 4: 6}.items()
    assert translated(step, example) == whole(step, example)
    assert unrolled == [True]


# Blocks that are not all alike.

WIDTH = 12


class Block(nn.Module):
    def __init__(self, scale: float = 1.0, bias: bool = True) -> None:
        super().__init__()
        self.scale = scale
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 20, bias=bias)
        self.down = nn.Linear(20, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x)))) * self.scale


class Stack(nn.Module):
    """Blocks between two layers; of what all but the head give, what ``every`` selects is returned too."""

    def __init__(self, blocks: list[nn.Module], every: slice = slice(0)) -> None:
        super().__init__()
        self.first = nn.Linear(7, WIDTH)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(WIDTH, 3)
        self.every = every

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        hidden = [self.first(x)]
        for block in self.blocks:
            hidden.append(block(hidden[-1]))
        return (self.head(hidden[-1]), *hidden[self.every])


def blocks(count: int, **odd: Any) -> list[nn.Module]:
    """So many blocks; the middle one with other arguments."""
    return [Block(**(odd if index == count // 2 else {})) for index in range(count)]


def tied(*indices: int, count: int = 6) -> Stack:
    stack = Stack(blocks(count))
    for index in indices[1:]:
        stack.blocks[index].up.weight = stack.blocks[indices[0]].up.weight  # type: ignore[union-attr]
    return stack


def tied_to_the_head() -> Stack:
    stack = Stack([Block() for _ in range(6)])
    for block in stack.blocks:
        block.down = nn.Linear(20, WIDTH)
    stack.head.bias = nn.Parameter(torch.zeros(WIDTH))
    stack.head.weight = nn.Parameter(torch.zeros(WIDTH, WIDTH))
    stack.blocks[3].norm.weight = stack.head.bias  # type: ignore[union-attr]
    return stack


SAMPLE = {"x": torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize(
    ("model", "dropped"),
    [
        pytest.param(lambda: Stack(blocks(6)), [3], id="all alike"),
        pytest.param(lambda: Stack(blocks(7, scale=0.5)), [], id="one literal differs"),
        pytest.param(lambda: Stack(blocks(11, scale=0.5)), [2, 2], id="one literal differs, far from the ends"),
        pytest.param(lambda: Stack(blocks(7, bias=False)), [], id="one lacks a bias"),
        pytest.param(lambda: tied(2, 3), [], id="two tied"),
        pytest.param(lambda: tied(*range(6)), [3], id="all tied"),
        pytest.param(tied_to_the_head, [], id="one tied to the head"),
        pytest.param(lambda: Stack(blocks(6), every=slice(1, 7)), [3], id="all returned"),
        pytest.param(lambda: Stack(blocks(7), every=slice(2, 8)), [3], id="all but the first returned"),
        pytest.param(lambda: Stack(blocks(6), every=slice(1, 6)), [], id="all but the last returned"),
        pytest.param(lambda: Stack(blocks(6), every=slice(3, 4)), [], id="one returned"),
    ],
)
def test_blocks_that_differ_are_not_merged(
    model: Callable[[], nn.Module], dropped: list[int], whole: Callable[..., bytes], unrolled: list[bool]
) -> None:
    gm = capture(model().eval(), SAMPLE, eval_only=True)
    assert [repeat.dropped for repeat in repeats(gm)] == dropped
    if dropped:
        assert translated(gm, SAMPLE) == whole(gm, SAMPLE)
        assert unrolled == [True]


class Halving(nn.Module):
    """Alike in torch's graph, but each block halves what it passes on."""

    def __init__(self, flatten: bool) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv1d(4, 4, 3, padding=1) for _ in range(5)])
        self.head = nn.Linear(4, 2)
        self.flatten = flatten

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = nn.functional.max_pool1d(torch.relu(conv(x)), 2)
        result: Tensor = self.head(x.flatten(1) if self.flatten else x.mean(-1))
        return result


@pytest.mark.parametrize("flatten", [False, True])
def test_blocks_that_change_sizes_are_not_copied(
    flatten: bool, whole: Callable[..., bytes], unrolled: list[bool]
) -> None:
    """The shortened graph translates, to other sizes, or does not: either way the whole one is translated."""
    sample = {"x": torch.randn(2, 4, 32)}
    gm = capture(Halving(flatten).eval(), sample, dynamic_shapes={"x": {0: "batch"}}, eval_only=True)
    assert len(repeats(gm)) == 1
    assert translated(gm, sample) == whole(gm, sample)
    assert unrolled == ([] if flatten else [False])


def test_what_is_translated_does_not_grow_with_depth() -> None:
    sizes = []
    for count in (KEPT + 1, 12):
        graph = inference(capture(Stack(blocks(count)).eval(), SAMPLE, eval_only=True))
        flat = translate._flat(graph)
        drop_repeats(flat, find_repeats(flat, graph, graph.state_dict().keys()))
        sizes.append(len(flat.nodes))
    assert sizes[0] == sizes[1]


def test_an_export_that_is_checked_translates_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph that the base's export has follows from the merged model's translation."""
    spec = lorafx.LoraSpec(r=2, target_modules="all-linear", bias="all")
    gm = lorafx.apply(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), spec, torch.ones(2, 8)).eval()
    real, calls = torch.onnx.export, []
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    assert "same graph" in lorafx.merge_and_export(gm, tmp_path / "m.onnx").checks
    assert len(calls) == 1


@pytest.mark.xdist_group("llama")
def test_unrolled_model_runs_as_torch() -> None:
    family, gm = zoo.FAMILIES["llama"], capture_of("llama", 5)
    session = ort.InferenceSession(translated(gm, family.inputs()), providers=["CPUExecutionProvider"])
    sample = family.other_inputs()
    (found,) = session.run(None, {name: value.numpy() for name, value in sample.items()})
    with torch.no_grad():
        assert_close("model", torch.from_numpy(found), gm(**sample).logits)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in ("gpt2", "convnet")]
)
def test_graph_made_into_a_program_is_what_torch_export_makes_of_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dynamic dimensions; without them, tests/test_export.py compares with torch's export of the user's model."""
    family = zoo.FAMILIES[name]
    gm = capture(family.build(), family.inputs(), eval_only=True)
    direct = translated(gm, family.inputs())
    monkeypatch.setattr(program, "_is_plain", lambda node: False)
    assert direct == translated(gm, family.inputs())
