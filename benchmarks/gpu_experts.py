"""PyTorch experts on one NVIDIA GPU: moebius's backends against its peers, in one process and one run, in bfloat16.

Four models' shapes, softmax routing of random logits, no bias, SwiGLU, gradients of x, routing weights and all experts.
Medians of triton.testing.do_bench in rounds, every candidate in each round, every second round backwards. TFLOP/s count
6 T K D I in the forward pass and three times that with backward. The limits: the same products at the rate of a large
matrix product, and a chain of fused kernels at that rate or a large copy's, both measured before and after.
"""

from __future__ import annotations

import argparse
import json
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_bench import Bench, DeviceLost, Row
from benchmarks.gpu_meter import Cuda, Dry
from benchmarks.gpu_problem import SHAPES
from benchmarks.gpu_tables import COMPILED, Figures, tables


def _row(title: str, kind: str, module: str, /, default: bool = True, skew: bool = False, **options: Any) -> Row:
    return Row(title=title, kind=kind, module=module, options=options, default=default, skew=skew)


ROWS = {
    "grouped_mm": _row("moebius grouped_mm", "ours", "ours", skew=True, experts="grouped_mm"),
    "te": _row("moebius te", "ours", "ours", skew=True, experts="te"),
    "gmm": _row("moebius gmm", "ours", "ours", experts="gmm"),
    "default": _row("moebius, its own choice", "ours", "ours", default=False),
    "double_backward": _row(
        "moebius grouped_mm, double_backward", "reference", "ours", experts="grouped_mm", double_backward=True
    ),
    "composite": _row("PyTorch composite", "peer", "composite"),
    COMPILED: _row("PyTorch composite, compiled", "peer", "composite", skew=True, compiled=True),
    "transformers": _row("transformers grouped_mm", "peer", "huggingface"),
    "automodel": _row("NeMo Automodel torch_mm", "peer", "automodel"),
    "te_layers": _row("TE GroupedLinear", "peer", "transformer_engine"),
    "te_layers_compiled": _row(
        "TE GroupedLinear, activation compiled", "peer", "transformer_engine", default=False, compiled=True
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; 1 where a shape or the device was lost on the way."""
    options = _options(arguments)
    meter = (Dry if options.dry else Cuda)(options.warmup, options.rep)
    rows = {key: row for key, row in ROWS.items() if (key in options.only if options.only else row.default)}
    shapes = {key: SHAPES[key].tiny() if options.dry else SHAPES[key] for key in options.shapes or SHAPES}
    bench = Bench(meter, rows, shapes, options, say=_say)
    _say(", ".join(f"{name} {value}" for name, value in bench.figures["machine"].items()))
    failed = False
    bench.ceilings()
    for key, shape in shapes.items():
        _say(f"{shape.name}, after {bench.seconds:.0f} s")
        try:
            bench.run(key)
        except Exception as error:
            failed = True
            traceback.print_exc()
            if isinstance(error, DeviceLost):
                break
        _write(options.json, bench.figures)
    else:
        bench.ceilings()
    bench.figures["seconds"] = bench.seconds
    _write(options.json, bench.figures)
    _say(f"{bench.seconds:.0f} s in all\n\n{tables(bench.figures)}")
    return int(failed)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu_experts", description=__doc__)
    add = parser.add_argument
    add("--shapes", nargs="*", choices=list(SHAPES), help="which; all by default")
    add("--only", nargs="*", choices=list(ROWS), metavar="ROW", help=f"which of {', '.join(ROWS)}")
    add("--rep", type=float, default=100, help="ms of runs a candidate, pass and round (default 100)")
    add("--warmup", type=float, default=40, help="ms of warm-up before them (default 40)")
    add("--runs", type=int, default=6, help="at least so many runs (default 6)")
    add("--rounds", type=int, default=2, help="how often each candidate's turn comes (default 2)")
    add("--budget", type=float, default=280, help="seconds after which nothing new starts (default 280)")
    add("--skew", type=float, nargs="?", const=1.0, default=0.0, help="also Zipf routing, of this exponent (1)")
    add("--inference", action="store_true", help="time the forward pass without a graph; else as in training")
    add("--json", type=Path, help="write every figure here")
    add("--dry", action="store_true", help="tiny sizes on the CPU: does it run? The figures mean nothing")
    return parser.parse_args(arguments)


def _say(line: str) -> None:
    print(line, flush=True)


def _write(path: Path | None, figures: Figures) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=1, default=str))


if __name__ == "__main__":
    raise SystemExit(main())
