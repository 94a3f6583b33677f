"""Routes sorted by expert, tokens to rows and rows back to tokens."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["N"])
def mask_routes(
    ids_N: tl.tensor,
    token_mask_T: tl.tensor,
    N: tl.tensor,
    routed_N: tl.tensor,
    K: tl.constexpr,
    E: tl.constexpr,
    NO_ROUTE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """routed = ids in int32, NO_ROUTE for those of a masked token and those outside [0, E)."""
    slots = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = slots < N
    ids = tl.load(ids_N + slots, mask=inside, other=-1)
    valid = tl.load(token_mask_T + slots // K, mask=inside, other=0) != 0
    # Compared before it is narrowed, so that an id beyond 2^31 cannot wrap into range.
    here = (ids >= 0) & (ids < E) & valid
    tl.store(routed_N + slots, tl.where(here, ids, NO_ROUTE).to(tl.int32), mask=inside)


# A stable counting sort in three kernels: count per block of slots, scan over the blocks, place. Integers alone, and
# every position has one writer: no atomics, one result. Source: the classical radix pass; Cormen et al., 8.2.


@triton.jit(do_not_specialize=["R"])
def count_routes(
    ids_R: tl.tensor,
    R: tl.tensor,
    counts_BN: tl.tensor,
    E: tl.constexpr,
    WIDTH: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """counts[b, n] = slots of block b with id n; n = E counts no route (and the last block's missing slots)."""
    block = tl.program_id(0)
    slots = block * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(ids_R + slots, mask=slots < R, other=E)
    bins = tl.arange(0, BINS)
    tl.store(counts_BN + block * WIDTH + bins, tl.histogram(ids, BINS), mask=bins < WIDTH)


@triton.jit(do_not_specialize=["B"])
def scan_counts(
    counts_BN: tl.tensor,
    B: tl.tensor,
    before_BN: tl.tensor,
    group_sizes_e: tl.tensor,
    E: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    """before[b, n] = sum of counts[:b, n]; group_sizes = the whole sums."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros([COLS], tl.int32)
    first = tl.zeros([], tl.int32)
    while first < B:
        rows = first + tl.arange(0, ROWS)
        inside = (rows < B)[:, None] & (cols < WIDTH)[None, :]
        places = rows[:, None] * WIDTH + cols[None, :]
        counts = tl.load(counts_BN + places, mask=inside, other=0)
        tl.store(before_BN + places, tl.cumsum(counts, axis=0) - counts + total[None, :], mask=inside)
        total += tl.sum(counts, axis=0)
        first += ROWS
    tl.store(group_sizes_e + cols, total, mask=cols < E)


@triton.jit(do_not_specialize=["R"])
def place_routes(
    ids_R: tl.tensor,
    weights_R: tl.tensor,
    before_BN: tl.tensor,
    group_sizes_e: tl.tensor,
    R: tl.tensor,
    slot_of_row_R: tl.tensor,
    row_of_slot_R: tl.tensor,
    row_experts_R: tl.tensor,
    row_weights_R: tl.tensor,
    E: tl.constexpr,
    WIDTH: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """row of a slot = first row of its expert + equal ids in earlier blocks + equal ids earlier in this block."""
    block = tl.program_id(0)
    here = tl.arange(0, BLOCK)
    slots = block * BLOCK + here
    inside = slots < R
    ids = tl.load(ids_R + slots, mask=inside, other=E)
    weights = tl.load(weights_R + slots, mask=inside, other=0.0)
    bins = tl.arange(0, BINS)
    sizes = tl.load(group_sizes_e + bins, mask=bins < E, other=0)
    before = tl.load(before_BN + block * WIDTH + ids, mask=inside, other=0)
    rows = _rows(ids_R, R, block * BLOCK, ids, tl.cumsum(sizes, axis=0) - sizes, BLOCK, CHUNK) + before
    _write_order(slots, inside, ids, weights, rows, slot_of_row_R, row_of_slot_R, row_experts_R, row_weights_R, E)


@triton.jit(do_not_specialize=["R"])
def sort_few_routes(
    ids_R: tl.tensor,
    weights_R: tl.tensor,
    R: tl.tensor,
    slot_of_row_R: tl.tensor,
    row_of_slot_R: tl.tensor,
    group_sizes_e: tl.tensor,
    row_experts_R: tl.tensor,
    row_weights_R: tl.tensor,
    E: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """What the three kernels above do, of one block of slots: one program."""
    slots = tl.arange(0, BLOCK)
    inside = slots < R
    ids = tl.load(ids_R + slots, mask=inside, other=E)
    weights = tl.load(weights_R + slots, mask=inside, other=0.0)
    bins = tl.arange(0, BINS)
    sizes = tl.histogram(ids, BINS)
    tl.store(group_sizes_e + bins, sizes, mask=bins < E)
    rows = _rows(ids_R, R, 0, ids, tl.cumsum(sizes, axis=0) - sizes, BLOCK, CHUNK)
    _write_order(slots, inside, ids, weights, rows, slot_of_row_R, row_of_slot_R, row_experts_R, row_weights_R, E)


@triton.jit
def _rows(
    ids_R: tl.tensor,
    R: tl.tensor,
    first_slot: tl.tensor,
    ids: tl.tensor,
    starts: tl.tensor,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
) -> tl.tensor:
    """First row of a slot's expert + equal ids earlier in its block."""
    here = tl.arange(0, BLOCK)
    rows = tl.gather(starts, ids, axis=0)
    for first in tl.static_range(0, BLOCK, CHUNK):  # unrolled, so that all loads are under way at once
        others = first + tl.arange(0, CHUNK)
        other_ids = tl.load(ids_R + first_slot + others, mask=first_slot + others < R, other=-1)
        # Summed over the first axis: there each thread has all of a slot's comparisons to itself.
        earlier = (other_ids[:, None] == ids[None, :]) & (others[:, None] < here[None, :])
        rows += tl.sum(earlier.to(tl.int32), axis=0)
    return rows


@triton.jit
def _write_order(
    slots: tl.tensor,
    inside: tl.tensor,
    ids: tl.tensor,
    weights: tl.tensor,
    rows: tl.tensor,
    slot_of_row_R: tl.tensor,
    row_of_slot_R: tl.tensor,
    row_experts_R: tl.tensor,
    row_weights_R: tl.tensor,
    E: tl.constexpr,
) -> None:
    routed = ids < E
    tl.store(row_of_slot_R + slots, tl.where(routed, rows, -1), mask=inside)
    tl.store(slot_of_row_R + rows, slots, mask=inside)
    tl.store(row_experts_R + rows, ids, mask=inside)
    tl.store(row_weights_R + rows, tl.where(routed, weights, 0.0), mask=inside)


@triton.jit(do_not_specialize=["R"])
def gather_rows(
    x_SD: tl.tensor,
    slot_of_row_R: tl.tensor,
    R: tl.tensor,
    rows_RD: tl.tensor,
    K: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    """rows[r] = x[slot_of_row[r] // K], a tile of ROWS x COLS a program; neighbours share rows, not columns."""
    blocks: tl.constexpr = (D + COLS - 1) // COLS
    rows = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(0) % blocks * COLS + tl.arange(0, COLS)
    tokens = tl.load(slot_of_row_R + rows, mask=rows < R, other=0) // K
    inside = (rows < R)[:, None] & (cols < D)[None, :]
    values = tl.load(x_SD + tokens.to(tl.int64)[:, None] * D + cols[None, :], mask=inside)
    # Read soon by nobody else in this kernel: the cache is for x, which is read K times.
    tl.store(
        rows_RD + rows.to(tl.int64)[:, None] * D + cols[None, :], values, mask=inside, eviction_policy="evict_first"
    )


@triton.jit(do_not_specialize=["S"])
def scatter_rows(
    x_SD: tl.tensor,
    row_of_slot_SK: tl.tensor,
    S: tl.tensor,
    rows_RD: tl.tensor,
    K: tl.constexpr,
    D: tl.constexpr,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    """rows[row_of_slot[s, k]] = x[s], a tile of ROWS x COLS of x a program: x is read once, where `gather_rows` asks K
    times for it, which the caches do not hold. Rows without a slot are not written; -1 is no row."""
    blocks: tl.constexpr = (D + COLS - 1) // COLS
    tokens = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(0) % blocks * COLS + tl.arange(0, COLS)
    there = tokens < S
    inside = there[:, None] & (cols < D)[None, :]
    values = tl.load(x_SD + tokens.to(tl.int64)[:, None] * D + cols[None, :], mask=inside)
    if UNROLL:
        for k in tl.static_range(K):
            rows = tl.load(row_of_slot_SK + tokens * K + k, mask=there, other=-1)
            places = rows_RD + rows.to(tl.int64)[:, None] * D + cols[None, :]
            tl.store(places, values, mask=inside & (rows >= 0)[:, None])
    else:
        for k in range(K):
            rows = tl.load(row_of_slot_SK + tokens * K + k, mask=there, other=-1)
            places = rows_RD + rows.to(tl.int64)[:, None] * D + cols[None, :]
            tl.store(places, values, mask=inside & (rows >= 0)[:, None])


@triton.jit(do_not_specialize=["N"])
def sum_dots(
    dots_RB: tl.tensor,
    row_of_slot_N: tl.tensor,
    N: tl.tensor,
    sums_N: tl.tensor,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """sums[n] = the sum of row_of_slot[n]'s dots in their order; 0 for a slot without a row."""
    slots = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.load(row_of_slot_N + slots, mask=slots < N, other=-1)
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(PARTS):
        total += tl.load(dots_RB + rows.to(tl.int64) * PARTS + part, mask=rows >= 0, other=0.0)
    tl.store(sums_N + slots, total, mask=slots < N)


@triton.jit(do_not_specialize=["S"])
def sum_slots(
    rows_RD: tl.tensor,
    row_of_slot_SK: tl.tensor,
    bias_eD: tl.tensor,
    row_experts_R: tl.tensor,
    row_weights_R: tl.tensor,
    S: tl.tensor,
    y_SD: tl.tensor,
    K: tl.constexpr,
    D: tl.constexpr,
    BIASED: tl.constexpr,
    WEIGHT_BIAS: tl.constexpr,
    WEIGHT_ROWS: tl.constexpr,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    """y[s] = sum of s's rows in the order of k, in float32, rounded once; -1 in row_of_slot is no row."""
    blocks: tl.constexpr = (D + COLS - 1) // COLS
    tokens = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(0) % blocks * COLS + tl.arange(0, COLS)
    total = tl.zeros([ROWS, COLS], tl.float32)
    if UNROLL:  # all K loads in flight at once
        for k in tl.static_range(K):
            rows = tl.load(row_of_slot_SK + tokens * K + k, mask=tokens < S, other=-1)
            total += _slot(
                *(rows_RD, bias_eD, row_experts_R, row_weights_R, rows, cols, D, BIASED, WEIGHT_BIAS, WEIGHT_ROWS)
            )
    else:
        for k in range(K):
            rows = tl.load(row_of_slot_SK + tokens * K + k, mask=tokens < S, other=-1)
            total += _slot(
                *(rows_RD, bias_eD, row_experts_R, row_weights_R, rows, cols, D, BIASED, WEIGHT_BIAS, WEIGHT_ROWS)
            )
    inside = (tokens < S)[:, None] & (cols < D)[None, :]
    places = tokens.to(tl.int64)[:, None] * D + cols[None, :]
    tl.store(y_SD + places, total.to(y_SD.dtype.element_ty), mask=inside)


@triton.jit
def _slot(
    rows_RD: tl.tensor,
    bias_eD: tl.tensor,
    row_experts_R: tl.tensor,
    row_weights_R: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    D: tl.constexpr,
    BIASED: tl.constexpr,
    WEIGHT_BIAS: tl.constexpr,
    WEIGHT_ROWS: tl.constexpr,
) -> tl.tensor:
    """Each token's row of one slot in float32, with its bias and weight; zero where it has none."""
    there = rows >= 0
    inside = there[:, None] & (cols < D)[None, :]
    values = tl.load(rows_RD + rows.to(tl.int64)[:, None] * D + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    if WEIGHT_BIAS or WEIGHT_ROWS:
        weights = tl.load(row_weights_R + rows, mask=there, other=0.0)
    if BIASED:
        experts = tl.load(row_experts_R + rows, mask=there, other=0)
        places = experts.to(tl.int64)[:, None] * D + cols[None, :]
        bias = tl.load(bias_eD + places, mask=inside, other=0.0).to(tl.float32)
        if WEIGHT_BIAS:
            bias = bias * weights[:, None]
        values = (values + bias).to(rows_RD.dtype.element_ty).to(tl.float32)
    if WEIGHT_ROWS:
        values = values * weights[:, None]
    return values
