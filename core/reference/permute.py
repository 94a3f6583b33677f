"""Steps 4 and 8: tokens to rows sorted by expert, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moebius.core.precision import EXACT, Arithmetic

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


@dataclass(frozen=True, kw_only=True, slots=True)
class Permuted:
    """Rows sorted by expert; inside one expert by token, then slot.

    Attributes:
        rows_RD: one row per route. row_weights_R: its routing weight.
        group_sizes_e: rows of each expert.
        tokens_R, slots_R: where each row came from: token t, slot k.
        shape_TK: tokens and slots before.
    """

    rows_RD: Float[np.ndarray, "R D"]
    row_weights_R: Float[np.ndarray, " R"]
    group_sizes_e: Int[np.ndarray, " e"]
    tokens_R: Int[np.ndarray, " R"]
    slots_R: Int[np.ndarray, " R"]
    shape_TK: tuple[int, int]


def permute(
    x_TD: Float[np.ndarray, "T D"],
    weights_TK: Float[np.ndarray, "T K"],
    ids_TK: Int[np.ndarray, "T K"],
    token_mask_T: Bool[np.ndarray, " T"],
    n_experts: int,
) -> Permuted:
    """Copy each token once per route. A masked token, -1 and any id outside [0, n_experts) is no route."""
    tokens: list[int] = []
    slots: list[int] = []
    sizes = np.zeros(n_experts, np.int64)
    for expert in range(n_experts):
        for token, slot in zip(*np.nonzero((ids_TK == expert) & token_mask_T[:, None]), strict=True):
            tokens.append(int(token))
            slots.append(int(slot))
            sizes[expert] += 1
    tokens_R, slots_R = np.array(tokens, np.int64), np.array(slots, np.int64)
    return Permuted(
        rows_RD=x_TD[tokens_R],
        row_weights_R=weights_TK[tokens_R, slots_R],
        group_sizes_e=sizes,
        tokens_R=tokens_R,
        slots_R=slots_R,
        shape_TK=(ids_TK.shape[0], ids_TK.shape[1]),
    )


def permute_vjp(
    state: Permuted,
    drows_RD: Float[np.ndarray, "R D"],
    drow_weights_R: Float[np.ndarray, " R"],
    arithmetic: Arithmetic = EXACT,
) -> tuple[np.ndarray, np.ndarray]:
    """(dx_TD, dweights_TK)."""
    dweights_TK = np.zeros(state.shape_TK)
    dweights_TK[state.tokens_R, state.slots_R] = drow_weights_R
    return unpermute(drows_RD, state, arithmetic=arithmetic), arithmetic.store(dweights_TK)


def unpermute(
    out_RD: Float[np.ndarray, "R D"],
    state: Permuted,
    row_weights_R: Float[np.ndarray, " R"] | None = None,
    arithmetic: Arithmetic = EXACT,
    *,
    partial: bool = False,
) -> np.ndarray:
    """Sum each token's rows, weighted where weights are given; a token without routes gets zeros.

    Args:
        partial: other ranks hold the rest of the sum: do not round yet.
    """
    slots_TKD = np.zeros((*state.shape_TK, out_RD.shape[-1]))
    weighted_RD = out_RD if row_weights_R is None else out_RD * row_weights_R[:, None]
    slots_TKD[state.tokens_R, state.slots_R] = weighted_RD
    summed_TD = arithmetic.sum(slots_TKD, axis=1)
    return summed_TD if partial else arithmetic.store(summed_TD)


def unpermute_vjp(
    out_RD: Float[np.ndarray, "R D"],
    state: Permuted,
    dy_TD: Float[np.ndarray, "T D"],
    row_weights_R: Float[np.ndarray, " R"] | None = None,
    arithmetic: Arithmetic = EXACT,
) -> tuple[np.ndarray, np.ndarray]:
    """(dout_RD, drow_weights_R); the second is zero without weights."""
    dy_RD = dy_TD[state.tokens_R]
    if row_weights_R is None:
        return dy_RD, np.zeros(len(dy_RD))
    return arithmetic.store(dy_RD * row_weights_R[:, None]), arithmetic.sum(dy_RD * out_RD, axis=-1)
