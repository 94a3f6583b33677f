"""The grouped products in Triton's own terms, for every NVIDIA GPU that Triton serves: `tl.dot`, pointers and masks.

Any widths; float32, bfloat16 and float16; sums in float32. A program makes one tile. The grid has a program for each
tile that there could be, however the rows are spread; those past the tiles that there are leave at once. Nothing
depends on the number of rows but the size of the grid.

What a block has beyond a width, or beyond an expert's rows, is read as zero in both operands: behind the last column
of a row lies the next row, behind an expert's last row another's, and zero times NaN is NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(
    rows_RD: tl.tensor,
    weight: tl.tensor,
    tiles_Q4: tl.tensor,
    out_RF: tl.tensor,
    D: tl.constexpr,
    F: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEEP: tl.constexpr,
    STAGES: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """out = rows @ weight[expert of the row], for the tiles that `tiles.list_tiles` lists; others are not written.

    weight is [E, D, F], or where TRANSPOSED [E, F, D]. A tile is ROWS x COLS, summed in blocks DEEP deep; ROWS is that
    of the list. PRECISION is `tl.dot`'s, of float32.
    """
    BLOCKS: tl.constexpr = (F + COLS - 1) // COLS
    # From one place of a matrix to the next, along its axes D and F. int64 before they are multiplied by a place: one
    # matrix may have more than 2^31 elements.
    NEXT_D: tl.constexpr = 1 if TRANSPOSED else F
    NEXT_F: tl.constexpr = D if TRANSPOSED else 1
    n_tiles = tl.load(tiles_Q4)
    if tl.program_id(0) < n_tiles * BLOCKS:
        tile, block = _place(tl.program_id(0), n_tiles, BLOCKS, GROUP)
        expert = tl.load(tiles_Q4 + 4 + 4 * tile).to(tl.int64)
        own = tl.load(tiles_Q4 + 5 + 4 * tile) + tl.arange(0, ROWS)
        inside = own < tl.load(tiles_Q4 + 6 + 4 * tile)
        cols = block * COLS + tl.arange(0, COLS)
        inner = tl.arange(0, DEEP)
        rows_at = rows_RD + own.to(tl.int64)[:, None] * D + inner[None, :]
        matrix = weight + expert * D * F
        weight_at = matrix + inner[:, None] * NEXT_D + cols.to(tl.int64)[None, :] * NEXT_F
        total = tl.zeros([ROWS, COLS], tl.float32)
        for deep in tl.range(0, D, DEEP, num_stages=STAGES):
            there = _below(inner, D - deep, D % DEEP == 0)
            rows = tl.load(rows_at, mask=inside[:, None] & there[None, :], other=0.0)
            mask = there[:, None] & _below(cols, F, F % COLS == 0)[None, :]
            total = tl.dot(rows, tl.load(weight_at, mask=mask, other=0.0), total, input_precision=PRECISION)
            rows_at += DEEP
            weight_at += DEEP * NEXT_D
        places = own.to(tl.int64)[:, None] * F + cols[None, :]
        tl.store(out_RF + places, total.to(out_RF.dtype.element_ty), mask=inside[:, None] & (cols < F)[None, :])


@triton.jit
def weight_gradient(
    rows_RD: tl.tensor,
    dout_RF: tl.tensor,
    starts_e: tl.tensor,
    dweight_eDF: tl.tensor,
    D: tl.constexpr,
    F: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEEP: tl.constexpr,
    STAGES: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """dweight[e] = rows^T @ dout over the rows [starts[e], starts[e + 1]); zeros for an empty expert.

    A tile is ROWS x COLS of one matrix, summed over DEEP rows at a time.
    """
    DOWN: tl.constexpr = (D + ROWS - 1) // ROWS
    ACROSS: tl.constexpr = (F + COLS - 1) // COLS
    expert = tl.program_id(0) // (DOWN * ACROSS)
    tile, block = _place(tl.program_id(0) % (DOWN * ACROSS), DOWN, ACROSS, GROUP)
    down = tile * ROWS + tl.arange(0, ROWS)
    cols = block * COLS + tl.arange(0, COLS)
    inner = tl.arange(0, DEEP)
    first = tl.load(starts_e + expert)
    end = tl.load(starts_e + expert + 1)
    rows_at = rows_RD + first.to(tl.int64) * D + inner[None, :] * D + down[:, None]
    dout_at = dout_RF + first.to(tl.int64) * F + inner[:, None] * F + cols[None, :]
    total = tl.zeros([ROWS, COLS], tl.float32)
    for row in tl.range(first, end, DEEP, num_stages=STAGES):
        there = inner < end - row
        rows = tl.load(rows_at, mask=_below(down, D, D % ROWS == 0)[:, None] & there[None, :], other=0.0)
        mask = there[:, None] & _below(cols, F, F % COLS == 0)[None, :]
        total = tl.dot(rows, tl.load(dout_at, mask=mask, other=0.0), total, input_precision=PRECISION)
        rows_at += DEEP * D
        dout_at += DEEP * F
    matrix = dweight_eDF + expert.to(tl.int64) * D * F
    places = down.to(tl.int64)[:, None] * F + cols[None, :]
    tl.store(matrix + places, total.to(dweight_eDF.dtype.element_ty), mask=(down < D)[:, None] & (cols < F)[None, :])


@triton.jit
def _below(index: tl.tensor, size: tl.tensor, ALWAYS: tl.constexpr) -> tl.tensor:
    """index < size; where it is known beforehand to be, nothing that is computed."""
    return tl.full(index.shape, True, tl.int1) if ALWAYS else index < size


@triton.jit
def _place(task: tl.tensor, down: tl.tensor, ACROSS: tl.constexpr, GROUP: tl.constexpr) -> tuple:
    """(which tile down, which across) of a task: column after column of GROUP tiles, then the next GROUP."""
    group = task // (GROUP * ACROSS)
    high = tl.minimum(down - group * GROUP, GROUP)
    rest = task % (GROUP * ACROSS)
    return group * GROUP + rest % high, rest // high
