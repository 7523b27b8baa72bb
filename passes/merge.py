"""Merge: fold adapters into the weights; the exact inverse of insert.

    before:  linear = lorafx.linear(x, <q.weight>, <q.bias>, [a, b], ["lora"], [scaling], [dropout], train, None)
    after:   linear = aten.linear(x, <q.weight>, <q.bias>)            # q.weight = W + scaling * B A

The result is a graph of its own with its own copies of what changed; the adapted graph stays as it is,
and everything else is shared with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Node

from lorafx.bases.tensor import QuantizedTensor
from lorafx.errors import MergeError, PassError
from lorafx.graph import (
    CapturedModule,
    annotate,
    delete_path,
    erase,
    get_path,
    mark_own,
    named_tensors,
    notes,
    rebind,
    set_tensor,
    share,
    unannotate,
)
from lorafx.ir import (
    ADAPTERS,
    FOLDED,
    Adapter,
    Site,
    Stage,
    active_adapters,
    active_layers,
    adapters,
    find_adapter,
    format_graph,
    layer_nodes,
    sites,
)
from lorafx.kernels.rounding import round_once
from lorafx.ops import LAYERS, updates
from lorafx.passes.activate import activate, deactivate
from lorafx.passes.base import Pass, PassResult
from lorafx.passes.fold import Fold
from lorafx.passes.layers import find_operands, readers
from lorafx.passes.merge_base import MergeBase
from lorafx.passes.residual import FACTORS, plain_factors
from lorafx.variants import VARIANTS


@dataclass(frozen=True)
class Merge(Pass):
    """Take all adapters away from a copy of the graph, which no further training of this one changes.

    ``fold=True`` writes into the weights those of ``adapters`` (None: the active ones, and what is merged in
    place) as ``base`` says; ``fold=False`` gives the base back. ``lazily`` leaves the base's weights where they are,
    and in ``meta["folds"]`` what is to take their place, by name; but weights that are quantised again are so at once.
    """

    fold: bool = True
    adapters: tuple[str, ...] | None = None
    lazily: bool = False
    base: MergeBase = field(default_factory=MergeBase)

    name: ClassVar[str] = "merge"
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.INSERTED})
    ensures: ClassVar[Stage] = Stage.MERGED

    def run(self, gm: CapturedModule) -> PassResult:
        if self.fold and self.adapters is None:
            _refuse_by_row(gm)
        if self.adapters is not None:
            result = with_active(gm, self.adapters)
        elif self.base.is_trained:
            result = share(gm)
        else:  # what is merged in place is so into another base
            result = taken_out(gm)
        layers = active_layers(result) if self.fold else {}
        values = changed_tensors(result, self.base) if self.fold else {}
        apart = {first.name for first, *_ in layers.values() if first.apart}
        rest = self.base.rest(result, values.keys() - apart) if self.fold else {}
        deactivate(result)
        nodes = layer_nodes(result)
        later: dict[str, Fold | Tensor] = {}
        for layer, (first, *_) in layers.items():
            if first.apart:
                value = values.pop(first.name)
                weight = _blank(value) if self.lazily else _computed(result, first.name, value)
                name = _write_apart(result, first, nodes[layer], weight)
                later[name] = value
        for name, value in values.items():
            held = get_path(result, name)
            if isinstance(value, Fold) and self.base.requantize and isinstance(held, QuantizedTensor):
                made: Tensor = value.requantize(held)
                later[name] = made
            elif self.lazily:
                later[name] = value
                continue
            else:
                made = _computed(result, name, value)
            rebind(result, held, made)  # under every name: ties stay
        if self.lazily:
            result.meta["folds"] = later | rest
        else:
            for name, value in rest.items():
                held = get_path(result, name)
                rebind(result, held, round_once(value.to(held.device), held.dtype))
        forget_folded(result)
        for adapter in adapters(gm).values():
            remove_adapter(result, adapter)
        _freeze(result)
        result.graph.lint()
        if (text := result.meta.get("captured")) is not None and not any(f[0].apart for f in layers.values()):
            _same_as_captured(text, result)
        return PassResult(result, len(layers))


def merge(
    gm: CapturedModule, adapters: str | Sequence[str] | None = None, base: MergeBase | None = None
) -> CapturedModule:
    """A base-shaped graph whose weights hold the active adapters, or the ones named. ``gm`` is left as it is.

    ``base`` is what they are folded into (:func:`lorafx.passes.merge_base.choose_base`; None: what was trained). Each
    weight is computed in float32 or better (float64 over a float32 base) and rounded once to its
    dtype. The merged graph prints as the captured one. (:func:`lorafx.merge` does this and merges in place too.)

    Raises:
        MergeError: an adapter holds NaN or Inf; names the site.
        NotFiniteError: a weight that is merged into does.
        AdapterError: there is no such adapter, or they cannot be active together.
        PassError: the graph has no adapters (any more).
    """
    names = (adapters,) if isinstance(adapters, str) else adapters
    return Merge(adapters=None if names is None else tuple(names), base=base or MergeBase())(gm).gm


def unadapted(gm: CapturedModule) -> CapturedModule:
    """The graph as it was captured: no adapters, the base's own weights."""
    return Merge(fold=False)(gm).gm


