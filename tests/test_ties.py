"""Weights with several uses: refused, kept apart by the fold (untie), or adapted in all uses alike (tie)."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

import lorafx
from conftest import Zoo, randomize
from lorafx import AdapterError, LoraSpec, MatchError
from lorafx.passes.match import match
from tolerances import assert_close
from zoo import FAMILIES

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Tied(nn.Module):
    """Two modules with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.two(self.one(x).tanh()).tanh())
        return out


class ReadElsewhere(nn.Module):
    """A weight that the model also reads without its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        penalty = torch.cat([self.one.weight, self.one.weight.t()]).square().mean()
        out: Tensor = self.head(self.one(x).tanh()) + penalty
        return out


class PartRead(ReadElsewhere):
    """Half of a fused weight, sliced, as models that split q from kv do."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.one(x).tanh() + F.linear(x, self.one.weight[:3]).repeat(1, 2))
        return out


class Viewed(ReadElsewhere):
    """Another parameter over the same storage."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(self.one.weight.detach()[1:3])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.one(x).tanh()) + self.rows.sum()
        return out


class EmbeddingTied(nn.Module):
    """An output projection by the embedding's own weight, called functionally."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.one = nn.Embedding(9, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x[:, 0].abs().long().clamp(max=8))
        return F.linear(h + self.one(h).tanh(), self.embed.weight)


class CastRead(ReadElsewhere):
    """A float64 weight, cast for the call and read uncast elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.one.weight = nn.Parameter(self.one.weight.detach().double())

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.one.weight.to(x.dtype), self.one.bias)
        out: Tensor = self.head(h.tanh()) + self.one.weight.sum().to(x.dtype)
        return out


class TiedConvs(nn.Module):
    """Two convolutions with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv1d(2, 2, 3, padding=1), nn.Conv1d(2, 2, 3, padding=1), nn.Linear(6, 2)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.two(self.one(x.reshape(-1, 2, 3)).tanh())
        out: Tensor = self.head(h.flatten(1).tanh())
        return out


