"""Repeated blocks of a graph, such as a transformer's layers: taken out before it is translated, put back after.

    embed, L0, L1, ... L31, head --drop--> embed, L0, L1, L2, head --translate--> ONNX --unroll--> all of it

Translating a block again for each repetition takes nearly all the time, and gives the same nodes with other weights. So
a run of equal blocks is translated shortened, and the blocks that miss are copies of one of its nodes. Blocks are
equal if they call the same operators with the same literals on values of their own, of the block before, or on the
very same ones from elsewhere; on weights of their own that differ in nothing but their values; and on inputs of the
graph of their own, such as a cache's. What they compute may be among the graph's results, if it is for all of them.

This is decided twice, by the same comparison (:class:`_Sequence`): on the torch graph, and again on the optimised ONNX
graph, where copies go after the second to last block if the last came out like it, types and shapes included. Whatever
the one before the last led to, the last led to as well, and so would one more. Where they differ nothing is copied, and
the caller translates the whole graph.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    tensor of a block to that of its counterpart ``r`` blocks later; ``inputs`` and ``results`` do so for places among
    the graph's inputs and results.
    """

    start: int
    stop: int
    period: int
    dropped: int
    names: tuple[Mapping[str, str], ...]
    inputs: tuple[Mapping[int, int], ...]
    results: tuple[Mapping[int, int], ...]


@dataclass(frozen=True)
class _Sequence:
    """Operators in order, of a torch or an ONNX graph, ready to be compared.

    ``keys[i]`` is all there is to say about an operator but for its operands. An operand is a position and an output,
    or what identifies a value that no operator computes. ``returned`` has for positions whose values the graph returns
    their places among its results; ``read`` are those that are read in other ways that are not seen here.
    ``steps(a, b, period)`` says whether such a value is to another what a block's weight is to the next block's.
    """

    keys: Sequence[Hashable]
    operands: Sequence[Sequence[Hashable]]
    returned: Mapping[int, Sequence[int]]
    read: Collection[int]
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
        """Where a stretch must start so that what comes after it reads its last block only.

        A result of the graph comes from each of its blocks, or from the last alone.
        """
        operands = (o for after in self.operands[stop:] for o in after)
        read = {*(o[0] for o in operands if isinstance(o, tuple)), *self.read}
        last = stop - period

        def odd(position: int) -> bool:
            own, next_ = (len(self.returned.get(p, ())) for p in (position, position + period))
            return own != next_ and (own > 0 or position + period < last)

        return max((p + 1 for p in range(start, last) if p in read or odd(p)), default=start)


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
    sequence, outside = _torch_sequence(graph, root, weights)
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
        steps = range(period, (dropped + 1) * period, period)
        renamed = [_renamed(outside[start:stop], step) for step in steps]
        names = tuple({a: b for a, b in new.items() if isinstance(a, str) and isinstance(b, str)} for new in renamed)
        inputs = tuple({a: b for a, b in new.items() if isinstance(a, int) and isinstance(b, int)} for new in renamed)
        results = tuple(_moved(sequence.returned, start, stop, step) for step in steps)
        if names[0]:  # blocks without tensors of their own could not be told apart in ONNX
            found.append(Repeat(start, stop, period, dropped, names, inputs, results))
    return sorted(found, key=lambda repeat: repeat.start)


def drop_repeats(graph: Graph, repeats: Sequence[Repeat]) -> list[int]:
    """Take the last blocks of each run out of a numbered graph; what read the last one reads the last that stays.

    All inputs stay. Returns which of the results do, by their places.
    """
    calls = _calls(graph)
    output = graph.output_node()
    results: list[Node] = list(output.args[0])  # type: ignore[arg-type]
    gone = {n for r in repeats for n in calls[r.stop - (r.dropped + 1) * r.period : r.stop - r.period]}
    kept = [place for place, node in enumerate(results) if node not in gone]
    output.args = (tuple(results[place] for place in kept),)
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
    return kept


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
) -> tuple[_Sequence, list[list[str | int | None]]]:
    """A torch graph to compare; and which of each call's operands are tensors (by name) or inputs (by place)."""
    calls = _calls(graph)
    position = {node: index for index, node in enumerate(calls)}
    held = {node: get_path(root, str(node.target)) for node in graph.find_nodes(op="get_attr")}
    inputs = {node: place for place, node in enumerate(graph.find_nodes(op="placeholder"))}
    kinds = {node: _kind(value, str(node.target) in weights) for node, value in held.items()}
    uses: dict[Hashable, list[int]] = defaultdict(list)
    keys: list[Hashable] = []
    operands: list[list[Hashable]] = []
    outside: list[list[str | int | None]] = []
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
        outside.append([str(o.target) if o in held else inputs.get(o) for o in given])
        for operand in operands[-1]:
            uses[operand].append(index)
    returned: dict[int, list[int]] = defaultdict(list)
    results: Any = graph.output_node().args[0]
    for slot, node in enumerate(results):
        uses[id(held.get(node, node))].append(len(calls))
        if node in position:
            returned[position[node]].append(slot)

    def steps(a: Hashable, b: Hashable, period: int) -> bool:
        """Each used by one block only, in the same places: not shared, not tied to another."""
        return uses[a][-1] - uses[a][0] < period and [i + period for i in uses[a]] == uses[b]

    return _Sequence(keys, operands, returned, (), steps), outside


