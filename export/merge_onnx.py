"""Merging an adapter straight into an ONNX file: no model, no tracing, one weight at a time.

    BASE.onnx --read, check--> file --which initializer is which layer?--> changes --fold, write beside--> draft
    draft --proof: the base and the adapter, to half a unit in the last place--> MERGED.onnx

Only the values of the adapted initializers differ in the new file: nodes, names and metadata are the base's messages.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnx import TensorProto

from lorafx.adapter_files import StoredAdapter
from lorafx.checks import format_bytes
from lorafx.export.changes import find_changes
from lorafx.export.commit import draft
from lorafx.export.edits import Change
from lorafx.export.onnx_file import DATA_FIELDS, OnnxFile, copy_fields, read_onnx, without_initializers
from lorafx.export.prove import Proof, prove
from lorafx.export.provenance import digesting, origin
from lorafx.export.report import JsonReport
from lorafx.export.run import Progress, Run
from lorafx.export.settings import Settings

#: What the dimensions of a weight are, by how the operator that reads it takes it (:attr:`Target.kind`).
_LAYOUTS = {
    "": "",
    "linear": "[out, in]",
    "addmm": "[in, out]",
    "embedding": "[rows, width]",
    **{f"conv{n}d": "[out, in, kernel]" for n in (1, 2, 3)},
}


@dataclass(frozen=True)
class MergedTensor:
    """One initializer of the merged file.

    Attributes:
        initializer: its name.
        found: by what it was matched (name, module scope, shape and order).
        stored: what its dimensions are to the operator that reads it, as ``[in, out]``; empty for a vector.
        shape, dtype: as stored.
        change: what the adapter makes of it.
        relative: norm of what rounding to ``dtype`` lost, over the norm of the change.
        survived: share of the change that is in the stored tensor.
    """

    initializer: str
    found: str
    stored: str
    shape: tuple[int, ...]
    dtype: str
    change: str
    relative: float
    survived: float


@dataclass(frozen=True)
class MergeReport(JsonReport):
    """What :func:`merge_onnx` matched and wrote; ``proof`` is None where it was not asked for.

    ``absent`` is what of the adapter is not in the file, which is an error unless the file is a part of the model.
    ``provenance`` has lorafx's version, the adapter's settings and the SHA-256 digests of its tensors, by the names of
    sites and parameters as in the reports of exports, and, where the file was verified, of the base's initializers
    (:meth:`lorafx.export.onnx_file.OnnxFile.pieces`: wherever the file keeps them, and in whatever order).
    """

    onnx_bytes: int
    data_bytes: int
    initializers: int
    tensors: tuple[MergedTensor, ...]
    proof: Proof | None
    seconds: Mapping[str, float] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        size = format_bytes(self.onnx_bytes)
        if self.data_paths:
            files = f" in {len(self.data_paths)} files" if len(self.data_paths) > 1 else ""
            size += f" + {format_bytes(self.data_bytes)} of weights{files}"
        lines = [
            f"ONNX file    {self.path}  ({size})",
            f"merged       {len(self.tensors)} of {self.initializers} initializers; graph and others as in the base",
            "",
            *_table(self.tensors),
            "",
            *(f"left out     {what}: not in this part of the model" for what in self.absent),
            "checked      " + ("nothing (verify=False)" if self.proof is None else str(self.proof)),
            "seconds      " + ", ".join(f"{name} {value:.1f}" for name, value in self.seconds.items()),
        ]
        return "\n".join(lines)


def merge_onnx(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    part: str | None = None,
    verify: bool = True,
    external_data: bool | None = None,
    data_name: str | None = None,
    max_shard_size: int | str | None = None,
    progress: Progress | None = None,
) -> MergeReport:
    """Fold an adapter in PEFT's format into an ONNX file, without the model.

    Any exporter's file will do whose weights are still the model's: ours, torch's (with or without its optimizer, the
    older one too), and so optimum's and Olive's. Each weight is computed in float32 or better (float64 over
    float32) and rounded once, as by :func:`lorafx.merge_and_export`.

    Args:
        base: the ``.onnx`` file of the model that the adapter was trained on.
        adapter: a directory with ``adapter_config.json`` and ``adapter_model.safetensors``.
        out: the file to write; what is there is replaced at the end, by a whole file.
        part: if the model was exported as several files, the path of the module that this one is of, as ``"encoder"``
            or ``"decoder"``. What of the adapter is not in it is left out, and listed; a part in which the adapter has
            no layer is refused, and so is another part's file.
        verify: prove the file before it gets its name, as :func:`lorafx.verify_onnx`.
        external_data: keep weights in a file beside; None: if the base does, or they exceed 1.5 GiB.
        data_name: what to call that file; None: by its content.
        max_shard_size: how large a file of weights may become, in bytes or as ``"2GB"`` or ``"500MiB"``: more get
            files of their own, each with whole tensors. None: one file, whatever the base has.
        progress: called with the phase (``"match"``, ``"write"``, ``"verify"``) and the share of it that is done.

    Raises:
        ExportError: ``base`` is damaged or not to be trusted (:func:`lorafx.export.onnx_file.read_onnx`), ``out``
            cannot be written, or an option is none or contradicts another.
        AdapterError: a tensor of the adapter has no one place in the file, or does not fit it. All in one list.
        MergeError: the adapter holds NaN or Inf, or a merged weight overflows.
        NotFiniteError: an initializer that is merged into holds NaN or Inf.
        ParityError: the proof failed. Nothing is written in any of these cases.
    """
    settings = Settings(verify=verify, external_data=external_data, data_name=data_name, max_shard_size=max_shard_size)
    run = Run(progress)
    proof = None
    with run.phase("match"):
        file = read_onnx(base)
        stored = StoredAdapter.read(Path(adapter))
        found = find_changes(file, stored, str(adapter), part)
        changes = found.changes
        made_of = origin({"default": ([stored.spec], stored.tensors())})
    kept = {file.path: "the base", **dict.fromkeys(file.data, "the base's file of weights")}
    with draft(out, data_name, kept) as written, digesting(file.pieces() if verify else ()) as base_sha256:
        with run.phase("write") as done:
            model = _merged_model(file, changes)
            keep_outside = external_data if external_data is not None else (True if file.data else None)
            outside = [model.graph.initializers[n] for n, s in file.sources.items() if s.path is not None]
            finish = partial(_with_messages, base=file, changed={c.name for c in changes})
            written.write(model, keep_outside, done, outside, settings.limit, finish)
        if verify:
            with run.phase("verify") as done:
                proof = prove(read_onnx(written.path), file, found, done)
                proof.raise_if_failed()
                made_of["base_sha256"] = base_sha256()
        written.commit()
    return MergeReport(
        path=os.fspath(out),
        data_paths=tuple(map(str, written.data)),
        onnx_bytes=written.path.stat().st_size,
        data_bytes=sum(data.stat().st_size for data in written.data),
        initializers=len(file.sources),
        tensors=tuple(_reported(file, c) for c in changes),
        proof=proof,
        seconds=run.seconds,
        absent=found.absent,
        provenance=made_of,
    )


def _merged_model(file: OnnxFile, changes: Sequence[Change]) -> ir.Model:
    """The base's model, in which what changes is computed when it is written."""
    for change in changes:
        source = file.sources[change.name]
        value = file.model.graph.initializers[change.name]
        value.const_value = change.value(source, value)
    return file.model


