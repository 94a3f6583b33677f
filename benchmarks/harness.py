"""Interleaved timing of several candidates in one process."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version

THREADS = 2


def interleaved(candidates: Mapping[str, Callable[[], object]], runs: int, seconds: float = 0.05) -> dict[str, float]:
    """Median seconds of one call of each candidate.

    Every candidate is called once to warm up; then each round times all of them in turn, so that a slow moment of the
    machine falls on all. A candidate that is faster than `seconds` is called several times a round.

    Args:
        candidates: name -> a call that returns when its work is done.
        runs: rounds. seconds: the least time one measurement takes.
    """
    repeats = {}
    for name, call in candidates.items():
        call()
        repeats[name] = max(1, round(seconds / max(_time(call, 1), 1e-9)))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(runs):
        for name, call in candidates.items():
            times[name].append(_time(call, repeats[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def two_threads() -> None:
    """Keep this process on THREADS cores: XLA makes as many threads as it may use cores, PyTorch is told."""
    os.environ["OMP_NUM_THREADS"] = str(THREADS)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])


def heading() -> str:
    """Machine and versions."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "jax", "flax", "transformers", "numpy"))
    return f"{_processor()}, {os.cpu_count()} cores, {THREADS} threads; Python {platform.python_version()}, {versions}"


def _time(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
