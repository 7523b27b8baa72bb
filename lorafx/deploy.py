"""From a checkpoint's files to an ONNX file, with no more than a few tensors in memory.

config --> module without weights --mapped tensors put in--> apply, load_adapter --> graph --folded in pieces--> file
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafx.adapter_files import read_spec
from lorafx.api import apply, captured
from lorafx.errors import CheckpointError
from lorafx.export.cast import file_dtype
from lorafx.export.export import Options, Progress, Run, export_graph
from lorafx.export.report import ExportReport
from lorafx.export.write import parse_size
from lorafx.graph import CapturedModule, get_path
from lorafx.passes.example import ExampleInputs
from lorafx.passes.fold import Fold
from lorafx.passes.merge import merge_lazily
from lorafx.shards import main_dtype, read_shards
from lorafx.sources import model_of_config
from lorafx.state import load_adapter

#: How many bytes of tensors whose dtype in the files is not the module's are converted, which takes memory.
_CONVERTED_LIMIT = 2**26


def export_checkpoint(
    model: nn.Module | str | os.PathLike[str] | Any,
    weights_dir: str | os.PathLike[str],
    adapter_dir: str | os.PathLike[str] | None,
    path: str | os.PathLike[str],
    *,
    verify: bool = True,
    example_inputs: ExampleInputs = None,
    dynamic_shapes: Mapping[str, Any] | None = None,
    opset: int | None = None,
    dtype: torch.dtype | str | None = None,
    external_data: bool | None = None,
    data_name: str | None = None,
    max_shard_size: int | str | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Fold an adapter on disk into a checkpoint on disk and write the model as ONNX, without loading it.

    The weights are mapped into memory and read while they are written; never more than pieces of a few are held, so
    that a model much larger than the memory exports.

    Args:
        model: a transformers config, the folder of one (``config.json``), or a module whose parameters are on the meta
            device. Buffers that are computed and not saved (rotary frequencies) must hold values.
        weights_dir: a folder with ``model.safetensors`` or ``model.safetensors.index.json``. Tied tensors may be in it
            under one of their names, or under all with the same values.
        adapter_dir: an adapter in PEFT's format; None: the base alone.
        path: the ``.onnx`` file, as for :func:`lorafx.merge_and_export`; so are all the other arguments.
        verify: (c), the comparison of numbers, is left out, and the report says so, where ONNX Runtime and torch would
            not both fit into memory with the model.
        dtype: None: the files'. From a config the graph is then that of the model made in this dtype.

    Raises:
        CheckpointError: the files are damaged, or do not fit the model: missing, extra and wrongly shaped tensors are
            listed.
        AdapterError, MergeError, ParityError, ExportError: as :func:`lorafx.load_adapter` and
            :func:`lorafx.merge_and_export`. Nothing is written.
    """
    wanted = file_dtype(dtype)
    limit = parse_size(max_shard_size)
    spec = None if adapter_dir is None else read_spec(Path(adapter_dir))
    tensors = read_shards(Path(weights_dir))
    stored = main_dtype(tensors)
    found = model if isinstance(model, nn.Module) else _build(model, stored)
    whole = put_tensors(found, tensors, Path(weights_dir))
    run = Run(progress)
    with run.phase("capture"):
        if spec is None:
            gm = captured(whole, example_inputs, dynamic_shapes)
        else:
            gm = apply(whole, spec, example_inputs, dynamic_shapes=dynamic_shapes, seed=0, backend="reference")
            load_adapter(gm, Path(str(adapter_dir)))
        gm.eval()
        twin = None
        if wanted not in (None, stored) and not isinstance(model, nn.Module):
            assert wanted is not None
            twin = captured(_blank(_build(model, wanted)), example_inputs, dynamic_shapes)
    options = Options(
        verify,
        example_inputs,
        opset,
        wanted,
        external_data,
        data_name,
        limit,
        atol=atol,
        rtol=rtol,
        no_numbers=_too_large(gm),
        twin=twin,
    )
    with run.phase("merge"):
        folds: Mapping[str, Fold | Tensor] = {}
        written = gm
        if spec is not None:
            written, folds = merge_lazily(gm)
    return export_graph(gm, written, folds, path, run, options)


