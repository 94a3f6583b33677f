"""How speed grows on one NVIDIA GPU: tokens from 1k to 64k, and experts from 8 to 256, at Qwen3-30B-A3B's widths.

bfloat16; 128 experts where the tokens vary, 16384 tokens where the experts do, 8 experts a token. Timed as in gpu_flax.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks import gpu_command
from benchmarks.gpu_experts import ROWS as EXPERTS
from benchmarks.gpu_meter import Cuda, Dry
from benchmarks.gpu_problem import SHAPES, Shape
from benchmarks.gpu_tables import Figures, reasons, speed
from benchmarks.gpu_wall import WallBench

TOKENS, EXPERT_COUNTS = (1024, 4096, 16384, 65536), (8, 32, 128, 256)
ROWS = {name: EXPERTS[name] for name in ("triton", "grouped_mm", "te", "compiled")}
BASE = SHAPES["qwen3"]
# Series -> (heading, the size that varies, the size that does not).
SERIES = {
    "tokens": (f"E = {BASE.n_experts}", "tokens", "n_experts"),
    "experts": (f"T = {BASE.tokens}", "n_experts", "tokens"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; 1 where a shape or the device was lost on the way."""
    options = _options(arguments)
    meter = (Dry if options.dry else Cuda)(options.warmup, options.rep)
    every = shapes(options.dry)
    rows = gpu_command.rows(ROWS, options)
    sizes = {key: shape for key, shape in every.items() if key in (options.points or every)}
    return gpu_command.run(WallBench(meter, rows, sizes, options, say=gpu_command.say), options, tables)


def shapes(dry: bool) -> dict[str, Shape]:
    """Each point once, by name; in a dry run two of each series, narrow."""
    tokens, experts = (TOKENS, EXPERT_COUNTS) if not dry else ((64, 128), (8, 16))
    base = BASE if not dry else replace(BASE.tiny(), k=2)
    found = {f"t{t}": replace(base, name=f"T = {t}", tokens=t) for t in tokens}
    for e in experts:
        if e != base.n_experts:
            found[f"e{e}"] = replace(base, name=f"E = {e}", n_experts=e)
    return found


def series(figures: Figures, name: str) -> dict[str, dict[str, Any]]:
    """The points of a series, in order; the point that both share is the one whose other size most points have."""
    _, varies, fixed = SERIES[name]
    every = figures["shapes"]
    own = next((shape for key, shape in every.items() if key.startswith(name[0])), None)
    points = {key: shape for key, shape in every.items() if own is not None and shape[fixed] == own[fixed]}
    return dict(sorted(points.items(), key=lambda item: int(item[1][varies])))


def tables(figures: Figures) -> str:
    """A table of each series, and why a cell is empty."""
    parts = []
    for name, (heading, varies, _) in SERIES.items():
        points = series(figures, name)
        letter = "T" if varies == "tokens" else "E"
        named = {key: {**shape, "name": f"{letter} = {shape[varies]}"} for key, shape in points.items()}
        part = speed({**figures, "shapes": named}, {"best of ours / best peer": "peer"})
        parts.append(f"{heading}:\n\n{part}")
    return "\n\n".join([*parts, "\n".join(reasons(figures))]).rstrip()


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = gpu_command.parser("gpu_growth", __doc__, ROWS)
    parser.add_argument("--points", nargs="*", choices=list(shapes(False)), help="which; all by default")
    gpu_command.walled(parser, rep=40, warmup=10, rounds=4, budget=240)
    return gpu_command.parse(parser, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
