"""`python -m benchmarks`: the benchmarks that run on this machine's CPU, as tables of ratios.

Compared in one process and one run: the runs of all candidates are interleaved, and the figure is the median.
`calibration` and `compare` measure the numerics report itself. A GPU's benchmarks and `paper_dispatch`, which measures
nothing, run one at a time, by name, and have options of their own: `python -m benchmarks gpu_experts --help`.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

SUITES = {
    "matmul": "cpu_matmul",
    "experts": "cpu_experts",
    "calibration": "calibration",
    "compare": "cpu_compare",
}
# With options of their own; "paper_dispatch" runs nothing but arithmetic.
APART = (
    "gpu_all",
    "gpu_few",
    "gpu_gptoss",
    "gpu_growth",
    "gpu_parallel",
    "gpu_portable",
    "gpu_experts",
    "gpu_flax",
    "paper_dispatch",
    "results",
    "tune",
)


def main() -> int:
    """Run the suites that were named, or all; or the one that has options of its own."""
    if len(sys.argv) > 1 and sys.argv[1] in APART:
        return int(import_module(f"benchmarks.{sys.argv[1]}").main(sys.argv[2:]))
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suite", nargs="*", choices=[[], *SUITES], default=[], help="which; all by default")
    parser.add_argument("--runs", type=int, default=9, help="interleaved runs of each candidate (default 9)")
    arguments = parser.parse_args()
    _on_the_cpu(arguments.suite or list(SUITES), arguments.runs)
    return 0


def _on_the_cpu(names: list[str], runs: int) -> None:
    from benchmarks.harness import heading, two_threads

    two_threads()  # before the frameworks start theirs
    suites = [import_module(f"benchmarks.{SUITES[name]}") for name in names]
    print(heading())
    for suite in suites:
        suite.main(runs)


if __name__ == "__main__":
    sys.exit(main())
