"""Steps 5 and 7: each expert's bias, on the way down times the routing weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moebius.core.precision import EXACT, Arithmetic

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def add_bias(
    out_RF: Float[np.ndarray, "R F"],
    bias_eF: Float[np.ndarray, "e F"] | None,
    group_sizes_e: Int[np.ndarray, " e"],
    row_weights_R: Float[np.ndarray, " R"] | None = None,
    arithmetic: Arithmetic = EXACT,
) -> np.ndarray:
    """out + bias of the row's expert, times the row's weight where weights are given; None adds nothing."""
    if bias_eF is None:
        return out_RF
    bias_RF = np.repeat(bias_eF, group_sizes_e, axis=0)
    if row_weights_R is not None:
        bias_RF = bias_RF * row_weights_R[:, None]
    return arithmetic.store(out_RF + bias_RF)


def add_bias_vjp(
    bias_eF: Float[np.ndarray, "e F"],
    group_sizes_e: Int[np.ndarray, " e"],
    dout_RF: Float[np.ndarray, "R F"],
    row_weights_R: Float[np.ndarray, " R"] | None = None,
    arithmetic: Arithmetic = EXACT,
) -> tuple[np.ndarray, np.ndarray]:
    """(dbias_eF, drow_weights_R); the gradient of `out` is dout itself."""
    weights_R1 = np.ones((len(dout_RF), 1)) if row_weights_R is None else row_weights_R[:, None]
    dbias_eF, start = np.zeros_like(bias_eF), 0
    for expert, size in enumerate(group_sizes_e):
        rows = slice(start, start + int(size))
        dbias_eF[expert] = arithmetic.store(arithmetic.sum(dout_RF[rows] * weights_R1[rows], axis=0))
        start += int(size)
    bias_RF = np.repeat(bias_eF, group_sizes_e, axis=0)
    drow_weights_R = arithmetic.sum(dout_RF * bias_RF, axis=-1)
    return dbias_eF, drow_weights_R if row_weights_R is not None else np.zeros(len(dout_RF))
