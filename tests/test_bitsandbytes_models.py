"""Models that hold bitsandbytes' layers: what is captured is the model with the weights that they store.

The oracles are a model with dense layers on the weights that the layers' own state dicts hold, and bitsandbytes in
train mode, in which it computes with those weights (where it is wrong: test_bases_bitsandbytes.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import lorafx
from conftest import loss_of, randomize
from lorafx import CaptureError, LoraSpec, QuantizationError
from lorafx.api import captured
from lorafx.bases import FORMATS
from lorafx.bases.int8 import Int8
from lorafx.bases.nf4 import Nf4
from lorafx.bases.tensor import QuantizedTensor
from lorafx.graph import CapturedModule
from lorafx.ir import format_graph
from lorafx.passes.bitsandbytes import with_packed_layers
from tolerances import assert_close
from zoo import FAMILIES

bnb: Any = pytest.importorskip("bitsandbytes", reason="it has wheels for some platforms only")

SPEC = LoraSpec(r=3, target_modules=["first", "last"])


class Mlp(nn.Module):
    def __init__(self, width: int = 64, hidden: int = 128) -> None:
        super().__init__()
        self.first = nn.Linear(width, hidden)
        self.last = nn.Linear(hidden, 32)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.first(x)))
        return out


class Cast(nn.Linear):
    """What a ``Linear4bit`` does with dtypes, around a dense weight."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype == self.weight.dtype:
            return super().forward(input)
        return super().forward(input.to(self.weight.dtype)).to(input.dtype)


Make = Callable[[nn.Linear], Any]


def four_bits(quant_type: str = "nf4", **settings: Any) -> Make:
    def make(layer: nn.Linear) -> Any:
        made = bnb.nn.Linear4bit(
            layer.in_features, layer.out_features, layer.bias is not None, quant_type=quant_type, **settings
        )
        made.load_state_dict(layer.state_dict())
        return made.to(dtype=layer.weight.dtype).to("cpu")

    return make


def eight_bits(layer: nn.Linear) -> Any:
    made = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False)
    made.load_state_dict(layer.state_dict())
    return made.to(dtype=layer.weight.dtype).to("cpu")


def with_layers(model: nn.Module, make: Make = four_bits()) -> nn.Module:  # noqa: B008  # it is a function
    """The model with bitsandbytes' layers in place of its linear ones."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            model.set_submodule(name, make(layer).train(layer.training))
    return model


def dense(model: nn.Module, int8_dtype: torch.dtype = torch.float32, kind: type[nn.Linear] = Cast) -> nn.Module:
    """A copy with dense layers in place of bitsandbytes' ones."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        four = isinstance(layer, bnb.nn.Linear4bit)
        if four or isinstance(layer, bnb.nn.Linear8bitLt):
            form = FORMATS["nf4" if four else "int8"]
            weight = form.from_state_dict(layer.state_dict())
            dtype = layer.compute_dtype if four else int8_dtype
            made = kind(layer.in_features, layer.out_features, layer.bias is not None).train(layer.training)
            made.weight = nn.Parameter(form.dequantize(weight, dtype))
            if layer.bias is not None:
                made.bias = nn.Parameter(layer.bias.detach().to(made.weight.dtype))
            model.set_submodule(name, made)
    return model


def quantized(gm: nn.Module) -> dict[str, QuantizedTensor]:
    return {name: p for name, p in gm.named_parameters() if isinstance(p, QuantizedTensor)}


def assert_same_graph(gm: CapturedModule, expected: CapturedModule) -> None:
    assert format_graph(gm) == format_graph(expected)
    assert gm.code == expected.code


def assert_same_bytes(gm: CapturedModule, model: nn.Module) -> None:
    """The packed weights of the graph are the memory of those in the model."""
    assert quantized(gm)
    for name, weight in quantized(gm).items():
        assert weight.packed.tensors["codes"].data_ptr() == model.get_parameter(name).data_ptr()


