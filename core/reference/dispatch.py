"""Steps 3 and 9 over several ranks: a list with one entry a rank goes in, one comes out.

Rank r of n holds experts [r * e, (r + 1) * e). Any dispatcher must give what this gives: every rank computes the
routes to its own experts, and each token's partial sums are added over the ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moebius.core.errors import ConfigError
from moebius.core.precision import EXACT, Arithmetic

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """What one rank holds: x_TD, weights_TK, ids_TK and token_mask_T; after dispatch ids are local (e: no route)."""

    x_TD: Float[np.ndarray, "T D"]
    weights_TK: Float[np.ndarray, "T K"]
    ids_TK: Int[np.ndarray, "T K"]
    token_mask_T: Bool[np.ndarray, " T"]


def dispatch(ranks: list[Tokens], n_experts: int) -> list[Tokens]:
    """Give every rank all tokens, with ids counted from its first expert."""
    held, rest = divmod(n_experts, len(ranks))
    if rest:
        raise ConfigError(
            f"{n_experts} experts over {len(ranks)} ranks", f"{rest} left over", "use ranks that divide E"
        )
    x_SD = np.concatenate([rank.x_TD for rank in ranks])
    weights_SK = np.concatenate([rank.weights_TK for rank in ranks])
    ids_SK = np.concatenate([rank.ids_TK for rank in ranks]).astype(np.int64)
    mask_S = np.concatenate([rank.token_mask_T for rank in ranks])
    sent = []
    for rank in range(len(ranks)):
        local_SK = ids_SK - rank * held
        here_SK = (local_SK >= 0) & (local_SK < held) & (ids_SK >= 0) & (ids_SK < n_experts)
        sent.append(
            Tokens(x_TD=x_SD, weights_TK=weights_SK, ids_TK=np.where(here_SK, local_SK, held), token_mask_T=mask_S)
        )
    return sent


def dispatch_vjp(
    lengths: list[int], dx: list[np.ndarray], dweights: list[np.ndarray], arithmetic: Arithmetic = EXACT
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(dx_TD, dweights_TK) of every rank: the sum over all ranks, cut to the rank's own tokens."""
    cuts = np.cumsum(lengths)[:-1]
    dx_SD, dweights_SK = arithmetic.store(np.sum(dx, axis=0)), np.sum(dweights, axis=0)
    return list(zip(np.split(dx_SD, cuts), np.split(dweights_SK, cuts), strict=True))


def combine(
    lengths: list[int], y: list[np.ndarray], arithmetic: Arithmetic = EXACT, wire: str | None = None
) -> list[np.ndarray]:
    """Add the ranks' outputs [S, D] and give each rank its own tokens' rows.

    Args:
        y: of `experts` with `partial`. wire: the dtype that each part is rounded to on its way, None for the tokens'.
    """
    parts = [arithmetic.store(part, wire) for part in y]
    return np.split(arithmetic.store(arithmetic.sum(np.stack(parts), axis=0)), np.cumsum(lengths)[:-1])


def combine_vjp(dy: list[np.ndarray]) -> list[np.ndarray]:
    """The gradient [S, D] of every rank's output: that of all tokens, on every rank."""
    dy_SD = np.concatenate(dy)
    return [dy_SD for _ in dy]
