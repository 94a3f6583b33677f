"""Steps 4 and 8: the noise of copies and of sums over a token's rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moebius.compare.noise.matmul import relative, times_rows
from moebius.compare.noise.noisy import Model, Noisy, added


@dataclass(frozen=True, kw_only=True, slots=True)
class Routes:
    """Which row is which route: rows sorted by expert, then token, then slot.

    Attributes:
        tokens_R, slots_R, experts_R: of each row. sizes_e: rows of each expert. shape_TK: tokens and slots.
        places_TK: the row of each route.
    """

    tokens_R: np.ndarray
    slots_R: np.ndarray
    experts_R: np.ndarray
    sizes_e: np.ndarray
    places_TK: np.ndarray

    @classmethod
    def of(cls, ids_TK: np.ndarray, n_experts: int) -> Routes:
        """The routes of these experts, all in range; every token takes part."""
        order = np.argsort(ids_TK, axis=None, kind="stable")
        tokens_R, slots_R = np.divmod(order, ids_TK.shape[1])
        places_TK = np.empty(ids_TK.shape, np.int64)
        places_TK[tokens_R, slots_R] = np.arange(ids_TK.size)
        return cls(
            tokens_R=tokens_R,
            slots_R=slots_R,
            experts_R=ids_TK[tokens_R, slots_R],
            sizes_e=np.bincount(ids_TK.ravel(), minlength=n_experts),
            places_TK=places_TK,
        )


def permute(x_TD: Noisy, weights_TK: Noisy, routes: Routes) -> tuple[Noisy, Noisy]:
    """(rows_RD, row_weights_R): copies, without an error of their own."""
    variance_TK = weights_TK.variance
    own_R = None if variance_TK is None else variance_TK[routes.tokens_R, routes.slots_R]
    return x_TD[routes.tokens_R], Noisy(weights_TK.value[routes.tokens_R, routes.slots_R], own_R)


def permute_weights_vjp(model: Model, drow_weights_R: Noisy, routes: Routes, dtype: str) -> Noisy:
    """[T, K]: the gradient of the routing weights, rounded to their dtype."""
    own_R = drow_weights_R.own
    own_TK = None if own_R is None else own_R[routes.places_TK]
    return model.stored(Noisy(drow_weights_R.value[routes.places_TK], own_TK), dtype)


def unpermute(model: Model, out_RD: Noisy, routes: Routes, row_weights_R: Noisy | None = None) -> Noisy:
    """[T, D]: each token's rows summed, weighted where weights are given; rounded once. Also the gradient of rows."""
    weighted_RD = out_RD if row_weights_R is None else times_rows(out_RD, row_weights_R)
    variance_RD = weighted_RD.variance
    n_tokens, n_slots = routes.places_TK.shape
    value_TD = np.zeros((n_tokens, out_RD.value.shape[-1]))
    own_TD = np.zeros_like(value_TD)
    for places_T in routes.places_TK.T:  # slot by slot: [T, K, D] is never held
        part_TD = weighted_RD.value[places_T]
        value_TD += part_TD
        own_TD += np.square(part_TD) * (model.unit**2 * n_slots / 2)
        if variance_RD is not None:
            own_TD += variance_RD[places_T]
    own_TD += np.square(value_TD) * (model.unit**2 * n_slots / 3)
    return model.stored(Noisy(value_TD, own_TD))


def unpermute_vjp(
    model: Model, out_RD: Noisy, routes: Routes, dy_TD: Noisy, row_weights_R: Noisy | None = None
) -> tuple[Noisy, Noisy | None]:
    """(dout_RD, drow_weights_R): a copy without weights; with them a product that rounds, and a sum that does not."""
    dy_RD = dy_TD[routes.tokens_R]
    if row_weights_R is None:
        return dy_RD, None
    variance = added(
        None if out_RD.variance is None else out_RD.variance * np.square(dy_RD.value),
        None if dy_RD.variance is None else dy_RD.variance * np.square(out_RD.value),
    )
    drow_weights_R = model.total(Noisy(dy_RD.value * out_RD.value, variance), axis=-1)
    own_RD = None if dy_RD.own is None else dy_RD.own * np.square(row_weights_R.value)[:, None]
    weighted = Noisy(dy_RD.value * row_weights_R.value[:, None], own_RD, relative(row_weights_R))
    return model.stored(weighted), drow_weights_R
