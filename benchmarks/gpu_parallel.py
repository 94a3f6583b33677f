"""Experts over two NVIDIA GPUs: what each dispatcher's communication takes, in PyTorch by NCCL and in Flax.

T tokens on each rank, forward and backward, bfloat16, even routing. Communication is the layer's time less that of the
same rows, as they came, without dispatch. Wire bytes: rows that leave the GPU x D x 2, of the rank that sends most.
Rates stand beside NVLink's 450 GB/s a direction and NCCL's own all-to-all of T rows. Of each time the slowest rank
counts. One process a rank, and then one with all devices for Flax. Before it is timed every layer is held against
float64. The bars that it is measured by stand below the tables, each met or not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks import gpu_command
from benchmarks.gpu_command import row
from benchmarks.gpu_machine import machine
from benchmarks.gpu_parallel_bench import ELEMENT, LAYER, STILL
from benchmarks.gpu_tables import Figures, line, lines, number, over, reasons

LINK = 450e9  # bytes/s a direction: NVLink 4, on paper
MARGIN = 60.0  # seconds beside the budget in which the processes start and end
ROOT = Path(__file__).parents[1]

FRAMEWORKS = ("torch", "flax")
ROWS = {
    "allgather": row("PyTorch allgather", "torch", "", dispatcher="allgather"),
    "allgather_static": row("PyTorch allgather, nothing counted", "torch", "", dispatcher="allgather", static=True),
    "alltoall": row("PyTorch alltoall", "torch", "", dispatcher="alltoall"),
    "deepep": row("PyTorch deepep", "torch", "", dispatcher="deepep"),
    "deepep_static": row("PyTorch deepep, nothing counted", "torch", "", False, dispatcher="deepep", static=True),
    "deepep_elastic": row("PyTorch deepep_elastic", "torch", "", dispatcher="deepep_elastic"),
    "hybridep": row("PyTorch hybridep", "torch", "", dispatcher="hybridep"),
    "uccl_ep": row("PyTorch uccl_ep", "torch", "", False, dispatcher="uccl_ep"),
    "te": row("PyTorch te", "torch", "", dispatcher="te"),
    "flax_allgather": row("Flax allgather", "flax", "", dispatcher="allgather"),
    "flax_alltoall": row("Flax alltoall", "flax", "", dispatcher="alltoall"),
    "flax_ragged": row("Flax ragged_all_to_all", "flax", "", dispatcher="ragged_all_to_all"),
}
# Those that send every token to every rank. Flax's alltoall has a block of one size for each pair.
TO_ALL = ("allgather", "allgather_static", "flax_allgather", "flax_alltoall")
# A row of Flax, and the row of PyTorch whose collectives move the same.
SAME = {"flax_allgather": "allgather", "flax_ragged": "alltoall"}
# What is asked of two ranks: times the speed of all tokens on one GPU; and of alltoall, by K, against the best.
SCALING = {"mixtral": 1.85, "gptoss": 1.8, "dsv3": 1.8, "qwen3": 1.65}
NEAR_BEST = {8: 1.5, 2: 1.1}
OF_RATE, OF_TORCH = 1.25, 1.10


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """What was asked, and what was found; `met` where that is no more than the limit, or no less where `least`."""

    name: str
    found: float
    limit: float
    least: bool = False

    @property
    def met(self) -> bool:
        """Whether it is."""
        return self.found >= self.limit if self.least else self.found <= self.limit


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; 1 where a process was lost on the way."""
    options = _options(arguments)
    there = torch.cuda.device_count()
    if not options.dry and there < options.ranks:
        raise SystemExit(f"gpu_parallel needs {options.ranks} NVIDIA GPUs, found {there}; --dry runs on a CPU")
    rows = gpu_command.rows(ROWS, options)
    figures: Figures = {
        "machine": machine(),
        "options": vars(options),
        "rows": {key: row.title for key, row in rows.items()},
        "shapes": {},
        "results": [],
        "skew": [],
    }
    whole = True
    for framework in FRAMEWORKS:
        wanted = {key: dict(row.options) for key, row in rows.items() if row.kind == framework}
        if wanted:
            done, figures = _run(framework, wanted, options, figures)
            whole &= done
    _keep(figures, options.json)
    gpu_command.say(tables(figures))
    return int(not whole)


def _keep(figures: Figures, path: Path | None) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=1, default=str))