def merge_lazily(gm: CapturedModule, base: MergeBase | None = None) -> tuple[CapturedModule, dict[str, Fold | Tensor]]:
    """What :func:`merge` returns, with the weights that adapters change yet to be computed.

    Returns:
        A graph that is the merged one but for these weights, which are the base's still (or, of a layer that is kept
        apart, not filled in); and what stands for them, by their names in it. Those that are quantised again are
        computed, one at a time, and in the graph.

    Raises:
        MergeError, PassError: as :func:`merge`; that a result overflows, only when it is computed.
    """
    graph = Merge(lazily=True, base=base or MergeBase())(gm).gm
    folds: dict[str, Fold | Tensor] = graph.meta.pop("folds")
    return graph, folds


def compute_folds(
    graph: CapturedModule, folds: Mapping[str, Fold | Tensor], dtype: torch.dtype | None = None
) -> CapturedModule:
    """The merged graph, from what :func:`merge_lazily` returned; what adapters change in ``dtype`` (None: its own).

    Raises:
        MergeError: a result overflows its dtype.
    """
    result = share(graph)
    for name, value in folds.items():
        held = get_path(result, name)
        if isinstance(value, Fold):
            made = replace(value, dtype=dtype or value.dtype, rounding=None).compute()
        else:
            made = round_once(value.to(held.device), dtype or held.dtype)
        rebind(result, held, made)
    return result


def changed_tensors(gm: CapturedModule, base: MergeBase | None = None) -> dict[str, Fold | Tensor]:
    """The tensors of the base that the active adapters change, as they make them, by name; weights yet to be computed.

    A bias with shifts is the exact sum, in float64, and yet to be rounded.
    What is merged in place counts as active. The weight of a layer that is to be kept apart from its other
    uses goes by the layer's name.

    Raises:
        MergeError: an adapter holds NaN or Inf; or the base was overwritten after apply.
    """
    values: dict[str, Fold | Tensor] = {
        name: _frozen(get_path(gm, f"{FOLDED}.{name}")) for name in gm.meta.get("folded", ())
    }
    for adapter in active_adapters(gm):
        for name in (*adapter.trained, *adapter.residual):
            values[name] = _frozen(get_path(gm, adapter.own_name(name)))
    for found in active_layers(gm).values():
        first = found[0]
        fold = Fold.of(gm, found, _own_or_base(gm, first.weight))
        if base is not None and (original := base.original.get(first.weight)) is not None:
            fold = _into_original(gm, fold, original)
        values[first.name if first.apart else first.weight] = fold
        if first.bias is not None and (bias := merged_bias(gm, found)) is not None:
            values[first.bias] = nn.Parameter(bias, requires_grad=False)
    return values


def _frozen(tensor: Tensor) -> Tensor:
    """The same without gradients; a parameter stays one."""
    return nn.Parameter(tensor, requires_grad=False) if isinstance(tensor, nn.Parameter) else tensor.detach()


