"""What a user installs: the tests run against the built wheel (``make test``), never against the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lorafx

ROOT = Path(__file__).resolve().parents[1]
# Where each package lies in the checkout, and in the wheel.
PACKAGES = {"lorafx": "lorafx", "passes": "lorafx/passes", "export": "lorafx/export"}


@pytest.fixture(scope="module")
def wheel() -> Distribution:
    installed = distribution("lorafx")
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable"):
        pytest.skip("lorafx is installed editable; `make test` installs the wheel that this test is about")
    return installed


def run_python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


def checkout_files() -> set[str]:
    """Every file of the three packages, under the name that it must have in the wheel."""
    found = set()
    for source, target in PACKAGES.items():
        for path in (ROOT / source).rglob("*"):
            inside = path.relative_to(ROOT / source)
            linked = source == "lorafx" and inside.parts[0] in PACKAGES  # lorafx/passes -> ../passes
            if path.is_file() and "__pycache__" not in inside.parts and not linked:
                found.add(f"{target}/{inside.as_posix()}")
    return found


def test_the_wheel_is_what_gets_imported(wheel: Distribution) -> None:
    purelib = Path(sysconfig.get_path("purelib")).resolve()
    assert Path(lorafx.__file__).resolve() == purelib / "lorafx" / "__init__.py"
    assert wheel.version == lorafx.__version__


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(wheel: Distribution) -> None:
    names = {file.as_posix() for file in wheel.files or () if "__pycache__" not in file.parts}
    shipped = {name for name in names if not name.startswith(("..", f"lorafx-{wheel.version}.dist-info/"))}
    assert "lorafx/py.typed" in shipped
    missing = sorted(checkout_files() - shipped)
    assert not missing, f"not in the wheel; add their packages to [tool.setuptools] in pyproject.toml: {missing}"
    assert sorted(shipped - checkout_files()) == []


@pytest.mark.parametrize("name", ["passes", "export"])
def test_passes_and_export_are_importable_only_below_lorafx(wheel: Distribution, name: str, tmp_path: Path) -> None:
    assert run_python(f"import lorafx.{name}", tmp_path).returncode == 0
    alone = run_python(f"import {name}", tmp_path)
    assert alone.returncode == 1
    assert f"No module named '{name}'" in alone.stderr


def test_the_extras_are_not_needed_to_import_lorafx(tmp_path: Path) -> None:
    block = "import sys; sys.modules.update(dict.fromkeys(['transformers', 'peft', 'accelerate', 'matplotlib']))"
    result = run_python(f"{block}; import lorafx, lorafx.cli", tmp_path)
    assert result.returncode == 0, result.stderr


def test_the_console_script_answers_help(tmp_path: Path) -> None:
    script = shutil.which("lorafx", path=sysconfig.get_path("scripts"))
    assert script is not None
    result = subprocess.run([script, "--help"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Usage" in result.stdout


def test_every_named_dependency_is_pinned_within_its_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    named = [Requirement(line) for group in (project["dependencies"], *extras) for line in group]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    for requirement in named:
        name = canonicalize_name(requirement.name)
        if name != "lorafx":  # an extra that includes another
            assert name in versions, f"{name} is in pyproject.toml but not in constraints.txt"
            assert requirement.specifier.contains(versions[name]), f"{requirement} excludes {versions[name]}"
            assert "+" not in versions[name], f"{name}: a local build tag ties the pin to one index"
