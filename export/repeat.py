"""Repeated blocks of a graph, such as a transformer's layers: taken out before it is translated, put back after.

    embed, L0, L1, ... L31, head --drop--> embed, L0, L1, L2, head --translate--> ONNX --unroll--> all of it

Translating a block again for each repetition takes nearly all the time, and gives the same nodes with other weights. So
a run of equal blocks is translated shortened, and the blocks that miss are copies of one of its nodes. Blocks are
equal if they call the same operators with the same literals on values of their own, of the block before, or on the
very same ones from elsewhere; and on weights of their own that differ in nothing but their values.

This is decided twice, by the same comparison (:class:`_Sequence`): on the torch graph, and again on the optimised ONNX
graph, where copies go after the second to last block if the last came out like it, types and shapes included. Whatever
the one before the last led to, the last led to as well, and so would one more. Where they differ nothing is copied, and
the caller translates the whole graph.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate

from lorafx.graph import annotate, get_path, notes

#: How many blocks of a run stay: two that must come out alike in ONNX, after one that may compute something for all.
KEPT = 3

#: Where the number of the call that an ONNX node comes from is kept in its ``meta``.
CALL = "lorafx.call"


@dataclass(frozen=True)
class Repeat:
    """A run of equal blocks of ``period`` calls in a torch graph, of which the last ``dropped`` are taken out.

    The run is the calls ``[start, stop)``, numbered through the whole graph. ``names[r - 1]`` maps the name of each
    tensor of a block to that of its counterpart ``r`` blocks later.
    """

    start: int
    stop: int
    period: int
    dropped: int
    names: tuple[Mapping[str, str], ...]


@dataclass(frozen=True)
class _Sequence:
    """Operators in order, of a torch or an ONNX graph, ready to be compared.

    ``keys[i]`` is all there is to say about an operator but for its operands. An operand is a position and an output,
    or what identifies a value that no operator computes. ``returned`` are the positions whose values the graph returns.
    ``steps(a, b, period)`` says whether such a value is to another what a block's weight is to the next block's.
    """

    keys: Sequence[Hashable]
    operands: Sequence[Sequence[Hashable]]
    returned: Collection[int]
    steps: Callable[[Hashable, Hashable, int], bool]

    def runs(self, period: int, low: int, high: int) -> Iterator[tuple[int, int]]:
        """The stretches within ``[low, high)`` that repeat with this period: start, stop."""
        start = low
        for i in range(low, high - period + 1):
            if i == high - period or not self._alike(i, period):
                if i > start:
                    yield self._closed(start, i + period, period), i + period
                start = i + 1

    def _alike(self, position: int, period: int) -> bool:
        """Whether an operator is to the one a period later as it must be in a run."""
        later = position + period
        return self.keys[position] == self.keys[later] and all(
            a == b
            or (
                a[1] == b[1] and b[0] - a[0] == period and position - a[0] <= period
                if isinstance(a, tuple) and isinstance(b, tuple)
                else self.steps(a, b, period)
            )
            for a, b in zip(self.operands[position], self.operands[later], strict=True)
        )

    def _closed(self, start: int, stop: int, period: int) -> int:
        """Where a stretch must start so that what comes after it reads its last block only."""
        operands = (o for after in self.operands[stop:] for o in after)
        read = {*(o[0] for o in operands if isinstance(o, tuple)), *self.returned}
        return max((p + 1 for p in read if start <= p < stop - period), default=start)


# In the torch graph.


def number_calls(graph: Graph) -> None:
    """Note on each call of a graph which one it is."""
    for index, node in enumerate(_calls(graph)):
        annotate(node, call=index)


def find_repeats(graph: Graph, root: nn.Module, weights: Collection[str]) -> list[Repeat]:
    """The runs of more than :data:`KEPT` equal blocks, in order.

    Args:
        graph: a graph for inference.
        root: holds its tensors.
        weights: the names of those whose values may be anything, and are not read.
    """
    sequence, tensors = _torch_sequence(graph, root, weights)
    numbers: dict[Hashable, int] = {}
    ids = np.array([numbers.setdefault(key, len(numbers)) for key in sequence.keys], dtype=np.int64)
    found: list[Repeat] = []
    places = [(0, len(ids))]
    while places:
        low, high = places.pop()
        best = _best_run(sequence, ids, low, high)
        if best is None:
            continue
        period, start, stop = best
        places += [(low, start), (stop, high)]
        dropped = (stop - start) // period - KEPT
        names = tuple(_renamed(tensors[start:stop], step * period) for step in range(1, dropped + 1))
        if names[0]:  # blocks without tensors of their own could not be told apart in ONNX
            found.append(Repeat(start, stop, period, dropped, names))
    return sorted(found, key=lambda repeat: repeat.start)


def drop_repeats(graph: Graph, repeats: Iterable[Repeat]) -> None:
    """Take the last blocks of each run out of a numbered graph; what read the last one reads the last that stays."""
    calls = _calls(graph)
    for repeat in repeats:
        stop, shift = repeat.stop, repeat.dropped * repeat.period
        last = calls[stop - repeat.period : stop]
        for node, twin in zip(last, calls[stop - repeat.period - shift : stop - shift], strict=True):
            node.replace_all_uses_with(twin, lambda user, stop=stop: notes(user).get("call", stop) >= stop)  # type: ignore[misc]
        for node in reversed(calls[stop - shift : stop]):
            graph.erase_node(node)
    for node in graph.find_nodes(op="get_attr"):
        if not node.users:
            graph.erase_node(node)


def _calls(graph: Graph) -> list[Node]:
    return [n for n in graph.nodes if n.op not in ("placeholder", "get_attr", "output")]


def _best_run(sequence: _Sequence, ids: npt.NDArray[np.int64], low: int, high: int) -> tuple[int, int, int] | None:
    """Period, start and stop of the run within ``[low, high)`` that spares most calls."""

    def spared(length: int, period: int) -> int:
        return (length // period - KEPT) * period

    part = ids[low:high]
    bounds = {}  # by the keys alone, which is quick
    for period in range(1, len(part) // (KEPT + 1) + 1):
        bounds[period] = spared(_longest(part[:-period] == part[period:]) + period, period)
    best, most = None, 0
    for period, bound in sorted(bounds.items(), key=lambda item: (-item[1], item[0])):
        if bound <= most:
            break
        for start, stop in sequence.runs(period, low, high):
            if spared(stop - start, period) > most:
                best, most = (period, start, stop), spared(stop - start, period)
    return best


def _longest(equal: npt.NDArray[np.bool_]) -> int:
    """The length of the longest stretch of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], equal.astype(np.int8), [0]))))
    return int((edges[1::2] - edges[::2]).max(initial=0))