def _into_original(gm: CapturedModule, fold: Fold, original: Tensor) -> Fold:
    """The same updates on another weight, and as it: what an adapter took from its own at the start is not added.

    What scales rows does so by the factors that were trained.
    """
    tensors = []
    for site, own in zip(fold.sites, fold.tensors, strict=True):
        if site.loftq is not None:
            raise MergeError(
                f"site '{site.name}': init={site.loftq.init!r} put into adapter '{site.adapter}', or into what it was "
                "made of, what quantizing the weight lost, and the original has not lost it: it would be added twice. "
                "Merge with base='dequantized', which is as near"
            )
        adapter = find_adapter(gm, site.adapter)
        if site.weight in adapter.residual:
            given = dict(zip(site.tensors(gm), own, strict=True))
            given |= zip(FACTORS, plain_factors(gm, adapter, site), strict=True)
            own = tuple(given.values())
        tensors.append(own)
    trained: Tensor = get_path(gm, fold.sites[0].weight)
    return replace(fold, weight=original, tensors=tuple(tensors), trained=trained.detach())


def folded_tensors(gm: CapturedModule) -> dict[str, Tensor]:
    """:func:`changed_tensors`, computed, and each in memory of its own.

    Raises:
        MergeError: as there; or a result overflows its dtype.
    """
    return {name: _computed(gm, name, value) for name, value in changed_tensors(gm).items()}


def _computed(gm: CapturedModule, name: str, value: Fold | Tensor) -> Tensor:
    """What is to take the place of a tensor of the graph, in its dtype and memory of its own."""
    return value.compute() if isinstance(value, Fold) else round_once(value, get_path(gm, name).dtype).clone()


def _blank(value: Fold | Tensor) -> Tensor:
    """A tensor in the stead of one yet to be computed. Nobody reads or writes it, so that its pages stay untouched."""
    return torch.empty(value.shape, dtype=value.dtype, device=value.device)


def taken_out(gm: CapturedModule) -> CapturedModule:
    """A graph that shares all with ``gm``, in which what is merged in place is active instead: not yet rounded.

    Raises:
        MergeError: rows of a batch go through adapters of their own.
    """
    _refuse_by_row(gm)
    return with_active(gm, (*gm.meta.get("merged", ()), *gm.meta.get("active", ())))


def with_active(gm: CapturedModule, names: Sequence[str]) -> CapturedModule:
    """A graph that shares all with ``gm``, in which these adapters are active and nothing is merged in place.

    Raises:
        AdapterError: there is no such adapter, or they cannot be active together.
    """
    result = share(gm)
    forget_folded(result)
    activate(result, names)
    return result


def _refuse_by_row(gm: CapturedModule) -> None:
    if gm.meta.get("by_row"):
        raise MergeError(
            "each row of a batch goes through an adapter of its own (set_adapter_names), and weights hold the same "
            "for all rows: name the adapters to merge, or call set_adapter first"
        )


def forget_folded(gm: CapturedModule) -> None:
    """Drop what is merged in place from a graph without active adapters."""
    gm.meta["folded"] = gm.meta["merged"] = ()
    if hasattr(gm, FOLDED):
        deactivate(gm)
        delete_path(gm, FOLDED)


def merged_bias(gm: CapturedModule, found: Sequence[Site]) -> Tensor | None:
    """The bias of one layer with the shifts of these sites added, in float64; None where they have none."""
    first = found[0]
    shifting = [site for site in found if VARIANTS[site.variant].shifts_bias]
    if first.bias is None or not shifting:
        return None
    weight = first.matrix(_own_or_base(gm, first.weight))
    tensors = [t.detach().double() for site in shifting for t in site.tensors(gm).values()]
    changes = updates(weight, tensors, [s.variant for s in shifting], [s.scaling for s in shifting])
    shifts = [u.shift for u in changes if u.shift is not None]
    return torch.stack([_own_or_base(gm, first.bias).double(), *shifts]).sum(0)


def _own_or_base(gm: CapturedModule, name: str) -> Tensor:
    """A tensor of the base as the active adapters have it."""
    owner = next((a for a in active_adapters(gm) if name in (*a.trained, *a.residual)), None)
    if owner is not None:
        name = owner.own_name(name)
    elif name in gm.meta.get("folded", ()):
        name = f"{FOLDED}.{name}"
    found: Tensor = get_path(gm, name)
    return found.detach()


