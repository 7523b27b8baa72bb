"""LoftQ: a base and adapters that together start nearer to the dense weight than the base alone (arXiv 2310.08659).

    A_0 = B_0 = 0
    Q_t = what the format keeps of W - s B_{t-1} A_{t-1}                  t = 1 .. T (algorithm 1)
    s B_t A_t = the nearest of rank r to W - Q_t

The weight is stored as ``Q_T``, for whatever adapters the graph gets, and this one starts at ``A_T`` and ``B_T``. After
one round ``Q_1`` is the weight stored as it is, and the sum is nearer to ``W`` at every rank. Further rounds bring it a
little nearer at small ranks; at large ones they need not, since what is left has other scales.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lorafx.bases.tensor import QuantizedTensor
from lorafx.errors import MatchError, QuantizationError
from lorafx.graph import CapturedModule, get_path
from lorafx.ir import Site
from lorafx.passes.match import Choice
from lorafx.passes.quantize import Wanted, can_store, put_weights
from lorafx.spec import LoraSpec
from lorafx.variants.inits import Factors, Init, find_init, less, nearest


def loftq(gm: CapturedModule, choices: Sequence[Choice]) -> dict[str, Factors]:
    """Store the weights of the sites whose specs say ``init="loftq"``, in place, before an adapter starts there.

    Returns:
        A ``[..., r, in]`` and B ``[..., out, r]`` of each such site, by its name, in the adapter's dtype.

    Raises:
        MatchError: the weight of such a site cannot be stored in a base format, or has another use.
        QuantizationError: it is stored already, holds NaN or Inf, or loses nothing. Nothing is changed.
    """
    by_weight: dict[str, list[tuple[Site, LoraSpec, Init, Wanted]]] = {}
    for choice in choices:
        site, spec = choice.site, choice.spec
        init = None if spec is None else find_init(spec.init)
        if site is None or spec is None or init is None or not init.rounds:
            continue
        if not can_store(choice):
            raise MatchError(
                f"site '{site.name}': init={spec.init!r} makes up for what base={spec.base!r} loses, and only weights "
                "of linear layers and stacks of experts, without another use, are stored so: leave it out "
                "(exclude_modules), or give it a spec of its own that starts otherwise"
            )
        by_weight.setdefault(site.weight, []).append((site, spec, init, Wanted.by(choice, spec)))
    stored: dict[str, Tensor] = {}
    factors: dict[str, Factors] = {}
    for name, found in by_weight.items():
        weight = get_path(gm, name).detach()
        if isinstance(weight, QuantizedTensor):
            raise QuantizationError(
                f"'{name}' is stored as {weight.packed.format} already, and init={found[0][1].init!r} needs what that "
                "has lost: apply it to the model that this one was quantized from"
            )
        left = weight
        for _ in range(max(init.rounds for _, _, init, _ in found)):
            kept = found[0][3].store(name, left)
            assert isinstance(kept, QuantizedTensor)
            stored[name] = kept
            lost, left = weight.float() - kept.dequantize().float(), weight
            if not bool(lost.any()):
                raise QuantizationError(
                    f"{kept.packed.format} loses nothing of '{name}', so that by init={found[0][1].init!r} A and B "
                    "would start at zero both, and never train: give it a spec of its own that starts otherwise"
                )
            for site, spec, _, _ in found:  # several where they are rows of one weight
                a, b = (t.to(spec.dtype_for(weight.dtype)) for t in nearest(site.matrix(lost), site.r, site.scaling))
                factors[site.name] = a, b
                left = site.store(less(site.matrix(left), a, b, site.scaling), left)
    put_weights(gm, stored)
    return factors
