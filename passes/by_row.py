"""By row: whether each row of a batch can go through an adapter of its own.

A layer's output has one row (or an equal share of rows) for each row of the batch if its first dimension is the
batch's, or was flattened from one that is: a view keeps the order, so ``[batch, sequence, d]`` viewed as ``[batch *
sequence, d]`` (GPT-2's Conv1D, the router of a mixture of experts) has them one after the other. Anything else is
refused: a wrong guess would give each row another one's adapter without a word.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Node

from lorafx.errors import AdapterError
from lorafx.graph import CapturedModule, share
from lorafx.ir import Adapter, Site, layer_nodes
from lorafx.ops import ADAPTED
from lorafx.passes.activate import deactivate
from lorafx.passes.layers import find_operands

aten = torch.ops.aten

_VIEWS = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints})

#: Operators that compute each element of their (first) input by itself, so that rows stay where they are.
_KEEP_ROWS = frozenset(
    {
        aten.to.dtype, aten.contiguous.default, aten.clone.default, aten.detach.default, aten.dropout.default,
        aten.gelu.default, aten.relu.default, aten.silu.default, aten.tanh.default,
    }
)  # fmt: skip


def check_rows(gm: CapturedModule, chosen: Sequence[Adapter]) -> None:
    """Refuse adapters that cannot be told apart by row.

    Raises:
        AdapterError: names the adapter or the site, and why.
    """
    for adapter in chosen:
        if whole := (*adapter.trained, *adapter.residual):
            raise AdapterError(
                f"adapter '{adapter.name}' has its own version of '{whole[0]}' (modules_to_save, bias, or an "
                "initialisation that changes the weight), of which a batch has one for all its rows: run its rows in a "
                "batch of their own"
            )
    bare = share(gm)
    deactivate(bare)
    batch = _batch(bare)
    nodes = layer_nodes(bare)
    for site in {site.layer: site for adapter in chosen for site in adapter.sites}.values():
        for node in nodes[site.layer]:
            if why := _why_not(node, site, batch):
                raise AdapterError(
                    f"site '{site.name}': {why}, so rows of a batch cannot go through adapters of their own. Leave the "
                    "layer out of the adapters, or run each adapter's rows in a batch of their own"
                )


def _why_not(node: Node, site: Site, batch: frozenset[str]) -> str | None:
    operands = find_operands(node)
    if operands is None or site.kind not in ADAPTED:
        return "it adapts a parameter for the whole batch at once"
    if not batch:
        return "the graph was captured without inputs, or for one size of batch, and does not tell what the batch is"
    x = operands.x
    while x.target in _KEEP_ROWS:
        x = x.all_input_nodes[0]
    if _first(x) in batch or (x.target in _VIEWS and _first(x.all_input_nodes[0]) in batch):
        return None
    return "the first dimension of its input is not the batch"


def _first(node: Node) -> str | None:
    value = node.meta.get("val")
    return str(value.shape[0]) if isinstance(value, Tensor) and value.dim() > 0 else None


def _batch(gm: CapturedModule) -> frozenset[str]:
    """The symbols for the size of the batch: that of the inputs' first dimensions, if they all go by one name.

    There may be several, where the model's code did not need two inputs' sizes to be equal (a mask that broadcasts).
    """
    dims = gm.signature.dims
    names = {dims.get(placeholder, {}).get(0) for placeholder in gm.signature.placeholders}
    if len(names) != 1 or None in names:
        return frozenset()
    return frozenset(size for n in gm.graph.find_nodes(op="placeholder") if (size := _first(n)) is not None)