MADE: Mapping[str, Make] = {
    "nf4": four_bits(),
    "plain scales": four_bits(compress_statistics=False),
    "stored as float32": four_bits(quant_storage=torch.float32),
    "stored as bfloat16": four_bits(quant_storage=torch.bfloat16),
    "computes in float32": four_bits(compute_dtype=torch.float32),
    "computes in bfloat16": four_bits(compute_dtype=torch.bfloat16),
    "int8": eight_bits,
}


@pytest.mark.parametrize("case", MADE)
def test_a_model_of_its_layers_is_the_dense_one_over_their_bytes(case: str) -> None:
    model = with_layers(Mlp(), MADE[case])
    x = torch.randn(5, 64)
    gm, oracle = (lorafx.apply(m, SPEC, x, seed=0) for m in (model, dense(model)))
    assert_same_graph(gm, oracle)
    assert_same_bytes(gm, model)
    assert not any(weight.requires_grad for weight in quantized(gm).values())
    assert_close("layer", gm(x), oracle(x))
    assert_close("layer", gm(x), model.train()(x))
    randomize(gm)
    oracle.load_state_dict(lorafx.adapter_state_dict(gm), strict=False)
    for one in (gm, oracle):
        one(x).square().sum().backward()
    for name in lorafx.adapter_state_dict(gm):
        found, expected = (one.get_parameter(name).grad for one in (gm, oracle))
        assert found is not None
        assert expected is not None
        assert_close("layer", found, expected)


def test_the_user_s_model_stays_as_it_was() -> None:
    model = with_layers(Mlp()).eval()
    modules, tensors = dict(model.named_modules()), dict(model.named_parameters())
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    randomize(lorafx.apply(model, SPEC, torch.ones(2, 64)))
    assert dict(model.named_modules()) == modules
    assert not any(module.training for module in model.modules())
    assert {n: id(t) for n, t in model.named_parameters()} == {n: id(t) for n, t in tensors.items()}
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())
    plain = Mlp()
    assert with_packed_layers(plain) is plain


def test_what_it_does_to_its_own_state_later_is_not_seen() -> None:
    """In eval mode it repacks a layer for its CPU kernel, on processors that have one."""
    model = with_layers(Mlp()).eval()
    x = torch.randn(5, 64)
    gm = lorafx.apply(model, SPEC, x, seed=0)
    before = gm(x)
    with torch.no_grad():
        model(x)
    assert torch.equal(gm(x), before)


@pytest.mark.parametrize("case", ["nf4", "computes in float32", "int8"])
def test_without_inputs_it_is_traced_as_the_dense_one(case: str) -> None:
    model = with_layers(Mlp(), MADE[case])
    gm, oracle = (lorafx.apply(m, SPEC, seed=0) for m in (model, dense(model, kind=nn.Linear)))
    assert_same_graph(gm, oracle)
    x = torch.randn(5, 64)
    assert_close("layer", gm(x), oracle(x))


@pytest.mark.parametrize("make", [four_bits(), four_bits(compress_statistics=False), eight_bits])
def test_shapes_that_do_not_divide_by_the_block(make: Make) -> None:
    model = with_layers(Mlp(50, 33), make)
    x = torch.randn(5, 50)
    gm, oracle = (lorafx.apply(m, SPEC, x, seed=0) for m in (model, dense(model)))
    assert_same_bytes(gm, model)
    assert_close("layer", gm(x), oracle(x))


def test_conv1d_and_tied_weights_beside_its_layers() -> None:
    gpt2 = FAMILIES["gpt2"]
    model = with_layers(gpt2.build())
    for block in model.transformer.h:  # type: ignore[union-attr]  # as transformers makes them
        layer = nn.Linear(*block.attn.c_attn.weight.shape)
        layer.weight, layer.bias = nn.Parameter(block.attn.c_attn.weight.detach().T), block.attn.c_attn.bias
        block.attn.c_attn = four_bits()(layer)
    gm, oracle = (captured(m, gpt2.inputs(), None) for m in (model, dense(model)))
    assert_same_graph(gm, oracle)
    assert_same_bytes(gm, model)
    assert_close("model", loss_of(gm, gpt2), loss_of(oracle, gpt2))


