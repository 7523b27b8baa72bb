"""``python -m lorafx``: the command line."""

from __future__ import annotations

from lorafx.cli import main

main()
