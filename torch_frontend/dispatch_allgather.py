"""Dispatcher "allgather": every rank gathers all tokens, and the ranks' outputs are added.

Sums go through an all-to-all, not a reduction: tokens need no padding, 16-bit numbers travel in 16 bits and are still
added promoted, and the result does not depend on how a network reduces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from moebius.core.errors import ShapeError
from moebius.core.liveness import Position
from moebius.torch_frontend.dispatch import Sent
from moebius.torch_frontend.dispatch_ranks import Note, OverRanks, Spread, all_gather, not_compiled, wanted
from moebius.torch_frontend.liveness import collective, peers
from moebius.torch_frontend.recompute import recomputing
from moebius.torch_frontend.transport import added, collect, exchange

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

Lengths = tuple[int, ...]  # each rank's number of tokens


class AllGather(OverRanks):
    """Each rank computes its own experts' routes of all tokens.

    Collectives: four forward (sizes, tokens, routes, outputs), of which the first is read on the host, and three
    backward. With `max_tokens` there is no first, and nothing is read: every rank's tokens are filled up to as many
    with masked ones. Nothing is compared either: every rank takes part in a backward pass where gradients are enabled,
    which they are on all ranks or on none.

    Args:
        max_tokens: that no rank exceeds in any call, alike on all of them; None to tell one another.
        others: see OverRanks.

    Raises: as OverRanks.
    """

    def __init__(self, group: Any = None, combine_dtype: str | None = None, max_tokens: int | None = None):
        super().__init__(group, combine_dtype)
        self.max_tokens = max_tokens

    @property
    def reads_host(self) -> bool:
        """See OverRanks."""
        return self.max_tokens is None

    @not_compiled
    def dispatch(
        self,
        x_TD: Float[Tensor, "T D"],
        weights_TK: Float[Tensor, "T K"],
        ids_TK: Int[Tensor, "T K"],
        token_mask_T: Bool[Tensor, " T"],
        n_experts: int,
    ) -> tuple[Sent, Spread]:
        """See OverRanks.

        Raises:
            ShapeError: more than max_tokens, on this rank alone.
        """
        tokens = x_TD.shape[0]
        if self.max_tokens is None:
            return super().dispatch(x_TD, weights_TK, ids_TK, token_mask_T, n_experts)
        more = self.max_tokens - tokens
        if more < 0:
            found, do = f"dispatcher_max_tokens={self.max_tokens}", "give more, alike on every rank, or None"
            raise ShapeError(f"allgather of {tokens} tokens", found, do)
        x_TD, weights_TK, ids_TK, token_mask_T = (
            _filled(value, more) for value in (x_TD, weights_TK, ids_TK, token_mask_T)
        )
        sent, state = super().dispatch(x_TD, weights_TK, ids_TK, token_mask_T, n_experts)
        return sent, state._replace(tokens=tokens)

    @not_compiled
    def combine(self, y_SD: Float[Tensor, "S D"], state: Spread) -> Tensor:
        """See OverRanks."""
        return super().combine(y_SD, state)[: state.tokens]

    def layout(self, note: Note, ids_TK: Int[Tensor, "T K"], e: int) -> tuple[Lengths, tuple[bool, bool]]:
        """Every token goes everywhere."""
        if self.max_tokens is not None:
            return (self.max_tokens,) * self.ranks, (bool(note.grad), bool(note.grad))
        notes, _ = self.exchange_notes(note, ids_TK.new_empty(0))
        return tuple(note.tokens for note in notes), wanted(notes)

    def send(self, x: Tensor, layout: Lengths) -> Tensor:
        """See Transport."""
        return _gathered(x, self.group, layout)

    def back(self, y: Tensor, layout: Lengths) -> Tensor:
        """See Transport."""
        return _summed(y, self.group, layout)


class _Varlen:
    """`AllGather`'s transport of a group alone, for those who call it without a dispatcher."""

    def __init__(self, group: Any):
        self.group = group

    def send(self, x: Tensor, layout: Lengths) -> Tensor:
        self._mark()
        return _gathered(x, self.group, layout)

    def back(self, y: Tensor, layout: Lengths) -> Tensor:
        self._mark()
        return _summed(y, self.group, layout)

    def _mark(self) -> None:
        phase = "backward" if recomputing() else "forward"
        peers(self.group).watch.at = Position("of _AllGatherConcatVarlenFn", None, phase)


class _AllGatherConcatVarlenFn(Function):
    """apply(local [T, ...], group, gathered_lens, max_len) -> [S, ...]: the ranks' rows, one rank after the other.

    gathered_lens holds each rank's T, max_len its maximum. The gradient is the sum over the ranks, in the accumulate
    dtype, rounded once; the gradient that comes in is not written to.
    """

    @staticmethod
    def forward(ctx: Any, local_tensor: Tensor, group: Any, gathered_lens: Sequence[int], max_len: int) -> Tensor:
        ctx.transport, ctx.lengths = _Varlen(group), tuple(int(length) for length in gathered_lens)
        return ctx.transport.send(local_tensor, ctx.lengths)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        return collect(ctx.transport, ctx.lengths, grad_output, grad_output.dtype), None, None, None


def _filled(value_TX: Tensor, more: int) -> Tensor:
    """With `more` rows of zeros, which in a mask say no."""
    return torch.cat([value_TX, value_TX.new_zeros(more, *value_TX.shape[1:])]) if more else value_TX


def _gathered(local: Tensor, group: Any, lengths: Lengths) -> Tensor:
    """[T, ...] of every rank as [S, ...]."""
    longest = max(lengths)
    local = local.contiguous()
    if longest == 0:  # known to every rank
        return local.clone()
    if local.shape[0] < longest:
        local = torch.cat([local, local.new_zeros(longest - local.shape[0], *local.shape[1:])])
    padded = local.new_empty(len(lengths) * longest, *local.shape[1:])
    collective(all_gather, padded, local, group=group)
    if min(lengths) == longest:
        return padded
    return torch.cat([rows[:length] for rows, length in zip(padded.split(longest), lengths, strict=True)])


def _summed(summand: Tensor, group: Any, lengths: Lengths) -> Tensor:
    """This rank's [T, ...] of the sum over the ranks of [S, ...], in the accumulate dtype."""
    ranks, own = len(lengths), lengths[dist.get_rank(group)]
    if max(lengths) == 0:
        return added(summand.new_empty(ranks, 0, *summand.shape[1:]))
    parts = exchange(summand, list(lengths), [own] * ranks, group)
    return added(parts.view(ranks, own, *summand.shape[1:]))