def merged_state_dict(gm: CapturedModule) -> dict[str, Tensor]:
    """Merged weights under the original names, for ``model.load_state_dict`` on the user's own module.

    Names that are tied in the model are written with the same tensor. Shares unchanged tensors with ``gm``.
    The model that ``gm`` was made from lends it its weights: load into a copy of it, or be done with ``gm``
    (its adapters would come on top of the merged weights; merging it again is refused).

    Raises:
        MergeError: as :func:`merge`; or a weight was kept apart from another use of it
            (``tied="untie"``), which the user's own module has no place for.
    """
    apart = [s for s in sites(gm) if s.apart]
    if apart:
        raise MergeError(
            f"site '{apart[0].name}': its weight '{apart[0].weight}' has another use and was kept apart, as "
            'tied="untie" asks; the original module has one tensor for both. Export the merged graph instead, or adapt '
            "without this layer"
        )
    return dict(merge(gm).state_dict())


def _write_apart(gm: CapturedModule, site: Site, nodes: Sequence[Node], weight: Tensor) -> str:
    """Store a layer's folded weight for its own calls only; ``nodes`` are these, in a graph without adapters.

    Returns its name.
    """
    parameter = nn.Parameter(weight, requires_grad=False)
    mark_own(parameter)
    named = [n for n in gm.graph.find_nodes(op="get_attr") if n.target == site.weight]
    if not any(reader not in nodes for source in named for reader in readers(source)):
        set_tensor(gm, site.weight, parameter)  # the other use has a name of its own
        return site.weight
    name = f"{site.path}.merged_weight"
    set_tensor(gm, name, parameter)
    for node in nodes:
        operands = find_operands(node)
        assert operands is not None
        node.update_arg(LAYERS[site.kind].weight, read_instead(operands.weight, name))
        read = operands.weight
        while not read.users and read.op == "call_function":
            unused, read = read, read.all_input_nodes[0]
            gm.graph.erase_node(unused)
    return name


def read_instead(read: Node, name: str) -> Node:
    """A read of another parameter, through the same casts."""
    with read.graph.inserting_before(read):
        if read.op == "get_attr":
            return read.graph.get_attr(name)
        source = read.all_input_nodes[0]
        own = read_instead(source, name)
        return read.graph.node_copy(read, lambda _: own)


def remove_adapter(gm: CapturedModule, adapter: Adapter) -> None:
    """Take the tensors of an adapter that is not active, and all trace of it, out of the graph."""
    left = {n: a for n, a in adapters(gm).items() if n != adapter.name}
    gm.meta["adapters"] = left
    still = {site.path for other in left.values() for site in other.sites}
    layers_left = {site.layer for other in left.values() for site in other.sites}
    for site in adapter.sites:
        for name in site.parameter_names.values():
            delete_path(gm, name)
            holder = name.rpartition(".")[0]
            if not get_path(gm, holder)._parameters:
                delete_path(gm, holder)
        if site.path not in still:
            holder = get_path(gm, site.path)
            if site.path != site.name and not holder._modules and not holder._parameters:
                delete_path(gm, site.path)
    for node in gm.graph.nodes:
        if layers := notes(node).get("layers"):
            unannotate(node, "layers")
            if remaining := tuple(name for name in layers if name in layers_left):
                annotate(node, layers=remaining)
    if hasattr(gm, ADAPTERS):
        held = getattr(gm, ADAPTERS)
        if adapter.name in held._modules:
            delete_path(gm, f"{ADAPTERS}.{adapter.name}")
        if not held._modules:
            delete_path(gm, ADAPTERS)
    for node in list(gm.graph.find_nodes(op="get_attr")):
        if not node.users:
            erase(gm.graph, node)


def _freeze(gm: CapturedModule) -> None:
    """Give what the adapted graph goes on changing a copy; nothing trains."""
    for name, tensor in list(named_tensors(gm)):
        if get_path(gm, name) is not tensor:
            continue  # another name of one that is done
        if not isinstance(tensor, nn.Parameter):
            rebind(gm, tensor, tensor.detach().clone())
        elif tensor.requires_grad:
            rebind(gm, tensor, tensor.detach()).requires_grad_(False)


def _same_as_captured(captured: str, merged: CapturedModule) -> None:
    text = format_graph(merged)
    if text == captured:
        return
    pairs = zip(captured.splitlines(), text.splitlines(), strict=False)
    first = next(((a, b) for a, b in pairs if a != b), ("(end)", "(end)"))
    raise PassError(f"merge: the graph is not the captured one again; captured: {first[0]!r}, merged: {first[1]!r}")
