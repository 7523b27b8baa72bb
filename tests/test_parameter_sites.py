"""Sites on parameters: which are meant, rows of embeddings, parts of an attention's projection, numbered layers."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import lorafx
from conftest import Zoo, loss_of, randomize
from lorafx import AdapterError, LoraSpec, MatchError
from lorafx.graph import CapturedModule
from lorafx.passes.insert import Insert
from lorafx.passes.match import match
from lorafx.passes.plan import make_plan
from tolerances import assert_close
from zoo import FAMILIES


class Model(nn.Module):
    """Two numbered blocks, each with a layer, a stack of weights, a bare matrix and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(6, 2)
        self.unread = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x)
        return out


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(6, 6)
        self.stack = nn.Parameter(torch.randn(3, 6, 6))
        self.matrix = nn.Parameter(torch.randn(6, 6))
        self.scale = nn.Parameter(torch.randn(6))
        self.deep = nn.Parameter(torch.randn(1, 2, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.einsum("bi,eoi->bo", self.dense(x), self.stack) * self.scale
        return (h @ self.matrix @ self.deep.sum((0, 1))).tanh()


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def sites(model: nn.Module, **fields: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    gm = lorafx.apply(model, LoraSpec(**{"r": 2, **fields}), (X,))
    return {s.name: (s.kind, s.shape) for s in lorafx.sites(gm)}


def only(*names: str, **fields: Any) -> dict[str, Any]:
    return {"target_modules": (), "target_parameters": names, **fields}


def test_parameters_go_by_name_or_suffix() -> None:
    both = {f"blocks.{i}.stack": ("parameter", (3, 6, 6)) for i in (0, 1)}
    assert sites(Model(), **only("stack")) == both
    assert sites(Model(), **only("0.matrix")) == {"blocks.0.matrix": ("parameter", (6, 6))}
    assert sites(Model(), **only("stack", exclude_modules=["blocks.1.stack"])) == dict([*both.items()][:1])
    assert sites(Model(), **only("dense.weight", "1.stack")) == {
        "blocks.0.dense.weight": ("parameter", (6, 6)),
        "blocks.1.dense.weight": ("parameter", (6, 6)),
        "blocks.1.stack": ("parameter", (3, 6, 6)),
    }
    everything = sites(Model(), target_parameters=["stack"])  # beside all linear layers
    assert everything == {**both, "blocks.0.dense": ("linear", (6, 6)), "blocks.1.dense": ("linear", (6, 6))}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (only("stak"), r"target_parameters names 'stak', and the model has no such parameter \(did you mean '.*stack'"),
        (only("scale"), r"parameter 'blocks.0.scale' is torch.float32 of shape \[6\]: only a floating-point matrix"),
        (only("deep"), r"parameter 'blocks.0.deep' is torch.float32 of shape \[1, 2, 6, 6\]"),
        (only("unread"), r"parameter 'unread' is never read with these inputs"),
        (only("stack", exclude_modules=["stack"]), r"leaves nothing to adapt .*2 excluded by exclude_modules"),
        (only("stack", dropout=0.1), r"site 'blocks.0.stack': .*dropout=0.1 .*cannot be expressed: give it a spec of"),
        (only("stack", variant="lora_bias"), r"site 'blocks.0.stack': variant 'lora_bias' adds to"),
        (
            {"target_modules": ["0.dense"], "target_parameters": ["0.dense.weight"]},
            r"'blocks.0.dense.weight' would be adapted twice .* at 'blocks.0.dense' and 'blocks.0.dense.weight'",
        ),
        ({"trainable_token_indices": [1]}, r"which embedding is the input's is not clear: .*Embeddings: none"),
        (
            {"trainable_token_indices": {"dense": [1]}},
            r"'dense', which is the module 'blocks.0.dense' but no embedding",
        ),
        (
            {"layers_to_transform": [1]},
            r"layers_to_transform names 1, .*There are: none; a list at the top of the model",
        ),
        ({"layers_to_transform": [1, 5], "layers_pattern": "blocks"}, r"names 5, .* in 'blocks'. There are: 0, 1"),
        ({"layers_to_transform": 0, "layers_pattern": "h"}, r"has that number in 'h'. There are: none"),
    ],
    ids=str,
)
def test_what_cannot_be_is_an_error(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(MatchError, match=message):
        lorafx.apply(Model(), LoraSpec(**fields), (X,))


@pytest.mark.parametrize(
    ("fields", "layers"),
    [
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, {1: ["q_proj"]}),
        (
            {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
            {0: ["q_proj", "up_proj"]},
        ),
        (
            {"target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"], "layers_to_transform": [1]},
            {0: ["q_proj"], 1: ["v_proj"]},
        ),
    ],
    ids=str,
)
def test_numbered_layers_are_pefts(zoo: Zoo, fields: dict[str, Any], layers: dict[int, list[str]]) -> None:
    family = FAMILIES["llama"]
    found = {s.name for s in lorafx.sites(zoo.adapted(family, LoraSpec(**fields)))}
    twin = peft.get_peft_model(zoo.eager(family), peft.LoraConfig(**fields))
    assert found == {*twin.base_model.targeted_module_names}
    assert {(int(n.split(".")[2]), n.rpartition(".")[2]) for n in found} == {
        (i, n) for i, names in layers.items() for n in names
    }


def test_all_linear_takes_numbered_layers_too(zoo: Zoo) -> None:
    """Which PEFT refuses."""
    gm = zoo.capture(FAMILIES["llama"]).gm
    choices = match(gm, (LoraSpec(layers_to_transform=[1]),))
    assert {c.candidate.name.split(".")[2] for c in choices if c.site is not None} == {"1"}
    reasons = {c.reason for c in choices if c.candidate.name.startswith("model.layers.0.")}
    assert reasons == {"not among layers_to_transform"}


def test_a_module_that_is_called_whole_says_so() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2))
    with pytest.raises(MatchError, match="names '0': '0' is called as a whole; give example_inputs to see into it"):
        lorafx.apply(model, LoraSpec(target_modules=["0", "1"]))


