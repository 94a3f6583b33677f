"""Steps 3 and 9 over several ranks: every rank gathers all tokens, and the ranks' outputs are added.

Sizes differ from rank to rank and may be 0 anywhere, so they are exchanged first; they travel with everything else on
which the ranks must agree, because a rank that left a collective out would leave the others waiting for ever. Sums go
through an all-to-all, not a reduction: tokens need no padding, 16-bit gradients travel in 16 bits and are still added
in the accumulate dtype, and the result does not depend on how a network reduces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from moebius.core.errors import ConfigError, ShapeError
from moebius.core.precision import DTYPES
from moebius.torch_frontend.dispatch import Sent
from moebius.torch_frontend.dtypes import accumulate_dtype, as_dtype, promoted
from moebius.torch_frontend.sharding import held

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

P = ParamSpec("P")
R = TypeVar("R")

# torch 2.13 renamed it and warns of the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Gathered(NamedTuple):
    """What `combine` needs: each rank's number of tokens, and the dtype of x."""

    lengths: tuple[int, ...]
    dtype: torch.dtype


def _not_compiled(method: Callable[P, R]) -> Callable[P, R]:
    """torch.compiler.disable, which would load the compiler, most of a second, also where nothing is compiled."""

    @wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        called: Callable[P, R] = torch.compiler.disable(method) if torch.compiler.is_compiling() else method
        return called(*args, **kwargs)

    return call


class AllGather:
    """Every rank gathers all tokens, computes its own experts' routes, and the outputs are added over the ranks.

    Spec: core.reference.dispatch. Each rank's gradients are those of the sum of all ranks' losses. All ranks of the
    group call `dispatch`, `combine` and backward in the same order, with any number of tokens each, none included.
    Parameters are frozen on every rank or on none. Collectives: four forward (sizes, tokens, routes, outputs), of which
    the first is read on the host, and three backward. Under torch.compile both methods run between the graphs, not in
    them; torch.func does not transform them.

    Args:
        group: the torch.distributed process group over which the experts are spread; None for the default one.

    Raises:
        ConfigError: there is no such group, or this process is not in it.
    """

    def __init__(self, group: Any = None):
        if not dist.is_initialized():
            do = "call torch.distributed.init_process_group first"
            raise ConfigError("experts over the ranks of a process group", "torch.distributed is not initialised", do)
        self.group = group
        self.ranks = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        if self.rank < 0:
            found = f"global rank {dist.get_rank()} is not in it"
            raise ConfigError("a process group of this rank", found, "pass the group of this rank's mesh dimension")

    @_not_compiled
    def dispatch(
        self,
        x_TD: Float[Tensor, "T D"],
        weights_TK: Float[Tensor, "T K"],
        ids_TK: Int[Tensor, "T K"],
        token_mask_T: Bool[Tensor, " T"],
        n_experts: int,
    ) -> tuple[Sent, Gathered]:
        """All ranks' tokens with ids counted from this rank's first expert, e for no route.

        Raises:
            ConfigError: the ranks do not divide E, or some compute gradients and some do not.
            ShapeError: the ranks' tokens differ in more than their number. Raised on every rank; what one rank refuses
            before, a wrong width for instance, leaves the others waiting.
        """
        weights_TK = promoted(weights_TK, x_TD.dtype)
        notes = self._exchange(_Note.of(x_TD, weights_TK, n_experts), x_TD.device)
        e = held(n_experts, self.ranks)
        grads = any(note.x_grad for note in notes), any(note.weights_grad for note in notes)
        lengths = tuple(note.tokens for note in notes)
        here_TK = (ids_TK >= 0) & (ids_TK < n_experts) & token_mask_T[:, None]
        # Compared before it is narrowed, so that an int64 id beyond 2^31 cannot wrap into range.
        ids_TK = torch.where(here_TK, ids_TK, -1).to(torch.int32)
        x_TD, weights_TK = _anchored(x_TD, grads[0]), _anchored(weights_TK, grads[1])
        x_SD, weights_SK, ids_SK = _Dispatch.apply(x_TD, weights_TK, ids_TK, self.group, lengths, grads)
        local_SK = ids_SK - self.rank * e
        local_SK = torch.where((local_SK >= 0) & (local_SK < e), local_SK, e)
        return Sent(x_SD, weights_SK, local_SK), Gathered(lengths, x_TD.dtype)

    @_not_compiled
    def combine(self, y_SD: Float[Tensor, "S D"], state: Gathered) -> Tensor:
        """[T, D]: this rank's rows of the ranks' sum, added in the accumulate dtype and rounded once to x's dtype."""
        y_TD: Tensor = _SumSplitVarlenFn.apply(y_SD, self.group, state.lengths, state.dtype)
        return y_TD

    def _exchange(self, note: _Note, device: torch.device) -> list[_Note]:
        """Every rank's note: read on the host."""
        sent = torch.tensor(note, dtype=torch.int64, device=device)
        notes = sent.new_empty(self.ranks * len(note))
        _all_gather(notes, sent, group=self.group)
        found = [_Note(*row) for row in notes.view(self.ranks, -1).tolist()]
        _check(found)
        return found


class _Note(NamedTuple):
    """What a rank tells the others of its tokens before it sends them."""

    tokens: int
    width: int
    k: int
    n_experts: int
    dtype: int
    grad: int
    x_grad: int
    weights_grad: int

    @classmethod
    def of(cls, x_TD: Tensor, weights_TK: Tensor, n_experts: int) -> _Note:
        grad = torch.is_grad_enabled()
        dtype = [as_dtype(name) for name in DTYPES].index(x_TD.dtype)
        return cls(
            tokens=x_TD.shape[0],
            width=x_TD.shape[1],
            k=weights_TK.shape[1],
            n_experts=n_experts,
            dtype=dtype,
            grad=grad,
            x_grad=grad and x_TD.requires_grad,
            weights_grad=grad and weights_TK.requires_grad,
        )

    def __str__(self) -> str:
        return f"D={self.width}, K={self.k}, E={self.n_experts}, {tuple(DTYPES)[self.dtype]}"