def _torch_sequence(
    graph: Graph, root: nn.Module, weights: Collection[str]
) -> tuple[_Sequence, list[list[tuple[str, int] | None]]]:
    """A torch graph to compare; and which of each call's operands are tensors of the model, by name and identity."""
    calls = _calls(graph)
    position = {node: index for index, node in enumerate(calls)}
    held = {node: get_path(root, str(node.target)) for node in graph.find_nodes(op="get_attr")}
    kinds = {node: _kind(value, str(node.target) in weights) for node, value in held.items()}
    uses: dict[Hashable, list[int]] = defaultdict(list)
    keys: list[Hashable] = []
    operands: list[list[Hashable]] = []
    tensors: list[list[tuple[str, int] | None]] = []
    for index, node in enumerate(calls):
        given: list[Node] = []

        def place(argument: object, given: list[Node] = given) -> str:
            if isinstance(argument, Node):
                given.append(argument)
                return f"<{kinds.get(argument, '')}>"
            return repr(argument)

        form = map_aggregate((node.args, dict(node.kwargs)), place)
        keys.append((node.op, node.target, str(form)))
        operands.append([(position[o], 0) if o in position else id(held.get(o, o)) for o in given])
        tensors.append([(str(o.target), id(held[o])) if o in held else None for o in given])
        for operand in operands[-1]:
            uses[operand].append(index)
    results = graph.output_node().all_input_nodes
    for node in results:
        uses[id(held.get(node, node))].append(len(calls))

    def steps(a: Hashable, b: Hashable, period: int) -> bool:
        """Each used by one block only, in the same places: not shared, not tied to another."""
        return uses[a][-1] - uses[a][0] < period and [i + period for i in uses[a]] == uses[b]

    return _Sequence(keys, operands, {position[n] for n in results if n in position}, steps), tensors


def _kind(held: object, weight: bool) -> str:
    """All of a tensor that a translation depends on: a constant's value is part of it, a weight's is not."""
    if not isinstance(held, Tensor):
        return f"module {id(held)}"
    value = "weight"
    if not weight:
        data = held.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        value = hashlib.sha256(data.tobytes()).hexdigest()
    return f"{value} {held.dtype} {list(held.shape)}"


def _renamed(tensors: Sequence[Sequence[tuple[str, int] | None]], shift: int) -> dict[str, str]:
    """The names of a run's tensors, to those of their counterparts so many calls later."""
    return {
        a[0]: b[0]
        for before, after in zip(tensors, tensors[shift:], strict=False)
        for a, b in zip(before, after, strict=True)
        if a is not None and b is not None and a[1] != b[1]
    }


# In the ONNX graph.


def unroll(graph: ir.Graph, repeats: Iterable[Repeat]) -> bool:
    """Put back what :func:`drop_repeats` took out, as copies of nodes, in place.

    Args:
        graph: translated and optimised; its nodes have their call's number in ``meta[CALL]``, where it is known.
            Weights are initializers under their own names.
        repeats: the runs.

    Returns:
        whether that could be done; if not, the graph is of no use.
    """
    return all(_unroll(graph, repeat) for repeat in repeats)


