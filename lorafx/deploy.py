"""From a checkpoint's files to an ONNX file, with no more than a few tensors in memory.

config --> module without weights --mapped tensors put in--> apply, load_adapter --> graph --folded in pieces--> file
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorafx.adapter_files import StoredAdapter
from lorafx.api import apply, captured
from lorafx.errors import CheckpointError, MergeError, NotFiniteError
from lorafx.export.cast import captures
from lorafx.export.export import export_job, export_merged
from lorafx.export.job import Job
from lorafx.export.pack import WeightFormat
from lorafx.export.report import ExportReport
from lorafx.export.run import Progress, Run
from lorafx.export.settings import Settings
from lorafx.graph import CapturedModule
from lorafx.passes.example import ExampleInputs
from lorafx.passes.merge_base import Original
from lorafx.pretrained import model_over, read_weights
from lorafx.shards import file_of, reading_ahead
from lorafx.spec import Tied
from lorafx.state import load_adapter


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
    base: str = "dequantized",
    original: Original | None = None,
    requantize: bool = False,
    tied: Tied = "refuse",
    base_sha256: str | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Fold an adapter on disk into a checkpoint on disk and write the model as ONNX, without loading it.

    The weights are mapped into memory and read while they are written; never more than pieces of a few are held, so
    that a model much larger than the memory exports.

    Args:
        model: a transformers config, the folder of one (``config.json``), or a module whose parameters are on the meta
            device. Buffers that are computed and not saved (rotary frequencies) must hold values.
        weights_dir: a folder with ``model.safetensors`` or ``model.safetensors.index.json``. Tied tensors may be in it
            under one of their names, or under all with the same values. What the model has no place for (another head)
            is not read, and listed in ``report.warnings``.
        adapter_dir: an adapter in PEFT's format; None: the base alone. What it has trained whole (``modules_to_save``)
            the checkpoint may lack.
        path: the ``.onnx`` file, as for :func:`lorafx.merge_and_export`; so are all the other arguments.
        verify: (c), the comparison of numbers, is left out, and the report says so, where ONNX Runtime and torch would
            not both fit into memory with the model.
        dtype: None: the files'.
        base, original, requantize: as for :func:`lorafx.merge_and_export`; for a quantized checkpoint and an adapter.
        tied: as in :class:`lorafx.LoraSpec`, for an adapter of a weight with another use: its file does not say it.
        base_sha256: the digest that the base's weights must have: ``report.provenance["base_sha256"]`` of an export
            that is known to be good, from disk or from memory. None: not compared.

    Raises:
        CheckpointError: the files are damaged, or do not fit the model: missing and wrongly shaped tensors are listed
            beside those that it has no place for; and a parameter that holds NaN or Inf is named with its file. (A
            flipped bit that makes another number is seen by ``base_sha256`` only: the format has no checksums.)
        AdapterError, MergeError, ParityError, ExportError: as :func:`lorafx.load_adapter` and
            :func:`lorafx.merge_and_export`; or the base has another digest. Nothing is written.
    """
    settings = Settings(
        verify=verify,
        example_inputs=example_inputs,
        opset=opset,
        dtype=dtype,
        weight_format=weight_format,
        external_data=external_data,
        data_name=data_name,
        max_shard_size=max_shard_size,
        kv_cache=kv_cache,
        atol=atol,
        rtol=rtol,
        base_sha256=base_sha256,
    )
    run = Run(progress)
    if adapter_dir is None and (base != "dequantized" or original is not None or requantize):
        raise MergeError(
            "base, original and requantize say what an adapter is folded into, and adapter_dir is None: leave them out"
        )
    adapter = None if adapter_dir is None else StoredAdapter.read(Path(adapter_dir))
    spec = None if adapter is None else replace(adapter.spec, tied=tied)
    brought = () if adapter is None else [key for key in adapter.whole if adapter.trains(key)]
    tensors = read_weights(Path(weights_dir))
    with reading_ahead(Path(weights_dir), _available_memory() // 2):  # the capture leaves the disk idle
        fitted = model_over(tensors, Path(weights_dir), model, brought)
        with run.phase("capture"):
            if spec is None:
                gm = captured(fitted.model, example_inputs, dynamic_shapes)
            else:
                gm = apply(
                    fitted.model, spec, example_inputs, dynamic_shapes=dynamic_shapes, seed=0, backend="reference"
                )
                load_adapter(gm, Path(str(adapter_dir)))
            gm.eval()
        extra, no_numbers = captures(gm, settings, run), _too_large(gm)
        try:
            if spec is None:
                report = export_job(Job(gm, gm, settings, extra, no_numbers=no_numbers), path, run)
            else:
                report = export_merged(gm, path, run, settings, extra, base, original, requantize, no_numbers)
        except NotFiniteError as error:
            raise CheckpointError(f"{file_of(Path(weights_dir), error.weight)}: {error}") from error
    return replace(report, warnings=(*fitted.notes, *report.warnings))


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
