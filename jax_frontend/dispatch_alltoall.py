"""Dispatcher "alltoall": a token travels once to each rank that holds one of its experts.

Shapes are static, so every pair of devices has room for `bound` tokens, used or not. The default, as many as a device
has, can drop nothing and moves what "allgather" moves; a smaller one moves less, and what finds no room has to be
asked for: see `on_overflow`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
from jax import Array

from moebius.core.config import ON_OVERFLOW
from moebius.core.errors import ConfigError
from moebius.jax_frontend.dispatch_ranks import OverRanks, Spread
from moebius.jax_frontend.transport import Layout, added, swap

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class Slots(NamedTuple):
    """Who goes where: a rank's tokens in their order, from place 0 of its block on.

    Attributes:
        token_nC: int32, the token in each place of each rank's block, T for none.
        place_Tn: int32, each token's place in each rank's block, C for none.
    """

    token_nC: Int[Array, "n C"]
    place_Tn: Int[Array, "T n"]


@dataclass(frozen=True)
class AllToAll(OverRanks):
    """Each device sends each rank the tokens that have a route there.

    Args:
        bound: tokens that one device sends another at most; None for all that it has.
        on_overflow: with a smaller bound, what of routes that find no room. "count": they count as no route, see
            `dropped`. "poison": the tokens' outputs are NaN besides.
    """

    bound: int | None = None
    on_overflow: str | None = None

    def __post_init__(self) -> None:
        if self.bound is not None and self.bound < 1:
            raise ConfigError(f"bound={self.bound}", "no room for any token", "use 1 or more, or leave it out")
        if self.on_overflow not in (None, *ON_OVERFLOW):
            raise ConfigError(f"on_overflow={self.on_overflow!r}", f"the choices {ON_OVERFLOW}", "name one of them")

    def combine(self, y_SD: Float[Array, "S D"], state: Spread) -> Array:
        """See OverRanks."""
        y_TD = super().combine(y_SD, state)
        if self.on_overflow != "poison":
            return y_TD
        return jnp.where(state.dropped_T[:, None] > 0, jnp.nan, y_TD)

    def layout(self, ids_TK: Int[Array, "T K"], e: int) -> tuple[Layout, Array]:
        """See OverRanks.

        Raises:
            ConfigError: a bound that may drop, and no word of what then.
        """
        T = ids_TK.shape[0]
        room = T if self.bound is None else min(self.bound, T)
        if room < T and self.on_overflow is None:
            do = 'set on_overflow="count" or "poison", or leave bound out'
            raise ConfigError(f"bound={self.bound} of {T} tokens", "routes that find no room would be dropped", do)
        slots, routes_Tn = slots_of(ids_TK, e, self.ranks, room)
        lost_Tn = (routes_Tn > 0) & (slots.place_Tn == room)
        return slots, jnp.sum(routes_Tn * lost_Tn, axis=1, dtype=jnp.int32)

    def send(self, x: Array, layout: Slots) -> Array:
        """See Transport; S = ranks * bound."""
        blocks_nC = x.at[layout.token_nC].get(mode="fill", fill_value=0)
        received_nC = swap(self.axis, blocks_nC)
        return received_nC.reshape(-1, *x.shape[1:])

    def back(self, y: Array, layout: Slots) -> Array:
        """See Transport."""
        n, room = layout.token_nC.shape
        returned_nC = swap(self.axis, y.reshape(n, room, *y.shape[1:]))
        ranks_n = jnp.arange(n, dtype=jnp.int32)
        parts_Tn = returned_nC.at[ranks_n, layout.place_Tn].get(mode="fill", fill_value=0)
        return added(jnp.moveaxis(parts_Tn, 1, 0))


def slots_of(ids_TK: Int[Array, "T K"], e: int, ranks: int, room: int) -> tuple[Slots, Array]:
    """(who goes where, [T, n] int32 routes of each token to each rank)."""
    T, ranks_n = ids_TK.shape[0], jnp.arange(ranks, dtype=jnp.int32)
    rank_TK = jnp.where(ids_TK < 0, ranks, ids_TK // e)
    routes_Tn = jnp.sum(rank_TK[:, :, None] == ranks_n, axis=1, dtype=jnp.int32)
    goes_Tn = routes_Tn > 0
    place_Tn = jnp.cumsum(goes_Tn, axis=0, dtype=jnp.int32) - 1
    place_Tn = jnp.where(goes_Tn & (place_Tn < room), place_Tn, room)
    tokens_T1 = jnp.arange(T, dtype=jnp.int32)[:, None]
    token_nC = jnp.full((ranks, room), T, jnp.int32).at[ranks_n, place_Tn].set(tokens_T1, mode="drop")
    return Slots(token_nC, place_Tn), routes_Tn
