"""Tiny random-weight models of the families the compiler must handle, with inputs and labels for each.

Sizes are small and mostly not powers of two, so that a kernel or a pass which assumes otherwise shows.
Everything is float32 on the CPU, seeded, and leaves the global random state as it found it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers as hf
from torch import Tensor, nn

Inputs = dict[str, Tensor]
Task = Literal[
    "text-classification",
    "fill-mask",
    "text-generation",
    "text2text-generation",
    "image-classification",
    "plain",
]

VOCAB = 90
CLASSES = 3
PAD, BOS, EOS = 0, 1, 2
MAX_LENGTH = 48
TARGET_GAP = 4  # an encoder-decoder's target is this much shorter than its source


@dataclass(frozen=True)
class Family:
    """One architecture: how to build it and what to feed it.

    ``inputs`` and ``other_inputs`` differ in batch and sequence size; both hold padded rows where the
    model takes a mask. ``labels`` belong to ``inputs``: int64 ``[batch]`` for classification,
    ``[batch, sequence]`` with -100 at padding for language models. A ``plain`` model returns logits
    ``[batch, classes]`` and takes no ``labels`` argument; the others return their loss when given one.
    """

    name: str
    task: Task
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    other_inputs: Callable[[], Inputs]
    labels: Callable[[], Tensor]


class ConvNet(nn.Module):
    """Convolutions with BatchNorm, whose buffers a forward pass in train mode updates, and a Linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Conv2d(6, 10, 3, stride=2), nn.BatchNorm2d(10), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        )  # fmt: skip
        self.hidden = nn.Linear(40, 22)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(22, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.dropout(torch.relu(self.hidden(self.features(image)))))
        return logits


def _seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """``make`` with fixed weights, in eval mode, as ``from_pretrained`` would return it."""

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            model = make()
            # Fresh biases are all 0 and norms all 1: a lost bias or two swapped norms would go unseen, and
            # the ONNX optimizer would merge the equal initializers.
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim == 1:
                        parameter.add_(0.1 * torch.randn(parameter.shape))
        return model.eval()

    return build


def _generator(batch: int) -> torch.Generator:
    return torch.Generator().manual_seed(batch)


def _tokens(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Token ids and their mask, both int64 ``[batch, length]``; every row but the first is padded."""
    ids = torch.randint(3, VOCAB, (batch, length), generator=_generator(batch))
    kept = length - 2 * torch.arange(batch)
    mask = (torch.arange(length) < kept[:, None]).long()
    return ids.masked_fill(mask == 0, PAD), mask


# Samples: (batch, length) -> the keyword inputs of one family.


def _text(batch: int, length: int) -> Inputs:
    ids, mask = _tokens(batch, length)
    return {"input_ids": ids, "attention_mask": mask}


def _text_pair(batch: int, length: int) -> Inputs:
    segments = (torch.arange(length) >= length // 2).long().repeat(batch, 1)
    return {**_text(batch, length), "token_type_ids": segments}


def _decoder(batch: int, length: int) -> Inputs:
    ids, mask = _tokens(batch, length - TARGET_GAP)
    return {"decoder_input_ids": ids, "decoder_attention_mask": mask}


def _translation(batch: int, length: int) -> Inputs:
    return {**_text(batch, length), **_decoder(batch, length)}


def _speech(batch: int, length: int) -> Inputs:
    """Whisper always takes ``2 * max_source_positions`` frames; only the length of its text varies."""
    frames = torch.randn(batch, 10, 30, generator=_generator(batch))
    return {"input_features": frames, **_decoder(batch, length)}


def _pixels(batch: int, length: int) -> Inputs:
    return {"pixel_values": torch.randn(batch, 3, 12, 12, generator=_generator(batch))}


def _images(batch: int, length: int) -> Inputs:
    return {"image": torch.randn(batch, 3, 12, 12, generator=_generator(batch))}


def _features(batch: int, length: int) -> Inputs:
    return {"input": torch.randn(batch, 19, generator=_generator(batch))}


# Labels: (batch, length) -> what the sample of that size should give.


def _classes(batch: int, length: int) -> Tensor:
    return torch.arange(batch) % CLASSES


def _next_tokens(batch: int, length: int) -> Tensor:
    ids, mask = _tokens(batch, length)
    return ids.masked_fill(mask == 0, -100)


def _target_tokens(batch: int, length: int) -> Tensor:
    return _next_tokens(batch, length - TARGET_GAP)


_VOCAB: dict[str, Any] = {
    "vocab_size": VOCAB,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    # The usual 0.02 would leave the logits of models this narrow near 0, where any tolerance is met.
    "initializer_range": 0.2,
}
_TEXT: dict[str, Any] = {
    **_VOCAB,
    "hidden_size": 40,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_LENGTH,
}
_CLASSIFIER: dict[str, Any] = {"num_labels": CLASSES}


def _bert() -> nn.Module:
    return hf.BertForSequenceClassification(hf.BertConfig(**_TEXT, **_CLASSIFIER))


def _distilbert() -> nn.Module:
    sizes: dict[str, Any] = {"dim": 36, "hidden_dim": 52, "n_layers": 2, "n_heads": 3}
    config = hf.DistilBertConfig(**_VOCAB, **sizes, **_CLASSIFIER, max_position_embeddings=MAX_LENGTH)
    return hf.DistilBertForSequenceClassification(config)


def _modernbert() -> nn.Module:
    """One layer of each kind: full attention, and sliding attention over less than the inputs' length."""
    layers: dict[str, Any] = {"layer_types": ["full_attention", "sliding_attention"], "local_attention": 8}
    config = hf.ModernBertConfig(**_TEXT, **layers, cls_token_id=BOS, sep_token_id=EOS)
    return hf.ModernBertForMaskedLM(config)


def _llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_TEXT, num_key_value_heads=2))


