"""Two ONNX files side by side: nothing differs, or which nodes, which tensors and by how much, and which numbers."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnx import GraphProto, ModelProto, NodeProto
from torch import Tensor

from lorafx.export.compare import compare
from lorafx.export.diff_runs import run_both
from lorafx.export.onnx_file import DATA_FIELDS, OnnxFile, Source, copy_fields, read_onnx, without_initializers
from lorafx.export.parity import TOLERANCES, Tolerance
from lorafx.export.report import Parity, parity_lines
from lorafx.variants.inits import leading_singular

#: The largest rank that is told apart from "this or more", where the matrix is large.
_RANKS = 64
#: Up to so many elements differences are computed in float64; above, those of half types in float32.
_SMALL = 2**20
#: What a model, a graph, a node and a value say of themselves: no number depends on it.
_LABELS = ("doc_string", "metadata_props")
_PRODUCER = ("producer_name", "producer_version", "model_version")


@dataclass(frozen=True)
class TensorDifference:
    """An initializer that differs.

    Attributes:
        name, shape, dtype: the first file's, or the second's where only that has it.
        what: why there are no numbers, where there are none.
        changed: how many elements differ.
        largest, norm: of the difference, largest magnitude and Frobenius norm.
        relative: the norm over that of the first file's tensor.
        rank: of the difference of two matrices, how many singular values are larger than the rounding of the
            second file's numbers could make one; at most 64 of large matrices. None for vectors.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    what: str = ""
    changed: int = 0
    largest: float = 0.0
    norm: float = 0.0
    relative: float = 0.0
    rank: int | None = None

    def __str__(self) -> str:
        text = f"{self.name}  {' x '.join(map(str, self.shape)) or 'number'} {self.dtype}: "
        if self.what:
            return text + self.what
        text += f"{self.changed} elements differ, by {self.largest:.3g} at most; norm {self.norm:.3g}"
        text += f" ({self.relative:.3g} of the first's)"
        if self.rank is None:
            return text
        return text + f", rank {self.rank}" + (" or more" if self.rank >= _RANKS else "")


@dataclass(frozen=True)
class OnnxDifference:
    """What :func:`diff_onnx` found.

    ``graph`` is the first difference of the graphs, ``structure`` that with names left aside, ``nodes`` are all nodes
    that differ, ``tensors`` the initializers whose values do, ``parity`` what both files computed, if they were run.
    ``aside`` says what differs in graphs of one structure: names, the order of initializers, or what is declared of
    values and versions.
    """

    left: str
    right: str
    graph: str | None
    structure: str | None
    nodes: tuple[str, ...]
    tensors: tuple[TensorDifference, ...]
    parity: tuple[Parity, ...] = ()
    aside: str | None = None

    @property
    def same(self) -> bool:
        """Whether nothing differs that a number depends on, no name, and nothing else of the graphs but labels."""
        return self.graph is None and not self.tensors and self.same_numbers

    @property
    def same_structure(self) -> bool:
        """Whether both have the same graph, :attr:`aside` left aside."""
        return self.structure is None

    @property
    def same_numbers(self) -> bool:
        """Whether no run differed by more than the tolerance."""
        return all(row.passed for row in self.parity)

    def __str__(self) -> str:
        lines = [f"{self.left}", f"{self.right}"]
        if self.graph is None:
            lines.append("graph    the same, names included")
        elif self.structure is None:
            lines.append(f"graph    the same but for {self.aside} ({self.graph})")
        else:
            lines.append(f"graph    different: {self.structure}")
            lines += [f"         {node}" for node in self.nodes[:20]]
            lines += [f"         ... ({len(self.nodes)} nodes in all)"] if len(self.nodes) > 20 else []
        lines.append(f"weights  {f'{len(self.tensors)} differ' if self.tensors else 'the same, to the bit'}")
        lines += [f"         {tensor}" for tensor in self.tensors]
        if self.parity:
            lines += ["", *parity_lines(self.parity, ("the first file", "the second file"))]
        return "\n".join(lines)