def test_a_weight_that_the_graph_writes_to_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(9, 4, max_norm=0.5), nn.Linear(4, 2))
    for tied in ("refuse", "untie", "tie"):
        with pytest.raises(
            MatchError, match=r"site '0': the graph itself writes to '0.weight', by aten.embedding_renorm_"
        ):
            lorafx.apply(model, LoraSpec(target_modules=["0"], tied=tied), (torch.arange(4).reshape(2, 2),))


# Rows of embeddings.


def tied_llama() -> tuple[nn.Module, dict[str, Tensor]]:
    sizes: dict[str, Any] = {"vocab_size": 21, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1}
    config = hf.LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True, initializer_range=0.2)
    config.use_cache = False
    return hf.LlamaForCausalLM(config).eval(), {"input_ids": torch.arange(14).reshape(2, 7)}


class Embedded(nn.Module):
    """In float64 too all of it computes in that."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(9, 4, padding_idx=0)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.embed_tokens(ids).tanh())
        return out


def embedded(dtype: torch.dtype) -> tuple[nn.Module, dict[str, Tensor]]:
    return Embedded().to(dtype), {"ids": torch.tensor([[1, 2, 0, 8], [7, 0, 3, 2]])}


MODELS = {
    "tied": (tied_llama, "model.embed_tokens", "q_proj"),
    "float32": (lambda: embedded(torch.float32), "embed_tokens", "head"),
    "float64": (lambda: embedded(torch.float64), "embed_tokens", "head"),
}


@pytest.mark.parametrize("as_list", [True, False], ids=["list", "mapping"])
@pytest.mark.parametrize("name", MODELS)
def test_trained_rows_are_pefts(name: str, as_list: bool) -> None:
    """Outputs, gradients and the merged weight, which a tied output layer shares; beside LoRA on another layer."""
    build, embedding, other = MODELS[name]
    model, inputs = build()
    rows = [7, 0, 2, 12] if name == "tied" else [7, 0, 2]
    indices: Any = rows if as_list else {"embed_tokens": rows}
    gm = lorafx.apply(model, LoraSpec(r=2, target_modules=[other], trainable_token_indices=indices), inputs)
    with torch.no_grad():
        assert torch.equal(leaf(gm(**inputs)), leaf(model(**inputs)))
    randomize(gm)
    config = peft.LoraConfig(r=2, lora_alpha=16, target_modules=[other], trainable_token_indices=indices)
    twin = peft.get_peft_model(copy.deepcopy(model), config)
    theirs = {n: p for n, p in twin.named_parameters() if p.requires_grad}
    parameters = {p: v for s in lorafx.sites(gm) for p, v in s.parameters(gm).items()}
    prefixes = {
        "trainable_tokens_delta": "token_adapter.trainable_tokens_delta",
        "lora_A": "lora_A",
        "lora_B": "lora_B",
    }
    pairs = [(v, next(t for n, t in theirs.items() if prefixes[p] in n)) for p, v in parameters.items()]
    assert len(pairs) == len(theirs) == 3
    with torch.no_grad():
        for mine, expected in pairs:
            expected.copy_(mine)
    for training in (True, False):
        for each in (gm, twin):
            each.train(training).zero_grad()
        outputs = [leaf(each(**inputs)) for each in (gm, twin)]
        assert_close("peft", *outputs)
        for output in outputs:
            output.square().mean().backward()
        for mine, expected in pairs:
            assert mine.grad is not None
            assert expected.grad is not None
            assert bool(mine.grad.any())
            assert_close("peft", mine.grad, expected.grad)
    merged, expected_state = lorafx.merged_state_dict(gm), twin.merge_and_unload().state_dict()
    assert merged.keys() == expected_state.keys()
    for key, value in expected_state.items():
        assert_close("peft", merged[key], value)
    assert_close("layer", merged[f"{embedding}.weight"][rows], parameters["trainable_tokens_delta"])


def leaf(outputs: Any) -> Tensor:
    found: Tensor = outputs if isinstance(outputs, Tensor) else outputs.logits
    return found


def test_rows_by_themselves() -> None:
    """Nothing but these rows trains; adapters with rows are switched, summed, merged and exported as others are."""
    model, inputs = embedded(torch.float32)
    gm = lorafx.apply(model, LoraSpec(target_modules=(), trainable_token_indices=[1, 8]), inputs)
    assert [n for n, p in gm.named_parameters() if p.requires_grad] == ["embed_tokens.trainable_tokens_delta.default"]
    (site,) = lorafx.sites(gm)
    assert (site.kind, site.shape, site.rows, site.dropout) == ("parameter", (2, 4), (1, 8), 0.0)
    (row,) = lorafx.plan(model, LoraSpec(target_modules=(), trainable_token_indices=[1, 8]), inputs).adapted
    assert (row.site, row.shape, row.parameters) == ("embed_tokens", (2, 4), 8)
    randomize(gm)
    lorafx.add_adapter(gm, LoraSpec(target_modules=(), trainable_token_indices={"embed_tokens": [3, 2]}), "other")
    lorafx.set_adapter(gm, "other")
    randomize(gm)
    lorafx.set_adapter(gm, ["default", "other"])
    weight = model.embed_tokens.weight.detach().clone()
    with lorafx.disable_adapters(gm):
        assert torch.equal(gm(**inputs), model(**inputs))
    for adapter, rows in (("default", [1, 8]), ("other", [3, 2])):
        weight[rows] = gm.get_parameter(f"embed_tokens.trainable_tokens_delta.{adapter}").detach()
    merged = lorafx.merge(gm)
    assert_close("layer", merged.embed_tokens.weight, weight)
    assert_close("model", merged(**inputs), gm(**inputs))
    lorafx.rename_adapter(gm, "other", "again")
    assert_close("model", merged(**inputs), gm(**inputs))
    lorafx.delete_adapter(gm, "again")
    lorafx.delete_adapter(gm, "default")
    assert {*gm.state_dict()} == {*model.state_dict()}
    assert {n for n, _ in gm.named_buffers()} == {n for n, _ in model.named_buffers()}


def test_rows_are_exported(tmp_path: Path) -> None:
    model, inputs = embedded(torch.float32)
    gm = lorafx.apply(model, LoraSpec(target_modules=(), trainable_token_indices=[1, 8]), inputs)
    randomize(gm)
    lorafx.merge_and_export(gm.eval(), tmp_path / "model.onnx", verify=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trainable_token_indices": [3, 90]}, r"names row 90 of 'transformer.wte', which has 90 rows \(0 to 89\)"),
        ({"trainable_token_indices": {"wt": [3]}}, r"names 'wt', .*no such embedding \(did you mean 'wte'\?\)"),
        (
            {"trainable_token_indices": [3], "modules_to_save": ["wte", "lm_head"]},
            r"'transformer.wte' is in modules_to_save, which trains all of it, and has rows to train",
        ),
        (
            {"trainable_token_indices": [3], "target_modules": ["wte"], "tied": "tie"},
            r"'transformer.wte.weight' would be adapted twice .*, at 'transformer.wte'",
        ),
        (
            {"trainable_token_indices": [3], "target_modules": ["lm_head"], "tied": "untie"},
            r"'transformer.wte.weight' would be adapted twice .*, at 'transformer.wte' and 'lm_head'",
        ),
    ],
    ids=str,
)
def test_rows_that_cannot_be(zoo: Zoo, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(MatchError, match=message):
        match(zoo.capture(FAMILIES["gpt2"]).gm, (LoraSpec(**fields),))


# The parts of an attention's input projection.


class Attention(nn.Module):
    def __init__(self, cross: bool = False, **sizes: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True, **sizes)
        self.cross = cross

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.attention(x, y, y)[0] if self.cross else self.attention(x, x, x)[0]
        return out.tanh()


ATTENTIONS = {
    "self": (Attention, 6),
    "cross": (lambda: Attention(cross=True), 6),
    "sizes": (lambda: Attention(cross=True, kdim=4, vdim=4), 4),  # three weights
}


@cache
def attention(kind: str) -> tuple[nn.Module, CapturedModule, tuple[Tensor, Tensor]]:
    """A model in float64, its capture and its inputs. Shared: don't change them."""
    build, width = ATTENTIONS[kind]
    model = build().double()
    inputs = torch.randn(2, 3, 6, dtype=torch.float64), torch.randn(2, 5, width, dtype=torch.float64)
    return model, lorafx.api.captured(model, inputs, None), inputs


