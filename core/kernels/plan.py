"""Launches as data: which kernel, how many programs, what shapes its code. Whoever can launch Triton can play one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from moebius.core.activations import Activation
from moebius.core.registry import Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """One launch of one kernel.

    Attributes:
        kernel: "file.function" below moebius.core.kernels.
        programs: size of the grid, which has one axis.
        constants: every constexpr argument by name; equal constants are the same compiled code.
        num_warps: of a program; of one whose warps have several tasks, of the first.
        registers: of a thread at most, before warps with several tasks share them out; None for the compiler's choice.
        blocks: of as many first arguments, the blocks in which the tensor memory accelerator copies them: the launcher
            hands over a descriptor of each.
    """

    kernel: str
    programs: int
    constants: dict[str, Any]
    num_warps: int = 4
    registers: int | None = None
    blocks: tuple[tuple[int, ...], ...] = ()

    def __hash__(self) -> int:
        return hash((self.kernel, self.programs, *self.constants.values()))

    def options(self) -> dict[str, Any]:
        """Options of the compiler."""
        # No fused multiply-add: else a product's rounding would depend on what a variant of a kernel does with it, and
        # a step taken alone would not be equal, bit for bit, to the same step inside a longer kernel.
        options = {"num_warps": self.num_warps, "enable_fp_fusion": False}
        return options if self.registers is None else options | {"maxnreg": self.registers}


# Elements of a program's tile: with 4 warps 8 a thread, that is one 16-byte load in 16 bits, for each 1024. Elementwise
# kernels want several loads in flight; those that hold float64 sums or the many values of a derivative want registers.
_GATHERED = 4096
_SUMMED = 1024
_ACTIVATED = 2048
_DIFFERENTIATED = 1024
_REDUCED = 2048

_SLOTS = 128  # of a block of routes: one a thread
_PART = 256  # rows of a part of an expert's sum
_COLUMNS = (1024, 512, 256, 128, 64, 32)
_TILE = 128  # rows of a tile of the grouped products
# Measured on an H200, bfloat16, four models' shapes. Slower: four stages without a buffer for the output (2 to 10 %),
# groups of 4 or 8 tiles (up to 4 %), of 24 (1 %), one warpgroup alone where a tile's second half is empty (1 %).
_ROWS = (64, 64)  # a block of rows
_HOPPER = {"COLS": 256, "DEEP": 64, "STAGES": 3, "GROUP": 16}


def tile(width: int, elements: int) -> tuple[int, int]:
    """(rows, columns) of a tile of `elements` that covers `width` columns with little beyond them.

    A block of columns costs its columns, those past the end too, and about 32 more for its address and its masks:
    2880 columns are 3 blocks of 1024, 768 are 3 of 256.

    >>> tile(2880, 4096), tile(768, 4096), tile(100, 4096)
    ((4, 1024), (16, 256), (32, 128))
    """
    columns = min(_COLUMNS, key=lambda size: _blocks(width, size) * (size + 32))
    return max(1, elements // columns), columns


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _power(size: int) -> int:
    """The least power of two that is not below `size`."""
    return 1 << (size - 1).bit_length()


def slot_blocks(n_rows: int) -> int:
    """Blocks that `sort_routes` cuts its slots into: rows of its scratch."""
    return _blocks(n_rows, _SLOTS)


def count_width(n_experts: int) -> int:
    """Columns of the scratch of `sort_routes`: one an expert, one for no route, up to a multiple of 8."""
    return 8 * _blocks(n_experts + 1, 8)


@lru_cache(maxsize=1024)
def sort_routes(n_rows: int, n_experts: int) -> tuple[Launch, Launch, Launch]:
    """count_routes, scan_counts and place_routes; without rows only the second has anything to do."""
    blocks, width = slot_blocks(n_rows), count_width(n_experts)
    shared = {"E": n_experts, "WIDTH": width, "BINS": _power(width), "BLOCK": _SLOTS}
    scan = {"E": n_experts, "WIDTH": width, "ROWS": 512, "COLS": 8}
    return (
        Launch(kernel="permute.count_routes", programs=blocks, constants=shared),
        Launch(kernel="permute.scan_counts", programs=width // 8, constants=scan, num_warps=8),
        Launch(kernel="permute.place_routes", programs=blocks, constants={**shared, "CHUNK": 32}),
    )


@lru_cache(maxsize=1024)
def gather_rows(n_rows: int, k: int, width: int) -> Launch:
    """n_rows rows of `width` columns from tokens of k slots."""
    rows, columns = tile(width, _GATHERED)
    programs = _blocks(n_rows, rows) * _blocks(width, columns)
    constants = {"K": k, "D": width, "ROWS": rows, "COLS": columns}
    return Launch(kernel="permute.gather_rows", programs=programs, constants=constants)


@lru_cache(maxsize=1024)
def sum_slots(n_tokens: int, k: int, width: int, biased: bool, weight_bias: bool, weight_rows: bool) -> Launch:
    """n_tokens sums of k rows of `width` columns."""
    rows, columns = tile(width, _SUMMED)
    constants = {
        "K": k,
        "D": width,
        "BIASED": biased,
        "WEIGHT_BIAS": weight_bias,
        "WEIGHT_ROWS": weight_rows,
        "UNROLL": k <= 16,
        "ROWS": rows,
        "COLS": columns,
    }
    programs = _blocks(n_tokens, rows) * _blocks(width, columns)
    return Launch(kernel="permute.sum_slots", programs=programs, constants=constants)


@lru_cache(maxsize=1024)
def activate_rows(n_rows: int, inter_dim: int, activation: Activation, n_experts: int | None, weighted: bool) -> Launch:
    """n_rows rows of `inter_dim` outputs; n_experts biases, None for no bias."""
    rows, columns = tile(inter_dim, _ACTIVATED)
    return Launch(
        kernel="activate.activate_rows",
        programs=_blocks(n_rows, rows) * _blocks(inter_dim, columns),
        constants=_formula(inter_dim, activation, n_experts, weighted) | {"ROWS": rows, "COLS": columns},
    )


@lru_cache(maxsize=1024)
def activate_rows_backward(
    n_rows: int, inter_dim: int, activation: Activation, n_experts: int | None, weighted: bool
) -> Launch:
    """The derivative of `activate_rows`."""
    rows, columns = tile(inter_dim, _DIFFERENTIATED)
    return Launch(
        kernel="activate.activate_rows_backward",
        programs=_blocks(n_rows, rows),
        constants=_formula(inter_dim, activation, n_experts, weighted) | {"ROWS": rows, "COLS": columns, "STAGES": 2},
    )


def _formula(inter_dim: int, activation: Activation, n_experts: int | None, weighted: bool) -> dict[str, Any]:
    return {
        "E": n_experts or 0,
        "I": inter_dim,
        "CURVE": activation.curve,
        "GATED": activation.gated,
        "INTERLEAVED": activation.interleaved,
        "ALPHA": activation.alpha,
        "LIMIT": activation.limit,
        "UP_OFFSET": activation.up_offset,
        "BIASED": n_experts is not None,
        "WEIGHTED": weighted,
    }


def parts(n_rows: int, n_experts: int) -> int:
    """Parts that the rows of all experts can need, however they are spread: rows of the scratch of `sum_rows`."""
    return n_rows // _PART + min(n_rows, n_experts)


@lru_cache(maxsize=1024)
def sum_rows(n_rows: int, n_experts: int, width: int, weighted: bool) -> tuple[Launch, Launch]:
    """sum_parts and join_parts."""
    rows, columns = tile(width, _REDUCED)
    shared = {"E": n_experts, "F": width, "BINS": max(16, _power(n_experts)), "LENGTH": _PART}
    first = {**shared, "WEIGHTED": weighted, "ROWS": rows, "COLS": columns, "STAGES": 3}
    return (
        Launch(
            kernel="bias.sum_parts",
            programs=parts(n_rows, n_experts) * _blocks(width, columns),
            constants=first,
        ),
        Launch(
            kernel="bias.join_parts",
            programs=n_experts * _blocks(width, 64),
            constants={**shared, "ROWS": 16, "COLS": 64},
        ),
    )


@lru_cache(maxsize=1024)
def dot_rows(n_rows: int, n_experts: int, width: int) -> Launch:
    """n_rows dot products of `width` columns."""
    rows, columns = tile(width, _REDUCED)
    return Launch(
        kernel="bias.dot_rows",
        programs=_blocks(n_rows, rows),
        constants={"E": n_experts, "F": width, "ROWS": rows, "COLS": columns, "STAGES": 2},
    )


def against(problem: Problem) -> str | None:
    """Why the grouped products do not serve, in words; None where they do."""
    own = "moebius' grouped products"
    if problem.dtype not in ("bfloat16", "float16"):
        return f"{own} take bfloat16 and float16, not {problem.dtype}"
    if problem.dim % 8 or problem.inter_dim % 8:
        return f"{own} take widths that are multiples of 8, not {problem.dim} and {problem.inter_dim}"
    if problem.device not in ("cuda", "meta"):  # what is on the meta device may come to any
        return f"{own} compute on CUDA, not on {problem.device}"
    if problem.capability is not None and problem.capability[0] != 9:
        return f"{own} are for CUDA compute capability 9.0, not {'.'.join(map(str, problem.capability))}"
    return None


def tiles(n_rows: int, n_experts: int) -> int:
    """Tiles that n_rows can need, however they are spread: rows of the table of `list_tiles`, less one."""
    return n_rows // _TILE + min(n_rows, n_experts)


@lru_cache(maxsize=1024)
def list_tiles(n_experts: int) -> Launch:
    """The table that `grouped_product` reads, and where each expert's rows start."""
    constants = {"E": n_experts, "BINS": max(16, _power(n_experts)), "ROWS": _TILE, "CHUNK": 128}
    return Launch(kernel="tiles.list_tiles", programs=n_experts, constants=constants)


