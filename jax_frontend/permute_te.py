"""Backend "te" of steps 4 and 8: Transformer Engine's Triton kernels, which read each token once and write its rows.

They take a map of tokens to experts, so an expert that a token names twice has one row, with the sum of both weights:
the same output. Rows are sorted by expert, then token, as moebius' own; what lies past them is left unwritten, and
zero here. Their gradients have reverse mode alone. Under jit over several devices each permutes its own tokens, as
inside of shard_map with check_vma=False. With check_vma=True they are refused: see matmul_te.refuse_checked.
Source: jax/permutation.py of Transformer Engine 2.20.2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
from jax import Array

from moebius.jax_frontend.dispatch import Sent
from moebius.jax_frontend.dtypes import promoted
from moebius.jax_frontend.matmul_te import check_version, refuse_checked, row_experts
from moebius.jax_frontend.permute import Permuted

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class MapState(NamedTuple):
    """The package's own state, and how many rows there are.

    Attributes:
        row_id_map: [S, 2 e + 1] int32, as `token_dispatch` returned it. end: [] int32, sum of the group sizes.
    """

    row_id_map: Int[Array, "S X"]
    end: Int[Array, ""]


def load() -> None:
    """Load the package and its Triton kernels.

    Raises:
        BackendUnavailable: it is too old. Otherwise whatever its import raises.
    """
    check_version()
    import transformer_engine.jax.triton_extensions  # noqa: F401 - permutation.py itself is silent where it fails


def permute(sent: Sent, n_experts: int) -> Permuted:
    """See permute.permute; at least one slot.

    Raises:
        Unsupported: inside shard_map with check_vma=True.
    """
    refuse_checked("permute backend 'te'", *sent)
    from transformer_engine.jax.permutation import token_dispatch

    S, K = sent.ids_SK.shape
    place = jnp.arange(S, dtype=jnp.int32)[:, None], sent.ids_SK
    map_Se = jnp.zeros((S, n_experts), jnp.int32).at[place].set(1, mode="drop")
    weights_Se = jnp.zeros((S, n_experts), sent.weights_SK.dtype).at[place].add(sent.weights_SK, mode="drop")
    rows_RD, marked_R, row_id_map, _, group_sizes_e = token_dispatch(
        sent.x_SD, map_Se, S * K, probs=_without_zeros(weights_Se)
    )
    end = jnp.sum(group_sizes_e, dtype=jnp.int32)
    inside_R = _inside(S * K, end)
    return Permuted(
        rows_RD=jnp.where(inside_R[:, None], rows_RD, 0),
        row_weights_R=_with_zeros(jnp.where(inside_R, marked_R, 0)),
        group_sizes_e=group_sizes_e.astype(jnp.int32),
        row_experts_R=row_experts(S * K, group_sizes_e),
        state=MapState(row_id_map, end),
    )


def unpermute(
    out_RD: Float[Array, "R D"],
    state: MapState,
    row_weights_R: Float[Array, " R"] | None = None,
    *,
    partial: bool = False,
) -> Array:
    """See permute.unpermute. The kernel adds in float32 and rounds to the dtype of its rows.

    Raises:
        Unsupported: inside shard_map with check_vma=True.
    """
    from transformer_engine.jax.permutation import token_combine

    dtype = out_RD.dtype
    # The gradient of what lies past the end is left unwritten: this makes it zero.
    out_RD = jnp.where(_inside(out_RD.shape[0], state.end)[:, None], out_RD, 0)
    if partial or row_weights_R is not None:
        out_RD = promoted(out_RD)
    if row_weights_R is not None:
        out_RD = out_RD * row_weights_R[:, None]
    refuse_checked("permute backend 'te'", out_RD, state.row_id_map)
    summed: Array = token_combine(out_RD, state.row_id_map)
    return summed if partial else summed.astype(dtype)


def _without_zeros(weights: Array) -> Array:
    """The kernel writes zeros in place of a token whose weight is 0, and the weight's gradient would be lost."""
    tiny = jnp.finfo(weights.dtype).tiny
    return weights + jnp.where(weights == 0, tiny, 0)


def _with_zeros(marked: Array) -> Array:
    tiny = jnp.finfo(marked.dtype).tiny
    return marked - jnp.where(marked == tiny, tiny, 0)


def _inside(n_rows: int, end: Array) -> Array:
    return jnp.arange(n_rows, dtype=jnp.int32) < end
