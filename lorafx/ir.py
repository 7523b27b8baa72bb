"""The intermediate representation: sites, adapters, stages, the text form of a graph, and the rules of each stage.

A *site* is what one adapter does to one layer. Each call of an adapted layer is one node, the twin of the
operator that was captured (:mod:`lorafx.ops`), whose tensors are ``get_attr`` nodes: a site's parameters lie below
the layer's own path, what an adapter has beside them below ``_adapters.<name>``. Of the adapters that a graph
holds, only the active ones have nodes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from lorafx.checks import did_you_mean
from lorafx.errors import AdapterError, PassError, VerifyError
from lorafx.graph import ROOT_MODE, CapturedModule, get_path, notes
from lorafx.ops import ADAPTED, ADAPTER_ARGUMENTS, LAYERS, STORAGE, SWAPPED, adapted_weight
from lorafx.spec import LoraSpec
from lorafx.variants import VARIANTS
from lorafx.variants.inits import find_init

#: The child of a graph that holds what adapters have beside their sites' parameters.
ADAPTERS = "_adapters"

#: The child that holds the weights with adapters that are merged in place, under their names in the base.
FOLDED = "_folded"

#: The buffer with the index of the active adapter that each row of a batch goes through.
ROWS = "_rows"


class Stage(Enum):
    """How far a graph has come; kept in ``gm.meta["stage"]``."""

    CAPTURED = "captured"
    INSERTED = "adapted"
    MERGED = "merged"


class Loftq(NamedTuple):
    """How LoftQ stored a weight before a site started at what that lost: the settings, as a spec has them.

    A part of the loss is then in all that is made of the site. ``r`` and ``scaling`` are those of the start.
    """

    init: str
    base: str
    block_size: int | None
    double_quant: bool | None
    r: int
    scaling: float

    def makes(self, r: int, scaling: float) -> bool:
        """Whether a start of this rank and scaling stores the same: the first round does not depend on them."""
        init = find_init(self.init)
        return init is None or init.rounds < 2 or (r == self.r and math.isclose(scaling, self.scaling))


@dataclass(frozen=True)
class Site:
    """What one adapter does to one layer.

    ``name`` is the layer's dotted path (or the parameter's, for a bare parameter), ``path`` the module path that
    holds its adapters, ``weight``/``bias`` the names of the base tensors, ``kind`` the operator or the way the
    parameter is stored (:data:`lorafx.ops.STORAGE`), ``shape`` the matrix's that it adapts, ``[out, in]`` or
    ``[experts, out, in]``. ``apart`` says that the weight is used elsewhere too, so that a fold must write a
    weight of its own; ``rows`` that the matrix is only these rows of the weight's (None: all of them); ``loftq``
    that the adapter makes up for a part of what storing the weight lost.
    """

    name: str
    path: str
    adapter: str
    variant: str
    kind: str
    weight: str
    bias: str | None
    shape: tuple[int, ...]
    r: int
    alpha: float
    scaling: float
    dropout: float
    apart: bool = False
    rows: range | tuple[int, ...] | None = None
    loftq: Loftq | None = None

    @property
    def layer(self) -> str:
        """What the sites of several adapters have in common that adapt the same: a layer, or a bare parameter."""
        return self.name if self.kind in LAYERS else f"{self.weight} ({self.kind})"

    @property
    def index_name(self) -> str:
        """Where the graph holds the indices of ``rows``."""
        return f"{ADAPTERS}.{self.adapter}.{ROWS}.{self.name}"

    @property
    def in_features(self) -> int:
        """Columns of the matrix."""
        return self.shape[-1]

    @property
    def out_features(self) -> int:
        """Rows of the matrix."""
        return self.shape[-2]

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored ``[in, out]`` (GPT-2's Conv1D, an embedding)."""
        return STORAGE[self.kind] is SWAPPED

    def matrix(self, weight: Tensor) -> Tensor:
        """What the site adapts of a stored weight, as ``[..., out, in]``."""
        matrix = STORAGE[self.kind].matrix(weight)
        return matrix if self.rows is None else matrix.index_select(-2, self.index(weight))

    def store(self, matrix: Tensor, like: Tensor) -> Tensor:
        """A matrix in the layout, shape and dtype of a stored weight, whose other rows (if any) it keeps."""
        storage = STORAGE[self.kind]
        if self.rows is not None:
            matrix = storage.matrix(like).to(matrix.dtype).index_copy(-2, self.index(like), matrix)
        return storage.stored(matrix, like.shape).to(like.dtype)

    def index(self, like: Tensor) -> Tensor:
        """``rows`` as a tensor, on the device of another."""
        return torch.tensor(list(self.rows or ()), device=like.device)

    def parameter_name(self, parameter: str) -> str:
        """The name in the state dict of one of the variant's parameters."""
        return f"{self.path}.{parameter}.{self.adapter}"

    @property
    def parameter_names(self) -> dict[str, str]:
        """The state dict names of the site's parameters, by the variant's names for them."""
        return {p: self.parameter_name(p) for p in VARIANTS[self.variant].parameters}

    @property
    def tensor_names(self) -> dict[str, str]:
        """The parameters' names, and those of the tensors that the adapter's sites share."""
        shared = {s: f"{ADAPTERS}.{self.adapter}.{s}" for s in VARIANTS[self.variant].shared}
        return {**self.parameter_names, **shared}

    def parameters(self, gm: nn.Module) -> dict[str, nn.Parameter]:
        """The site's parameters in ``gm``."""
        return {p: get_path(gm, name) for p, name in self.parameter_names.items()}

    def tensors(self, gm: nn.Module) -> dict[str, Tensor]:
        """The site's parameters and the shared tensors, in the order in which operators take them."""
        return {p: get_path(gm, name) for p, name in self.tensor_names.items()}

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter: the variant's, behind the number of experts if there are any."""
        shapes = VARIANTS[self.variant].shapes(self.out_features, self.in_features, self.r)
        return {name: (*self.shape[:-2], *shape) for name, shape in shapes.items()}


