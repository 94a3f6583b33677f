"""Sums over the rows of each expert, and over the columns of each row: the gradients of a bias and of its weight."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sum_parts(
    values_RF: tl.tensor,
    group_sizes_e: tl.tensor,
    row_weights_R: tl.tensor,
    parts_PG: tl.tensor,
    E: tl.constexpr,
    F: tl.constexpr,
    BINS: tl.constexpr,
    LENGTH: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Each expert's rows are cut into parts of LENGTH; parts[p] = the weighted sum of part p in float64.

    Which rows part p has, the group sizes on the device say: nothing comes from the host, and an expert that has all
    the rows has all the programs. Float64 because the sum is then exact but for one rounding, whatever its order.
    """
    blocks: tl.constexpr = (F + COLS - 1) // COLS
    part = tl.program_id(0) // blocks
    cols = tl.program_id(0) % blocks * COLS + tl.arange(0, COLS)
    bins = tl.arange(0, BINS)
    sizes = tl.load(group_sizes_e + bins, mask=bins < E, other=0)
    parts = (sizes + LENGTH - 1) // LENGTH
    before = tl.cumsum(parts, axis=0) <= part  # the experts whose parts all come earlier
    if part < tl.sum(parts, axis=0):
        first_row = tl.sum(tl.where(before, sizes, 0), axis=0)
        # The part's own expert is the first that is not before, for it has a part: hence a size above zero.
        own = tl.sum(before.to(tl.int32), axis=0)
        start = first_row + (part - tl.sum(tl.where(before, parts, 0), axis=0)) * LENGTH
        end = first_row + tl.sum(tl.where(bins == own, sizes, 0), axis=0)
        total = tl.zeros([ROWS, COLS], tl.float64)
        for first in tl.range(0, LENGTH, ROWS, num_stages=STAGES):
            rows = start + first + tl.arange(0, ROWS)
            inside = (rows < end)[:, None] & (cols < F)[None, :]
            places = rows.to(tl.int64)[:, None] * F + cols[None, :]
            values = tl.load(values_RF + places, mask=inside, other=0.0).to(tl.float32)
            if WEIGHTED:
                values = values * tl.load(row_weights_R + rows, mask=rows < end, other=0.0)[:, None]
            total += values.to(tl.float64)
        tl.store(_wide(parts_PG) + part.to(tl.int64) * F + cols, tl.sum(total, axis=0), mask=cols < F)


@triton.jit
def join_parts(
    parts_PG: tl.tensor,
    group_sizes_e: tl.tensor,
    sums_eF: tl.tensor,
    E: tl.constexpr,
    F: tl.constexpr,
    BINS: tl.constexpr,
    LENGTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    """sums[e] = the parts of expert e, summed in float64 and rounded once; zero for an empty expert."""
    blocks: tl.constexpr = (F + COLS - 1) // COLS
    expert = tl.program_id(0) // blocks
    cols = tl.program_id(0) % blocks * COLS + tl.arange(0, COLS)
    bins = tl.arange(0, BINS)
    parts = (tl.load(group_sizes_e + bins, mask=bins < E, other=0) + LENGTH - 1) // LENGTH
    first = tl.sum(tl.where(bins < expert, parts, 0), axis=0)
    end = first + tl.sum(tl.where(bins == expert, parts, 0), axis=0)
    total = tl.zeros([ROWS, COLS], tl.float64)
    while first < end:
        rows = first + tl.arange(0, ROWS)
        inside = (rows < end)[:, None] & (cols < F)[None, :]
        total += tl.load(_wide(parts_PG) + rows.to(tl.int64)[:, None] * F + cols[None, :], mask=inside, other=0.0)
        first += ROWS
    sums = _rounded(tl.sum(total, axis=0), sums_eF.dtype.element_ty)
    tl.store(sums_eF + expert.to(tl.int64) * F + cols, sums, mask=cols < F)


@triton.jit(do_not_specialize=["R"])
def dot_rows(
    values_RF: tl.tensor,
    bias_eF: tl.tensor,
    row_experts_R: tl.tensor,
    R: tl.tensor,
    dots_R: tl.tensor,
    E: tl.constexpr,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """dots[r] = sum of values[r] * bias[expert of r] in float32; 0 for a row without expert, which is not read."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    experts = tl.load(row_experts_R + rows, mask=rows < R, other=E)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for first in tl.range(0, F, COLS, num_stages=STAGES):
        cols = first + tl.arange(0, COLS)
        inside = (experts < E)[:, None] & (cols < F)[None, :]
        values = tl.load(values_RF + rows.to(tl.int64)[:, None] * F + cols[None, :], mask=inside, other=0.0)
        bias = tl.load(bias_eF + experts.to(tl.int64)[:, None] * F + cols[None, :], mask=inside, other=0.0)
        total += values.to(tl.float32) * bias.to(tl.float32)
    tl.store(dots_R + rows, tl.sum(total, axis=1), mask=rows < R)


@triton.jit
def _wide(pairs: tl.tensor) -> tl.tensor:
    """Memory for pairs of int32 as memory for float64, which JAX has only where it is switched on."""
    return pairs.to(tl.pointer_type(tl.float64), bitcast=True)


@triton.jit
def _rounded(value: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """float64 to `dtype` in one rounding.

    By way of float32 with a rounding to odd, after which a second rounding to 11 bits or fewer is as good as one.
    Source: Boldo and Melquiond, When double rounding is odd, 2004.
    """
    near = value.to(tl.float32)
    if dtype == tl.float32:
        return near
    else:
        missed = value - near.to(tl.float64)
        bits = near.to(tl.int32, bitcast=True)
        inexact = (missed > 0) | (missed < 0)  # not NaN, not inf
        outward = tl.where(tl.abs(value) > tl.abs(near.to(tl.float64)), 1, -1)
        odd = bits + tl.where(inexact & ((bits & 1) == 0), outward, 0)
        return odd.to(tl.float32, bitcast=True).to(dtype)
