"""Adapters as optional inputs of an ONNX graph: where they enter, and what an adapter gives them.

    y = MatMul(x, W)          y = MatMul(x, W)
    z = Add(y, b)             s = MatMul(x, <q.lora_A>)        # [in, r], without an adapter [in, 0]
                        ->    u = MatMul(s, <q.lora_B>)        # [r, out], the scaling in it; without one [0, 1]
                              z = Add(Add(y, u), b)            # with a gain: Add(Mul(Add(y, u), <q.lora_gain>), b)

The weight stays a constant, which ONNX Runtime packs when it loads the file, and the bias stays next to what reads the
layer (a GELU, a norm), with which ONNX Runtime fuses it. An embedding's first product is a Gather, a convolution's are
convolutions. Whatever else an adapter changes is an input as a whole whose default is the base's tensor: what it trains
a copy of, bare parameters, convolutions in groups.

A layer is found by the number of its call, which nodes have from the translation, and held to the weight that it
should read: by structure, never by shapes or names of nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.fx import Graph, Node

from lorafx.errors import ExportError
from lorafx.export.input_names import GAIN, SHIFT, WHOLE, A, B, Naming, rank_size, width_size
from lorafx.export.pack import AROUND
from lorafx.export.repeat import CALL, number_calls
from lorafx.export.translate import Translation
from lorafx.export.weights import fill
from lorafx.graph import CapturedModule, get_path, notes
from lorafx.ir import Adapter, Site, adapters
from lorafx.kernels.rounding import round_once
from lorafx.ops import LAYERS, updates
from lorafx.passes.fold import Fold, scaled_rows
from lorafx.passes.layers import arguments_of
from lorafx.passes.residual import plain_factors
from lorafx.variants import VARIANTS

_PRODUCTS = frozenset({"MatMul", "Gemm", "Gather", "Conv", "MatMulBnb4"})
_THROUGH = frozenset({"Transpose", "Cast", "Identity"})


@dataclass(frozen=True)
class Branch:
    """The optional inputs of one layer: their names by role; ``GAIN`` and ``SHIFT`` only where an adapter has one.

    ``shape`` is the weight's as torch stores it; ``calls`` are the numbers of the layer's calls.
    """

    site: Site
    shape: tuple[int, ...]
    calls: tuple[int, ...]
    inputs: Mapping[str, str]

    def stored(self, role: str, tensor: Tensor) -> Tensor:
        """A tensor of an update as its input has it: ``right`` for A, ``left`` for B, or a vector ``[out]``."""
        if not self.site.kind.startswith("conv"):
            return tensor.t() if role in (A, B) else tensor
        ones = [1] * (len(self.shape) - 2)
        return tensor.reshape(-1, *self.shape[1:]) if role == A else tensor.reshape(*tensor.shape, *ones)

    def empty(self, role: str) -> Tensor:
        """The default: what changes nothing. B has one column, whose zeros are added to all: fewer to write."""
        out, columns = self.site.shape
        if role == A:
            return torch.zeros(0, *self.shape[1:]) if self.site.kind.startswith("conv") else torch.zeros(columns, 0)
        return self.stored(role, {B: torch.zeros(1, 0), GAIN: torch.ones(out), SHIFT: torch.zeros(out)}[role])

    def declared(self, role: str) -> ir.Shape:
        """The shape of an input: the rank is the adapter's to say, and B's width is 1 where there is none."""
        sizes: list[int | str] = list(self.empty(role).shape)
        if role == A:
            sizes[self.rank_dim] = self.rank
        elif role == B:
            sizes[self.rank_dim], sizes[1 - self.rank_dim] = self.width, self.rank
        return ir.Shape(sizes)

    @property
    def rank(self) -> str:
        """What the size of A and B that they share is called."""
        return rank_size(self.site.name)

    @property
    def width(self) -> str:
        """What B's other size is called."""
        return width_size(self.site.name, self.site.shape[0])

    @property
    def rank_dim(self) -> int:
        """Which dimension of A is the rank; B's is the other one of the first two."""
        return 0 if self.site.kind.startswith("conv") else 1

    @property
    def along(self) -> int:
        """Which dimension of the layer's result the rank and the width take."""
        return 1 if self.site.kind.startswith("conv") else -1


@dataclass(frozen=True)
class Inputs:
    """What some adapters need of a graph: branches, by layer, and tensors that are inputs as a whole."""

    branches: Mapping[str, Branch]
    whole: tuple[str, ...]


