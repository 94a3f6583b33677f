"""Dispatchers whose buffer is sized by the longest rank: how long that is, agreed in each call or told once."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moebius.torch_frontend.dispatch import Options
from moebius.torch_frontend.dispatch_buffer import OverBuffer
from moebius.torch_frontend.dispatch_pool import Generation
from moebius.torch_frontend.dispatch_ranks import Note

# Of a rank, that a buffer is first made for; more make a larger one.
TOKENS = 4096


class OverLongest(OverBuffer):
    """An OverBuffer for a number of tokens that is alike on all ranks.

    With `options.max_tokens` that is it. Without, the ranks tell one another in each forward pass what they have, and
    are refused together where more than the number differs; the host reads it, beside the library's own counts.

    Args, Raises: as OverBuffer.
    """

    # What the library wants the number to be a multiple of, and whether every rank has to hand over as many.
    step = 1
    pads = False

    def __init__(self, group: Any, combine_dtype: str | None, options: Options):
        self._tokens = self._stepped(TOKENS if options.max_tokens is None else options.max_tokens)
        super().__init__(group, combine_dtype, options)

    def sizes(self) -> tuple[int, ...]:
        """Tokens of a rank."""
        return (self._tokens,)

    def prepare(self, x_TD: Tensor, weights_TK: Tensor, n_experts: int) -> tuple[Generation, int]:
        """See OverBuffer."""
        longest = self._tokens
        if self.reads_host:
            notes, _ = self.exchange_notes(Note.of(x_TD, weights_TK, n_experts), x_TD.new_empty(0))
            longest = self._stepped(max(note.tokens for note in notes))
        # In powers of two, so that slowly growing batches do not make a buffer each.
        most = max(longest, self._tokens)
        generation = self.lease.grow((most if most == self._tokens else 1 << (most - 1).bit_length(),))
        return generation, longest if self.pads else max(1, x_TD.shape[0])

    def _stepped(self, tokens: int) -> int:
        return max(1, -(-tokens // self.step)) * self.step