def tables(figures: Figures) -> str:
    """Times, rates, the bars, and why a cell is empty."""
    parts = [_times(figures), _rates(figures)]
    found = [
        f"- {'met' if bar.met else 'NOT MET'}: {bar.name}: {bar.found:.3g} of {bar.limit:.3g}" for bar in bars(figures)
    ]
    return "\n\n".join([*parts, "\n".join(found), "\n".join(reasons(figures))]).rstrip()


def communication(result: Mapping[str, Any]) -> float | None:
    """Milliseconds of a row on a shape: the layer's less those of its rows without dispatch."""
    if LAYER not in result or STILL not in result:
        return None
    return float(result[LAYER]["ms"] - result[STILL]["ms"])


def wire(figures: Figures, key: str, row: str) -> int:
    """Bytes that leave a rank."""
    shape = figures["shapes"][key]
    return int(shape["leaving"][str(row not in TO_ALL)]) * int(shape["dim"]) * ELEMENT


def bars(figures: Figures) -> Iterator[Bar]:
    """All that can be told of these figures."""
    for key, shape in figures["shapes"].items():
        there = {r["row"]: r for r in figures["results"] if r["shape"] == key and communication(r) is not None}
        yield from _of_best(shape, there)
        yield from _of_rate(figures, key, there)
        yield from _of_scaling(key, shape, there)
        yield from _of_torch(shape, there)


def _of_best(shape: Mapping[str, Any], there: Mapping[str, Any]) -> Iterator[Bar]:
    """PyTorch's alltoall against its best dispatcher."""
    ours = {name: communication(found) for name, found in there.items() if ROWS[name].kind == "torch"}
    if any(ms is not None and ms <= 0 for ms in ours.values()):
        return  # less than the noise of the two times that it is the difference of
    ratio = over(ours.get("alltoall"), min(filter(None, ours.values()), default=None))
    if ratio is not None and shape["k"] in NEAR_BEST:
        yield Bar(name=f"{shape['name']}, alltoall / best", found=ratio, limit=NEAR_BEST[shape["k"]])


def _of_rate(figures: Figures, key: str, there: Mapping[str, Any]) -> Iterator[Bar]:
    """Every dispatcher against its rows' time and its bytes at NCCL's rate."""
    shape = figures["shapes"][key]
    if "rate" not in shape:
        return
    for name, found in there.items():
        limit = found[STILL]["ms"] + OF_RATE * 1e3 * wire(figures, key, name) / shape["rate"]
        yield Bar(name=f"{shape['name']}, {ROWS[name].title}, ms", found=found[LAYER]["ms"], limit=limit)


def _of_scaling(key: str, shape: Mapping[str, Any], there: Mapping[str, Any]) -> Iterator[Bar]:
    """T tokens on each rank against those of all ranks on one GPU, by the fastest of PyTorch."""
    ms = [found[LAYER]["ms"] for name, found in there.items() if ROWS[name].kind == "torch"]
    if ms and shape.get("alone") and key in SCALING and shape["ranks"] == 2:  # of two are the bars
        name = f"{shape['name']}, {shape['ranks']} ranks / one GPU"
        yield Bar(name=name, found=shape["alone"]["ms"] / min(ms), limit=SCALING[key], least=True)


def _of_torch(shape: Mapping[str, Any], there: Mapping[str, Any]) -> Iterator[Bar]:
    """Flax against PyTorch with the same collective."""
    for flax, other in SAME.items():
        if flax in there and other in there:
            ratio = there[flax][LAYER]["ms"] / there[other][LAYER]["ms"]
            yield Bar(name=f"{shape['name']}, {ROWS[flax].title} / PyTorch's", found=ratio, limit=OF_TORCH)


def _times(figures: Figures) -> str:
    def cell(result: Mapping[str, Any]) -> str:
        found = (result.get(LAYER, {}).get("ms"), result.get(STILL, {}).get("ms"), communication(result))
        return " / ".join(number(value, "{:.3f}") for value in found)

    table = lines(figures, "forward+backward: layer / its rows / communication, ms", cell)
    alone = [number((shape.get("alone") or {}).get("ms"), "{:.3f}") for shape in figures["shapes"].values()]
    return "\n".join([*table, line("all ranks' tokens on one GPU", alone)])


