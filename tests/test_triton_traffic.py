"""The bytes of a training step beside those of eager LoRA and of LoRAFusion; docs/kernels.md has the same table."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from lorafx.kernels.triton.comparison import Layer
from lorafx.kernels.triton.device import Device
from lorafx.kernels.triton.launches import step
from lorafx.kernels.triton.traffic import total, traffic

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="of the kernels as they are compiled")

GIB = 2**30
PAGE = Path(__file__).parents[1] / "docs" / "kernels.md"
#: An H100, on which LoRAFusion was measured: processors, shared memory.
H100 = Device(132, 227 * 1024)
#: GiB of DRAM traffic of a step that LoRAFusion's authors measured there at M = 8192, r = 16, bf16, by k = n:
#: torch's LoRA, and theirs (arXiv 2510.00206, figure of the DRAM traffic; the values are in its artifact).
PUBLISHED = {4096: (2.008, 1.258), 5120: (2.771, 1.836), 8192: (5.289, 4.044)}


def ours(m: int, features: int, adapters: torch.dtype = torch.bfloat16, fused: bool = True) -> int:
    """Bytes of a step of one layer with dropout; the product of the default's forward is the library's."""
    shape = (m, features, [features], [16], torch.bfloat16, 0.1)
    kernels = total(step(H100, *shape, adapters=adapters, bias=False, fused=fused)).dram
    return kernels if fused else kernels + Layer(m, features, features, 16).product


@pytest.mark.parametrize("features", PUBLISHED)
def test_bytes_beside_lorafusion_at_each_of_its_shapes(features: int) -> None:
    """Fused, fewer; by default, where the frozen layer's bits are kept, a few per cent more."""
    for m in range(2048, 8193, 256):
        layer = Layer(m, features, features, 16)
        assert layer.frozen < ours(m, features) < layer.lorafusion < layer.eager
        assert ours(m, features, torch.float32) < layer.lorafusion
        assert 1.02 * layer.lorafusion < ours(m, features, fused=False) < 1.07 * layer.lorafusion
    eager, fused = PUBLISHED[features]
    assert ours(8192, features) < fused * GIB
    # What was measured is more than each operand once, for both.
    layer = Layer(8192, features, features, 16)
    assert layer.eager < eager * GIB
    assert layer.lorafusion < fused * GIB


def test_siblings_share_their_reads() -> None:
    """Three siblings in one group read x, write dx and read it no more often than one does."""
    shape = (8192, 4096)
    group = total(step(H100, *shape, [4096] * 3, [16] * 3, torch.bfloat16, 0.1, bias=False, fused=True)).dram
    apart = 3 * ours(*shape, torch.float32)
    x = 8192 * 4096 * 2
    assert group < apart - 6 * x  # of down, of dright, and of dx, two of three each
    text = PAGE.read_text(encoding="utf-8")
    assert f"{group / GIB:.2f} GiB where three layers apart would move {apart / GIB:.2f}" in " ".join(text.split())


def test_flops_are_those_of_the_products() -> None:
    """2 a b c for each product ``[a, b] [b, c]``, whatever the tiling: of each kernel, and of a step."""
    m, k, widths, ranks = 260, 330, [40, 70], [3, 17]
    n, r = sum(widths), sum(ranks)
    small = sum(2 * m * a * b for a, b in zip(widths, ranks, strict=True))
    expected = {
        "down": 2 * m * k * r,
        "up": 2 * m * k * n + small,
        "grad_up": 2 * small,
        "dx": 2 * m * k * (n + r),
        "dright": 2 * m * k * r,
        "reduce": 0,
        "row_norm": sum(2 * a * k * b for a, b in zip(widths, ranks, strict=True)),
    }
    for dtype in (torch.bfloat16, torch.float16):
        for device in (H100, Device(1, 64 * 1024, amd=True)):
            found = dict.fromkeys(expected, 0)
            for launch in step(device, m, k, widths, ranks, dtype, dora=True, fused=True):
                found[launch.name] += traffic(launch).flops
            assert found == expected
    after = [traffic(x).flops for x in step(H100, m, k, widths, ranks, torch.bfloat16) if x.name == "up"]
    assert sum(after) == small  # beside the library's product


def test_nf4_moves_the_bytes_of_its_codes_and_scales() -> None:
    """Beside the dense weight, in forward and in backward; FLOPs are the same, and docs/kernels.md has the table."""
    text = PAGE.read_text(encoding="utf-8")
    for features in PUBLISHED:
        shape = (8192, features, [features], [16], torch.bfloat16, 0.1)
        found = total(step(H100, *shape, adapters=torch.bfloat16, bias=False, block_size=64))
        dense, numel = ours(8192, features), features**2
        tables = 2 * 4 * (256 + 1)  # the nested scales' values, and their offset
        assert dense - found.dram == 2 * (2 * numel - numel // 2 - numel // 64 - 4 * numel // 64 // 256) - tables
        row = [f"{b / GIB:.2f}" for b in (dense, found.dram)]
        assert f"| {features} | {' | '.join(row)} | {found.dram / dense:.2f} |" in text
        assert found.flops == total(step(H100, *shape, adapters=torch.bfloat16, bias=False, fused=True)).flops
    one = (1, 4096, [4096], [16], torch.bfloat16, 0.0)
    moved = [
        traffic(next(x for x in step(H100, *one, adapters=torch.bfloat16, bias=False, **way) if x.name == "up")).dram
        for way in ({"block_size": 64}, {"fused": True})
    ]
    few, many = (f"{b / 2**20:.2f}" for b in moved)
    assert f"`up` moves {few} MiB in the place of {many}" in " ".join(text.split())


def test_documented_table() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for features, (eager, fused) in PUBLISHED.items():
        layer = Layer(8192, features, features, 16)
        default, mine = ours(8192, features, fused=False), ours(8192, features)
        cells = [layer.frozen, layer.eager, layer.lorafusion, default, mine]
        ratios = [layer.lorafusion / layer.eager, default / layer.lorafusion, mine / layer.lorafusion]
        row = (
            f"| {features} | {' | '.join(f'{c / GIB:.2f}' for c in cells)} | {' | '.join(f'{r:.2f}' for r in ratios)} |"
        )
        assert row in text, row
        assert f"| {features} | {eager:.2f} | {fused:.2f} | {fused / eager:.2f} |" in text