def find_inputs(
    gm: CapturedModule,
    graph: CapturedModule,
    names: Iterable[str],
    naming: Naming,
    made: Mapping[str, Sequence[Node]],
) -> Inputs:
    """What adapters need.

    Args:
        gm: the graph that holds the adapters.
        graph: the one for inference that is translated, without adapters.
        names: the adapters.
        naming: what to call inputs.
        made: the calls of each layer, in a graph whose nodes have the names of those in ``graph``.

    Raises:
        ExportError: what an adapter changes cannot be an input (names the site), or two inputs have one name.
    """
    numbers = _numbers(graph)
    nodes = {node.name: node for node in graph.graph.nodes}
    calls = {layer: [nodes[n.name] for n in found if n.name in nodes] for layer, found in made.items()}
    roles: dict[str, dict[str, None]] = {}
    first: dict[str, Site] = {}
    whole: dict[str, None] = {}
    for name in names:
        adapter = adapters(gm)[name]
        whole |= dict.fromkeys(adapter.trained)
        for site in (s for s in adapter.sites if s.r > 0):
            there = calls.get(site.layer, [])
            if site.kind in LAYERS and not there:
                continue  # a call that only served the loss
            if not _has_branch(site, there):
                if site.apart:
                    raise ExportError(
                        f"site '{site.name}' (adapter '{name}'): a weight of this kind is an input as a whole, and "
                        f"'{site.weight}' has another use, which would change too. Use merge_and_export instead"
                    )
                whole[site.weight] = None
                continue
            first.setdefault(site.layer, site)
            mine = roles.setdefault(site.layer, {A: None, B: None})
            variant = VARIANTS[site.variant]
            mine |= dict.fromkeys([*([GAIN] if variant.scales_rows else []), *([SHIFT] if variant.shifts_bias else [])])
    branches = {
        layer: Branch(
            site,
            tuple(get_path(gm, site.weight).shape),
            tuple(numbers[node] for node in calls[layer]),
            {role: naming(site.name, role) for role in (A, B, GAIN, SHIFT) if role in roles[layer]},
        )
        for layer, site in first.items()
    }
    for name in whole:
        naming(name, WHOLE)
    taken: dict[str, str] = {}
    for branch in branches.values():
        for input_name in branch.inputs.values():
            if (other := taken.setdefault(input_name, branch.site.name)) != branch.site.name:
                raise ExportError(f"sites '{other}' and '{branch.site.name}' would both have an input '{input_name}'")
    return Inputs(branches, tuple(whole))


def _has_branch(site: Site, calls: Sequence[Node]) -> bool:
    if site.kind not in LAYERS or site.rows is not None or len(site.shape) != 2:
        return False
    return not site.kind.startswith("conv") or all((arguments_of(node) or (0,))[-1] == 1 for node in calls)


def _numbers(gm: CapturedModule) -> dict[Node, int]:
    """The number of each call, as the translation counts."""
    copies: dict[Node, Node] = {}
    graph = Graph()
    graph.graph_copy(gm.graph, copies)
    number_calls(graph)
    return {node: number for node, copy in copies.items() if (number := notes(copy).get("call")) is not None}


def insert_inputs(translation: Translation, graph: CapturedModule, inputs: Inputs) -> dict[str, tuple[ir.Value, ...]]:
    """Add the inputs to a translated model, in place; returns the values that stand for each whole tensor.

    Raises:
        ExportError: a layer's nodes, or a tensor, are not in the model as they should be (names the site).
    """
    model = translation.model.graph
    by_call: dict[int, list[ir.Node]] = {}
    for node in model:
        if (number := node.meta.get(CALL)) is not None:
            by_call.setdefault(number, []).append(node)
    known = {id(get_path(graph, name)): value for name, value in translation.weights.items()}
    known |= {id(get_path(graph, name)): weight.values[0] for name, weight in translation.packed.items()}
    taken = {*model.initializers, *(str(v.name) for v in model.inputs)}
    for branch in inputs.branches.values():
        if both := taken.intersection(branch.inputs.values()):
            raise ExportError(f"site '{branch.site.name}': the model has a tensor '{both.pop()}' already")
        weight = known.get(id(get_path(graph, branch.site.weight)))
        products = [_product(branch, by_call.get(number, []), weight, translation) for number in branch.calls]
        values = _optional(model, branch, _around(products[0])[1].dtype)
        for index, product in enumerate(products):
            suffix = f"_{index}" if index else ""
            _insert(branch, product, values, suffix, model)
    return {name: _stand_for(translation, known.get(id(get_path(graph, name))), name) for name in inputs.whole}


