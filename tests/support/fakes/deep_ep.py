"""Stand-ins for DeepEP's three buffers, over gloo on the CPU: v1.2.1's, ElasticBuffer's and HybridEPBuffer's.

As strict as the libraries: what those assert on the host or trap on the device is an AssertionError here, on the rank
that did it. What they leave unwritten is NaN, or an id that is none. What was asked for asynchronously is unwritten
until its event was waited for, and what was handed over may not change before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fakes import forget

CALLS: list[tuple[str, dict[str, Any]]] = []  # of this process
BUFFERS: list[Any] = []
NOTHING = -(2**31)  # an id that nobody wrote
_CHANCE = torch.Generator()  # of which no checkpoint keeps the state
topk_idx_t = torch.int64


# --------------------------------------------------------------------------------------------------------------- events
class EventHandle:
    """A moment on a stream; what was asked for before it is written when it is waited for."""

    def __init__(self, write: Callable[[], None] | None = None):
        self._write = write

    def current_stream_wait(self) -> None:
        """Write it."""
        write, self._write = self._write, None
        if write is not None:
            CALLS.append(("waited", {}))
            write()


class EventOverlap:
    """As the package's."""

    def __init__(self, event: EventHandle | None = None):
        self.event = event

    def current_stream_wait(self) -> None:
        """As the package's."""
        assert self.event is not None, "an event of a call that was not asynchronous"
        self.event.current_stream_wait()


def _unwritten(value: Tensor) -> Tensor:
    if value.dtype.is_floating_point:
        return torch.full_like(value, torch.nan)
    return torch.full_like(value, NOTHING) if value.dtype is not torch.bool else torch.zeros_like(value)


def _delivered(asynchronous: bool, outputs: list[Any], inputs: Iterable[Any]) -> tuple[list[Any], EventOverlap]:
    """The outputs, or what they are until the event was waited for."""
    if not asynchronous:
        return outputs, EventOverlap()
    read = [(value, value.clone()) for value in inputs if value is not None]
    early = [None if value is None else _unwritten(value) for value in outputs]

    def write() -> None:
        for value, before in read:
            assert torch.equal(value.view(torch.uint8), before.view(torch.uint8)), "written to while it was under way"
        for empty, value in zip(early, outputs, strict=True):
            if empty is not None:
                empty.copy_(value)

    return early, EventOverlap(EventHandle(write))


# ---------------------------------------------------------------------------------------------------- rows over a group
def _rows(sent: list[Tensor], group: Any, received: list[int]) -> Tensor:
    """Blocks of rows, one for each rank, for theirs."""
    block = torch.cat(sent).contiguous()
    out = block.new_empty(sum(received), *block.shape[1:])
    dist.all_to_all_single(out, block, received, [len(rows) for rows in sent], group=group)
    return out


def _all(value: Tensor, group: Any) -> Tensor:
    """Every rank's value, stacked."""
    gathered = [torch.empty_like(value) for _ in range(group.size())]
    dist.all_gather(gathered, value.contiguous(), group=group)
    return torch.stack(gathered)


def _padded(value: Tensor, rows: int) -> Tensor:
    assert len(value) <= rows, "num_worst_tokens is less than the worst case"
    more = value.new_zeros(rows - len(value), *value.shape[1:])
    return torch.cat([value, _unwritten(more)])


def _local(ids: Tensor, weights: Tensor, held: int, rank: int) -> tuple[Tensor, Tensor]:
    """Ids counted from this rank's first expert, -1 where a slot belongs elsewhere, and 0 for its weight."""
    local = ids - rank * held
    here = (ids >= 0) & (local >= 0) & (local < held)
    return torch.where(here, local, -1), torch.where(here, weights, 0.0)


def _summed(parts: Tensor, where: Tensor, like: Tensor) -> Tensor:
    """[T, ...]: of the rows that came home, those of each token added in float32; where [T, R] is -1 for none."""
    total = torch.zeros(len(where), *parts.shape[1:], dtype=torch.float32)
    for rank in range(where.shape[1]):
        here = where[:, rank] >= 0
        total[here] += parts[where[here, rank].long()].float()
    return total.to(like.dtype)


