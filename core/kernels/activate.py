"""Activation times routing weight, and its derivative: float32 inside, one rounding."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # the interpreter has no instructions of a device


@triton.jit(do_not_specialize=["R"])
def activate_rows(
    hidden_RU: tl.tensor,
    bias_eU: tl.tensor,
    row_experts_R: tl.tensor,
    row_weights_R: tl.tensor,
    R: tl.tensor,
    act_RI: tl.tensor,
    E: tl.constexpr,
    I: tl.constexpr,
    CURVE: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    BIASED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    """act = curve(gate) * (up + offset) * weight, a tile of ROWS x COLS of act a program."""
    blocks: tl.constexpr = (I + COLS - 1) // COLS
    rows = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(0) % blocks * COLS
    experts = tl.load(row_experts_R + rows, mask=rows < R, other=E) if BIASED else rows
    gate, up = _hidden(
        *(hidden_RU, bias_eU, rows, rows < R, experts, first, E, I, GATED, INTERLEAVED, BIASED, ROWS, COLS)
    )
    formula: tl.constexpr = (CURVE, GATED, ALPHA, LIMIT, UP_OFFSET)
    act = activated(gate, up, formula)
    if WEIGHTED:
        act = act * tl.load(row_weights_R + rows, mask=rows < R, other=0.0)[:, None]
    cols = first + tl.arange(0, COLS)
    inside = (rows < R)[:, None] & (cols < I)[None, :]
    places = rows.to(tl.int64)[:, None] * I + cols[None, :]
    tl.store(act_RI + places, act.to(act_RI.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["R"])
def activate_rows_backward(
    dact_RI: tl.tensor,
    hidden_RU: tl.tensor,
    bias_eU: tl.tensor,
    row_experts_R: tl.tensor,
    row_weights_R: tl.tensor,
    R: tl.tensor,
    dhidden_RU: tl.tensor,
    drow_weights_R: tl.tensor,
    E: tl.constexpr,
    I: tl.constexpr,
    CURVE: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    BIASED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """dhidden and drow_weights; ROWS whole rows a program, so that a weight's gradient is one program's sum.

    dhidden may be hidden: whatever a program overwrites it has read before, and no other program reads it.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = rows < R
    experts = tl.load(row_experts_R + rows, mask=there, other=E) if BIASED else rows
    if WEIGHTED:
        weights = tl.load(row_weights_R + rows, mask=there, other=0.0)[:, None]
    else:
        weights = None
    formula: tl.constexpr = (CURVE, GATED, ALPHA, LIMIT, UP_OFFSET)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for first in tl.range(0, I, COLS, num_stages=STAGES):
        cols = first + tl.arange(0, COLS)
        inside = there[:, None] & (cols < I)[None, :]
        places = rows.to(tl.int64)[:, None] * I + cols[None, :]
        dact = tl.load(dact_RI + places, mask=inside, other=0.0).to(tl.float32)
        gate, up = _hidden(
            *(hidden_RU, bias_eU, rows, there, experts, first, E, I, GATED, INTERLEAVED, BIASED, ROWS, COLS)
        )
        dgate, dup, act = differentiated(dact, gate, up, weights, formula)
        if WEIGHTED:
            total += dact * act
        _store_halves(dhidden_RU, dgate, dup, rows, there, first, I, GATED, INTERLEAVED, ROWS, COLS)
    if WEIGHTED:
        tl.store(drow_weights_R + rows, tl.sum(total, axis=1), mask=there)


@triton.jit
def activated(gate: tl.tensor, up: tl.tensor, formula: tl.constexpr) -> tl.tensor:
    """The activation without a weight, all float32. formula is (CURVE, GATED, ALPHA, LIMIT, UP_OFFSET)."""
    act = _curve(_below(gate, formula[3]), formula[0], formula[2])[0]
    return act * _factor(up, formula) if formula[1] else act


@triton.jit
def differentiated(
    dact: tl.tensor, gate: tl.tensor, up: tl.tensor, weights: tl.tensor, formula: tl.constexpr
) -> tl.tensor:
    """(dgate, dup, the activation without a weight), all float32; weights may be None. See `activated`."""
    LIMIT: tl.constexpr = formula[3]
    act, slope = _curve(_below(gate, LIMIT), formula[0], formula[2])
    dunweighted = dact if weights is None else dact * weights
    if formula[1]:
        factor = _factor(up, formula)
        dup = _passed(dunweighted * act, up, -up, LIMIT)
        dgate = _passed(dunweighted * factor * slope, gate, gate, LIMIT)
        return dgate, dup, act * factor
    else:
        dgate = _passed(dunweighted * slope, gate, gate, LIMIT)
        return dgate, dgate, act


