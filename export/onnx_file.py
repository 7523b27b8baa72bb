"""Reading an ONNX file that may lie: its tensors are where it says, as large as it says, and beside it.

What a file claims is checked when it is opened, before anything is computed or written: every tensor has a known dtype
and a shape of which its bytes are; data outside lies in a regular file within the folder of the ``.onnx``, after
``..`` and symbolic links are resolved, and is as long as the offset and length say. Weights are read when asked for,
one at a time.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import AttributeProto, GraphProto, ModelProto, SparseTensorProto, TensorProto
from torch import Tensor

from lorafx.errors import ExportError

#: About how many bytes of two files are compared at once.
_CHUNK = 2**24
_Message = ModelProto | GraphProto | TensorProto

#: The fields of a TensorProto that hold values, or say where they are.
DATA_FIELDS = (
    "raw_data", "float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data",
    "external_data", "data_location",
)  # fmt: skip

#: The field that holds the values of a dtype that are not in ``raw_data`` (onnx.proto, TensorProto), and how many of
#: its entries there are for each element; 0: several elements share one.
_TYPED: Mapping[int, tuple[str, int]] = {
    TensorProto.FLOAT: ("float_data", 1),
    TensorProto.COMPLEX64: ("float_data", 2),
    TensorProto.DOUBLE: ("double_data", 1),
    TensorProto.COMPLEX128: ("double_data", 2),
    TensorProto.INT64: ("int64_data", 1),
    TensorProto.UINT64: ("uint64_data", 1),
    TensorProto.UINT32: ("uint64_data", 1),
    TensorProto.STRING: ("string_data", 1),
}


@dataclass(frozen=True)
class Source:
    """Where the bytes of a tensor are: ``length`` of them in the file ``path`` from ``offset`` on, or in ``proto``."""

    proto: TensorProto
    path: Path | None = None
    offset: int = 0
    length: int = 0

    def value(self) -> ir.TensorProtocol:
        """The tensor, of any dtype; from a file it is mapped."""
        if self.path is None:
            return ir.serde.deserialize_tensor(self.proto)
        # Without a folder of its own, since the path is checked and absolute.
        dtype, shape = ir.DataType(self.proto.data_type), ir.Shape(list(self.proto.dims))
        if not self.length:  # nothing that could be mapped
            return ir.Tensor(np.empty(tuple(self.proto.dims), dtype.numpy()), dtype=dtype, name=self.proto.name)
        return ir.ExternalTensor(str(self.path), self.offset, self.length, dtype, shape=shape, name=self.proto.name)

    def tensor(self) -> Tensor:
        """The same for torch, of a dtype that it has; from a file it is mapped, and changes to it are not written."""
        dtype = ir.tensor_adapters.to_torch_dtype(ir.DataType(self.proto.data_type))
        shape = tuple(self.proto.dims)
        if not math.prod(shape):
            return torch.empty(shape, dtype=dtype)
        data: np.ndarray[tuple[int], np.dtype[np.uint8]]
        if self.path is None:
            data = np.frombuffer(bytearray(self.value().tobytes()), np.uint8)
        else:
            data = np.memmap(self.path, np.uint8, "c", self.offset, (self.length,))
            if self.offset % dtype.itemsize:
                data = np.array(data)
        return torch.from_numpy(data).view(dtype).reshape(shape)

    def same_bytes(self, other: Source) -> bool:
        """Whether it and a tensor of the same dtype and shape have the same bits."""
        if self.path is None or other.path is None:
            return b"".join(self.pieces()) == b"".join(other.pieces())
        return all(mine == theirs for mine, theirs in zip(self.pieces(), other.pieces(), strict=True))

    def pieces(self) -> Iterator[bytes]:
        """Its bytes, in pieces; of strings each one's length (8 bytes, little-endian) before it."""
        if self.path is not None:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                for start in range(0, self.length, _CHUNK):
                    yield file.read(min(_CHUNK, self.length - start))
        elif self.proto.data_type == TensorProto.STRING:
            for text in self.proto.string_data:
                yield len(text).to_bytes(8, "little") + text
        else:
            yield self.value().tobytes()


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX file that was checked.

    ``proto`` is what the file holds, with the data outside left there. ``model`` is the same to work on: each
    initializer of its graph reads its value when it is asked. ``sources`` say where the initializers are, by name,
    ``data`` names the files outside.
    """

    path: Path
    proto: ModelProto
    model: ir.Model
    sources: Mapping[str, Source]
    data: frozenset[Path] = field(default=frozenset())

    def pieces(self) -> Iterator[bytes]:
        """All initializers in the order of their names: of each its name, dtype and shape as text, then its bytes."""
        for name, source in sorted(self.sources.items()):
            yield f"{name} {ir.DataType(source.proto.data_type).name} {list(source.proto.dims)}\n".encode()
            yield from source.pieces()


def read_onnx(path: str | os.PathLike[str]) -> OnnxFile:
    """Open an ONNX file.

    Raises:
        ExportError: it is missing or no ONNX file; or a tensor's data is outside the file's folder, missing, or of
            another size than declared. Names the tensor.
    """
    path = Path(path)
    proto = _parse(path)
    sources: dict[str, Source] = {}
    for tensor in proto.graph.initializer:
        if tensor.name in sources:
            raise ExportError(f"{path}: two initializers are called '{tensor.name}'")
        sources[tensor.name] = _source(path, tensor)
    data = frozenset(s.path for s in sources.values() if s.path is not None)
    for tensor in _inner_tensors(proto):
        _hold_inside(tensor, _source(path, tensor))
    try:
        model = ir.serde.deserialize_model(proto)
    except Exception as error:  # onnx_ir has no class of its own for what it refuses
        raise ExportError(f"{path} is not a valid ONNX model: {error}") from error
    for name, source in sources.items():
        value = model.graph.initializers[name]
        assert value.const_value is not None
        if source.path is not None:
            shape = ir.Shape(list(source.proto.dims))
            value.const_value = ir.LazyTensor(source.value, value.const_value.dtype, shape, name=name)
    return OnnxFile(path, proto, model, sources, data)


def weight_files(path: Path) -> frozenset[Path]:
    """The files in which an ONNX file says that it has weights, links resolved; nothing else of it is checked.

    Raises:
        ExportError: it cannot be read, or is no ONNX file.
    """
    proto = _parse(path)
    outside = (t for t in (*proto.graph.initializer, *_inner_tensors(proto)) if t.data_location == TensorProto.EXTERNAL)
    named = {entry.value for tensor in outside for entry in tensor.external_data if entry.key == "location"}
    return frozenset(Path(os.path.realpath(path.parent / name)) for name in named if "\0" not in name)


def _parse(path: Path) -> ModelProto:
    try:
        with path.open("rb") as file:
            proto = onnx.load_model_from_string(file.read())
    except FileNotFoundError as error:
        raise ExportError(f"there is no file {path}") from error
    except OSError as error:
        raise ExportError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # protobuf's decoding errors have no public base class
        raise ExportError(f"{path} is no ONNX file: {error}") from error
    if not proto.graph.node and not proto.graph.output:
        raise ExportError(f"{path} is no ONNX file: it holds no graph")
    return proto


def _source(path: Path, tensor: TensorProto) -> Source:
    """Check what a tensor declares, and find its bytes."""
    where = f"{path}: tensor '{tensor.name}'"
    known = tensor.data_type in TensorProto.DataType.values() and tensor.data_type != TensorProto.UNDEFINED
    if not known:
        raise ExportError(f"{where} has the unknown dtype {tensor.data_type}")
    if any(size < 0 for size in tensor.dims):
        raise ExportError(f"{where} declares the shape {list(tensor.dims)}, which has a negative size")
    count = math.prod(tensor.dims)
    if tensor.data_location == TensorProto.EXTERNAL:
        return _outside(path, where, tensor, _bytes(tensor, count))
    if tensor.external_data:
        raise ExportError(f"{where} has its data outside the file and inside as well")
    _check_inside(where, tensor, count)
    return Source(tensor)


def _bytes(tensor: TensorProto, count: int) -> int:
    """How many bytes so many elements are; a string has no size."""
    return -(-count * ir.DataType(tensor.data_type).bitwidth // 8) if tensor.data_type != TensorProto.STRING else -1


def _check_inside(where: str, tensor: TensorProto, count: int) -> None:
    name, each = _TYPED.get(tensor.data_type, ("int32_data", 1))
    if tensor.HasField("raw_data"):
        held, expected, what = len(tensor.raw_data), _bytes(tensor, count), "bytes"
    else:
        bits = 8 if tensor.data_type == TensorProto.STRING else ir.DataType(tensor.data_type).bitwidth
        # Numbers of 2 and 4 bits lie packed in bytes, one in each entry.
        held, what = len(getattr(tensor, name)), f"entries of {name}"
        expected = -(-count * bits // 8) if bits in (2, 4) else count * each
    if held != expected:
        raise ExportError(
            f"{where} declares the shape {list(tensor.dims)}, which takes {expected} {what}, and holds {held}. "
            "The file is damaged; export it again"
        )


def _outside(path: Path, where: str, tensor: TensorProto, size: int) -> Source:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    folder = Path(os.path.realpath(path.parent))
    data = Path(os.path.realpath(folder / location))
    absolute = PurePosixPath(location).is_absolute() or PureWindowsPath(location).anchor
    if not location or absolute or "\0" in location or not data.is_relative_to(folder):
        raise ExportError(
            f"{where} has its data in '{location}', which is not in the folder of the .onnx file. Such a path could "
            "read any file and is not followed; if you trust it, copy that file beside the .onnx and name it there"
        )
    try:
        offset, length = int(entries.get("offset", "0")), int(entries.get("length", str(size)))
    except ValueError as error:
        raise ExportError(f"{where}: offset and length of its data are no numbers ({error})") from error
    if length != size:
        raise ExportError(
            f"{where} declares the shape {list(tensor.dims)}, which takes {size} bytes, and a length of {length}"
        )
    if not data.is_file():
        raise ExportError(f"{where}: its data should be in '{location}', and there is no such file beside {path}")
    if offset < 0 or offset + length > data.stat().st_size:
        raise ExportError(
            f"{where} should have bytes {offset} to {offset + length} of '{location}', which has {data.stat().st_size}"
            ". The file was cut off or belongs to another model; copy both files again"
        )
    return Source(tensor, data, offset, length)


def _hold_inside(tensor: TensorProto, source: Source) -> None:
    """Take the data of a tensor that is no initializer of the main graph into the message: such are small."""
    if source.path is None:
        return
    data = source.value().tobytes()
    for name in DATA_FIELDS:
        tensor.ClearField(name)
    tensor.raw_data = data


def _inner_tensors(proto: ModelProto) -> Iterator[TensorProto]:
    """Every tensor but the initializers of the main graph."""
    yield from _sparse(proto.graph.sparse_initializer)
    nodes = [*proto.graph.node, *(node for function in proto.functions for node in function.node)]
    for step in proto.training_info:
        for graph in (step.initialization, step.algorithm):
            yield from _tensors_of(graph)
    for node in nodes:
        yield from _attribute_tensors(node.attribute)


def _attribute_tensors(attributes: Iterable[AttributeProto]) -> Iterator[TensorProto]:
    for attribute in attributes:
        yield from [attribute.t] if attribute.HasField("t") else ()
        yield from attribute.tensors
        yield from _sparse([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else ())
        yield from _sparse(attribute.sparse_tensors)
        for graph in [*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs]:
            yield from _tensors_of(graph)


def _tensors_of(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    yield from _sparse(graph.sparse_initializer)
    for node in graph.node:
        yield from _attribute_tensors(node.attribute)


def _sparse(tensors: Iterable[SparseTensorProto]) -> Iterator[TensorProto]:
    for tensor in tensors:
        yield tensor.values
        yield tensor.indices


def copy_fields(source: _Message, target: _Message, without: Collection[str] = ()) -> None:
    """Set the fields of a message that another one has; ``without`` names those to leave out."""
    for described, value in source.ListFields():
        name = described.name
        if name in without:
            continue
        if isinstance(value, (str, bytes, int, float)):
            setattr(target, name, value)
        else:
            getattr(target, name).MergeFrom(value)


def without_initializers(proto: ModelProto) -> ModelProto:
    """A copy of a model that lacks the initializers of its main graph, which may be large."""
    bare = ModelProto()
    copy_fields(proto, bare, {"graph"})
    bare.graph.SetInParent()
    copy_fields(proto.graph, bare.graph, {"initializer"})
    return bare