def _rates(figures: Figures) -> str:
    def cell(result: Mapping[str, Any]) -> str:
        if not result:
            return "-"
        key, ms = result["shape"], communication(result)
        sent = wire(figures, key, result["row"])
        rate = None if ms is None or ms <= 0 else 1e3 * sent / ms
        nccl = figures["shapes"][key].get("rate")
        shares = [number(over(rate, of), "{:.2f}") for of in (LINK, nccl)]
        return f"{sent / 1e6:.4g} MB; {number(rate, '{:.4g}', 1e9)} GB/s; {shares[0]}; {shares[1]}"

    table = lines(figures, "wire bytes; rate; share of 450 GB/s; of NCCL's", cell)
    rates = [number(shape.get("rate"), "{:.4g}", 1e9) for shape in figures["shapes"].values()]
    return "\n".join([*table, line("NCCL's all-to-all of T rows, GB/s", rates)])


def _run(framework: str, rows: dict[str, Any], options: argparse.Namespace, figures: Figures) -> tuple[bool, Figures]:
    """One framework's processes, to their end or the deadline's: whether all ended well, and the figures with theirs.

    What they have found so far is kept after each shape: a run that is cut off loses one.
    """
    shapes = {key: asdict(shape) for key, shape in gpu_command.shapes(options).items()}
    with TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        names = ("dry", "rep", "warmup", "rounds", "budget", "ranks", "experts", "num_sms")
        asked = {name: getattr(options, name) for name in names}
        # Longer than the deadline below, which is what ends a run that hangs.
        asked |= {"rows": rows, "shapes": shapes, "timeout": options.budget + 2 * MARGIN, "figures": str(out)}
        asked["store"] = str(Path(folder) / "store")
        file = Path(folder) / "asked.json"
        file.write_text(json.dumps(asked))
        seen = ""

        def keep() -> None:
            nonlocal seen
            text = out.read_text() if out.exists() else ""
            if text != seen:
                seen = text
                _keep(_with(figures, json.loads(seen)), options.json)

        whole = _ended(_started(framework, file, options), options.budget + MARGIN, keep)
        if not whole:
            gpu_command.say(f"{framework}: a process was lost, or was too slow; what it had found is kept")
        keep()
    return (whole, _with(figures, json.loads(seen))) if seen else (False, figures)


def _with(figures: Figures, found: Mapping[str, Any]) -> Figures:
    """And what one framework found."""
    shapes = {key: {**shape, **figures["shapes"].get(key, {})} for key, shape in found["shapes"].items()}
    return {
        **figures,
        "results": [*figures["results"], *found["results"]],
        "shapes": {**figures["shapes"], **shapes},
    }


def _started(framework: str, file: Path, options: argparse.Namespace) -> list[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", f"benchmarks.gpu_parallel_{framework}", str(file)]
    environment = dict(os.environ)
    if options.dry:
        devices = f"--xla_force_host_platform_device_count={options.ranks} --xla_backend_optimization_level=0"
        flags = f"{environment.get('XLA_FLAGS', '')} {devices}"
        environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "OMP_NUM_THREADS": "1"}
    each = [[str(rank)] for rank in range(options.ranks)] if framework == "torch" else [[]]
    return [subprocess.Popen([*command, *more], cwd=ROOT, env=environment) for more in each]


def _ended(processes: Sequence[subprocess.Popen[bytes]], seconds: float, meanwhile: Callable[[], None]) -> bool:
    """Whether all ended well in time; where one did not, none is left. `meanwhile` is called now and again."""
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline:
            codes = [process.poll() for process in processes]
            if all(code == 0 for code in codes):
                return True
            if any(code not in (None, 0) for code in codes):
                return False
            meanwhile()
            time.sleep(0.05)
        return False
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = gpu_command.parser("gpu_parallel", __doc__, ROWS)
    parser.set_defaults(rounds=4)
    add = parser.add_argument
    add("--ranks", type=int, default=2, help="GPUs (default 2; the bars are of two)")
    add("--experts", help="backend of the grouped matmul in both frontends; its own choice by default")
    add("--num-sms", type=int, default=20, help="of DeepEP's kin (default 20)")
    add("--rep", type=float, default=60, help="ms of a group of calls (default 60)")
    add("--warmup", type=float, default=20, help="ms of warm-up before it (default 20)")
    add(
        "--budget",
        type=float,
        default=240,
        help="seconds of each framework after which nothing new starts (default 240)",
    )
    return gpu_command.parse(parser, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