def diff_onnx(
    left: str | os.PathLike[str],
    right: str | os.PathLike[str],
    inputs: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    *,
    random: bool = False,
    tolerance: Tolerance = TOLERANCES[torch.float32],
    progress: Callable[[float], None] = lambda done: None,
) -> OnnxDifference:
    """Say what differs between two ONNX files. Weights are read one at a time.

    Metadata and documentation are not compared, since no number depends on them.

    Args:
        left, right: the files; ``left`` is the reference of numbers.
        inputs: an ``.npz`` file or arrays by input name to run both on.
        random: run both on random inputs (integers are 0 or 1, since a file does not say what it allows). Dynamic
            dimensions of one name have one size, and a decoder's total of tokens is that of past and new ones.
        tolerance: what counts as the same numbers.
        progress: called with the share of the weights that are compared.

    Raises:
        ExportError: a file cannot be read or run, ``inputs`` lacks one of its inputs, or the files are to be run and
            differ in what they take or give.
        ParityError: one of them cannot run on the inputs, or gives outputs of another shape.
    """
    a, b = (read_onnx(path) for path in (left, right))
    rows = run_both(a, b, inputs, random, tolerance)
    graph = graph_difference(a, b)
    structure = None if graph is None else compare(a.model, b.model, names=False)
    return OnnxDifference(
        str(left),
        str(right),
        graph,
        None if structure is None else str(structure),
        () if graph is None else tuple(_nodes(a.proto.graph, b.proto.graph)),
        tuple(_tensors(a, b, progress)),
        rows,
        _aside(a.proto, b.proto) if graph is not None and structure is None else None,
    )


def graph_difference(left: OnnxFile, right: OnnxFile) -> str | None:
    """Where two files differ in more than the values of initializers and labels; None if nowhere."""
    a, b = _skeleton(left.proto), _skeleton(right.proto)
    if a == b:
        return None
    found = compare(left.model, right.model, by_value=lambda value: False)
    if found is not None:
        return str(found)
    parts = [field.name for field in a.DESCRIPTOR.fields if getattr(a, field.name) != getattr(b, field.name)]
    inner = [f.name for f in a.graph.DESCRIPTOR.fields if getattr(a.graph, f.name) != getattr(b.graph, f.name)]
    return f"their {', '.join(f'graph.{name}' for name in inner) or ', '.join(parts)}"


def _aside(left: ModelProto, right: ModelProto) -> str:
    """What two files of one structure differ in."""
    a, b = _skeleton(left), _skeleton(right)
    for bare in (a, b):
        bare.graph.initializer.sort(key=lambda tensor: tensor.name)
    if a == b:
        return "the order of initializers"
    return "names" if _names(a.graph) != _names(b.graph) else "what it declares of values or versions"


def _names(graph: GraphProto) -> list[str]:
    """All names at the top of a graph, in the order of what has them; initializers in that of their names."""
    values = (*graph.input, *graph.output, *graph.initializer)
    nodes = [name for node in graph.node for name in (node.name, *node.input, *node.output)]
    return [graph.name, *(value.name for value in values), *nodes]


def _skeleton(proto: ModelProto) -> ModelProto:
    """A model without the values of its initializers and without what no number depends on."""
    bare = without_initializers(proto)
    for name in (*_LABELS, *_PRODUCER):
        bare.ClearField(name)
    for tensor in proto.graph.initializer:
        copy_fields(tensor, bare.graph.initializer.add(), {*DATA_FIELDS, *_LABELS})
    _strip(bare.graph)
    for function in bare.functions:
        for node in function.node:
            _strip_node(node)
    return bare


def _strip(graph: GraphProto) -> None:
    for name in _LABELS:
        graph.ClearField(name)
        for value in (*graph.input, *graph.output, *graph.value_info):
            value.ClearField(name)
    for node in graph.node:
        _strip_node(node)


def _strip_node(node: NodeProto) -> None:
    for name in _LABELS:
        node.ClearField(name)
    for attribute in node.attribute:
        attribute.ClearField("doc_string")
        for graph in [*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs]:
            _strip(graph)