def _unroll(graph: ir.Graph, repeat: Repeat) -> bool:
    found = _last_two_blocks(graph, repeat)
    if found is None:
        return False
    block, last = found
    tensors: dict[str, ir.Value] = {}

    def tensor(value: ir.Value, step: int) -> ir.Value:
        """What a block has for ``value`` of the one ``step`` blocks before it."""
        name = repeat.names[step - 1][str(value.name)]
        if name not in tensors:
            tensors[name] = ir.Value(name=name, type=value.type, shape=value.shape, const_value=value.const_value)
        return tensors[name]

    # Where the last block finds a value: in the block before it (0) or in itself (1), at which node and output.
    places = {v: (n, i, j) for n, b in enumerate(found) for i, node in enumerate(b) for j, v in enumerate(node.outputs)}
    blocks = [[node.outputs for node in block]]
    for step in range(1, repeat.dropped + 1):
        blocks.append([])
        for node, twin in zip(block, last, strict=True):
            given: list[ir.Value | None] = []
            for mine, its in zip(node.inputs, twin.inputs, strict=True):
                if mine is None or its is None or mine is its:
                    given.append(mine)
                elif its in places:
                    own, i, j = places[its]
                    given.append(blocks[step - 1 + own][i][j])
                else:
                    given.append(tensor(mine, step))
            copy = _copied(node, given)
            _count_on(copy, step * repeat.period)
            graph.insert_before(last[0], copy)
            blocks[-1].append(copy.outputs)
    for node, twin in zip(block, last, strict=True):
        for index, (mine, its) in enumerate(zip(node.inputs, twin.inputs, strict=True)):
            if mine is None or its is None or mine is its:
                continue
            if its not in places:
                twin.replace_input_with(index, tensor(its, repeat.dropped))
            elif places[its][0] == 0:
                _, i, j = places[its]
                twin.replace_input_with(index, blocks[-1][i][j])
        _count_on(twin, repeat.dropped * repeat.period)
    for value in tensors.values():
        graph.initializers.pop(str(value.name), None)
        graph.initializers.add(value)
    return True


def _last_two_blocks(graph: ir.Graph, repeat: Repeat) -> tuple[Sequence[ir.Node], Sequence[ir.Node]] | None:
    """The last two blocks of a run, if they are alike node by node."""
    nodes, names = list(graph), repeat.names[0]
    reader: dict[str, int] = {}
    for index, node in enumerate(nodes):
        for value in node.inputs:
            if value is not None and value.is_initializer():
                reader.setdefault(str(value.name), index)
    periods = [reader[later] - reader[name] for name, later in names.items() if name in reader and later in reader]
    period = periods[-1] if periods else 0
    if period < 1:
        return None
    for start, stop in _onnx_sequence(graph, nodes, repeat).runs(period, 0, len(nodes)):
        block, last = nodes[stop - 2 * period : stop - period], nodes[stop - period : stop]
        if stop - start >= 2 * period and any(v is not None and v.name in names for n in block for v in n.inputs):
            return block, last
    return None


def _onnx_sequence(graph: ir.Graph, nodes: Sequence[ir.Node], repeat: Repeat) -> _Sequence:
    """An ONNX graph to compare."""
    position = {value: (i, j) for i, node in enumerate(nodes) for j, value in enumerate(node.outputs)}
    kept_until = repeat.stop - repeat.dropped * repeat.period

    def phase(node: ir.Node) -> Hashable:
        number = node.meta.get(CALL)
        if number is None or not repeat.start <= number < kept_until:
            return number
        return "in a block", (number - repeat.start) % repeat.period

    def key(node: ir.Node) -> Hashable:
        attributes = sorted(node.attributes.values(), key=lambda a: a.name)
        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in attributes):
            return id(node)  # what a subgraph reads is not among its node's inputs
        forms = tuple(ir.serde.serialize_attribute(a).SerializeToString(deterministic=True) for a in attributes)
        types = [None if v is None else (str(v.type), str(v.shape)) for v in (*node.inputs, *node.outputs)]
        return (node.op_identifier(), len(node.outputs), forms, tuple(types), phase(node))

    def operand(value: ir.Value | None) -> Hashable:
        return None if value is None else position.get(value, value.name)

    def steps(a: Hashable, b: Hashable, period: int) -> bool:
        return isinstance(a, str) and repeat.names[0].get(a) == b

    read_inside = {v for n in graph.all_nodes() if n.graph is not graph for v in n.inputs if v is not None}
    returned = {position[v][0] for v in (*graph.outputs, *read_inside) if v in position}
    return _Sequence([key(n) for n in nodes], [[operand(v) for v in n.inputs] for n in nodes], returned, steps)


def _copied(node: ir.Node, inputs: Sequence[ir.Value | None]) -> ir.Node:
    outputs = [ir.Value(type=v.type, shape=v.shape) for v in node.outputs]
    copy = ir.Node(
        node.domain,
        node.op_type,
        inputs,
        node.attributes.values(),
        overload=node.overload,
        outputs=outputs,
        version=node.version,
        metadata_props=dict(node.metadata_props),
    )
    copy.meta.update(node.meta)
    return copy


def _count_on(node: ir.Node, calls: int) -> None:
    if node.meta.get(CALL) is not None:
        node.meta[CALL] += calls
