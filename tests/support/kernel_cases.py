"""The Triton kernels' cases: one list for CUDA and for Triton's interpreter.

A case takes the device and the dtype of its tensors and asserts. Run as a program, this file runs every case on the CPU
under the interpreter and prints {"case dtype": error or null}: the interpreter can be switched on only before triton is
imported, so it wants a process of its own.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from kernel_checks import (
    activates,
    adds_bias_first,
    differentiates,
    dots,
    extremes,
    fuses,
    gathers,
    keeps_nan,
    masks,
    scans,
    scatters,
    sorts,
    sums,
    sums_dots,
    sums_rows,
    sums_rows_rounds_once,
    sums_views,
)
from kernel_draws import Where

from moebius.core.activations import ACTIVATIONS

SWIGLU, OAI, PAIRS = (ACTIVATIONS[name] for name in ("swiglu", "swigluoai", "quick_geglu"))

CASES: dict[str, Callable[[Where], None]] = {
    "mask_routes of 32 bits": partial(masks, dtype=torch.int32),
    "mask_routes of 64 bits": partial(masks, dtype=torch.int64),
    "sort_routes of several blocks": partial(sorts, tokens=150, k=3, n_experts=5),
    "sort_routes of no token": partial(sorts, tokens=0, k=3, n_experts=5),
    "sort_routes of one block": partial(sorts, tokens=43, k=3, n_experts=5),
    "sort_routes of as many as one program takes": partial(sorts, tokens=64, k=4, n_experts=130),
    "sort_routes of one token": partial(sorts, tokens=1, k=3, n_experts=5),
    "sort_routes of one expert": partial(sorts, tokens=300, k=1, n_experts=1),
    "sort_routes all to one expert": partial(sorts, tokens=150, k=2, n_experts=7, ids=3),
    "sort_routes without a route": partial(sorts, tokens=150, k=2, n_experts=7, ids=7),
    "sort_routes of more experts than routes": partial(sorts, tokens=40, k=8, n_experts=1500),
    "sort_routes of 1023 experts": partial(sorts, tokens=40, k=8, n_experts=1023),
    "scan_counts in several steps": scans,
    "gather_rows of an odd width": partial(gathers, tokens=7, k=3, width=101),
    "gather_rows of several column blocks": partial(gathers, tokens=9, k=2, width=1440),
    "gather_rows of no token": partial(gathers, tokens=0, k=2, width=8),
    "gather_rows of one slot a token": partial(gathers, tokens=40, k=1, width=62),
    "scatter_rows of an odd width": partial(scatters, tokens=7, k=3, width=101),
    "scatter_rows of several column blocks": partial(scatters, tokens=9, k=2, width=1440),
    "scatter_rows of no token": partial(scatters, tokens=0, k=2, width=8),
    "scatter_rows of too many slots to unroll": partial(scatters, tokens=5, k=20, width=31),
    "sum_dots of one part": partial(sums_dots, parts=1),
    "sum_dots of several parts": partial(sums_dots, parts=3),
    "sum_slots": sums,
    "sum_slots of several column blocks": partial(sums, tokens=3, width=1440),
    "sum_slots of no token": partial(sums, tokens=0),
    "sum_slots of one slot": partial(sums, k=1),
    "sum_slots of too many slots to unroll": partial(sums, k=20, width=31),
    "sum_slots to float32": partial(sums, dtype=torch.float32),
    "sum_slots of views": sums_views,
    "sum_slots with bias is the sum of rows with bias": partial(fuses, after=False),
    "sum_slots with bias, weighted after, is the sum of such rows": partial(fuses, after=True),
    "sum_slots with bias": partial(sums, biased=True),
    "sum_slots with weighted bias": partial(sums, biased=True, weighted=True),
    "sum_slots weighted after": partial(sums, weighted=True, after=True),
    "sum_slots with bias, weighted after": partial(sums, biased=True, weighted=True, after=True),
    **{f"activate_rows of {name}": partial(activates, activation=row) for name, row in ACTIVATIONS.items()},
    **{f"backward of {name}": partial(differentiates, activation=row) for name, row in ACTIVATIONS.items()},
    **{f"extremes of {name}": partial(extremes, activation=row) for name, row in ACTIVATIONS.items()},
    **{f"NaN in {name}": partial(keeps_nan, activation=row) for name, row in ACTIVATIONS.items()},
    "activate_rows with bias": partial(activates, activation=OAI, biased=True),
    "activate_rows with bias, interleaved": partial(activates, activation=PAIRS, biased=True),
    "activation with bias is that of hidden with bias": partial(adds_bias_first, activation=OAI),
    "activation with bias, interleaved, is that of hidden with bias": partial(adds_bias_first, activation=PAIRS),
    "activate_rows without weights": partial(activates, activation=SWIGLU, weighted=False),
    "activate_rows of an odd width": partial(activates, activation=SWIGLU, inter=31),
    "activate_rows of an odd width, interleaved": partial(activates, activation=PAIRS, inter=31),
    "activate_rows of several column blocks": partial(activates, activation=PAIRS, rows=3, inter=1440),
    "activate_rows clamped to zero": partial(activates, activation=replace(PAIRS, limit=0.0)),
    "backward with bias": partial(differentiates, activation=OAI, biased=True),
    "backward with bias, interleaved": partial(differentiates, activation=PAIRS, biased=True),
    "backward without weights": partial(differentiates, activation=SWIGLU, weighted=False),
    "backward in place": partial(differentiates, activation=SWIGLU, in_place=True, inter=1440),
    "backward in place, interleaved": partial(differentiates, activation=PAIRS, in_place=True, biased=True, inter=1440),
    "backward of an odd width": partial(differentiates, activation=SWIGLU, inter=31),
    "backward of an odd width, interleaved": partial(differentiates, activation=PAIRS, inter=31),
    "sum_rows": partial(sums_rows, sizes=[3, 0, 40, 1, 0]),
    "sum_rows weighted": partial(sums_rows, sizes=[3, 0, 40, 1, 0], weighted=True),
    "sum_rows of several parts": partial(sums_rows, sizes=[0, 600, 256, 257], width=31),
    "sum_rows all in one expert": partial(sums_rows, sizes=[0, 1200, 0], width=31, weighted=True),
    "sum_rows of more parts than one step joins": partial(sums_rows, sizes=[4500, 3], width=7),
    "sum_rows of several column blocks": partial(sums_rows, sizes=[5, 4], width=260),
    "sum_rows of no rows": partial(sums_rows, sizes=[0, 0], tail=0),
    "sum_rows of the tail alone": partial(sums_rows, sizes=[0, 0]),
    "sum_rows to float32": partial(sums_rows, sizes=[3, 9], dtype=torch.float32),
    "sum_rows to float16": partial(sums_rows, sizes=[3, 9], dtype=torch.float16),
    "sum_rows rounds once": sums_rows_rounds_once,
    "dot_rows": dots,
    "dot_rows of several column blocks": partial(dots, width=1440),
    "dot_rows of no rows": partial(dots, rows=0),
}


def pairs(*dtypes: str) -> list[tuple[str, str]]:
    """(case, dtype): every case in every dtype, but routes, which have none, once."""
    return [(name, d) for d in dtypes for name in CASES if d == dtypes[0] or not name.startswith(("sort", "scan"))]


@contextmanager
def poisoned() -> Iterator[None]:
    """Whatever torch.empty returns holds NaN or the largest integer."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def main(dtypes: list[str]) -> None:
    outcomes: dict[str, str | None] = {}
    for name, dtype in pairs(*dtypes):
        try:
            with poisoned():
                CASES[name](Where("cpu", getattr(torch, dtype)))
            outcomes[f"{name} {dtype}"] = None
        except Exception:
            outcomes[f"{name} {dtype}"] = traceback.format_exc()
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(sys.argv[1:])
