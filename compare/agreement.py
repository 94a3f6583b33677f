"""Whether two sides chose the same experts, and whether rounding explains it where they did not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, islice
from typing import Any

import numpy as np

from moebius.compare.noise import route
from moebius.compare.noise.matmul import linear
from moebius.compare.noise.noisy import Model, Noisy
from moebius.compare.problem import Problem
from moebius.compare.verdict import Agreement
from moebius.core import reference

# Deviations of the difference of two scores within which their order is open. Two values rounded once each are at most
# 2 sqrt(3) = 3.5 of one's deviations apart, 2.4 of their difference's; sums before that add a little.
TIE = 4.0
_EXAMPLES = 5
_MOST = 256  # choices of groups to look at; all of them for up to 8 groups


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What the experts of each token are chosen by, exactly, and how far rounding moves it.

    Attributes:
        ids_TK: the reference's own choice, by falling score.
        choice_TE, variance_TE: before groups are left out.
        kept_TG: groups that are kept; None without groups. fill: what the experts of the others get in place of theirs.
        open_TG: groups so near the border between kept and left out that rounding may carry them across.
    """

    ids_TK: np.ndarray
    choice_TE: np.ndarray
    variance_TE: np.ndarray
    kept_TG: np.ndarray | None = None
    open_TG: np.ndarray | None = None
    fill: float = 0.0

    @classmethod
    def of(cls, p: Problem) -> Choices:
        """The choices of a problem."""
        c, model = p.config, Model.of(p.dtype)
        bias = p.exact("gate.bias") if c.router_bias else None
        logits_TE = linear(model, Noisy(p.x_TD), p.exact("gate.weight"), bias)
        ids_TK = reference.route(logits_TE.value, c, correction_bias_E=p.correction_bias).ids_TK
        choice_TE, variance_TE = route.choice(model, logits_TE, c, p.correction_bias)
        if c.routing_rule.group_fill is None or c.n_expert_groups <= 1:
            return cls(ids_TK=ids_TK, choice_TE=choice_TE, variance_TE=variance_TE)
        kept_TG, open_TG = _groups(p, choice_TE, variance_TE)
        return cls(
            ids_TK=ids_TK,
            choice_TE=choice_TE,
            variance_TE=variance_TE,
            kept_TG=kept_TG,
            open_TG=open_TG,
            fill=c.routing_rule.group_fill,
        )

    def agreement(self, one_TK: np.ndarray, other_TK: np.ndarray, *, counts: bool = True) -> Agreement:
        """Compare the experts of each token, as sets; a difference is a tie where rounding explains either choice."""
        sets = [(set(one.tolist()), set(other.tolist())) for one, other in zip(one_TK, other_TK, strict=True)]
        disputed = {token: pair for token, pair in enumerate(sets) if pair[0] != pair[1]}
        unexplained = [t for t, pair in disputed.items() if not all(self._explained(t, ids) for ids in pair)]
        return Agreement(
            tokens=len(sets),
            equal=len(sets) - len(disputed),
            ties=len(disputed) - len(unexplained),
            unexplained=len(unexplained),
            examples=tuple(unexplained[:_EXAMPLES]),
            counts=counts,
        )

    @property
    def settled_T(self) -> np.ndarray:
        """[T] bool: tokens whose experts no rounding changes."""
        ids_TK = self.ids_TK.astype(np.int64)
        chosen_TE = np.zeros(self.choice_TE.shape, bool)
        np.put_along_axis(chosen_TE, ids_TK, True, axis=-1)
        open_T = np.zeros(len(ids_TK), bool)
        if self.open_TG is not None:
            open_T |= self.open_TG.any(-1)
        choice_TE, variance_TE = self._masked(self.choice_TE, self.variance_TE, self.kept_TG)
        for ids_T1 in np.split(ids_TK, ids_TK.shape[1], axis=-1):
            choice_T1, variance_T1 = (np.take_along_axis(v, ids_T1, axis=-1) for v in (choice_TE, variance_TE))
            near_TE = _near(choice_T1, choice_TE, np.maximum(variance_T1, variance_TE))
            open_T |= (near_TE & ~chosen_TE).any(-1)
        return ~open_T

    def _explained(self, token: int, ids: set[int]) -> bool:
        """Whether rounding may lead to these experts: they are the best K of some choice, or level with those."""
        n_experts, k = self.choice_TE.shape[1], self.ids_TK.shape[1]
        if len(ids) != k or not all(0 <= i < n_experts for i in ids):
            return False
        for kept_G in self._kept(token):
            choice_E, variance_E = self._masked(self.choice_TE[token], self.variance_TE[token], kept_G)
            best = set(np.argsort(-choice_E, kind="stable")[:k].tolist())
            disputed = sorted(ids ^ best)
            if not disputed:
                return True
            values = choice_E[disputed]
            if _near(values.min(), values.max(), variance_E[disputed].max()):
                return True
        return False

    def _kept(self, token: int) -> Iterator[np.ndarray | None]:
        """Every choice of groups to keep that rounding may lead to, the reference's own first."""
        if self.kept_TG is None or self.open_TG is None:
            yield None
            return
        kept_G, open_G = self.kept_TG[token], self.open_TG[token]
        yield kept_G
        n_open = int((kept_G & open_G).sum())
        for groups in islice(combinations(np.flatnonzero(open_G), n_open), _MOST):
            other_G = kept_G & ~open_G
            other_G[list(groups)] = True
            yield other_G

    def _masked(self, choice: np.ndarray, variance: np.ndarray, kept: np.ndarray | None) -> tuple[Any, Any]:
        """(choice, variance) with the experts of the groups that are not kept at `fill`, exactly."""
        if kept is None:
            return choice, variance
        kept = np.repeat(kept, choice.shape[-1] // kept.shape[-1], axis=-1)
        return np.where(kept, choice, self.fill), np.where(kept, variance, 0.0)


def _groups(p: Problem, choice_TE: np.ndarray, variance_TE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[T, G] bool: (groups that are kept, groups near the border to those)."""
    c = p.config
    has_bias = c.routing_rule.uses_bias and p.correction_bias is not None
    n_best = {"top2": 2, "max": 1, "max_unless_bias": 2 if has_bias else 1}[c.routing_rule.group_score]
    choice_TGM = choice_TE.reshape(len(choice_TE), c.n_expert_groups, -1)
    best_TGM = np.argsort(-choice_TGM, axis=-1, kind="stable")[..., :n_best]
    score_TG = np.take_along_axis(choice_TGM, best_TGM, axis=-1).sum(-1)
    variance_TG = np.take_along_axis(variance_TE.reshape(choice_TGM.shape), best_TGM, axis=-1).sum(-1)
    kept_TG = np.zeros(score_TG.shape, bool)
    kept_TL = np.argsort(-score_TG, axis=-1, kind="stable")[:, : c.n_limited_groups]
    np.put_along_axis(kept_TG, kept_TL, True, axis=-1)
    if kept_TG.all():
        return kept_TG, np.zeros_like(kept_TG)
    lowest_T1 = np.where(kept_TG, score_TG, np.inf).min(-1, keepdims=True)
    highest_T1 = np.where(kept_TG, -np.inf, score_TG).max(-1, keepdims=True)
    border_TG = np.where(kept_TG, highest_T1, lowest_T1)
    return kept_TG, _near(score_TG, border_TG, variance_TG.max(-1, keepdims=True))


def _near(one: Any, other: Any, variance: Any) -> Any:
    """Whether two scores of at most this variance each may change places."""
    with np.errstate(invalid="ignore"):  # -inf of two groups that are left out: their difference is no number
        return np.abs(one - other) <= TIE * np.sqrt(2 * variance)
