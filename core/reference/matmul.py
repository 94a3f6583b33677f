"""Steps 5 and 7: one matrix per expert; and the plain dense projection."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moebius.core.precision import EXACT, Arithmetic

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def grouped_matmul(
    rows_RD: Float[np.ndarray, "R D"],
    weight_eDF: Float[np.ndarray, "e D F"],
    group_sizes_e: Int[np.ndarray, " e"],
    arithmetic: Arithmetic = EXACT,
) -> np.ndarray:
    """Multiply each group of rows by its own expert's matrix; rows past the last group become zero."""
    out_RF = np.zeros((len(rows_RD), weight_eDF.shape[-1]))
    for expert, rows in _groups(group_sizes_e):
        out_RF[rows] = arithmetic.store(arithmetic.dot(rows_RD[rows], weight_eDF[expert]))
    return out_RF


def grouped_matmul_vjp(
    rows_RD: Float[np.ndarray, "R D"],
    weight_eDF: Float[np.ndarray, "e D F"],
    group_sizes_e: Int[np.ndarray, " e"],
    dout_RF: Float[np.ndarray, "R F"],
    arithmetic: Arithmetic = EXACT,
) -> tuple[np.ndarray, np.ndarray]:
    """(drows_RD, dweight_eDF); rows past the last group and empty experts get zero."""
    drows_RD, dweight_eDF = np.zeros_like(rows_RD), np.zeros_like(weight_eDF)
    for expert, rows in _groups(group_sizes_e):
        drows_RD[rows] = arithmetic.store(arithmetic.dot(dout_RF[rows], weight_eDF[expert].T))
        dweight_eDF[expert] = arithmetic.store(arithmetic.dot(rows_RD[rows].T, dout_RF[rows]))
    return drows_RD, dweight_eDF


def linear(
    x_TD: Float[np.ndarray, "T D"],
    weight_FD: Float[np.ndarray, "F D"],
    bias_F: Float[np.ndarray, " F"] | None = None,
    arithmetic: Arithmetic = EXACT,
) -> np.ndarray:
    """x @ weight^T + bias, with the output-major weight of dense projections."""
    out_TF = arithmetic.dot(x_TD, weight_FD.T)
    return arithmetic.store(out_TF if bias_F is None else arithmetic.store(out_TF) + bias_F)


def linear_vjp(
    x_TD: Float[np.ndarray, "T D"],
    weight_FD: Float[np.ndarray, "F D"],
    dout_TF: Float[np.ndarray, "T F"],
    arithmetic: Arithmetic = EXACT,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(dx_TD, dweight_FD, dbias_F)."""
    dx_TD = arithmetic.store(arithmetic.dot(dout_TF, weight_FD))
    dweight_FD = arithmetic.store(arithmetic.dot(dout_TF.T, x_TD))
    return dx_TD, dweight_FD, arithmetic.store(arithmetic.sum(dout_TF, axis=0))


def _groups(group_sizes_e: Int[np.ndarray, " e"]) -> list[tuple[int, slice]]:
    """(expert, its rows) of every expert that has any."""
    ends = np.cumsum(group_sizes_e)
    return [(e, slice(int(ends[e] - n), int(ends[e]))) for e, n in enumerate(group_sizes_e) if n]
