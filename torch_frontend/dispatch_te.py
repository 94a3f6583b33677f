"""Dispatcher "te": Transformer Engine's expert parallelism, over NCCL EP.

Rows come sorted by expert, one for each route, in a buffer for as many as there could be: nothing is read on the host,
and nothing can overflow. What a token's routes gave is added on the way home, so each of them is rounded to bfloat16
before. Every call has a handle of its own, memory on the device. Two calls may order an expert's rows differently, so
each gradient goes by the handle of the rows it belongs to: it is saved as tensors are, and activation checkpointing,
which sends tokens twice, puts the second handle in the place of the first.

The library is made once for a process, on its one GPU, over one group: for layers of one D, E and K, of any number
of tokens up to the first's. Others are refused in words until the last of these is closed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moebius.core.errors import BackendUnavailable, ConfigError, ShapeError, Unsupported
from moebius.torch_frontend.dispatch import Options, Sent, routed
from moebius.torch_frontend.dispatch_buffer import WIRE, Begun, OverBuffer
from moebius.torch_frontend.dispatch_ranks import not_compiled
from moebius.torch_frontend.dispatch_trip import Trip
from moebius.torch_frontend.dtypes import promoted
from moebius.torch_frontend.liveness import collective, peers

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

# What the number of tokens is rounded up to: the kernels copy maps of routes in pieces of 16 bytes.
_STEP = 4
_OPS = "transformer_engine_ep"  # the library's operators of both directions, as its own autograd calls them
_BACK = ("dispatch_bwd", "combine_bwd")


class Bootstrapped:
    """The library, as it was made for this process.

    Args:
        module: transformer_engine.pytorch.ep. words: what it was made for. rows: that a rank receives at most.
    """

    now: Bootstrapped | None = None

    def __init__(self, module: Any, words: str, rows: int):
        self.module, self.words, self.rows = module, words, rows
        Bootstrapped.now = self

    def destroy(self) -> None:
        """Unmake it, by all ranks together: before the group is destroyed, whose communicator it borrows."""
        Bootstrapped.now = None
        self.module.ep_finalize()


class TE(OverBuffer):
    """Tokens by transformer_engine.pytorch.ep.

    An expert that a token names twice gets it once, with the sum of the weights.

    Args:
        group, combine_dtype, options: see OverBuffer; max_tokens is a number. Every rank gets
            ranks * max_tokens * K rows. module: transformer_engine.pytorch.ep.

    Raises: as OverBuffer. Unsupported: the library was made in this process for others.
    """

    name = "te"
    arrives = "tokens"  # and room for all of their routes

    def __init__(self, group: Any, combine_dtype: str | None, options: Options, *, module: Any):
        self.module = module
        super().__init__(group, combine_dtype, options)

    def key(self) -> tuple[Any, ...]:
        """See OverBuffer."""
        return self.options.dim, self.options.n_experts, self.options.k, self.options.num_sms

    def sizes(self) -> tuple[int, ...]:
        """Tokens of a rank."""
        return (max(1, -(-(self.options.max_tokens or 1) // _STEP)) * _STEP,)

    def make(self, sizes: tuple[int, ...]) -> Bootstrapped:
        """See OverBuffer.

        Raises:
            Unsupported: it was made before, for other layers, for fewer tokens, or by others.
        """
        own, (tokens,) = self.options, sizes
        words = f"D={own.dim}, E={own.n_experts}, K={own.k}, {tokens} tokens, {own.num_sms} SMs, {self.ranks} ranks"
        if self.module.is_ep_bootstrapped():
            made = "by others than moebius" if Bootstrapped.now is None else f"for {Bootstrapped.now.words}"
            made += ", over another process group" if made == f"for {words}" else ""
            do = "name 'alltoall' for one of them; or build the largest dispatcher_max_tokens first, all over one mesh"
            raise Unsupported(f"dispatch backend 'te' for {words}", f"it was made {made}, once for this process", do)
        # A rank may get all routes of all tokens.
        rows = self.ranks * tokens * own.k
        self.module.ep_bootstrap(
            self.group,
            num_experts=own.n_experts,
            max_tokens_per_rank=tokens,
            hidden_dim=own.dim,
            num_topk=own.k,
            recv_capacity_per_rank=rows,
            max_num_sms=own.num_sms,
        )
        return Bootstrapped(self.module, words, rows)

    @not_compiled
    def begin(
        self,
        x_TD: Float[Tensor, "T D"],
        weights_TK: Float[Tensor, "T K"],
        ids_TK: Int[Tensor, "T K"],
        token_mask_T: Bool[Tensor, " T"],
        n_experts: int,
    ) -> Begun:
        """All of `dispatch` but what `end` makes of it: the library's tensors are there for the current stream."""
        trip = self._trip(x_TD, weights_TK, n_experts)
        ids_TK = routed(ids_TK, token_mask_T, n_experts, -1)
        weights_TK, ids_TK = once_each(promoted(weights_TK, x_TD.dtype), ids_TK)
        # Of what goes nowhere the library's gradient may be unwritten; the adjoint of this makes it 0.
        x_TD = torch.where((ids_TK >= 0).any(1, keepdim=True), x_TD, 0)
        ids_TK = _rows(ids_TK, trip.rows, -1).to(torch.int64)
        away = _Away.apply(
            trip,
            self._handle(trip, x_TD.device),
            ids_TK,
            _anchored(_rows(x_TD, trip.rows, 0)),
            _anchored(_rows(weights_TK, trip.rows, 0)),
        )
        return Begun(trip, *away)

    @not_compiled
    def end(self, begun: Begun) -> tuple[Sent, Trip]:
        """See OverBuffer."""
        ends_e = begun.ids.cumsum(0)
        rows_R = torch.arange(begun.trip.received, device=ends_e.device)
        # Past the last row: e.
        ids_R = torch.searchsorted(ends_e, rows_R, right=True, out_int32=True)
        return Sent(begun.x_SD, begun.weights_SK[:, None], ids_R[:, None]), begun.trip

    @not_compiled
    def combine(self, y_SD: Float[Tensor, "S D"], state: Any) -> Tensor:
        """See OverBuffer."""
        if not isinstance(state, Trip) or state.by is not self or y_SD.shape[0] != state.received:
            asked = f"combine of [{y_SD.shape[0]}, D] with the state of its dispatch"
            raise ConfigError(asked, "the state of another", "pass what the same dispatch returned")
        handle, ids_TK = state.handle
        y_TD = _Home.apply(state, handle, handle.handle_mem, y_SD.to(WIRE))
        # Nothing came home for some of them: unwritten.
        return torch.where((ids_TK >= 0).any(1, keepdim=True), y_TD, 0)[: state.tokens]

    def _handle(self, trip: Trip, device: torch.device) -> Any:
        """The library's, of this call alone."""
        return trip.buffer.module.EpBuffer(
            top_k=self.options.k,
            max_tokens_per_rank=self.lease.sizes[0],
            hidden_dim=self.options.dim,
            num_local_experts=trip.held,
            recv_capacity_per_rank=trip.buffer.rows,
            device=device,
        )

    def _check(self, x_TD: Tensor, weights_TK: Tensor, n_experts: int) -> None:
        super()._check(x_TD, weights_TK, n_experts)
        found, own = (x_TD.shape[1], n_experts, weights_TK.shape[1]), self.options
        if found != (own.dim, own.n_experts, own.k):
            asked = "dispatch backend 'te' of D={}, E={}, K={}".format(*found)
            raise ShapeError(asked, f"made for D={own.dim}, E={own.n_experts}, K={own.k}", "build it for these")


