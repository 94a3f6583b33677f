"""A run timed by groups of calls and the host's clock: what the host does counts, both frameworks are timed alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.gpu_bench import Bench, Lane
from benchmarks.gpu_meter import clear
from benchmarks.gpu_problem import Problem, Routing
from benchmarks.gpu_tables import PASSES

# By pass: the call, and what waits for its result.
Calls = dict[str, tuple[Callable[[], object], Callable[[Any], object]]]


class WallBench(Bench):
    """See Bench. Of a pass so slow that `options.slow` ms go by, two rounds are enough."""

    def _time(
        self, lane: Lane, problem: Problem, routing: Routing, samples: dict[tuple[str, str], list[list[float]]]
    ) -> None:
        """See Bench; by groups of calls."""
        options = self.options
        for name, (call, wait) in self._calls(lane, problem, routing).items():
            seen = samples.setdefault((lane.result["row"], name), [])
            if len(seen) > 1 and statistics.median(seen[0]) > options.slow:
                continue
            groups = 1 if options.dry else options.groups
            seen.append(grouped(call, wait, warmup_ms=options.warmup, rep_ms=options.rep, groups=groups))
        if lane.candidate is not None:
            clear(lane.leaves(problem, routing))

    def _calls(self, lane: Lane, problem: Problem, routing: Routing) -> Calls:
        """What is timed of a candidate, gradients cleared before each call."""
        assert lane.candidate is not None
        leaves = lane.leaves(problem, routing)

        def fresh(call: Callable[[], object]) -> object:
            clear(leaves)
            return call()

        passes = zip(PASSES, self._passes(lane.candidate, problem, routing), strict=True)
        return {name: (partial(fresh, call), lambda _: self.meter.wait()) for name, call in passes}


def grouped(
    call: Callable[[], object], wait: Callable[[Any], object], *, warmup_ms: float, rep_ms: float, groups: int
) -> list[float]:
    """Milliseconds a call, of groups of calls that follow each other without waiting; each ends when its work is done.

    Groups last about rep_ms together; of calls so long that a group is one of them, there are fewer, at least 3.

    Args:
        wait: takes the last call's result; returns when it is there.
    """

    def run(n: int) -> float:
        begin = time.perf_counter()
        for _ in range(n):
            result = call()
        wait(result)
        return 1e3 * (time.perf_counter() - begin)

    run(1)
    once = max(run(1), 1e-3)
    run(max(1, min(1000, int(warmup_ms / once))))
    n = max(1, min(1000, int(rep_ms / groups / once)))
    count = groups if n > 1 else max(3, min(groups, int(rep_ms / once)))
    return [run(n) / n for _ in range(count)]