def _with_messages(data: bytes, base: OnnxFile, changed: set[str]) -> bytes:
    """A file with the base's own messages in it, but for where values are."""
    written = {t.name: t for t in onnx.load_model_from_string(data).graph.initializer}
    proto = without_initializers(base.proto)
    for tensor in base.proto.graph.initializer:
        new, kept = written[tensor.name], proto.graph.initializer.add()
        inside = TensorProto.EXTERNAL not in (tensor.data_location, new.data_location)
        if inside and tensor.name not in changed:
            kept.CopyFrom(tensor)
        else:
            copy_fields(tensor, kept, DATA_FIELDS)
            copy_fields(new, kept, {described.name for described in new.DESCRIPTOR.fields} - {*DATA_FIELDS})
    finished: bytes = proto.SerializeToString(deterministic=True)
    return finished


def _reported(file: OnnxFile, change: Change) -> MergedTensor:
    source = file.sources[change.name]
    return MergedTensor(
        initializer=change.name,
        found=change.target.how,
        stored=_LAYOUTS[change.target.kind],
        shape=tuple(source.proto.dims),
        dtype=ir.DataType(source.proto.data_type).numpy().name,
        change=str(change.edit),
        relative=change.rounding.relative,
        survived=change.rounding.survived,
    )


def _table(tensors: Sequence[MergedTensor]) -> list[str]:
    rows = [("initializer", "found by", "stored as", "shape", "dtype", "change", "rounding")]
    for t in tensors:
        shape = " x ".join(map(str, t.shape))
        rows.append((t.initializer, t.found, t.stored, shape, t.dtype, t.change, f"{t.relative:.1e}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