@pytest.mark.parametrize("variant", ["lora", "dora", "vera", "adalora"])
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_q_and_v_of_an_attention(kind: str, variant: str) -> None:
    """As with the weights themselves updated by their parts; the rows of k stay the base's to the bit."""
    model, captured, (x, y) = attention(kind)
    specs = (LoraSpec(r=2, alpha=3, variant=variant, target_modules=["attention.q", "attention.v"]),)
    gm = Insert(match(captured, specs), specs)(copy.deepcopy(captured)).gm
    assert_close("layer", gm(x, y), model(x, y))
    q, v = lorafx.sites(gm)
    assert (q.name, q.shape, v.name, v.shape) == ("attention.q", (6, 6), "attention.v", (6, y.shape[-1]))
    randomize(gm)
    outputs, merged = gm(x, y), lorafx.merge(gm)
    assert_close("layer", merged(x, y), outputs)
    if kind != "sizes":
        assert (q.rows, v.rows) == (range(6), range(12, 18))
        old, new = model.attention.in_proj_weight, merged.attention.in_proj_weight
        assert torch.equal(new[6:12], old[6:12])
        assert not torch.equal(new[:6], old[:6])
        assert not torch.equal(new[12:], old[12:])
        if variant == "lora":
            delta = v.scaling * v.parameters(gm)["lora_B"] @ v.parameters(gm)["lora_A"]
            assert_close("layer", new[12:], old[12:] + delta)
    outputs.square().sum().backward()
    for site in (q, v):
        assert all(p.grad is not None and bool(p.grad.any()) for p in site.parameters(gm).values())
    assert {n for n, _ in merged.named_modules() if n != "_mode"} == {n for n, _ in model.named_modules()}


