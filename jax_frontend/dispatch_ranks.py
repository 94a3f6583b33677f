"""What the dispatchers over several ranks share: dispatch and combine round a transport of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from moebius.core.config import BackendConfig
from moebius.core.dispatchers import Choice, order
from moebius.core.errors import ConfigError
from moebius.core.registry import Problem
from moebius.jax_frontend.dispatch import DISPATCHERS, Dispatcher, Sent, routed
from moebius.jax_frontend.dtypes import promoted
from moebius.jax_frontend.sharding import held
from moebius.jax_frontend.transport import Layout, axis_size, collect, spread, varying

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class Spread(NamedTuple):
    """What `combine` needs: where tokens went, like what the output is to be, and how many routes found no room.

    Attributes:
        layout: of the transport. like: [] in x's dtype. dropped_T: int32, of each token.
    """

    layout: Layout
    like: Array
    dropped_T: Int[Array, " T"]


@dataclass(frozen=True)
class OverRanks:
    """A dispatcher over the devices along one axis of a mesh; its subclasses say how tokens travel.

    A token's weights and ids travel with it. Spec: core.reference.dispatch.

    Args:
        axis: of the mesh, inside of jax.shard_map. combine_dtype: in which each rank's part of the output travels,
            None for x's: rounded once more than on one rank.
    """

    axis: str
    combine_dtype: str | None = None

    @property
    def ranks(self) -> int:
        """Devices along the axis."""
        return axis_size(self.axis)

    @property
    def rank(self) -> Any:
        """This device's place on the axis: traced."""
        return lax.axis_index(self.axis)

    def dispatch(
        self,
        x_TD: Float[Array, "T D"],
        weights_TK: Float[Array, "T K"],
        ids_TK: Int[Array, "T K"],
        token_mask_T: Bool[Array, " T"],
        n_experts: int,
    ) -> tuple[Sent, Spread]:
        """Tokens of all ranks with routes to this one's experts, ids counted from the first of them, e for no route.

        Raises:
            ConfigError: the ranks do not divide the experts, or there is no such axis.
        """
        e = held(n_experts, self.ranks)
        ids_TK = routed(ids_TK, token_mask_T, n_experts, -1)
        x_TD, weights_TK, ids_TK = varying(self.axis, x_TD, promoted(weights_TK, x_TD.dtype), ids_TK)
        layout, dropped_T = self.layout(ids_TK, e)
        # Zeros are what comes in rows without a token: no id, and so no route.
        ids_SK = self.send(ids_TK + 1, layout) - 1 - lax.axis_index(self.axis).astype(jnp.int32) * e
        ids_SK = jnp.where((ids_SK >= 0) & (ids_SK < e), ids_SK, e)
        sent = Sent(spread(self, x_TD, layout), spread(self, weights_TK, layout), ids_SK)
        return sent, Spread(layout, jnp.zeros((), x_TD.dtype), dropped_T)

    def combine(self, y_SD: Float[Array, "S D"], state: Spread) -> Array:
        """[T, D]: each of this rank's tokens, its parts added promoted in the order of the ranks, rounded once."""
        dtype = state.like.dtype
        return collect(self, dtype, y_SD.astype(self.combine_dtype or dtype), state.layout)

    def dropped(self, ids_TK: Int[Array, "T K"], token_mask_T: Bool[Array, " T"], n_experts: int) -> Int[Array, " T"]:
        """int32, how many routes of each token find no room in `dispatch`; it moves no token."""
        ids_TK = routed(ids_TK, token_mask_T, n_experts, -1)
        (ids_TK,) = varying(self.axis, ids_TK)
        return self.layout(ids_TK, held(n_experts, self.ranks))[1]

    def layout(self, ids_TK: Int[Array, "T K"], e: int) -> tuple[Layout, Array]:
        """Where tokens go, and [T] int32 how many of their routes find no room; ids in [0, E), -1 for none."""
        raise NotImplementedError

    def send(self, x: Array, layout: Layout) -> Array:
        """See Transport."""
        raise NotImplementedError

    def back(self, y: Array, layout: Layout) -> Array:
        """See Transport."""
        raise NotImplementedError


def candidates(problem: Problem, k: int) -> tuple[Choice, ...]:
    """What None tries for `problem`, the best first."""
    rows = [DISPATCHERS[row] for row in DISPATCHERS.names]
    free = [row.name for row in rows if not row.only_when_named and row.supports(problem) is None]
    return order(problem.ranks, k, available=free)


def check_bound(backend: BackendConfig, ranks: int | None = None) -> None:
    """Refuse a bound, or what of routes beyond it, that would mean nothing.

    Args:
        ranks: over which the experts are spread; None where that is not known yet.
    Raises:
        ConfigError: what of routes beyond a bound, without one; or a bound on one rank.
    """
    bound, overflow = backend.dispatcher_bound, backend.dispatcher_on_overflow
    if bound is None and overflow is not None:
        found, do = "no dispatcher_bound, and without one nothing is dropped", "set one, or leave it out"
        raise ConfigError(f"dispatcher_on_overflow={overflow!r}", found, do)
    if bound is not None and ranks == 1:
        do = "leave it out, or spread the experts over the devices of a mesh"
        raise ConfigError(f"dispatcher_bound={bound} on one rank", "nothing is sent there", do)


def choose_dispatcher(
    name: str | None, problem: Problem, k: int, axis: str | None, backend: BackendConfig
) -> Dispatcher:
    """The dispatcher that `name` means for the ranks of a problem.

    Args:
        name: of moebius.core.config.DISPATCHERS, or None: "alltoall" where there is a bound, for which it is made, else
            the first of moebius.core.dispatchers.order that may be chosen unnamed.
        k: routes of a token. axis: of the mesh; None for one rank.
        backend: its combine_dtype, dispatcher_bound and dispatcher_on_overflow are the dispatcher's.
    Raises:
        ConfigError: a bound with another name than "alltoall". Unsupported: see Registry.choose.
    """
    options: dict[str, Any] = {}
    name = "allgather" if name == "torch" else name
    if axis is not None and backend.dispatcher_bound is not None:
        if name not in (None, "alltoall"):
            asked = f"dispatcher_bound={backend.dispatcher_bound} with the dispatcher {name!r}"
            raise ConfigError(asked, "a bound is alltoall's alone", 'name "alltoall", or leave one of them out')
        name = "alltoall"
        options = {"bound": backend.dispatcher_bound, "on_overflow": backend.dispatcher_on_overflow}
    if name is None:
        name = candidates(problem, k)[0].name
    chosen = DISPATCHERS.choose(name, problem)
    dispatcher: Dispatcher = DISPATCHERS.implementation(chosen)(axis, backend.combine_dtype, **options)
    return dispatcher
