"""Weights that lie quantized in a checkpoint's files, as bitsandbytes' layers save them: several tensors to a weight.

    q.weight                                 uint8 [(numel + 1) // 2, 1]      or      q.weight   int8 [out, in]
    q.weight.absmax, .quant_map, ...                                                  q.SCB      float32 [out]
    q.weight.quant_state.bitsandbytes__nf4   the bytes of a JSON text

Here they become one, ``q.weight [out, in]``, over the memory of those in the files, and back again. bitsandbytes is not
needed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from lorafx.bases import FORMATS
from lorafx.bases.tensor import QuantizedTensor
from lorafx.errors import CheckpointError, QuantizationError
from lorafx.shards import main_dtype

_FP4 = "weight.quant_state.bitsandbytes__fp4"

#: Keys beside ``weight`` and ``weight.*`` that belong to a quantized weight.
_BESIDE = ("SCB", "weight_format")

#: What shows the format where its mark is gone, so that the error says what is missing.
_TRACES = {"weight.absmax": "nf4", "weight.quant_map": "nf4", "weight_format": "int8"}


def with_packed_weights(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, with one :class:`QuantizedTensor` for each weight that is quantized.

    It has the dtype that it was quantised from; that of int8 weights, which no file tells, is the one that most of the
    other tensors have.

    Raises:
        CheckpointError: what belongs to a weight is damaged or incomplete, or it is stored as fp4. ``folder`` is named.
    """
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        layer, found, rest = key.rpartition(".weight.")
        if found:
            parts[f"{layer}."][f"weight.{rest}"] = tensor
        elif (name := key.rpartition(".")[2]) in _BESIDE:
            parts[key.removesuffix(name)][name] = tensor
    plain = dict(tensors)
    weights: dict[str, QuantizedTensor] = {}
    for prefix, held in parts.items():
        form = next((f for f in FORMATS.values() if f.mark in held), None)
        if form is None and _FP4 in held:
            raise CheckpointError(
                f"{folder}: {prefix}weight is stored as fp4, which lorafx does not read: quantize the original weights "
                "with bnb_4bit_quant_type='nf4' (fp4 is what bitsandbytes takes unless told)"
            )
        if form is None:
            form = next((FORMATS[name] for trace, name in _TRACES.items() if trace in held), None)
        if form is None:
            continue
        own = {prefix + name: tensor for name, tensor in held.items()}
        own |= {key: tensors[key] for key in (f"{prefix}weight",) if key in tensors}
        try:
            weights[f"{prefix}weight"] = QuantizedTensor(form.from_state_dict(own, prefix))
        except QuantizationError as error:
            raise CheckpointError(f"{folder}: {error}") from error
        for key in own:
            del plain[key]
    dtype = main_dtype(plain or weights)
    for key, weight in weights.items():
        int8 = weight.packed.format == "int8"
        weights[key] = QuantizedTensor(replace(weight.packed, dtype=dtype)) if int8 else weight
    return {**plain, **weights}


def as_held(tensor: Tensor, held: Tensor, owner: nn.Module) -> Tensor:
    """A packed weight in the dtype of ``held``, which it stands for in ``owner``, and as that is stored.

    transformers' Conv1D stores a linear layer's weight as ``[in, out]``. Tensors that are not packed stay as they are.
    """
    if not isinstance(tensor, QuantizedTensor):
        return tensor
    return QuantizedTensor(replace(tensor.packed, dtype=held.dtype), turned=type(owner).__name__ == "Conv1D")


def packed_state_dict(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with each packed weight as bitsandbytes' layers save it, which is what files can hold.

        merged = lorafx.merge(gm, requantize=True)
        model.save_pretrained(folder, state_dict=lorafx.packed_state_dict(merged.state_dict()))

    Memory is shared with ``tensors``. A weight that is read transposed (transformers' Conv1D) is saved as
    ``[out, in]``, as transformers does.

    Raises:
        QuantizationError: a packed weight is not that of a linear layer (a stack of experts), which bitsandbytes has
            no layer for.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, QuantizedTensor):
            found[name] = tensor
            continue
        layer, _, last = name.rpartition(".")
        if last != "weight" or tensor.dim() != 2:
            raise QuantizationError(
                f"'{name}' {list(tensor.shape)} is stored as {tensor.packed.format} and is no linear layer's weight: "
                "bitsandbytes has no way to save it. Put a dense one in its place (weight.dequantize()), or keep "
                "the state dict with torch.save"
            )
        own = FORMATS[tensor.packed.format].state_dict(tensor.packed)
        found |= {f"{layer}.{key}" if layer else key: value for key, value in own.items()}
    return found
