"""Units of a finished half on Hopper: what a writing warp takes from shared memory at once, and what it makes of it."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moebius.core.kernels.hopper import view


@gluon.jit
def units(
    bufs: gl.shared_memory_descriptor, COUNT: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr
) -> gl.shared_memory_descriptor:
    """Blocks as units of ROWS x COLS: a block lies in panels of 64 columns, one after the other.

    A unit of more columns than 64 spans panels that follow each other: of a block of ROWS rows.
    """
    flat: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return view(bufs, bufs.dtype, [COUNT, ROWS, COLS], flat)


@gluon.jit
def biased(
    value: gl.tensor,
    bias_eU: gl.tensor,
    expert: gl.tensor,
    col: gl.tensor,
    wide: gl.tensor,
    I: gl.constexpr,
    U: gl.constexpr,
    BIASED: gl.constexpr,
) -> gl.tensor:
    """A unit plus its expert's bias, of which columns below I are there, rounded."""
    if BIASED:
        bias = gl.load(bias_eU + (expert.to(gl.int64) * U + col) + wide, mask=wide < I - col, other=0.0)
        value = (value.to(gl.float32) + bias.to(gl.float32)[None, :]).to(value.dtype)
    return value


@gluon.jit
def split_pairs(value: gl.tensor, layout: gl.constexpr) -> gl.tuple:
    """Every other column, and those between: [ROWS, COLS / 2] each, in a layout of whole pairs a thread."""
    ROWS: gl.constexpr = value.shape[0]
    COLS: gl.constexpr = value.shape[1]
    first, second = gl.split(gl.reshape(value, [ROWS, COLS // 2, 2]))
    return gl.convert_layout(first, layout), gl.convert_layout(second, layout)


@gluon.jit
def join_pairs(first: gl.tensor, second: gl.tensor, layout: gl.constexpr) -> gl.tensor:
    """The reverse of `split_pairs`."""
    ROWS: gl.constexpr = first.shape[0]
    COLS: gl.constexpr = first.shape[1]
    return gl.convert_layout(gl.reshape(gl.join(first, second), [ROWS, 2 * COLS]), layout)