@dataclass(frozen=True)
class Adapter:
    """One adapter of a graph.

    ``trained`` are the base tensors (``modules_to_save``, ``bias``) that it trains a copy of, ``residual`` the
    weights from which its initialisation took something; both under their names in the base. Its own
    version of such a tensor is at :meth:`own_name`, the base's stays what it was.
    """

    name: str
    specs: tuple[LoraSpec, ...]
    sites: tuple[Site, ...]
    trained: tuple[str, ...] = ()
    residual: tuple[str, ...] = ()

    def own_name(self, name: str) -> str:
        """Where the adapter keeps its own version of a tensor of the base."""
        return f"{ADAPTERS}.{self.name}.{name}"

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """The state dict names of all that trains with this adapter."""
        of_sites = (n for site in self.sites for n in site.parameter_names.values())
        return (*of_sites, *map(self.own_name, self.trained))


def stage(gm: CapturedModule) -> Stage:
    """The stage a graph is in.

    Raises:
        PassError: it is no graph of lorafx's.
    """
    if not isinstance(gm, CapturedModule):
        raise PassError(
            f"expected a graph made by lorafx.apply, got {type(gm).__name__}; call lorafx.apply(model, spec)"
        )
    found: Stage = gm.meta.get("stage", Stage.CAPTURED)
    return found


def adapters(gm: CapturedModule) -> Mapping[str, Adapter]:
    """The adapters of a graph by name, in the order in which they were added."""
    stage(gm)  # refuses what is no graph of lorafx's
    found: Mapping[str, Adapter] = gm.meta.get("adapters", {})
    return found


def find_adapter(gm: CapturedModule, name: str | None = None) -> Adapter:
    """The adapter with this name; None: the one that is active.

    Raises:
        AdapterError: there is no such adapter, or not just one is active.
    """
    found = adapters(gm)
    if not found:
        raise AdapterError(
            f"the graph is {stage(gm).value} and has no adapters; make them by lorafx.apply(model, spec)"
        )
    if name is None:
        running = active_adapters(gm)
        if len(running) != 1:
            what = ", ".join(a.name for a in running) or "none"
            raise AdapterError(f"which adapter is meant? Active: {what}; there are {', '.join(found)}. Name one")
        return running[0]
    if name not in found:
        hint = did_you_mean(str(name), found)
        raise AdapterError(f"there is no adapter {name!r}{hint}; there are {', '.join(map(repr, found))}")
    return found[name]


def active_adapters(gm: CapturedModule) -> tuple[Adapter, ...]:
    """The adapters that the graph's calls go through, in the order in which they were activated."""
    found = adapters(gm)
    return tuple(found[name] for name in gm.meta.get("active", ()))


def sites(gm: CapturedModule) -> tuple[Site, ...]:
    """The sites of the active adapters, in the order of their layers' first calls."""
    return tuple(site for adapter in active_adapters(gm) for site in adapter.sites)


def active_layers(gm: CapturedModule) -> dict[str, list[Site]]:
    """The sites that have nodes, by :attr:`Site.layer`: those of active adapters with a rank.

    The sites of a layer are in the order in which their adapters were added, whatever the order of activation: the
    same adapters then give the same sums, bit for bit.
    """
    running = gm.meta.get("active", ())
    layers: dict[str, list[Site]] = {}
    for site in (site for adapter in adapters(gm).values() if adapter.name in running for site in adapter.sites):
        if site.r > 0:
            layers.setdefault(site.layer, []).append(site)
    return layers


def layer_nodes(gm: CapturedModule) -> dict[str, list[Node]]:
    """The calls of each layer that some adapter adapts (for a bare parameter: what reads it), in graph order."""
    stage(gm)
    found: dict[str, list[Node]] = {}
    for node in gm.graph.nodes:
        for layer in notes(node).get("layers", ()):
            found.setdefault(layer, []).append(node)
    return found


