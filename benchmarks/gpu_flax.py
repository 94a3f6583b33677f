"""Flax experts on one NVIDIA GPU: moebius's backends against peers in JAX and its own PyTorch rows, in one process.

Four models' shapes, bfloat16, softmax routing of random logits, no bias, SwiGLU; every row reads the same memory. The
forward pass is y under jit (PyTorch: without a graph); both passes are y and the gradients of x, routing weights and
all experts for a given dy, as one compiled program. Each time is that of a group of calls which follow each other
without waiting, over their number. Rounds are short and many, in pairs of an order of their own, there and back: the
clock of a GPU at its power limit follows what ran just before, so that nobody should always have the same neighbour.
Limits as in gpu_experts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks import gpu_command
from benchmarks.gpu_command import row
from benchmarks.gpu_flax_bench import FlaxBench
from benchmarks.gpu_meter import Cuda, Dry
from benchmarks.gpu_problem import Shape
from benchmarks.gpu_tables import GIB, PASSES, Figures, least, lines, pair, reasons, speed

ROWS = {
    "triton": row("Flax triton", "ours", "ours_jax", skew=True, backend="triton"),
    "tokamax": row("Flax tokamax", "ours", "ours_jax", skew=True, backend="tokamax"),
    "te": row("Flax te", "ours", "ours_jax", backend="te"),
    "loop": row("Flax loop", "ours", "ours_jax", default=False, backend="loop"),
    "choice": row("Flax, its own choice", "ours", "ours_jax", default=False),
    "remat_none": row("Flax tokamax, remat none", "ours", "ours_jax", default=False, backend="tokamax", remat="none"),
    "remat_full": row("Flax tokamax, remat full", "ours", "ours_jax", default=False, backend="tokamax", remat="full"),
    "double_backward": row(
        "Flax tokamax, double_backward", "reference", "ours_jax", backend="tokamax", double_backward=True
    ),
    "jax_te": row("JAX composite, TE grouped_dense", "peer", "composite_jax", product="te"),
    "jax_te_gathers": row(
        "JAX composite, TE grouped_dense, gathers both ways", "gathers", "composite_jax", product="te", gathers=True
    ),
    "jax_tokamax": row("JAX composite, tokamax.ragged_dot", "peer", "composite_jax", product="tokamax"),
    "jax_tokamax_gathers": row(
        "JAX composite, tokamax.ragged_dot, gathers both ways",
        "gathers",
        "composite_jax",
        default=False,
        product="tokamax",
        gathers=True,
    ),
    "jax_ragged_dot": row("JAX composite, lax.ragged_dot", "peer", "composite_jax", product="ragged_dot"),
    "torch_triton": row("PyTorch triton", "torch", "ours", experts="triton"),
    "torch_grouped_mm": row("PyTorch grouped_mm", "torch", "ours", experts="grouped_mm"),
    "torch_te": row("PyTorch te", "torch", "ours", experts="te"),
    "torch_loop": row("PyTorch loop", "torch", "ours", default=False, experts="loop"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; 1 where a shape or the device was lost on the way."""
    options = _options(arguments)
    meter = (Dry if options.dry else Cuda)(options.warmup, options.rep)
    rows = gpu_command.rows(ROWS, options)
    return gpu_command.run(FlaxBench(meter, rows, _shapes(options), options, say=gpu_command.say), options, tables)


def tables(figures: Figures) -> str:
    """All tables and, below them, why a cell is empty."""
    against = {
        "best of Flax / best peer in JAX": "peer",
        "best of Flax / best composite with gathers both ways": "gathers",
        "best of Flax / best of PyTorch": "torch",
    }
    return "\n\n".join(
        [speed(figures, against), _memory(figures), _health(figures), "\n".join(reasons(figures))]
    ).rstrip()


def _shapes(options: argparse.Namespace) -> dict[str, Shape]:
    shapes = gpu_command.shapes(options)
    if not options.tokens:
        return shapes
    each = [(key, shape, t) for key, shape in shapes.items() for t in options.tokens]
    return {f"{key}-{t}": replace(shape, name=f"{shape.name}, T = {t}", tokens=t) for key, shape, t in each}


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = gpu_command.parser("gpu_flax", __doc__, ROWS)
    parser.add_argument("--tokens", type=int, nargs="*", help="T, of each shape; by default the shape's own")
    gpu_command.walled(parser, rep=60, warmup=20, rounds=8, budget=240)
    parser.add_argument("--threads", type=int, default=4, help="programs compiled at a time (default 4)")
    return gpu_command.parse(parser, arguments)


def _memory(figures: Figures) -> str:
    def cell(result: dict[str, Any]) -> str:
        return pair((result.get("memory", {}).get(name) for name in ("both", "forward")), "{:.2f}", GIB)

    title = "forward+backward / forward, GiB above the inputs (JAX: temporaries, outputs; PyTorch: highest allocation)"
    return "\n".join([*lines(figures, title, cell), *least(figures)])


def _health(figures: Figures) -> str:
    title = (
        "what the host waits for; largest relative error; spread of the rounds; compiling both passes, or first call"
    )
    return "\n".join(lines(figures, title, health))


def health(result: dict[str, Any]) -> str:
    """What the host waits for, the largest error, the spread of the rounds, seconds until the first figure."""
    if not result.get("errors"):
        return "-"
    drift = max((result[name]["drift"] for name in PASSES if name in result), default=float("nan"))
    waits = result["host"] or "nothing" if "host" in result else "-"
    if "syncs" in result:
        waits = f"{pair((len(result['syncs'][name]) for name in PASSES), '{:d}')} syncs"
    seconds = [f"{result['compile_s'][name]:.0f}" for name in PASSES if name in result.get("compile_s", {})]
    first = f"{' + '.join(seconds)} s" if seconds else f"{result.get('first_s', 0):.0f} s"
    return f"{waits}; {max(result['errors'].values()):.1e}; {100 * drift:.1f} %; {first}"


if __name__ == "__main__":
    raise SystemExit(main())
