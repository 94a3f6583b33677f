"""Few tokens on one NVIDIA GPU: T = 1, 16, 256 and 1024 at four models' sizes, eager and replayed from CUDA graphs.

A time is that of a group of calls by the host's clock, so that what the host does counts; rounds as in gpu_flax. Both
passes are captured together. Every replay is first held against float64 with NaN left where its results lie. The limit:
the weights of the experts that have rows read once, and for both passes read again and every gradient written, at the
rate of a large copy, or the products where those take longer.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks import gpu_command
from benchmarks.gpu_experts import ROWS as EXPERTS
from benchmarks.gpu_few_bench import GRAPH, FewBench
from benchmarks.gpu_meter import Cuda, Dry
from benchmarks.gpu_problem import Shape
from benchmarks.gpu_tables import PASSES, Figures, best, line, over, pair, reasons

TOKENS = (1, 16, 256, 1024)
NAMES = (
    "triton",
    "grouped_mm",
    "composite",
    "compiled",
    "transformers",
    "automodel",
    "te_layers",
    "te_layers_compiled",
    "liger",
)
ROWS = {name: replace(EXPERTS[name], default=name not in ("te_layers", "liger")) for name in NAMES}
TITLES = {"": "eager", GRAPH: "replayed from a CUDA graph"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; 1 where a shape or the device was lost on the way."""
    options = _options(arguments)
    meter = (Dry if options.dry else Cuda)(options.warmup, options.rep)
    bench = FewBench(meter, gpu_command.rows(ROWS, options), _shapes(options), options, say=gpu_command.say)
    return gpu_command.run(bench, options, tables)


def tables(figures: Figures) -> str:
    """A table of each shape, eager and replayed; then what could not be captured, and why a cell is empty."""
    bases = list(dict.fromkeys(shape["base"] for shape in figures["shapes"].values() if "base" in shape))
    parts = [_table(figures, base, kind) for base in bases for kind in TITLES]
    return "\n\n".join([*parts, "\n".join([*_uncaptured(figures), *reasons(figures)])]).rstrip()


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = gpu_command.parser("gpu_few", __doc__, ROWS)
    gpu_command.walled(parser, rep=12, warmup=4, rounds=8, budget=480)
    add = parser.add_argument
    add("--tokens", type=int, nargs="*", default=list(TOKENS), help="T (default 1 16 256 1024)")
    add("--profile", type=int, help="print where the time goes at so many tokens")
    add("--profile-rows", nargs="*", default=["triton"], choices=list(ROWS), help="of these rows (default triton)")
    return gpu_command.parse(parser, arguments)


def _shapes(options: argparse.Namespace) -> dict[str, Shape]:
    shapes = gpu_command.shapes(options)
    return {f"{key}-{t}": replace(shape, tokens=t) for key, shape in shapes.items() for t in options.tokens}


def _table(figures: Figures, base: str, kind: str) -> str:
    """Microseconds of both passes, the limit, and ratios, one column a number of tokens."""
    shapes = {key: shape for key, shape in figures["shapes"].items() if shape.get("base") == base}
    names = [name + kind for name in PASSES]
    heads = "".join(f" T = {shape['tokens']} |" for shape in shapes.values())
    name = next(iter(shapes.values()))["name"]
    found = [f"| {name}, {TITLES[kind]}, us: forward / forward+backward |{heads}", "|---|" + "---|" * len(shapes)]
    for row, title in figures["rows"].items():
        there = {r["shape"]: r for r in figures["results"] if r["row"] == row}
        cells = [pair((_us(there.get(key, {}), n) for n in names), "{:.0f}") for key in shapes]
        if any(cell != "- / -" for cell in cells):
            found.append(line(title, cells))
    limits = [pair((1e3 * shape["few_ms"][n] for n in PASSES), "{:.0f}") for shape in shapes.values()]
    found.append(line("the weights' bytes, or the products", limits))
    fastest = [[best(figures["results"], key, "ours", n) for n in names] for key in shapes]
    share = [
        pair(
            (over(s["few_ms"][p], (r or {}).get(n, {}).get("ms")) for p, n, r in zip(PASSES, names, ours, strict=True)),
            "{:.2f}",
        )
        for s, ours in zip(shapes.values(), fastest, strict=True)
    ]
    found += [
        line("best of ours, share of that", share),
        line("best peer", [_peers(figures, key, names) for key in shapes]),
    ]
    for title, row in (("best of ours / best peer", None), ("triton / best peer", "triton")):
        found.append(line(title, [_ratio(figures, key, names, row) for key in shapes]))
    return "\n".join(found)


def _us(result: dict[str, Any], name: str) -> float | None:
    return 1e3 * result[name]["ms"] if name in result else None


def _peers(figures: Figures, key: str, names: Sequence[str]) -> str:
    """Who is the fastest peer, pass by pass."""
    found = [best(figures["results"], key, "peer", name) for name in names]
    return " / ".join("-" if r is None else str(r["row"]) for r in found)


def _ratio(figures: Figures, key: str, names: Sequence[str], row: str | None) -> str:
    """The fastest peer's time over that of a row, or over that of the fastest of ours."""
    results = figures["results"]
    mine = [r for r in results if row in (None, r["row"])]

    def one(name: str) -> float | None:
        ours, theirs = best(mine, key, "ours", name), best(results, key, "peer", name)
        return None if ours is None or theirs is None else over(theirs[name]["ms"], ours[name]["ms"])

    return pair((one(name) for name in names), "{:.2f}")


def _uncaptured(figures: Figures) -> list[str]:
    found: dict[tuple[str, str], list[str]] = {}
    for result in figures["results"]:
        if "capture" in result:
            found.setdefault((figures["rows"][result["row"]], result["capture"]), []).append(result["shape"])
    return [f"- not captured: {title} ({', '.join(shapes)}): {why}" for (title, why), shapes in found.items()]


if __name__ == "__main__":
    raise SystemExit(main())