def test_parts_and_the_whole_of_a_projection() -> None:
    gm = attention("self")[1]

    def found(*targets: str, **fields: Any) -> list[tuple[str, int]]:
        choices = match(gm, (LoraSpec(**{"r": 2, "target_modules": targets, **fields}),))
        return [(c.site.name, c.site.r) for c in choices if c.site is not None]

    whole = [("attention", 2), ("attention.out_proj", 2)]
    assert found("attention") == whole  # as PEFT means it
    assert found("attention", "q") == whole
    assert found("attention", dropout=0.1) == whole
    assert found("attention", exclude_modules=["out_proj"]) == whole[:1]
    assert found("attention.in_proj_weight") == whole[:1]
    assert found("k", "out_proj") == [whole[1], ("attention.k", 2)]
    # A pattern on the module's name means all of its projections, as in PEFT.
    assert found("attention", rank_pattern={"attention": 3}) == [("attention", 3), ("attention.out_proj", 3)]
    assert found("attention", rank_pattern={"out_proj": 3}) == [("attention", 2), ("attention.out_proj", 3)]
    assert found(target_modules="all-linear") == whole[1:]
    with pytest.raises(MatchError, match=r"site 'attention.q': .*dropout=0.1 of that cannot be expressed"):
        found("q", dropout=0.1)
    plan = make_plan(gm, match(gm, (LoraSpec(r=2, target_modules=["q"]),)))
    assert [(row.site, row.shape, row.parameters) for row in plan.adapted] == [("attention.q", (6, 6), 2 * (6 + 6))]


