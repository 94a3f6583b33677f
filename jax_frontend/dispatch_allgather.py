"""Dispatcher "allgather": every rank gathers all tokens, and the ranks' outputs are added.

Nothing is counted and nothing can drop. Sums go through an all-to-all, not a reduction: 16-bit numbers travel in 16
bits and are still added promoted, in the order of the ranks, whatever a network would do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import Array, lax

from moebius.jax_frontend.dispatch_ranks import OverRanks
from moebius.jax_frontend.transport import Layout, added, swap

if TYPE_CHECKING:
    from jaxtyping import Int


@dataclass(frozen=True)
class AllGather(OverRanks):
    """Each device computes its own experts' routes of all tokens; as many tokens on each."""

    def layout(self, ids_TK: Int[Array, "T K"], e: int) -> tuple[Layout, Array]:
        """Every token goes everywhere."""
        return (), jnp.zeros(ids_TK.shape[0], jnp.int32)

    def send(self, x: Array, layout: Layout) -> Array:
        """See Transport; S = ranks * T."""
        return lax.all_gather(x, self.axis, tiled=True)

    def back(self, y: Array, layout: Layout) -> Array:
        """See Transport."""
        return added(swap(self.axis, y.reshape(self.ranks, y.shape[0] // self.ranks, *y.shape[1:])))
