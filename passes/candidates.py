"""Candidates: what of a captured graph could be adapted. Changes nothing; the result is data.

A *layer* is every call of a layer's operator (:data:`lorafx.ops.LAYERS`) on a parameter. Calls of one module are one
candidate, named after the module; a functional call on a bare parameter is named after the parameter. A *parameter*
is adapted where it is read, whatever reads it: it stands for code that is none of the layers (stacks of experts,
slices of a fused projection), or for all uses of a tied weight alike.

In ``nn.MultiheadAttention`` the input projection of q, k and v is one parameter, which goes by the name of the
module, and its parts by ``<module>.q``, ``.k`` and ``.v``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.fx import Node

from lorafx.errors import MatchError
from lorafx.graph import CapturedModule, get_path, notes
from lorafx.ir import same_memory
from lorafx.ops import PARAMETERS, STORAGE
from lorafx.passes.layers import find_operands, readers
from lorafx.passes.regions import autocast_regions

#: Operators that move or cast values and compute nothing: a layer behind them makes the output.
_SHAPE_ONLY_NAMES = """
    view reshape slice select squeeze unsqueeze transpose permute t flatten unflatten expand contiguous
    clone alias detach to _to_copy float double half bfloat16 getitem split chunk unbind
"""
_SHAPE_ONLY = frozenset(_SHAPE_ONLY_NAMES.split())

#: The parts of an attention's input projection, in the order in which they are stacked.
_PARTS = ("q", "k", "v")


@dataclass(frozen=True)
class Candidate:
    """What could be adapted.

    ``kind``, ``shape`` and ``rows`` are the site's (:class:`lorafx.ir.Site`). ``nodes`` are the layer's calls, or the
    reads of the parameter. ``names`` are all by which a spec may mean it, ``name`` first; ``elsewhere`` lists the uses
    of its weight that an adapter here would not adapt; ``module`` says whether a linear layer makes the call, rather
    than other code with a parameter; ``is_output`` whether it makes an output of the model.
    """

    name: str
    path: str
    kind: str
    nodes: tuple[Node, ...]
    weight: str
    bias: str | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    module: bool
    is_output: bool
    elsewhere: tuple[str, ...]
    names: tuple[str, ...]
    rows: range | tuple[int, ...] | None = None


def candidates(gm: CapturedModule) -> tuple[Candidate, ...]:
    """Every layer of the graph that could be adapted, in order of first call, and attentions' projections."""
    found: dict[str, Candidate] = {}
    heads = tuple(gm.meta.get("output_layers", ()))
    makers = _output_makers(gm)
    for node in gm.graph.nodes:
        operands = find_operands(node)
        if operands is None:
            continue
        weight_name = str(operands.source.target)
        weight = get_path(gm, weight_name)
        if not isinstance(weight, nn.Parameter):
            continue
        matrix = STORAGE[operands.kind].matrix(weight)
        if matrix.dim() != 2:
            continue
        # A layer's weight used by other code (nn.MultiheadAttention's out_proj) is the layer's site still.
        owner = weight_name.removesuffix(".weight")
        layer = owner != weight_name and getattr(get_path(gm, owner), "kind", "") == "linear"
        owned = layer or weight_name == f"{notes(node).get('scope', '')}.weight"
        name = owner if owned else weight_name
        if name in found:
            known = found[name]
            found[name] = replace(known, nodes=(*known.nodes, node), is_output=known.is_output or node in makers)
            continue
        found[name] = Candidate(
            name=name,
            path=name if owned else f"{name}_adapter",
            kind=operands.kind,
            nodes=(node,),
            weight=weight_name,
            bias=_name_of_parameter(operands.bias),
            shape=tuple(matrix.shape),
            dtype=weight.dtype,
            module=layer,
            is_output=node in makers or any(name == h or name.startswith(h + ".") for h in heads),
            elsewhere=(),
            names=(name,),
        )
    uses = WeightUses(gm)
    layers = [replace(c, elsewhere=uses.beside(c.weight, c.nodes)) for c in found.values()]
    return (*_with_attention(gm, uses, layers),)


