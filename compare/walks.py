"""Sides along the reference's walk: with the noise of all stages before, and each step for itself."""

from __future__ import annotations

import numpy as np

from moebius.compare.columns import Pair, Side
from moebius.compare.noise.activate import beyond, undecided
from moebius.compare.noise.layer import Expected, accumulated, walk
from moebius.compare.noise.noisy import Noisy, added
from moebius.compare.noise.permute import Routes
from moebius.compare.problem import Problem
from moebius.compare.score import Tally
from moebius.compare.verdict import Clamped
from moebius.core.config import MoEConfig
from moebius.core.errors import ConfigError
from moebius.core.stages import GRADIENT, STAGES

_BY_ROUTE = {stage.name for stage in STAGES if stage.axes.startswith("R")}


def whole(p: Problem, sides: list[Side], pairs: list[Pair]) -> Clamped | None:
    """Tally every side and pair with the noise from the layer's input on; one reference for all that share it."""
    groups: dict[tuple[bytes, bool], Side] = {}
    for side in sides:
        groups.setdefault(side.reference, side)
    walks = {key: accumulated(p, side.ids_TK, side.config) for key, side in groups.items()}
    clamped = None
    for steps in zip(*walks.values(), strict=True):
        due = dict(zip(walks, steps, strict=True))
        _require_finite(steps[0])
        for side in sides:
            _tally(side, due[side.reference], side.whole)
        for pair in pairs:
            _tally_pair(pair, due[pair.one.reference], due[pair.other.reference])
        if steps[0].name == "up":
            clamped = _clamped(steps[0].due, p.config)
    return clamped


def step(p: Problem, side: Side) -> None:
    """Tally one side with each step fed what the side itself fed to it."""
    steps = walk(p, side.ids_TK, side.config)
    expected = next(steps)
    while True:
        _tally(side, expected, side.step)
        own = None if expected.index else side.answer.part(expected.name)
        fits = own is not None and own.shape == expected.due.value.shape
        try:
            expected = steps.send(Noisy(own.astype(np.float64)) if fits and own is not None else expected.due)
        except StopIteration:
            return


def _require_finite(expected: Expected) -> None:
    """Nothing can be held against a reference that is not a number."""
    due, variance = expected.due.value, expected.due.variance
    if not np.isfinite(due.sum() + (0.0 if variance is None else variance.sum())):
        asked = f"the float64 reference of {expected.name!r}"
        raise ConfigError(asked, "inf or nan", "look into the layer's input and parameters: they are out of range")


def _tally(side: Side, expected: Expected, tallies: dict[str, Tally]) -> None:
    found = side.answer.part(expected.name, expected.index)
    if found is None:
        return
    tally = tallies.setdefault(expected.name, Tally(counts=side.answer.counts))
    due, dtype = expected.due, "float64" if found.dtype == np.float64 else expected.dtype
    tally.add(found, due.value, due.variance, dtype, expected.index, histogram=not expected.index)


def _tally_pair(pair: Pair, one: Expected, other: Expected) -> None:
    """The difference of two sides' errors: the plain difference where both share a reference."""
    found_one = pair.one.answer.part(one.name, one.index)
    found_other = pair.other.answer.part(other.name, other.index)
    if found_one is None or found_other is None:
        return
    counts = pair.one.answer.counts and pair.other.answer.counts
    tally = pair.whole.setdefault(one.name, Tally(counts=counts))
    if found_one.shape != one.due.value.shape or found_other.shape != other.due.value.shape:
        tally.add(found_one, np.zeros(()), None, one.dtype)
        return
    variance_one, variance_other, shift, keep = one.due.variance, other.due.variance, None, True
    if pair.one.reference != pair.other.reference:
        shift = one.due.value, other.due.value
        if one.name.removeprefix(GRADIENT) in _BY_ROUTE:
            rows_one, rows_other = _common(pair.one.routes, pair.other.routes)
            found_one, found_other = found_one[rows_one], found_other[rows_other]
            variance_one = None if variance_one is None else variance_one[rows_one]
            variance_other = None if variance_other is None else variance_other[rows_other]
            shift, keep = (shift[0][rows_one], shift[1][rows_other]), False
    due = found_other if shift is None else found_other + (shift[0] - shift[1])
    variance = added(variance_one, variance_other)
    due = due.astype(np.float64)
    tally.add(found_one, due, variance, one.dtype, one.index, histogram=not one.index, keep=keep)


def _common(one: Routes, other: Routes) -> tuple[np.ndarray, np.ndarray]:
    """Rows of both sides that are the same token at the same expert."""
    keys = [routes.experts_R * len(routes.places_TK) + routes.tokens_R for routes in (one, other)]
    _, rows_one, rows_other = np.intersect1d(*keys, return_indices=True)
    return rows_one, rows_other


def _clamped(hidden_RU: Noisy, config: MoEConfig) -> Clamped | None:
    activation = config.activation
    if activation.limit is None or not hidden_RU.value.size:
        return None
    return Clamped(
        limit=activation.limit,
        share=float(beyond(hidden_RU.value, activation).mean()),
        undecided=int(undecided(hidden_RU, activation).sum()),
    )