def _nodes(left: GraphProto, right: GraphProto) -> Iterator[str]:
    """The nodes that differ: by name, where all have one of their own, and otherwise by their place."""
    sides = [{_key(node, i): node for i, node in enumerate(graph.node)} for graph in (left, right)]
    if any(len({n.name for n in g.node}) < len(g.node) or not all(n.name for n in g.node) for g in (left, right)):
        sides = [{str(i): node for i, node in enumerate(graph.node)} for graph in (left, right)]
    first, second = sides
    for key, node in first.items():
        other = second.get(key)
        if other is None:
            yield f"only in the first: {node.op_type} '{node.name}'"
        elif changed := list(_node_fields(node, other)):
            yield f"{node.op_type} '{node.name}': {', '.join(changed)}"
    yield from (f"only in the second: {n.op_type} '{n.name}'" for key, n in second.items() if key not in first)


def _key(node: NodeProto, index: int) -> str:
    return node.name or str(index)


def _node_fields(left: NodeProto, right: NodeProto) -> Iterator[str]:
    for name in ("op_type", "domain", "input", "output"):
        a, b = getattr(left, name), getattr(right, name)
        if a != b:
            yield f"{name} {_shown(a)} -> {_shown(b)}"
    first, second = ({a.name: a for a in node.attribute} for node in (left, right))
    for name in dict.fromkeys((*first, *second)):
        if first.get(name) != second.get(name):
            yield f"attribute {name}"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else f"[{', '.join(value)}]"


def _tensors(left: OnnxFile, right: OnnxFile, progress: Callable[[float], None]) -> Iterator[TensorDifference]:
    names = list(dict.fromkeys((*left.sources, *right.sources)))
    for index, name in enumerate(names):
        a, b = left.sources.get(name), right.sources.get(name)
        if a is None or b is None:
            yield _described(name, a or b, "only in the " + ("first" if b is None else "second"))
        elif (a.proto.data_type, a.proto.dims) != (b.proto.data_type, b.proto.dims):
            yield _described(name, a, f"{_described(name, b).shape} {_described(name, b).dtype} in the second")
        elif not a.same_bytes(b):
            yield _compared(name, a, b)
        progress((index + 1) / len(names))


def _described(name: str, source: Source | None, what: str = "") -> TensorDifference:
    assert source is not None
    dtype = ir.DataType(source.proto.data_type)
    return TensorDifference(name, tuple(source.proto.dims), dtype.name.lower(), what)


def _compared(name: str, left: Source, right: Source) -> TensorDifference:
    """How far two tensors of one dtype and shape are apart."""
    known = _described(name, left)
    if known.dtype not in ("float", "double", "float16", "bfloat16"):
        return _described(name, left, "its values differ")
    a, b = left.tensor(), right.tensor()
    wide = torch.float64 if a.numel() <= _SMALL or a.dtype.itemsize > 2 else torch.float32
    changed = int((a != b).sum())
    change = b.to(wide, copy=True).sub_(a)
    if not bool(torch.isfinite(change).all()):
        return _described(name, left, "one of them holds NaN or Inf")
    norm = float(torch.linalg.vector_norm(change, dtype=torch.float64))
    size = float(torch.linalg.vector_norm(a, dtype=torch.float64))
    return TensorDifference(
        name,
        known.shape,
        known.dtype,
        changed=changed,
        largest=float(change.abs().max()),
        norm=norm,
        relative=norm / size if size else math.inf,
        rank=None if a.dim() < 2 else _rank(change.flatten(1), a, b),
    )


def _rank(change: Tensor, *stored: Tensor) -> int:
    """How many singular values are larger than those of the numbers' rounding, which may be that of either tensor.

    Errors of up to half a unit in the last place have the deviation u / sqrt(12), and a matrix [m, n] of them a largest
    singular value of about that times sqrt(m) + sqrt(n).
    """
    noise = 1.5 * math.hypot(*map(_unit, stored)) / math.sqrt(12) * sum(map(math.sqrt, change.shape))
    generator = torch.Generator().manual_seed(0)
    _, values, _ = leading_singular(change, _RANKS, 1, generator)
    return int((values > noise).sum())


def _unit(stored: Tensor) -> float:
    """The unit in the last place of its numbers, their mean square's root."""
    limits = torch.finfo(stored.dtype)
    exponents = torch.frexp(stored.double().abs().clamp_min(limits.tiny)).exponent.double() - 1
    return limits.eps * math.sqrt(float(exponents.mul(2).exp2().mean()))
