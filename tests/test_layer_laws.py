"""The laws at every kind of layer, and of several adapters at one call."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import lorafx
from adapted_layers import OTHERS, Adapted, Shape, embedding, fits, linear, operands, started
from conftest import randomize
from lorafx import LoraSpec
from lorafx.graph import CapturedModule
from lorafx.ops import ADAPTED, PARAMETERS
from lorafx.variants import SELECTABLE as VARIANTS
from lorafx.variants.row_norm import row_norm
from tolerances import assert_close, assert_rounded_once

HALF = (torch.bfloat16, torch.float16)

variants = pytest.mark.parametrize("name", VARIANTS)
kinds = pytest.mark.parametrize("kind", OTHERS)
#: Where there is no bias, a variant that shifts it is refused (tests/test_inits.py).
fitting = pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in VARIANTS for kind, shape in OTHERS.items() if fits(name, shape)]
)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)


@variants
@dtypes
@kinds
def test_identity_at_init(name: str, dtype: torch.dtype, kind: str) -> None:
    shape = OTHERS[kind]
    given = operands(name, shape, dtype)
    expected = given.layer()
    started_by = []
    for init in VARIANTS[name].inits:
        if VARIANTS[name].misfit(init, shape.kind, tuple(given.matrix.shape), shape.r, False):
            continue
        one, start = started(given, name, init, shape.r)
        actual = given.with_weight(start.base).with_adapters(one)()
        if start.base is None and init != "orthogonal":
            assert torch.equal(actual, expected), init
        else:
            assert_close("layer", actual, expected)
        started_by.append(init)
    assert set(VARIANTS[name].inits) - set(started_by) <= {"eva", "lora_ga", "orthogonal"}


@fitting
@dtypes
def test_the_folded_layer_equals_the_adapted_one(name: str, kind: str, dtype: torch.dtype) -> None:
    given = operands(name, OTHERS[kind], dtype)
    folded = given.folded()
    actual = given()
    assert actual.dtype == dtype
    assert actual.shape == given.layer().shape
    assert not torch.equal(folded.weight, given.weight)
    assert_close("layer", actual, folded.layer())


@fitting
def test_gradients_equal_those_of_the_folded_layer(name: str, kind: str) -> None:
    """By the parameters and the input. DoRA's norm is a constant in both (``update`` detaches it)."""
    given = operands(name, OTHERS[kind], torch.float64)
    inputs = [t for i, t in enumerate(given.own) if isinstance(t, Tensor) and i != given.weight_index]
    inputs = [t for t in inputs if t.is_floating_point()]
    for value in (*given.parameters, *inputs):
        value.requires_grad_()
    weights = torch.randn(given().shape, dtype=torch.float64)
    found, wanted = (
        torch.autograd.grad((output * weights).sum(), [*given.parameters, *inputs], allow_unused=True)
        for output in (given(training=True), given.folded().layer())
    )
    for actual, expected in zip(found, wanted, strict=True):
        assert actual is not None
        assert expected is not None
        assert_close("layer", actual, expected)


