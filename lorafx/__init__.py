"""Rewrites a model's graph to train with low-rank adapters and folds them away into a verified ONNX file."""

from __future__ import annotations

__version__ = "0.1.0"