class _Buffer:
    """What the three have in common: made by all ranks alike, and useless once destroyed."""

    def __init__(self, group: Any, explicitly_destroy: bool, *settings: Any):
        said: list[Any] = [None] * group.size()
        dist.all_gather_object(said, (type(self).__name__, settings), group=group)
        assert len(set(said)) == 1, f"ranks made different buffers: {said}"
        self.group, self.explicitly_destroy, self.destroyed = group, explicitly_destroy, False
        self.rank, self.group_size = group.rank(), group.size()
        self.settings = settings
        BUFFERS.append(self)

    def destroy(self) -> None:
        """With all ranks."""
        assert self.explicitly_destroy, "`explicitly_destroy` flag must be set"
        self._used("destroy")
        dist.barrier(group=self.group)
        self.destroyed = True

    def _used(self, name: str, **told: Any) -> None:
        assert not self.destroyed, "the buffer was destroyed"
        CALLS.append((f"{type(self).__name__}.{name}", told))


# ---------------------------------------------------------------------------------------------------------- v1's Buffer
class Config:
    """As the package's: its fields cannot be read."""

    def __init__(self, num_sms: int, *chunks: int):
        assert num_sms > 0 and len(chunks) == 4 and all(chunk > 0 for chunk in chunks)
        self._sms, self._chunk = num_sms, chunks[1]

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """As the package's."""
        assert num_ranks <= 8 and self._sms % 2 == 0
        return self._sms // 2 * num_ranks * self._chunk * (hidden_bytes + 128 * 12 + 128 * 4)

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Of a build without NVSHMEM."""
        raise AssertionError("NVSHMEM is disabled during compilation")


class Buffer(_Buffer):
    """As v1.2.1's, within a node."""

    num_sms = 20

    def __init__(
        self,
        group: Any,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
    ):
        assert group.size() in (2, 4, 8), "Unsupported ranks"
        assert num_rdma_bytes == 0 and not low_latency_mode, "no NVSHMEM"
        super().__init__(group, explicitly_destroy, num_nvl_bytes)
        self.num_nvl_bytes = num_nvl_bytes

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Of the whole process: not for a library that others may use too."""
        raise AssertionError("set_num_sms is of the whole process")

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """Reads what is set for the whole process."""
        raise AssertionError("get_dispatch_config reads what is set for the whole process")

    @staticmethod
    def capture() -> EventOverlap:
        """Now."""
        return EventOverlap(EventHandle())

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, ...]:
        """As the package's."""
        self._used("get_dispatch_layout")
        self._events(previous_event, async_finish, allocate_on_comm_stream)
        assert topk_idx.dim() == 2 and topk_idx.is_contiguous() and topk_idx.dtype == torch.int64 and num_experts > 0
        assert num_experts % self.group_size == 0
        held = num_experts // self.group_size
        ranks = torch.where(topk_idx >= 0, topk_idx // held, -1)
        goes = (ranks[:, :, None] == torch.arange(self.group_size)).any(1)
        counts = torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts).int()
        outputs, event = _delivered(async_finish, [goes.sum(0).int(), None, counts, goes], [topk_idx])
        # A second queue after the same stream: dispatch reads them when they are there.
        self._layout = (outputs, [goes.sum(0).int(), None, counts, goes]) if async_finish else None
        return (*outputs, event)

    def dispatch(
        self,
        x: Tensor,
        handle: tuple[Tensor, ...] | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, ...]:
        """As the package's; a cached one moves x alone."""
        self._used("dispatch", cached=handle is not None, worst=num_worst_tokens, asynchronous=async_finish)
        self._events(previous_event, async_finish, allocate_on_comm_stream)
        self._config(config, x)
        if handle is not None:
            assert topk_idx is None and topk_weights is None, "a cached dispatch takes no top-k"
            assert num_tokens_per_rank is is_token_in_rank is num_tokens_per_expert is None
            return self._cached(x, handle, config, async_finish)
        assert topk_idx is not None and topk_weights is not None and is_token_in_rank is not None
        assert num_tokens_per_rank is not None and num_tokens_per_expert is not None
        if self._layout is not None and previous_event is not None:
            for early, value in zip(*self._layout, strict=True):
                if early is not None:
                    early.copy_(value)
        assert len(topk_idx) == len(topk_weights) == len(is_token_in_rank) == len(x)
        assert topk_idx.dtype == torch.int64 and topk_idx.is_contiguous() and topk_idx.shape == topk_weights.shape
        assert topk_weights.dtype == torch.float32 and topk_weights.is_contiguous() and topk_idx.shape[1] <= 32
        held = len(num_tokens_per_expert) // self.group_size
        assert held <= 128, "kNumThreads"
        goes, R, me = is_token_in_rank, self.group_size, self.rank
        counts = _all(num_tokens_per_rank, self.group)  # [from][to]
        received = counts[:, me].tolist()
        tokens = [goes[:, rank].nonzero()[:, 0] for rank in range(R)]
        x_S, ids_S, weights_S, source_S = (
            _rows([value[own] for own in tokens], self.group, received)
            for value in (x, topk_idx, topk_weights, torch.arange(len(x), dtype=torch.int32))
        )
        ids_S, weights_S = _local(ids_S, weights_S, held, me)
        if num_worst_tokens:
            x_S, weights_S, source_S = (_padded(value, num_worst_tokens) for value in (x_S, weights_S, source_S))
            ids_S = torch.cat([ids_S, ids_S.new_full((num_worst_tokens - len(ids_S), ids_S.shape[1]), -1)])
            per_expert: list[int] = []
        else:
            of_expert = torch.bincount(ids_S[ids_S >= 0], minlength=held).tolist()
            per_expert = [-(-count // expert_alignment) * expert_alignment for count in of_expert]
        channels = torch.zeros(R, config._sms // 2, dtype=torch.int32)
        head = torch.where(goes, goes.cumsum(0) - 1, -1).int()
        made = (counts.cumsum(0).int(), channels, channels.clone(), source_S, goes.clone(), head)
        given = [x, topk_idx, topk_weights]
        (x_S, ids_S, weights_S), event = _delivered(async_finish, [x_S, ids_S, weights_S], given)
        return x_S, ids_S, weights_S, per_expert, made, event

    def combine(
        self,
        x: Tensor,
        handle: tuple[Tensor, ...],
        topk_weights: Tensor | None = None,
        bias: Any = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, ...]:
        """As the package's: the unweighted sum over ranks, and the weights' beside it."""
        self._used("combine", weights=topk_weights is not None, asynchronous=async_finish)
        self._events(previous_event, async_finish, allocate_on_comm_stream)
        self._config(config, x)
        prefix, _, channels, source, _, head = handle
        assert channels.shape == (self.group_size, config._sms // 2), "not the number of SMs of the dispatch"
        assert len(x) == len(source) and bias is None
        if topk_weights is not None:
            assert topk_weights.dtype == torch.float32 and topk_weights.is_contiguous() and len(topk_weights) == len(x)
        counts = torch.diff(prefix, dim=0, prepend=torch.zeros_like(prefix[:1]))
        back, own = counts[:, self.rank].tolist(), counts[self.rank].tolist()
        starts = torch.tensor([0, *own]).cumsum(0)[:-1].int()
        where = torch.where(head >= 0, head + starts, -1)
        head[head < 0] = -7  # the kernel writes there too
        outputs: list[Any] = [None, None]
        for place, value in enumerate((x, topk_weights)):
            if value is not None:
                parts = _rows(list(value[: sum(back)].split(back)), self.group, own)
                outputs[place] = _summed(parts, where, value)
        outputs, event = _delivered(async_finish, outputs, [x, topk_weights])
        return (*outputs, event)

    def _cached(self, x: Tensor, handle: tuple[Tensor, ...], config: Any, async_finish: bool) -> tuple[Any, ...]:
        prefix, channels, _, source, goes, _ = handle
        assert channels.shape == (self.group_size, config._sms // 2), "not the number of SMs of the first dispatch"
        assert len(x) == len(goes)
        counts = torch.diff(prefix, dim=0, prepend=torch.zeros_like(prefix[:1]))
        sent = [x[goes[:, rank]] for rank in range(self.group_size)]
        x_S = _padded(_rows(sent, self.group, counts[:, self.rank].tolist()), len(source))
        (x_S,), event = _delivered(async_finish, [x_S], [x])
        return x_S, None, None, None, None, event

    def _config(self, config: Config | None, x: Tensor) -> None:
        assert config is not None, "the default config is of the whole process"
        assert config._sms % 2 == 0
        hidden = x.shape[1]
        assert x.dim() == 2 and x.is_contiguous() and x.dtype == torch.bfloat16, "CUDA_R_16BF"
        assert hidden % 16 == 0 and hidden <= 8176, "device trap: half a row and 8 bytes in 8192"
        need = config.get_nvl_buffer_size_hint(2 * hidden, self.group_size)
        assert need <= self.num_nvl_bytes, "the buffer is too small"

    def _events(self, previous: EventOverlap | None, asynchronous: bool, on_comm: bool) -> None:
        assert not on_comm or (previous is not None and asynchronous)
        assert previous is None or (isinstance(previous, EventOverlap) and previous.event is not None)


# -------------------------------------------------------------------------------------------------------- ElasticBuffer
class EPHandle:
    """What a dispatch leaves for its way home."""

    def __init__(self, **content: Any):
        vars(self).update(content)


class ElasticBuffer(_Buffer):
    """As 2.1's, without its expanded layout. Rows come in another order each time, unless `deterministic`."""

    def __init__(
        self,
        group: Any,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        explicitly_destroy: bool = False,
    ):
        assert num_max_tokens_per_rank > 0 and hidden > 0 and not use_fp8_dispatch and num_bytes is None
        super().__init__(group, explicitly_destroy, num_max_tokens_per_rank, hidden, num_topk)
        self.most, self.hidden, self.topk, self.deterministic = num_max_tokens_per_rank, hidden, num_topk, deterministic

    def dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        *,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        num_sms: int = 0,
        async_with_compute_stream: bool = False,
        handle: EPHandle | None = None,
        do_cpu_sync: bool | None = None,
    ) -> tuple[Any, ...]:
        """As the package's."""
        self._used("dispatch", cached=handle is not None, reads=do_cpu_sync, asynchronous=async_with_compute_stream)
        self._fits(x)
        if handle is not None:
            assert topk_idx is None and not do_cpu_sync, "Cannot do CPU sync with cached handle"
            assert num_sms, "the estimate of num_sms does not know the number of experts"
            assert num_sms == handle.num_sms and topk_weights is None
            x_S = self._shuffled(_rows([x[own] for own in handle.tokens], self.group, handle.received), handle)
            (x_S,), event = _delivered(async_with_compute_stream, [_padded(x_S, handle.rows)], [x])
            return x_S, None, None, handle, event
        assert topk_idx is not None and topk_weights is not None and num_experts is not None and num_sms % 2 == 0
        assert topk_idx.dtype == topk_idx_t and topk_idx.is_contiguous() and topk_idx.shape[1] <= min(32, self.topk)
        assert topk_weights.dtype == torch.float32 and topk_weights.is_contiguous()
        assert num_experts % self.group_size == 0 and num_experts <= 2048 and num_experts // self.group_size <= 256
        held, R = num_experts // self.group_size, self.group_size
        ranks = torch.where(topk_idx >= 0, topk_idx // held, -1)
        goes = (ranks[:, :, None] == torch.arange(R)).any(1)
        counts = _all(goes.sum(0), self.group)
        received, tokens = counts[:, self.rank].tolist(), [goes[:, rank].nonzero()[:, 0] for rank in range(R)]
        order = torch.arange(sum(received)) if self.deterministic else torch.randperm(sum(received), generator=_CHANCE)
        rows = sum(received) if do_cpu_sync in (None, True) else R * self.most
        made = EPHandle(
            num_sms=num_sms,
            num_experts=num_experts,
            topk_idx=topk_idx.clone(),
            psum_num_recv_tokens_per_scaleup_rank=counts[:, self.rank].cumsum(0).int(),
            tokens=tokens,
            received=received,
            sent=counts[self.rank].tolist(),
            order=order,
            rows=rows,
            goes=goes,
            of=self,
        )
        x_S, ids_S, weights_S = (
            self._shuffled(_rows([value[own] for own in tokens], self.group, received), made)
            for value in (x, topk_idx, topk_weights)
        )
        # A slot that belongs elsewhere keeps its weight. Past the last row nothing is marked: an id may look like one.
        ids_S, _ = _local(ids_S, weights_S, held, self.rank)
        ids_S = torch.cat([ids_S, ids_S.new_zeros(rows - len(ids_S), ids_S.shape[1])])
        outputs, event = _delivered(
            async_with_compute_stream,
            [_padded(x_S, rows), ids_S, _padded(weights_S, rows)],
            [x, topk_idx, topk_weights],
        )
        return (*outputs, made, event)

    def combine(
        self,
        x: Tensor,
        handle: EPHandle,
        topk_weights: Tensor | None = None,
        bias: Any = None,
        num_sms: int = 0,
        async_with_compute_stream: bool = False,
    ) -> tuple[Any, ...]:
        """As the package's."""
        self._used("combine", weights=topk_weights is not None, asynchronous=async_with_compute_stream)
        assert handle.of is self, "a handle of another buffer"
        assert num_sms in (0, handle.num_sms) and bias is None and len(x) == handle.rows
        assert x.dtype == torch.bfloat16 and x.is_contiguous() and x.shape[1] % 256 == 0
        starts = torch.tensor([0, *handle.sent]).cumsum(0)[:-1]
        where = torch.where(handle.goes, handle.goes.cumsum(0) - 1 + starts, -1)
        outputs: list[Any] = [None, None]
        for place, value in enumerate((x, topk_weights)):
            if value is not None:
                assert place == 0 or (value.dtype == torch.float32 and value.is_contiguous())
                sorted_ = torch.empty_like(value[: sum(handle.received)])
                sorted_[handle.order] = value[: sum(handle.received)]
                parts = _rows(list(sorted_.split(handle.received)), self.group, handle.sent)
                outputs[place] = _summed(parts, where, value)
        outputs, event = _delivered(async_with_compute_stream, outputs, [x, topk_weights])
        return (*outputs, event)

    def _shuffled(self, rows: Tensor, handle: EPHandle) -> Tensor:
        return rows[handle.order]

    def _fits(self, x: Tensor) -> None:
        assert x.dim() == 2 and x.is_contiguous() and x.dtype == torch.bfloat16
        assert x.shape[1] % 256 == 0, "static assertion of the combine kernel"
        assert 0 < len(x) <= self.most and x.shape[1] <= self.hidden, "the buffer is too small"


# ------------------------------------------------------------------------------------------------------- HybridEPBuffer
class HybridEPBuffer(_Buffer):
    """As the branch hybrid-ep's, with its permutation and without fused steps."""

    def __init__(
        self,
        group: Any,
        hidden_dim: int,
        max_num_of_tokens_per_rank: int,
        num_local_experts: int,
        use_fp8: bool = False,
        num_sms_dispatch_api: int | None = None,
        num_sms_combine_api: int | None = None,
        num_sms_preprocessing_api: int | None = None,
    ):
        assert group.size() > 1 and num_local_experts * group.size() % 4 == 0 and hidden_dim % 16 == 0 and not use_fp8
        super().__init__(group, True, hidden_dim, max_num_of_tokens_per_rank, num_local_experts)
        self.hidden, self.most, self.held = hidden_dim, max_num_of_tokens_per_rank, num_local_experts

    destroy = property()  # it has none

    def dispatch_with_permute(
        self,
        *,
        hidden: Tensor,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        num_of_experts_per_rank: int | None = None,
        num_of_experts: int | None = None,
        routing_map: Tensor | None = None,
        probs: Tensor | None = None,
        num_permuted_tokens: int | None = None,
        pad_multiple: int | None = None,
        handle: tuple[Any, ...] | None = None,
        non_blocking: bool = False,
    ) -> tuple[Any, ...]:
        """As the package's."""
        routes = 0 if routing_map is None else int(routing_map.sum())
        self._used("dispatch_with_permute", cached=handle is not None, tokens=len(hidden), routes=routes)
        assert hidden.dtype == torch.bfloat16 and hidden.is_contiguous() and hidden.shape[1] == self.hidden
        assert topk_idx is None or (topk_idx >= 0).all(), "scatter: index out of bounds"
        assert topk_idx is None and pad_multiple is None, "not in this stand-in"
        assert not non_blocking or num_permuted_tokens is not None, "num_permuted_tokens is required"
        tokens = _all(torch.tensor(len(hidden)), self.group)
        assert (tokens == tokens[0]).all() and 0 < tokens[0] <= self.most, f"hangs: {tokens.tolist()} tokens"
        assert tokens[0] % 64 == 0, "hangs: odd numbers of tokens"
        if handle is None:
            assert routing_map is not None and routing_map.dtype == torch.bool and routing_map.is_contiguous()
            assert probs is not None and probs.dtype == torch.float32 and probs.is_contiguous()
            assert num_of_experts_per_rank == self.held
            assert routing_map.shape == probs.shape == (len(hidden), self.held * self.group_size)
            mine = slice(self.rank * self.held, (self.rank + 1) * self.held)
            routes = _all(routing_map.int(), self.group)[:, :, mine].bool().reshape(-1, self.held)
            pairs = routes.t().nonzero()  # sorted by expert, then by token of all ranks
            sizes = routes.sum(0)
        else:
            assert routing_map is None and probs is None and num_permuted_tokens is not None
            pairs, sizes, _, rows, was_blocking = handle
            assert num_permuted_tokens == rows and non_blocking != was_blocking
        rows = len(pairs) if num_permuted_tokens is None else num_permuted_tokens
        everyone = _all(hidden, self.group).flatten(0, 1)
        x_R = _padded(everyone[pairs[:, 1]], rows)
        probs_R = None
        if probs is not None:
            probs_R = _padded(
                _all(probs, self.group).flatten(0, 1)[pairs[:, 1], pairs[:, 0] + self.rank * self.held], rows
            )
        made = (pairs, sizes, len(hidden), rows, not non_blocking) if handle is None else handle
        return x_R, probs_R, None, sizes, made

    def combine_with_unpermute(
        self,
        *,
        hidden: Tensor,
        probs: Tensor | None = None,
        handle: tuple[Any, ...] | None = None,
        pad_multiple: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As the package's: a rank's rows of a token are added and rounded, then the ranks' are."""
        self._used("combine_with_unpermute", weights=probs is not None)
        assert handle is not None and hidden.dtype == torch.bfloat16 and hidden.is_contiguous() and pad_multiple is None
        pairs, _, tokens, rows, _ = handle
        assert len(hidden) == rows
        total = tokens * self.group_size
        part = torch.zeros(total, hidden.shape[1]).index_add_(0, pairs[:, 1], hidden[: len(pairs)].float())
        mine = slice(self.rank * tokens, (self.rank + 1) * tokens)
        y = _all(part.bfloat16(), self.group).float().sum(0).bfloat16()[mine]
        if probs is None:
            return y, None
        assert probs.dtype == torch.float32 and probs.shape == (rows,) and probs.is_contiguous()
        spread = torch.zeros(total, self.held * self.group_size)
        spread[pairs[:, 1], pairs[:, 0] + self.rank * self.held] = probs[: len(pairs)]
        return y, _all(spread, self.group).sum(0)[mine]


# -------------------------------------------------------------------------------------------------------------- install
CLASSES = {"Buffer": Buffer, "ElasticBuffer": ElasticBuffer, "HybridEPBuffer": HybridEPBuffer}


def install(*names: str, module: str = "deep_ep") -> None:
    """Make a module importable in this process that has these of the classes; for a rank, which ends with its process.

    Args:
        module: "deep_ep", or one of those that UCCL's class was found in.
    """
    for place in (module.partition(".")[0], module):
        made = sys.modules.setdefault(place, ModuleType(place))
        made.__spec__, made.__path__ = ModuleSpec(place, None), []
    vars(made).update({name: CLASSES[name] for name in names}, Config=Config, topk_idx_t=topk_idx_t, __version__="9.9")
    forget()


def ready() -> None:
    """All of DeepEP's classes and UCCL's in this process, and dispatchers that take CPU tensors to them."""
    from moebius.torch_frontend import dispatch_limits

    install(*CLASSES)
    install("Buffer", module="uccl.ep")
    dispatch_limits.DEVICES = ("cuda", "meta", "cpu")


def made(name: str, dim: int, n_experts: int, k: int, combine_dtype: str | None = None, **options: Any) -> Any:
    """The dispatcher of that name over the default group."""
    from moebius.torch_frontend.dispatch import DISPATCHERS, Options

    build = DISPATCHERS.implementation(DISPATCHERS[name])
    return build(dist.group.WORLD, combine_dtype, Options(dim, n_experts, k, **options))