def test_parts_of_several_adapters() -> None:
    """Each adapts its own rows of the frozen weight; a whole and a part are not active together."""
    x = torch.randn(2, 3, 6)
    model = Attention()
    gm = lorafx.apply(model, LoraSpec(r=2, target_modules=["q", "k"]), (x, x))
    randomize(gm)
    lorafx.add_adapter(gm, LoraSpec(r=3, target_modules=["k"], variant="dora"), "other")
    lorafx.set_adapter(gm, "other")
    randomize(gm)
    weights = {}
    for name in ("default", "other"):
        lorafx.set_adapter(gm, name)
        weights[name] = lorafx.merge(gm).attention.in_proj_weight - model.attention.in_proj_weight
    lorafx.set_adapter(gm, ["other", "default"])
    merged = lorafx.merge(gm)
    expected = model.attention.in_proj_weight + weights["default"] + weights["other"]
    assert_close("layer", merged.attention.in_proj_weight.detach(), expected.detach())
    assert_close("model", merged(x, x), gm(x, x))
    lorafx.add_adapter(gm, LoraSpec(r=2, target_modules=["attention"]), "whole")
    with pytest.raises(AdapterError, match=r"'whole' cannot be active together: they adapt 'attention.in_proj_weight'"):
        lorafx.set_adapter(gm, ["default", "whole"])
    lorafx.set_adapter(gm, "whole")


def test_stacks_of_experts_in_a_plan(zoo: Zoo) -> None:
    gm = zoo.capture(FAMILIES["mixtral"]).gm
    spec = LoraSpec(r=2, target_modules=(), target_parameters=["experts.gate_up_proj"])
    plan = make_plan(gm, match(gm, (spec,)))
    assert [(row.site, row.kind, row.shape, row.parameters) for row in plan.adapted] == [
        (f"model.layers.{i}.mlp.experts.gate_up_proj", "parameter", (4, 104, 40), 4 * 2 * (104 + 40)) for i in (0, 1)
    ]
    assert plan.activation_bytes == 2 * 4 * 104 * 40 * 4  # a copy of each stack


def test_experts_train(zoo: Zoo) -> None:
    """With each variant, from unchanged outputs."""
    family = FAMILIES["mixtral"]
    for variant in ("lora", "dora"):
        spec = LoraSpec(r=2, variant=variant, target_modules=(), target_parameters=["gate_up_proj", "down_proj"])
        gm = zoo.adapted(family, spec).eval()
        with torch.no_grad():
            assert torch.equal(gm(**family.inputs()).logits, zoo.capture(family).gm.eval()(**family.inputs()).logits)
        loss_of(gm, family).backward()
        for site in lorafx.sites(gm):
            assert site.parameters(gm)["lora_B"].grad is not None
