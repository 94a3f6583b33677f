"""The kernels' tiles tuned anew on this machine: variants of the plan's launches timed beside them, as tables.

Each variant's results are held against the plan's before it is timed: bit for bit, and where the order of sums is
another one within a bound. The last lines say which variant would win by more than 3 %, and what it gives elsewhere:
what the plan may take over is a rule by depth, width and rows an expert, not an entry for one model.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks import gpu_command
from benchmarks.gpu_machine import machine
from benchmarks.gpu_problem import SHAPES, Shape
from benchmarks.tune_bench import Bench, Cuda, Dry, Figures, Lost, tuned
from benchmarks.tune_cases import Case, Layer
from benchmarks.tune_kernels import DTYPES, ELEMENTWISE, HOPPER, HOPPERS, KERNELS, PORTABLE, of_dtype
from benchmarks.tune_tables import tables
from benchmarks.tune_variants import named
from moebius.core.activations import ACTIVATIONS
from moebius.core.errors import MoEError

_TOLD = ("ROWS", "COLS", "DEEP", "STAGES", "GROUP", "UNROLL")  # what of a plan's constants is a choice


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; 1 where the device was lost on the way."""
    options = gpu_command.parse(_parser(), arguments)
    begin = time.perf_counter()
    bench = Dry() if options.dry else Cuda(options.rounds, options.rep, options.seconds, options.threads)
    torch.manual_seed(0)
    figures: Figures = {
        "command": options.command,
        "machine": machine(),
        "ceilings": asdict(bench.ceilings()),
        "cases": [],
        "left_out": [],
    }
    code = 0
    try:
        for layer, kernel in _layers(options, bench):
            said = f"{kernel} of {title(layer.shape)}"
            if time.perf_counter() - begin > options.budget:
                figures["left_out"].append(said)
                continue
            started = time.perf_counter()
            try:
                _tune(layer, kernel, bench, figures)
            except (MoEError, torch.OutOfMemoryError) as error:
                figures["left_out"].append(f"{said} ({' '.join(str(error).split())[:160]})")
                bench.release()
            gpu_command.say(f"{said}: {time.perf_counter() - started:.1f} s")
            _write(options.json, figures)
    except Lost as lost:
        code = 1
        figures["left_out"].append(f"all that comes after {lost}")
    _write(options.json, figures)
    gpu_command.say(f"{time.perf_counter() - begin:.0f} s in all\n\n{tables(figures)}")
    return code


def title(shape: Shape) -> str:
    """A layer in words."""
    return f"{shape.name}, T = {shape.tokens}, {shape.dtype}"


def _tune(layer: Layer, kernel: str, bench: Bench, figures: Figures) -> None:
    for case in KERNELS[kernel](layer, kernel):
        figures["cases"].append(_told(case, layer) | {"rows": tuned(case, bench)})
        bench.release()


def _told(case: Case, layer: Layer) -> Figures:
    """What a table says of a case."""
    constants = case.launch.constants
    chosen = {name: constants[name] for name in _TOLD if type(constants.get(name)) is int}
    told = {name: getattr(case, name) for name in ("kernel", "part", "depth", "width", "flops", "bytes")}
    return told | {
        "layer": title(layer.shape),
        "rows_per_expert": layer.shape.rows / layer.shape.n_experts,
        "plan": named(chosen | {"num_warps": case.launch.num_warps}),
    }


def _layers(options: argparse.Namespace, bench: Bench) -> Iterator[tuple[Layer, str]]:
    """Each layer with each kernel that is asked for; its operands are given back after the last."""
    kernels = options.kernels or [*(HOPPER if bench.target.capability == HOPPERS else PORTABLE), *ELEMENTWISE]
    for key in options.shapes or SHAPES:
        for tokens in options.tokens or [SHAPES[key].tokens]:
            shape = replace(SHAPES[key], tokens=tokens)
            for dtype in dict.fromkeys(["bfloat16", *options.dtypes]):
                wanted = [k for k in kernels if dtype in (options.dtypes if k in PORTABLE else ("bfloat16",))]
                told = bench.device, bench.target, bench.limit, options.activation, options.whole
                layer = Layer(of_dtype(shape, dtype), *told)
                yield from ((layer, kernel) for kernel in wanted)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks tune", description=__doc__)
    add = parser.add_argument
    add("--shapes", nargs="*", choices=list(SHAPES), help="which; all by default")
    add("--tokens", nargs="*", type=int, help="of each shape; its own by default")
    add("--kernels", nargs="*", choices=list(KERNELS), help="which; by default those that the plan takes here")
    add("--dtypes", nargs="*", choices=DTYPES, default=["bfloat16", "float32"], help="of the portable products")
    add("--activation", choices=[n for n, a in ACTIVATIONS.items() if a.gated], default="swiglu", help="of the fused")
    add("--whole", action="store_true", help="every combination of what is changed; by default one thing at a time")
    add("--rounds", type=int, default=8, help="how often each variant's turn comes (default %(default)s)")
    add("--rep", type=float, default=5, help="ms of a turn (default %(default)s)")
    add("--seconds", type=float, default=3, help="of a kernel's turns at most, if there are 3 (default %(default)s)")
    add("--threads", type=int, default=8, help="that compile (default %(default)s)")
    add("--budget", type=float, default=240, help="seconds after which nothing new starts (default %(default)s)")
    add("--json", type=Path, help="write every figure here")
    add("--dry", action="store_true", help="nothing is played, times are made up: what would be tried?")
    parser.set_defaults(suite="tune")
    return parser


def _write(path: Path | None, figures: Figures) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    raise SystemExit(main())
