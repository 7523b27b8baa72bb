"""Small ONNX files and adapters, made by hand, for the tests of what works on files alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch import Tensor

import lorafx

#: Modules of the files here.
LAYERS = ("encoder.0.proj", "encoder.1.proj", "encoder.2.proj")
ONNX_DTYPES = {
    torch.float64: TensorProto.DOUBLE,
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
}


def stored(name: str, tensor: Tensor) -> TensorProto:
    """A tensor as a file holds it, within the message."""
    data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    return helper.make_tensor(name, ONNX_DTYPES[tensor.dtype], list(tensor.shape), data, raw=True)


def make_model(
    nodes: Sequence[onnx.NodeProto], initializers: Mapping[str, Tensor], width: int, **options: Any
) -> onnx.ModelProto:
    """A graph from ``x [batch, width]`` to the last node's output."""
    dtype = ONNX_DTYPES[next(iter(initializers.values())).dtype]
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info("x", dtype, ["batch", width])],
        [helper.make_tensor_value_info(nodes[-1].output[0], dtype, None)],
        [stored(name, tensor) for name, tensor in initializers.items()],
    )
    domains = {n.domain for n in nodes if n.domain}
    opsets = [helper.make_opsetid("", 20), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, **options)


def save(model: onnx.ModelProto, path: Path, outside: bool = False) -> Path:
    """Write a file, its weights inside or in ``<path>.data``."""
    data = {"save_as_external_data": True, "location": f"{path.name}.data", "size_threshold": 0} if outside else {}
    onnx.save(model, path, **data)
    return path


def chain(
    paths: Sequence[str], width: int = 6, dtype: torch.dtype = torch.float32, named: str = "name", seed: int = 0
) -> onnx.ModelProto:
    """Square layers one after the other, each a ``MatMul`` with its weight ``[in, out]``.

    ``named``: ``"name"`` (as the parameter, transposed), ``"scope"`` (by the node's name) or ``"nothing"``.
    """
    generator = torch.Generator().manual_seed(seed)
    nodes, weights = [], {}
    last = "x"
    for index, path in enumerate(paths):
        name = f"{path}.weight.T" if named == "name" else f"w{index}"
        weights[name] = torch.randn(width, width, generator=generator).to(dtype)
        node = f"/{path.replace('.', '/')}/MatMul" if named == "scope" else f"n{index}"
        nodes.append(helper.make_node("MatMul", [last, name], [f"y{index}"], name=node))
        last = f"y{index}"
    return make_model(nodes, weights, width)


def save_adapter(folder: Path, tensors: Mapping[str, Tensor], r: int = 2, alpha: float = 4, **config: Any) -> Path:
    """An adapter in PEFT's format; keys are without the prefix."""
    folder.mkdir(exist_ok=True)
    modules = sorted({key.partition(".lora_")[0] for key in tensors if ".lora_" in key}) or ["any"]
    settings = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "target_modules": modules, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    prefixed = {f"base_model.model.{key}": tensor.contiguous() for key, tensor in tensors.items()}
    save_file(prefixed, folder / "adapter_model.safetensors")
    return folder


def lora(paths: Sequence[str], out: int = 6, wide: int = 6, r: int = 2, seed: int = 1) -> dict[str, Tensor]:
    """A and B for each layer."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path in paths:
        tensors[f"{path}.lora_A.weight"] = torch.randn(r, wide, generator=generator)
        tensors[f"{path}.lora_B.weight"] = torch.randn(out, r, generator=generator)
    return tensors


def delta(tensors: Mapping[str, Tensor], path: str, scaling: float = 2.0) -> Tensor:
    """``scaling B A`` of a layer, in float64."""
    return scaling * tensors[f"{path}.lora_B.weight"].double() @ tensors[f"{path}.lora_A.weight"].double()


def weights(path: Path) -> dict[str, Tensor]:
    """The initializers of a file."""
    loaded = onnx.load(path)
    found = {}
    for tensor in loaded.graph.initializer:
        array = np.ascontiguousarray(numpy_helper.to_array(tensor))
        if tensor.data_type == TensorProto.BFLOAT16:
            found[tensor.name] = torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
        else:
            found[tensor.name] = torch.from_numpy(array.copy())
    return found


def merged(tmp_path: Path, model: onnx.ModelProto, tensors: dict[str, Tensor], **config: Any) -> dict[str, Tensor]:
    """The weights of the file that an adapter was merged into."""
    tmp_path.mkdir(exist_ok=True)
    base = save(model, tmp_path / "base.onnx")
    adapter = save_adapter(tmp_path / "adapter", tensors, **config)
    lorafx.merge_onnx(base, adapter, tmp_path / "merged.onnx")
    return weights(tmp_path / "merged.onnx")


def refused(tmp_path: Path, model: onnx.ModelProto, tensors: dict[str, Tensor], message: str, **config: Any) -> None:
    """Hold a merge to an error, which leaves the folder as it was."""
    base = save(model, tmp_path / "base.onnx")
    adapter = save_adapter(tmp_path / "adapter", tensors, **config)
    there = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(lorafx.LorafxError, match=message):
        lorafx.merge_onnx(base, adapter, tmp_path / "merged.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == there
