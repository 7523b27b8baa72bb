"""Residual: what an adapter leaves of a weight that it starts by taking a part of, and the way back to plain LoRA.

    PiSSA, OLoRA, LoRA-GA start:   W_own = W - s B0 A0                 the adapter's own version of the weight
    after training:                W' = W_own + s B A
    plain LoRA on the original:    W' = W + s (B A - B0 A0) = W + s [B, -B0] [A; A0]          of rank 2 r

The two agree but for the rounding of ``W_own`` to the base's dtype (half a unit in the last place of each weight). The
start values A0 and B0 are kept beside the adapter, frozen: they are small, they make the way back exact, and
with them the weight need not be stored with a checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorafx.errors import AdapterError
from lorafx.graph import CapturedModule, get_path, mark_own, set_tensor
from lorafx.ir import Adapter, Site
from lorafx.variants.base import Start
from lorafx.variants.inits import less

#: The parameters whose product is taken from the weight.
FACTORS = ("lora_A", "lora_B")

#: Parameters of variants whose update of the weight is ``s B A`` none the less.
_BESIDE = ("lora_magnitude_vector", "lora_B_bias")


def start_names(adapter: Adapter, site: Site) -> tuple[str, str]:
    """The state dict names of A0 and B0 of a site that starts by taking from its weight."""
    a, b = (adapter.own_name(f"{site.path}.{factor}_start") for factor in FACTORS)
    return a, b


def keep_residual(gm: CapturedModule, adapter: Adapter, site: Site, start: Start) -> bool:
    """Give the adapter its version of the site's weight and its start values, if the start takes from the weight.

    Where another site of the adapter took from other rows of the same weight, both are missing from it.
    """
    if start.base is None:
        return False
    for name, factor in zip(start_names(adapter, site), FACTORS, strict=True):
        _set_frozen(gm, name, start.parameters[factor].clone())
    name = adapter.own_name(site.weight)
    known = None if site.rows is None else _find(gm, name)
    like = get_path(gm, site.weight).detach() if known is None else known
    _set_frozen(gm, name, site.store(start.base, like))
    return True


def rebuild_residual(gm: CapturedModule, adapter: Adapter) -> None:
    """Compute the adapter's versions of weights anew, from the base's and the start values (when those were loaded)."""
    left = {name: get_path(gm, name).detach() for name in adapter.residual}
    for site in adapter.sites:
        if (start := _start_factors(gm, adapter, site)) is not None:
            stored = left[site.weight]
            left[site.weight] = site.store(less(site.matrix(stored), *start, site.scaling), stored)
    with torch.no_grad():
        for name, value in left.items():
            get_path(gm, adapter.own_name(name)).copy_(value)


def plain_factors(gm: CapturedModule, adapter: Adapter, site: Site) -> tuple[Tensor, Tensor]:
    """A and B of a LoRA adapter on the *original* base weight that is what this site has become.

    Returns:
        A ``[..., k, in]`` and B ``[..., out, k]`` in the adapter's dtype, to be scaled by ``site.scaling``:
        ``k = 2 r`` where the site took a part of its weight (an ``alpha`` of twice the site's, with rsLoRA
        ``sqrt(2)`` times, is then that scaling); otherwise its own A and B. What the variant has besides
        (DoRA's magnitudes, a bias on B) stays as it is: relative to the original weight it means the same.

    Raises:
        AdapterError: the site's variant has no such factors.
    """
    if not set(FACTORS) <= set(site.parameter_names) <= {*FACTORS, *_BESIDE}:
        raise AdapterError(f"site '{site.name}': variant '{site.variant}' is not LoRA's B A; convert it first")
    a, b = (site.tensors(gm)[factor].detach() for factor in FACTORS)
    start = _start_factors(gm, adapter, site)
    if start is None:
        return a, b
    return torch.cat([a, start[0]], dim=-2), torch.cat([b, -start[1]], dim=-1)


def _start_factors(gm: CapturedModule, adapter: Adapter, site: Site) -> tuple[Tensor, Tensor] | None:
    """A0 and B0, if the site took a part of its weight."""
    a, b = (_find(gm, name) for name in start_names(adapter, site))
    return None if a is None or b is None else (a, b)


def _find(gm: CapturedModule, name: str) -> Tensor | None:
    try:
        return gm.get_parameter(name).detach()
    except AttributeError:  # there is none
        return None


def _set_frozen(gm: CapturedModule, name: str, value: Tensor) -> None:
    tensor = nn.Parameter(value, requires_grad=False)
    mark_own(tensor)
    set_tensor(gm, name, tensor)
