"""Ahead-of-time compilation of the kernels, for devices that need not be there.

What is compiled is what would be launched: Triton specialises on the arguments of a recorded launch
(:mod:`lorafx.kernels.triton.launches`) as it would at a real one. The report is read from the machine code.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from lorafx.kernels.triton.device import Device
from lorafx.kernels.triton.launches import Launch


@dataclass(frozen=True)
class Part:
    """A device to compile for. ``shared``: bytes that a program may have, from the vendor's tables."""

    name: str
    target: GPUTarget
    device: Device

    @property
    def amd(self) -> bool:
        """Whether it is AMD's."""
        return self.device.amd


#: Shared memory a block may have: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"
#: (163 KB for 8.0, 227 KB for 9.0 and 10.0); AMD CDNA 3 ISA guide: 64 KB of LDS.
PARTS = {
    "sm_80": Part("sm_80", GPUTarget("cuda", 80, 32), Device(108, 163 * 1024)),
    "sm_90": Part("sm_90", GPUTarget("cuda", 90, 32), Device(132, 227 * 1024)),
    "sm_100": Part("sm_100", GPUTarget("cuda", 100, 32), Device(148, 227 * 1024)),
    "gfx942": Part("gfx942", GPUTarget("hip", "gfx942", 64), Device(304, 64 * 1024, amd=True)),
}


@dataclass(frozen=True)
class Binary:
    """A compiled kernel and what its machine code tells.

    ``assembly`` is PTX, or AMD's; ``resources`` is what the disassembler or the code object says of its use.
    """

    launch: Launch
    part: Part
    shared: int
    assembly: str
    resources: str

    @cached_property
    def registers(self) -> int:
        """Registers of a thread (vector registers on AMD)."""
        return self._resource("REG:", r"\.vgpr_count: +")

    @cached_property
    def spilled(self) -> int:
        """What did not fit registers: bytes of stack on CUDA, registers (vector and scalar) on AMD."""
        if self.part.amd:
            return self._resource("", r"\.vgpr_spill_count: +") + self._resource("", r"\.sgpr_spill_count: +")
        return self._resource("STACK:", "")

    @cached_property
    def tensor_core(self) -> str | None:
        """The kind of tensor-core instruction that it has, if any."""
        kinds = ("mfma",) if self.part.amd else ("tcgen05.mma", "wgmma.mma_async", "mma.sync")
        return next((k for k in kinds if k in self.assembly), None)

    @cached_property
    def asynchronous(self) -> int:
        """Copies to shared memory that do not wait: ``cp.async`` and TMA on CUDA, ``global_load_lds`` on AMD."""
        pattern = r"(global|buffer)_load\w* .*\blds\b" if self.part.amd else r"cp\.async\.(ca|cg|bulk)"
        return len(re.findall(pattern, self.assembly))

    @property
    def faults(self) -> list[str]:
        """What is not as it should be: spills, too much shared memory, no tensor cores where there is a product."""
        found = []
        if self.spilled:
            found.append(f"{self.spilled} spilled")
        if self.shared > self.part.device.shared:
            found.append(f"{self.shared} bytes of shared memory, {self.part.name} has {self.part.device.shared}")
        if self.tensor_core is None and self.launch.name not in ("reduce", "dequantize"):
            found.append("no tensor-core instructions")
        return found

    def _resource(self, cuda: str, amd: str) -> int:
        found = re.search((amd if self.part.amd else cuda) + r"(\d+)", self.resources)
        if found is None:
            raise RuntimeError(f"{self.launch.name} on {self.part.name}: no resource usage in\n{self.resources}")
        return int(found[1])


def compile_launch(launch: Launch, part: Part) -> Binary:
    """Compile what ``launch`` would run.

    Raises:
        RuntimeError: if Triton has no tool to read the machine code with.
    """
    backend = make_backend(part.target)
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    bound, specialization, options = bind(*launch.args, **launch.options)
    packed, signature, constants, attributes = launch.kernel._pack_args(
        backend, launch.options, bound, specialization, options
    )
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=part.target, options=packed.__dict__)
    if part.amd:
        text = compiled.asm["amdgcn"]
        return Binary(launch, part, compiled.metadata.shared, text, text)
    resources = _resource_usage(compiled.asm["cubin"])
    return Binary(launch, part, compiled.metadata.shared, compiled.asm["ptx"], resources)


def _resource_usage(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        done = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True)
    return done.stdout


def unique(launches: Sequence[Launch]) -> Iterator[Launch]:
    """The first launch of each kernel that would be compiled anew (siblings mostly share theirs)."""
    seen = set()
    for launch in launches:
        given = zip(launch.kernel.params, launch.args, strict=True)
        what = (launch.name, str([a if p.is_constexpr else _kind(a) for p, a in given]), str(launch.options))
        if what not in seen:
            seen.add(what)
            yield launch


def _kind(argument: Any) -> Any:
    """What Triton specialises on, of an argument that is not a compile-time constant."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, tuple):
        return tuple(_kind(a) for a in argument)
    return (argument == 1, argument % 16 == 0) if type(argument) is int else argument
