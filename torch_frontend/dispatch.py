"""Steps 3 and 9: tokens to the ranks that hold their experts, and back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from moebius.core.registry import Problem, Registry
from moebius.torch_frontend import launch
from moebius.torch_frontend.dispatch_limits import Options, against, require_counts
from moebius.torch_frontend.dtypes import promoted
from moebius.torch_frontend.operators import unwatched

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class Sent(NamedTuple):
    """What this rank has to compute. `permute` puts it in the order of the experts, alike for every dispatcher.

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
    reads_host = False

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


class During:
    """A dispatcher during whose dispatch something else is computed: where it can, while tokens travel.

    Args:
        dispatcher: one with `begin` and `end`, the halves of `dispatch`, overlaps; with another the work comes first.
        work: called once in each dispatch.
    """

    def __init__(self, dispatcher: Dispatcher, work: Callable[[], None]):
        self.ranks, self.rank = dispatcher.ranks, dispatcher.rank
        self._dispatcher, self._work = dispatcher, work

    def dispatch(
        self,
        x_TD: Float[Tensor, "T D"],
        weights_TK: Float[Tensor, "T K"],
        ids_TK: Int[Tensor, "T K"],
        token_mask_T: Bool[Tensor, " T"],
        n_experts: int,
    ) -> tuple[Sent, Any]:
        """As that dispatcher's."""
        inner: Any = self._dispatcher
        if not hasattr(inner, "begin"):
            self._work()
            sent: tuple[Sent, Any] = inner.dispatch(x_TD, weights_TK, ids_TK, token_mask_T, n_experts)
            return sent
        under_way = inner.begin(x_TD, weights_TK, ids_TK, token_mask_T, n_experts)
        self._work()
        arrived: tuple[Sent, Any] = inner.end(under_way)
        return arrived

    def combine(self, y_SD: Float[Tensor, "S D"], state: Any) -> Tensor:
        """As that dispatcher's."""
        return self._dispatcher.combine(y_SD, state)


def routed(ids_TK: Int[Tensor, "T K"], token_mask_T: Bool[Tensor, " T"], n_experts: int, no_route: int) -> Tensor:
    """int32 ids, with `no_route` for a masked token, -1 and any id outside [0, n_experts)."""
    if unwatched(ids_TK, token_mask_T) and launch.serves(ids_TK, token_mask_T):
        return launch.mask_routes(ids_TK, token_mask_T, n_experts, no_route)
    here_TK = (ids_TK >= 0) & (ids_TK < n_experts) & token_mask_T[:, None]
    # Compared before it is narrowed, so that an int64 id beyond 2^31 cannot wrap into range.
    return torch.where(here_TK, ids_TK, no_route).to(torch.int32)


def _one_rank(problem: Problem) -> str | None:
    return None if problem.ranks == 1 else f"it moves nothing, and the experts lie on {problem.ranks} ranks"


def _with_distributed(problem: Problem) -> str | None:
    if problem.ranks == 1 or torch.distributed.is_available():
        return None
    return f"the experts lie on {problem.ranks} ranks, and this build of torch has no torch.distributed"


def _local(group: Any = None, combine_dtype: str | None = None, options: Options | None = None) -> Dispatcher:
    return Local()


def _allgather(group: Any = None, combine_dtype: str | None = None, options: Options | None = None) -> Dispatcher:
    if group is None:
        return Local()
    from moebius.torch_frontend.dispatch_allgather import AllGather  # which imports this file

    return AllGather(group, combine_dtype, None if options is None else options.max_tokens)


def _alltoall(group: Any = None, combine_dtype: str | None = None, options: Options | None = None) -> Dispatcher:
    if group is None:
        return Local()
    if options is not None:
        require_counts("alltoall", options.max_tokens)
    from moebius.torch_frontend.dispatch_alltoall import AllToAll

    return AllToAll(group, combine_dtype)


def _of_library(name: str) -> Callable[..., Dispatcher]:
    """What builds the dispatcher of that name; raises whatever the import of its library raises."""
    module = import_module(f"moebius.torch_frontend.{_FILES[name]}")
    build = module.loaded(name)

    def built(group: Any = None, combine_dtype: str | None = None, options: Options | None = None) -> Dispatcher:
        if group is None:
            return Local()
        dispatcher: Dispatcher = build(group, combine_dtype, options)
        return dispatcher

    return built


_FILES = {
    "deepep": "dispatch_deepep",
    "uccl_ep": "dispatch_deepep",
    "deepep_elastic": "dispatch_elastic",
    "hybridep": "dispatch_hybridep",
    "te": "dispatch_te",
}


def _says(name: str) -> str:
    words: str = import_module(f"moebius.torch_frontend.{_FILES[name]}").says(name)
    return words


def _add_library(**row: Any) -> None:
    name = row["name"]
    DISPATCHERS.add(
        load=partial(_of_library, name),
        supports=partial(against, name),
        says=partial(_says, name),
        only_when_named=True,
        **{"reads_host": True, **row},
    )


# An implementation is called with the process group over which the experts are spread, None for one rank, with
# BackendConfig.combine_dtype, and with Options where there is a group. Libraries are tried where they are named, or
# where all ranks have them: see dispatch_choice.
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
_add_library(
    name="deepep",
    needs=("deep_ep",),
    install="build DeepEP v1.2.1 (PyPI's deep-ep is another)",
    note="DeepEP's Buffer; 2, 4 or 8 GPUs of a node",
)
_add_library(
    name="uccl_ep",
    needs=("uccl",),
    install="build UCCL-EP (ep/ of uccl)",
    note="DeepEP's Buffer by UCCL; 2, 4 or 8 GPUs of a node; never run with the library",
)
_add_library(
    name="deepep_elastic",
    needs=("deep_ep",),
    install="build DeepEP 2.1 with NCCL 2.30.4 or later",
    note="DeepEP's ElasticBuffer; never run with the library",
)
_add_library(
    name="hybridep",
    needs=("deep_ep",),
    install="build DeepEP's branch hybrid-ep",
    note="DeepEP's HybridEPBuffer; every rank is padded to the longest",
)
_add_library(
    name="te",
    needs=("transformer_engine",),
    install="build transformer-engine[pytorch] 2.20 or later with NCCL EP, and NCCL 2.30.4 or later",
    reads_host=False,
    note="Transformer Engine's EP, made once for a process: layers of one size, with dispatcher_max_tokens; "
    "never run with the library",
)
DISPATCHERS.add_unbuilt("mok")
