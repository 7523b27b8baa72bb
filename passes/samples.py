"""Samples: whether a weight is still the one that was adapted, told by some of its values."""

from __future__ import annotations

import torch
from torch import Tensor

from lorafx.bases.tensor import QuantizedTensor
from lorafx.errors import MergeError
from lorafx.graph import CapturedModule, get_path, is_own
from lorafx.ir import Site


def sample(weight: Tensor) -> Tensor:
    """Some 64 values of a weight; of one in a base format, some 64 of its codes."""
    stored = weight.packed.tensors["codes"] if isinstance(weight, QuantizedTensor) else weight
    flat = stored.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // 64)].cpu().clone() if not weight.is_meta else flat[:0]


def refuse_changed(gm: CapturedModule, site: Site) -> None:
    """Refuse a base weight that the user's model, which shares it, has overwritten since it was first adapted.

    Raises:
        MergeError: names the site.
    """
    weight = get_path(gm, site.weight)
    known = gm.meta.get("samples", {}).get(site.weight)
    if known is None or weight.is_meta or is_own(weight):
        return
    if torch.equal(sample(weight).nan_to_num(), known.nan_to_num()):  # a NaN is for who computes with it to name
        return
    raise MergeError(
        f"site '{site.name}': '{site.weight}' was overwritten after apply, in the model that shares it with the "
        "graph (by loading merged weights there?), so the adapter no longer fits it. Load merged weights into a "
        "copy of the model; to go on with this graph, load the original weights again"
    )
