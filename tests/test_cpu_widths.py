"""The compiled kernels on vectors of other widths than this processor's widest: all compile, what can run is right."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest

from lorafx.kernels.cpu import build

SOURCE = Path(__file__).with_name("products.cpp")

#: What stands for the bits of nine words of a mask, whatever draws them.
MASKS = "masks 35518139403756896\n"

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="the widths are those of x86 processors"
)


def compiled(folder: Path, *flags: str) -> Path:
    """The products' check, built for a processor."""
    program = folder / "products"
    include = f"-I{build._FOLDER}"
    own = [flag for flag in build._FLAGS if not flag.startswith(("-O", "-march", "-fPIC"))]
    command = [*build._compiler(), "-O1", *own, *flags, include, str(SOURCE), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return program


@pytest.mark.parametrize(
    "flags",
    [("-march=native",), ("-march=native", "-mno-avx512f"), ("-march=native", "-mno-avx")],
    ids=["native", "without AVX-512", "without AVX"],
)
def test_products_are_right_and_masks_the_same_whatever_the_vectors_width(
    flags: tuple[str, ...], tmp_path: Path
) -> None:
    done = subprocess.run([str(compiled(tmp_path, *flags))], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, MASKS)


@pytest.mark.parametrize("processor", ["skylake-avx512", "cooperlake"])
def test_the_widest_vectors_compile_where_they_cannot_run(processor: str, tmp_path: Path) -> None:
    """The second has dot products of bfloat16."""
    compiled(tmp_path, f"-march={processor}")
