"""The demo's one error."""

from __future__ import annotations

from lorafx.errors import LorafxError


class DemoError(LorafxError):
    """Something that the demo needs (weights, packages, the library's sources) is not on this machine."""
