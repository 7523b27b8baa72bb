"""Merge: fold the adapters into the weights; the exact inverse of insert.

    before:  linear = lorafx.lora_linear(x, <q.weight>, <q.bias>, a, b, scaling, dropout, train)
    after:   linear = aten.linear(x, <q.weight>, <q.bias>)            # q.weight = W + scaling * B A

The result is a graph of its own with its own copies of what changed; the adapted graph stays as it is,
and everything else is shared with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Node

from lorafx.errors import MergeError, PassError
from lorafx.graph import (
    CapturedModule,
    delete_path,
    get_path,
    is_own,
    mark_own,
    named_tensors,
    notes,
    rebind,
    set_tensor,
    share,
)
from lorafx.ir import Site, Stage, format_graph, site_nodes, sites
from lorafx.passes.base import Pass, PassResult
from lorafx.passes.insert import sample
from lorafx.passes.layers import LAYER_KINDS, readers
from lorafx.variants import VARIANTS


@dataclass(frozen=True)
class Merge(Pass):
    """Take the adapters away from a copy of the graph, which no further training of this one changes.

    ``fold=True`` writes them into the weights; ``fold=False`` gives the base back, with the values that
    ``modules_to_save`` and biases had before training.
    """

    fold: bool = True

    name: ClassVar[str] = "merge"
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.INSERTED})
    ensures: ClassVar[Stage] = Stage.MERGED

    def run(self, gm: CapturedModule) -> PassResult:
        found = site_nodes(gm)
        weights = {s: merged_weight(gm, s) for s in found} if self.fold else {}
        result = share(gm)
        for site, nodes in site_nodes(result).items():
            if self.fold:
                _write(result, site, nodes, weights[site])
            for node in nodes:
                _restore(node)
            _remove_adapter(result, site)
        for node in reversed(list(result.graph.nodes)):
            if notes(node).get("inserted") and not node.users:
                result.graph.erase_node(node)
        _erase_unused_scopes(result)
        originals = result.meta.pop("original")
        _freeze(result, {} if self.fold else originals)
        result.graph.lint()
        if (text := result.meta.get("captured")) is not None and not any(s.apart for s in found):
            _same_as_captured(text, result)
        return PassResult(result, len(found))


def merge(gm: CapturedModule) -> CapturedModule:
    """A base-shaped graph whose weights hold the adapters. ``gm`` is left as it is.

    Each weight is computed in float32 or better (float64 over a float32 base) and rounded once to its
    dtype. The merged graph prints as the captured one.

    Raises:
        MergeError: an adapter holds NaN or Inf; names the site.
        PassError: the graph has no adapters (any more).
    """
    return Merge()(gm).gm


def unadapted(gm: CapturedModule) -> CapturedModule:
    """The graph as it was captured: no adapters, the base's own weights."""
    return Merge(fold=False)(gm).gm


def merged_weight(gm: CapturedModule, site: Site) -> Tensor:
    """The folded weight of one site, in the stored layout and dtype of its base weight.

    Raises:
        MergeError: the adapter or the result holds NaN or Inf; or the base was overwritten after apply.
    """
    parameters = {n: p.detach() for n, p in site.parameters(gm).items()}
    for name, value in parameters.items():
        if not value.is_meta and not bool(torch.isfinite(value).all()):
            raise MergeError(
                f"site '{site.name}': {name} holds NaN or Inf, so it cannot be folded. Training diverged: go back to "
                "an earlier adapter, or lower the learning rate"
            )
    weight = get_path(gm, site.weight).detach()
    _refuse_changed(gm, site)
    wide = torch.float32 if weight.dtype.itemsize < 4 else torch.float64
    matrix = weight.t() if site.transposed else weight
    merged = VARIANTS[site.variant].merge(matrix.to(wide), parameters, site.scaling).to(weight.dtype)
    if not merged.is_meta and not bool(torch.isfinite(merged).all()) and bool(torch.isfinite(weight).all()):
        raise MergeError(
            f"site '{site.name}': the merged weight does not fit in {weight.dtype} (it overflows to Inf). Merge into "
            "a wider copy of the model, or lower the adapter's scaling"
        )
    return merged.t().contiguous() if site.transposed else merged