def _kind(held: object, weight: bool) -> str:
    """All of a tensor that a translation depends on: a constant's value is part of it, a weight's is not."""
    if not isinstance(held, Tensor):
        return f"module {id(held)}"
    value = "weight"
    if not weight:
        data = held.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        value = hashlib.sha256(data.tobytes()).hexdigest()
    return f"{value} {held.dtype} {list(held.shape)}"


def _renamed(outside: Sequence[Sequence[str | int | None]], shift: int) -> dict[str | int, str | int]:
    """The names of a run's tensors and the places of its inputs, to those of their counterparts so many calls later."""
    return {
        a: b
        for before, after in zip(outside, outside[shift:], strict=False)
        for a, b in zip(before, after, strict=True)
        if a is not None and b is not None and a != b
    }


def _moved(returned: Mapping[int, Sequence[int]], start: int, stop: int, shift: int) -> dict[int, int]:
    """The places of results, to those of their counterparts so many calls later."""
    return {
        a: b
        for position, places in returned.items()
        if start <= position < stop - shift
        for a, b in zip(places, returned.get(position + shift, ()), strict=True)
    }


# In the ONNX graph.


def unroll(graph: ir.Graph, repeats: Sequence[Repeat], kept: Sequence[int]) -> bool:
    """Put back what :func:`drop_repeats` took out, as copies of nodes, in place.

    Args:
        graph: translated and optimised; its nodes have their call's number in ``meta[CALL]``, where it is known.
            Weights are initializers under their own names.
        repeats: the runs.
        kept: what :func:`drop_repeats` returned.

    Returns:
        whether that could be done; if not, the graph is of no use.
    """
    results = dict(zip(kept, graph.outputs, strict=True))
    if not all(_unroll(graph, repeat, results) for repeat in repeats):
        return False
    graph.outputs[:] = [results[place] for place in range(len(results))]
    return True


def _unroll(graph: ir.Graph, repeat: Repeat, results: dict[int, ir.Value]) -> bool:
    """Put back one run; ``results`` are the graph's by their places, and gain those of the run."""
    found = _last_two_blocks(graph, repeat)
    if found is None:
        return False
    block, last = found
    tensors: dict[str, ir.Value] = {}
    inputs = {value: place for place, value in enumerate(graph.inputs)}
    returned = {value: place for place, value in results.items()}

    def tensor(value: ir.Value, step: int) -> ir.Value:
        """What a block has for ``value``, a tensor or an input, of the one ``step`` blocks before it."""
        if value in inputs:
            its = graph.inputs[repeat.inputs[step - 1][inputs[value]]]
            its.shape = value.shape  # in the shortened graph nothing said what its sizes are
            return its
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
            for value, new in zip(node.outputs, copy.outputs, strict=True):
                if value in returned:
                    results[repeat.results[step - 1][returned[value]]] = new
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
    inputs = {value: place for place, value in enumerate(graph.inputs)}
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
        return None if value is None else position.get(value, inputs.get(value, value.name))

    def steps(a: Hashable, b: Hashable, period: int) -> bool:
        return repeat.names[0].get(a) == b if isinstance(a, str) else repeat.inputs[0].get(a) == b  # type: ignore[call-overload]

    read_inside = {v for n in graph.all_nodes() if n.graph is not graph for v in n.inputs if v is not None}
    read = {position[v][0] for v in read_inside if v in position}
    returned: dict[int, list[int]] = defaultdict(list)
    for place, value in enumerate(graph.outputs):
        if value in position:
            returned[position[value][0]].append(place)
    operands = [[operand(v) for v in n.inputs] for n in nodes]
    return _Sequence([key(n) for n in nodes], operands, returned, read, steps)


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
