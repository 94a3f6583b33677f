"""Independent pieces of NumPy work, on as many cores as there are."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

# Each piece holds one reference of a layer, stage by stage; more at once would cost memory, not time.
_MOST = 4


def at_once(pieces: Sequence[Callable[[], Any]]) -> list[Any]:
    """What the pieces return, in order; the first error that one raises.

    A piece spends its time in NumPy, which lets go of the interpreter. Each has one thread in BLAS, whose threads wait
    for each other in many small products; measured: one piece alone, on cores that other programs used too, took eight
    times as long with BLAS on all of them.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(_workers()) as pool:
        return list(pool.map(_counted, pieces))


def _counted(piece: Callable[[], Any]) -> Any:
    with np.errstate(over="ignore", invalid="ignore"):  # inf and nan are counted as such; the setting is a thread's own
        return piece()


def _workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MOST)
