"""The formats that a frozen base weight can be stored in. A new one is one file here and one line in ``FORMATS``."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from lorafx.bases.base import Format
from lorafx.bases.int8 import Int8
from lorafx.bases.nf4 import Nf4

#: By name.
FORMATS: Mapping[str, Format] = MappingProxyType({f.name: f for f in (Nf4(), Int8())})
