"""PyTorch experts on one NVIDIA GPU: moebius's backends against its peers, in one process and one run, in bfloat16.

Four models' shapes, softmax routing of random logits, no bias, SwiGLU, gradients of x, routing weights and all experts.
Medians of triton.testing.do_bench in rounds, every candidate in each, in pairs of orders of their own. TFLOP/s count
6 T K D I in the forward pass and three times that with backward. The limits: the same products at the rate of a large
matrix product, and a chain of fused kernels at that rate or a large copy's, both measured before and after.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks import gpu_command
from benchmarks.gpu_bench import Bench
from benchmarks.gpu_command import row
from benchmarks.gpu_meter import Cuda, Dry
from benchmarks.gpu_tables import COMPILED, tables

ROWS = {
    "triton": row("moebius triton", "ours", "ours", skew=True, experts="triton"),
    "grouped_mm": row("moebius grouped_mm", "ours", "ours", skew=True, experts="grouped_mm"),
    "te": row("moebius te", "ours", "ours", skew=True, experts="te"),
    "gmm": row("moebius gmm", "ours", "ours", experts="gmm"),
    "default": row("moebius, its own choice", "reference", "ours", default=False),
    "double_backward": row(
        "moebius grouped_mm, double_backward", "reference", "ours", experts="grouped_mm", double_backward=True
    ),
    "composite": row("PyTorch composite", "peer", "composite"),
    COMPILED: row("PyTorch composite, compiled", "peer", "composite", skew=True, compiled=True),
    "transformers": row("transformers grouped_mm", "peer", "huggingface", skew=True),
    "automodel": row("NeMo Automodel torch_mm", "peer", "automodel"),
    "te_layers": row("TE GroupedLinear", "peer", "transformer_engine"),
    "te_layers_compiled": row(
        "TE GroupedLinear, activation compiled",
        "peer",
        "transformer_engine",
        default=False,
        skew=True,
        compiled=True,
    ),
    "liger": row("Liger fused MoE", "peer", "liger", default=False),
    "liger_composite": row("PyTorch composite, Liger's SwiGLU", "peer", "liger_composite", default=False),
    "sonic": row("SonicMoE", "peer", "sonic", default=False),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; 1 where a shape or the device was lost on the way."""
    options = _options(arguments)
    meter = (Dry if options.dry else Cuda)(options.warmup, options.rep)
    bench = Bench(meter, gpu_command.rows(ROWS, options), gpu_command.shapes(options), options, say=gpu_command.say)
    return gpu_command.run(bench, options, tables)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = gpu_command.parser("gpu_experts", __doc__, ROWS)
    add = parser.add_argument
    add("--rep", type=float, default=100, help="ms of runs a candidate, pass and round (default 100)")
    add("--warmup", type=float, default=40, help="ms of warm-up before them (default 40)")
    add("--runs", type=int, default=6, help="at least so many runs (default 6)")
    add("--budget", type=float, default=280, help="seconds after which nothing new starts (default 280)")
    add("--skew", type=float, nargs="?", const=1.0, default=0.0, help="also Zipf routing, of this exponent (1)")
    add("--inference", action="store_true", help="time the forward pass without a graph; else as in training")
    return gpu_command.parse(parser, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
