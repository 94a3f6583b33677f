"""`python -m benchmarks`: the benchmarks that run on this machine's CPU, as tables of ratios.

Compared in one process and one run: the runs of all candidates are interleaved, and the figure is the median.
`calibration` and `compare` measure the numerics report itself.
"""

from __future__ import annotations

import argparse

from benchmarks.harness import heading, two_threads

two_threads()  # before the frameworks start theirs

from benchmarks import calibration, cpu_compare, cpu_experts, cpu_matmul  # noqa: E402

SUITES = {
    "matmul": cpu_matmul.main,
    "experts": cpu_experts.main,
    "calibration": calibration.main,
    "compare": cpu_compare.main,
}


def main() -> None:
    """Run the suites that were named, or all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suite", nargs="*", choices=[[], *SUITES], default=[], help="which; all by default")
    parser.add_argument("--runs", type=int, default=9, help="interleaved runs of each candidate (default 9)")
    arguments = parser.parse_args()
    print(heading())
    for name in arguments.suite or SUITES:
        SUITES[name](arguments.runs)


if __name__ == "__main__":
    main()
