"""Exports killed at 200 random moments (or as many as are given), under both ways of naming the weights' file.

python benchmarks/export_kills.py [KILLS]

What must hold is in tests/test_export_faults.py, which does it 20 times.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

if __name__ == "__main__":
    os.environ["LORAFX_KILLS"] = sys.argv[1] if len(sys.argv) > 1 else "200"
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # a pool of threads does not survive fork
    tests = Path(__file__).parents[1] / "tests" / "test_export_faults.py"
    sys.exit(pytest.main([str(tests), "-k", "killed", "-q"]))
