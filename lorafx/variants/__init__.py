"""The ways to adapt a layer. A new variant is one file here and one line in ``VARIANTS``."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from lorafx.variants.adalora import AdaLora
from lorafx.variants.base import Variant
from lorafx.variants.dora import Dora
from lorafx.variants.lora import Lora, LoraWithBias
from lorafx.variants.vera import Vera

VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {v.name: v for v in (Lora(), LoraWithBias(), Dora(), Vera(), AdaLora())}
)
