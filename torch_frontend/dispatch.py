"""Steps 3 and 9: tokens to the ranks that hold their experts, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from moebius.core.registry import Problem, Registry
from moebius.torch_frontend.dtypes import promoted

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class Sent(NamedTuple):
    """What this rank has to compute.

    Attributes:
        x_SD: tokens. weights_SK: routing weights, promote_types(x.dtype, float32).
        ids_SK: int32, counted from this rank's first expert; e stands for no route.
    """

    x_SD: Float[Tensor, "S D"]
    weights_SK: Float[Tensor, "S K"]
    ids_SK: Int[Tensor, "S K"]


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
        x_TD: Float[Tensor, "T D"],
        weights_TK: Float[Tensor, "T K"],
        ids_TK: Int[Tensor, "T K"],
        token_mask_T: Bool[Tensor, " T"],
        n_experts: int,
    ) -> tuple[Sent, Any]:
        """Tokens, weights and local ids for this rank, and the state that `combine` takes; n_experts is E."""
        ...

    def combine(self, y_SD: Float[Tensor, "S D"], state: Any) -> Tensor:
        """[T, D]: this rank's tokens, summed over the ranks; of several ranks, y_SD is in the accumulate dtype."""
        ...


class Local:
    """One rank holds every expert: nothing moves. Spec: core.reference.dispatch with a list of one."""

    ranks = 1
    rank = 0

    def dispatch(
        self,
        x_TD: Float[Tensor, "T D"],
        weights_TK: Float[Tensor, "T K"],
        ids_TK: Int[Tensor, "T K"],
        token_mask_T: Bool[Tensor, " T"],
        n_experts: int,
    ) -> tuple[Sent, None]:
        """Promote the weights; a masked token, -1 and any id outside [0, n_experts) becomes n_experts: no route."""
        ids_TK = routed(ids_TK, token_mask_T, n_experts, n_experts)
        return Sent(x_TD, promoted(weights_TK, x_TD.dtype), ids_TK), None

    def combine(self, y_SD: Float[Tensor, "S D"], state: None) -> Tensor:
        """`y_SD` itself."""
        return y_SD


def routed(ids_TK: Int[Tensor, "T K"], token_mask_T: Bool[Tensor, " T"], n_experts: int, no_route: int) -> Tensor:
    """int32 ids, with `no_route` for a masked token, -1 and any id outside [0, n_experts)."""
    here_TK = (ids_TK >= 0) & (ids_TK < n_experts) & token_mask_T[:, None]
    # Compared before it is narrowed, so that an int64 id beyond 2^31 cannot wrap into range.
    return torch.where(here_TK, ids_TK, no_route).to(torch.int32)


def _one_rank(problem: Problem) -> str | None:
    return None if problem.ranks == 1 else f"it moves nothing, and the experts lie on {problem.ranks} ranks"


def _with_distributed(problem: Problem) -> str | None:
    if problem.ranks == 1 or torch.distributed.is_available():
        return None
    return f"the experts lie on {problem.ranks} ranks, and this build of torch has no torch.distributed"


def _local(group: Any = None, combine_dtype: str | None = None) -> Dispatcher:
    return Local()


def _allgather(group: Any = None, combine_dtype: str | None = None) -> Dispatcher:
    if group is None:
        return Local()
    from moebius.torch_frontend.dispatch_allgather import AllGather  # which imports this file

    return AllGather(group, combine_dtype)


def _alltoall(group: Any = None, combine_dtype: str | None = None) -> Dispatcher:
    if group is None:
        return Local()
    from moebius.torch_frontend.dispatch_alltoall import AllToAll

    return AllToAll(group, combine_dtype)


# An implementation is called with the process group over which the experts are spread, None for one rank, and with
# BackendConfig.combine_dtype.
DISPATCHERS = Registry("moebius.torch_frontend", "dispatch")
DISPATCHERS.add(name="local", load=lambda: _local, supports=_one_rank, note="one rank")
DISPATCHERS.add(
    name="allgather",
    load=lambda: _allgather,
    supports=_with_distributed,
    reads_host=True,
    note="every rank sees all tokens; any number of ranks",
)
DISPATCHERS.add(
    name="alltoall",
    load=lambda: _alltoall,
    supports=_with_distributed,
    reads_host=True,
    note="a token travels once to each rank that holds one of its experts; any number of ranks",
)
DISPATCHERS.add_unbuilt("deepep", "hybridep", "uccl_ep", "te", "mok")
