"""The ways to adapt a layer. A new variant is one file here and one line in ``VARIANTS``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType

from lorafx.errors import SpecError
from lorafx.variants.base import Variant
from lorafx.variants.lora import Lora

VARIANTS: Mapping[str, Variant] = MappingProxyType({v.name: v for v in (Lora(),)})


def find_variant(name: str, init: str) -> Variant:
    """The variant a spec names.

    Raises:
        SpecError: there is no such variant, or it does not know the initialisation asked for.
    """
    if name not in VARIANTS:
        near = difflib.get_close_matches(name, VARIANTS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise SpecError(f"variant={name!r} is not known{hint}; allowed: {', '.join(map(repr, VARIANTS))}")
    variant = VARIANTS[name]
    if init not in variant.inits:
        raise SpecError(f"init={init!r} is not known to variant {name!r}; allowed: {', '.join(variant.inits)}")
    return variant
