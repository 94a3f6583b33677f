"""Steps 4 to 8 with one derivative rule that keeps little: x, the pre-activation, the order of the rows, their weights.

The backward pass copies the rows and activates them again: two passes over memory instead of R * (D + I) elements held.
It runs the very steps of `experts.steps`; but each token's and each expert's gradients are summed from gathered rows,
in a fixed order and without a scatter, and with `apply_router_weight_after_down` the gradients are computed as if the
weight came before, which is the same function with other roundings.

What is kept has a name for the policies of jax.checkpoint: "moe_hidden", the pre-activation with its bias; "moe_act",
its activation; "moe_y", the output. `jax.checkpoint(f, policy=jax.checkpoint_policies.save_only_these_names(
"moe_hidden"))` so keeps what `lean` keeps, and runs the up projection once; with "moe_y" too the down projection is run
once also where f uses the output in a way that its gradient needs. The backend "triton" makes both values in one
kernel: there "moe_hidden" spares the up projection only beside "moe_act" or "moe_y", or where
f's gradient does not need the output.

Source: SonicMoE, arXiv:2512.14080: what to keep, and the routing weights' gradient without the output rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial as bind
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from moebius.core.activations import Activation
from moebius.core.config import MoEConfig
from moebius.core.errors import Unsupported
from moebius.core.registry import of_layer
from moebius.jax_frontend.activate import activated
from moebius.jax_frontend.bias import add_bias
from moebius.jax_frontend.dispatch import Sent
from moebius.jax_frontend.dtypes import promoted, widened
from moebius.jax_frontend.matmul import choose, product, weight_gradient
from moebius.jax_frontend.operators import alike
from moebius.jax_frontend.permute import PermuteState, sort_routes

if TYPE_CHECKING:
    from jaxtyping import Float, Int

# Rows of one expert added at once, at least and at most.
_SMALLEST, _LARGEST = 8, 64


class Weights(NamedTuple):
    """The experts' parameters in x's dtype."""

    up_eDU: Array
    down_eID: Array
    up_bias_eU: Array | None
    down_bias_eD: Array | None


class Kept(NamedTuple):
    """What the forward pass keeps for the backward pass; the pre-activation with its bias, but in "triton" unfused.

    Attributes:
        hidden_RU: None with remat "full". act_RI: None but with remat "none".
        row_experts_R: None where no bias asks for it.
    """

    x_SD: Array
    hidden_RU: Array | None
    act_RI: Array | None
    slot_of_row_R: Array
    row_of_slot_SK: Array
    group_sizes_e: Array
    row_weights_R: Array
    row_experts_R: Array | None


class How(NamedTuple):
    """What the rule is told beside arrays; see `lean`. The backend by name, one for both projections."""

    activation: Activation
    after: bool
    partial: bool
    backend: str
    remat: str


def lean(
    p: Mapping[str, Array], sent: Sent, config: MoEConfig, backend: str | None, partial: bool, remat: str = "act"
) -> Array:
    """`experts.steps` without taps: [S, D], each token's rows summed. Differentiable once, in reverse mode.

    Args:
        p: parameters in x's dtype, of the experts held here. sent: what the dispatcher gave.
        partial: other ranks hold the rest of the sum: leave it in promote_types(dtype, float32).
        remat: what the backward pass computes again: "none" keeps the activation's output too; "act" computes it from
            the pre-activation; "full" computes the up projection too.
    Raises:
        Unsupported: in forward mode, or when its gradient is differentiated.
    """
    weights = Weights(p["gate_and_up_projs"], p["down_projs"], p.get("gate_up_proj_bias"), p.get("down_proj_bias"))
    shapes = weights.up_eDU.shape, weights.down_eID.shape
    chosen = choose(of_layer(backend, config), sent.x_SD, *shapes, sent.ids_SK.size).name
    how = How(
        activation=config.activation,
        after=config.apply_router_weight_after_down,
        partial=partial,
        backend=chosen,
        remat=remat,
    )
    arrays, tree = jax.tree.flatten((*sent, weights))
    x_SD, weights_SK, ids_SK, weights = jax.tree.unflatten(tree, alike(*arrays))
    return _experts(how, *_reverse_only((x_SD, weights_SK, ids_SK, weights)))


def forward(x_SD: Float[Array, "S D"], weights_SK: Array, ids_SK: Array, w: Weights, how: How) -> tuple[Array, Kept]:
    """(y_SD, what `backward` needs)."""
    if how.backend == "triton":
        from moebius.jax_frontend import lean_kernels

        return lean_kernels.forward(x_SD, weights_SK, ids_SK, w, how)
    sent = Sent(x_SD, weights_SK, ids_SK)
    _, row_weights_R, group_sizes_e, row_experts_R, state = sort_routes(sent, w.down_eID.shape[0])
    rows_RD = _gather_rows(x_SD, state)
    before_R, after_R = (None, row_weights_R) if how.after else (row_weights_R, None)
    hidden_RU = checkpoint_name(_hidden(rows_RD, w, group_sizes_e, row_experts_R, how), "moe_hidden")
    act_RI = checkpoint_name(activated(hidden_RU, before_R, how.activation, _wide(w.up_bias_eU)), "moe_act")
    out_RD = product(how.backend, act_RI, w.down_eID, group_sizes_e, raw=True)
    out_RD = add_bias(out_RD, w.down_bias_eD, row_experts_R, before_R)
    wide = _wide(w.down_bias_eD)
    y_SD = checkpoint_name(_sum_slots(out_RD, state, group_sizes_e, after_R, wide, partial=how.partial), "moe_y")
    kept = Kept(
        x_SD=x_SD,
        hidden_RU=None if how.remat == "full" else hidden_RU,
        act_RI=act_RI if how.remat == "none" else None,
        slot_of_row_R=state.slot_of_row_R,
        row_of_slot_SK=state.row_of_slot_SK,
        group_sizes_e=group_sizes_e,
        row_weights_R=row_weights_R,
        row_experts_R=None if w.up_bias_eU is None else row_experts_R,
    )
    return y_SD, kept


def backward(dy_SD: Float[Array, "S D"], kept: Kept, w: Weights, how: How) -> tuple[Array, Array, Weights]:
    """Gradients of (x, weights, parameters); under jit XLA drops those that nobody reads."""
    if how.backend == "triton":
        from moebius.jax_frontend import lean_kernels

        return lean_kernels.backward(dy_SD, kept, w, how)
    # Behind a barrier, or XLA would find the forward pass' rows and activation equal to these, and keep them.
    dy_SD, kept = lax.optimization_barrier((dy_SD, kept))
    x_SD, hidden_RU, act_RI, slot_of_row_R, row_of_slot_SK, group_sizes_e, row_weights_R, row_experts_R = kept
    state = PermuteState(slot_of_row_R, row_of_slot_SK)
    only = bind(_only_routed, end=jnp.sum(group_sizes_e, dtype=jnp.int32))
    rows_RD = only(_gather_rows(x_SD, state))
    wide = widened if hidden_RU is not None else _wide(w.up_bias_eU)
    if hidden_RU is None:
        hidden_RU = _hidden(rows_RD, w, group_sizes_e, row_experts_R, how)
    dout_RD = only(_gather_rows(dy_SD.astype(x_SD.dtype), state))
    again_RI, activate_vjp = jax.vjp(lambda h, w: activated(h, w, how.activation, wide), hidden_RU, row_weights_R)
    if act_RI is None:
        act_RI = again_RI
    elif how.after:
        act_RI = (widened(act_RI) * row_weights_R[:, None]).astype(act_RI.dtype)
    ddown_eID = weight_gradient(how.backend, only(act_RI), dout_RD, group_sizes_e, raw=True)
    dact_RI = product(how.backend, dout_RD, w.down_eID, group_sizes_e, transposed=True, raw=True)
    dhidden_RU, drow_weights_R = activate_vjp(dact_RI)
    dhidden_RU = only(dhidden_RU)
    dup_bias_eU = ddown_bias_eD = None
    if w.down_bias_eD is not None and row_experts_R is not None:
        ddown_bias_eD = _sum_rows(dout_RD, group_sizes_e, row_weights_R)
        drow_weights_R = drow_weights_R + _dot_rows(dout_RD, w.down_bias_eD, row_experts_R)
    if w.up_bias_eU is not None:
        dup_bias_eU = _sum_rows(dhidden_RU, group_sizes_e)
    dup_eDU = weight_gradient(how.backend, rows_RD, dhidden_RU, group_sizes_e, raw=True)
    drows_RD = product(how.backend, dhidden_RU, w.up_eDU, group_sizes_e, transposed=True, raw=True)
    dx_SD = _sum_slots(drows_RD, state, group_sizes_e)
    dweights_SK = _of_slots(drow_weights_R, state, group_sizes_e)
    return dx_SD, dweights_SK, Weights(dup_eDU, ddown_eID, dup_bias_eU, ddown_bias_eD)


def _hidden(rows_RD: Array, w: Weights, group_sizes_e: Array, row_experts_R: Array | None, how: How) -> Array:
    hidden_RU = product(how.backend, rows_RD, w.up_eDU, group_sizes_e, raw=True)
    return hidden_RU if row_experts_R is None else add_bias(hidden_RU, w.up_bias_eU, row_experts_R)


def _wide(bias: Array | None) -> Callable[[Array], Array]:
    """How a product, its bias added, is widened: XLA sees the sum's rounding, and a kernel's not."""
    return widened if bias is None else promoted


def _gather_rows(x_SD: Float[Array, "S D"], state: PermuteState) -> Array:
    """[R, D]: each row's token."""
    return _take(x_SD, state.slot_of_row_R // max(state.row_of_slot_SK.shape[1], 1))


def _only_routed(rows_RF: Float[Array, "R F"], end: Int[Array, ""]) -> Array:
    """The rows, with zeros past the end: fused into what makes them, where a mask of its own would read them again."""
    inside_R1 = (jnp.arange(rows_RF.shape[0], dtype=jnp.int32) < end)[:, None]
    return jnp.where(inside_R1, rows_RF, 0)


def _sum_slots(
    out_RD: Float[Array, "R D"],
    state: PermuteState,
    group_sizes_e: Int[Array, " e"],
    row_weights_R: Float[Array, " R"] | None = None,
    wide: Callable[[Array], Array] = widened,
    *,
    partial: bool = False,
) -> Array:
    """`unpermute` of rows that may hold anything past the end."""
    end = jnp.sum(group_sizes_e, dtype=jnp.int32)
    dtype, out_RD = out_RD.dtype, wide(out_RD)
    if row_weights_R is not None:
        out_RD = out_RD * row_weights_R[:, None]
    inside_SK1 = (state.row_of_slot_SK < end)[..., None]
    summed = jnp.where(inside_SK1, _take(out_RD, state.row_of_slot_SK), 0).sum(1)
    return summed if partial else summed.astype(dtype)


def _of_slots(values_R: Float[Array, " R"], state: PermuteState, group_sizes_e: Array) -> Array:
    """[S, K]: each slot's value, 0 for a slot without a route."""
    inside_SK = state.row_of_slot_SK < jnp.sum(group_sizes_e, dtype=jnp.int32)
    return jnp.where(inside_SK, _take(values_R, state.row_of_slot_SK), 0)


def _dot_rows(values_RF: Float[Array, "R F"], bias_eF: Float[Array, "e F"], row_experts_R: Array) -> Array:
    """[R] promoted: each row times its expert's bias, summed."""
    bias_RF = promoted(bias_eF).at[row_experts_R].get(mode="fill", fill_value=0, indices_are_sorted=True)
    return (promoted(values_RF) * bias_RF).sum(-1)


def _sum_rows(
    values_RF: Float[Array, "R F"], group_sizes_e: Int[Array, " e"], row_weights_R: Float[Array, " R"] | None = None
) -> Array:
    """[e, F]: each expert's rows, times their weights where given, added promoted and rounded once.

    Blocks of rows of one expert, then blocks of those sums, until one is left: a fixed order, no scatter, and of
    R rows rounding reaches log(R) of them. Rows past sum(group_sizes_e) are not read into any sum.
    """
    most, sizes_e = values_RF.shape[0], group_sizes_e
    block = _block(most, sizes_e.shape[0])
    summed_BF = promoted(values_RF)
    if row_weights_R is not None:
        summed_BF = summed_BF * row_weights_R[:, None]
    while most > 1:
        summed_BF, sizes_e = _sum_blocks(summed_BF, sizes_e, block)
        most = -(-most // block)
    if most == 0:
        summed_eF = lax.full_like(summed_BF, 0, shape=(sizes_e.shape[0], values_RF.shape[1]))
    else:
        own_e = jnp.minimum(jnp.cumsum(sizes_e, dtype=jnp.int32) - sizes_e, summed_BF.shape[0] - 1)
        summed_eF = jnp.where(sizes_e[:, None] > 0, _take(summed_BF, own_e), 0)
    return summed_eF.astype(values_RF.dtype)


def _block(n_rows: int, n_experts: int) -> int:
    """About the rows of one expert: its last block is part empty, and reads as many rows as a full one."""
    size = _SMALLEST
    while size < min(_LARGEST, n_rows / n_experts):
        size *= 2
    return size


def _sum_blocks(values_RF: Float[Array, "R F"], sizes_e: Int[Array, " e"], block: int) -> tuple[Array, Array]:
    """(sums of blocks [B, F], blocks of each expert [e])."""
    n_rows, e = values_RF.shape[0], sizes_e.shape[0]
    n_blocks = min(n_rows, (n_rows + e * (block - 1)) // block)  # sum of size / block, rounded up, at most
    blocks_e = (sizes_e + (block - 1)) // block
    ends_e, block_ends_e = (jnp.cumsum(sizes, dtype=jnp.int32) for sizes in (sizes_e, blocks_e))
    blocks_B = jnp.arange(n_blocks, dtype=jnp.int32)
    owner_B = (blocks_B[:, None] >= block_ends_e).sum(-1, dtype=jnp.int32)  # e past the last
    own_B = jnp.minimum(owner_B, e - 1)
    first_B = _take(ends_e - sizes_e, own_B) + (blocks_B - _take(block_ends_e - blocks_e, own_B)) * block
    rows_BN = first_B[:, None] + jnp.arange(block, dtype=jnp.int32)
    inside_BN = (rows_BN < _take(ends_e, own_B)[:, None]) & (owner_B < e)[:, None]
    taken_BNF = _take(values_RF, jnp.clip(rows_BN, 0, n_rows - 1))
    return jnp.where(inside_BN[..., None], taken_BNF, 0).sum(1), blocks_e


def _take(array: Array, indices: Array) -> Array:
    # asarray: NumPy's arrays come through jax.custom_vjp as they are.
    return jnp.asarray(array).at[indices].get(mode="promise_in_bounds")


@bind(jax.custom_vjp, nondiff_argnums=(0,))
def _experts(how: How, x_SD: Array, weights_SK: Array, ids_SK: Array, w: Weights) -> Array:
    return forward(x_SD, weights_SK, ids_SK, w, how)[0]


def _experts_forward(how: How, x_SD: Array, weights_SK: Array, ids_SK: Array, w: Weights) -> tuple[Array, Any]:
    y_SD, kept = forward(x_SD, weights_SK, ids_SK, w, how)
    return y_SD, (kept, w)


def _experts_backward(how: How, saved: tuple[Kept, Weights], dy_SD: Array) -> tuple[Array, Array, None, Weights]:
    dx_SD, dweights_SK, dw = _backward(how, *_reverse_only((dy_SD, *saved)))
    return dx_SD, dweights_SK, None, dw


# A rule again, whose own gradient is refused.
@bind(jax.custom_vjp, nondiff_argnums=(0,))
def _backward(how: How, dy_SD: Array, kept: Kept, w: Weights) -> tuple[Array, Array, Weights]:
    return backward(dy_SD, kept, w, how)


def _refuse(how: How, saved: None, grads: Any) -> NoReturn:
    raise Unsupported(
        "the gradient of a gradient of the experts",
        "the lean rule, which is differentiable once",
        "set BackendConfig(double_backward=True)",
    )


_experts.defvjp(_experts_forward, _experts_backward)
_backward.defvjp(lambda *given: (_backward(*given), None), _refuse)


def _reverse_only(arrays: Any) -> Any:
    """The arrays of a pytree; forward mode through them is refused."""
    return jax.tree.map(lambda array: _guarded(array) if jnp.issubdtype(array.dtype, jnp.floating) else array, arrays)


@jax.custom_jvp
def _guarded(value: Array) -> Array:
    return value


def _refuse_forward_mode(*_: Any, **__: Any) -> NoReturn:
    raise Unsupported(
        "forward-mode differentiation of the experts",
        "the lean rule, a backward pass alone",
        "use reverse mode, or set BackendConfig(double_backward=True)",
    )


# Reverse mode transposes this equation away; whoever evaluates it is in forward mode.
_TANGENT = Primitive("reverse_mode_only")
_TANGENT.def_impl(_refuse_forward_mode)
_TANGENT.def_abstract_eval(lambda tangent: tangent)
ad.deflinear2(_TANGENT, lambda cotangent, _: [cotangent])
batching.defvectorized(_TANGENT)
mlir.register_lowering(_TANGENT, _refuse_forward_mode)
_guarded.defjvp(lambda primals, tangents: (primals[0], _TANGENT.bind(tangents[0])))
