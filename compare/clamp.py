"""The activation's clamp: how much it is used, and what it does to bounds where a value is too close to call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from moebius.compare.sides import Problem
from moebius.compare.verdict import Clamped
from moebius.core import reference
from moebius.core.precision import EXACT, Arithmetic, Noise
from moebius.core.tolerance import FACTOR

_DRAWS = 2


def clamped(p: Problem, ids_TK: np.ndarray) -> Clamped | None:
    """How the block's pre-activations meet the limit, for these experts; None where the activation has none."""
    activation = p.config.activation
    limit = activation.limit
    if limit is None:
        return None
    hidden_RU = _hidden(p, ids_TK)
    distance_RU = hidden_RU - limit
    if activation.gated:  # up is held on both sides, gate above alone
        half = hidden_RU.shape[-1] // 2
        is_up_U = np.arange(2 * half) % 2 == 1 if activation.interleaved else np.arange(2 * half) >= half
        distance_RU = np.where(is_up_U, np.abs(hidden_RU) - limit, distance_RU)
    near_RU = np.abs(distance_RU) < 0.5 * limit  # the noise of a value grows with it: that of these alone counts
    noise = 0.0
    if near_RU.any():
        draws = [_hidden(p, ids_TK, Noise(p.dtype, seed))[near_RU] for seed in range(_DRAWS)]
        noise = FACTOR * float(np.sqrt(np.mean([(draw - hidden_RU[near_RU]) ** 2 for draw in draws])))
    return Clamped(
        limit=limit,
        share=float((distance_RU > 0).mean()) if distance_RU.size else 0.0,
        noise=noise,
        undecided=int((np.abs(distance_RU) <= noise).sum()),
    )


def moved(p: Problem, found: Clamped | None) -> list[Problem]:
    """The problem with the limit moved down and up by the noise of the pre-activations.

    One that lies so close to the limit may fall on either side of it, where its gradient is 1 or 0. In float32 there
    are few, so that the draws of the noise may miss them all while the run that is judged meets one.
    """
    field = p.config.activation.limit_field
    if found is None or field is None or not found.undecided:
        return []
    changes: list[dict[str, Any]] = [{field: found.limit + step} for step in (-found.noise, found.noise)]
    return [replace(p, config=replace(p.config, **change)) for change in changes if change[field] > 0]


def _hidden(p: Problem, ids_TK: np.ndarray, arithmetic: Arithmetic = EXACT) -> np.ndarray:
    """The reference's pre-activations [R, U], biases included."""
    mask_T = np.ones(len(p.x_TD), bool)
    trace = reference.moe(p.x_TD, mask_T, p.parameters, p.config, ids_TK=ids_TK, arithmetic=arithmetic)
    return trace.experts.hidden_RU
