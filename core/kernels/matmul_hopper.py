"""The grouped products on Hopper; see hopper.py for who does what.

A product's sums run over the contracted axis in blocks of 64, in order, whatever the tile: the bits are those of any
other kernel that adds as wgmma does. Widths are multiples of 8, which the accelerator's strides demand; what a block
has beyond a width is filled with zeros there, in both operands. Beyond an expert's rows lie those of the next one: a
product does not store them, a weight gradient overwrites both operands with zeros.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moebius.core.kernels.hopper import (
    copy_blocks,
    fetch,
    hand_over,
    make_halves,
    make_ring,
    multiply_blocks,
    place,
    write_half,
)


@gluon.jit
def product(
    rows_desc: tma.tensor_descriptor,
    weight_desc: tma.tensor_descriptor,
    tiles_Q4: gl.tensor,
    out_RF: gl.tensor,
    D: gl.constexpr,
    F: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    COLS: gl.constexpr,
    DEEP: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
) -> None:
    """out = rows @ weight[expert of the row], for the tiles that `tiles.list_tiles` lists; others are not written.

    rows are [R, D] by blocks of [64, DEEP]; weight is [E, D, F] by blocks of [1, DEEP, COLS / 2], or where TRANSPOSED
    [E, F, D] by [1, COLS / 2, DEEP]. A tile is 128 x COLS.
    """
    BLOCKS: gl.constexpr = (F + COLS - 1) // COLS
    shape: gl.constexpr = (D, TRANSPOSED, COLS, DEEP, STAGES, BLOCKS, GROUP, COLS // 2, COLS)
    ring = make_ring(rows_desc.dtype, COLS, DEEP, STAGES, TRANSPOSED)
    finished = make_halves(rows_desc.dtype, COLS)
    given = (ring, finished, tiles_Q4)
    gl.warp_specialize(
        [
            (multiply_blocks, (given, 0, shape)),
            (multiply_blocks, (given, 1, shape)),
            (_write, ((finished, tiles_Q4, out_RF), F, shape)),
            (copy_blocks, ((rows_desc, weight_desc, ring, tiles_Q4), shape)),
        ],
        [4, 2, 1],
        [192, 120, 120],
    )


@gluon.jit
def _write(written: gl.tuple, F: gl.constexpr, shape: gl.constexpr) -> None:
    """Two warps: the halves of every tile to memory."""
    finished, tiles_Q4, out_RF = written
    bufs, done, free = finished
    COLS: gl.constexpr = shape[2]
    BLOCKS: gl.constexpr = shape[5]
    GROUP: gl.constexpr = shape[6]
    n_tiles = gl.load(tiles_Q4)
    turn = 0
    for task in range(gl.program_id(0), n_tiles * BLOCKS, gl.num_programs(0)):
        tile, block = place(task, n_tiles, BLOCKS, GROUP)
        row = gl.load(tiles_Q4 + 5 + 4 * tile)
        end = gl.load(tiles_Q4 + 6 + 4 * tile)
        for HALF in gl.static_range(2):
            mbarrier.wait(done.index(HALF), turn & 1)
            write_half(bufs.index(HALF), out_RF, row + 64 * HALF, end, block * COLS, F, COLS)
            mbarrier.arrive(free.index(HALF), count=1)
        turn += 1


@gluon.jit
def weight_gradient(
    rows_desc: tma.tensor_descriptor,
    dout_desc: tma.tensor_descriptor,
    starts_e: gl.tensor,
    dweight_eDF: gl.tensor,
    E: gl.constexpr,
    D: gl.constexpr,
    F: gl.constexpr,
    COLS: gl.constexpr,
    DEEP: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
) -> None:
    """dweight[e] = rows^T @ dout over the rows [starts[e], starts[e + 1]); zeros for an empty expert.

    rows are [R, D] by blocks of [DEEP, 64], dout is [R, F] by [DEEP, COLS]. A tile is 128 x COLS. DEEP is 64.
    """
    ring = make_ring(rows_desc.dtype, COLS, DEEP, STAGES, False)
    finished = make_halves(rows_desc.dtype, COLS)
    shape: gl.constexpr = (E, D, F, COLS, DEEP, STAGES, GROUP)
    given = (ring, finished, starts_e)
    gl.warp_specialize(
        [
            (_multiply_rows, (given, 0, shape)),
            (_multiply_rows, (given, 1, shape)),
            (_write_gradient, ((finished, dweight_eDF), shape)),
            (_copy_rows, ((rows_desc, dout_desc, ring, starts_e), shape)),
        ],
        [4, 2, 1],
        [192, 120, 120],
    )


@gluon.jit
def _copy_rows(copied: gl.tuple, shape: gl.constexpr) -> None:
    """One warp: see hopper.copy_blocks."""
    rows_desc, dout_desc, ring, starts_e = copied
    rows_bufs, dout_bufs, full, empty = ring
    COLS: gl.constexpr = shape[3]
    DEEP: gl.constexpr = shape[4]
    STAGES: gl.constexpr = shape[5]
    step = 0
    for task in range(gl.program_id(0), _tasks(shape), gl.num_programs(0)):
        expert, down, across = _task(task, shape)
        end = gl.load(starts_e + expert + 1)
        for row in range(gl.load(starts_e + expert), end, DEEP):
            at = step % STAGES
            mbarrier.wait(empty.index(at), ((step // STAGES) & 1) ^ 1)
            ready = full.index(at)
            mbarrier.expect(ready, rows_desc.block_type.nbytes * 2 + dout_desc.block_type.nbytes)
            fetch(rows_desc, [row, down * 128], ready, rows_bufs.index(2 * at))
            fetch(rows_desc, [row, down * 128 + 64], ready, rows_bufs.index(2 * at + 1))
            fetch(dout_desc, [row, across * COLS], ready, dout_bufs.index(at))
            step += 1


@gluon.jit
def _multiply_rows(given: gl.tuple, HALF: gl.constexpr, shape: gl.constexpr) -> None:
    """One warpgroup: HALF of each tile, 64 rows of dweight."""
    ring, finished, starts_e = given
    rows_bufs, dout_bufs, full, empty = ring
    bufs, done, free = finished
    COLS: gl.constexpr = shape[3]
    DEEP: gl.constexpr = shape[4]
    STAGES: gl.constexpr = shape[5]
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLS, 16])
    step = 0
    turn = 0
    for task in range(gl.program_id(0), _tasks(shape), gl.num_programs(0)):
        expert, _, _ = _task(task, shape)
        first = gl.load(starts_e + expert)
        end = gl.load(starts_e + expert + 1)
        whole = first + (end - first) // DEEP * DEEP
        total = gl.zeros([64, COLS], gl.float32, layout)
        for row in range(first, whole, DEEP):
            at = step % STAGES
            mbarrier.wait(full.index(at), (step // STAGES) & 1)
            rows = rows_bufs.index(2 * at + HALF).permute((1, 0))
            total = warpgroup_mma(rows, dout_bufs.index(at), total, use_acc=row > first, is_async=True)
            total = warpgroup_mma_wait(1, deps=(total,))
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=row > first)
            step += 1
        total = warpgroup_mma_wait(0, deps=(total,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=whole > first)
        if whole < end:
            at = step % STAGES
            mbarrier.wait(full.index(at), (step // STAGES) & 1)
            # Of dout both warpgroups write the same zeros; neither multiplies before its own are there.
            _blank(rows_bufs.index(2 * at + HALF), end - whole, 64)
            _blank(dout_bufs.index(at), end - whole, COLS)
            fence_async_shared()
            rows = rows_bufs.index(2 * at + HALF).permute((1, 0))
            total = warpgroup_mma(rows, dout_bufs.index(at), total, use_acc=whole > first, is_async=True)
            total = warpgroup_mma_wait(0, deps=(total,))
            mbarrier.arrive(empty.index(at), count=1)
            step += 1
        hand_over(total, bufs, done, free, HALF, turn)
        turn += 1


@gluon.jit
def _write_gradient(written: gl.tuple, shape: gl.constexpr) -> None:
    """Two warps: the halves of every tile to memory."""
    finished, dweight_eDF = written
    bufs, done, free = finished
    D: gl.constexpr = shape[1]
    F: gl.constexpr = shape[2]
    COLS: gl.constexpr = shape[3]
    turn = 0
    for task in range(gl.program_id(0), _tasks(shape), gl.num_programs(0)):
        expert, down, across = _task(task, shape)
        own_DF = dweight_eDF + expert.to(gl.int64) * (D * F)
        for HALF in gl.static_range(2):
            mbarrier.wait(done.index(HALF), turn & 1)
            write_half(bufs.index(HALF), own_DF, down * 128 + 64 * HALF, D, across * COLS, F, COLS)
            mbarrier.arrive(free.index(HALF), count=1)
        turn += 1


@gluon.jit
def _tasks(shape: gl.constexpr) -> gl.constexpr:
    """Tiles of all experts' gradients."""
    return shape[0] * ((shape[1] + 127) // 128) * ((shape[2] + shape[3] - 1) // shape[3])


@gluon.jit
def _task(task: gl.tensor, shape: gl.constexpr) -> gl.tuple:
    """(expert, which tile down, which across)."""
    DOWN: gl.constexpr = (shape[1] + 127) // 128
    ACROSS: gl.constexpr = (shape[2] + shape[3] - 1) // shape[3]
    down, across = place(task % (DOWN * ACROSS), DOWN, ACROSS, shape[6])
    return task // (DOWN * ACROSS), down, across


@gluon.jit
def _blank(buf: gl.shared_memory_descriptor, valid: gl.tensor, COLS: gl.constexpr) -> None:
    """Zeros into the rows [valid, 64) of a block in shared memory."""
    ACROSS: gl.constexpr = COLS // 8 if COLS < 256 else 32
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // ACROSS, ACROSS], [4, 1], [1, 0])
    own = gl.arange(0, 8, gl.SliceLayout(1, layout))
    for first in gl.static_range(0, 64, 8):
        if first + 8 > valid:
            part = buf.slice(first, 8, dim=0)
            kept = part.load(layout)
            part.store(gl.where((first + own < valid)[:, None], kept, gl.zeros_like(kept)))
