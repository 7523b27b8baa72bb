"""What of a device decides how a kernel is built: no names, only what the device says of itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from lorafx.kernels.triton.tiles import interpreted


@dataclass(frozen=True)
class Device:
    """``processors`` (SMs or CUs), ``shared`` memory that a program may take (bytes), and whether it is AMD's."""

    processors: int = 132
    shared: int = 64 * 1024
    amd: bool = False


_PRETENDED: ContextVar[Device | None] = ContextVar("device", default=None)


def device_of(device: torch.device) -> Device:
    """What ``device`` says; where it is no GPU (interpreter, meta tensors), the defaults of :class:`Device`."""
    pretended = _PRETENDED.get()
    if pretended is not None:
        return pretended
    return _ask(device) if device.type == "cuda" else Device()


@lru_cache
def _ask(device: torch.device) -> Device:
    properties: Any = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 0) or properties.shared_memory_per_block
    return Device(int(properties.multi_processor_count), int(shared), torch.version.hip is not None)


@contextmanager
def pretend(device: Device) -> Iterator[None]:
    """Build kernels as for ``device``, whatever the tensors are on."""
    token = _PRETENDED.set(device)
    try:
        yield
    finally:
        _PRETENDED.reset(token)


def precision(dtype: torch.dtype, device: Device, exact: bool = False) -> str:
    """``input_precision`` of ``tl.dot``: for float32 what PyTorch is set to, exact if ``exact``; else of no effect.

    Where float32 is to be exact, three TF32 products stand for one of float32 on CUDA: tensor cores, and the
    accuracy of float32 but for its last bits. AMD's matrix cores multiply float32 itself.
    """
    if dtype is not torch.float32 or device.amd or interpreted():
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" and not exact else "tf32x3"
