"""docs/adding_a_variant.md, followed to the letter in a copy of the package, with the laws run on the result."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A checkout with the page's variant in it."""
    for room in ("lorafx", "passes", "export", "tests"):
        shutil.copytree(ROOT / room, tmp_path / room, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    file, imported, listed = re.findall(r"```python\n(.*?)```", (ROOT / "docs/adding_a_variant.md").read_text(), re.S)
    variants = tmp_path / "lorafx" / "variants"
    (variants / "gated.py").write_text(file)
    registry = (variants / "__init__.py").read_text()
    before = listed.replace(", Gated()", "")
    assert before in registry, "the page shows another registry than there is"
    registry = registry.replace(before, listed).replace(
        "from lorafx.variants.lora", f"{imported}from lorafx.variants.lora"
    )
    (variants / "__init__.py").write_text(registry)
    return tmp_path


def run(command: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(directory)}
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)


def test_the_laws_hold_for_the_variant_of_the_page(copied: Path) -> None:
    laws = "identity or gradcheck or export or seed"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "tests/test_laws.py"]
    done = run([*command, "-k", f"gated and ({laws})"], copied)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 10, done.stdout[-500:]


TRAIN = """
import torch, lorafx
assert lorafx.__file__.startswith({root!r})
model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
x = torch.randn(16, 6)
gm = lorafx.apply(model, lorafx.LoraSpec(variant="gated", r=2, target_modules=["0", "2"]), (x,))
assert torch.equal(gm(x), model(x))
optimizer = torch.optim.Adam([p for p in gm.parameters() if p.requires_grad], lr=0.05)
for _ in range(20):
    optimizer.zero_grad()
    loss = gm(x).square().mean()
    loss.backward()
    optimizer.step()
assert loss < model(x).square().mean() / 2
lorafx.merge_and_export(gm, "gated.onnx")
"""


def test_it_trains_and_is_exported(copied: Path) -> None:
    done = run([sys.executable, "-c", TRAIN.format(root=str(copied))], copied)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (copied / "gated.onnx").exists()
