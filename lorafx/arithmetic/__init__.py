"""Arithmetic on adapters: combining them, converting them to plain LoRA, and taking one out of a fine-tuned model."""

from __future__ import annotations