LLAMA = hf.LlamaConfig(
    vocab_size=80, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0,
)  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        # It computes in float32 unless told, whatever dtype the model has.
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_8bit": True},
    ],
    ids=["nf4", "int8"],
)
def test_what_from_pretrained_makes(settings: dict[str, Any], tmp_path: Path) -> None:
    hf.LlamaForCausalLM(LLAMA).save_pretrained(tmp_path)
    config: Any = hf.BitsAndBytesConfig
    config = config(**settings)
    model = hf.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.bfloat16)
    gm, oracle = (captured(m, None, None) for m in (model, dense(model, torch.bfloat16)))
    assert_same_graph(gm, oracle)
    assert_same_bytes(gm, model)
    ids = torch.arange(3, 17).view(2, 7)
    found = gm(ids, torch.ones_like(ids)).logits
    assert_close("model", found, oracle(ids, torch.ones_like(ids)).logits)
    assert_close("model", found, model.train()(ids, torch.ones_like(ids)).logits)
    model.save_pretrained(tmp_path / "quantized")
    for name, weight in quantized(lorafx.load_pretrained(tmp_path / "quantized")).items():
        held = quantized(gm)[name].packed.tensors
        assert all(torch.equal(tensor, held[key]) for key, tensor in weight.packed.tensors.items())


@pytest.mark.parametrize("case", ["nf4", "int8", "gpt2"])
def test_a_requantized_merge_is_a_checkpoint_for_transformers(case: str, tmp_path: Path) -> None:
    """What it loads from there computes what the merged graph does, and holds its bytes."""
    base, ids = "int8" if case == "int8" else "nf4", torch.arange(3, 17).view(2, 7)
    config: Any = copy.deepcopy(LLAMA)
    config.tie_word_embeddings = case == "nf4"
    if case == "gpt2":
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        config = hf.GPT2Config(vocab_size=80, n_embd=64, n_layer=1, n_head=4, n_positions=32, **dropout)
    model: Any = hf.AutoModelForCausalLM.from_config(config)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    gm = lorafx.apply(model, LoraSpec(r=2, base=base), inputs).eval()
    randomize(gm)
    merged = lorafx.merge(gm, requantize=True)
    bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    model.config.quantization_config = {
        "quant_method": "bitsandbytes",
        **(bits if base == "nf4" else {"load_in_8bit": True}),
    }
    model.save_pretrained(tmp_path, state_dict=lorafx.packed_state_dict(merged.state_dict()))
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_close("model", loaded.train()(**inputs, use_cache=False).logits, merged(**inputs).logits)
    for name, weight in quantized(lorafx.load_pretrained(tmp_path)).items():
        assert torch.equal(weight, merged.get_parameter(name))
    assert_close(
        "model", captured(lorafx.load_pretrained(tmp_path), inputs, None)(**inputs).logits, merged(**inputs).logits
    )


def test_a_stack_of_experts_has_no_layer_to_be_saved_as() -> None:
    stack = QuantizedTensor(FORMATS["nf4"].quantize(torch.randn(3, 8, 8)))
    with pytest.raises(
        QuantizationError, match=r"'experts.stack' \[3, 8, 8\] is stored as nf4 and is no linear layer's"
    ):
        lorafx.packed_state_dict({"experts.stack": stack})


def test_nothing_is_dequantised_to_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a weight was read")

    for what, name in ((QuantizedTensor, "dequantize"), (Nf4, "rows"), (Int8, "rows")):
        monkeypatch.setattr(what, name, refuse)
    for make in (four_bits(), eight_bits):
        lorafx.apply(with_layers(Mlp(), make), SPEC, torch.ones(2, 64))


