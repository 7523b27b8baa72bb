"""The ways to adapt a layer. A new variant is one file here and one line in ``SELECTABLE``."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from lorafx.variants.adalora import AdaLora
from lorafx.variants.base import Variant
from lorafx.variants.dora import Dora
from lorafx.variants.lora import Lora, LoraWithBias
from lorafx.variants.tokens import Tokens
from lorafx.variants.vera import Vera

#: What ``LoraSpec.variant`` selects.
SELECTABLE: Mapping[str, Variant] = MappingProxyType(
    {v.name: v for v in (Lora(), LoraWithBias(), Dora(), Vera(), AdaLora())}
)

#: What a site can be: one of those, or rows that ``LoraSpec.trainable_token_indices`` trains.
VARIANTS: Mapping[str, Variant] = MappingProxyType({**SELECTABLE, "tokens": Tokens()})
