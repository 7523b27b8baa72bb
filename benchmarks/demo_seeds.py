"""The demo over several seeds: what the adapters bring on held-out text, and how much of it is luck.

The splits are the same for all seeds, and so is the probe; a seed sets the adapters' initial values and the
order of the batches. Prints one Markdown table.

    python benchmarks/demo_seeds.py --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from lorafx.demo.run import run_demo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        progress = Console(file=sys.stderr)
        results = [run_demo(Path(folder), seed, options.steps, progress) for seed in options.seeds]

    print(
        "| seed | probe, validation | adapted, validation | probe, test | adapted, test | ONNX Runtime, test "
        "| gained | lost | largest difference | seconds |"
    )
    print("| ---: " * 10 + "|")
    for r in results:
        shares = (r.probe.validation, r.adapted.validation, r.probe.test, r.adapted.test, r.exported.test)
        percents = " | ".join(f"{100 * share:.1f}" for share in shares if share is not None)
        print(
            f"| {r.seed} | {percents} | {r.gained} | {r.lost} | {r.max_difference:.1e} "
            f"| {sum(r.seconds.values()):.0f} |"
        )
    gains = [100 * (r.adapted.test - r.probe.test) for r in results]
    print(f"\nTest points over the probe: mean {statistics.mean(gains):+.1f}, least {min(gains):+.1f}.")


if __name__ == "__main__":
    main()