def _build(config: Any, dtype: torch.dtype) -> nn.Module:
    with parameters_on_meta():
        return model_of_config(config, dtype).eval()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made inside have parameters without values, on the meta device, and buffers with them."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            made = type(parameter)(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
            vars(made).update(vars(parameter))
            parameter = made
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def put_tensors(model: nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> nn.Module:
    """A copy of a module that has these tensors for its parameters and saved buffers; ties stay tied.

    Raises:
        CheckpointError: they do not fit, with a list of what is missing, extra, of another shape or untied; or
            something is on the meta device that no file has.
    """
    whole = copy.deepcopy(model)
    problems: list[str] = []
    converted = 0
    names: dict[int, list[str]] = {}
    wanted = dict(whole.state_dict(keep_vars=True))
    for name, old in wanted.items():
        names.setdefault(id(old), []).append(name)
    for aliases in names.values():
        old = wanted[aliases[0]]
        given = [name for name in aliases if name in tensors]
        if not given:
            problems.append(f"missing: {aliases[0]} {list(old.shape)}")
            continue
        new = tensors[given[0]]
        if new.shape != old.shape:
            problems.append(f"{given[0]}: shape {list(new.shape)}, expected {list(old.shape)}")
            continue
        if differing := [n for n in given[1:] if not torch.equal(tensors[n], new)]:
            problems.append(f"'{given[0]}' and '{differing[0]}' are one tensor in the model and differ in the files")
        if new.dtype is not old.dtype:
            converted += new.nbytes
            if new.is_floating_point() != old.is_floating_point() or converted > _CONVERTED_LIMIT:
                problems.append(f"{given[0]}: {new.dtype}, and {old.dtype} in the model; make the model in {new.dtype}")
                continue
            new = new.to(old.dtype)
        _put(whole, old, new)
    known = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    extra = [n for n in tensors if n not in wanted and not any(re.search(pattern, n) for pattern in known)]
    problems += [f"not of this model: {name}" for name in sorted(extra)]
    if not problems:
        left = [n for n, t in (*whole.named_parameters(), *whole.named_buffers()) if t.is_meta]
        problems = [
            f"'{name}' is on the meta device and in no file: it is computed, so make the model with its buffers (give "
            "its config, or make it inside lorafx.deploy.parameters_on_meta())"
            for name in left
        ]
    if problems:
        shown = [*problems[:12], *([f"and {len(problems) - 12} more"] if len(problems) > 12 else [])]
        raise CheckpointError("\n  - ".join((f"{folder}: the checkpoint does not fit the model:", *shown)))
    return whole


def _put(model: nn.Module, old: Tensor, new: Tensor) -> None:
    """Replace a tensor under all its names."""
    value = nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, held in store.items():
                if held is old:
                    store[name] = value  # type: ignore[assignment]


def _blank(model: nn.Module) -> nn.Module:
    """Memory for the parameters of a module on the meta device, which is asked for and never touched."""
    for name, tensor in list(model.named_parameters()):
        if tensor.is_meta and get_path(model, name) is tensor:
            _put(model, tensor, torch.empty(tensor.shape, dtype=tensor.dtype))
    return model


def _too_large(gm: CapturedModule) -> str | None:
    """Why numbers are not compared: with torch's weights there would be those of ONNX Runtime, both in float32."""
    needed = sum(t.numel() for t in gm.state_dict().values()) * 4 * 3
    available = _available_memory()
    if needed <= available:
        return None
    return (
        f"numbers: running the model in torch and in ONNX Runtime takes some {needed / 2**30:.0f} GiB, and "
        f"{available / 2**30:.0f} GiB are available"
    )


def _available_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 if hasattr(os, "sysconf") else 2**33