def base_modules(gm: CapturedModule, *, aliases: bool = False) -> tuple[str, ...]:
    """Names of the original's modules; each under its first name, or with ``aliases`` under all of them."""
    held = {n.rpartition(".")[0] for a in adapters(gm).values() for s in a.sites for n in s.parameter_names.values()}
    names = (n for n, _ in gm.named_modules(remove_duplicate=not aliases))
    return tuple(n for n in names if n and n not in held and n.partition(".")[0] not in (ROOT_MODE, ADAPTERS, FOLDED))


def format_graph(gm: CapturedModule) -> str:
    """The graph as stable text: one line a node, signature first. Equal graphs give equal text."""
    arguments = ", ".join(a.name + ("?" if a.optional else "") for a in gm.signature.arguments)
    lines = [f"graph({arguments}) -> ({', '.join(gm.signature.outputs)})"]
    for node in gm.graph.nodes:
        given = [_text(a) for a in node.args] + [f"{k}={_text(v)}" for k, v in node.kwargs.items()]
        target = node.target if isinstance(node.target, str) else _function_name(node.target)
        if node.op == "output":
            lines.append(f"  return {', '.join(given)}")
        elif node.op in ("placeholder", "get_attr"):
            lines.append(f"  %{node.name} = {node.op}[{target}]")
        else:
            lines.append(f"  %{node.name} = {target}({', '.join(given)})")
    return "\n".join(lines) + "\n"


def _text(value: Any) -> str:
    if isinstance(value, Node):
        return f"%{value.name}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_text(v) for v in value)}]"
    return repr(value)


def _function_name(target: Any) -> str:
    return str(target) if hasattr(target, "_schema") else f"{target.__module__}.{target.__name__}"


#: The one table of legality: whether a stage allows adapters and lorafx's operators.
_ADAPTED: Mapping[Stage, bool] = {Stage.CAPTURED: False, Stage.INSERTED: True, Stage.MERGED: False}


def verify(gm: CapturedModule, expected: Stage) -> None:
    """Check that a graph keeps the rules of a stage.

    Every lorafx operator is a call of an adapted layer and reads exactly the tensors of the active sites, all
    of the right shapes; and no adapter exists where the stage allows none.

    Raises:
        VerifyError: names the node and the rule.
    """
    calls = list(_lorafx_calls(gm.graph))
    if not _ADAPTED[expected]:
        if calls:
            raise VerifyError(
                f"node %{calls[0].name} calls {calls[0].target}, which no {expected.value} graph may hold"
            )
        if left := list(adapters(gm)):
            raise VerifyError(f"adapter '{left[0]}' is in a {expected.value} graph")
        return
    layers = active_layers(gm)
    for node in calls:
        here = [layer for layer in notes(node).get("layers", ()) if layer in layers]
        if len(here) != 1:
            raise VerifyError(f"node %{node.name} calls {node.target} but belongs to no layer of an active adapter")
        found = layers[here[0]]
        wanted = [n for site in found for n in site.tensor_names.values()]
        operator, tensors = _operator_and_tensors(node, found[0])
        given = [t.target for t in tensors]
        if node.target is not operator or given != wanted:
            raise VerifyError(f"site {here[0]}: node %{node.name} reads {given} by {node.target}, not {wanted}")
    called = {layer for node in calls for layer in notes(node)["layers"]}
    if absent := [layer for layer in layers if layer not in called]:
        raise VerifyError(f"site {absent[0]}: its adapter is active, and no node calls it")
    for adapter in adapters(gm).values():
        for site in adapter.sites:
            for name, shape in site.parameter_shapes().items():
                there = tuple(get_path(gm, site.parameter_name(name)).shape)
                if there != shape:
                    raise VerifyError(f"site {site.name}: {name} is {there}, its shape must be {shape}")


def _operator_and_tensors(node: Node, site: Site) -> tuple[Any, list[Any]]:
    """The operator that calls such a site, and the adapters' tensors that a node hands it."""
    if site.kind in ADAPTED:
        return ADAPTED[site.kind], list(node.args[-ADAPTER_ARGUMENTS])  # type: ignore[arg-type]
    return adapted_weight, list(node.args[1])  # type: ignore[arg-type]


def _lorafx_calls(graph: Graph) -> Iterable[Node]:
    return (n for n in graph.nodes if n.op == "call_function" and getattr(n.target, "namespace", "") == "lorafx")


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors overlap in memory (also told of tensors without data, on the meta device)."""
    if a.untyped_storage()._cdata != b.untyped_storage()._cdata:
        return False
    (a_low, a_high), (b_low, b_high) = _span(a), _span(b)
    return a_low < b_high and b_low < a_high


def _span(tensor: Tensor) -> tuple[int, int]:
    low = int(tensor.storage_offset())
    high = low + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return low * tensor.element_size(), high * tensor.element_size()
