"""Steps 5 and 7, and the plain dense projection: the noise of sums of products, streamed expert by expert."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from moebius.compare.noise.noisy import Model, Noisy, added, scaled

# expert -> its matrix or bias in float64: read when it is needed, so that no more than one is held.
PerExpert = Callable[[int], np.ndarray]
_SLAB = 1 << 17  # elements


def groups(sizes_e: np.ndarray) -> list[tuple[int, slice]]:
    """(expert, its rows) of every expert that has any."""
    ends = np.cumsum(sizes_e)
    return [(e, slice(int(ends[e] - n), int(ends[e]))) for e, n in enumerate(sizes_e) if n]


def grouped_matmul(model: Model, rows_RD: Noisy, weight: PerExpert, width: int, sizes_e: np.ndarray) -> Noisy:
    """[R, width]: each group of rows times its own expert's matrix, rounded once."""
    value_RF = np.zeros((len(rows_RD.value), width))
    own_RF = np.zeros_like(value_RF)
    for expert, rows in groups(sizes_e):
        part = Noisy(rows_RD.value[rows], None if rows_RD.own is None else rows_RD.own[rows])
        out = model.stored(model.dot(part, Noisy(weight(expert))))
        value_RF[rows], own_RF[rows] = out.value, out.own
    return Noisy(value_RF, own_RF, rows_RD.common)


def weight_gradients(
    model: Model, rows_RD: Noisy, dout_RF: Noisy, sizes_e: np.ndarray
) -> Iterator[tuple[tuple[int, slice], Noisy]]:
    """(index, [some of D, F]) of each expert's matrix, rounded once; zero for an expert without rows.

    A matrix comes in slabs that a core's cache holds: the whole of it in float64, with its variance and all that is
    computed from the two, would be read from memory again for every operation.
    """
    ends, (dim, width) = np.cumsum(sizes_e), (rows_RD.value.shape[-1], dout_RF.value.shape[-1])
    height = max(_SLAB // max(width, 1), 1)
    for expert, n in enumerate(sizes_e):
        left = rows_RD[int(ends[expert] - n) : int(ends[expert])]
        right = dout_RF[int(ends[expert] - n) : int(ends[expert])]
        for start in range(0, dim, height):
            slab = slice(start, min(start + height, dim))
            if not n:
                yield (expert, slab), Noisy(np.zeros((slab.stop - start, width)))
                continue
            turned = Noisy(left.value[:, slab].T, None if left.own is None else left.own[:, slab].T)
            yield (expert, slab), model.stored(model.dot(turned, right))


def add_bias(
    model: Model, out_RF: Noisy, bias_eF: np.ndarray | None, sizes_e: np.ndarray, row_weights_R: Noisy | None = None
) -> Noisy:
    """out + its expert's bias, times the row's weight where weights are given; rounded once."""
    if bias_eF is None:
        return out_RF
    bias_RF = np.repeat(bias_eF, sizes_e, axis=0)
    if row_weights_R is not None:
        bias_RF = bias_RF * row_weights_R.value[:, None]
    return model.stored(Noisy(out_RF.value + bias_RF, out_RF.own, out_RF.common))


def bias_gradient(model: Model, dout_RF: Noisy, sizes_e: np.ndarray, row_weights_R: Noisy | None = None) -> Noisy:
    """[e, F]: the sum of each expert's rows, times their weights; rounded once."""
    weighted = dout_RF if row_weights_R is None else times_rows(dout_RF, row_weights_R)
    value_eF = np.zeros((len(sizes_e), dout_RF.value.shape[-1]))
    own_eF = np.zeros_like(value_eF)
    for expert, rows in groups(sizes_e):
        out = model.stored(model.total(weighted[rows], axis=0))
        value_eF[expert], own_eF[expert] = out.value, out.own
    return Noisy(value_eF, own_eF)


def times_rows(value_RF: Noisy, weights_R: Noisy) -> Noisy:
    """Each row times its weight; the weight's error is common to the row."""
    factor_R1 = weights_R.value[:, None]
    common = added(value_RF.common, relative(weights_R))
    return Noisy(value_RF.value * factor_R1, scaled(value_RF.own, factor_R1), common)


def relative(weights_R: Noisy) -> np.ndarray | None:
    """Variance of each weight's relative error; 0 for a weight of zero, whose row is zero."""
    variance, squared = weights_R.variance, np.square(weights_R.value)
    if variance is None:
        return None
    return np.divide(variance, squared, out=np.zeros_like(squared), where=squared > 0)


def linear(model: Model, x_TD: Noisy, weight_FD: np.ndarray, bias_F: np.ndarray | None = None) -> Noisy:
    """x @ weight^T + bias, rounded after each."""
    out_TF = model.stored(model.dot(x_TD, Noisy(weight_FD.T)))
    return out_TF if bias_F is None else model.stored(Noisy(out_TF.value + bias_F, out_TF.own, out_TF.common))


def linear_vjp(
    model: Model, x_TD: Noisy, weight_FD: np.ndarray, dout_TF: Noisy, *, bias: bool
) -> tuple[Noisy, Noisy, Noisy | None]:
    """(dx_TD, dweight_FD, dbias_F or None)."""
    variance = dout_TF.variance
    turned = Noisy(dout_TF.value.T, None if variance is None else variance.T)
    dx_TD = model.stored(model.dot(dout_TF, Noisy(weight_FD)))
    dweight_FD = model.stored(model.dot(turned, x_TD))
    return dx_TD, dweight_FD, model.stored(model.total(dout_TF, axis=0)) if bias else None
