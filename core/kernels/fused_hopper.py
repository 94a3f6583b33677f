"""Products on Hopper whose finished halves are computed with before they are written; see hopper.py for who does what.

What the two writing warps compute starts from the half as it was rounded for memory: so every output has the bits that
the product, its bias and the kernels of activate.py have one after the other, and the pre-activation's gradient needs
no memory of its own. The pre-activation is written with its bias: the backward pass need not add it again. Only the
sums of the routing weights' gradients are added in another order.

Where gate and up are interleaved, a thread holds whole pairs, and they are split and joined in registers.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from moebius.core.kernels.activate import activated, differentiated
from moebius.core.kernels.hopper import copy_blocks, fetch, make_halves, make_ring, multiply_blocks, place
from moebius.core.kernels.units_hopper import biased, join_pairs, split_pairs, units


@gluon.jit
def activated_product(
    rows_desc: tma.tensor_descriptor,
    weight_desc: tma.tensor_descriptor,
    bias_eU: gl.tensor,
    row_weights_R: gl.tensor,
    tiles_Q4: gl.tensor,
    hidden_RU: gl.tensor,
    act_RI: gl.tensor,
    D: gl.constexpr,
    I: gl.constexpr,
    CURVE: gl.constexpr,
    GATED: gl.constexpr,
    INTERLEAVED: gl.constexpr,
    ALPHA: gl.constexpr,
    LIMIT: gl.constexpr,
    UP_OFFSET: gl.constexpr,
    BIASED: gl.constexpr,
    WEIGHTED: gl.constexpr,
    COLS: gl.constexpr,
    DEEP: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
) -> None:
    """hidden = rows @ weight[expert of the row] + bias, and act = activation(hidden) * row weight.

    rows are [R, D] by blocks of [64, DEEP], weight is [E, D, U] by [1, DEEP, COLS / 2]. A tile is 128 rows by, where
    GATED, COLS / 2 columns of the gate and the same of up, else COLS columns.
    """
    WIDE: gl.constexpr = COLS // 2 if GATED else COLS
    BLOCKS: gl.constexpr = (I + WIDE - 1) // WIDE
    APART: gl.constexpr = GATED and not INTERLEAVED  # a tile's halves are no neighbours
    BETWEEN: gl.constexpr = I if APART else COLS // 2
    STRIDE: gl.constexpr = WIDE if APART else COLS
    shape: gl.constexpr = (D, False, COLS, DEEP, STAGES, BLOCKS, GROUP, BETWEEN, STRIDE)
    formula: gl.constexpr = (CURVE, GATED, ALPHA, LIMIT, UP_OFFSET)
    ring = make_ring(rows_desc.dtype, COLS, DEEP, STAGES, False)
    finished = make_halves(rows_desc.dtype, COLS)
    given = (ring, finished, tiles_Q4)
    written = (finished, tiles_Q4, bias_eU, row_weights_R, hidden_RU, act_RI)
    gl.warp_specialize(
        [
            (multiply_blocks, (given, 0, shape)),
            (multiply_blocks, (given, 1, shape)),
            (_activate, (written, I, formula, INTERLEAVED, BIASED, WEIGHTED, shape)),
            (copy_blocks, ((rows_desc, weight_desc, ring, tiles_Q4), shape)),
        ],
        [4, 2, 1],
        [192, 120, 120],
    )


@gluon.jit
def _activate(
    written: gl.tuple,
    I: gl.constexpr,
    formula: gl.constexpr,
    INTERLEAVED: gl.constexpr,
    BIASED: gl.constexpr,
    WEIGHTED: gl.constexpr,
    shape: gl.constexpr,
) -> None:
    """Two warps: the halves of every tile as they are, and activated; 16 rows at a time."""
    finished, tiles_Q4, bias_eU, row_weights_R, hidden_RU, act_RI = written
    bufs, done, free = finished
    BLOCKS: gl.constexpr = shape[5]
    GROUP: gl.constexpr = shape[6]
    told: gl.constexpr = (I, formula, BIASED, WEIGHTED, shape[2])
    n_tiles = gl.load(tiles_Q4)
    turn = 0
    for task in range(gl.program_id(0), n_tiles * BLOCKS, gl.num_programs(0)):
        tile, block = place(task, n_tiles, BLOCKS, GROUP)
        expert = gl.load(tiles_Q4 + 4 + 4 * tile)
        row = gl.load(tiles_Q4 + 5 + 4 * tile)
        end = gl.load(tiles_Q4 + 6 + 4 * tile)
        for HALF in gl.static_range(2):
            mbarrier.wait(done.index(HALF), turn & 1)
            for part in range(4):
                first = row + (64 * HALF + 16 * part)
                here = (HALF, part, expert, first, end, block)
                if INTERLEAVED:
                    _activate_pairs(bufs, bias_eU, row_weights_R, hidden_RU, act_RI, here, told)
                else:
                    _activate_halves(bufs, bias_eU, row_weights_R, hidden_RU, act_RI, here, told)
            mbarrier.arrive(free.index(HALF), count=1)
        turn += 1


@gluon.jit
def _activate_halves(
    bufs: gl.shared_memory_descriptor,
    bias_eU: gl.tensor,
    row_weights_R: gl.tensor,
    hidden_RU: gl.tensor,
    act_RI: gl.tensor,
    here: gl.tuple,
    told: gl.constexpr,
) -> None:
    """16 rows, 64 columns at a time: of the gate from a tile's first half, of up from its second."""
    HALF, part, expert, first, end, block = here
    I: gl.constexpr = told[0]
    formula: gl.constexpr = told[1]
    BIASED: gl.constexpr = told[2]
    COLS: gl.constexpr = told[4]
    GATED: gl.constexpr = formula[1]
    U: gl.constexpr = 2 * I if GATED else I
    WIDE: gl.constexpr = COLS // 2 if GATED else COLS
    PANELS: gl.constexpr = WIDE // 64
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [2, 1], [1, 0])
    own = gl.arange(0, 16, gl.SliceLayout(1, layout))
    wide = gl.arange(0, 64, gl.SliceLayout(0, layout))
    hidden_places = own[:, None] * U + wide[None, :]
    there = own < end - first
    read = units(bufs, 2 * COLS // 16, 16, 64)
    for panel in gl.static_range(PANELS):
        col = block * WIDE + 64 * panel
        mask = there[:, None] & (wide < I - col)[None, :]
        unit = HALF * (COLS // 16) + panel * 4 + part
        hidden = hidden_RU + (first.to(gl.int64) * U + col)
        gate = biased(read.index(unit).load(layout), bias_eU, expert, col, wide, I, U, BIASED)
        gl.store(hidden + hidden_places, gate, mask=mask)
        up = gate
        if GATED:
            up = read.index(unit + PANELS * 4).load(layout)
            up = biased(up, bias_eU + I, expert, col, wide, I, U, BIASED)
            gl.store((hidden + I) + hidden_places, up, mask=mask)
        act = activated(gate.to(gl.float32), up.to(gl.float32), formula)
        if told[3]:
            act = act * gl.load(row_weights_R + first + own, mask=there, other=0.0)[:, None]
        places = act_RI + (first.to(gl.int64) * I + col) + (own[:, None] * I + wide[None, :])
        gl.store(places, act.to(bufs.dtype), mask=mask)


@gluon.jit
def _activate_pairs(
    bufs: gl.shared_memory_descriptor,
    bias_eU: gl.tensor,
    row_weights_R: gl.tensor,
    hidden_RU: gl.tensor,
    act_RI: gl.tensor,
    here: gl.tuple,
    told: gl.constexpr,
) -> None:
    """16 rows, 32 pairs of gate and up at a time."""
    HALF, part, expert, first, end, block = here
    I: gl.constexpr = told[0]
    formula: gl.constexpr = told[1]
    COLS: gl.constexpr = told[4]
    U: gl.constexpr = 2 * I
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [2, 1], [1, 0])
    single: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [2, 1], [1, 0])
    own = gl.arange(0, 16, gl.SliceLayout(1, layout))
    wide = gl.arange(0, 64, gl.SliceLayout(0, layout))
    act_own = gl.arange(0, 16, gl.SliceLayout(1, single))
    act_wide = gl.arange(0, 32, gl.SliceLayout(0, single))
    act_there = act_own < end - first
    read = units(bufs, 2 * COLS // 16, 16, 64)
    for panel in gl.static_range(COLS // 64):
        col = block * COLS + 64 * panel
        hidden = read.index(HALF * (COLS // 16) + panel * 4 + part).load(layout)
        hidden = biased(hidden, bias_eU, expert, col, wide, U, U, told[2])
        places = hidden_RU + (first.to(gl.int64) * U + col) + (own[:, None] * U + wide[None, :])
        gl.store(places, hidden, mask=(own < end - first)[:, None] & (wide < U - col)[None, :])
        gate, up = split_pairs(hidden.to(gl.float32), single)
        act = activated(gate, up, formula)
        if told[3]:
            act = act * gl.load(row_weights_R + first + act_own, mask=act_there, other=0.0)[:, None]
        places = act_RI + (first.to(gl.int64) * I + col // 2) + (act_own[:, None] * I + act_wide[None, :])
        gl.store(places, act.to(bufs.dtype), mask=act_there[:, None] & (act_wide < I - col // 2)[None, :])


@gluon.jit
def differentiated_product(
    dout_desc: tma.tensor_descriptor,
    weight_desc: tma.tensor_descriptor,
    hidden_desc: tma.tensor_descriptor,
    row_weights_R: gl.tensor,
    tiles_Q4: gl.tensor,
    dhidden_RU: gl.tensor,
    act_RI: gl.tensor,
    dots_RB: gl.tensor,
    D: gl.constexpr,
    I: gl.constexpr,
    CURVE: gl.constexpr,
    GATED: gl.constexpr,
    INTERLEAVED: gl.constexpr,
    ALPHA: gl.constexpr,
    LIMIT: gl.constexpr,
    UP_OFFSET: gl.constexpr,
    COLS: gl.constexpr,
    DEEP: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    UNROLL: gl.constexpr,
) -> None:
    """dact = dout @ weight[expert of the row]^T, and of it dhidden, the weighted activation, and dots.

    dots[r, b] is the part of the gradient of row r's weight that a block of COLS columns has. dhidden may be hidden:
    what is written was read. The boxes that are copied of hidden reach beyond an expert's rows and a half's columns,
    where other programs may be writing; what comes from there is masked. dout is [R, D] by blocks of [64, DEEP], weight
    [E, I, D] by [1, COLS / 2, DEEP], hidden [R, U] by [8, COLS]. A tile is 128 x COLS of dact.
    """
    BLOCKS: gl.constexpr = (I + COLS - 1) // COLS
    shape: gl.constexpr = (D, True, COLS, DEEP, STAGES, BLOCKS, GROUP, COLS // 2, COLS)
    formula: gl.constexpr = (CURVE, GATED, ALPHA, LIMIT, UP_OFFSET)
    dtype: gl.constexpr = dout_desc.dtype
    ring = make_ring(dtype, COLS, DEEP, STAGES, True)
    finished = make_halves(dtype, COLS)
    hidden_bufs = gl.allocate_shared_memory(dtype, [4, 8, COLS], hidden_desc.layout)
    here = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for at in gl.static_range(2):
        mbarrier.init(here.index(at), count=1)
    given = (ring, finished, tiles_Q4)
    read = (finished, tiles_Q4, hidden_desc, hidden_bufs, here, row_weights_R)
    gl.warp_specialize(
        [
            (multiply_blocks, (given, 0, shape)),
            (multiply_blocks, (given, 1, shape)),
            (_differentiate, (read, (dhidden_RU, act_RI, dots_RB), I, formula, INTERLEAVED, UNROLL, shape)),
            (copy_blocks, ((dout_desc, weight_desc, ring, tiles_Q4), shape)),
        ],
        [4, 2, 1],
        [184, 136, 136],
    )


@gluon.jit
def _differentiate(
    read: gl.tuple,
    written: gl.tuple,
    I: gl.constexpr,
    formula: gl.constexpr,
    INTERLEAVED: gl.constexpr,
    UNROLL: gl.constexpr,
    shape: gl.constexpr,
) -> None:
    """Two warps: what is made of the halves of every tile; 8 rows by 64 columns at a time.

    The accelerator fetches the pre-activation of 8 rows while those before are computed: from beyond the caches, and
    behind the copies, it takes as long as two times 8 rows do.
    """
    finished, tiles_Q4, hidden_desc, hidden_bufs, here, row_weights_R = read
    dhidden_RU, act_RI, dots_RB = written
    bufs, done, free = finished
    COLS: gl.constexpr = shape[2]
    BLOCKS: gl.constexpr = shape[5]
    GROUP: gl.constexpr = shape[6]
    GATED: gl.constexpr = formula[1]
    U: gl.constexpr = 2 * I if GATED else I
    PANELS: gl.constexpr = COLS // 64
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [2, 1], [1, 0])
    own = gl.arange(0, 8, gl.SliceLayout(1, layout))
    wide = gl.arange(0, 64, gl.SliceLayout(0, layout))
    dhidden_places = own[:, None] * U + wide[None, :]
    act_places = own[:, None] * I + wide[None, :]
    pairs: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [2, 1], [1, 0])
    pair_own = gl.arange(0, 8, gl.SliceLayout(1, pairs))
    pair_wide = gl.arange(0, 128, gl.SliceLayout(0, pairs))
    pair_places = pair_own[:, None] * U + pair_wide[None, :]
    finished_units = units(bufs, 2 * COLS // 8, 8, 64)
    hidden_units = units(hidden_bufs, 2 * PANELS if INTERLEAVED else 4 * PANELS, 8, 128 if INTERLEAVED else 64)
    n_tiles = gl.load(tiles_Q4)
    turn = 0
    used = 0
    for task in range(gl.program_id(0), n_tiles * BLOCKS, gl.num_programs(0)):
        tile, block = place(task, n_tiles, BLOCKS, GROUP)
        row = gl.load(tiles_Q4 + 5 + 4 * tile)
        end = gl.load(tiles_Q4 + 6 + 4 * tile)
        parts = gl.minimum((end - row + 7) // 8, 16)
        col = block * COLS
        _fetch_hidden(hidden_desc, hidden_bufs, here, row, col, used & 1, I, GATED, INTERLEAVED)
        if parts > 1:
            _fetch_hidden(hidden_desc, hidden_bufs, here, row + 8, col, (used + 1) & 1, I, GATED, INTERLEAVED)
        for HALF in gl.static_range(2):
            mbarrier.wait(done.index(HALF), turn & 1)
            for part in range(8 * HALF, gl.minimum(parts, 8 * HALF + 8)):
                first = row + 8 * part
                there = own < end - first
                weights = gl.load(row_weights_R + first + own, mask=there, other=0.0)[:, None]
                total = gl.zeros([8, 64], gl.float32, layout)
                at = used & 1
                mbarrier.wait(here.index(at), (used >> 1) & 1)
                for turns in range(0, PANELS, UNROLL):
                    for inner in gl.static_range(UNROLL):
                        panel = turns + inner
                        here_col = col + 64 * panel
                        unit = HALF * (COLS // 8) + panel * 8 + part % 8
                        dact = finished_units.index(unit).load(layout).to(gl.float32)
                        if INTERLEAVED:
                            both = hidden_units.index(at * PANELS + panel).load(pairs)
                            gate, up = split_pairs(both.to(gl.float32), layout)
                        else:
                            gate = hidden_units.index(at * 2 * PANELS + panel).load(layout).to(gl.float32)
                            up = gate
                            if GATED:
                                up = hidden_units.index(at * 2 * PANELS + PANELS + panel).load(layout).to(gl.float32)
                        dgate, dup, act = differentiated(dact, gate, up, weights, formula)
                        mask = there[:, None]
                        if I % COLS != 0:
                            mask = mask & (wide < I - here_col)[None, :]
                            total += gl.where(mask, dact * act, 0.0)
                        else:
                            total += dact * act
                        if INTERLEAVED:
                            both = join_pairs(dgate.to(bufs.dtype), dup.to(bufs.dtype), pairs)
                            pair_mask = (pair_own < end - first)[:, None] & (pair_wide < U - 2 * here_col)[None, :]
                            dhidden = dhidden_RU + (first.to(gl.int64) * U + 2 * here_col)
                            gl.store(dhidden + pair_places, both, mask=pair_mask)
                        else:
                            dhidden = dhidden_RU + (first.to(gl.int64) * U + here_col)
                            gl.store(dhidden + dhidden_places, dgate.to(bufs.dtype), mask=mask)
                            if GATED:
                                gl.store((dhidden + I) + dhidden_places, dup.to(bufs.dtype), mask=mask)
                        act = (act * weights).to(bufs.dtype)
                        gl.store(act_RI + (first.to(gl.int64) * I + here_col) + act_places, act, mask=mask)
                if part + 2 < parts:
                    _fetch_hidden(hidden_desc, hidden_bufs, here, first + 16, col, at, I, GATED, INTERLEAVED)
                used += 1
                dots = dots_RB + (first.to(gl.int64) * BLOCKS + block)
                gl.store(dots + own * BLOCKS, gl.sum(total, axis=1), mask=there)
            mbarrier.arrive(free.index(HALF), count=1)
        turn += 1


@gluon.jit
def _fetch_hidden(
    hidden_desc: tma.tensor_descriptor,
    hidden_bufs: gl.shared_memory_descriptor,
    here: gl.shared_memory_descriptor,
    row: gl.tensor,
    col: gl.tensor,
    at: gl.tensor,
    I: gl.constexpr,
    GATED: gl.constexpr,
    INTERLEAVED: gl.constexpr,
) -> None:
    """8 rows of the gate's columns from `col` on, and of up's."""
    ready = here.index(at)
    COLS: gl.constexpr = hidden_desc.block_type.shape[1]
    if GATED:
        mbarrier.expect(ready, 2 * hidden_desc.block_type.nbytes)
        fetch(hidden_desc, [row, 2 * col + COLS if INTERLEAVED else I + col], ready, hidden_bufs.index(2 * at + 1))
    else:
        mbarrier.expect(ready, hidden_desc.block_type.nbytes)
    fetch(hidden_desc, [row, 2 * col if INTERLEAVED else col], ready, hidden_bufs.index(2 * at))
