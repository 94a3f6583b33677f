"""Which tiles the grouped products consist of: what a program of them reads instead of searching the group sizes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def list_tiles(
    group_sizes_e: tl.tensor,
    tiles_Q4: tl.tensor,
    starts_e: tl.tensor,
    E: tl.constexpr,
    BINS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """tiles[0, 0] = how many tiles; tiles[1 + q] = (expert, first row, row past its expert's last, -) of tile q.

    A tile is up to ROWS rows of one expert; an empty expert has none. starts[e] is expert e's first row, starts[E] the
    row past the last. A program an expert.
    """
    expert = tl.program_id(0)
    bins = tl.arange(0, BINS)
    sizes = tl.load(group_sizes_e + bins, mask=bins < E, other=0)
    counts = (sizes + ROWS - 1) // ROWS
    start = tl.sum(tl.where(bins < expert, sizes, 0), axis=0)
    end = start + tl.sum(tl.where(bins == expert, sizes, 0), axis=0)
    first = tl.sum(tl.where(bins < expert, counts, 0), axis=0)
    count = tl.sum(tl.where(bins == expert, counts, 0), axis=0)
    tl.store(starts_e + expert, start)
    if expert == E - 1:
        tl.store(starts_e + E, end)
        tl.store(tiles_Q4, first + count)
    for done in range(0, count, CHUNK):
        own = done + tl.arange(0, CHUNK)
        entries = tiles_Q4 + 4 * (1 + first + own)
        tl.store(entries, expert, mask=own < count)
        tl.store(entries + 1, start + own * ROWS, mask=own < count)
        tl.store(entries + 2, end, mask=own < count)
