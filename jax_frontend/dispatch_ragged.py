"""Dispatcher "ragged_all_to_all": as "alltoall", but what travels is as many rows as there are tokens to send.

XLA has that collective on GPUs and TPUs; elsewhere blocks of a full size travel, with the same result. Shapes are
static all the same: there is memory for every token of every device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from moebius.jax_frontend.dispatch_alltoall import slots_of
from moebius.jax_frontend.dispatch_ranks import OverRanks
from moebius.jax_frontend.transport import Layout, added, swap, varying

if TYPE_CHECKING:
    from jaxtyping import Int

# Where XLA has the collective.
_PLATFORMS = ("cuda", "rocm", "tpu")


class Blocks(NamedTuple):
    """One direction of the exchange: each rank's block in a buffer of rows.

    Attributes:
        starts_n: first row of each rank's block here. sizes_n: its rows.
        there_n: first row, in each rank's buffer, of what comes from or goes to this one.
    """

    starts_n: Int[Array, " n"]
    sizes_n: Int[Array, " n"]
    there_n: Int[Array, " n"]


class Ragged(NamedTuple):
    """Who goes where.

    Attributes:
        token_P: int32, the token in each row to send, block after block, T for none. P = T * min(n, K).
        row_Tn: int32, the row that each token has for each rank, P for none.
        sent, received: the blocks of both buffers.
    """

    token_P: Int[Array, " P"]
    row_Tn: Int[Array, "T n"]
    sent: Blocks
    received: Blocks


@dataclass(frozen=True)
class RaggedAllToAll(OverRanks):
    """Each device sends each rank the tokens that have a route there, and nothing else."""

    def layout(self, ids_TK: Int[Array, "T K"], e: int) -> tuple[Layout, Array]:
        """See OverRanks; the ranks tell one another how many tokens they send."""
        (T, K), n = ids_TK.shape, self.ranks
        n_rows = T * min(n, K)
        slots, routes_Tn = slots_of(ids_TK, e, n, T)
        sizes_n = jnp.sum(routes_Tn > 0, axis=0, dtype=jnp.int32)
        starts_n = _before(sizes_n)
        row_Tn = jnp.where(slots.place_Tn < T, slots.place_Tn + starts_n, n_rows)
        tokens_T1 = jnp.arange(T, dtype=jnp.int32)[:, None]
        token_P = jnp.full(n_rows, T, jnp.int32).at[row_Tn].set(tokens_T1, mode="drop")
        sizes_nn = lax.all_gather(sizes_n, self.axis)  # [from, to]
        me = lax.axis_index(self.axis)
        arriving_n = sizes_nn[:, me]
        sent = Blocks(starts_n, sizes_n, _before(sizes_nn)[me])
        received = Blocks(_before(arriving_n), arriving_n, _before(sizes_nn.T)[me])
        return Ragged(token_P, row_Tn, sent, received), jnp.zeros(T, jnp.int32)

    def send(self, x: Array, layout: Ragged) -> Array:
        """See Transport; S = ranks * T."""
        rows_P = x.at[layout.token_P].get(mode="fill", fill_value=0)
        return self._exchange(rows_P, self.ranks * x.shape[0], layout.sent, layout.received, x.shape[0])

    def back(self, y: Array, layout: Ragged) -> Array:
        """See Transport."""
        T = layout.row_Tn.shape[0]
        rows_P = self._exchange(y, layout.token_P.shape[0], layout.received, layout.sent, T)
        parts_Tn = rows_P.at[layout.row_Tn].get(mode="fill", fill_value=0)
        return added(jnp.moveaxis(parts_Tn, 1, 0))

    def _exchange(self, rows: Array, n_out: int, ours: Blocks, theirs: Blocks, longest: int) -> Array:
        """[n_out, ...]: this rank's blocks sent, the others' in their places, zeros elsewhere."""
        rows, out = varying(self.axis, rows, jnp.zeros((n_out, *rows.shape[1:]), rows.dtype))

        def ragged(rows: Array, out: Array) -> Array:
            sizes = ours.sizes_n, ours.there_n, theirs.sizes_n
            done: Array = lax.ragged_all_to_all(rows, out, ours.starts_n, *sizes, axis_name=self.axis)
            return done

        def padded(rows: Array, out: Array) -> Array:
            places = jnp.arange(longest, dtype=jnp.int32)
            blocks = rows.at[ours.starts_n[:, None] + places].get(mode="fill", fill_value=0)
            arrived = swap(self.axis, blocks)
            inside = places < theirs.sizes_n[:, None]
            at = jnp.where(inside, theirs.starts_n[:, None] + places, n_out)
            return out.at[at].set(arrived, mode="drop")

        return lax.platform_dependent(rows, out, default=padded, **dict.fromkeys(_PLATFORMS, ragged))


def _before(sizes: Array) -> Array:
    """Along the first axis: the sum of all before."""
    return jnp.cumsum(sizes, axis=0, dtype=jnp.int32) - sizes
