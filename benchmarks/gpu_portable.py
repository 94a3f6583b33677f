"""The portable kernels of backend `triton` on one NVIDIA GPU against `loop`: float32, and widths that no tile divides.

Backend triton's faster kernels take 16-bit rows of widths that are multiples of 8; what these shapes ask for is left to
the portable ones. Timed as in gpu_flax; float32 is held to a tolerance that TF32 does not pass.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from benchmarks import gpu_command
from benchmarks.gpu_all import milliseconds
from benchmarks.gpu_command import row
from benchmarks.gpu_meter import Cuda, Dry
from benchmarks.gpu_problem import SHAPES, Shape
from benchmarks.gpu_tables import PASSES, Figures, line, lines, over, pair, reasons
from benchmarks.gpu_wall import WallBench

ROWS = {
    "triton": row("triton", "ours", "ours", experts="triton"),
    "grouped_mm": row("grouped_mm", "reference", "ours", experts="grouped_mm"),
    "loop": row("loop", "peer", "ours", experts="loop"),
}
QWEN, GPTOSS = (replace(SHAPES[name], tokens=4096) for name in ("qwen3", "gptoss"))
PROBLEMS = {
    "float32": replace(QWEN, name="Qwen3's widths, float32", dtype="float32"),
    "odd_float32": replace(QWEN, name="D = 2050, I = 771, float32", dim=2050, inter=771, dtype="float32"),
    "odd_bfloat16": replace(QWEN, name="D = 2050, I = 771, bfloat16", dim=2050, inter=771),
    "odd_float16": replace(QWEN, name="D = 2050, I = 771, float16", dim=2050, inter=771, dtype="float16"),
    "large_float32": replace(GPTOSS, name="GPT-OSS' widths, float32", dtype="float32"),
    "large_bfloat16": replace(GPTOSS, name="D = 2881, I = 2882, bfloat16", dim=2881, inter=2882),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; 1 where a shape or the device was lost on the way."""
    options = _options(arguments)
    meter = (Dry if options.dry else Cuda)(options.warmup, options.rep)
    bench = WallBench(meter, gpu_command.rows(ROWS, options), _shapes(options), options, say=gpu_command.say)
    return gpu_command.run(bench, options, tables)


def tables(figures: Figures) -> str:
    """Milliseconds and the ratio, and why a cell is empty."""

    def ms(shape: str, row: str, name: str) -> float | None:
        return milliseconds(figures["results"], shape, row, name)

    table = lines(
        figures,
        "T = 4096; forward / forward+backward, ms",
        lambda result: pair((result.get(name, {}).get("ms") for name in PASSES), "{:.2f}"),
    )
    ratios = [[over(ms(key, "loop", n), ms(key, "triton", n)) for n in PASSES] for key in figures["shapes"]]
    table.append(line("triton's speed / loop's (at least 1)", [pair(both, "{:.2f}") for both in ratios]))
    return "\n\n".join(["\n".join(table), "\n".join(reasons(figures))]).rstrip()


def _shapes(options: argparse.Namespace) -> dict[str, Shape]:
    named = options.problems or PROBLEMS
    if not options.dry:
        return {key: PROBLEMS[key] for key in named}
    tiny = {key: PROBLEMS[key].tiny() for key in named}
    return {key: replace(s, dim=66, inter=35) if "odd" in key else s for key, s in tiny.items()}


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = gpu_command.parser("gpu_portable", __doc__, ROWS)
    gpu_command.walled(parser, rep=40, warmup=10, rounds=4, budget=240)
    parser.add_argument("--problems", nargs="*", choices=list(PROBLEMS), help="which; all by default")
    return gpu_command.parse(parser, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
