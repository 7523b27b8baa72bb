"""The demo: MiniLM fine-tuned on the standard library's documentation, merged, exported and checked."""

from __future__ import annotations