def kept_whole(gm: CapturedModule) -> Iterator[tuple[Candidate, str]]:
    """Linear layers in autocast regions that stayed calls (:mod:`.regions`), each with how the model's code says it."""
    seen = {c.weight for c in candidates(gm)}
    heads = tuple(gm.meta.get("output_layers", ()))
    for call, said in autocast_regions(gm.graph):
        for operand in call.all_input_nodes:
            weight = str(operand.target)
            name, _, leaf = weight.rpartition(".")
            if operand.op != "get_attr" or leaf != "weight" or weight in seen:
                continue
            if getattr(get_path(gm, name), "kind", "") == "linear":
                seen.add(weight)
                value: Tensor = get_path(gm, weight)
                head = any(name == h or name.startswith(h + ".") for h in heads)
                shape = tuple(value.shape)
                yield (
                    Candidate(name, name, "linear", (), weight, None, shape, value.dtype, True, head, (), (name,)),
                    said,
                )


def _with_attention(gm: CapturedModule, uses: WeightUses, layers: Sequence[Candidate]) -> Iterator[Candidate]:
    """The layers, with the projections of attention modules under the names that the modules give them."""
    renamed: dict[str, Candidate] = {}
    by_weight = {id(get_path(gm, c.weight)): c for c in layers}
    for module, scope in gm.named_modules():
        if getattr(scope, "kind", "") != "attention":
            continue
        own = {"in_proj_weight": module, **{f"{part}_proj_weight": f"{module}.{part}" for part in _PARTS}}
        for weight, name in own.items():
            value = scope._parameters.get(weight)
            known = by_weight.get(id(value))
            projection = known
            if value is not None and (known is None or known.elsewhere) and uses.reads(value):
                projection = parameter(gm, uses, f"{module}.{weight}")
            if projection is not None:
                path = name if name == module else f"{name}_adapter"
                names = tuple(dict.fromkeys((name, module, f"{module}.{weight}")))
                renamed[projection.weight] = replace(projection, name=name, path=path, names=names)
        out = by_weight.get(id(get_path(scope, "out_proj.weight")))
        if out is not None:
            renamed[out.weight] = replace(out, names=(out.name, module))
    yield from (renamed.pop(c.weight, c) for c in layers)
    yield from renamed.values()


def parts(gm: CapturedModule, uses: WeightUses, whole: Candidate) -> tuple[Candidate, ...]:
    """The q, k and v of an attention's fused input projection, each by itself; of another candidate none."""
    if whole.weight.rpartition(".")[2] != "in_proj_weight" or whole.name == whole.weight:
        return ()
    fused = parameter(gm, uses, whole.weight)
    height = fused.shape[0] // len(_PARTS)
    names = [f"{whole.name}.{part}" for part in _PARTS]
    return tuple(
        replace(
            fused,
            name=name,
            path=f"{name}_adapter",
            names=(name,),
            shape=(height, fused.shape[1]),
            rows=range(i * height, (i + 1) * height),
        )
        for i, name in enumerate(names)
    )


def parameter(gm: CapturedModule, uses: WeightUses, name: str) -> Candidate:
    """A parameter, adapted wherever the graph reads it, under whatever name.

    Two dimensions are ``[out, in]``, three a stack ``[experts, out, in]``, or ``[experts, in, out]`` where the module
    that holds it says ``is_transposed``, as in PEFT.

    Raises:
        MatchError: it has another number of dimensions or no floating-point values, or the graph does not read it.
    """
    value: Tensor = get_path(gm, name)
    if value.dim() not in (2, 3) or not value.is_floating_point():
        raise MatchError(
            f"parameter '{name}' is {value.dtype} of shape {list(value.shape)}: only a floating-point matrix "
            "[out, in], or a stack of them [experts, out, in], can be adapted"
        )
    nodes = uses.reads(value)
    if not nodes:
        raise MatchError(f"parameter '{name}' is never read with these inputs, so an adapter would do nothing there")
    transposed = value.dim() == 3 and getattr(get_path(gm, name.rpartition(".")[0]), "is_transposed", False)
    return _reads(gm, uses, name, "parameter_t" if transposed else "parameter")


def tied(gm: CapturedModule, uses: WeightUses, layer: Candidate) -> Candidate:
    """A layer's weight, adapted in all its uses alike.

    Raises:
        MatchError: another use has a part of the weight's memory only, or is hidden inside a module.
    """
    kind = next(kind for kind, storage in PARAMETERS.items() if storage is STORAGE[layer.kind])
    found = _reads(gm, uses, layer.weight, kind)
    if found.elsewhere:
        raise MatchError(
            f"site '{layer.name}': tied=\"tie\" cannot adapt these uses of '{layer.weight}', which read a part of its "
            f"memory or lie inside a module that is called whole: {'; '.join(found.elsewhere[:3])}. Exclude the layer "
            f"(exclude_modules=['{layer.name}']), or set tied=\"untie\""
        )
    return replace(found, name=layer.name, path=layer.path, bias=layer.bias, names=layer.names, module=layer.module)


