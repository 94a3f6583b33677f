"""What GPT-OSS' own layer costs on one NVIDIA GPU: biases and its clamped activation, against SwiGLU without biases.

At its sizes, in bfloat16, gate and up in interleaved columns as it stores them and in halves. Every row has the same
products, so the ratio of two rows of one backend is what the rest costs. Every row is held against float64, biases'
gradients included. Timed as in gpu_flax.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from benchmarks import gpu_check, gpu_command
from benchmarks.gpu_all import milliseconds
from benchmarks.gpu_bench import Lane, Row
from benchmarks.gpu_command import row
from benchmarks.gpu_meter import Cuda, Dry
from benchmarks.gpu_problem import Problem, with_layer
from benchmarks.gpu_tables import PASSES, Figures, line, lines, over, pair, reasons
from benchmarks.gpu_wall import WallBench

BACKENDS = ("triton", "grouped_mm")
# Name -> (title, activation, biases); the first is what the others are held against.
LAYERS = {
    "plain": ("SwiGLU", "swiglu", False),
    "concatenated": ("biases, clamped, halves", "swigluoai", True),
    "interleaved": ("biases, clamped, interleaved", "quick_geglu", True),
    "bias": ("biases, SwiGLU", "swiglu", True),
    "clamped": ("clamped, halves", "swigluoai", False),
    "clamped_interleaved": ("clamped, interleaved", "quick_geglu", False),
}
PLAIN, REAL = "plain", ("plain", "concatenated", "interleaved")


def _rows() -> dict[str, Row]:
    return {
        f"{backend}_{name}": row(
            f"{backend}: {title}",
            "ours",
            "ours_layer",
            default=name in REAL,
            activation=activation,
            bias=bias,
            experts=backend,
        )
        for backend in BACKENDS
        for name, (title, activation, bias) in LAYERS.items()
    }


ROWS = _rows()


class LayerBench(WallBench):
    """See WallBench; each row against the reference of its own layer."""

    def run(self, key: str) -> None:
        """See Bench."""
        self.expected: dict[tuple[str, bool], gpu_check.Reference] = {}
        super().run(key)

    def _prepare(self, lane: Lane, problem: Problem, expected: gpu_check.Reference) -> None:
        layer = lane.row.options["activation"], lane.row.options["bias"]
        if layer not in self.expected:
            self.expected[layer] = gpu_check.reference(with_layer(problem, *layer))
        super()._prepare(lane, problem, self.expected[layer])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; 1 where a shape or the device was lost on the way."""
    options = _options(arguments)
    meter = (Dry if options.dry else Cuda)(options.warmup, options.rep)
    rows, shapes = gpu_command.rows(ROWS, options), gpu_command.shapes(options)
    return gpu_command.run(LayerBench(meter, rows, shapes, options, say=gpu_command.say), options, tables)


def tables(figures: Figures) -> str:
    """Milliseconds, and what each layer costs over the plain one of the same backend."""

    def cell(result: dict[str, Any]) -> str:
        return pair((result.get(name, {}).get("ms") for name in PASSES), "{:.3f}")

    table = lines(figures, "forward / forward+backward, ms", cell)
    for key, title in figures["rows"].items():
        backend = next(name for name in BACKENDS if key.startswith(f"{name}_"))
        if key != f"{backend}_{PLAIN}":
            table.append(line(f"{title} / SwiGLU (at most 1.03)", _costs(figures, key, f"{backend}_{PLAIN}")))
    return "\n\n".join(["\n".join(table), "\n".join(reasons(figures))]).rstrip()


def _costs(figures: Figures, row: str, plain: str) -> list[str]:
    def ms(shape: str, key: str, name: str) -> float | None:
        return milliseconds(figures["results"], shape, key, name)

    return [
        pair((over(ms(shape, row, name), ms(shape, plain, name)) for name in PASSES), "{:.3f}")
        for shape in figures["shapes"]
    ]


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = gpu_command.parser("gpu_gptoss", __doc__, ROWS)
    gpu_command.walled(parser, rep=60, warmup=20, rounds=10, budget=200)
    parser.set_defaults(shapes=["gptoss"])
    return gpu_command.parse(parser, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