class TiedHead(nn.Module):
    """A language model's embedding and output layer, with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.one, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.one(self.embed(x.abs().long().clamp(max=8))).tanh())
        return out


#: The model, the site's name, its weight's, the name that the other use has it by, and a description of that use.
ELSEWHERE: list[tuple[type[nn.Module], str, str, str, str]] = [
    (Tied, "one", "one.weight", "two.weight", r"aten.linear.default in 'two' \(as 'two.weight'\)"),
    (
        ReadElsewhere,
        "one",
        "one.weight",
        "one.weight",
        r"aten.\w+.default in 'the model's own forward' \(as 'one.weight'\)",
    ),
    (PartRead, "one", "one.weight", "one.weight", r"aten.slice.Tensor in 'the model's own forward'"),
    (Viewed, "one", "one.weight", "rows", r"\(as 'rows'\)"),
    (
        EmbeddingTied,
        "embed.weight",
        "embed.weight",
        "embed.weight",
        r"aten.embedding.default in 'embed' \(as 'embed.weight'\)",
    ),
    (
        CastRead,
        "one",
        "one.weight",
        "one.weight",
        r"aten.sum.* in 'the model's own forward' \(as 'one.weight'\)",
    ),
    (TiedConvs, "one", "one.weight", "two.weight", r"aten.conv1d.default in 'two' \(as 'two.weight'\)"),
    (TiedHead, "embed", "embed.weight", "head.weight", r"aten.linear.default in 'head' \(as 'head.weight'\)"),
    (TiedHead, "head", "head.weight", "embed.weight", r"aten.embedding.default in 'embed' \(as 'embed.weight'\)"),
]
elsewhere = pytest.mark.parametrize(
    ("build", "site", "weight", "other", "place"),
    ELSEWHERE,
    ids=[f"{case[0].__name__}-{case[1]}" for case in ELSEWHERE],
)


@elsewhere
def test_a_weight_used_elsewhere_is_refused_with_both_places(
    build: type[nn.Module], site: str, weight: str, other: str, place: str
) -> None:
    with pytest.raises(
        MatchError, match=rf"site '{site}' multiplies by '{weight}', which .*elsewhere: .*{place}"
    ) as caught:
        lorafx.apply(build(), LoraSpec(target_modules=[site]), (X,))
    assert f"exclude_modules=['{site}']" in str(caught.value)
    assert 'tied="untie"' in str(caught.value)
    assert 'tied="tie"' in str(caught.value)


@elsewhere
def test_untied_the_fold_leaves_the_other_use_alone(
    build: type[nn.Module], site: str, weight: str, other: str, place: str
) -> None:
    model = build()
    gm = lorafx.apply(model, LoraSpec(r=2, target_modules=[site], tied="untie"), (X,))
    assert torch.equal(gm(X), model(X))
    (found,) = lorafx.sites(gm)
    assert found.apart
    randomize(gm)
    merged = lorafx.merge(gm)
    assert_close("model", merged(X), gm(X))
    assert torch.equal(merged.get_parameter(other), model.get_parameter(other))
    assert torch.equal(lorafx.unadapted(gm)(X), model(X))
    with pytest.raises(
        lorafx.MergeError, match=rf"site '{site}': its weight '{weight}' has another use and was kept apart"
    ):
        lorafx.merged_state_dict(gm)


@pytest.mark.parametrize(
    ("build", "targets"),
    [(Tied, ["one", "two"]), (TiedConvs, ["one", "two"]), (TiedHead, ["embed", "head"])],
    ids=["linear", "conv", "embedding"],
)
def test_both_of_two_tied_layers_untied(build: type[nn.Module], targets: list[str]) -> None:
    """Each has an adapter of its own, and after the merge a weight of its own."""
    model = build()
    gm = lorafx.apply(model, LoraSpec(r=2, target_modules=targets, tied="untie"), (X,))
    assert [s.name for s in lorafx.sites(gm)] == targets
    assert torch.equal(gm(X), model(X))
    randomize(gm)
    merged = lorafx.merge(gm)
    assert_close("model", merged(X), gm(X))
    assert torch.equal(lorafx.unadapted(gm)(X), model(X))


@pytest.mark.parametrize("variant", ["lora", "dora", "adalora", "vera"])
@elsewhere
def test_tied_every_use_is_adapted_alike(
    build: type[nn.Module], site: str, weight: str, other: str, place: str, variant: str
) -> None:
    """As the model itself computes with the merged weight, which it still has once only."""
    model = build()
    spec = LoraSpec(r=2, variant=variant, target_modules=[site], tied="tie")
    if build is Viewed:
        with pytest.raises(MatchError, match=r"tied=\"tie\" cannot adapt these uses of 'one.weight', .*\(as 'rows'\)"):
            lorafx.apply(model, spec, (X,))
        return
    gm = lorafx.apply(model, spec, (X,))
    assert_close("model", gm(X), model(X))
    with torch.no_grad():
        assert torch.equal(gm(X), model(X))
    (found,) = lorafx.sites(gm)
    assert not found.apart
    randomize(gm)
    outputs = gm(X)
    assert not torch.allclose(outputs, model(X))
    merged = lorafx.merge(gm)
    assert_close("model", merged(X), outputs)
    assert merged.get_parameter(other) is merged.get_parameter(weight)
    outputs.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in found.parameters(gm).values())
    model.load_state_dict(lorafx.merged_state_dict(gm))
    assert_close("model", model(X), outputs)


def test_both_of_two_tied_layers_adapted_as_one() -> None:
    gm = lorafx.apply(TiedHead(), LoraSpec(r=2, target_modules=["embed", "head"], tied="tie"), (X,))
    assert [s.name for s in lorafx.sites(gm)] == ["embed"]
    rows = {
        row.site: row.reason
        for row in lorafx.plan(TiedHead(), LoraSpec(tied="tie", target_modules=["embed", "head"]), (X,)).rows
    }
    assert rows["head"] == "its weight is that of 'embed', and adapted there"


def test_a_tie_is_exported(tmp_path: Path) -> None:
    for tied in ("tie", "untie"):
        gm = lorafx.apply(TiedHead(), LoraSpec(r=2, target_modules=["embed"], tied=tied), (X,))  # type: ignore[arg-type]
        randomize(gm)
        lorafx.merge_and_export(gm, tmp_path / "model.onnx", verify=True)


def test_ties_are_pefts() -> None:
    """What PEFT calls ensure_weight_tying: one pair of factors for the embedding and, transposed, the output layer.

    There the two layers' parameters share their memory but not their gradients, so that those add up to ours.
    """
    sizes = {"vocab_size": 21, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1}
    config = hf.LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True, initializer_range=0.2)
    config.use_cache = False
    model = hf.LlamaForCausalLM(config).eval()
    inputs = {"input_ids": torch.arange(14).reshape(2, 7)}
    spec = LoraSpec(r=3, alpha=5, target_modules=["embed_tokens"], tied="tie")
    gm = lorafx.apply(model, spec, inputs)
    randomize(gm)
    settings = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["embed_tokens"], ensure_weight_tying=True)
    twin = peft.get_peft_model(copy.deepcopy(model), settings)
    (site,) = lorafx.sites(gm)
    wte, head = twin.base_model.model.model.embed_tokens, twin.base_model.model.lm_head
    theirs_a, theirs_b = wte.lora_embedding_A["default"], wte.lora_embedding_B["default"]
    head_a, head_b = head.lora_A["default"].weight, head.lora_B["default"].weight
    with torch.no_grad():
        theirs_a.copy_(site.parameters(gm)["lora_A"])
        theirs_b.copy_(site.parameters(gm)["lora_B"])
    for training in (True, False):
        for model in (gm, twin):
            model.train(training).zero_grad()
            model(**inputs).logits.square().mean().backward()
        for name, embedding, transposed in (("lora_A", theirs_a, head_b), ("lora_B", theirs_b, head_a)):
            actual = site.parameters(gm)[name].grad
            assert actual is not None
            assert embedding.grad is not None
            assert transposed.grad is not None
            assert_close("peft", actual, embedding.grad + transposed.grad.T)
    with torch.no_grad():
        assert_close("peft", gm(**inputs).logits, twin(**inputs).logits)
    # The one weight gets the update once, where PEFT's merge adds it for each of the two layers.
    delta = site.scaling * (theirs_b @ theirs_a).T.detach()
    assert_close("fold", lorafx.merge(gm).lm_head.weight, model.lm_head.weight + delta)


def test_adapters_of_a_layer_and_of_its_weight_are_not_active_together() -> None:
    gm = lorafx.apply(TiedHead(), LoraSpec(r=2, target_modules=["embed"], tied="tie"), (X,))
    lorafx.add_adapter(gm, LoraSpec(r=2, target_modules=["head"], tied="untie"), "other")
    lorafx.set_adapter(gm, "other")
    with pytest.raises(
        AdapterError, match=r"'default' and 'other' cannot be active together: they adapt 'head.weight'"
    ):
        lorafx.set_adapter(gm, ["default", "other"])


def test_a_tied_weight_that_the_graph_reads_once_is_folded_under_each_name() -> None:
    """Nothing else uses it, so it may be adapted; the state dict then has W' under both names."""

    class OneCalled(Tied):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.one(x).tanh())
            return out

    model = OneCalled()
    gm = lorafx.apply(model, LoraSpec(r=2), (X,))
    randomize(gm)
    values, adapted_outputs = lorafx.merged_state_dict(gm), gm(X)
    assert torch.equal(values["one.weight"], values["two.weight"])
    model.load_state_dict(values)
    assert_close("model", model(X), adapted_outputs)


def test_a_tied_lm_head_is_refused_or_untied(zoo: Zoo) -> None:
    family = FAMILIES["gpt2"]
    with pytest.raises(
        MatchError,
        match=r"site 'lm_head' multiplies by 'lm_head.weight', .*aten.embedding.default in 'transformer.wte'",
    ):
        match(zoo.capture(family).gm, (LoraSpec(target_modules=["lm_head"]),))
    gm = zoo.adapted(family, LoraSpec(r=2, target_modules=["lm_head"], tied="untie")).eval()
    randomize(gm)
    merged = lorafx.merge(gm)
    inputs = family.inputs()
    assert_close("model", merged(**inputs).logits, gm(**inputs).logits)
    assert torch.equal(merged.transformer.wte.weight, gm.transformer.wte.weight)
