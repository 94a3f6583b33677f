"""One run with few tokens: every candidate eager and, where nothing in it waits for the device, from a CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_check
from benchmarks.gpu_bench import Lane
from benchmarks.gpu_floors import Ceilings
from benchmarks.gpu_meter import clear
from benchmarks.gpu_problem import Problem, Routing
from benchmarks.gpu_tables import PASSES
from benchmarks.gpu_wall import Calls, WallBench

GRAPH = "_graph"


class FewBench(WallBench):
    """See WallBench; shapes are keyed "qwen3-16". `profile` prints where a row's time goes at so many tokens."""

    passes: Sequence[str] = (*PASSES, *(name + GRAPH for name in PASSES))

    def run(self, key: str) -> None:
        """See Bench; then what its weights' bytes allow, and a profile where one is asked for."""
        self.graphs: dict[str, dict[str, Any]] = {}
        super().run(key)
        self.graphs.clear()

    def _prepare_all(self, lanes: Sequence[Lane], problem: Problem, expected: gpu_check.Reference) -> None:
        super()._prepare_all(lanes, problem, expected)
        key = lanes[0].result["shape"]
        entry = self.figures["shapes"][key]
        touched = len(problem.routing.indices.unique())
        rates = Ceilings(**{name: max(c[name] for c in self.figures["ceilings"]) for name in ("flops", "bytes")})
        entry |= {"base": key.rpartition("-")[0], "touched": touched, "few_ms": floors(problem, touched, rates)}
        if self.options.profile == problem.shape.tokens:
            for lane in lanes:
                if lane.candidate is not None and lane.result["row"] in self.options.profile_rows:
                    self._try(lane, "profiled", partial(self._profile, lane, problem))

    def _prepare(self, lane: Lane, problem: Problem, expected: gpu_check.Reference) -> None:
        """See Bench; then the graphs, each replayed over NaN and held against the reference."""
        super()._prepare(lane, problem, expected)
        assert lane.candidate is not None
        waits = lane.result["syncs"]["forward"] + lane.result["syncs"]["both"]
        if waits:
            # Not tried: after a capture that fails PyTorch's allocator and random numbers stay in its state.
            lane.result["capture"] = f"the host waits for the device at {', '.join(dict.fromkeys(waits))}"
            return
        leaves, call = lane.leaves(problem, problem.routing), self._call(lane.candidate, problem, problem.routing)
        self.graphs[lane.result["row"]] = graphs = {}

        def forward() -> Tensor:
            with torch.no_grad():
                return call()

        def both() -> Tensor:
            y = call()
            y.backward(problem.dy)
            return y.detach()

        for name, one in zip(PASSES, (forward, both), strict=True):
            try:
                replay, y = self.meter.capture(one, leaves)
                _poison([y, *(leaf.grad for leaf in leaves if leaf.grad is not None)])
                replay()
                self.meter.wait()
                found = gpu_check.Found(y=y) if name == "forward" else gpu_check.left_by(problem, lane.candidate, y)
                gpu_check.require(gpu_check.errors(expected, found))
            except Exception as error:
                lane.result["capture"] = f"{name}: {type(error).__name__}: {' '.join(str(error).split())}"[:300]
                return
            finally:
                clear(leaves)
            graphs[name] = replay

    def _calls(self, lane: Lane, problem: Problem, routing: Routing) -> Calls:
        """See WallBench; the graphs too."""
        graphs = self.graphs.get(lane.result["row"], {})
        replays: Calls = {name + GRAPH: (replay, lambda _: self.meter.wait()) for name, replay in graphs.items()}
        return super()._calls(lane, problem, routing) | replays

    def _profile(self, lane: Lane, problem: Problem) -> None:
        """Print the kernels of five forward and backward passes of a row, and the host's functions, by time."""
        from torch.profiler import ProfilerActivity, profile

        assert lane.candidate is not None
        leaves = lane.leaves(problem, problem.routing)
        both = self._passes(lane.candidate, problem, problem.routing)[1]
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        with profile(activities=activities) as seen:
            for _ in range(5):
                clear(leaves)
                both()
            self.meter.wait()
        clear(leaves)
        title = f"{lane.row.title}, {problem.shape.name}, T = {problem.shape.tokens}, five times forward+backward"
        for order in ("self_device_time_total", "self_cpu_time_total")[0 if torch.cuda.is_available() else 1 :]:
            self.say(f"{title}, by {order}\n{seen.key_averages().table(sort_by=order, row_limit=25)}")


def floors(problem: Problem, touched: int, ceilings: Ceilings) -> dict[str, float]:
    """Milliseconds by pass that weights' bytes or the products take at least, whichever is longer.

    Bytes: in the forward pass the weights of the experts that have rows, once; in both passes twice, and every expert's
    gradient written once, zeros where it has no rows.
    """
    shape = problem.shape
    weights = shape.weight_bytes()
    read = weights * touched / shape.n_experts
    found = {"forward": read, "both": 2 * read + weights}
    flops = {"forward": shape.flops(False), "both": shape.flops(True)}
    return {name: 1e3 * max(found[name] / ceilings.bytes, flops[name] / ceilings.flops) for name in PASSES}


def _poison(tensors: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for tensor in tensors:
            tensor.fill_(float("nan"))
