"""Tell from one capture in train mode that eval mode would give the same graph and need not be traced.

While the model is traced, every read of a module's ``training`` flag is noted with the line that made
it. A read is harmless when the line shows that nothing follows from it on this module:

    dropout(x, p, training=self.training)          # whatever follows is in the graph: p and the flag
    0.0 if not self.training else self.p           # both branches have the same value here
    self.gradient_checkpointing and self.training  # the other operand is false here

If every read is harmless and the graph holds nothing random and no update of a buffer, the modes agree.
"""

from __future__ import annotations

import ast
import functools
import linecache
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node

aten = torch.ops.aten

_TORCH = str(Path(torch.__file__).parent)
#: torch's own layers that hand the flag to one operator, where the graph shows it.
_PASS_ON = tuple(f"{_TORCH}/nn/modules/{name}.py" for name in ("dropout", "batchnorm", "instancenorm"))


@dataclass
class ModeReads:
    """The reads of ``training`` in one trace; ``decisive`` are those that may have changed the graph."""

    decisive: list[str] = field(default_factory=list)

    def note(self, module: nn.Module, frame: FrameType) -> None:
        """Judge one read."""
        filename, line = frame.f_code.co_filename, frame.f_lineno
        if filename.startswith(_TORCH):
            if filename.startswith(f"{_TORCH}/nn/modules/") and filename not in _PASS_ON:
                self.decisive.append(f"{filename}:{line}")
        elif not _harmless(module, filename, frame.f_code.co_firstlineno, line):
            self.decisive.append(f"{filename}:{line}")


@contextmanager
def watch_mode_reads() -> Iterator[ModeReads]:
    """Note every read of any module's ``training`` flag within the block."""
    reads = ModeReads()

    def read(module: nn.Module) -> bool:
        reads.note(module, sys._getframe(1))
        return bool(module.__dict__["training"])

    def write(module: nn.Module, value: bool) -> None:
        module.__dict__["training"] = value

    # A property of the class is found before the instance's own attribute of that name.
    nn.Module.training = property(read, write)  # type: ignore[assignment]
    try:
        yield reads
    finally:
        del nn.Module.training


def same_in_eval(graph: Graph) -> bool:
    """Whether a graph captured in train mode has no operator that eval mode would switch off.

    Dropouts that drop nothing are written as switched off, in place.
    """
    for node in graph.nodes:
        if node.target is aten.dropout.default and node.args[1] == 0.0:
            node.args = (node.args[0], 0.0, False)
        elif node.target is aten.scaled_dot_product_attention.default:
            if (len(node.args) > 4 and node.args[4] != 0.0) or node.kwargs.get("dropout_p", 0.0) != 0.0:
                return False
        elif node.op == "call_module" or _is_random(node) or _writes_attribute(node):
            return False
    return True


def _is_random(node: Node) -> bool:
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    if node.target is aten.dropout.default:
        return bool(node.args[2])
    return random or _name(node) in ("batch_norm", "instance_norm", "feature_dropout", "alpha_dropout")


def _writes_attribute(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    first = node.args[0] if node.args else None
    return bool(schema and schema.is_mutable and isinstance(first, Node) and first.op == "get_attr")


def _name(node: Node) -> str:
    return str(getattr(getattr(node.target, "overloadpacket", None), "__name__", ""))


def _harmless(module: nn.Module, filename: str, first_line: int, line: int) -> bool:
    tree = _function(filename, first_line)
    if tree is None:
        return False
    parents = {child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
    reads = [
        n
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute) and n.attr == "training" and n.lineno <= line <= (n.end_lineno or 0)
    ]
    return bool(reads) and all(_judge(module, read, parents) for read in reads)


@functools.lru_cache(maxsize=512)
def _function(filename: str, first_line: int) -> ast.AST | None:
    """The syntax tree of the function that starts at a line, with the file's line numbers."""
    lines = linecache.getlines(filename)[first_line - 1 :]
    if not lines:
        return None
    indent = len(lines[0]) - len(lines[0].lstrip())
    body = [lines[0]]
    for text in lines[1:]:
        closing = text.lstrip().startswith((")", "]"))
        if text.strip() and len(text) - len(text.lstrip()) <= indent and not closing:
            if not body[-1].lstrip().startswith("@") and not text.lstrip().startswith("def "):
                break
            if text.lstrip().startswith("def ") and any(t.lstrip().startswith("def ") for t in body):
                break
        body.append(text)
    try:
        tree = ast.parse(textwrap.dedent("".join(body)))
    except SyntaxError:
        return None
    return ast.increment_lineno(tree, first_line - 1)


def _judge(module: nn.Module, read: ast.Attribute, parents: dict[ast.AST, ast.AST]) -> bool:
    parent = parents.get(read)
    if isinstance(parent, ast.keyword) and parent.arg == "training":
        call = parents.get(parent)
        return isinstance(call, ast.Call) and ast.unparse(call.func).endswith(("dropout", "batch_norm"))
    if isinstance(parent, ast.UnaryOp) and isinstance(parent.op, ast.Not):
        parent = parents.get(parent)
    owner = ast.unparse(read.value)
    if isinstance(parent, ast.IfExp):
        values = [_value(module, owner, branch) for branch in (parent.body, parent.orelse)]
        return _UNKNOWN not in values and values[0] == values[1]
    if isinstance(parent, ast.BoolOp) and isinstance(parent.op, ast.And):
        values = [_value(module, owner, v) for v in parent.values if "training" not in ast.unparse(v)]
        return any(v is not _UNKNOWN and not v for v in values)
    return False


_UNKNOWN: Any = object()


def _value(module: nn.Module, owner: str, expression: ast.expr) -> Any:
    """The value of a literal, or of an attribute path of the module itself; otherwise unknown."""
    if isinstance(expression, ast.Constant):
        return expression.value
    path = ast.unparse(expression)
    if not path.startswith(f"{owner}.") or not path.replace(".", "").replace("_", "").isalnum():
        return _UNKNOWN
    value: Any = module
    for atom in path[len(owner) + 1 :].split("."):
        value = getattr(value, atom, _UNKNOWN)
    return value if isinstance(value, (bool, int, float, str, type(None))) else _UNKNOWN