def _product(branch: Branch, nodes: Sequence[ir.Node], weight: ir.Value | None, translation: Translation) -> ir.Node:
    """The node that multiplies by the weight in one call of a layer."""
    made = {weight, *(f.value for f in translation.folded if weight in f.inputs)} - {None}
    found = [n for n in nodes if n.op_type in _PRODUCTS and _source(n.inputs[_weight_at(n)]) in made]
    plain = [n for n in found if all(n.attributes.get_float(a, 1.0) == 1.0 for a in ("alpha", "beta"))]
    if len(found) != 1 or plain != found or found[0].attributes.get_int("transA", default=False):
        there = ", ".join(f"{n.op_type} '{n.name}'" for n in nodes) or "nothing"
        raise ExportError(
            f"site '{branch.site.name}': expected one product with '{branch.site.weight}' where the layer is called, "
            f"and the graph has {there}. Use merge_and_export for an adapter of this layer"
        )
    return found[0]


def _weight_at(product: ir.Node) -> int:
    return 0 if product.op_type == "Gather" else 1


def _around(product: ir.Node) -> tuple[ir.Value | None, ir.Value]:
    """What a product multiplies the weight by, and its result; of a packed one, as the dense graph has them."""
    if AROUND in product.meta:
        found: tuple[ir.Value | None, ir.Value] = product.meta[AROUND]
        return found
    return product.inputs[1 if product.op_type == "Gather" else 0], product.outputs[0]


def _source(value: ir.Value | None) -> ir.Value | None:
    while value is not None and (node := value.producer()) is not None and node.op_type in _THROUGH:
        value = node.inputs[0]
    return value


def _optional(model: ir.Graph, branch: Branch, dtype: ir.DataType | None) -> dict[str, ir.Value]:
    """Add the inputs of a branch, with their defaults."""
    assert dtype is not None
    values = {}
    for role, name in branch.inputs.items():
        default = branch.empty(role)
        value = ir.Value(name=name, shape=branch.declared(role), type=ir.TensorType(dtype))
        value.const_value = ir.tensor(default.numpy().astype(dtype.numpy()), dtype=dtype, name=name)
        model.inputs.append(value)
        model.register_initializer(value)
        values[role] = value
    return values


def _insert(branch: Branch, product: ir.Node, values: Mapping[str, ir.Value], suffix: str, model: ir.Graph) -> None:
    """Add the branch to one call of the layer."""
    name = branch.site.name
    x, raw = _around(product)
    made = raw.producer()
    assert made is not None
    where = made

    def add(op: str, label: str, inputs: Sequence[ir.Value | None], *, kept: bool = False) -> ir.Value:
        nonlocal where
        attributes = product.attributes.values() if kept else ()
        node = ir.Node("", op, inputs, attributes, name=f"{name}/{label}{suffix}")
        (made,) = node.outputs
        made.name, made.type, made.shape = node.name, raw.type, raw.shape
        model.insert_after(where, node)
        where = node
        return made

    conv, gather = product.op_type == "Conv", product.op_type == "Gather"
    bias = None
    if GAIN in values and not product.domain and len(product.inputs) > 2:  # else it may stay in the product
        bias = product.inputs[2]
        product.resize_inputs(2)
    readers = list(raw.uses())
    if gather:
        narrow = add("Gather", A, [values[A], x], kept=True)
    else:
        narrow = add("Conv" if conv else "MatMul", A, [x, values[A]], kept=conv)
    narrow.shape = _replaced(raw.shape, branch.along, branch.rank)
    wide = add("Conv" if conv else "MatMul", B, [narrow, values[B]])
    wide.shape = _replaced(raw.shape, branch.along, branch.width)
    result = add("Add", "lora", [raw, wide])
    if GAIN in values:
        result = add("Mul", GAIN, [result, values[GAIN]])
    if bias is not None:
        result = add("Add", "bias", [result, _along(model, bias, raw, conv, f"{name}{suffix}")])
    if SHIFT in values:
        result = add("Add", SHIFT, [result, values[SHIFT]])
    _redirect(model, raw, result, readers)


def _replaced(shape: ir.Shape | None, axis: int, size: str) -> ir.Shape | None:
    if shape is None:
        return None
    sizes: list[int | str | ir.SymbolicDim] = list(shape)
    sizes[axis] = size
    return ir.Shape(sizes)


def _along(model: ir.Graph, bias: ir.Value, like: ir.Value, conv: bool, name: str) -> ir.Value:
    """A bias that a product had as an operand, so that it can be added: a convolution's along the channels."""
    if not conv:
        return bias
    dims = list(range(1, len(like.shape or ()) - 1))
    axes = ir.Value(name=f"{name}.bias_axes", shape=ir.Shape([len(dims)]), type=ir.TensorType(ir.DataType.INT64))
    axes.const_value = ir.tensor(np.array(dims, np.int64), name=axes.name)
    model.register_initializer(axes)
    node = ir.Node("", "Unsqueeze", [bias, axes], name=f"{name}/bias_axes")
    (made,) = node.outputs
    made.name, made.type = node.name, like.type
    model.insert_before(model[0], node)
    return made


