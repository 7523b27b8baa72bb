"""What reads an initializer of an ONNX graph: how the operator takes it, and to which module the operator belongs."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

import onnx
import onnx_ir as ir

_SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class Use:
    """An operator that reads an initializer, through casts and transposes.

    ``kind`` says how a layer's weight is stored there, as in :data:`lorafx.ops.STORAGE`; it is empty for what is no
    weight of a layer. ``scope`` is the path of the module that the operator belongs to, where the file says.
    """

    node: ir.Node
    kind: str
    scope: str | None

    def __str__(self) -> str:
        where = "" if self.scope is None else f" of module '{self.scope}'"
        return f"{self.node.op_type} '{self.node.name}'{where}"


def uses_of(value: ir.Value, rank: int, transposed: bool = False) -> Iterator[Use]:
    """Who reads a value of this rank: an initializer, or what a cast or a transpose makes of it."""
    for node, index in value.uses():
        op = node.op_type
        if op in ("Identity", "Cast") or (op == "Transpose" and rank == 2 and _swaps(node)):
            yield from uses_of(node.outputs[0], rank, transposed != (op == "Transpose"))
        else:
            yield Use(node, _kind(node, index, rank, transposed), scope_of(node))
    if value.is_graph_output():
        producer = value.producer()
        yield Use(producer or ir.Node("", "the graph's output", [], name=value.name), "", None)


def _swaps(node: ir.Node) -> bool:
    order = node.attributes.get_ints("perm", None)
    return order is None or list(order) == [1, 0]


def _kind(node: ir.Node, index: int, rank: int, transposed: bool) -> str:
    """How a layer's weight is stored that a node reads at this input; nothing if it is none."""
    if node.op_type == "Conv" and index == 1 and not transposed and 3 <= rank <= 5:
        return f"conv{rank - 2}d"
    if rank != 2:
        return ""
    if node.op_type == "Gather" and index == 0 and not transposed and node.attributes.get_int("axis", 0) == 0:
        return "embedding"
    if node.op_type not in ("MatMul", "Gemm", "FusedMatMul") or index > 1:
        return ""
    turned = node.attributes.get_int("transA" if index == 0 else "transB", 0) == 1
    # As the second factor a weight is [in, out], as the first one [out, in]; each transpose turns it.
    return "linear" if (index == 0) != (turned != transposed) else "addmm"


def scope_of(node: ir.Node) -> str | None:
    """The path of the module that a node belongs to: ``encoder.layer.0.attention.self.query``."""
    scopes = node.metadata_props.get(_SCOPES)
    if scopes is not None:
        try:
            found = ast.literal_eval(scopes)
        except (ValueError, SyntaxError):
            return None
        return str(found[-2]) if isinstance(found, list) and len(found) > 1 else ""
    if node.name is None or not node.name.startswith("/"):
        return None
    *atoms, last = node.name.strip("/").split("/")
    if re.sub(r"_\d+$", "", last) != node.op_type:  # ONNX Runtime's fusions write theirs behind the operators' names
        while atoms and onnx.defs.has(re.sub(r"_\d+$", "", atoms[-1])):
            atoms.pop()
    return ".".join(atoms)


def added_to(node: ir.Node) -> ir.Value | None:
    """The initializer that is added to what a layer's node gives."""
    if node.op_type in ("Gemm", "Conv"):
        return node.inputs[2] if len(node.inputs) > 2 else None
    uses = node.outputs[0].uses()
    if len(uses) != 1 or (reader := next(iter(uses))[0]).op_type != "Add":
        return None
    return next((v for v in reader.inputs if v is not None and v.is_initializer()), None)
