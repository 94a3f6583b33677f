"""Dispatcher "alltoall": a token travels once to each rank that holds one of its experts.

How many go where is known to the sender alone, so the counts travel ahead, with what the ranks must agree on, and are
read on the host: once a forward pass. The backward pass, and every layer's way back, reuse the layout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from moebius.torch_frontend.dispatch_ranks import Note, OverRanks, wanted
from moebius.torch_frontend.transport import added, exchange

if TYPE_CHECKING:
    from jaxtyping import Int


class Slots(NamedTuple):
    """Who goes where: a rank's tokens in their order.

    Attributes:
        token_P: the token in each row to send, block after block.
        row_TM: each token's rows in that order of ranks, P for none; of M = min(n, K) ranks at most.
        sent, received: rows to and from each rank. anyone: whether any rank sends any row.
    """

    token_P: Int[Tensor, " P"]
    row_TM: Int[Tensor, "T M"]
    sent: list[int]
    received: list[int]
    anyone: bool


class AllToAll(OverRanks):
    """Each rank sends each rank the tokens that have a route there.

    Collectives: four forward (counts, tokens, routes, outputs), of which the first is read on the host, and three
    backward. Args, Raises: see OverRanks.
    """

    arrives = "wanted"

    def layout(self, note: Note, ids_TK: Int[Tensor, "T K"], e: int) -> tuple[Slots, tuple[bool, bool]]:
        """See OverRanks."""
        ranks_n = torch.arange(self.ranks, dtype=torch.int32, device=ids_TK.device)
        rank_TK = torch.where(ids_TK < 0, self.ranks, ids_TK.div(e, rounding_mode="floor"))
        goes_Tn = (rank_TK[:, :, None] == ranks_n).any(1)
        notes, counts_nn = self.exchange_notes(note, goes_Tn.sum(0))  # [from][to]
        sent, received = counts_nn[self.rank], [counts[self.rank] for counts in counts_nn]
        token_P, row_TM = _rows(goes_Tn, sum(sent), ids_TK.shape[1])
        return Slots(token_P, row_TM, sent, received, any(map(any, counts_nn))), wanted(notes)

    def send(self, x: Tensor, layout: Slots) -> Tensor:
        """See Transport."""
        if not layout.anyone:
            return x.new_empty(0, *x.shape[1:])
        return exchange(x[layout.token_P], layout.sent, layout.received, self.group)

    def back(self, y: Tensor, layout: Slots) -> Tensor:
        """See Transport."""
        rows_P = exchange(y, layout.received, layout.sent, self.group) if layout.anyone else y
        if not len(rows_P):
            return added(y.new_zeros(1, len(layout.row_TM), *y.shape[1:]))
        none_TM = layout.row_TM == len(rows_P)
        parts_TM = rows_P[layout.row_TM.clamp(max=len(rows_P) - 1)]
        parts_TM.masked_fill_(none_TM.view(*none_TM.shape, *[1] * (y.ndim - 1)), 0)
        return added(parts_TM.transpose(0, 1))


def _rows(goes_Tn: Tensor, n_rows: int, k: int) -> tuple[Tensor, Tensor]:
    """(token_P, row_TM) of Slots; nothing is read on the host."""
    T, ranks = goes_Tn.shape
    # Rank after rank: a row for each True of the transposed table, in its order.
    goes_nT = goes_Tn.t().reshape(-1)
    row_nT = torch.where(goes_nT, goes_nT.cumsum(0) - 1, n_rows)
    tokens_nT = torch.arange(T, device=goes_Tn.device).repeat(ranks)
    token_P = tokens_nT.new_empty(n_rows + 1).index_put_((row_nT,), tokens_nT)[:n_rows]
    row_Tn = row_nT.view(ranks, T).t()
    return token_P, row_Tn.sort(1).values[:, : min(ranks, k)]
