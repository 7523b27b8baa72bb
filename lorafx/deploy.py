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
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.weak import WeakIdKeyDictionary

from lorafx.adapter_files import read_spec
from lorafx.api import apply, captured
from lorafx.errors import CheckpointError
from lorafx.export.cast import file_dtype
from lorafx.export.export import Options, Progress, Run, export_graph
from lorafx.export.pack import WeightFormat, check_format
from lorafx.export.report import ExportReport
from lorafx.export.write import parse_size
from lorafx.graph import CapturedModule
from lorafx.packed_files import as_held, with_packed_weights
from lorafx.passes.decoder import capture_decoder
from lorafx.passes.example import ExampleInputs
from lorafx.passes.fold import Fold
from lorafx.passes.merge import merge_lazily
from lorafx.shards import main_dtype, read_shards, reading_ahead
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
    kv_cache: bool = False,
    weight_format: WeightFormat = "dense",
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
    check_format(weight_format)
    spec = None if adapter_dir is None else read_spec(Path(adapter_dir))
    tensors = with_packed_weights(read_shards(Path(weights_dir)), Path(weights_dir))
    with reading_ahead(Path(weights_dir), _available_memory() // 2):  # the capture leaves the disk idle
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
            step = capture_decoder(gm) if kv_cache else None
            twin = None
            if wanted not in (None, stored) and not isinstance(model, nn.Module):
                assert wanted is not None
                twin = captured(_blank(_build(model, wanted)), example_inputs, dynamic_shapes)
                twin = capture_decoder(twin) if kv_cache else twin
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
            step=step,
            weight_format=weight_format,
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
    """Modules made inside have parameters without values, on the meta device, and buffers with them.

    ``torch.device("meta")`` would leave computed buffers without values too, which nothing can compute again.
    """
    known = WeakIdKeyDictionary()  # a parameter registered twice stays one

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> Any:
        if parameter.is_meta:
            return parameter
        if parameter not in known:
            made = type(parameter)(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
            vars(made).update(vars(parameter))
            known[parameter] = made
        return known[parameter]

    hook = register_module_parameter_registration_hook(on_meta)
    try:
        yield
    finally:
        hook.remove()


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
    places = _Places(whole)
    wanted = dict(whole.state_dict(keep_vars=True))
    for name, old in wanted.items():
        names.setdefault(id(old), []).append(name)
    for aliases in names.values():
        old = wanted[aliases[0]]
        given = [name for name in aliases if name in tensors]
        if not given:
            problems.append(f"missing: {aliases[0]} {list(old.shape)}")
            continue
        new = as_held(tensors[given[0]], old, whole.get_submodule(given[0].rpartition(".")[0]))
        if new.shape != old.shape:
            problems.append(f"{given[0]}: shape {list(new.shape)}, expected {list(old.shape)}")
            continue
        if differing := [n for n in given[1:] if not torch.equal(tensors[n], tensors[given[0]])]:
            problems.append(f"'{given[0]}' and '{differing[0]}' are one tensor in the model and differ in the files")
        if new.dtype is not old.dtype:
            converted += new.nbytes
            if new.is_floating_point() != old.is_floating_point() or converted > _CONVERTED_LIMIT:
                problems.append(f"{given[0]}: {new.dtype}, and {old.dtype} in the model; make the model in {new.dtype}")
                continue
            new = new.to(old.dtype)
        places.put(old, new)
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


class _Places:
    """Where a module's tensors are, to replace each under all its names."""

    def __init__(self, model: nn.Module) -> None:
        self._of: dict[int, list[tuple[dict[str, Any], str]]] = {}
        for module in model.modules():
            for store in (module._parameters, module._buffers):
                for name, held in store.items():
                    self._of.setdefault(id(held), []).append((store, name))

    def put(self, old: Tensor, new: Tensor) -> None:
        value = nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new
        for store, name in self._of[id(old)]:
            store[name] = value


def _blank(model: nn.Module) -> nn.Module:
    """Memory for the parameters of a module on the meta device, which is asked for and never touched."""
    places = _Places(model)
    for tensor in list(model.parameters()):
        if tensor.is_meta:
            places.put(tensor, torch.empty(tensor.shape, dtype=tensor.dtype))
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
