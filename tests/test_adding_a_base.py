"""docs/adding_a_base.md, followed to the letter in a copy of the package, with the laws run on the result."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_laws_hold_for_the_format_of_the_page(tmp_path: Path) -> None:
    for room in ("lorafx", "passes", "export", "tests"):
        shutil.copytree(ROOT / room, tmp_path / room, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    file, imported, listed = re.findall(r"```python\n(.*?)```", (ROOT / "docs/adding_a_base.md").read_text(), re.S)
    bases = tmp_path / "lorafx" / "bases"
    (bases / "fp8.py").write_text(file)
    registry = (bases / "__init__.py").read_text()
    before = listed.replace(", Fp8()", "")
    assert before in registry, "the page shows another registry than there is"
    registry = registry.replace(before, listed).replace("from lorafx.bases.int8", f"{imported}from lorafx.bases.int8")
    (bases / "__init__.py").write_text(registry)

    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "fp8"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [*command, "tests/test_bases.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 40, done.stdout[-500:]
