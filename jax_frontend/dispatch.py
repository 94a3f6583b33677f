"""Steps 3 and 9: tokens to the ranks that hold their experts, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jax import Array

from moebius.core.registry import Problem, Registry
from moebius.jax_frontend.dtypes import promoted

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class Sent(NamedTuple):
    """What this rank has to compute. `permute` puts it in the order of the experts, alike for every dispatcher.

    Attributes:
        x_SD: tokens. weights_SK: routing weights, promote_types(x.dtype, float32).
        ids_SK: int32, counted from this rank's first expert; e stands for no route.
    """

    x_SD: Float[Array, "S D"]
    weights_SK: Float[Array, "S K"]
    ids_SK: Int[Array, "S K"]


@runtime_checkable
class Dispatcher(Protocol):
    """Moves tokens to the ranks that hold their experts. State is returned, never stored.

    Attributes:
        ranks: number of ranks that share the experts. rank: which of them this is; of E experts it holds
            [rank * e, (rank + 1) * e), e = E / ranks.
    """

    ranks: int
    rank: int

    def dispatch(
        self,
        x_TD: Float[Array, "T D"],
        weights_TK: Float[Array, "T K"],
        ids_TK: Int[Array, "T K"],
        token_mask_T: Bool[Array, " T"],
        n_experts: int,
    ) -> tuple[Sent, Any]:
        """Tokens, weights and local ids for this rank, and the state that `combine` takes."""
        ...

    def combine(self, y_SD: Float[Array, "S D"], state: Any) -> Array:
        """[T, D]: each of this rank's tokens, summed over the ranks."""
        ...


# A dataclass, so that two of them are equal: jit compares what a module holds.
@dataclass(frozen=True)
class Local:
    """One rank holds every expert: nothing moves. Spec: core.reference.dispatch with a list of one."""

    ranks = 1
    rank = 0

    def dispatch(
        self,
        x_TD: Float[Array, "T D"],
        weights_TK: Float[Array, "T K"],
        ids_TK: Int[Array, "T K"],
        token_mask_T: Bool[Array, " T"],
        n_experts: int,
    ) -> tuple[Sent, None]:
        """Promote the weights; a masked token, -1 and any id outside [0, n_experts) becomes n_experts: no route."""
        ids_TK = routed(ids_TK, token_mask_T, n_experts, n_experts)
        return Sent(x_TD, promoted(weights_TK, x_TD.dtype), ids_TK), None

    def combine(self, y_SD: Float[Array, "S D"], state: None) -> Array:
        """`y_SD` itself."""
        return y_SD


def routed(ids_TK: Int[Array, "T K"], token_mask_T: Bool[Array, " T"], n_experts: int, no_route: int) -> Array:
    """int32 ids, with `no_route` for a masked token, -1 and any id outside [0, n_experts)."""
    here_TK = (ids_TK >= 0) & (ids_TK < n_experts) & token_mask_T[:, None]
    # Compared before it is narrowed, so that an int64 id beyond 2^31 cannot wrap into range.
    return jnp.where(here_TK, ids_TK, no_route).astype(jnp.int32)


def _one_rank(problem: Problem) -> str | None:
    return None if problem.ranks == 1 else f"it moves nothing, and the experts lie on {problem.ranks} ranks"


def _local(axis: str | None = None, combine_dtype: str | None = None) -> Any:
    return Local()


def _allgather(axis: str | None = None, combine_dtype: str | None = None) -> Any:
    from moebius.jax_frontend.dispatch_allgather import AllGather  # which imports this file

    return AllGather(axis, combine_dtype) if axis else Local()


def _alltoall(
    axis: str | None = None, combine_dtype: str | None = None, bound: int | None = None, on_overflow: str | None = None
) -> Any:
    from moebius.jax_frontend.dispatch_alltoall import AllToAll

    return AllToAll(axis, combine_dtype, bound, on_overflow) if axis else Local()


def _ragged_all_to_all(axis: str | None = None, combine_dtype: str | None = None) -> Any:
    from moebius.jax_frontend.dispatch_ragged import RaggedAllToAll

    return RaggedAllToAll(axis, combine_dtype) if axis else Local()


def _te_supports(problem: Problem) -> str | None:
    from moebius.jax_frontend.dispatch_te import supports

    return supports(problem)


def _load_te() -> Any:
    from moebius.jax_frontend.dispatch_te import TE, load

    load()
    return lambda axis=None, combine_dtype=None: TE(axis, combine_dtype) if axis else Local()


# An implementation is called with the mesh axis over which the experts are spread, None for one rank, with
# BackendConfig.combine_dtype and, of "alltoall", with its bound and what of tokens beyond it.
DISPATCHERS = Registry("moebius.jax_frontend", "dispatch")
DISPATCHERS.add(name="local", load=lambda: _local, supports=_one_rank, note="one rank")
DISPATCHERS.add(name="allgather", load=lambda: _allgather, note="every rank sees all tokens; any number of ranks")
DISPATCHERS.add(
    name="alltoall",
    load=lambda: _alltoall,
    only_when_named=True,
    note="a token travels once to each rank that holds one of its experts, in blocks of one size: "
    "without dispatcher_bound as much as with allgather; any number of ranks",
)
DISPATCHERS.add(
    name="ragged_all_to_all",
    load=lambda: _ragged_all_to_all,
    only_when_named=True,
    note="as alltoall in blocks of any size, on GPUs and TPUs; any number of ranks",
)
DISPATCHERS.add(
    name="te",
    load=_load_te,
    needs=("transformer_engine",),
    install="build transformer-engine[jax] 2.20 or later with NCCL EP, and NCCL 2.30.4 or later",
    supports=_te_supports,
    only_when_named=True,
    note="Transformer Engine's EP, made once for a process by dispatch_te.bootstrap: layers of one size; "
    "never run with the library",
)
DISPATCHERS.add_unbuilt("deepep", "deepep_elastic", "hybridep", "uccl_ep", why="it is PyTorch's alone")
DISPATCHERS.add_unbuilt("mok")
