"""Adapters of a graph, or in PEFT's folders, as files that one ONNX model takes at run time.

gm, folders --adapters loaded into a graph of its own--> base with optional inputs + a file for each task
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from lorafx.adapters import add_adapter
from lorafx.errors import AdapterError
from lorafx.export.multi import MultiReport, Naming, export_tasks
from lorafx.export.pack import WeightFormat
from lorafx.export.run import Progress, Run
from lorafx.export.settings import Settings
from lorafx.graph import CapturedModule, share
from lorafx.ir import adapters as adapters_of
from lorafx.ir import stage
from lorafx.passes.example import ExampleInputs
from lorafx.state import load_adapter


def export_multi(
    gm: CapturedModule,
    path: str | os.PathLike[str],
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    *,
    naming: Naming = "lorafx",
    kv_cache: bool = False,
    verify: bool = True,
    example_inputs: ExampleInputs = None,
    opset: int | None = None,
    dtype: torch.dtype | str | None = None,
    weight_format: WeightFormat = "dense",
    external_data: bool | None = None,
    max_shard_size: int | str | None = None,
    progress: Progress | None = None,
) -> MultiReport:
    """Write the base once, and beside it ``<task>.onnx_adapter`` for each task, where ONNX Runtime may switch.

    Each adapted layer gets optional inputs ``<layer>.lora_A [in, r]`` and ``<layer>.lora_B [r, out]``, the scaling in
    it, whose defaults have rank 0: without an adapter the file is the base. Ranks may differ by layer and adapter. Only
    where an adapter has them, ``<layer>.lora_gain [out]`` (DoRA) and ``<layer>.lora_shift [out]`` (a bias) are there
    too: ``y = lora_gain (x W + x lora_A lora_B) + b + lora_shift``. What an adapter trains whole (``modules_to_save``,
    biases), bare parameters and convolutions in groups are inputs as a whole, whose default is the base's tensor; the
    report lists them.

    Run it with :class:`lorafx.AdapterSession`, or ONNX Runtime's ``LoraAdapter`` and ``RunOptions.add_active_adapter``.
    ``gm`` is left as it is.

    Args:
        gm: what :func:`lorafx.apply` returned, or a captured graph.
        path: the ``.onnx`` file. What is there is replaced, but only by files that passed all checks, in an order that
            never leaves a base beside an adapter of another one (:mod:`lorafx.export.multi`).
        adapters: by task, the name of an adapter of ``gm`` or the folder of one in PEFT's format; None: all that
            ``gm`` has.
        naming: ``"genai"`` names the inputs as onnxruntime-genai's model builder does; it has no names for gains.
        kv_cache: export a decoder as a step of generation, as in :func:`lorafx.merge_and_export`; onnxruntime-genai
            needs it. Prompts are then continued without an adapter and with each.
        verify: hold ONNX Runtime's outputs to torch's, without an adapter and with each, at several sizes.
        dtype: the floating weights' in the files, adapters' included, each rounded once; None: the model's.
        weight_format: ``"bnb4"`` keeps an nf4 base in 4 bits, as in :func:`lorafx.merge_and_export`; layers that an
            adapter has a version of its own of are dense. (``"nbits"`` would be another base than the adapters'.)
        example_inputs, opset, external_data, max_shard_size, progress: as for :func:`lorafx.merge_and_export`.

    Raises:
        AdapterError: a task cannot be the name of a file, or its adapter does not exist or cannot be loaded.
        MergeError: an adapter holds NaN or Inf, or is merged in place.
        NotFiniteError: a weight does.
        ParityError: a file is not what torch computes; says for which adapter, where and by how much.
        ExportError: the graph cannot be expressed, an adapter cannot be an input (names the site), a file of a task's
            name belongs to another model, or the files cannot be written. Nothing is changed.
    """
    stage(gm)  # refuses what is no graph of lorafx's
    settings = Settings(
        verify=verify,
        example_inputs=example_inputs,
        opset=opset,
        dtype=dtype,
        weight_format=weight_format,
        kv_cache=kv_cache,
        external_data=external_data,
        max_shard_size=max_shard_size,
    )
    there = adapters_of(gm)
    given = {n: n for n in there} if adapters is None else adapters
    if not isinstance(given, Mapping):
        raise AdapterError(
            f"adapters={given!r} is of type {type(given).__name__}, and a mapping of task names to adapters of the "
            "graph, or to folders, is expected: as adapters={'fr': 'default', 'de': 'path/to/adapter'}; None takes all "
            "that the graph has"
        )
    work = share(gm)
    tasks: dict[str, str] = {}
    for task, place in given.items():
        if not isinstance(task, str) or re.fullmatch(r"[\w-][\w.-]*", task) is None:
            raise AdapterError(f"{task!r} cannot be a task's name, and its file's: use letters, digits, '_', '-', '.'")
        if not isinstance(place, str | os.PathLike):
            raise AdapterError(
                f"task '{task}': {place!r} is of type {type(place).__name__}, and the name of an adapter of the graph, "
                "or the path of a folder, is expected"
            )
        if place in there:
            tasks[task] = str(place)
            continue
        if not Path(place).is_dir():
            known = ", ".join(map(repr, there)) or "none"
            raise AdapterError(
                f"task '{task}': {os.fspath(place)!r} is neither a folder nor an adapter of the graph, which "
                f"has {known}"
            )
        name = f"task_{len(tasks)}"
        while name in adapters_of(work):
            name += "_"
        add_adapter(work, Path(place), name)
        load_adapter(work, Path(place), name)
        tasks[task] = name
    return export_tasks(work, path, tasks, naming, settings, Run(progress))