def test_the_weight_s_dtype_is_the_one_it_computes_in() -> None:
    """Values are rounded once, from float32, as bitsandbytes' kernels do."""
    model = with_layers(Mlp().to(torch.bfloat16), four_bits(compute_dtype=torch.float32))
    packed = Nf4().from_state_dict(model.get_submodule("first").state_dict())
    assert packed.dtype == torch.bfloat16
    gm = captured(model, torch.ones(2, 64, dtype=torch.bfloat16), None)
    assert torch.equal(gm.get_parameter("first.weight").dequantize(), Nf4().dequantize(packed, torch.float32))
    assert gm(torch.ones(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("make", [four_bits(), four_bits(compress_statistics=False), eight_bits])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_without_a_dtype_of_its_own_computes_in_its_input_s(make: Make, given: torch.dtype) -> None:
    """Values are rounded once, to that dtype, whatever they were quantised from."""
    model = with_layers(nn.Sequential(nn.Linear(64, 48, bias=False, dtype=torch.bfloat16)), make)
    layer: Any = model[0]
    x = torch.randn(5, 64).to(given)
    gm = captured(model, x, None)
    found = gm(x)
    assert_same_bytes(gm, model)
    assert not any(node.target is torch.ops.aten.to.dtype for node in gm.graph.nodes)
    form = FORMATS["nf4" if isinstance(layer, bnb.nn.Linear4bit) else "int8"]
    values = form.dequantize(form.from_state_dict(layer.state_dict()), torch.float32).to(given)
    assert torch.equal(gm.get_parameter("0.weight").dequantize(), values)
    assert_close("layer", found, model.train()(x))
    if given is torch.float32:
        assert torch.equal(found, x @ values.T)


def test_a_layer_that_runs_in_two_dtypes_rounds_once_to_each() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 48, bias=False, dtype=torch.bfloat16)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.layer(x), self.layer(x.bfloat16())

    model = with_layers(Both())
    x = torch.randn(5, 64)
    values = Nf4().dequantize(Nf4().from_state_dict(model.get_submodule("layer").state_dict()), torch.float32)
    wide, half = captured(model, x, None)(x)
    assert torch.equal(wide, x @ values.T)
    assert torch.equal(half, x.bfloat16() @ values.bfloat16().T)


@pytest.mark.parametrize("make", [four_bits(), eight_bits])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_with_hooks_rounds_once_without_inputs_too(make: Make, given: torch.dtype) -> None:
    """It is called as a module there: it meets its input's dtype when it runs."""
    model = with_layers(nn.Sequential(nn.Linear(64, 48, bias=False, dtype=torch.bfloat16)), make)
    layer: Any = model[0]
    layer.register_forward_hook(lambda module, args, output: output * 2)
    gm = captured(model, None, None)
    assert [node.target for node in gm.graph.find_nodes(op="call_module")] == ["0"]
    form = FORMATS["nf4" if isinstance(layer, bnb.nn.Linear4bit) else "int8"]
    values = form.dequantize(form.from_state_dict(layer.state_dict()), torch.float32).to(given)
    x = torch.randn(5, 64).to(given)
    assert torch.equal(gm(x), nn.functional.linear(x, values) * 2)
    assert_same_bytes(gm, model)


def test_int8_after_it_ran_and_without_a_bias() -> None:
    """The scales start at the weight and move to the layer's state."""
    model = with_layers(Mlp(), eight_bits)
    first: Any = model.get_submodule("first")
    first.bias = None
    x = torch.randn(5, 64)
    before = captured(model, x, None)
    assert first.weight.SCB is not None
    expected = model.train()(x)
    assert first.weight.SCB is None
    after = captured(model, x, None)
    assert_same_bytes(after, model)
    assert_close("layer", before(x), expected)
    assert torch.equal(after(x), before(x))


def test_ties_hooks_subclasses_and_a_layer_alone() -> None:
    layer = four_bits()(nn.Linear(64, 64))
    layer.register_forward_hook(lambda module, args, output: output * 2)
    other = bnb.nn.LinearNF4(64, 64)
    other.weight = layer.weight
    model = nn.Sequential(layer, other, layer)
    x = torch.randn(3, 64)
    gm = captured(model, x, None)
    assert gm.get_parameter("0.weight") is gm.get_parameter("1.weight") is gm.get_parameter("2.weight")
    assert_close("layer", gm(x), model.train()(x))
    assert_close("layer", captured(layer, x, None)(x), layer(x))


def test_only_its_own_classes_are_taken_for_its_layers() -> None:
    class Linear4bit(nn.Linear):
        pass

    model = nn.Sequential(Linear4bit(8, 8))
    assert with_packed_layers(model) is model


# What cannot be read.


def unmoved(layer: nn.Linear) -> Any:
    return bnb.nn.Linear4bit(layer.in_features, layer.out_features, quant_type="nf4")


def changed(**state: Any) -> Make:
    def make(layer: nn.Linear) -> Any:
        made = four_bits(compress_statistics=False)(layer)
        for name, change in state.items():
            setattr(made.weight.quant_state, name, change(getattr(made.weight.quant_state, name, None)))
        return made

    return make


def wrong_scales(layer: nn.Linear) -> Any:
    made = eight_bits(layer)
    made.weight.SCB = -made.weight.SCB
    return made


REFUSED: Mapping[str, tuple[Make, type[Exception], str]] = {
    "not quantised": (unmoved, CaptureError, r"'first' .* not quantized yet.*model\.to\('cpu'\)"),
    "int8, not quantised": (
        lambda layer: bnb.nn.Linear8bitLt(64, 128, has_fp16_weights=False),
        CaptureError,
        "'first' .* not quantized yet",
    ),
    "dense int8": (
        lambda layer: bnb.nn.Linear8bitLt(64, 128, has_fp16_weights=True),
        CaptureError,
        "'first' keeps its weight dense",
    ),
    "fp4": (four_bits("fp4"), CaptureError, "'first' is stored as fp4.*bnb_4bit_quant_type='nf4'"),
    "repacked": (changed(packing_format_for_cpu=lambda _: True), CaptureError, "'first' was repacked.*load the model"),
    "scales too short": (changed(absmax=lambda t: t[:-1]), QuantizationError, "first .*absmax is torch.float32"),
    "negative scales": (changed(absmax=lambda t: -t), QuantizationError, "first .*negative, NaN or Inf"),
    "another table": (changed(code=lambda t: t * 2), QuantizationError, "first .*quant_map is not the table"),
    "another shape": (
        changed(shape=lambda _: torch.Size([64, 128])),
        QuantizationError,
        r"'first' is a layer of shape \(128, 64\).*of shape \(64, 128\)",
    ),
    "a block size of 48": (changed(blocksize=lambda _: 48), QuantizationError, "first .*blocksize=48"),
    "float64": (changed(dtype=lambda _: torch.float64), QuantizationError, "first .*dtype='float64'"),
    "int8, negative scales": (wrong_scales, QuantizationError, "first .*negative, NaN or Inf"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_and_why(case: str) -> None:
    make, error, message = REFUSED[case]
    model = Mlp()
    vars(model)["_modules"]["first"] = make(model.first)
    with pytest.raises(error, match=message):
        lorafx.apply(model, SPEC, torch.ones(2, 64))


def test_an_embedding_is_refused() -> None:
    model = nn.Sequential(bnb.nn.EmbeddingNF4(16, 64), nn.Linear(64, 3)).to("cpu")
    with pytest.raises(CaptureError, match=r"EmbeddingNF4 .*leave embeddings dense"):
        lorafx.apply(model, LoraSpec(), torch.ones(2, dtype=torch.long))
