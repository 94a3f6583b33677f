"""Launches of the grouped products that run on any GPU, as data; see plan.py.

Tiles follow from rules: as high as an expert's rows on average ask for, as wide as wastes few columns, as deep as the
memory that a program has on the device. The rules are by what the compiler makes of them (registers, shared memory, no
spills) and by counting bytes; what was measured is said where it decides. benchmarks/RESULTS.md: times against `loop`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from moebius.core.kernels.plan import Launch

Capability = tuple[int, int]

_COLUMNS = (256, 128, 64, 32, 16)
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# KiB of shared memory that one program may have, by compute capability (CUDA C++ programming guide, table of technical
# specifications). All others have the least or more.
_SHARED = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}
_LEAST_SHARED = 99
_GROUP = 16  # tiles down that are computed at one time, for the second-level cache: as measured for matmul_hopper


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Products that are cut alike.

    Attributes:
        widest: columns of a tile at most, by its height. Wide tiles of few rows would leave processors without one: a
            row for each of 8 experts with 1536 columns are 192 tiles of 64.
        sums: of a thread before there are 8 warps instead of 4; with more the registers spill.
        depths: of a block, in the order of preference; the last serves whatever the shared memory.
        stages: at most.
    """

    widest: dict[int, int]
    sums: int
    depths: tuple[int, ...]
    stages: int = 4


# Tensor cores, and copies of 16 bytes that go on while they multiply.
_WHOLE = Family(widest={16: 64, 32: 128, 64: 128, 128: 256}, sums=64, depths=(64, 32))
# Widths that are no multiples of 8: copies of 4 bytes, or of 2 through registers, each with an address and a mask.
_RAGGED = Family(widest={16: 64, 32: 64, 64: 64, 128: 64}, sums=32, depths=(32,))
# float32 in full: no tensor cores, and registers for the operands too.
_SERIAL = Family(widest={16: 64, 32: 128, 64: 128}, sums=32, depths=(32,))
# float32 by three products of TF32's parts on tensor cores.
_PARTED = 9  # the compute capability, before the point, on which that was measured
_PARTS = Family(widest={64: 128}, sums=64, depths=(32,), stages=3)


def height(n_rows: int, n_experts: int, dtype: str) -> int:
    """Rows of a tile: the least that holds the rows of most experts, so that most matrices are read once.

    Up to some 150 rows an expert, reading matrices is what takes the time, not multiplying the rows that a tile lacks.
    Each height that occurs is one more variant of the code; numbers of rows that have one height have one code.

    >>> height(8, 128, "bfloat16"), height(4096, 128, "bfloat16"), height(65536, 8, "bfloat16")
    (16, 64, 128)
    """
    heights = sorted(_family(dtype, 8, 8).widest)
    wanted = 1.5 * n_rows / max(1, n_experts)
    return next((size for size in heights if size >= wanted), heights[-1])


def tiles(n_rows: int, n_experts: int, height: int) -> int:
    """Tiles that n_rows can need, however they are spread: rows of the table of `list_tiles`, less one."""
    return n_rows // height + min(n_rows, n_experts)


@lru_cache(maxsize=1024)
def list_tiles(n_experts: int, height: int) -> Launch:
    """The table that `product` reads, and where each expert's rows start; tiles have `height` rows."""
    bins = max(16, 1 << (n_experts - 1).bit_length())
    constants = {"E": n_experts, "BINS": bins, "ROWS": height, "CHUNK": 128}
    return Launch(kernel="tiles.list_tiles", programs=n_experts, constants=constants)


@lru_cache(maxsize=1024)
def product(
    n_rows: int,
    n_experts: int,
    width_in: int,
    width_out: int,
    transposed: bool,
    *,
    height: int,
    dtype: str,
    capability: Capability,
    precision: str | None = None,
) -> Launch:
    """n_rows rows of width_in times matrices [e, width_in, width_out], or [e, width_out, width_in] where `transposed`.

    Args:
        height: of the tiles in the table that the kernel is given.
        dtype: float32, bfloat16 or float16.
        capability: CUDA's compute capability of the device, 8.0 or more.
        precision: that of `tl.dot` for float32: "ieee", "tf32x3" or "tf32"; None for one of the first two, in which
            float32 has all its digits. Without tensor cores a transposed matrix is read from shared memory against its
            order: on an H200, 64 rows high, 12 TFLOP/s, where three products of TF32's parts give 67, with a quarter of
            the error. As the matrix lies, it is 40 for 45, and is left in full. Before Hopper registers would spill.
    """
    if precision is None:
        parts = dtype == "float32" and transposed and height in _PARTS.widest and capability[0] == _PARTED
        precision = "tf32x3" if parts else "ieee"
    family = _PARTS if precision == "tf32x3" and height in _PARTS.widest else _family(dtype, width_in, width_out)
    constants, num_warps = _block(family, height, width_out, _BYTES[dtype], capability)
    shape = {"D": width_in, "F": width_out, "TRANSPOSED": transposed, "PRECISION": precision}
    return Launch(
        kernel="matmul_portable.product",
        programs=tiles(n_rows, n_experts, height) * _blocks(width_out, constants["COLS"]),
        constants=shape | constants,
        num_warps=num_warps,
    )


@lru_cache(maxsize=1024)
def weight_gradient(
    n_experts: int, width_in: int, width_out: int, *, dtype: str, capability: Capability, precision: str = "ieee"
) -> Launch:
    """One [width_in, width_out] an expert; arguments as `product`'s."""
    family = _family(dtype, width_in, width_out)
    rows = _covering(width_in, tuple(family.widest))
    constants, num_warps = _block(family, rows, width_out, _BYTES[dtype], capability)
    return Launch(
        kernel="matmul_portable.weight_gradient",
        programs=n_experts * _blocks(width_in, rows) * _blocks(width_out, constants["COLS"]),
        constants={"D": width_in, "F": width_out, "PRECISION": precision} | constants,
        num_warps=num_warps,
    )


def _family(dtype: str, width_in: int, width_out: int) -> Family:
    if dtype == "float32":
        return _SERIAL
    return _RAGGED if width_in % 8 or width_out % 8 else _WHOLE


def _block(family: Family, rows: int, width: int, itemsize: int, capability: Capability) -> tuple[dict[str, Any], int]:
    """(constants of a tile of `rows` rows, warps of its program)."""
    columns = _covering(width, tuple(size for size in _COLUMNS if size <= family.widest[rows]))
    num_warps = 4 if rows * columns <= 128 * family.sums else 8
    # Whose sums fill no more than a quarter of the registers has room for a second program, which needs as much shared
    # memory; a KiB of each is the system's.
    free = _SHARED.get(capability, _LEAST_SHARED) * 1024
    free = free // 2 - 1024 if rows * columns <= 128 * 128 else free
    line = (rows + columns) * itemsize
    depth = next((size for size in family.depths if 3 * size * line <= free), family.depths[-1])
    # With fewer than 3 stages little is copied ahead; the compiler keeps one block less than stages but for warpgroups.
    stages = max(3, min(family.stages, free // (depth * line)))
    return {"ROWS": rows, "COLS": columns, "DEEP": depth, "STAGES": stages, "GROUP": _GROUP}, num_warps


def _covering(width: int, sizes: tuple[int, ...]) -> int:
    """The size whose blocks cover `width` with little beyond it; a block costs its columns and some 32 more."""
    return min(sizes, key=lambda size: _blocks(width, size) * (size + 32))


def _blocks(size: int, block: int) -> int:
    return -(-size // block)