def _refuse_changed(gm: CapturedModule, site: Site) -> None:
    weight = get_path(gm, site.weight)
    known = gm.meta.get("samples", {}).get(site.weight)
    if known is None or weight.is_meta or is_own(weight) or torch.equal(sample(weight), known):
        return
    raise MergeError(
        f"site '{site.name}': '{site.weight}' was overwritten after apply, in the model that shares it with the "
        "graph (by loading merged weights there?), so the adapter no longer fits it. Load merged weights into a "
        "copy of the model; to go on with this graph, load the original weights again"
    )


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


def _restore(node: Node) -> None:
    x, weight, bias = node.args[:3]
    kind = LAYER_KINDS[notes(node)["kind"]]
    kind.restore(node, x, weight, bias)
    node.kwargs = {}
    lorafx = {k: v for k, v in notes(node).items() if k not in ("site", "kind")}
    node.meta["custom"] = {**node.meta["custom"], "lorafx": lorafx}


def _write(gm: CapturedModule, site: Site, nodes: list[Node], weight: Tensor) -> None:
    """Store a site's folded weight; ``nodes`` are the site's calls, not yet restored."""
    if not site.apart:
        rebind(gm, get_path(gm, site.weight), weight)  # under every name: ties stay tied
        return
    parameter = nn.Parameter(weight, requires_grad=False)
    mark_own(parameter)
    named = [n for n in gm.graph.find_nodes(op="get_attr") if n.target == site.weight]
    if not any(reader not in nodes for source in named for reader in readers(source)):
        set_tensor(gm, site.weight, parameter)  # the other use has a name of its own
        return
    name = f"{site.path}.merged_weight"
    set_tensor(gm, name, parameter)
    for node in nodes:
        read = node.args[1]
        assert isinstance(read, Node)
        node.update_arg(1, _read_instead(read, name))
        while not read.users and read.op == "call_function":
            unused, read = read, read.all_input_nodes[0]
            gm.graph.erase_node(unused)


def _read_instead(read: Node, name: str) -> Node:
    """A read of another parameter, through the same casts and transposition."""
    with read.graph.inserting_before(read):
        if read.op == "get_attr":
            return read.graph.get_attr(name)
        source = read.all_input_nodes[0]
        own = _read_instead(source, name)
        return read.graph.node_copy(read, lambda _: own)


def _remove_adapter(gm: CapturedModule, site: Site) -> None:
    for name in site.parameter_names.values():
        delete_path(gm, name)
        holder = name.rpartition(".")[0]
        if not get_path(gm, holder)._parameters:
            delete_path(gm, holder)
    if site.path != site.name and not site.apart:
        delete_path(gm, site.path)


def _erase_unused_scopes(gm: CapturedModule) -> None:
    for node in gm.graph.find_nodes(op="get_attr"):
        if not node.users:
            gm.graph.erase_node(node)


def _freeze(gm: CapturedModule, originals: Mapping[str, Tensor]) -> None:
    """Give what the adapted graph goes on changing a copy, or its original value back; nothing trains."""
    for name, tensor in list(named_tensors(gm)):
        if get_path(gm, name) is not tensor:
            continue  # another name of one that is done
        if name in originals:
            mark_own(rebind(gm, tensor, originals[name].detach()).requires_grad_(False), False)
        elif not isinstance(tensor, nn.Parameter) or tensor.requires_grad:
            rebind(gm, tensor, tensor.detach().clone()).requires_grad_(False)


def _same_as_captured(captured: str, merged: CapturedModule) -> None:
    text = format_graph(merged)
    if text == captured:
        return
    pairs = zip(captured.splitlines(), text.splitlines(), strict=False)
    first = next(((a, b) for a, b in pairs if a != b), ("(end)", "(end)"))
    raise PassError(f"merge: the graph is not the captured one again; captured: {first[0]!r}, merged: {first[1]!r}")