@variants
@pytest.mark.parametrize("kind", ["addmm", "conv2d depthwise", "conv1d same", "experts"])
def test_gradcheck(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = operands(name, OTHERS[kind], torch.float64)
    (one,) = given.adapters
    if VARIANTS[name].scales_rows:
        norm = row_norm(given.matrix, one.tensors["lora_A"], one.tensors["lora_B"], one.scaling)
        monkeypatch.setattr("lorafx.variants.dora.row_norm", lambda *_: norm)

    def call(*parameters: Tensor) -> Tensor:
        moved = dict(zip(VARIANTS[name].parameters, parameters, strict=True))
        return given.with_adapters(replace(one, tensors={**one.tensors, **moved}))(training=True)

    assert torch.autograd.gradcheck(call, [p.requires_grad_() for p in given.parameters])


def test_an_embeddings_gradient_is_dense_and_leaves_out_the_padding() -> None:
    for options in ({"sparse": True}, {"padding_idx": 2}, {"scale_grad_by_freq": True}):
        given = operands("lora", embedding(**options), torch.float64)
        a, b = (value.requires_grad_() for value in given.parameters)
        given().sum().backward()
        # Ids 0 to 6, where 2 and 6 occur twice and 3 does not.
        times = torch.tensor([1.0, 1.0, 2.0, 0.0, 1.0, 1.0, 2.0], dtype=torch.float64)
        if "padding_idx" in options:
            times[2] = 0.0
        if "scale_grad_by_freq" in options:
            times = (times > 0).double()
        expected = given.adapters[0].scaling * torch.outer(b.detach().sum(0), times)
        assert a.grad is not None
        assert_close("layer", a.grad, expected)


@variants
@pytest.mark.parametrize("kind", ["addmm", "embedding", "conv2d depthwise", "conv1d same"])
def test_opcheck(name: str, kind: str) -> None:
    given = operands(name, OTHERS[kind], torch.float32)
    (one,) = given.adapters
    for value in given.parameters:
        value.requires_grad_()
    arguments = (*given.own, [*one.tensors.values()], [name], [one.scaling], [0.0], True, None)
    torch.library.opcheck(ADAPTED[given.kind], arguments)


@variants
@kinds
def test_autocast_gives_the_dtype_that_the_layer_gives(name: str, kind: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        given, fresh = (operands(name, OTHERS[kind], dtype, fresh=f) for f in (False, True))
        with torch.autocast("cpu", torch.bfloat16):
            assert given().dtype == given.layer().dtype
            assert torch.equal(fresh(), fresh.layer())


@variants
@pytest.mark.parametrize("kind", ["addmm", "conv2d", "conv3d"])
def test_dropout_drops_elements_of_the_input(name: str, kind: str) -> None:
    """The mean over many masks is the output without dropout; a single one is another."""
    given = operands(name, OTHERS[kind], torch.float64)
    plain, dropped = given(), given(0.5, training=True)
    assert not torch.equal(plain, dropped)
    assert torch.equal(given(0.5, training=False), plain)
    draws = torch.stack([given(0.2, training=True) for _ in range(400)])
    spread = draws.std(0) / 400**0.5
    assert bool(((draws.mean(0) - plain).abs() <= 6 * spread + 1e-12).all())


@variants
@pytest.mark.parametrize("storage", ["parameter", "parameter_t"])
def test_a_stack_is_each_of_its_weights(name: str, storage: str) -> None:
    """Experts: the update of ``[experts, out, in]`` is that of each expert with its part of the parameters."""
    shape = Shape(storage, 2, lambda draw: (draw(3, 6, 4),))
    given = operands(name, shape, torch.float64)
    (one,) = given.adapters
    stacked = given()
    for index in range(3):
        mine = {n: t[index] if n in VARIANTS[name].parameters else t for n, t in one.tensors.items()}
        alone = Adapted(storage, (given.own[0][index],), (replace(one, tensors=mine),))
        assert_close("layer", stacked[index], alone())


@pytest.mark.parametrize("name", [name for name in VARIANTS if not VARIANTS[name].shifts_bias])
def test_a_parameters_update_is_the_layers(name: str) -> None:
    """``F.linear`` on the adapted parameter is the adapted linear layer."""
    layer = operands(name, linear((6,), 5, 4, 2, bias=False), torch.float64)
    whole = Adapted("parameter", (layer.own[1],), layer.adapters)
    assert_close("layer", F.linear(layer.own[0], whole()), layer())


#: Variants that every kind of layer takes, numbered.
MIXED = [(name, index) for index, name in enumerate(n for n in VARIANTS if not VARIANTS[n].shifts_bias)]


def mixed(shape: Shape, dtype: torch.dtype) -> Adapted:
    """A layer with an adapter of every variant that fits it, each of another rank."""
    bare = operands("lora", shape, dtype)
    ones = [operands(n, replace(shape, r=shape.r + i), dtype, seed=7 + i).adapters[0] for n, i in MIXED]
    return bare.with_adapters(*ones)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_several_adapters_sum_and_their_order_means_nothing(kind: str, dtype: torch.dtype) -> None:
    """Each adds what it adds alone to the frozen layer."""
    given = mixed(OTHERS[kind], dtype)
    base = given.layer()
    alone = [given.with_adapters(one)() - base for one in given.adapters]
    assert_close("layer", given(), base + torch.stack(alone).sum(0))
    assert_close("layer", given.with_adapters(*reversed(given.adapters))(), given())


@pytest.mark.parametrize("kind", ["linear", *(n for n, s in OTHERS.items() if s.kind not in PARAMETERS)])
def test_rows_go_through_their_own_adapters(kind: str) -> None:
    """Each row of the output equals that of a call with its adapter alone; -1 is none."""
    given = mixed(OTHERS.get(kind, linear((6, 3), 5, 4, 2)), torch.float64)
    alone = [given.layer(), *(given.with_adapters(one)() for one in given.adapters)]
    rows = torch.arange(alone[0].shape[0]) % len(alone) - 1
    for given_rows in (rows, rows.flip(0)):
        together = given(rows=given_rows)
        for output, row, index in zip(together, range(len(rows)), given_rows.tolist(), strict=True):
            assert_close("layer", output, alone[index + 1][row])


def test_rows_of_a_flattened_batch_and_of_a_diverged_adapter() -> None:
    """Two rows of three tokens each, as GPT-2's Conv1D gets them; NaN of one adapter stays in its own rows."""
    given = mixed(OTHERS["addmm"], torch.float64)
    first, second = given.adapters[:2]
    broken = replace(second, tensors={n: t * float("nan") for n, t in second.tensors.items()})
    together = given.with_adapters(first, broken)(rows=torch.tensor([0, 1]))
    assert_close("layer", together[:3], given.with_adapters(first)()[:3])
    assert bool(together[3:].isnan().all())
    with pytest.raises(RuntimeError, match="adapter_names has 4 names, and the batch another size"):
        given(rows=torch.zeros(4, dtype=torch.long))


@fitting
def test_vmap_over_adapters_and_over_what_a_layer_has_itself(name: str, kind: str) -> None:
    """Of an ensemble each member's output is that of its own call; so it is of a batch of inputs."""
    members = [operands(name, OTHERS[kind], torch.float64, seed=seed) for seed in (1, 2, 3)]
    first = members[0]

    def call(tensors: dict[str, Tensor], own: dict[str, Tensor]) -> Tensor:
        arguments = [own.get(str(i), value) for i, value in enumerate(first.own)]
        return replace(first, own=tuple(arguments)).with_adapters(replace(first.adapters[0], tensors=tensors))()

    def own(member: Adapted) -> dict[str, Tensor]:
        return {str(i): v for i, v in enumerate(member.own) if isinstance(v, Tensor)}

    each, adapters = [own(m) for m in members], [dict(m.adapters[0].tensors) for m in members]
    together = {n: torch.stack([tensors[n] for tensors in adapters]) for n in adapters[0]}
    owns = {n: torch.stack([tensors[n] for tensors in each]) for n in each[0]}
    for found, alone in (
        (torch.vmap(call, in_dims=(0, None))(together, each[0]), [call(a, each[0]) for a in adapters]),
        (torch.vmap(call, in_dims=(None, 0))(adapters[0], owns), [call(adapters[0], o) for o in each]),
        (torch.vmap(call)(together, owns), [call(a, o) for a, o in zip(adapters, each, strict=True)]),
    ):
        assert_close("layer", found, torch.stack(alone))


class Layers(nn.Module):
    """A layer of every kind, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 8, padding_idx=0)
        self.conv1d = nn.Conv1d(8, 6, 3, padding="same", groups=2)
        self.conv2d = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.conv3d = nn.Conv3d(2, 3, (1, 2, 2), bias=False)
        self.conv1 = Conv1D(5, 3)
        self.linear = nn.Linear(5, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv1d(self.embedding(ids).mT)  # [batch, 6, 12]
        x = self.conv2d(x.tanh().unsqueeze(1))  # [batch, 4, 3, 6]
        x = self.conv3d(x.tanh().unflatten(1, (2, 2)))  # [batch, 3, 2, 2, 5]
        found: Tensor = self.linear(self.conv1(x.tanh().flatten(2).mT.contiguous()))
        return found


NAMES = ("embedding", "conv1d", "conv2d", "conv3d", "conv1", "linear")
WITH_BIAS = ("conv1d", "conv2d", "conv1", "linear")


def graph_of_layers(name: str, dtype: torch.dtype = torch.float32, **fields: Any) -> tuple[Layers, CapturedModule]:
    """The model, and its graph with adapters anywhere, in eval mode."""
    model = Layers().to(dtype)
    names = WITH_BIAS if VARIANTS[name].shifts_bias else NAMES
    spec = LoraSpec(variant=name, r=2, target_modules=names, **fields)
    gm = lorafx.apply(model, spec, (torch.randint(7, (3, 12)),), dynamic_shapes={"ids": {0: "batch"}}).eval()
    assert {s.name for s in lorafx.sites(gm)} == set(names)
    randomize(gm)
    return model, gm


@variants
def test_the_base_of_every_kind_gets_no_gradient(name: str) -> None:
    model, gm = graph_of_layers(name)
    gm(torch.randint(7, (3, 12))).square().sum().backward()
    parameters = {n for s in lorafx.sites(gm) for n in s.parameter_names.values()}
    assert {n for n, p in gm.named_parameters() if p.grad is not None} == parameters
    assert all(p.grad is None for p in model.parameters())


@variants
def test_a_merged_model_equals_the_adapted_one(name: str) -> None:
    for dtype in (torch.float32, torch.float64):
        model, gm = graph_of_layers(name, dtype)
        ids = torch.randint(7, (2, 12))
        before = {n: t.clone() for n, t in model.state_dict().items()}
        merged = lorafx.merge(gm)
        assert_close("model", merged(ids), gm(ids))
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
        own = copy.deepcopy(model)
        own.load_state_dict(lorafx.merged_state_dict(gm))
        assert_close("model", own(ids), gm(ids))


@variants
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_merge_rounds_once(name: str, dtype: torch.dtype) -> None:
    """At every kind of layer the stored weight is the exact one rounded."""
    model, gm = graph_of_layers(name, dtype)
    merged = lorafx.merge(gm)
    for site in lorafx.sites(gm):
        weight = site.matrix(model.get_parameter(site.weight).detach()).double()
        tensors = {n: t.detach().double() for n, t in site.tensors(gm).items()}
        exact = VARIANTS[name].update(weight, tensors, site.scaling).fold(weight)
        stored = site.matrix(merged.get_parameter(site.weight))
        assert stored.dtype == dtype
        assert_rounded_once(stored, exact, weight, site.r)


@variants
def test_export_keeps_one_node_a_site(name: str) -> None:
    _, gm = graph_of_layers(name, dropout=0.1)
    ids = torch.randint(7, (3, 12))
    lorafx.lower(gm, "reference")
    program = torch.export.export(gm, (), {"ids": ids}, strict=False)
    called = [n.target for n in program.graph.nodes if n.op == "call_function"]
    for site in lorafx.sites(gm):
        assert called.count(ADAPTED[site.kind]) == sum(s.kind == site.kind for s in lorafx.sites(gm))
    assert torch.equal(program.module()(ids=ids), gm(ids))


@variants
def test_compiles_without_a_graph_break(name: str) -> None:
    _, gm = graph_of_layers(name)
    ids = torch.randint(7, (3, 12))
    compiled = torch.compile(gm, backend="aot_eager", fullgraph=True)
    assert_close("model", compiled(ids), gm(ids))
    compiled(ids).sum().backward()
    assert all(p.grad is not None for p in gm.parameters() if p.requires_grad)