@lru_cache(maxsize=1024)
def grouped_product(processors: int, width_in: int, width_out: int, transposed: bool) -> Launch:
    """Rows of width_in times matrices [e, width_in, width_out], or [e, width_out, width_in] where `transposed`.

    Args:
        processors: of the device; one program each.
    """
    constants = {"D": width_in, "F": width_out, "TRANSPOSED": transposed, **_HOPPER}
    return _specialised("matmul_hopper.product", processors, constants, _ROWS, _weight_block(transposed))


@lru_cache(maxsize=1024)
def grouped_weight_gradient(processors: int, n_experts: int, width_in: int, width_out: int) -> Launch:
    """One [width_in, width_out] an expert."""
    constants = {"E": n_experts, "D": width_in, "F": width_out, **_HOPPER}
    dout_block = (_HOPPER["DEEP"], _HOPPER["COLS"])
    return _specialised("matmul_hopper.weight_gradient", processors, constants, _ROWS, dout_block)


def fuses(activation: Activation) -> bool:
    """Whether `activated_product` and `differentiated_product` compute this activation."""
    return not activation.interleaved


@lru_cache(maxsize=1024)
def activated_product(
    processors: int, dim: int, inter_dim: int, activation: Activation, biased: bool, weighted: bool
) -> Launch:
    """Rows of `dim` times matrices [e, dim, U], and their activation."""
    constants = {"D": dim, **_fused(inter_dim, activation, biased), "WEIGHTED": weighted, **_HOPPER}
    return _specialised("fused_hopper.activated_product", processors, constants, _ROWS, _weight_block(False))


