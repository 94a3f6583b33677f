"""Experts over ranks, measured: what PyTorch's processes and JAX's devices have in common.

The tokens of all ranks are one problem of `Shape.tokens` each, drawn alike wherever it is drawn; rank r of R has the
r-th part of its tokens and of its experts.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_check, gpu_problem
from benchmarks.gpu_bench import in_turn
from benchmarks.gpu_problem import Problem, Shape

# What of a lane is timed, forward and backward: the layer over the ranks, and the same rows without dispatch.
LAYER, STILL = "layer", "still"
# All ranks' tokens and all experts on one device.
ALONE = "one GPU"
ELEMENT = 2  # bytes of bfloat16

Step = Callable[[], object]


@dataclass(kw_only=True)
class Clock:
    """A step timed on all ranks at once: of each group of calls the slowest rank counts.

    Attributes:
        wait: takes a call's result; returns when this rank's work is done. slowest: the largest of the ranks' numbers;
            a collective, after which all go on together.
        rep_ms: of a group. warmup_ms: before it.
    """

    wait: Callable[[Any], object]
    slowest: Callable[[float], float]
    rep_ms: float
    warmup_ms: float

    def once(self, step: Step) -> float:
        """Milliseconds of one call, of the slowest rank."""
        return self._group(step, 1)

    def time(self, step: Step) -> float:
        """Milliseconds a call, of one group after a warm-up; as many calls on every rank."""
        self.once(step)
        once = max(self.once(step), 1e-3)
        self._group(step, calls(self.warmup_ms, once))
        return self._group(step, calls(self.rep_ms, once))

    def _group(self, step: Step, n: int) -> float:
        self.wait(None)
        self.slowest(0.0)
        begin = time.perf_counter()
        for _ in range(n):
            result = step()
        self.wait(result)
        return self.slowest(1e3 * (time.perf_counter() - begin) / n)


@dataclass(kw_only=True)
class Lane:
    """A row on one shape: its steps by name, and what was found."""

    key: str
    steps: Mapping[str, Step] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)


def calls(ms: float, once: float) -> int:
    """How many of them take so long."""
    return max(1, min(1000, int(ms / once)))


def of_all(shape: Shape, ranks: int, device: str) -> Problem:
    """The problem of all ranks' tokens."""
    return gpu_problem.draw(replace(shape, tokens=ranks * shape.tokens), device)


def part(of: int, rank: int, ranks: int) -> slice:
    """The rank's tokens, or experts, of so many."""
    each = of // ranks
    return slice(rank * each, (rank + 1) * each)


def leaving(once_a_rank: bool, ids_SK: Tensor, ranks: int, n_experts: int) -> int:
    """Rows that leave a rank in a step, of the rank that sends most.

    Out and home in the forward pass, and both again in the backward pass. The way home is the way out turned round: a
    rank sends as many rows back as it received of others.

    Args:
        once_a_rank: a token goes to each rank that has one of its experts; else every token to every rank.
        ids_SK: of the tokens of all ranks, as many of each, in [0, E).
    """
    tokens = len(ids_SK) // ranks
    goes_Sn = torch.ones(len(ids_SK), ranks, dtype=torch.bool)
    if once_a_rank:
        rank_SK = ids_SK.cpu() // (n_experts // ranks)
        goes_Sn = (rank_SK[:, :, None] == torch.arange(ranks)).any(1)
    rows_nn = goes_Sn.view(ranks, tokens, ranks).sum(1)  # [from][to]
    rows_nn.fill_diagonal_(0)
    return int((2 * (rows_nn.sum(1) + rows_nn.sum(0))).max())


def rounds(lanes: Sequence[Lane], clock: Clock, turns: int, over: Callable[[], bool]) -> None:
    """Time every step of every lane in turn; the median of the turns into its result.

    Args:
        over: whether nothing new is to start; the same on every rank.
    """
    samples: dict[tuple[str, str], list[float]] = {}
    for turn in range(turns):
        for lane in in_turn(lanes, turn):
            for name, step in lane.steps.items():
                if not over():
                    samples.setdefault((lane.key, name), []).append(clock.time(step))
    for lane in lanes:
        for name in lane.steps:
            found = samples.get((lane.key, name))
            if found:
                lane.result[name] = {"ms": statistics.median(found), "rounds_ms": found}


def entry(shape: Shape, ranks: int, problem: Problem) -> dict[str, Any]:
    """What is kept of a shape: its sizes, and rows that leave a rank by either way of sending."""
    ids = problem.routing.indices
    rows = {str(once): leaving(once, ids, ranks, shape.n_experts) for once in (True, False)}
    return {**asdict(shape), "ranks": ranks, "leaving": rows}


def check(expected: gpu_check.Reference, found: gpu_check.Found, held: range) -> dict[str, float]:
    """Relative errors of all ranks' tokens, and of the weight gradients of the experts that are held here.

    Raises:
        ValueError: one is above the tolerance.
    """
    here = {expert: due for expert, due in expected.experts.items() if expert in held}
    own = replace(found, gradients=found.gradients if here else None)
    errors = gpu_check.errors(replace(expected, experts=here), own)
    gpu_check.require(errors)
    return errors


def reason(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def write(path: str, figures: Mapping[str, Any]) -> None:
    """Whole or not at all: the file is read while more is found."""
    part = Path(f"{path}.part")
    part.write_text(json.dumps(figures))
    part.replace(path)
