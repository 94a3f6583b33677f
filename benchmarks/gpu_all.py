"""Both frontends' experts and every peer of either on one NVIDIA GPU, in one process and one run, in bfloat16.

The rows of gpu_experts and of gpu_flax, timed as gpu_flax times: groups of calls by the host's clock, in short rounds,
in pairs of an order of their own. The forward pass is y alone; both passes give y and the gradients of x, routing
weights and all experts for a given dy, in JAX as one compiled program. Some rows are timed with Zipf routing too.
Ceilings are measured before the first shape and after the last.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from benchmarks import gpu_command, gpu_experts, gpu_flax
from benchmarks.gpu_bench import Row
from benchmarks.gpu_flax_bench import FlaxBench
from benchmarks.gpu_meter import Cuda, Dry
from benchmarks.gpu_tables import (
    GIB,
    PASSES,
    Figures,
    best,
    least,
    line,
    lines,
    number,
    over,
    pair,
    reasons,
    skewed,
    speed,
)

# In rows of one table: what is ours in Flax, what is a peer's there.
KINDS = {"ours": "flax", "peer": "jax", "gathers": "jax_gathers"}
# Rows that say what an option gives; and Liger's, whose autotuner compiles for half a minute a shape.
LEFT_OUT = ("liger", "double_backward", "loop", "choice", "remat_none", "remat_full", "jax_tokamax_gathers")
TRITON, FLAX_TRITON = "triton", "flax_triton"
# TFLOP/s of both passes: what backend triton is meant to reach, and what would be better still.
GOALS = {"qwen3": (570, 600), "gptoss": (610, 630), "mixtral": (640, 670), "dsv3": (610, 650)}


def _rows() -> dict[str, Row]:
    """Of both tables; Flax's under names of its own, PyTorch's once."""
    found = {}
    for key, row in gpu_experts.ROWS.items():
        title = row.title.replace("moebius", "PyTorch") if row.kind in ("ours", "reference") else row.title
        found[key] = replace(row, title=title, default=key not in LEFT_OUT)
    for key, row in gpu_flax.ROWS.items():
        if row.kind != "torch":
            name = key if key.startswith("jax_") else f"flax_{key}"
            found[name] = replace(row, kind=KINDS.get(row.kind, row.kind), default=row.default and key not in LEFT_OUT)
    return found


ROWS = _rows()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; 1 where a shape or the device was lost on the way."""
    options = _options(arguments)
    meter = (Dry if options.dry else Cuda)(options.warmup, options.rep)
    rows, shapes = gpu_command.rows(ROWS, options), gpu_command.shapes(options)
    return gpu_command.run(FlaxBench(meter, rows, shapes, options, say=gpu_command.say), options, tables)


def tables(figures: Figures) -> str:
    """All tables and, below them, why a cell is empty."""
    parts = [_speed(figures), _memory(figures), _health(figures)]
    if figures["skew"]:
        parts.append(_skew(figures))
    return "\n\n".join([*parts, "\n".join([*_choices(figures), *reasons(figures)])]).rstrip()


def milliseconds(results: Iterable[dict[str, Any]], shape: str, row: str, name: str) -> float | None:
    """Of one row, shape and pass; None where it was not measured."""
    found = next((r for r in results if (r["shape"], r["row"]) == (shape, row) and name in r), None)
    return None if found is None else float(found[name]["ms"])


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = gpu_command.parser("gpu_all", __doc__, ROWS)
    gpu_command.walled(parser, rep=40, warmup=10, rounds=6, budget=480)
    add = parser.add_argument
    add("--threads", type=int, default=8, help="programs compiled at a time (default 8)")
    add("--skew", type=float, nargs="?", const=1.0, default=1.0, help="also Zipf routing, of this exponent (1); 0: not")
    return gpu_command.parse(parser, arguments)


def _speed(figures: Figures) -> str:
    against = {
        "PyTorch: best of ours / best peer": "peer",
        "Flax: best of ours / best peer in JAX": ("flax", "jax"),
        "Flax: best of ours / best composite with gathers both ways": ("flax", "jax_gathers"),
    }
    return "\n".join([speed(figures, against), *_triton(figures, figures["results"]), *_goals(figures)])


def _triton(figures: Figures, results: Sequence[dict[str, Any]]) -> list[str]:
    """Backend triton against the fastest peer, and Flax' against PyTorch's, in speed."""
    peers, frontends = [], []
    for key in figures["shapes"]:
        mine = {name: milliseconds(results, key, TRITON, name) for name in PASSES}
        theirs = {name: best(results, key, "peer", name) for name in PASSES}
        peers.append(pair((over((theirs[n] or {}).get(n, {}).get("ms"), mine[n]) for n in PASSES), "{:.2f}"))
        frontends.append(pair((over(mine[n], milliseconds(results, key, FLAX_TRITON, n)) for n in PASSES), "{:.2f}"))
    found = [line("PyTorch: triton / best peer", peers)]
    there = FLAX_TRITON in {result["row"] for result in results} or results is figures["results"]
    return [*found, line("Flax triton / PyTorch triton", frontends)] if there else found


def _goals(figures: Figures) -> list[str]:
    cells = [pair(GOALS.get(key, (None, None))) for key in figures["shapes"]]
    return [line("goal / stretch of triton, forward+backward", cells)]


def _both(result: dict[str, Any]) -> float | None:
    found = result.get("memory", {}).get("both")
    return None if found is None else float(found)


def _memory(figures: Figures) -> str:
    def cell(result: dict[str, Any]) -> str:
        return pair((result.get("memory", {}).get(name) for name in ("both", "forward")), "{:.2f}", GIB)

    title = "forward+backward / forward, GiB above the inputs (JAX: temporaries, outputs; PyTorch: highest allocation)"
    table = [*lines(figures, title, cell), *least(figures)]
    shapes = figures["shapes"].values()
    bars = [f"{s['work_bytes'] / GIB:.2f}" for s in shapes]
    table.append(line("bar: pre-activations, their gradient, one [R, I], one [R, D], above what is returned", bars))
    for row in (TRITON, FLAX_TRITON):
        if row not in figures["rows"]:
            continue
        cells = []
        for key, shape in figures["shapes"].items():
            result = next((r for r in figures["results"] if (r["shape"], r["row"]) == (key, row)), {})
            peak = _both(result)
            work = None if peak is None else peak - shape["result_bytes"]
            cells.append(f"{number(work, '{:.2f}', GIB)}, {number(over(work, shape['work_bytes']), '{:.3f}')}")
        table.append(line(f"{figures['rows'][row]}: the same, and over the bar (at most 1.02)", cells))
    return "\n".join(table)


def _health(figures: Figures) -> str:
    title = (
        "what the host waits for; largest relative error; spread of the rounds; compiling both passes, or first call"
    )
    return "\n".join(lines(figures, title, gpu_flax.health))


def _choices(figures: Figures) -> list[str]:
    """What was chosen where no backend is named."""
    there = [r for r in figures["results"] if r["row"] == "default" and r.get("note")]
    said = ", ".join(f"{r['note'].removeprefix('backend ')} ({r['shape']})" for r in there)
    return [f"- {figures['rows']['default']}: {said}"] if said else []


def _skew(figures: Figures) -> str:
    return "\n".join([skewed(figures), *_triton(figures, figures["skew"])])


if __name__ == "__main__":
    raise SystemExit(main())