def token_rows(gm: CapturedModule, uses: WeightUses, embedding: Candidate, rows: tuple[int, ...]) -> Candidate:
    """Rows of an embedding's weight, in all its uses.

    Raises:
        MatchError: it has no such row.
    """
    found = _reads(gm, uses, embedding.weight, "parameter")
    count, width = found.shape
    if rows and max(rows) >= count:
        raise MatchError(
            f"trainable_token_indices names row {max(rows)} of '{embedding.name}', which has {count} rows (0 to "
            f"{count - 1})"
        )
    name, path, names = embedding.name, embedding.path, embedding.names
    return replace(found, name=name, path=path, names=names, shape=(len(rows), width), rows=rows)


def _reads(gm: CapturedModule, uses: WeightUses, name: str, kind: str) -> Candidate:
    value = get_path(gm, name)
    nodes = uses.reads(value)
    return Candidate(
        name=name,
        path=f"{name}_adapter",
        kind=kind,
        nodes=nodes,
        weight=str(nodes[0].target),
        bias=None,
        shape=tuple(PARAMETERS[kind].matrix(value).shape),
        dtype=value.dtype,
        module=False,
        is_output=False,
        elsewhere=uses.beside(name, nodes),
        names=(name,),
    )


class WeightUses:
    """Who reads each weight's memory: under its own name or an alias, also in modules that the graph calls whole."""

    def __init__(self, gm: CapturedModule) -> None:
        self.gm = gm
        self.holders: dict[int, list[tuple[Tensor, str, Node]]] = {}
        for node in gm.graph.nodes:
            if node.op not in ("get_attr", "call_module"):
                continue
            path = str(node.target)
            held = get_path(gm, path)
            for name, value in held.named_parameters(path) if node.op == "call_module" else [(path, held)]:
                if isinstance(value, Tensor):
                    self.holders.setdefault(value.untyped_storage()._cdata, []).append((value, name, node))

    def _of(self, weight: Tensor) -> list[tuple[Tensor, str, Node]]:
        return self.holders.get(weight.untyped_storage()._cdata, [])

    def reads(self, weight: Tensor) -> tuple[Node, ...]:
        """The nodes that read this very tensor, in graph order."""
        return tuple(n for value, _, n in self._of(weight) if value is weight and n.op == "get_attr")

    def beside(self, weight: str, own: Sequence[Node]) -> tuple[str, ...]:
        """Descriptions of the uses of a weight other than by these nodes: its calls, or all reads of it."""
        tensor = get_path(self.gm, weight)
        found = []
        for value, name, node in self._of(tensor):
            if node in own or not same_memory(tensor, value):
                continue
            users = readers(node) if node.op == "get_attr" else [node]
            found += [_describe(user, name) for user in users if user not in own]
        return tuple(dict.fromkeys(found))

    def writes(self, weight: str) -> tuple[str, ...]:
        """Descriptions of the operators that change a weight in place (an embedding's max_norm)."""
        found = []
        for _, name, node in self._of(get_path(self.gm, weight)):
            for user in readers(node) if node.op == "get_attr" else ():
                schema = getattr(user.target, "_schema", None)
                if schema is not None and schema.is_mutable:
                    found.append(_describe(user, name))
        return tuple(found)


def _describe(node: Node, weight: str) -> str:
    scope = notes(node).get("scope") or "the model's own forward"
    return f"{node.target} in '{scope}' (as '{weight}')"


def _output_makers(gm: CapturedModule) -> set[Node]:
    """Nodes that make an output of the graph with nothing but shape changes and casts after them."""
    makers: set[Node] = set()
    pending = list(gm.graph.output_node().all_input_nodes)
    while pending:
        node = pending.pop()
        if find_operands(node) is not None:
            makers.add(node)
        name = getattr(getattr(node.target, "overloadpacket", None), "__name__", getattr(node.target, "__name__", ""))
        if name in _SHAPE_ONLY or (node.op == "call_method" and node.target in _SHAPE_ONLY):
            pending += [a for a in node.args[:1] if isinstance(a, Node)]
    return makers


def _name_of_parameter(node: Node | None) -> str | None:
    return str(node.target) if node is not None and node.op == "get_attr" else None