def _qwen3() -> nn.Module:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**_TEXT, num_key_value_heads=2, head_dim=12))


def _gemma() -> nn.Module:
    return hf.GemmaForCausalLM(hf.GemmaConfig(**_TEXT, num_key_value_heads=1, head_dim=12))


def _phi() -> nn.Module:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4}
    return hf.PhiForCausalLM(hf.PhiConfig(**_TEXT, rope_parameters=rope))


def _gpt2() -> nn.Module:
    config = hf.GPT2Config(**_VOCAB, n_embd=36, n_layer=2, n_head=3, n_positions=MAX_LENGTH)
    return hf.GPT2LMHeadModel(config)


def _mixtral() -> nn.Module:
    """With batched_mm, which torch has in float64 and torch.onnx knows (others: tests/test_export_experts.py)."""
    experts: dict[str, Any] = {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "experts_implementation": "batched_mm",
    }
    return hf.MixtralForCausalLM(hf.MixtralConfig(**_TEXT, **experts, num_key_value_heads=2))


def _vit() -> nn.Module:
    sizes: dict[str, Any] = {"hidden_size": 36, "intermediate_size": 52, "image_size": 12, "patch_size": 4}
    layers: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 3, "initializer_range": 0.2}
    return hf.ViTForImageClassification(hf.ViTConfig(**sizes, **layers, **_CLASSIFIER))


def _whisper() -> nn.Module:
    encoder: dict[str, Any] = {"encoder_layers": 2, "encoder_attention_heads": 3, "encoder_ffn_dim": 52}
    decoder: dict[str, Any] = {"decoder_layers": 2, "decoder_attention_heads": 3, "decoder_ffn_dim": 52}
    sizes: dict[str, Any] = {"d_model": 36, "num_mel_bins": 10, "max_source_positions": 15}
    config = hf.WhisperConfig(
        **_VOCAB,
        **encoder,
        **decoder,
        **sizes,
        max_target_positions=MAX_LENGTH,
        decoder_start_token_id=BOS,
        begin_suppress_tokens=None,
        init_std=0.2,
    )
    return hf.WhisperForConditionalGeneration(config)


def _t5() -> nn.Module:
    """With eager attention: the ONNX exporter fails on the fused kind (a view of another layout)."""
    sizes: dict[str, Any] = {"d_model": 36, "d_kv": 10, "d_ff": 52, "num_layers": 2, "num_heads": 3}
    positions: dict[str, Any] = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}
    special: dict[str, Any] = {"decoder_start_token_id": PAD, "attn_implementation": "eager"}
    return hf.T5ForConditionalGeneration(hf.T5Config(**_VOCAB, **sizes, **positions, **special))


def _mlp() -> nn.Module:
    hidden = nn.Linear(19, 33), nn.GELU(), nn.Dropout(0.1), nn.Linear(33, 27), nn.Tanh()
    return nn.Sequential(*hidden, nn.Linear(27, CLASSES))


def _family(
    name: str,
    task: Task,
    make: Callable[[], nn.Module],
    sample: Callable[[int, int], Inputs],
    labels: Callable[[int, int], Tensor],
) -> Family:
    return Family(name, task, _seeded(make), lambda: sample(2, 11), lambda: sample(3, 17), lambda: labels(2, 11))


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        _family("bert", "text-classification", _bert, _text_pair, _classes),
        _family("distilbert", "text-classification", _distilbert, _text, _classes),
        _family("modernbert", "fill-mask", _modernbert, _text, _next_tokens),
        _family("llama", "text-generation", _llama, _text, _next_tokens),
        _family("qwen3", "text-generation", _qwen3, _text, _next_tokens),
        _family("gemma", "text-generation", _gemma, _text, _next_tokens),
        _family("phi", "text-generation", _phi, _text, _next_tokens),
        _family("gpt2", "text-generation", _gpt2, _text, _next_tokens),
        _family("mixtral", "text-generation", _mixtral, _text, _next_tokens),
        _family("whisper", "text2text-generation", _whisper, _speech, _target_tokens),
        _family("t5", "text2text-generation", _t5, _translation, _target_tokens),
        _family("vit", "image-classification", _vit, _pixels, _classes),
        _family("mlp", "plain", _mlp, _features, _classes),
        _family("convnet", "plain", ConvNet, _images, _classes),
    )
}