def _check(notes: list[_Note]) -> None:
    """Alike on every rank, since all read the same notes: no rank is left waiting in a collective."""
    if len({str(note) for note in notes}) > 1:
        found = "; ".join(f"rank {rank}: {note}" for rank, note in enumerate(notes))
        raise ShapeError("tokens that differ in their number alone", found, "call the same layer on every rank")
    without = [str(rank) for rank, note in enumerate(notes) if not note.grad]
    if 0 < len(without) < len(notes):
        found = f"none on rank {', '.join(without)}, some on others"
        raise ConfigError("gradients on every rank or on none", found, "enter torch.no_grad on all ranks or on none")


def _anchored(value: Tensor, needed: bool) -> Tensor:
    """`value` in the autograd graph if any rank needs its gradient: backward is a collective too."""
    if not needed or value.requires_grad:
        return value
    return value.detach().requires_grad_()


class _Dispatch(Function):
    """Tokens, weights and ids of all ranks. One node, so that backward has one order on every rank."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weights_TK: Tensor,
        ids_TK: Tensor,
        group: Any,
        lengths: tuple[int, ...],
        grads: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.group, ctx.lengths, ctx.grads = group, lengths, grads
        # As bytes, weights and ids share one collective.
        routes_T = torch.cat([_bytes(weights_TK), _bytes(ids_TK)], dim=1)
        routes_S = _gathered(routes_T, group, lengths)
        weights_S, ids_S = routes_S.split([routes_T.shape[1] - 4 * ids_TK.shape[1], 4 * ids_TK.shape[1]], dim=1)
        ids_SK = ids_S.contiguous().view(torch.int32)
        ctx.mark_non_differentiable(ids_SK)
        return _gathered(x_TD, group, lengths), weights_S.contiguous().view(weights_TK.dtype), ids_SK

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx_SD, dweights_SK, _ = grads
        shared = ctx.group, ctx.lengths
        dx_TD = _SumSplitVarlenFn.apply(dx_SD, *shared, dx_SD.dtype) if ctx.grads[0] else None
        dweights_TK = _SumSplitVarlenFn.apply(dweights_SK, *shared, dweights_SK.dtype) if ctx.grads[1] else None
        return dx_TD, dweights_TK, None, None, None, None


class _AllGatherConcatVarlenFn(Function):
    """apply(local [T, ...], group, gathered_lens, max_len) -> [S, ...]: the ranks' rows, one rank after the other.

    gathered_lens holds each rank's T, max_len its maximum. The gradient is the sum over the ranks, in the accumulate
    dtype, rounded once; the gradient that comes in is not written to.
    """

    @staticmethod
    def forward(ctx: Any, local_tensor: Tensor, group: Any, gathered_lens: Sequence[int], max_len: int) -> Tensor:
        ctx.group, ctx.lengths = group, tuple(int(length) for length in gathered_lens)
        return _gathered(local_tensor, group, ctx.lengths)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        return _SumSplitVarlenFn.apply(grad_output, ctx.group, ctx.lengths, grad_output.dtype), None, None, None


class _SumSplitVarlenFn(Function):
    """apply([S, ...], group, lengths, dtype) -> [T, ...]: the other's adjoint. This rank's rows of the ranks' sum."""

    @staticmethod
    def forward(ctx: Any, summand: Tensor, group: Any, lengths: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        ctx.group, ctx.lengths, ctx.dtype = group, lengths, summand.dtype
        return _summed(summand, group, lengths).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        grad = _AllGatherConcatVarlenFn.apply(grad_output, ctx.group, ctx.lengths, max(ctx.lengths))
        return grad.to(ctx.dtype), None, None, None


def _gathered(local: Tensor, group: Any, lengths: tuple[int, ...]) -> Tensor:
    """[T, ...] of every rank as [S, ...]."""
    longest = max(lengths)
    local = local.contiguous()
    if longest == 0:  # known to every rank
        return local.clone()
    if local.shape[0] < longest:
        local = torch.cat([local, local.new_zeros(longest - local.shape[0], *local.shape[1:])])
    padded = local.new_empty(len(lengths) * longest, *local.shape[1:])
    _all_gather(padded, local, group=group)
    if min(lengths) == longest:
        return padded
    return torch.cat([rows[:length] for rows, length in zip(padded.split(longest), lengths, strict=True)])


def _summed(summand: Tensor, group: Any, lengths: tuple[int, ...]) -> Tensor:
    """This rank's [T, ...] of the sum over the ranks of [S, ...], in the accumulate dtype."""
    ranks, own = len(lengths), lengths[dist.get_rank(group)]
    parts = summand.new_empty(ranks * own, *summand.shape[1:])
    if max(lengths) > 0:
        dist.all_to_all_single(parts, summand.contiguous(), [own] * ranks, list(lengths), group=group)
    return parts.view(ranks, own, *summand.shape[1:]).sum(0, dtype=accumulate_dtype(summand.dtype))


def _bytes(value: Tensor) -> Tensor:
    # clone, not contiguous: an empty tensor counts as contiguous whatever its strides, and then has no bytes to view.
    return value.clone(memory_format=torch.contiguous_format).view(torch.uint8)
