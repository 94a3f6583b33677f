"""What a launch could be instead: other tiles, stages, orders and warps, and whether they fit into shared memory.

A change is what differs from the plan's constants, with "num_warps" as one of them. One thing is changed at a time;
columns and the stages that fit beside them are one thing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from moebius.core.kernels.plan import Launch, tile

Change = dict[str, int]

GROUPS = (4, 8, 16, 24)
UNROLLS = (1, 2, 4)
COLUMNS = (256, 128)  # of Hopper's tiles: halves of blocks are whole swizzles, and 256 is the widest wgmma
ELEMENTS = (512, 1024, 2048, 4096, 8192)
WARPS = (2, 4, 8)
PANEL = 64  # columns of a unit that the derivative computes
_SUMS = 128  # of a thread at most: it has 255 registers
_TASKS = 256  # bytes at most in which the compiler hands arguments to the tasks of a program


def hopper(launch: Launch, limit: int, whole: bool = False) -> list[Change]:
    """Of the kernels for Hopper. Of each width of tiles: as many stages as fit, one less, and one more as a row that
    says how much is missing.

    Args:
        limit: bytes of shared memory that a program may have. whole: every combination.
    """
    now = launch.constants
    tiles = []
    for columns in COLUMNS:
        most = max(stages for stages in range(1, 17) if hopper_bytes(launch, columns, stages) <= limit)
        of_width = {"COLS": columns}
        if "UNROLL" in now:
            of_width["UNROLL"] = min(now["UNROLL"], columns // PANEL)
        tiles += [of_width | {"STAGES": stages} for stages in (most, most - 1, most + 1)]
    axes = [tiles, [{"GROUP": size} for size in GROUPS]]
    if "UNROLL" in now:
        axes.append([{"UNROLL": count} for count in UNROLLS])
    found = _distinct(axes, now, whole)
    return [change for change in found if _whole_panels(now | change)]


def hopper_bytes(launch: Launch, columns: int, stages: int) -> int:
    """Shared memory of a kernel for Hopper at most: the ring of both operands, the finished halves, the pre-activation
    where it is read, 8 bytes a barrier, and what the tasks are handed."""
    depth, derivative = launch.constants["DEEP"], launch.kernel.endswith("differentiated_product")
    ring = stages * (128 + columns) * depth * 2
    halves = 2 * 64 * columns * 2
    hidden = 4 * 8 * columns * 2 if derivative else 0
    barriers = 8 * (2 * stages + 4 + (2 if derivative else 0))
    return ring + halves + hidden + barriers + _TASKS


def hopper_blocks(kernel: str, constants: dict[str, Any]) -> tuple[tuple[int, ...], ...]:
    """Launch.blocks of a kernel for Hopper with these constants."""
    columns, depth = constants["COLS"], constants["DEEP"]
    rows, half = (64, depth), columns // 2
    of = {
        "product": (rows, (1, half, depth) if constants.get("TRANSPOSED") else (1, depth, half)),
        "weight_gradient": (rows, (depth, columns)),
        "activated_product": (rows, (1, depth, half)),
        "differentiated_product": (rows, (1, half, depth), (8, columns)),
    }
    return of[kernel.split(".")[1]]


def portable(launch: Launch, limit: int, whole: bool = False) -> list[Change]:
    """Of the kernels for any GPU: each number halved and doubled, a stage more or less, the other number of warps."""
    now = launch.constants | {"num_warps": launch.num_warps}
    axes: list[Sequence[Change]] = [
        [{"ROWS": size} for size in _beside(now["ROWS"], 16, 128)],
        [{"COLS": size} for size in _beside(now["COLS"], 16, 256)],
        [{"DEEP": size} for size in _beside(now["DEEP"], 16, 128)],
        [{"STAGES": count} for count in (now["STAGES"] - 1, now["STAGES"] + 1) if count > 1],
        [{"num_warps": 12 - now["num_warps"]}],
        [{"GROUP": size} for size in GROUPS],
    ]
    roomy = [_with_warps(now, change) for change in _distinct(axes, now, whole)]
    return _distinct([roomy], now, False)


def portable_bytes(constants: dict[str, Any], itemsize: int) -> int:
    """Shared memory of a kernel for any GPU at least: the compiler keeps one block less than stages, or as many."""
    line = (constants["ROWS"] + constants["COLS"]) * itemsize
    return (constants["STAGES"] - 1) * constants["DEEP"] * line


def elementwise(launch: Launch, limit: int, whole: bool = False) -> list[Change]:
    """Of kernels without products: tiles of other sizes, by the plan's own rule of their sides, and other warps."""
    now = launch.constants | {"num_warps": launch.num_warps}
    width = now["D"] if "D" in now else now["I"]
    tiles = [dict(zip(("ROWS", "COLS"), tile(width, elements), strict=True)) for elements in ELEMENTS]
    return _distinct([tiles, [{"num_warps": count} for count in WARPS]], now, whole)


def against(launch: Launch, needed: int, limit: int) -> str:
    """Why a variant is not tried; nothing where it is.

    Args:
        needed: bytes of shared memory. limit: those that a program may have.
    """
    if needed > limit:
        return f"{needed / 1024:.0f} KiB of shared memory, {limit / 1024:.0f} are there"
    constants = launch.constants
    sums = constants["ROWS"] * constants["COLS"] // 32 // launch.num_warps if "PRECISION" in constants else 0
    return f"{sums} sums a thread, which has 255 registers" if sums > _SUMS else ""


def named(change: Change) -> str:
    """In words.

    >>> named({"COLS": 128, "STAGES": 6, "num_warps": 8})
    'COLS 128, STAGES 6, 8 warps'
    """
    warps = [f"{change['num_warps']} warps"] if "num_warps" in change else []
    return ", ".join([*(f"{name} {value}" for name, value in change.items() if name != "num_warps"), *warps])


def _distinct(axes: Sequence[Sequence[Change]], now: dict[str, Any], whole: bool) -> list[Change]:
    """Each change once, without what it leaves as it is."""
    found: list[Change] = []
    for change in _combined(axes) if whole else (change for axis in axes for change in axis):
        new = {name: value for name, value in change.items() if now[name] != value}
        if new and new not in found:
            found.append(new)
    return found


def _combined(axes: Sequence[Sequence[Change]]) -> Iterator[Change]:
    for chosen in product(*axes):
        merged: Change = {}
        for change in chosen:
            merged |= change
        yield merged


def _whole_panels(constants: dict[str, Any]) -> bool:
    return "UNROLL" not in constants or constants["COLS"] // PANEL % constants["UNROLL"] == 0


def _beside(size: int, least: int, most: int) -> list[int]:
    return [other for other in (size // 2, 2 * size) if least <= other <= most]


def _with_warps(now: dict[str, Any], change: Change) -> Change:
    """With 8 warps where 4 have no registers for so large a tile."""
    constants = now | change
    if constants["ROWS"] * constants["COLS"] // 32 // constants["num_warps"] <= _SUMS:
        return change
    return change if constants["num_warps"] == 8 else change | {"num_warps": 8}
