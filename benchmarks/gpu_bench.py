"""One run of the GPU benchmark: every candidate built, checked, weighed, and timed in turns."""

from __future__ import annotations

import argparse
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from random import Random
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks import gpu_check, gpu_problem
from benchmarks.gpu_floors import Ceilings, compute_floor, kernel_floor
from benchmarks.gpu_machine import machine
from benchmarks.gpu_meter import Meter, clear
from benchmarks.gpu_problem import Candidate, Problem, Routing, Shape
from benchmarks.gpu_tables import PASSES, Figures

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A candidate of the tables.

    Attributes:
        kind: "ours" and "peer" enter the ratios, "reference" does not; "torch" is ours on the other framework,
            "gathers" a composite that a user tuned by hand.
        module: in benchmarks.peers; its `build` takes the problem and `options`.
        default: whether it runs without being named.
        skew: whether it also runs with skewed routing.
    """

    title: str
    kind: str
    module: str
    options: Mapping[str, Any]
    default: bool = True
    skew: bool = False


class DeviceLost(RuntimeError):
    """The device answers no more; nothing after this could be measured."""


@dataclass(kw_only=True)
class Lane:
    """A row on one shape: what was found, and milliseconds by pass and round. Neither candidate nor program: it is out.

    Attributes:
        candidate: of PyTorch. program: of JAX; see benchmarks.gpu_jax.
    """

    row: Row
    result: dict[str, Any]
    candidate: Candidate | None = None
    program: Any = None

    @property
    def out(self) -> bool:
        """Whether there is nothing left to run."""
        return self.candidate is None and self.program is None

    def leaves(self, problem: Problem, routing: Routing) -> list[Tensor]:
        """Everything that a backward pass leaves a gradient in."""
        own = () if self.candidate is None else self.candidate.parameters
        return [problem.x, routing.weights, *own]


class Bench:
    """One run over shapes. `figures` holds everything found so far, ready for JSON.

    Args:
        meter: of the device. rows: the candidates, by key. shapes: sizes, by key.
        options: runs, rounds, budget, skew, inference; see benchmarks.gpu_experts.
        say: takes a line of progress.

    `passes` are the names of what is timed, one figure each; those that begin with "both" hold a backward pass.
    """

    passes: Sequence[str] = PASSES

    def __init__(
        self,
        meter: Meter,
        rows: Mapping[str, Row],
        shapes: Mapping[str, Shape],
        options: argparse.Namespace,
        say: Callable[[str], object] = print,
    ):
        self.meter, self.rows, self.shapes, self.options, self.say = meter, rows, shapes, options, say
        self.started = time.monotonic()
        self.figures: Figures = {
            "machine": machine(),
            "options": vars(options),
            "rows": {key: row.title for key, row in rows.items()},
            "skew_exponent": options.skew,
            "ceilings": [],
            "shapes": {},
            "results": [],
            "skew": [],
        }

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started

    def ceilings(self) -> None:
        """Measure the device's rates once more; the floors take the best that was seen."""
        found = self.meter.ceilings()
        self.figures["ceilings"].append(asdict(found))
        self.say(f"ceilings: {found.flops / 1e12:.4g} TFLOP/s, {found.bytes / 1e9:.4g} GB/s")
        best = Ceilings(**{name: max(c[name] for c in self.figures["ceilings"]) for name in asdict(found)})
        for key, shape in self.figures["shapes"].items():
            shape["floors"] = _floors(self.shapes[key], best)

    def run_all(self, write: Callable[[Figures], object]) -> bool:
        """Every shape in turn, with the ceilings before and after; False where a shape or the device was lost.

        Args:
            write: takes the figures after each shape and at the end.
        """
        self.say(", ".join(f"{name} {value}" for name, value in self.figures["machine"].items()))
        whole = True
        self.ceilings()
        for key, shape in self.shapes.items():
            self.say(f"{shape.name}, after {self.seconds:.0f} s")
            try:
                self.run(key)
            except Exception as error:
                whole = False
                traceback.print_exc()
                if isinstance(error, DeviceLost):
                    break
            write(self.figures)
        else:
            self.ceilings()
        self.figures["seconds"] = self.seconds
        write(self.figures)
        return whole

    def run(self, key: str) -> None:
        """Build, check and time every candidate on one shape.

        Raises:
            DeviceLost: a candidate broke the device.
        """
        self.meter.fresh()
        shape = self.shapes[key]
        entry = {**asdict(shape), **shape.sizes()}
        entry["floors"] = _floors(shape, Ceilings(**self.figures["ceilings"][-1]))
        self.figures["shapes"][key] = entry
        problem = gpu_problem.draw(shape, self.meter.device)
        expected = gpu_check.reference(problem)
        lanes = [Lane(row=row, result={"shape": key, "row": name, "kind": row.kind}) for name, row in self.rows.items()]
        self.figures["results"] += [lane.result for lane in lanes]
        self._prepare_all(lanes, problem, expected)
        self._rounds(lanes, problem, problem.routing, self.options.rounds)
        if self.options.skew:
            self._skewed(lanes, problem, entry)

    def _prepare_all(self, lanes: Sequence[Lane], problem: Problem, expected: gpu_check.Reference) -> None:
        """Build and check every candidate; one that fails is out, with its reason."""
        for lane in lanes:
            self._try(lane, "built", partial(self._prepare, lane, problem, expected))

    def _prepare(self, lane: Lane, problem: Problem, expected: gpu_check.Reference) -> None:
        """Build; the first call against the reference; then memory and host synchronisations of a warm one."""
        start = time.perf_counter()
        candidate = import_module(f"benchmarks.peers.{lane.row.module}").build(problem, **lane.row.options)
        lane.candidate = candidate
        leaves = lane.leaves(problem, problem.routing)
        clear(leaves)
        self.meter.poison()
        y = candidate.call(problem.x, problem.routing.weights, problem.routing.indices)
        y.backward(problem.dy)
        self.meter.wait()
        lane.result |= {"note": candidate.note, "first_s": time.perf_counter() - start}
        lane.result["errors"] = gpu_check.errors(expected, gpu_check.left_by(problem, candidate, y.detach()))
        del y
        gpu_check.require(lane.result["errors"], problem.shape.dtype)
        forward, both = self._passes(candidate, problem, problem.routing)
        both()
        memory = self.meter.memory(self._call(candidate, problem, problem.routing), problem.dy, leaves)
        lane.result["memory"] = {} if memory is None else memory._asdict()
        lane.result["syncs"] = {"forward": self.meter.syncs(forward), "both": self.meter.syncs(both)}
        clear(leaves)
        self._say_checked(lane, f"first call {lane.result['first_s']:.1f} s")

    def _say_checked(self, lane: Lane, words: str) -> None:
        worst = max(lane.result["errors"].items(), key=lambda item: float(item[1]))
        note = f"{lane.row.title}: {lane.result['note']}"
        self.say(f"  {note}; {words}, relative error {worst[1]:.1e} ({worst[0]})")

    def _call(self, candidate: Candidate, problem: Problem, routing: Routing) -> Callable[[], Tensor]:
        return lambda: candidate.call(problem.x, routing.weights, routing.indices)

    def _passes(self, candidate: Candidate, problem: Problem, routing: Routing) -> list[Callable[[], object]]:
        """What is timed, by PASSES: forward, as in training unless asked otherwise; forward and backward."""
        call = self._call(candidate, problem, routing)

        def forward() -> object:
            with torch.no_grad() if self.options.inference else nullcontext():
                return call()

        return [forward, lambda: call().backward(problem.dy)]

    def _rounds(self, lanes: Sequence[Lane], problem: Problem, routing: Routing, rounds: int) -> None:
        """Time all lanes in turn; then the medians."""
        samples: dict[tuple[str, str], list[list[float]]] = {}
        for turn in range(rounds):
            for lane in in_turn(lanes, turn):
                if not lane.out:
                    self._try(lane, "timed", partial(self._time, lane, problem, routing, samples))
        for lane in lanes:
            for name in self.passes:
                found = samples.get((lane.result["row"], name))
                if found:
                    lane.result[name] = _summary(found, problem.shape.flops(name.startswith("both")))
            timed = [f"{name} {lane.result[name]['ms']:.3f} ms" for name in self.passes if name in lane.result]
            if timed:
                self.say(f"  {lane.row.title}: " + ", ".join(timed))

    def _time(
        self, lane: Lane, problem: Problem, routing: Routing, samples: dict[tuple[str, str], list[list[float]]]
    ) -> None:
        assert lane.candidate is not None
        leaves = lane.leaves(problem, routing)
        for name, call in zip(PASSES, self._passes(lane.candidate, problem, routing), strict=True):
            found = self.meter.times(call, leaves, self.options.runs)
            samples.setdefault((lane.result["row"], name), []).append(found)

    def _skewed(self, lanes: Sequence[Lane], problem: Problem, entry: dict[str, Any]) -> None:
        """The same weights with experts of unequal popularity, for the rows that ask for it."""
        routing = gpu_problem.route(problem.shape, self.meter.device, zipf=self.options.skew)
        sizes = torch.bincount(routing.indices.flatten(), minlength=problem.shape.n_experts)
        entry["busiest"] = float(sizes.max()) * problem.shape.n_experts / problem.shape.rows
        self.say(f"  skewed: the busiest expert has {entry['busiest']:.1f} times the mean")
        skewed = [self._rerouted(lane, problem, routing) for lane in lanes if lane.row.skew and not lane.out]
        self.figures["skew"] += [lane.result for lane in skewed]
        self._rounds(skewed, problem, routing, max(2, self.options.rounds // 2))

    def _rerouted(self, lane: Lane, problem: Problem, routing: Routing) -> Lane:
        """The lane on other routes, with results of its own."""
        return Lane(
            row=lane.row,
            candidate=lane.candidate,
            result={key: lane.result[key] for key in ("shape", "row", "kind")},
        )

    def _try(self, lane: Lane, step: str, action: Callable[[], object]) -> None:
        """Whatever goes wrong with one candidate is its reason, not the end of the run."""
        try:
            if self.seconds > self.options.budget:
                raise TimeoutError(f"not {step}, the run's {self.options.budget:g} s were over")
            action()
            return
        except Exception as error:
            lane.result["reason"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
            lane.result["traceback"] = traceback.format_exc()
            lane.candidate = lane.program = None
        # Outside of the handler, whose traceback holds the candidate's tensors.
        self.say(f"  {lane.row.title}: not {step}: {lane.result['reason']}")
        try:
            self.meter.wait()
            self.meter.release()
        except Exception as error:
            raise DeviceLost(f"the device fails after {lane.row.title}: {error}") from error


def in_turn(lanes: Iterable[T], turn: int) -> list[T]:
    """An order of its own for every two turns, there and back: nobody always has the same neighbours, or is first."""
    order = list(lanes)
    Random(turn // 2).shuffle(order)
    return order[:: -1 if turn % 2 else 1]


def _floors(shape: Shape, ceilings: Ceilings) -> dict[str, dict[str, float]]:
    found = {}
    for name in PASSES:
        backward = name == "both"
        ms = {"compute": compute_floor(shape, backward, ceilings), "kernel": kernel_floor(shape, backward, ceilings)}
        found[name] = {f"{kind}_ms": value for kind, value in ms.items()}
        found[name] |= {f"{kind}_tflops": shape.flops(backward) / value / 1e9 for kind, value in ms.items()}
    return found


def _summary(rounds: list[list[float]], flops: float) -> dict[str, Any]:
    """Median over all rounds; drift: the medians of the rounds, largest over smallest, less one."""
    every = sorted(ms for times in rounds for ms in times)
    medians = [statistics.median(times) for times in rounds]
    middle = statistics.median(every)
    return {
        "ms": middle,
        "tflops": flops / middle / 1e9,
        "rounds_ms": medians,
        "drift": max(medians) / min(medians) - 1,
        "low_ms": every[len(every) // 5],
        "high_ms": every[len(every) * 4 // 5],
        "runs": len(every),
    }
