"""A quantized base under every variant and provider: what the model with the dequantized weights computes."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lorafx
from conftest import Zoo, randomize
from kinds import Experts
from lorafx import LoraSpec, MatchError, PassError, QuantizationError, SpecError
from lorafx.bases import FORMATS
from lorafx.bases.base import Packed
from lorafx.bases.ops import describe, packed_linear, packed_mm, packed_rows
from lorafx.bases.tensor import QuantizedTensor
from lorafx.graph import CapturedModule
from lorafx.ir import format_graph
from lorafx.kernels.providers import provider
from lorafx.variants import SELECTABLE
from lowered import Model, X, assert_equal_results, derived, run
from tolerances import assert_close
from zoo import FAMILIES

BACKENDS = ["cpu", "torch", "reference"]


def adapted(base: str | None, backend: str, dtype: torch.dtype = torch.float32, **options: object) -> CapturedModule:
    torch.manual_seed(0)
    spec = LoraSpec(**{"r": 3, "base": base, **options})  # type: ignore[arg-type]
    gm = lorafx.apply(Model(1).to(dtype), spec, (X.to(dtype),), seed=0, backend=backend)
    return gm.eval()


def dense(gm: CapturedModule) -> CapturedModule:
    """The same graph over the values that its weights are read as, in plain torch."""
    result = copy.deepcopy(gm)
    for module in result.modules():
        for name, weight in module._parameters.items():
            if isinstance(weight, QuantizedTensor):
                module._parameters[name] = nn.Parameter(weight.dequantize(), requires_grad=False)
    lorafx.lower(result, "reference")
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("base", FORMATS)
@pytest.mark.parametrize("variant", SELECTABLE)
def test_a_quantized_base_is_the_dequantized_one(variant: str, base: str, backend: str, dtype: torch.dtype) -> None:
    gm = adapted(base, backend, dtype, variant=variant, target_modules=["v", "o", "gate", "up", "down"])
    x = X.to(dtype)
    first, frozen = gm(x), lorafx.unadapted(gm)(x)
    assert torch.equal(first, frozen), "adapters start without effect"
    randomize(gm)
    expected = dense(gm)
    if dtype is torch.float32:
        assert_equal_results(run(gm, x), run(expected, x))
    else:  # half precision's own error is the provider's; what is asked for is that the base adds none
        lorafx.lower(expected, backend)
        wanted = run(expected, x)
        for name, value in run(gm, x).items():
            assert_close("gradient", value.to(dtype), wanted[name].to(dtype))
    merged = lorafx.merge(gm)
    assert not any(isinstance(p, QuantizedTensor) for n, p in merged.named_parameters() if ".v." in n)
    assert_close("model", merged(x), gm(x))


def test_the_graph_and_the_users_model_stay_as_they_are() -> None:
    model = Model(1)
    before = {n: p.clone() for n, p in model.named_parameters()}
    plain, packed = (lorafx.apply(model, LoraSpec(base=base), (X,)) for base in (None, "nf4"))
    assert format_graph(plain) == format_graph(packed)
    assert all(torch.equal(p, before[n]) and type(p) is nn.Parameter for n, p in model.named_parameters())
    stored = {n for n, p in packed.named_parameters() if isinstance(p, QuantizedTensor)}
    assert stored == {s.weight for s in lorafx.sites(packed)}
    assert not any(packed.get_parameter(n).requires_grad for n in stored)
    assert set(plain.state_dict()) == set(packed.state_dict())


def kept(call: Callable[[Tensor], object], x: Tensor) -> list[Tensor]:
    found: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(x)
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_backward_keeps_no_dense_weight(variant: str, backend: str) -> None:
    gm = adapted("nf4", backend, variant=variant)
    names = [s.weight for s in lorafx.sites(gm)]
    shapes = {tuple(gm.get_parameter(n).shape) for n in names} | {tuple(gm.get_parameter(n).T.shape) for n in names}
    codes = {w.packed.tensors["codes"].data_ptr() for w in gm.parameters() if isinstance(w, QuantizedTensor)}
    tensors = kept(gm, X)
    packed = [t for t in tensors if isinstance(t, QuantizedTensor) or t.data_ptr() in codes]
    assert len(packed) >= len(names) - 3  # q, k, v need no gradient of x
    assert not [t.shape for t in tensors if tuple(t.shape) in shapes and not isinstance(t, QuantizedTensor)]


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_compiles_as_one_graph(backend: str) -> None:
    torch.compiler.reset()
    gm = adapted("nf4", backend, variant="dora")
    randomize(gm)
    expected = run(gm)
    compiled = torch.compile(gm, fullgraph=True, backend="aot_eager")
    assert_equal_results(run(compiled), expected)  # type: ignore[arg-type]


def test_a_weight_stored_transposed(zoo: Zoo) -> None:
    """GPT-2's Conv1D: what is packed is the matrix [out, in], and the parameter stays [in, out]."""
    family = FAMILIES["gpt2"]
    model = zoo.eager(family)
    spec = LoraSpec(r=2, base="nf4", target_modules=["c_attn", "c_fc"])
    gm = lorafx.apply(model, spec, family.inputs())
    assert set(derived(gm)) == {"cpu"}
    for site in lorafx.sites(gm):
        weight, original = gm.get_parameter(site.weight), model.get_parameter(site.weight)
        assert isinstance(weight, QuantizedTensor)
        assert (weight.shape, weight.dtype, weight.packed.shape) == (original.shape, original.dtype, site.shape)
        wanted = FORMATS["nf4"].dequantize(FORMATS["nf4"].quantize(original.mT)).mT
        assert torch.equal(weight.dequantize(), wanted)
    randomize(gm.eval())
    expected = dense(gm)
    inputs = family.inputs()
    assert_close("model", gm(**inputs)[0], expected(**inputs)[0])


