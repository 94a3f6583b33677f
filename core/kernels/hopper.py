"""What the kernels for Hopper share: who copies, who multiplies, and how they wait for one another.

A program has four tasks. One warp has the tensor memory accelerator copy blocks of both operands to a ring in shared
memory. Two warpgroups multiply them, 64 rows by COLS columns of a 128 x COLS tile each; only so do their sums fit
into registers. Two more warps take the finished halves, rounded, from shared memory and write them out, or compute with
them first, while the next tile is multiplied. They wait for each other at barriers in shared memory.

Every program has its share of all tiles and goes from one to the next without a pause, since the copies run ahead.
Tiles are so ordered that those computed at one time share rows and columns in the second-level cache.

Written in Gluon, Triton's explicit layer, for compute capability 9.0 alone.
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

# As Triton 3.6 calls them, and as it does later.
fetch = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_buffer: Any = gl.shared_memory_descriptor
view = getattr(_buffer, "reinterpret", None) or _buffer._reinterpret


@gluon.jit
def make_ring(
    dtype: gl.constexpr, COLS: gl.constexpr, DEEP: gl.constexpr, STAGES: gl.constexpr, TRANSPOSED: gl.constexpr
) -> gl.tuple:
    """Blocks of both operands, and barriers: one is full when its bytes are there, empty when both halves read it."""
    flat: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    rows_bufs = gl.allocate_shared_memory(dtype, [STAGES * 2, 64, DEEP], flat)
    if TRANSPOSED:
        weight_bufs = gl.allocate_shared_memory(dtype, [STAGES, COLS, DEEP], flat)
    else:
        weight_bufs = gl.allocate_shared_memory(dtype, [STAGES, DEEP, COLS], flat)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for at in gl.static_range(STAGES):
        mbarrier.init(full.index(at), count=1)
        mbarrier.init(empty.index(at), count=2)
    return rows_bufs, weight_bufs, full, empty


@gluon.jit
def make_halves(dtype: gl.constexpr, COLS: gl.constexpr) -> gl.tuple:
    """The finished halves of a tile, and barriers: one is done when it is there, and free when it was read."""
    flat: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    bufs = gl.allocate_shared_memory(dtype, [2, 64, COLS], flat)
    done = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for at in gl.static_range(2):
        mbarrier.init(done.index(at), count=1)
        mbarrier.init(free.index(at), count=1)
    return bufs, done, free


@gluon.jit
def copy_blocks(copied: gl.tuple, shape: gl.constexpr) -> None:
    """The copying warp of a product: the blocks of every tile of this program, one after the other, into the ring.

    The weight's block comes in two halves, which need not be neighbours: BETWEEN columns from one to the other, STRIDE
    from a tile's first half to the next tile's.
    """
    rows_desc, weight_desc, ring, tiles_Q4 = copied
    rows_bufs, weight_bufs, full, empty = ring
    D: gl.constexpr = shape[0]
    TRANSPOSED: gl.constexpr = shape[1]
    COLS: gl.constexpr = shape[2]
    DEEP: gl.constexpr = shape[3]
    STAGES: gl.constexpr = shape[4]
    BLOCKS: gl.constexpr = shape[5]
    GROUP: gl.constexpr = shape[6]
    BETWEEN: gl.constexpr = shape[7]
    STRIDE: gl.constexpr = shape[8]
    halves: gl.constexpr = [2, 1, COLS // 2, DEEP] if TRANSPOSED else [2, 1, DEEP, COLS // 2]
    n_tiles = gl.load(tiles_Q4)
    step = 0
    for task in range(gl.program_id(0), n_tiles * BLOCKS, gl.num_programs(0)):
        tile, block = place(task, n_tiles, BLOCKS, GROUP)
        expert = gl.load(tiles_Q4 + 4 + 4 * tile)
        row = gl.load(tiles_Q4 + 5 + 4 * tile)
        col = block * STRIDE
        for deep in range(0, D, DEEP):
            at = step % STAGES
            mbarrier.wait(empty.index(at), ((step // STAGES) & 1) ^ 1)
            ready = full.index(at)
            mbarrier.expect(ready, rows_desc.block_type.nbytes * 2 + weight_desc.block_type.nbytes * 2)
            fetch(rows_desc, [row, deep], ready, rows_bufs.index(2 * at))
            fetch(rows_desc, [row + 64, deep], ready, rows_bufs.index(2 * at + 1))
            weight = view(weight_bufs.index(at), weight_desc.dtype, halves, weight_desc.layout)
            if TRANSPOSED:
                fetch(weight_desc, [expert, col, deep], ready, weight.index(0))
                fetch(weight_desc, [expert, col + BETWEEN, deep], ready, weight.index(1))
            else:
                fetch(weight_desc, [expert, deep, col], ready, weight.index(0))
                fetch(weight_desc, [expert, deep, col + BETWEEN], ready, weight.index(1))
            step += 1


@gluon.jit
def multiply_blocks(given: gl.tuple, HALF: gl.constexpr, shape: gl.constexpr) -> None:
    """A multiplying warpgroup of a product: HALF of each tile, 64 of its rows, rounded to the operands' dtype."""
    ring, finished, tiles_Q4 = given
    rows_bufs, weight_bufs, full, empty = ring
    bufs, done, free = finished
    D: gl.constexpr = shape[0]
    TRANSPOSED: gl.constexpr = shape[1]
    COLS: gl.constexpr = shape[2]
    DEEP: gl.constexpr = shape[3]
    STAGES: gl.constexpr = shape[4]
    BLOCKS: gl.constexpr = shape[5]
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLS, 16])
    step = 0
    turn = 0
    for _ in range(gl.program_id(0), gl.load(tiles_Q4) * BLOCKS, gl.num_programs(0)):
        total = gl.zeros([64, COLS], gl.float32, layout)
        for deep in range(0, D, DEEP):
            at = step % STAGES
            mbarrier.wait(full.index(at), (step // STAGES) & 1)
            weight = weight_bufs.index(at)
            if TRANSPOSED:
                weight = weight.permute((1, 0))
            total = warpgroup_mma(rows_bufs.index(2 * at + HALF), weight, total, use_acc=deep > 0, is_async=True)
            # The step before is done, and its block free.
            total = warpgroup_mma_wait(1, deps=(total,))
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=deep > 0)
            step += 1
        total = warpgroup_mma_wait(0, deps=(total,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
        hand_over(total, bufs, done, free, HALF, turn)
        turn += 1


@gluon.jit
def hand_over(
    total: gl.tensor,
    bufs: gl.shared_memory_descriptor,
    done: gl.shared_memory_descriptor,
    free: gl.shared_memory_descriptor,
    HALF: gl.constexpr,
    turn: gl.tensor,
) -> None:
    """Round a finished half into shared memory, once the one before was read there."""
    mbarrier.wait(free.index(HALF), (turn & 1) ^ 1)
    bufs.index(HALF).store(total.to(bufs.dtype))
    mbarrier.arrive(done.index(HALF), count=1)


@gluon.jit
def write_half(
    buf: gl.shared_memory_descriptor,
    out: gl.tensor,
    row: gl.tensor,
    end: gl.tensor,
    col: gl.tensor,
    F: gl.constexpr,
    COLS: gl.constexpr,
) -> None:
    """A half's 64 rows to the rows [row, end) of a matrix of F columns, from column `col` on; by two warps."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [2, 1], [1, 0])
    own = gl.arange(0, 16, gl.SliceLayout(1, layout))
    wide = gl.arange(0, COLS, gl.SliceLayout(0, layout))
    places = own[:, None] * F + wide[None, :]
    for part in gl.static_range(0, 64, 16):
        first = row + part
        mask = (own < end - first)[:, None] & (wide < F - col)[None, :]
        gl.store(out + (first.to(gl.int64) * F + col) + places, buf.slice(part, 16, dim=0).load(layout), mask=mask)


@gluon.jit
def place(task: gl.tensor, down: gl.tensor, ACROSS: gl.constexpr, GROUP: gl.constexpr) -> gl.tuple:
    """(which tile down, which across) of a task: column after column of GROUP tiles, then the next GROUP."""
    group = task // (GROUP * ACROSS)
    high = gl.minimum(down - group * GROUP, GROUP)
    rest = task % (GROUP * ACROSS)
    return group * GROUP + rest % high, rest // high
