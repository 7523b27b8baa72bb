"""A packed weight with its adapters' updates folded in: whatever reads it, its gradients are those of the dense sum."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

import lorafx
from conftest import randomize
from lorafx import LoraSpec
from lorafx.bases import FORMATS
from lorafx.bases.tensor import QuantizedTensor
from lorafx.graph import CapturedModule
from lorafx.ops import adapted_weight
from tolerances import assert_close

COUNT, OUT, IN, R = 3, 24, 64, 2

#: What reads a stack ``[COUNT, OUT, IN]``, with ``x [4, IN]``.
READERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "flattened": lambda x, w: x @ w.flatten(0, 1).T,
    "transposed": lambda x, w: x @ w.mT,
    "in one order": lambda x, w: x @ w.reshape(COUNT * OUT, IN)[: OUT + 3].t(),
    "one by one": lambda x, w: sum((F.linear(x, w[i]) for i in range(COUNT)), start=torch.zeros(())),
    "parts": lambda x, w: torch.cat([x @ part.mT for part in w.chunk(2, dim=-2)], -1),
    "picked": lambda x, w: torch.bmm(w[torch.tensor([2, 0, 2, 1])], x.unsqueeze(-1)),
    "twice": lambda x, w: (x @ w[1:].mT).sum() * w.norm(),
    "cast": lambda x, w: x @ w.double()[1].T.to(x.dtype),
}

#: The adapters of one call: of a whole stack, and of some rows of each matrix.
ROWS = torch.tensor([5, 23, 0])


def factors(dtype: torch.dtype) -> list[Tensor]:
    """LoRA's and DoRA's of all rows, then both of ``ROWS``."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(R, IN), (OUT, R), (R, IN), (OUT, R), (OUT,), (R, IN), (3, R), (R, IN), (3, R), (3,)]
    made = [torch.randn(COUNT, *shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [t.to(dtype).requires_grad_() for t in made]


def gradients(
    read: Callable[[Tensor, Tensor], Tensor], kind: str, weight: Tensor, tensors: list[Tensor], x: Tensor
) -> list[Tensor]:
    """The output, and the gradients of ``x`` and of what trains among the tensors."""
    x = x.clone().requires_grad_()
    names = ["lora", "dora", "lora", "dora"]
    total = adapted_weight(weight, tensors, names, [2.0, 0.5, 1.0, 3.0], kind, [None, None, ROWS, ROWS])
    y = read(x, total.mT if kind == "parameter_t" else total)
    trained = [x, *(t for t in tensors if t.requires_grad)]
    return [y, *torch.autograd.grad(y.square().sum(), trained)]


@pytest.mark.parametrize("kind", ["parameter", "parameter_t"])
@pytest.mark.parametrize("read", READERS)
def test_gradients_are_those_of_the_dense_sum(read: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorafx.folded.PANEL_BYTES", 5 * IN * 8)  # parts of matrices; elsewhere it is several
    weight = QuantizedTensor(FORMATS["nf4"].quantize(torch.randn(COUNT, OUT, IN)), kind == "parameter_t", torch.float64)
    x, tensors = torch.randn(4, IN, dtype=torch.float64), factors(torch.float64)
    for frozen in ((), tensors[2:5]):
        for tensor in frozen:
            tensor.requires_grad_(False)
        found = gradients(READERS[read], kind, weight, tensors, x)
        expected = gradients(READERS[read], kind, weight.dequantize(), tensors, x)
        for one, other in zip(found, expected, strict=True):
            assert_close("layer", one, other)


@pytest.mark.parametrize("base", FORMATS)
def test_gradients_in_half_precision(base: str) -> None:
    """The adapters in float32; the sum is rounded once, and so is its gradient."""
    weight = QuantizedTensor(FORMATS[base].quantize(torch.randn(COUNT, OUT, IN).bfloat16()))
    x, tensors = torch.randn(4, IN).bfloat16(), factors(torch.float32)
    found = gradients(READERS["transposed"], "parameter", weight, tensors, x)
    for one, other in zip(
        found, gradients(READERS["transposed"], "parameter", weight.dequantize(), tensors, x), strict=True
    ):
        assert_close("layer", one, other)


def test_second_derivatives_and_batches_of_gradients() -> None:
    weight = QuantizedTensor(FORMATS["nf4"].quantize(torch.randn(COUNT, OUT, IN)), dtype=torch.float64)
    x, tensors = torch.randn(4, IN, dtype=torch.float64), factors(torch.float64)

    def both(held: Tensor) -> Iterator[Tensor]:
        total = adapted_weight(held, tensors[2:5], ["dora"], [0.5], "parameter", [None])
        y = (x @ total.mT).tanh().sum((0, 1))
        yield from torch.autograd.grad(
            y, tensors[2:5], torch.eye(OUT).double(), is_grads_batched=True, retain_graph=True
        )
        first = torch.autograd.grad(y.sum(), tensors[2:5], create_graph=True)
        yield from torch.autograd.grad(sum(t.square().sum() for t in first), tensors[2:5])

    for one, other in zip(both(weight), both(weight.dequantize()), strict=True):
        assert_close("layer", one, other)


def test_what_was_written_to_before_backward_is_refused() -> None:
    """Nothing else would see it where the adapters are frozen."""
    weight = QuantizedTensor(FORMATS["nf4"].quantize(torch.randn(COUNT, OUT, IN)))
    a, b, x = torch.randn(COUNT, R, IN), torch.randn(COUNT, OUT, R), torch.randn(4, IN, requires_grad=True)
    y = x @ adapted_weight(weight, [a, b], ["lora"], [1.0], "parameter", [None]).mT
    a.add_(1)
    with pytest.raises(RuntimeError, match=r"weight \[3, 24, 64\] that is stored as nf4 .*Call backward before"):
        y.sum().backward()


class Reads(nn.Module):
    """A stack whose module says how it is stored."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn((COUNT, IN, OUT) if transposed else (COUNT, OUT, IN)) / 8)
        self.is_transposed = transposed

    def forward(self, x: Tensor) -> Tensor:
        if self.is_transposed:
            return (x @ self.stack.view(COUNT * IN, OUT)[:IN]).tanh()
        return (x @ self.stack.mT).sum(0).tanh()


def adapted(transposed: bool, variant: str) -> tuple[CapturedModule, Tensor]:
    x = torch.randn(4, IN)
    spec = LoraSpec(r=R, variant=variant, base="nf4", target_modules=(), target_parameters=["stack"])
    gm = lorafx.apply(nn.Sequential(Reads(transposed)), spec, (x,)).train()
    randomize(gm)
    return gm, x


def dense(gm: CapturedModule) -> CapturedModule:
    """The same graph over the values that its weights are read as."""
    result = copy.deepcopy(gm)
    for module in result.modules():
        for name, weight in module._parameters.items():
            if isinstance(weight, QuantizedTensor):
                module._parameters[name] = nn.Parameter(weight.dequantize().contiguous(), requires_grad=False)
    return result


def step(gm: nn.Module, **inputs: Any) -> list[Tensor]:
    """The output, and the gradients of what trains."""
    gm.zero_grad()
    outputs = gm(**inputs)
    y: Tensor = outputs if isinstance(outputs, Tensor) else outputs.logits
    y.square().mean().backward()
    return [y, *(p.grad for p in gm.parameters() if p.grad is not None)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_compiles_as_one_graph(variant: str, transposed: bool) -> None:
    torch.compiler.reset()
    gm, x = adapted(transposed, variant)
    compiled = torch.compile(gm, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        gm.train(training)
        for one, other in zip(step(compiled, input=x), step(dense(gm), input=x), strict=True):
            assert_close("layer", one, other)


def test_a_transposed_stack_is_viewed_as_the_dense_one() -> None:
    """Whose memory was in its own order when the model was captured; with its adapter and without."""
    gm, x = adapted(True, "lora")
    assert_close("layer", gm(x), dense(gm)(x))
    plain = dense(gm)
    with lorafx.disable_adapters(gm), lorafx.disable_adapters(plain):
        assert_close("layer", gm(x), plain(x))


SIZES: dict[str, Any] = {
    "vocab_size": 24,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "use_cache": False,
}

MIXTURES: dict[str, Callable[..., nn.Module]] = {
    "mixtral": lambda **rest: hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES, **rest)),
    "gpt-oss": lambda **rest: hf.GptOssForCausalLM(
        hf.GptOssConfig(**SIZES, head_dim=16, layer_types=["full_attention"] * 2, **rest)
    ),
}


@pytest.mark.parametrize(("name", "implementation"), [("mixtral", "grouped_mm"), ("gpt-oss", "batched_mm")])
def test_mixtures_of_experts_train_as_on_dense_values(name: str, implementation: str) -> None:
    torch.manual_seed(0)
    model = MIXTURES[name](experts_implementation=implementation).eval()
    spec = LoraSpec(r=2, variant="dora", base="nf4", target_modules=(), target_parameters=["gate_up_proj", "down_proj"])
    inputs = {"input_ids": torch.arange(24).reshape(2, 12)}
    gm = lorafx.apply(model, spec, inputs).train()
    randomize(gm)
    found, expected = step(gm, **inputs), step(dense(gm), **inputs)
    assert len(found) == 1 + 2 * 2 * 3
    for one, other in zip(found, expected, strict=True):
        assert_close("model", one, other)