def test_under_autocast() -> None:
    """Values are rounded once to what autocast computes in, and nothing dense is kept."""
    gm = adapted("nf4", "cpu")
    randomize(gm)
    expected = dense(gm)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = gm(X), expected(X)
        shapes = {tuple(gm.get_parameter(s.weight).shape) for s in lorafx.sites(gm)}
        assert not [t for t in kept(gm, X) if tuple(t.shape) in shapes and not isinstance(t, QuantizedTensor)]
    assert found.dtype == wanted.dtype
    assert_close("autocast", found.float(), wanted.float())


def test_a_dtype_of_its_own_under_autocast() -> None:
    """float16 values are cast to bfloat16 for each product, and nothing dense is kept."""
    weight = QuantizedTensor(packed("nf4", (40, 66), torch.float16))
    x = torch.randn(3, 66, dtype=torch.float16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(F.linear(x, weight), F.linear(x, weight.dequantize()))
        tensors = kept(lambda given: F.linear(given, weight), x)
    assert [type(t) for t in tensors if t.shape in (weight.shape, weight.T.shape)] == [QuantizedTensor]


@pytest.mark.parametrize("product", [lambda x, w: x @ w.T, lambda x, w: x @ w.mT, F.linear], ids=["T", "mT", "linear"])
def test_products_keep_the_packed_weight(product: Callable[[Tensor, Tensor], Tensor]) -> None:
    weight = QuantizedTensor(packed("nf4", (40, 66), torch.float32))
    x = torch.randn(3, 66, requires_grad=True)
    assert_close("layer", product(x, weight), F.linear(x, weight.dequantize()))
    assert [type(t) for t in kept(lambda given: product(given, weight), x)] == [QuantizedTensor]


def test_a_module_that_is_cast() -> None:
    """Values that were rounded to half precision stay these in float32."""
    layer = nn.Linear(66, 40).bfloat16()
    layer.weight = nn.Parameter(QuantizedTensor(packed("nf4", (40, 66), torch.bfloat16)), requires_grad=False)
    before = layer.weight.dequantize()
    layer.float()
    x = torch.randn(3, 66)
    assert torch.equal(layer.weight.dequantize(), before.float())
    assert torch.equal(layer(x), F.linear(x, before.float(), layer.bias))
    assert torch.equal(layer.bfloat16().weight.dequantize(), before)


def test_in_inference_mode() -> None:
    gm = adapted("nf4", "auto")
    randomize(gm)
    expected = gm(X)
    with torch.inference_mode():
        assert_close("model", lorafx.merge(gm)(X), expected)
        weight = gm.get_parameter("layers.0.down.weight")
        assert torch.equal(weight.detach().t().dequantize(), weight.dequantize().t())
    assert run(gm)


# The operators


def packed(base: str, shape: Sequence[int], dtype: torch.dtype, **settings: bool) -> Packed:
    generator = torch.Generator().manual_seed(0)
    return FORMATS[base].quantize(torch.randn(shape, generator=generator).to(dtype), **settings)  # type: ignore[arg-type]


#: More and less than a tile on each side, rows that end within a block, an odd number of values.
SHAPES = [(300, 2100), (2100, 300), (33, 97), (96, 160), (1, 64), (3, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", [("nf4", True), ("nf4", False), ("int8", False)], ids=str)
def test_the_compiled_operators_read_what_the_format_says(
    case: tuple[str, bool], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    assert provider("cpu").unavailable() is None
    weight = packed(case[0], shape, dtype, double_quant=case[1])
    values = FORMATS[case[0]].dequantize(weight)
    assert torch.equal(packed_rows(*describe(weight), 0, shape[0]), values)
    assert torch.equal(packed_rows(*describe(weight), 1, shape[0]), values[1:])
    generator = torch.Generator().manual_seed(1)
    x, dy, bias = (torch.randn(*s, generator=generator).to(dtype) for s in ((9, shape[1]), (9, shape[0]), shape[:1]))
    assert_close("layer", packed_linear(x, bias, *describe(weight)), linear(x, values, bias))
    assert_close("layer", packed_mm(dy, *describe(weight)), linear(dy, values.t()))


def allocations(call: Callable[[], object]) -> list[int]:
    """The bytes of each tensor that a call makes, those of the kernels' own too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    return [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_panel_is_at_most_a_mebibyte(dtype: torch.dtype) -> None:
    """Of a weight of 8 or 16: also for DoRA's norm, and for the gradient of small gains."""
    assert provider("cpu").unavailable() is None
    weight = packed("nf4", (1024, 4096), dtype)
    x, dy = torch.randn(2, 4096).to(dtype), torch.randn(2, 1024).to(dtype)
    for call in (lambda: packed_linear(x, None, *describe(weight)), lambda: packed_mm(dy, *describe(weight))):
        found = allocations(call)
        assert 2**18 < max(found) <= 2**20
    layer = nn.Linear(4096, 1024, bias=False).to(dtype)
    gm = lorafx.apply(nn.Sequential(layer), LoraSpec(r=2, base="nf4", variant="dora", target_modules=["0"]), (x,))
    with torch.no_grad():
        gm.get_parameter("0.lora_magnitude_vector.default")[::2] *= 0.01
    assert max(allocations(lambda: gm(x.requires_grad_()).sum().backward())) <= 2**20


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double()).to(x.dtype)


def test_a_sum_over_several_tiles_is_rounded_as_one() -> None:
    """Products with parts of a long side are added in float32."""
    weight = packed("nf4", (64, 16384), torch.bfloat16)
    x = torch.randn(16, 16384, generator=torch.Generator().manual_seed(1)).bfloat16()
    values = FORMATS["nf4"].dequantize(weight)
    exact = x.double() @ values.double().t()
    tiled, whole = ((y.double() - exact).norm() for y in (packed_linear(x, None, *describe(weight)), x @ values.t()))
    assert tiled < 1.5 * whole  # sqrt(2): the parts are rounded, and then their sum


# Which weights, and errors


def test_the_rest_of_a_model_can_be_stored_too() -> None:
    gm = adapted(None, "auto", target_modules=["q"])
    names = lorafx.quantize(gm, "int8", exclude_modules=["down"])
    assert set(names) == {f"layers.0.{n}.weight" for n in ("q", "k", "v", "o", "gate", "up")}  # not the output layer
    assert lorafx.quantize(gm, "int8", exclude_modules=["down"]) == ()
    assert_close("model", gm(X), dense(gm)(X))
    lorafx.merge(gm)  # the base is not taken for one that somebody has overwritten
    with pytest.raises(QuantizationError, match="is stored as int8 already, with block_size=16"):
        lorafx.quantize(gm, "nf4")


@pytest.mark.parametrize("options", [{"variant": "dora"}, {"init": "pissa"}], ids=str)
def test_an_adapter_that_started_from_the_dense_weight(options: dict[str, str]) -> None:
    gm = adapted(None, "auto", target_modules=["q"], **options)
    before = gm(X)
    with pytest.raises(QuantizationError, match=r"'default' started from the dense values of 'layers\.0\.q\.weight'"):
        lorafx.quantize(gm)
    assert torch.equal(gm(X), before)
    assert len(lorafx.quantize(gm, exclude_modules=["q"])) == 6


def test_what_is_merged_in_place_is_taken_out_first() -> None:
    gm = adapted(None, "auto", target_modules=["q"])
    for parameter in gm.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    lorafx.merge(gm, inplace=True)
    before = gm(X)
    with pytest.raises(QuantizationError, match=r"default is merged in place, .*'layers\.0\.q\.weight': call unmerge"):
        lorafx.quantize(gm)
    assert torch.equal(gm(X), before)
    assert len(lorafx.quantize(gm, exclude_modules=["q"])) == 6
    lorafx.unmerge(gm)
    assert lorafx.quantize(gm) == ("layers.0.q.weight",)
    before = gm(X)
    lorafx.merge(gm, inplace=True)  # now of the weight as it is read
    torch.testing.assert_close(gm(X), before)
    with pytest.raises(PassError, match=r"made by lorafx\.apply, got Linear"):
        lorafx.quantize(nn.Linear(8, 8))  # type: ignore[arg-type]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.q, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.q(self.embed(ids)))
        return logits


def test_what_is_looked_up_or_used_twice_stays_dense() -> None:
    ids = torch.tensor([[1, 2, 3]])
    gm = lorafx.apply(Tied(), LoraSpec(base="nf4", target_modules=["q", "head", "embed"], tied="untie"), (ids,))
    kinds = {n: type(p) for n, p in gm.named_parameters() if n.endswith("weight")}
    assert kinds == {"embed.weight": nn.Parameter, "q.weight": QuantizedTensor}
    with pytest.raises(MatchError, match="whose weight has no other use, and this spec adapts none: head"):
        lorafx.apply(Tied(), LoraSpec(base="nf4", target_modules=["head"], tied="untie"), (ids,))


def test_a_stack_of_experts() -> None:
    x = torch.randn(2, 4, 8)
    gm = lorafx.apply(Experts(), LoraSpec(r=2, base="nf4", target_modules=[], target_parameters=["stack"]), (x,))
    assert isinstance(gm.stack, QuantizedTensor)
    randomize(gm)
    assert_close("layer", gm(x), dense(gm)(x))


VALUES = torch.linspace(-1, 1, 32 * 64).view(32, 64)

WRITES: dict[str, Callable[[Tensor], object]] = {
    "the operator itself": lambda w: w.mul_(2),
    "a result": lambda w: torch.add(VALUES, 1.0, out=w),
    "one of a list": lambda w: torch._foreach_mul_([w], 2),
    "a dense copy": lambda w: w.copy_(VALUES),
    "another format": lambda w: w.copy_(QuantizedTensor(packed("int8", (32, 64), torch.float32))),
    "initial values": nn.init.xavier_uniform_,
    "data": lambda w: setattr(w, "data", VALUES),
    "an item": lambda w: w.__setitem__(0, 1.0),
    "an item of data": lambda w: w.data.__setitem__(0, 1.0),
    "a mask": lambda w: w.__setitem__(w > 0, 1.0),
    "a row": lambda w: w[0].zero_(),
    "a row of the transpose": lambda w: w.T[0].zero_(),
    "a view of a view": lambda w: w.view(-1)[3:].unsqueeze(0).zero_(),
    "a part": lambda w: nn.init.zeros_(w.chunk(3)[1]),
    "a diagonal": lambda w: w.fill_diagonal_(1.0),
    "a vector of parameters": lambda w: nn.utils.vector_to_parameters(VALUES.flatten(), [w]),
}


@pytest.mark.parametrize("how", WRITES)
def test_what_would_be_written_and_lost_is_refused(how: str) -> None:
    weight = nn.Parameter(QuantizedTensor(packed("nf4", (32, 64), torch.float32)), requires_grad=False)
    before = weight.detach().clone()
    told = r"would write to a weight \[(32, 64|64, 32)\] that is stored as nf4.*weight\.dequantize.*lorafx\.quantize"
    with pytest.raises(QuantizationError, match=told), torch.no_grad():
        WRITES[how](weight)
    assert torch.equal(weight, before)


def test_whole_weights_of_the_same_layout_are_copied() -> None:
    one, other = (QuantizedTensor(FORMATS["nf4"].quantize(VALUES * n)) for n in (1, -2))
    one.copy_(other)
    assert torch.equal(one.dequantize(), other.dequantize())


def test_parts_are_read_as_those_of_the_dense_weight() -> None:
    """Gradients through them, their copies and their files included."""
    weight = QuantizedTensor(packed("nf4", (32, 64), torch.float32))
    part, expected = weight[4:20].view(8, -1).t(), weight.dequantize()[4:20].view(8, -1).t()
    assert torch.equal(part, expected)
    x = torch.randn(5, len(expected), requires_grad=True)
    (gradient,) = torch.autograd.grad((x @ part).sum(), x)
    assert torch.equal(gradient, torch.ones(5, 8) @ expected.t())
    file = io.BytesIO()
    torch.save(part, file)
    file.seek(0)
    for found in (part.clone(), copy.deepcopy(part), torch.load(file)):
        assert type(found) is Tensor
        assert torch.equal(found.mul_(2), expected * 2)
    assert part.data_ptr() == part.dense.data_ptr()  # type: ignore[attr-defined]  # what a kernel gets is the memory


def test_sizes_that_do_not_fit() -> None:
    """The compiled kernels trust in sizes, so these are checked first."""
    weight = packed("nf4", (40, 66), torch.float32)
    tensors, name, layout, dtype = describe(weight)
    x = torch.randn(3, 66)
    for rows in ((30, 80), (-5, 3), (10**8, 10**8 + 1)):
        with pytest.raises(RuntimeError, match=f"rows {rows[0]} to {rows[1]} of 40"):
            packed_rows(tensors, name, layout, dtype, *rows)
    for wrong in ([10**7, 66, 64, 1], [40, 66, 0, 1], [40, 66, 64]):
        with pytest.raises(RuntimeError, match="layout"):
            packed_linear(x, None, tensors, name, wrong, dtype)
    with pytest.raises(RuntimeError, match="layout"):
        packed_linear(x, None, tensors[:2], name, layout, dtype)
    long = QuantizedTensor(packed("nf4", (40, 2100), torch.float32))  # more than a tile
    for given, by, bias in ((x, weight, torch.randn(44)), (torch.randn(3, 2200), long.packed, None)):
        with pytest.raises(RuntimeError):
            F.linear(given, QuantizedTensor(by), bias)
    assert F.linear(x, QuantizedTensor(weight), torch.ones(1)).shape == (3, 40)  # as over a dense weight


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base": "nf5"}, "LoraSpec.base='nf5'.*'nf4', 'int8'.*did you mean 'nf4'"),
        ({"base": "nf4", "block_size": 60}, "block_size=60.*32, 64, 128"),
        ({"base": "int8", "double_quant": True}, "double_quant=True.*leave it out"),
        ({"block_size": 64}, r"LoraSpec.block_size=64.*give one \(base='nf4' or 'int8'\)"),
        ({"double_quant": False}, "LoraSpec.double_quant=False.*it is a setting of a base format"),
        ({"base": "nf4", "block_size": "64"}, "block_size='64'.*an integer of at least 1"),
        ({"base": "nf4", "double_quant": 1}, "LoraSpec.double_quant=1"),
    ],
)
def test_settings_that_are_not_allowed(fields: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        LoraSpec(**fields)  # type: ignore[arg-type]


def test_another_adapter_is_on_the_base_that_is_there() -> None:
    dense_one, packed_one = (adapted(base, "auto", target_modules=["q"]) for base in (None, "nf4"))
    second = LoraSpec(base="nf4", target_modules=["q"])
    with pytest.raises(QuantizationError, match=r"'layers\.0\.q\.weight' is dense in this graph: store it first"):
        lorafx.add_adapter(dense_one, second, "second")
    lorafx.add_adapter(packed_one, second, "second")
    with pytest.raises(QuantizationError, match="is stored as nf4 already"):
        lorafx.add_adapter(packed_one, LoraSpec(base="int8", target_modules=["q"]), "third")
    assert [a.name for a in lorafx.list_adapters(packed_one)] == ["default", "second"]


def test_a_weight_that_cannot_be_stored_changes_nothing() -> None:
    model = Model(1)
    with torch.no_grad():
        model.layers[0].down.weight[0, 0] = float("nan")
    with pytest.raises(QuantizationError, match=r"'layers\.0\.down\.weight' holds NaN or Inf"):
        lorafx.apply(model, LoraSpec(base="nf4"), (X,))
    gm = lorafx.apply(model, LoraSpec(target_modules=["q"]), (X,))
    with pytest.raises(QuantizationError, match="holds NaN or Inf"):
        lorafx.quantize(gm)
    assert not any(isinstance(p, QuantizedTensor) for p in gm.parameters())
    with pytest.raises(QuantizationError, match=r"float64.*cannot be stored as nf4"):
        lorafx.apply(Model(1).double(), LoraSpec(base="nf4"), (X.double(),))
