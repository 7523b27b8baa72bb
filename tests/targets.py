"""What "all-linear" means in each family of models, and a small model that has names of every kind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lorafx
from lorafx import LoraSpec
from lorafx.passes.match import match


def names(path: str, layers: str, count: int = 2) -> set[str]:
    """``path`` with each layer's number, and each of the modules of a layer."""
    return {f"{path.format(i)}.{layer}" for i in range(count) for layer in layers.split()}


QKVO = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"
SPEECH = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj fc1 fc2"
CROSS = "encoder_attn.q_proj encoder_attn.k_proj encoder_attn.v_proj encoder_attn.out_proj"
GATED = f"{QKVO} mlp.gate_proj mlp.up_proj mlp.down_proj"

#: What "all-linear" adapts in each family, and which layers it leaves out.
ALL_LINEAR: dict[str, tuple[set[str], set[str]]] = {
    "bert": (
        names(
            "bert.encoder.layer.{}",
            "attention.self.query attention.self.key attention.self.value attention.output.dense"
            " intermediate.dense output.dense",
        )
        | {"bert.pooler.dense"},
        {"classifier"},
    ),
    "distilbert": (
        names(
            "distilbert.transformer.layer.{}",
            "attention.q_lin attention.k_lin attention.v_lin attention.out_lin ffn.lin1 ffn.lin2",
        )
        | {"pre_classifier"},
        {"classifier"},
    ),
    "modernbert": (names("model.layers.{}", "attn.Wqkv attn.Wo mlp.Wi mlp.Wo") | {"head.dense"}, {"decoder"}),
    "llama": (names("model.layers.{}", GATED), {"lm_head"}),
    "qwen3": (names("model.layers.{}", GATED), {"lm_head"}),
    "gemma": (names("model.layers.{}", GATED), {"lm_head"}),
    "phi": (
        names("model.layers.{}", f"{QKVO.replace('o_proj', 'dense')} mlp.fc1 mlp.fc2"),
        {"lm_head"},
    ),
    "gpt2": (names("transformer.h.{}", "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj"), {"lm_head"}),
    "mixtral": (  # the routers are no Linear modules: by name only
        names("model.layers.{}", QKVO),
        {"lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"},
    ),
    "whisper": (
        names("model.encoder.layers.{}", SPEECH) | names("model.decoder.layers.{}", f"{SPEECH} {CROSS}"),
        {"proj_out"},
    ),
    "t5": (
        names(
            "encoder.block.{}.layer",
            "0.SelfAttention.q 0.SelfAttention.k 0.SelfAttention.v 0.SelfAttention.o"
            " 1.DenseReluDense.wi 1.DenseReluDense.wo",
        )
        | names(
            "decoder.block.{}.layer",
            "0.SelfAttention.q 0.SelfAttention.k 0.SelfAttention.v 0.SelfAttention.o"
            " 1.EncDecAttention.q 1.EncDecAttention.k 1.EncDecAttention.v 1.EncDecAttention.o"
            " 2.DenseReluDense.wi 2.DenseReluDense.wo",
        ),
        {"lm_head"},
    ),
    "vit": (
        names(
            "vit.layers.{}",
            "attention.q_proj attention.k_proj attention.v_proj attention.o_proj mlp.fc1 mlp.fc2",
        ),
        {"classifier"},
    ),
    "mlp": ({"0", "3"}, {"5"}),
    "convnet": ({"hidden"}, {"head"}),
}


def adapted(gm: Any, **fields: Any) -> set[str]:
    choices = match(gm, (LoraSpec(**fields),))
    return {c.candidate.name for c in choices if c.site is not None}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(6, 6)
        self.v_proj = nn.Linear(6, 6, bias=False)
        self.router = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.v_proj(self.q_proj(x).tanh()) * F.linear(x, self.router).sigmoid()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.my_proj = nn.Linear(6, 6)
        self.proj = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)
        self.spare = nn.Linear(6, 6)  # never called

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.proj(self.my_proj(self.blocks(x)).tanh()))
        return out.transpose(0, 1).contiguous()


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def graph(model: nn.Module | None = None, exported: bool = True) -> Any:
    return lorafx.api.captured(Model() if model is None else model, (X,) if exported else None, None)
