"""Verdicts: how far two answers are apart, how far they may be, and whether a difference in routing is explained."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from moebius.compare.clamp import clamped, moved
from moebius.compare.sides import OUTPUT, Answer, Problem, run_reference
from moebius.compare.verdict import Agreement, Error, Row
from moebius.core import reference
from moebius.core.precision import Noise
from moebius.core.tolerance import FACTOR, SAMPLES, Bound, bounds

# Two sides round independently, so the variance of their difference is the sum of both: sqrt(2) times one's deviation.
_TWO_SIDES = float(np.sqrt(2.0))
# The exact tensors and the bounds of their errors, by name.
Expected = tuple[dict[str, np.ndarray], dict[str, Bound]]


class Judge:
    """Verdicts on the answers to one problem; the reference and its bounds are computed once per choice of experts."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self._kept: dict[bytes, Expected] = {}

    def rows(self, torch_answer: Answer, flax_answer: Answer) -> list[Row]:
        """The verdict on every tensor, the output first.

        Each side is held against the reference with that side's own experts, so a token that is routed otherwise
        counts as routing and not as arithmetic; likewise torch~flax is the difference of their two errors, which is
        the plain difference wherever the routing agrees.
        """
        exact_t, limits_t = self._expected(torch_answer.ids_TK)
        exact_f, limits_f = self._expected(flax_answer.ids_TK)
        same = exact_t is exact_f
        rows = []
        for name, exact in exact_t.items():
            found_t, found_f = torch_answer.tensors[name], flax_answer.tensors[name]
            errors = {
                "torch~reference": error(found_t, exact, limits_t[name]),
                "flax~reference": error(found_f, exact_f[name], limits_f[name]),
            }
            if found_t.shape == found_f.shape == exact.shape:
                between = found_f if same else found_f + (exact - exact_f[name])
                errors["torch~flax"] = error(found_t, between, _wider(limits_t[name]))
            rows.append(Row(name=name, errors=errors))
        return rows

    def loading(self, y_TD: np.ndarray, ids_TK: np.ndarray) -> Row:
        """Whether transformers' own output of the block is the reference's: the checkpoint was read as it is meant.

        Tokens whose choice of experts hangs on the last bits are left out: transformers may choose otherwise.
        """
        exact, limits = self._expected(ids_TK)
        logits_TE, margin_T = self._logits
        settled_T = np.ones(len(y_TD), bool)
        k = self.problem.config.n_activated_experts
        if k < self.problem.config.n_routed_experts:
            ranked_TE = -np.sort(-logits_TE, axis=-1)
            settled_T = ranked_TE[:, k - 1] - ranked_TE[:, k] > margin_T
        found = error(np.asarray(y_TD, np.float64)[settled_T], exact[OUTPUT][settled_T], limits[OUTPUT])
        return Row(name=OUTPUT, errors={"transformers~reference": found} if settled_T.any() else {})

    def agreement(self, one_TK: np.ndarray, other_TK: np.ndarray) -> Agreement:
        """Compare the sets of experts of each token; the families that load here choose by the logits alone.

        A difference is a tie when the exact logits of the experts in dispute span no more than the noise of two.
        """
        sets = [(set(one.tolist()), set(other.tolist())) for one, other in zip(one_TK, other_TK, strict=True)]
        disputed = {token: one ^ other for token, (one, other) in enumerate(sets) if one != other}
        ties = 0
        if disputed:
            logits_TE, margin_T = self._logits
            ties = sum(int(np.ptp(logits_TE[t, sorted(ids)]) <= margin_T[t]) for t, ids in disputed.items())
        unexplained = len(disputed) - ties
        return Agreement(tokens=len(sets), equal=len(sets) - len(disputed), ties=ties, unexplained=unexplained)

    def _expected(self, ids_TK: np.ndarray) -> Expected:
        """The reference's answer for these experts, and its bounds."""
        key = np.ascontiguousarray(ids_TK, np.int64).tobytes()
        if key not in self._kept:
            self._kept[key] = _expected(self.problem, ids_TK)
        return self._kept[key]

    @cached_property
    def _logits(self) -> tuple[np.ndarray, np.ndarray]:
        """(exact logits, distance below which the order of two logits of a token is open: FACTOR deviations)."""
        p = self.problem
        gate = {name.removeprefix("gate."): value for name, value in p.parameters.items() if name.startswith("gate.")}
        exact_TE, _ = reference.gate(p.x_TD, gate, p.config)
        draws = [reference.gate(p.x_TD, gate, p.config, arithmetic=Noise(p.dtype, seed))[0] for seed in range(SAMPLES)]
        deviation_TE = np.sqrt(np.mean([(draw - exact_TE) ** 2 for draw in draws], axis=0))
        return exact_TE, FACTOR * _TWO_SIDES * deviation_TE.max(axis=-1)


def error(found: np.ndarray, exact: np.ndarray, bound: Bound) -> Error:
    """The verdict on one tensor. A wrong shape, nan, or a bound that is no finite number never passes."""
    scale = bound.scale or 1.0
    norm = largest = float("inf")
    if found.shape == exact.shape:
        difference = np.abs(np.subtract(found, exact, dtype=np.float64))
        norm, largest = float(np.linalg.norm(difference)), float(difference.max(initial=0.0))
    inside = norm <= bound.norm < float("inf") and largest <= bound.largest < float("inf")
    return Error(
        relative=norm / scale,
        bound=bound.norm / scale,
        largest=largest,
        largest_bound=bound.largest,
        passed=bool(inside),
    )


def _expected(p: Problem, ids_TK: np.ndarray) -> Expected:
    exact = dict(run_reference(p, ids_TK).tensors)
    limits = bounds(lambda arithmetic: dict(run_reference(p, ids_TK, arithmetic).tensors), exact, p.dtype)
    for near in moved(p, clamped(p, ids_TK)):
        for name, value in run_reference(near, ids_TK).tensors.items():
            limits[name] = _both(limits[name], np.abs(value - exact[name]))
    return exact, limits


def _both(bound: Bound, difference: np.ndarray) -> Bound:
    """The bound with one more, independent source of error."""
    return Bound(
        norm=float(np.hypot(bound.norm, np.linalg.norm(difference))),
        largest=float(np.hypot(bound.largest, difference.max(initial=0.0))),
        scale=bound.scale,
    )


def _wider(bound: Bound) -> Bound:
    return Bound(norm=_TWO_SIDES * bound.norm, largest=_TWO_SIDES * bound.largest, scale=bound.scale)