@lru_cache(maxsize=1024)
def differentiated_product(processors: int, dim: int, inter_dim: int, activation: Activation, biased: bool) -> Launch:
    """Rows of `dim` times matrices [e, inter_dim, dim] transposed, and what the activation's derivative makes of it."""
    constants = {
        "D": dim,
        **_fused(inter_dim, activation, biased),
        **_HOPPER,
        "UNROLL": _unroll(dim, activation, biased),
    }
    blocks = _ROWS, _weight_block(True), (8, _HOPPER["COLS"])
    return _specialised("fused_hopper.differentiated_product", processors, constants, *blocks)


def dots(inter_dim: int) -> int:
    """Parts of a routing weight's gradient: columns of dots of `differentiated_product`."""
    return _blocks(inter_dim, _HOPPER["COLS"])


def _fused(inter_dim: int, activation: Activation, biased: bool) -> dict[str, Any]:
    left_out = "E", "INTERLEAVED", "WEIGHTED"
    formula = _formula(inter_dim, activation, 0 if biased else None, False)
    return {name: value for name, value in formula.items() if name not in left_out}


def _unroll(dim: int, activation: Activation, biased: bool) -> int:
    """Panels that the derivative computes at once: many where the product is short and waits for it (7 %), as far as
    registers go; else few, which disturb the product less (7 %)."""
    if dim >= 4096:
        return 1
    return 2 if biased or activation.limit is not None else 4


def _weight_block(transposed: bool) -> tuple[int, ...]:
    half, deep = _HOPPER["COLS"] // 2, _HOPPER["DEEP"]
    return (1, half, deep) if transposed else (1, deep, half)


def _specialised(kernel: str, processors: int, constants: dict[str, Any], *blocks: tuple[int, ...]) -> Launch:
    # Three warpgroups of 168 registers a thread are the whole file of a multiprocessor.
    return Launch(kernel=kernel, programs=processors, constants=constants, registers=168, blocks=blocks)


@lru_cache(maxsize=1024)
def scatter_rows(n_tokens: int, k: int, width: int) -> Launch:
    """n_tokens rows of `width` columns to their k rows each."""
    rows, columns = tile(width, _GATHERED)
    programs = _blocks(n_tokens, rows) * _blocks(width, columns)
    constants = {"K": k, "D": width, "UNROLL": k <= 16, "ROWS": rows, "COLS": columns}
    return Launch(kernel="permute.scatter_rows", programs=programs, constants=constants)


@lru_cache(maxsize=1024)
def sum_dots(n_slots: int, n_parts: int) -> Launch:
    """n_slots sums of n_parts numbers."""
    constants = {"PARTS": n_parts, "BLOCK": 128}
    return Launch(kernel="permute.sum_dots", programs=_blocks(n_slots, 128), constants=constants)
