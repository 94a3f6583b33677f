"""The Triton kernels of core.kernels on JAX's arrays.

Each function has the name and arguments of the PyTorch frontend's, and its kernel is compiled from the same constants.
None has a gradient; under jax.vmap each runs one element of the batch after the other.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array

from moebius.core.activations import Activation
from moebius.core.kernels import plan, plan_grouped, plan_hopper, plan_portable
from moebius.core.kernels.plan_grouped import Device
from moebius.jax_frontend.matmul import device_of
from moebius.jax_frontend.play import run

if TYPE_CHECKING:
    from jaxtyping import Float, Int

_H200 = Device((9, 0), 132)  # what is lowered for where there is no GPU


def scatter_rows(x_SD: Float[Array, "S D"], row_of_slot_SK: Int[Array, "S K"]) -> Array:
    """[S * K, D]: row row_of_slot[s, k] is x[s]; rows without a slot hold anything."""
    (S, K), D = row_of_slot_SK.shape, x_SD.shape[1]
    return run(plan.scatter_rows(S, K, D), x_SD, row_of_slot_SK, S, out=_array(x_SD.dtype, S * K, D))[0]


def sum_dots(dots_RB: Float[Array, "R B"], row_of_slot_SK: Int[Array, "S K"]) -> Array:
    """[S, K] float32: the sum of each slot's row of dots, in their order; 0 for a slot without a row."""
    launch = plan.sum_dots(row_of_slot_SK.size, dots_RB.shape[1])
    given = dots_RB, row_of_slot_SK, row_of_slot_SK.size
    return run(launch, *given, out=_array(jnp.float32, *row_of_slot_SK.shape))[0]


def sum_slots(
    rows_RD: Float[Array, "R D"],
    row_of_slot_SK: Int[Array, "S K"],
    *,
    bias_eD: Float[Array, "e D"] | None = None,
    row_experts_R: Int[Array, " R"] | None = None,
    row_weights_R: Float[Array, " R"] | None = None,
    after: bool = False,
    dtype: Any = None,
) -> Array:
    """[S, D]: the sum of each token's rows in the order of its slots, in float32, rounded once.

    Args:
        rows_RD: rows of the tail are never read.
        row_of_slot_SK: int32, -1 for no row.
        bias_eD: added to each row by its expert (row_experts_R), times row_weights_R unless `after`; rounded.
        row_weights_R: float32 weights of the bias or, with `after`, of the rows. dtype: of the result.
    """
    weighted = row_weights_R is not None
    weight_bias = bias_eD is not None and weighted and not after
    (S, K), D = row_of_slot_SK.shape, rows_RD.shape[1]
    launch = plan.sum_slots(S, K, D, bias_eD is not None, weight_bias, weighted and after)
    given = rows_RD, row_of_slot_SK, *_given(rows_RD, bias_eD, row_experts_R, row_weights_R), S
    return run(launch, *given, out=_array(dtype or rows_RD.dtype, S, D))[0]


def activate_rows(
    hidden_RU: Float[Array, "R U"],
    row_weights_R: Float[Array, " R"] | None,
    activation: Activation,
    *,
    bias_eU: Float[Array, "e U"] | None = None,
    row_experts_R: Int[Array, " R"] | None = None,
) -> Array:
    """[R, I]: activation times weight in float32, rounded once; hidden plus its bias is rounded first."""
    R, I = hidden_RU.shape[0], hidden_RU.shape[1] // activation.up_width(1)
    launch = plan.activate_rows(R, I, activation, _count(bias_eU), row_weights_R is not None)
    given = hidden_RU, *_given(hidden_RU, bias_eU, row_experts_R, row_weights_R), R
    return run(launch, *given, out=_array(hidden_RU.dtype, R, I))[0]


def activate_rows_backward(
    dact_RI: Float[Array, "R I"],
    hidden_RU: Float[Array, "R U"],
    row_weights_R: Float[Array, " R"],
    activation: Activation,
    *,
    bias_eU: Float[Array, "e U"] | None = None,
    row_experts_R: Int[Array, " R"] | None = None,
) -> tuple[Array, Array]:
    """(dhidden_RU, rounded once; drow_weights_R in float32)."""
    R, I = dact_RI.shape
    launch = plan.activate_rows_backward(R, I, activation, _count(bias_eU), True)
    given = dact_RI, hidden_RU, *_given(hidden_RU, bias_eU, row_experts_R, row_weights_R), R
    out = _array(hidden_RU.dtype, *hidden_RU.shape), _array(jnp.float32, R)
    dhidden_RU, drow_weights_R = run(launch, *given, out=out)
    return dhidden_RU, drow_weights_R


def sum_rows(
    values_RF: Float[Array, "R F"], group_sizes_e: Int[Array, " e"], row_weights_R: Float[Array, " R"] | None = None
) -> Array:
    """[e, F]: each expert's rows, times their weights in float32 where given, added in float64, rounded once.

    Rows past sum(group_sizes_e) are not read.
    """
    (R, F), e = values_RF.shape, group_sizes_e.shape[0]
    sum_parts, join_parts = plan.sum_rows(R, e, F, row_weights_R is not None)
    scratch = _array(jnp.int32, plan.parts(R, e), 2 * F)
    (parts_PG,) = run(sum_parts, values_RF, group_sizes_e, *_given(values_RF, row_weights_R), out=scratch)
    return run(join_parts, parts_PG, group_sizes_e, out=_array(values_RF.dtype, e, F))[0]


def dot_rows(values_RF: Float[Array, "R F"], bias_eF: Float[Array, "e F"], row_experts_R: Int[Array, " R"]) -> Array:
    """[R] float32: each row times the bias of its expert; 0 for rows without one, which are not read."""
    R = values_RF.shape[0]
    launch = plan.dot_rows(R, *bias_eF.shape)
    return run(launch, values_RF, bias_eF, row_experts_R, R, out=_array(jnp.float32, R))[0]