@triton.jit
def _hidden(
    hidden_RU: tl.tensor,
    bias_eU: tl.tensor,
    rows: tl.tensor,
    there: tl.tensor,
    experts: tl.tensor,
    first: tl.tensor,
    E: tl.constexpr,
    I: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BIASED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> tl.tensor:
    """gate and up in float32, bias added and rounded to hidden's dtype; up is gate where there is none."""
    gate, up = _halves(hidden_RU, rows, there, first, I, GATED, INTERLEAVED, ROWS, COLS)
    if BIASED:
        gate_bias, up_bias = _halves(bias_eU, experts, experts < E, first, I, GATED, INTERLEAVED, ROWS, COLS)
        gate = (gate + gate_bias).to(hidden_RU.dtype.element_ty).to(tl.float32)
        up = (up + up_bias).to(hidden_RU.dtype.element_ty).to(tl.float32)
    return gate, up


@triton.jit
def _halves(
    values_NU: tl.tensor,
    rows: tl.tensor,
    there: tl.tensor,
    first: tl.tensor,
    I: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> tl.tensor:
    """Columns [first, first + COLS) of both halves of the rows that are `there`, in float32; zero elsewhere."""
    if INTERLEAVED:  # one contiguous load, split in registers
        wide = 2 * first + tl.arange(0, 2 * COLS)
        places = rows.to(tl.int64)[:, None] * (2 * I) + wide[None, :]
        pairs = tl.load(values_NU + places, mask=there[:, None] & (wide < 2 * I)[None, :], other=0.0)
        gate, up = tl.split(tl.reshape(pairs, [ROWS, COLS, 2]))
        return gate.to(tl.float32), up.to(tl.float32)
    else:
        cols = first + tl.arange(0, COLS)
        inside = there[:, None] & (cols < I)[None, :]
        places = rows.to(tl.int64)[:, None] * (2 * I if GATED else I) + cols[None, :]
        gate = tl.load(values_NU + places, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(values_NU + places + I, mask=inside, other=0.0).to(tl.float32) if GATED else gate
        return gate, up


@triton.jit
def _store_halves(
    values_RU: tl.tensor,
    gate: tl.tensor,
    up: tl.tensor,
    rows: tl.tensor,
    there: tl.tensor,
    first: tl.tensor,
    I: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    """What `_halves` loads, stored, rounded to the dtype of the destination."""
    gate = gate.to(values_RU.dtype.element_ty)
    up = up.to(values_RU.dtype.element_ty)
    if INTERLEAVED:
        wide = 2 * first + tl.arange(0, 2 * COLS)
        places = rows.to(tl.int64)[:, None] * (2 * I) + wide[None, :]
        pairs = tl.reshape(tl.join(gate, up), [ROWS, 2 * COLS])
        tl.store(values_RU + places, pairs, mask=there[:, None] & (wide < 2 * I)[None, :])
    else:
        cols = first + tl.arange(0, COLS)
        inside = there[:, None] & (cols < I)[None, :]
        places = rows.to(tl.int64)[:, None] * (2 * I if GATED else I) + cols[None, :]
        tl.store(values_RU + places, gate, mask=inside)
        if GATED:
            tl.store(values_RU + places + I, up, mask=inside)


@triton.jit
def _factor(up: tl.tensor, formula: tl.constexpr) -> tl.tensor:
    """What the gate's curve is multiplied by."""
    factor = -_below(-_below(up, formula[3]), formula[3])
    return factor + formula[4] if formula[4] != 0.0 else factor


@triton.jit
def _below(value: tl.tensor, LIMIT: tl.constexpr) -> tl.tensor:
    """min(value, LIMIT), NaN kept."""
    if LIMIT is None:
        return value
    else:
        return tl.where(value > LIMIT, LIMIT, value)


@triton.jit
def _passed(gradient: tl.tensor, above: tl.tensor, below: tl.tensor, LIMIT: tl.constexpr) -> tl.tensor:
    """The gradient where neither `above` nor `below` is past LIMIT; at the limit, and for NaN, it passes."""
    if LIMIT is None:
        return gradient
    else:
        return tl.where((above > LIMIT) | (below > LIMIT), 0.0, gradient)


@triton.jit
def _curve(gate: tl.tensor, CURVE: tl.constexpr, ALPHA: tl.constexpr) -> tl.tensor:
    """(curve, its derivative). Both smooth curves are gate * sigmoid(inner(gate)): 1 + tanh(u) = 2 sigmoid(2 u)."""
    if CURVE == "relu2":
        positive = tl.where(gate < 0.0, 0.0, gate)  # keeps NaN, as maximum would not
        return positive * positive, 2.0 * positive
    else:
        if CURVE == "silu":
            inner = ALPHA * gate
            dinner = ALPHA
        else:
            square = gate * gate
            inner = 1.5957691216057308 * gate * (1.0 + 0.044715 * square)  # 2 sqrt(2 / pi)
            dinner = 1.5957691216057308 * (1.0 + 0.134145 * square)
        # On the far left exp is inf and s is 0. There, and on the far right, dinner may be inf: hence the comparison.
        s = _sigmoid(inner)
        steep = s * (1.0 - s)
        return gate * s, s + tl.where(steep == 0.0, 0.0, steep * gate * dinner)


@triton.jit
def _sigmoid(value: tl.tensor) -> tl.tensor:
    """1 / (1 + exp(-value)); on the device by its approximate instructions, with results below 2^-126 as zero."""
    if _INTERPRETED:
        return 1.0 / (1.0 + tl.exp(-value))
    else:
        return libdevice.fast_dividef(1.0, 1.0 + libdevice.fast_expf(-value))
