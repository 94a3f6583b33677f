"""Step 2, the losses that balance the router: of its scores over a call, of its logits, of each sequence."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from moebius.core import checks
from moebius.core.config import MoEConfig
from moebius.core.errors import ShapeError
from moebius.jax_frontend.dtypes import promoted
from moebius.jax_frontend.route import Routing, normalised, score, top_k

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


def aux_loss(
    scores_TE: Float[Array, "T E"],
    load_E: Int[Array, " E"],
    token_mask_T: Bool[Array, " T"],
    k: int,
    *,
    cp_axis: Any = None,
) -> Array:
    """Load-balancing loss, a scalar in scores' dtype; 1 for uniform softmax routing. Not scaled by a coefficient.

    Spec: core.reference.aux_loss. Source: Switch Transformers, arXiv:2101.03961, equation 4.

    Args:
        load_E: of these tokens. cp_axis: devices whose tokens count too, see `sum_over_ranks`; None for these alone.
    """
    sum_E = _valid(scores_TE, token_mask_T).sum(0)
    n, load_E, sum_E = sum_over_ranks((_count(token_mask_T), load_E, sum_E), cp_axis)
    n = jnp.maximum(n, 1).astype(sum_E.dtype)
    share_E = load_E.astype(sum_E.dtype) * load_E.shape[0] / (k * n)
    return (share_E * (sum_E / n)).sum()


def z_loss(logits_TE: Float[Array, "T E"], token_mask_T: Bool[Array, " T"], *, cp_axis: Any = None) -> Array:
    """Mean over valid tokens of logsumexp(logits)^2, a scalar in the accumulate dtype; it keeps logits small.

    Spec: core.reference.z_loss. Source: ST-MoE, arXiv:2202.08906, equation 5.

    Args:
        cp_axis: devices whose tokens count too, see `sum_over_ranks`; None for these alone.
    """
    logsumexp_T = jax.nn.logsumexp(_valid(promoted(logits_TE), token_mask_T), axis=-1)
    total = jnp.where(token_mask_T, jnp.square(logsumexp_T), 0).sum()
    n, total = sum_over_ranks((_count(token_mask_T), total), cp_axis)
    return total / jnp.maximum(n, 1).astype(total.dtype)


def seq_aux_loss(
    logits_TE: Float[Array, "T E"],
    token_mask_T: Bool[Array, " T"],
    config: MoEConfig,
    *,
    n_sequences: int = 1,
    best_TK: Int[Array, "T K"] | None = None,
    cp_axis: Any = None,
) -> Array:
    """Sequence-wise load-balancing loss, a scalar in the accumulate dtype, averaged over sequences with a valid token.

    Spec: core.reference.seq_aux_loss. Source: DeepSeek-V3, arXiv:2412.19437, equations 17 to 20.

    Args:
        n_sequences: the tokens are those of so many sequences of equal length, one after the other.
        best_TK: each token's best K by score, where known; None to rank them here.
        cp_axis: devices that hold other parts of the same sequences, see `sum_over_ranks`; None for these alone.
    Raises:
        ShapeError: the sequences do not divide the tokens.
    """
    checks.logits(logits_TE, config.n_routed_experts)
    (T, E), k = logits_TE.shape, config.n_activated_experts
    if n_sequences < 1 or T % n_sequences:
        raise ShapeError(f"{n_sequences} sequences of equal length", f"{T} tokens", "pass a number that divides them")
    logits_TE = _valid(promoted(logits_TE), token_mask_T)
    best_TK = top_k(lax.stop_gradient(logits_TE), k) if best_TK is None else best_TK
    best_TE = (best_TK[:, :, None] == jnp.arange(E, dtype=best_TK.dtype)).any(1)
    scores_TE = _valid(normalised(score(logits_TE, config.routing_rule)), token_mask_T)

    def per_sequence(value_T: Array, dtype: Any) -> Array:
        return value_T.reshape(n_sequences, T // n_sequences, *value_T.shape[1:]).sum(1, dtype=dtype)

    counts = [per_sequence(value, jnp.int32) for value in (token_mask_T[:, None], best_TE & token_mask_T[:, None])]
    n_B1, load_BE, sum_BE = sum_over_ranks((*counts, per_sequence(scores_TE, scores_TE.dtype)), cp_axis)
    share_BE = load_BE.astype(sum_BE.dtype) * E / (k * jnp.maximum(n_B1, 1).astype(sum_BE.dtype))
    loss_B = (share_BE * (sum_BE / jnp.maximum(n_B1, 1).astype(sum_BE.dtype))).sum(-1)
    return loss_B.sum() / jnp.maximum(_count(n_B1 > 0), 1).astype(sum_BE.dtype)


def losses(
    logits_TE: Float[Array, "T E"],
    routing: Routing,
    load_E: Int[Array, " E"] | None,
    token_mask_T: Bool[Array, " T"],
    config: MoEConfig,
    *,
    n_sequences: int = 1,
    best_TK: Int[Array, "T K"] | None = None,
    cp_axis: Any = None,
) -> dict[str, Array]:
    """The losses that the config asks for, by name and before their coefficients. Spec: core.reference.losses.

    Args:
        load_E: of these tokens; read by the auxiliary loss alone. The others: see `seq_aux_loss`.
    """
    asked, found = config.losses, {}
    if "aux_loss" in asked and load_E is not None:
        k = config.n_activated_experts
        found["aux_loss"] = aux_loss(routing.scores_TE, load_E, token_mask_T, k, cp_axis=cp_axis)
    if "z_loss" in asked:
        found["z_loss"] = z_loss(logits_TE, token_mask_T, cp_axis=cp_axis)
    if "seq_aux_loss" in asked:
        found["seq_aux_loss"] = seq_aux_loss(
            logits_TE, token_mask_T, config, n_sequences=n_sequences, best_TK=best_TK, cp_axis=cp_axis
        )
    return found


def attach_aux_loss(weights_TK: Float[Array, "T K"], loss: Array, scale: Any) -> Array:
    """`weights_TK` unchanged; in backward `loss` receives the gradient `scale`, whatever the weights receive.

    Args:
        scale: a number, or an array of one.
    """
    return _attach_aux_loss(weights_TK, loss, jnp.asarray(scale, loss.dtype))


def sum_over_ranks(values: Sequence[Array], cp_axis: Any) -> list[Array]:
    """Each value summed over the devices of a mesh axis; its gradient is that of this device's part alone.

    The gradient of a loss that every device computes alike from these sums is therefore a device's own share of it:
    where the devices' gradients are added up afterwards, the whole comes out once.

    Args:
        values: of equal shape on every device.
        cp_axis: name of a mesh axis, or several, inside of jax.shard_map or another transformation that names axes;
            None for this device alone. Under jit without shard_map a sum is over all devices by itself.
    """
    if cp_axis is None:
        return list(values)
    return [
        _psum(value, cp_axis) if jnp.issubdtype(value.dtype, jnp.floating) else lax.psum(value, cp_axis)
        for value in values
    ]


@jax.custom_vjp
def _attach_aux_loss(weights_TK: Float[Array, "T K"], loss: Array, scale: Array) -> Array:
    return weights_TK


def _attach_forward(weights_TK: Float[Array, "T K"], loss: Array, scale: Array) -> tuple[Array, Array]:
    # As loss varies: inside shard_map a gradient must vary like what it is the gradient of.
    return weights_TK, scale * jnp.ones_like(loss)


def _attach_backward(dloss: Array, dweights_TK: Float[Array, "T K"]) -> tuple[Array, Array, None]:
    return dweights_TK, dloss, None


_attach_aux_loss.defvjp(_attach_forward, _attach_backward)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _psum(value: Array, axis: Any) -> Array:
    total: Array = lax.psum(value, axis)
    return total


def _psum_forward(value: Array, axis: Any) -> tuple[Array, Array]:
    return _psum(value, axis), jnp.zeros_like(value)


def _psum_backward(axis: Any, zero: Array, dtotal: Array) -> tuple[Array]:
    # Not psum's own transpose, which without check_vma would add the gradients up here already. The zero varies as
    # value does, see above.
    return (dtotal + zero,)


_psum.defvjp(_psum_forward, _psum_backward)


def _valid(value_TE: Float[Array, "T E"], token_mask_T: Bool[Array, " T"]) -> Array:
    """A masked token's values, whatever they are, replaced by zeros."""
    return jnp.where(token_mask_T[:, None], value_TE, 0)


def _count(mask: Array) -> Array:
    return mask.sum(dtype=jnp.int32)