def list_tiles(group_sizes_e: Int[Array, " e"], n_rows: int, height: int) -> tuple[Array, Array]:
    """(tiles, starts) of kernels.tiles.list_tiles for n_rows rows; tiles have `height` rows."""
    e = group_sizes_e.shape[0]
    out = _array(jnp.int32, 1 + plan_portable.tiles(n_rows, e, height), 4), _array(jnp.int32, e + 1)
    tiles_Q4, starts_e = run(plan_portable.list_tiles(e, height), group_sizes_e.astype(jnp.int32), out=out)
    return tiles_Q4, starts_e


def height(like: Array, n_rows: int, n_experts: int, width_in: int, width_out: int) -> int:
    """Rows of a tile of such a product, for `list_tiles`.

    Args:
        like: of the dtype, and on the device, of the rows.
    """
    return plan_grouped.height(n_rows, n_experts, width_in, width_out, *_where(like))


def grouped_product(
    rows_RD: Float[Array, "R D"], weight: Float[Array, "e a b"], tiles_Q4: Int[Array, "Q 4"], transposed: bool
) -> Array:
    """[R, F]: each row times its expert's matrix; rows past the end hold anything.

    Args:
        weight: [e, D, F], or [e, F, D] where `transposed`. tiles_Q4: of `list_tiles`, of the product's `height`.
    """
    (R, D), F = rows_RD.shape, weight.shape[1 if transposed else 2]
    launch = plan_grouped.product(R, weight.shape[0], D, F, transposed, *_where(rows_RD))
    return run(launch, rows_RD, weight, tiles_Q4, out=_array(rows_RD.dtype, R, F))[0]


def grouped_weight_gradient(
    rows_RD: Float[Array, "R D"], dout_RF: Float[Array, "R F"], starts_e: Int[Array, " starts"]
) -> Array:
    """[e, D, F]: each expert's rows^T @ dout; starts of `list_tiles`."""
    D, F, e = rows_RD.shape[1], dout_RF.shape[1], starts_e.shape[0] - 1
    launch = plan_grouped.weight_gradient(e, D, F, *_where(rows_RD))
    return run(launch, rows_RD, dout_RF, starts_e, out=_array(rows_RD.dtype, e, D, F))[0]


def fuses(down_eID: Float[Array, "e I D"]) -> bool:
    """Whether `activated_product` and `differentiated_product` compute experts like these."""
    _, I, D = down_eID.shape
    return plan_grouped.fuses(*_where(down_eID), D, I)


def activated_product(
    rows_RD: Float[Array, "R D"],
    up_eDU: Float[Array, "e D U"],
    tiles_Q4: Int[Array, "Q 4"],
    row_weights_R: Float[Array, " R"] | None,
    activation: Activation,
    bias_eU: Float[Array, "e U"] | None = None,
) -> tuple[Array, Array]:
    """(`grouped_product` plus its bias, its `activate_rows`); see `fuses`."""
    (R, D), U = rows_RD.shape, up_eDU.shape[2]
    I = U // activation.up_width(1)
    processors = _where(rows_RD)[1].processors
    few = plan_hopper.few(R, up_eDU.shape[0], U, processors)
    told = D, I, activation, bias_eU is not None, row_weights_R is not None
    launch = plan_hopper.activated_product(processors, *told, few)
    given = rows_RD, up_eDU, *_given(rows_RD, bias_eU, row_weights_R), tiles_Q4
    hidden_RU, act_RI = run(launch, *given, out=(_array(rows_RD.dtype, R, U), _array(rows_RD.dtype, R, I)))
    return hidden_RU, act_RI


def differentiated_product(
    dout_RD: Float[Array, "R D"],
    down_eID: Float[Array, "e I D"],
    tiles_Q4: Int[Array, "Q 4"],
    hidden_RU: Float[Array, "R U"],
    row_weights_R: Float[Array, " R"],
    activation: Activation,
) -> tuple[Array, Array, Array]:
    """(dhidden, act, dots): `activate_rows_backward` of the transposed product, and the activation of hidden.

    hidden is that of `activated_product`, with its bias.

    dots [R, B] float32 are the parts of the routing weights' gradients; see `sum_dots`.
    """
    (R, D), I, dtype = dout_RD.shape, down_eID.shape[1], dout_RD.dtype
    launch = plan_hopper.differentiated_product(_where(dout_RD)[1].processors, D, I, activation)
    given = dout_RD, down_eID, hidden_RU, row_weights_R, tiles_Q4
    out = _array(dtype, *hidden_RU.shape), _array(dtype, R, I), _array(jnp.float32, R, plan_hopper.dots(I))
    dhidden_RU, act_RI, dots_RB = run(launch, *given, out=out)
    return dhidden_RU, act_RI, dots_RB


def _array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _count(bias: Array | None) -> int | None:
    return None if bias is None else bias.shape[0]


def _given(stand_in: Array, *arrays: Array | None) -> list[Array]:
    """The arrays; for one that is left out any other, which the kernel does not read."""
    return [stand_in if array is None else array for array in arrays]


def _where(operand: Array) -> tuple[str, Device]:
    if plan_grouped.interpreted():
        return str(operand.dtype), plan_grouped.INTERPRETER
    _, capability = device_of(operand)
    return str(operand.dtype), _H200 if capability is None else Device(capability, _processors(capability))


@cache
def _processors(capability: tuple[int, int]) -> int:
    wanted = ".".join(map(str, capability))
    alike = (d for d in jax.local_devices(backend="gpu") if str(d.compute_capability) == wanted)
    return int(getattr(next(alike, None), "core_count", _H200.processors))