def _redirect(model: ir.Graph, old: ir.Value, new: ir.Value, readers: Iterable[tuple[ir.Node, int]]) -> None:
    """Let these readers of a value, and the graph's outputs, have another one, which takes its name there."""
    for node, index in readers:
        node.replace_input_with(index, new)
    for index, output in enumerate(model.outputs):
        if output is old:
            model.outputs[index] = new
            new.name, old.name = old.name, f"{old.name}/base"
            new.shape, new.type = old.shape, old.type


def _stand_for(translation: Translation, weight: ir.Value | None, name: str) -> tuple[ir.Value, ...]:
    """Make the initializers that are made of a tensor optional inputs."""
    made = {weight}
    for expression in translation.folded:
        if made.intersection(expression.inputs):
            made.add(expression.value)
    graph = translation.model.graph
    found = tuple(v for v in graph.initializers.values() if v in made and (v.uses() or v.is_graph_output()))
    if weight is None or not found:
        return ()  # no output depends on it
    for value in found:
        if value not in graph.inputs:
            graph.inputs.append(value)
    return found


def adapter_values(
    gm: CapturedModule,
    name: str,
    graph: CapturedModule,
    translation: Translation,
    inputs: Inputs,
    whole: Mapping[str, tuple[ir.Value, ...]],
    source: Callable[[str], Fold | Tensor],
) -> dict[str, ir.TensorProtocol]:
    """What an adapter gives the inputs, by their names; those that it leaves out have the default.

    Args:
        gm: a graph in which this adapter alone is active.
        name: the adapter.
        graph, translation, inputs: as for :func:`find_inputs` and :func:`insert_inputs`, and what they returned.
        whole: the values that stand for whole tensors.
        source: the base's tensors, which weights of the translation are filled with again.

    Raises:
        MergeError: the adapter holds NaN or Inf; or the base was overwritten after apply.
    """
    adapter = adapters(gm)[name]
    found: dict[str, ir.TensorProtocol] = {}
    own: dict[int, Tensor | Fold] = {
        id(get_path(graph, n)): get_path(gm, adapter.own_name(n)).detach() for n in adapter.trained
    }
    for site in (s for s in adapter.sites if s.r > 0):
        weight = get_path(gm, adapter.own_name(site.weight) if site.weight in adapter.residual else site.weight)
        fold = Fold.of(gm, [site], weight.detach())  # looks for NaN, and for a base that has changed
        branch = inputs.branches.get(site.layer)
        if branch is not None:
            for role, tensor in _factors(gm, adapter, site, fold).items():
                value = translation.model.graph.initializers[branch.inputs[role]]
                assert value.dtype is not None
                dtype = ir.tensor_adapters.to_torch_dtype(value.dtype)
                stored = round_once(branch.stored(role, tensor), dtype).contiguous().cpu()
                found[branch.inputs[role]] = ir.tensor_adapters.TorchTensor(stored, name=branch.inputs[role])
        elif site.weight in whole:
            here = [s for s in adapter.sites if s.weight == site.weight]
            own[id(get_path(graph, site.weight))] = Fold.of(gm, here, weight.detach())
    if own:
        fill(translation.weights, translation.folded, lambda n: own.get(id(get_path(graph, n)), source(n)))
        for tensor_name, values in whole.items():
            if id(get_path(graph, tensor_name)) in own:
                for value in values:
                    assert value.const_value is not None
                    found[str(value.name)] = ir.tensor(value.const_value.numpy().copy(), dtype=value.dtype)
        fill(translation.weights, translation.folded, source)
    return found


def _factors(gm: CapturedModule, adapter: Adapter, site: Site, fold: Fold) -> dict[str, Tensor]:
    """A site's update of the original weight, by role, in float32 or better."""
    (tensors,) = fold.tensors
    wide = torch.float64 if fold.weight.dtype.itemsize >= 4 else torch.float32
    matrix = site.matrix(fold.weight)
    if VARIANTS[site.variant].scales_rows:
        update = scaled_rows(site, matrix, tensors, wide)
    else:
        (update,) = updates(matrix, [t.to(wide) for t in tensors], [site.variant], [site.scaling])
    left, right = update.left, update.right
    if site.weight in adapter.residual:
        a, b = plain_factors(gm, adapter, site)
        left, right = b.to(wide) * site.scaling, a.to(wide)
    found = {A: right, B: left, GAIN: update.gain, SHIFT: update.shift}
    return {role: tensor.to(wide) for role, tensor in found.items() if tensor is not None}