class _Away(Function):
    """Out: rows [R, D], their weights [R], and how many each expert has, int64 [e]."""

    @staticmethod
    def forward(ctx: Any, trip: Trip, handle: Any, ids_TK: Tensor, x_TD: Tensor, weights_TK: Tensor) -> Any:
        dispatch = trip.buffer.module.ep_dispatch
        given = (value.contiguous() for value in (x_TD, ids_TK, weights_TK))
        x_RD, weights_R, sizes_e = _carried(trip, "forward", dispatch, handle, *given)
        trip.handle, trip.received = (handle, ids_TK), x_RD.shape[0]
        ctx.trip, ctx.like = trip, [(value.shape, value.dtype) for value in (x_TD, weights_TK)]
        ctx.save_for_backward(handle.handle_mem)
        ctx.mark_non_differentiable(sizes_e)
        return x_RD, weights_R, sizes_e

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_RD: Tensor, dweights_R: Tensor, _: Any) -> tuple[Any, ...]:
        (memory,) = ctx.saved_tensors
        grads = [torch.empty(shape, dtype=dtype, device=memory.device) for shape, dtype in ctx.like]
        back = getattr(torch.ops, _OPS).dispatch_bwd
        _carried(ctx.trip, "backward", back, memory, dx_RD.contiguous(), dweights_R.contiguous(), *grads)
        return None, None, None, *grads


