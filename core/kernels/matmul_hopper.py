"""The grouped products on Hopper: copies and products by different warps, which wait for each other at barriers.

In each program one warp has the tensor memory accelerator copy blocks of both operands to a ring in shared memory, and
two warpgroups multiply them: 64 rows by 256 columns of a 128 x 256 tile each. Every program has its share of all tiles
and goes from one to the next without a pause, since the copies run ahead into the next tile. Tiles are so ordered that
those computed at one time share rows and columns in the second-level cache.

A product's sums run over the contracted axis in blocks of 64, in order, whatever the tile: the bits are those of any
other kernel that adds as wgmma does. Widths are multiples of 8, which the accelerator's strides demand; what a block
has beyond a width is filled with zeros there, in both operands. Beyond an expert's rows lie those of the next one: a
product does not store them, a weight gradient overwrites both operands with zeros.

Written in Gluon, Triton's explicit layer, for compute capability 9.0 alone.
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

# As Triton 3.6 calls them, and as it does later.
_fetch = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_put = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit(do_not_specialize=["R"])
def product(
    rows_RD: gl.tensor,
    weight: gl.tensor,
    tiles_Q4: gl.tensor,
    R: gl.tensor,
    out_RF: gl.tensor,
    E: gl.constexpr,
    D: gl.constexpr,
    F: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    COLS: gl.constexpr,
    DEEP: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
) -> None:
    """out = rows @ weight[expert of the row], for the tiles that `tiles.list_tiles` lists; others are not written.

    weight is [E, D, F], or where TRANSPOSED [E, F, D]. A tile is 128 x COLS, a copied block DEEP deep.
    """
    dtype: gl.constexpr = rows_RD.dtype.element_ty
    BLOCKS: gl.constexpr = (F + COLS - 1) // COLS
    flat: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    stacked: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    block: gl.constexpr = [1, COLS, DEEP] if TRANSPOSED else [1, DEEP, COLS]
    rows_desc = tma.make_tensor_descriptor(rows_RD, [R, D], [D, 1], [64, DEEP], flat)
    if TRANSPOSED:
        weight_desc = tma.make_tensor_descriptor(weight, [E, F, D], [F * D, D, 1], block, stacked)
    else:
        weight_desc = tma.make_tensor_descriptor(weight, [E, D, F], [D * F, F, 1], block, stacked)
    out_desc = tma.make_tensor_descriptor(out_RF, [R, F], [F, 1], [64, COLS], flat)
    rows_bufs = gl.allocate_shared_memory(dtype, [STAGES * 2, 64, DEEP], flat)
    weight_bufs = gl.allocate_shared_memory(dtype, [STAGES] + block, stacked)  # noqa: RUF005  Triton has no *
    out_bufs = gl.allocate_shared_memory(dtype, [2, 64, COLS], flat)
    full, empty = _barriers(STAGES)
    shape: gl.constexpr = (D, F, TRANSPOSED, COLS, DEEP, STAGES, BLOCKS, GROUP)
    given = (out_desc, out_RF, rows_bufs, weight_bufs, out_bufs, full, empty, tiles_Q4)
    copied = (rows_desc, weight_desc, rows_bufs, weight_bufs, full, empty, tiles_Q4)
    gl.warp_specialize(
        [(_multiply, (given, 0, shape)), (_multiply, (given, 1, shape)), (_copy, (copied, shape))], [4, 1], [240, 24]
    )


@gluon.jit
def _copy(copied: gl.tuple, shape: gl.constexpr) -> None:
    """One warp: the blocks of every tile of this program, one after the other, into the ring."""
    rows_desc, weight_desc, rows_bufs, weight_bufs, full, empty, tiles_Q4 = copied
    D: gl.constexpr = shape[0]
    TRANSPOSED: gl.constexpr = shape[2]
    COLS: gl.constexpr = shape[3]
    DEEP: gl.constexpr = shape[4]
    STAGES: gl.constexpr = shape[5]
    BLOCKS: gl.constexpr = shape[6]
    GROUP: gl.constexpr = shape[7]
    n_tiles = gl.load(tiles_Q4)
    step = 0
    for task in range(gl.program_id(0), n_tiles * BLOCKS, gl.num_programs(0)):
        tile, block = _place(task, n_tiles, BLOCKS, GROUP)
        expert = gl.load(tiles_Q4 + 4 + 4 * tile)
        row = gl.load(tiles_Q4 + 5 + 4 * tile)
        for deep in range(0, D, DEEP):
            at = step % STAGES
            mbarrier.wait(empty.index(at), ((step // STAGES) & 1) ^ 1)
            ready = full.index(at)
            mbarrier.expect(ready, rows_desc.block_type.nbytes * 2 + weight_desc.block_type.nbytes)
            _fetch(rows_desc, [row, deep], ready, rows_bufs.index(2 * at))
            _fetch(rows_desc, [row + 64, deep], ready, rows_bufs.index(2 * at + 1))
            if TRANSPOSED:
                place = [expert, block * COLS, deep]
            else:
                place = [expert, deep, block * COLS]
            _fetch(weight_desc, place, ready, weight_bufs.index(at))
            step += 1


@gluon.jit
def _multiply(given: gl.tuple, HALF: gl.constexpr, shape: gl.constexpr) -> None:
    """One warpgroup: HALF of each tile, 64 of its rows."""
    out_desc, out_RF, rows_bufs, weight_bufs, out_bufs, full, empty, tiles_Q4 = given
    D: gl.constexpr = shape[0]
    F: gl.constexpr = shape[1]
    TRANSPOSED: gl.constexpr = shape[2]
    COLS: gl.constexpr = shape[3]
    DEEP: gl.constexpr = shape[4]
    STAGES: gl.constexpr = shape[5]
    BLOCKS: gl.constexpr = shape[6]
    GROUP: gl.constexpr = shape[7]
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLS, 16])
    out_buf = out_bufs.index(HALF)
    n_tiles = gl.load(tiles_Q4)
    step = 0
    for task in range(gl.program_id(0), n_tiles * BLOCKS, gl.num_programs(0)):
        tile, block = _place(task, n_tiles, BLOCKS, GROUP)
        row = gl.load(tiles_Q4 + 5 + 4 * tile) + 64 * HALF
        end = gl.load(tiles_Q4 + 6 + 4 * tile)
        total = gl.zeros([64, COLS], gl.float32, layout)
        for deep in range(0, D, DEEP):
            at = step % STAGES
            mbarrier.wait(full.index(at), (step // STAGES) & 1)
            if TRANSPOSED:
                weight = weight_bufs.index(at).reshape([COLS, DEEP]).permute((1, 0))
            else:
                weight = weight_bufs.index(at).reshape([DEEP, COLS])
            rows = rows_bufs.index(2 * at + HALF)
            total = warpgroup_mma(rows, weight, total, use_acc=deep > 0, is_async=True)
            # The step before is done, and its block free.
            total = warpgroup_mma_wait(1, deps=(total,))
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=deep > 0)
            step += 1
        total = warpgroup_mma_wait(0, deps=(total,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
        if row + 64 <= end:
            tma.store_wait(0)  # of the tile before: the buffer is free
            out_buf.store(total.to(out_desc.dtype))
            fence_async_shared()
            _put(out_desc, [row, block * COLS], out_buf)
        elif row < end:
            own = row + gl.arange(0, 64, gl.SliceLayout(1, layout))
            cols = block * COLS + gl.arange(0, COLS, gl.SliceLayout(0, layout))
            places = own.to(gl.int64)[:, None] * F + cols[None, :]
            gl.store(out_RF + places, total.to(out_desc.dtype), mask=(own < end)[:, None] & (cols < F)[None, :])
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["R"])
def weight_gradient(
    rows_RD: gl.tensor,
    dout_RF: gl.tensor,
    starts_e: gl.tensor,
    R: gl.tensor,
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

    A tile is 128 x COLS, a copied block has DEEP rows.
    """
    dtype: gl.constexpr = rows_RD.dtype.element_ty
    flat: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    stacked: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    rows_desc = tma.make_tensor_descriptor(rows_RD, [R, D], [D, 1], [DEEP, 64], flat)
    dout_desc = tma.make_tensor_descriptor(dout_RF, [R, F], [F, 1], [DEEP, COLS], flat)
    out_desc = tma.make_tensor_descriptor(dweight_eDF, [E, D, F], [D * F, F, 1], [1, 64, COLS], stacked)
    rows_bufs = gl.allocate_shared_memory(dtype, [STAGES * 2, DEEP, 64], flat)
    dout_bufs = gl.allocate_shared_memory(dtype, [STAGES, DEEP, COLS], flat)
    out_bufs = gl.allocate_shared_memory(dtype, [2, 1, 64, COLS], stacked)
    full, empty = _barriers(STAGES)
    shape: gl.constexpr = (E, D, F, COLS, DEEP, STAGES, GROUP)
    given = (out_desc, rows_bufs, dout_bufs, out_bufs, full, empty, starts_e)
    copied = (rows_desc, dout_desc, rows_bufs, dout_bufs, full, empty, starts_e)
    gl.warp_specialize(
        [(_multiply_rows, (given, 0, shape)), (_multiply_rows, (given, 1, shape)), (_copy_rows, (copied, shape))],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def _copy_rows(copied: gl.tuple, shape: gl.constexpr) -> None:
    """One warp: see `_copy`."""
    rows_desc, dout_desc, rows_bufs, dout_bufs, full, empty, starts_e = copied
    E: gl.constexpr = shape[0]
    D: gl.constexpr = shape[1]
    F: gl.constexpr = shape[2]
    COLS: gl.constexpr = shape[3]
    DEEP: gl.constexpr = shape[4]
    STAGES: gl.constexpr = shape[5]
    GROUP: gl.constexpr = shape[6]
    DOWN: gl.constexpr = (D + 127) // 128
    ACROSS: gl.constexpr = (F + COLS - 1) // COLS
    step = 0
    for task in range(gl.program_id(0), E * DOWN * ACROSS, gl.num_programs(0)):
        expert = task // (DOWN * ACROSS)
        down, across = _place(task % (DOWN * ACROSS), DOWN, ACROSS, GROUP)
        end = gl.load(starts_e + expert + 1)
        for row in range(gl.load(starts_e + expert), end, DEEP):
            at = step % STAGES
            mbarrier.wait(empty.index(at), ((step // STAGES) & 1) ^ 1)
            ready = full.index(at)
            mbarrier.expect(ready, rows_desc.block_type.nbytes * 2 + dout_desc.block_type.nbytes)
            _fetch(rows_desc, [row, down * 128], ready, rows_bufs.index(2 * at))
            _fetch(rows_desc, [row, down * 128 + 64], ready, rows_bufs.index(2 * at + 1))
            _fetch(dout_desc, [row, across * COLS], ready, dout_bufs.index(at))
            step += 1


@gluon.jit
def _multiply_rows(given: gl.tuple, HALF: gl.constexpr, shape: gl.constexpr) -> None:
    """One warpgroup: HALF of each tile, 64 rows of dweight."""
    out_desc, rows_bufs, dout_bufs, out_bufs, full, empty, starts_e = given
    E: gl.constexpr = shape[0]
    D: gl.constexpr = shape[1]
    F: gl.constexpr = shape[2]
    COLS: gl.constexpr = shape[3]
    DEEP: gl.constexpr = shape[4]
    STAGES: gl.constexpr = shape[5]
    GROUP: gl.constexpr = shape[6]
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLS, 16])
    DOWN: gl.constexpr = (D + 127) // 128
    ACROSS: gl.constexpr = (F + COLS - 1) // COLS
    out_buf = out_bufs.index(HALF)
    step = 0
    for task in range(gl.program_id(0), E * DOWN * ACROSS, gl.num_programs(0)):
        expert = task // (DOWN * ACROSS)
        down, across = _place(task % (DOWN * ACROSS), DOWN, ACROSS, GROUP)
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
            _blank(rows_bufs.index(2 * at + HALF), end - whole, DEEP, 64)
            _blank(dout_bufs.index(at), end - whole, DEEP, COLS)
            fence_async_shared()
            rows = rows_bufs.index(2 * at + HALF).permute((1, 0))
            total = warpgroup_mma(rows, dout_bufs.index(at), total, use_acc=whole > first, is_async=True)
            total = warpgroup_mma_wait(0, deps=(total,))
            mbarrier.arrive(empty.index(at), count=1)
            step += 1
        out = total.to(out_desc.dtype)
        tma.store_wait(0)
        out_buf.reshape([64, COLS]).store(out)
        fence_async_shared()
        _put(out_desc, [expert, down * 128 + 64 * HALF, across * COLS], out_buf)
    tma.store_wait(0)


@gluon.jit
def _blank(buf: gl.shared_memory_descriptor, valid: gl.tensor, ROWS: gl.constexpr, COLS: gl.constexpr) -> None:
    """Zeros into the rows [valid, ROWS) of a block in shared memory."""
    ACROSS: gl.constexpr = COLS // 8 if COLS < 256 else 32
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // ACROSS, ACROSS], [4, 1], [1, 0])
    own = gl.arange(0, 8, gl.SliceLayout(1, layout))
    for first in gl.static_range(0, ROWS, 8):
        if first + 8 > valid:
            part = buf.slice(first, 8, dim=0)
            kept = part.load(layout)
            part.store(gl.where((first + own < valid)[:, None], kept, gl.zeros_like(kept)))


@gluon.jit
def _barriers(STAGES: gl.constexpr) -> gl.tuple:
    """A block is full when its bytes are there, and empty when both warpgroups have read it."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for at in gl.static_range(STAGES):
        mbarrier.init(full.index(at), count=1)
        mbarrier.init(empty.index(at), count=2)
    return full, empty


@gluon.jit
def _place(task: gl.tensor, down: gl.tensor, ACROSS: gl.constexpr, GROUP: gl.constexpr) -> gl.tuple:
    """(which tile down, which across) of a task: column after column of GROUP tiles, then the next GROUP."""
    group = task // (GROUP * ACROSS)
    high = gl.minimum(down - group * GROUP, GROUP)
    rest = task % (GROUP * ACROSS)
    return group * GROUP + rest % high, rest // high
