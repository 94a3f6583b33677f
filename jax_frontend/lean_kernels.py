"""`lean` with every step in the kernels of core.kernels: the PyTorch frontend's lean.py step by step, with its bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from moebius.jax_frontend import launch
from moebius.jax_frontend.dispatch import Sent
from moebius.jax_frontend.dtypes import accumulate_dtype
from moebius.jax_frontend.lean import How, Kept, Weights
from moebius.jax_frontend.permute import sort_routes

if TYPE_CHECKING:
    from jaxtyping import Float


def forward(x_SD: Float[Array, "S D"], weights_SK: Array, ids_SK: Array, w: Weights, how: How) -> tuple[Array, Kept]:
    """(y_SD, what `backward` needs); the pre-activation with its bias where steps are fused."""
    sent = Sent(x_SD, weights_SK, ids_SK)
    _, row_weights_R, group_sizes_e, row_experts_R, state = sort_routes(sent, w.down_eID.shape[0])
    row_of_slot_SK = jnp.where(state.row_of_slot_SK < jnp.sum(group_sizes_e, dtype=jnp.int32), state.row_of_slot_SK, -1)
    rows_RD = launch.scatter_rows(x_SD, row_of_slot_SK)
    up_tiles_Q4, down_tiles_Q4, _ = _tiles(group_sizes_e, rows_RD, w)
    before_R = None if how.after else row_weights_R
    hidden_RU, act_RI = _up(rows_RD, w, up_tiles_Q4, before_R, row_experts_R, how)
    hidden_RU, act_RI = checkpoint_name(hidden_RU, "moe_hidden"), checkpoint_name(act_RI, "moe_act")
    out_RD = launch.grouped_product(act_RI, w.down_eID, down_tiles_Q4, False)
    y_SD = launch.sum_slots(
        out_RD,
        row_of_slot_SK,
        bias_eD=w.down_bias_eD,
        row_experts_R=row_experts_R,
        row_weights_R=row_weights_R,
        after=how.after,
        dtype=accumulate_dtype(x_SD.dtype) if how.partial else x_SD.dtype,
    )
    kept = Kept(
        x_SD=x_SD,
        hidden_RU=None if how.remat == "full" else hidden_RU,
        act_RI=None,  # where steps are fused the backward pass has it for nothing
        slot_of_row_R=state.slot_of_row_R,
        row_of_slot_SK=row_of_slot_SK,
        group_sizes_e=group_sizes_e,
        row_weights_R=row_weights_R,
        row_experts_R=None if w.up_bias_eU is None and w.down_bias_eD is None else row_experts_R,
    )
    return checkpoint_name(y_SD, "moe_y"), kept


def backward(dy_SD: Float[Array, "S D"], kept: Kept, w: Weights, how: How) -> tuple[Array, Array, Weights]:
    """Gradients of (x, weights, parameters); under jit XLA drops those that nobody reads."""
    dy_SD, kept = lax.optimization_barrier((dy_SD, kept))
    x_SD, hidden_RU, _, _, row_of_slot_SK, group_sizes_e, row_weights_R, row_experts_R = kept
    rows_RD = launch.scatter_rows(x_SD, row_of_slot_SK)
    up_tiles_Q4, down_tiles_Q4, starts_e = _tiles(group_sizes_e, rows_RD, w)
    if hidden_RU is None:
        hidden_RU = _hidden(rows_RD, w, up_tiles_Q4, how)
    dout_RD = launch.scatter_rows(dy_SD.astype(x_SD.dtype), row_of_slot_SK)
    dup_bias_eU = ddown_bias_eD = None
    if w.down_bias_eD is not None:
        ddown_bias_eD = launch.sum_rows(dout_RD, group_sizes_e, row_weights_R)
    dhidden_RU, act_RI, dots_RB = _down_gradient(
        dout_RD, w, down_tiles_Q4, hidden_RU, row_weights_R, row_experts_R, how
    )
    ddown_eID = launch.grouped_weight_gradient(act_RI, dout_RD, starts_e)
    dweights_SK = launch.sum_dots(dots_RB, row_of_slot_SK)
    if w.down_bias_eD is not None and row_experts_R is not None:
        more_R = launch.dot_rows(dout_RD, w.down_bias_eD, row_experts_R)
        dweights_SK = dweights_SK + launch.sum_dots(more_R[:, None], row_of_slot_SK)
    if w.up_bias_eU is not None:
        dup_bias_eU = launch.sum_rows(dhidden_RU, group_sizes_e)
    dup_eDU = launch.grouped_weight_gradient(rows_RD, dhidden_RU, starts_e)
    drows_RD = launch.grouped_product(dhidden_RU, w.up_eDU, up_tiles_Q4, True)
    dx_SD = launch.sum_slots(drows_RD, row_of_slot_SK)
    return dx_SD, dweights_SK, Weights(dup_eDU, ddown_eID, dup_bias_eU, ddown_bias_eD)


def _tiles(group_sizes_e: Array, rows_RD: Array, w: Weights) -> tuple[Array, Array, Array]:
    """(tiles of the products with up, those with down, starts): where one list serves both, one."""
    R, (e, I, D), U = rows_RD.shape[0], w.down_eID.shape, w.up_eDU.shape[2]
    up, down = launch.height(rows_RD, R, e, D, U), launch.height(rows_RD, R, e, I, D)
    listed = {height: launch.list_tiles(group_sizes_e, R, height) for height in sorted({up, down})}
    return listed[up][0], listed[down][0], listed[up][1]


def _hidden(rows_RD: Array, w: Weights, tiles_Q4: Array, how: How) -> Array:
    """The pre-activation once more, as `_up` gives it."""
    if w.up_bias_eU is not None and launch.fuses(w.down_eID):
        return launch.activated_product(rows_RD, w.up_eDU, tiles_Q4, None, how.activation, w.up_bias_eU)[0]
    return launch.grouped_product(rows_RD, w.up_eDU, tiles_Q4, False)


def _up(
    rows_RD: Array, w: Weights, tiles_Q4: Array, row_weights_R: Array | None, row_experts_R: Array, how: How
) -> tuple[Array, Array]:
    """(pre-activation [R, U], its activation [R, I]); see `forward`."""
    if launch.fuses(w.down_eID):
        return launch.activated_product(rows_RD, w.up_eDU, tiles_Q4, row_weights_R, how.activation, w.up_bias_eU)
    hidden_RU = launch.grouped_product(rows_RD, w.up_eDU, tiles_Q4, False)
    bias = {"bias_eU": w.up_bias_eU, "row_experts_R": row_experts_R}
    return hidden_RU, launch.activate_rows(hidden_RU, row_weights_R, how.activation, **bias)


def _down_gradient(
    dout_RD: Array,
    w: Weights,
    tiles_Q4: Array,
    hidden_RU: Array,
    row_weights_R: Array,
    row_experts_R: Array | None,
    how: How,
) -> tuple[Array, Array, Array]:
    """(dhidden [R, U], the weighted activation [R, I], dots [R, B]: parts of the row weights' gradients)."""
    activation = how.activation
    if launch.fuses(w.down_eID):
        return launch.differentiated_product(dout_RD, w.down_eID, tiles_Q4, hidden_RU, row_weights_R, activation)
    bias = {"bias_eU": w.up_bias_eU, "row_experts_R": row_experts_R}
    act_RI = launch.activate_rows(hidden_RU, row_weights_R, activation, **bias)
    dact_RI = launch.grouped_product(dout_RD, w.down_eID, tiles_Q4, True)
    dhidden_RU, dots_R = launch.activate_rows_backward(dact_RI, hidden_RU, row_weights_R, activation, **bias)
    return dhidden_RU, act_RI, dots_R[:, None]