class _Home(Function):
    """Home: the sums of each token's rows."""

    @staticmethod
    def forward(ctx: Any, trip: Trip, handle: Any, memory: Tensor, y_RD: Tensor) -> Tensor:
        combine = partial(trip.buffer.module.ep_combine, num_local_tokens=trip.rows)
        y_TD: Tensor = _carried(trip, "forward", combine, handle, y_RD.contiguous())
        ctx.trip, ctx.like = trip, y_RD.shape
        ctx.save_for_backward(memory)
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Any, ...]:
        (memory,) = ctx.saved_tensors
        dy_RD = dy_TD.new_empty(ctx.like)
        _carried(ctx.trip, "backward", getattr(torch.ops, _OPS).combine_bwd, memory, dy_TD.contiguous(), dy_RD)
        return None, None, None, dy_RD


def _carried(trip: Trip, phase: str, call: Callable[..., Any], *given: Any) -> Any:
    """call(*given), watched: if a rank is missing the error, or the log, says so and in which layer."""
    assert trip.buffer is not None  # where it was destroyed, this raises
    found: list[Any] = []
    # A recomputation's forward stays one.
    peers(trip.by.group).watch.at = trip.at._replace(phase=phase) if phase == "backward" else trip.at
    tensor = next(value for value in given if isinstance(value, Tensor))
    collective(lambda _, group: found.append(call(*given)), tensor, group=trip.by.group)
    return found[0]


def once_each(weights_TK: Float[Tensor, "T K"], ids_TK: Int[Tensor, "T K"]) -> tuple[Tensor, Tensor]:
    """The same routes with no expert twice in a token, nor weights where there is no route.

    Of an expert's slots the first keeps the sum of the weights; the others become -1.
    """
    same_TKK = (ids_TK[:, :, None] == ids_TK[:, None, :]) & (ids_TK >= 0)[:, :, None]
    first_TK = (ids_TK >= 0) & ~same_TKK.tril(-1).any(2)
    summed_TK = torch.where(same_TKK, weights_TK[:, None, :], 0).sum(2)
    return torch.where(first_TK, summed_TK, 0), torch.where(first_TK, ids_TK, -1)


def _rows(value_TX: Tensor, rows: int, with_: int) -> Tensor:
    more = rows - value_TX.shape[0]
    return value_TX if not more else torch.cat([value_TX, value_TX.new_full((more, *value_TX.shape[1:]), with_)])


def _anchored(value: Tensor) -> Tensor:
    """In the graph where there is one: the backward pass is a collective, in which every rank takes part."""
    if not torch.is_grad_enabled() or value.requires_grad:
        return value
    return value.detach().requires_grad_()


def loaded(name: str) -> Callable[..., TE]:
    """TE with Transformer Engine's module.

    Raises:
        BackendUnavailable: the transformer_engine that is here has no NCCL EP, or the NCCL is too old for it.
    """
    if not getattr(import_module("transformer_engine"), "is_nccl_ep_available", lambda: False)():
        do = "build transformer-engine[pytorch] 2.20 or later with NCCL EP, and load NCCL 2.30.4 or later"
        raise BackendUnavailable(f"dispatch backend {name!r}", says(name), do)
    module = import_module("transformer_engine.pytorch.ep")
    lacks = [each for each in _BACK if not hasattr(getattr(torch.ops, _OPS), each)]
    if lacks:
        found = f"{says(name)}; its {_OPS} has no {' and no '.join(lacks)}"
        raise BackendUnavailable(f"dispatch backend {name!r}", found, "take a version that has them, as 2.20.2 does")
    return partial(TE, module=module)


def says(name: str) -> str:
    """What was found, for `moebius doctor`."""
    package = import_module("transformer_engine")
    can = getattr(package, "is_nccl_ep_available", None)
    has = "no NCCL EP" if can is None else f"NCCL EP is {'there' if can() else 'not there, or NCCL is too old'}"
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "none"
    number = getattr(package, "__version__", "of unknown version")
    return f"transformer_engine {number}: {has}; NCCL {nccl}, 2.30.4 is needed; it compiles with nvcc at run time"
