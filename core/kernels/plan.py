"""Launches as data: which kernel, how many programs, what shapes its code. Whoever can launch Triton can play one."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import count
from typing import Any

from moebius.core.activations import Activation

_CODES: dict[tuple[Any, ...], int] = {}
_NUMBERS = count()


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
        code: a number in this process, the same for launches whose code differs in nothing but the arguments' dtypes.
    """

    kernel: str
    programs: int
    constants: dict[str, Any]
    num_warps: int = 4
    registers: int | None = None
    blocks: tuple[tuple[int, ...], ...] = ()
    code: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        code = (self.kernel, tuple(sorted(self.constants.items())), self.num_warps, self.registers, self.blocks)
        object.__setattr__(self, "code", _CODES.setdefault(code, next(_NUMBERS)))

    def __reduce__(self) -> Any:  # a code is a number of one process
        fields = {name: getattr(self, name) for name in self.__slots__ if name != "code"}
        return partial(Launch, **fields), ()

    def __hash__(self) -> int:
        return hash((self.code, self.programs))

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


def tile(width: int, elements: int) -> tuple[int, int]:
    """(rows, columns) of a tile of `elements` that covers `width` columns with little beyond them.

    A block of columns costs its columns, those past the end too, and about 32 more for its address and its masks:
    2880 columns are 3 blocks of 1024, 768 are 3 of 256.

    >>> tile(2880, 4096), tile(768, 4096), tile(100, 4096)
    ((4, 1024), (16, 256), (32, 128))
    """
    columns = min(_COLUMNS, key=lambda size: blocks(width, size) * (size + 32))
    return max(1, elements // columns), columns


def blocks(size: int, block: int) -> int:
    """How many blocks cover a size."""
    return -(-size // block)


def _power(size: int) -> int:
    """The least power of two that is not below `size`."""
    return 1 << (size - 1).bit_length()


@lru_cache(maxsize=1024)
def mask_routes(n_slots: int, k: int, n_experts: int, no_route: int) -> Launch:
    """n_slots ids, k a token."""
    constants = {"K": k, "E": n_experts, "NO_ROUTE": no_route, "BLOCK": 512}
    return Launch(kernel="permute.mask_routes", programs=blocks(n_slots, 512), constants=constants)


def slot_blocks(n_rows: int) -> int:
    """Blocks that `sort_routes` cuts its slots into: rows of its scratch."""
    return blocks(n_rows, _SLOTS)


def count_width(n_experts: int) -> int:
    """Columns of the scratch of `sort_routes`: one an expert, one for no route, up to a multiple of 8."""
    return 8 * blocks(n_experts + 1, 8)


@lru_cache(maxsize=1024)
def sort_routes(n_rows: int, n_experts: int) -> tuple[Launch, Launch, Launch]:
    """count_routes, scan_counts and place_routes; without rows only the second has anything to do."""
    blocked, width = slot_blocks(n_rows), count_width(n_experts)
    shared = {"E": n_experts, "WIDTH": width, "BINS": _power(width), "BLOCK": _SLOTS}
    scan = {"E": n_experts, "WIDTH": width, "ROWS": 512, "COLS": 8}
    return (
        Launch(kernel="permute.count_routes", programs=blocked, constants=shared),
        Launch(kernel="permute.scan_counts", programs=width // 8, constants=scan, num_warps=8),
        Launch(kernel="permute.place_routes", programs=blocked, constants={**shared, "CHUNK": 32}),
    )


FEW = 256  # routes that one program sorts


@lru_cache(maxsize=1024)
def sort_few_routes(n_experts: int) -> Launch:
    """What `sort_routes` does of up to FEW rows."""
    constants = {"E": n_experts, "BINS": _power(n_experts + 1), "BLOCK": FEW, "CHUNK": 32}
    return Launch(kernel="permute.sort_few_routes", programs=1, constants=constants, num_warps=8)


@lru_cache(maxsize=1024)
def gather_rows(n_rows: int, k: int, width: int) -> Launch:
    """n_rows rows of `width` columns from tokens of k slots."""
    rows, columns = tile(width, _GATHERED)
    programs = blocks(n_rows, rows) * blocks(width, columns)
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
    programs = blocks(n_tokens, rows) * blocks(width, columns)
    return Launch(kernel="permute.sum_slots", programs=programs, constants=constants)


@lru_cache(maxsize=1024)
def activate_rows(n_rows: int, inter_dim: int, activation: Activation, n_experts: int | None, weighted: bool) -> Launch:
    """n_rows rows of `inter_dim` outputs; n_experts biases, None for no bias."""
    rows, columns = tile(inter_dim, _ACTIVATED)
    return Launch(
        kernel="activate.activate_rows",
        programs=blocks(n_rows, rows) * blocks(inter_dim, columns),
        constants=formula(inter_dim, activation, n_experts, weighted) | {"ROWS": rows, "COLS": columns},
    )


@lru_cache(maxsize=1024)
def activate_rows_backward(
    n_rows: int, inter_dim: int, activation: Activation, n_experts: int | None, weighted: bool
) -> Launch:
    """The derivative of `activate_rows`."""
    rows, columns = tile(inter_dim, _DIFFERENTIATED)
    return Launch(
        kernel="activate.activate_rows_backward",
        programs=blocks(n_rows, rows),
        constants=formula(inter_dim, activation, n_experts, weighted) | {"ROWS": rows, "COLS": columns, "STAGES": 2},
    )


def formula(inter_dim: int, activation: Activation, n_experts: int | None, weighted: bool) -> dict[str, Any]:
    """What a kernel is told of an activation."""
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
            programs=parts(n_rows, n_experts) * blocks(width, columns),
            constants=first,
        ),
        Launch(
            kernel="bias.join_parts",
            programs=n_experts * blocks(width, 64),
            constants={**shared, "ROWS": 16, "COLS": 64},
        ),
    )


@lru_cache(maxsize=1024)
def dot_rows(n_rows: int, n_experts: int, width: int) -> Launch:
    """n_rows dot products of `width` columns."""
    rows, columns = tile(width, _REDUCED)
    return Launch(
        kernel="bias.dot_rows",
        programs=blocks(n_rows, rows),
        constants={"E": n_experts, "F": width, "ROWS": rows, "COLS": columns, "STAGES": 2},
    )


@lru_cache(maxsize=1024)
def scatter_rows(n_tokens: int, k: int, width: int) -> Launch:
    """n_tokens rows of `width` columns to their k rows each."""
    rows, columns = tile(width, _GATHERED)
    programs = blocks(n_tokens, rows) * blocks(width, columns)
    constants = {"K": k, "D": width, "UNROLL": k <= 16, "ROWS": rows, "COLS": columns}
    return Launch(kernel="permute.scatter_rows", programs=programs, constants=constants)


@lru_cache(maxsize=1024)
def sum_dots(n_slots: int, n_parts: int) -> Launch:
    """n_slots sums of n_parts numbers."""
    constants = {"PARTS": n_parts, "BLOCK": 128}
    return Launch(kernel="permute.sum_dots", programs=blocks(n_slots, 128), constants=constants)
