"""What a comparison says: records of numbers and verdicts, free of any framework."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

# z is an error over the standard deviation that rounding explains. One rounding of a value whose mantissa is
# log-uniform gives a root mean square of THEORY; above the limits no rounding explains it.
THEORY = float(np.sqrt(3 / (8 * np.log(2))))
FAIL_MAX, FAIL_RMS, WARN_RMS = 8.0, 2.0, 1.0
# Edges of the histogram of |z|; the last bin is open.
Z_EDGES: tuple[float, ...] = (*(round(0.25 * i, 2) for i in range(33)), float("inf"))
PASS, WARN, FAIL = "pass", "warn", "fail"
_ORDER = (PASS, WARN, FAIL)


def worst_of(verdicts: list[str]) -> str:
    """The severest of some verdicts; "pass" of none.

    >>> worst_of(["pass", "warn"])
    'warn'
    """
    return max(verdicts, key=_ORDER.index, default=PASS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """How far one tensor is from where it should be.

    Attributes:
        n: elements compared. bad: elements that are nan, inf or of the wrong shape; they fail.
        z_rms, z_max: of error over predicted standard deviation; inf where an exact element is off.
        relative: Euclidean norm of the difference over that of the exact tensor (over 1 where that is zero).
        predicted: what `relative` is expected to be at most: norm of the predicted deviations over the same.
        largest: largest element of the difference, absolute.
        equal: share of elements that are the exact value rounded once (of a pair of sides: that are equal).
        histogram: elements per bin of Z_EDGES.
        counts: whether the verdict counts; else it is information.
    """

    n: int
    bad: int
    z_rms: float
    z_max: float
    relative: float
    predicted: float
    largest: float
    equal: float
    histogram: tuple[int, ...]
    counts: bool = True

    @property
    def verdict(self) -> str:
        """ "fail" above FAIL_MAX or FAIL_RMS or with bad elements, "warn" above WARN_RMS, else "pass"."""
        if self.bad or not (self.z_max <= FAIL_MAX and self.z_rms <= FAIL_RMS):
            return FAIL
        return PASS if self.z_rms <= WARN_RMS else WARN


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One stage, gradient or parameter's gradient.

    Attributes:
        name: of moebius.core.stages, "grad." before it for a gradient, then also "x" or a parameter's name.
        whole: column -> the error against the reference from the layer's input on, rounding of all stages before
            included. A column is a side, or a pair of sides "one~other".
        step: side -> the error of this step alone: against the reference fed with the side's own inputs to it.
    """

    name: str
    whole: Mapping[str, Score]
    step: Mapping[str, Score]

    @property
    def verdict(self) -> str:
        """The severest of all that counts."""
        scores = (*self.whole.values(), *self.step.values())
        return worst_of([score.verdict for score in scores if score.counts])


@dataclass(frozen=True, kw_only=True, slots=True)
class Element:
    """One element of one tensor and how far it is off.

    Attributes:
        row: name of the row. column: side or pair. step: whether fed with the side's own inputs. layer: its index.
        index: into the tensor; of row stages the row, of parameters e.g. (expert, in, out).
        token, expert: that it belongs to, where it belongs to one.
        found: the side's value. due: the reference's, or the other side's of a pair.
        noise: predicted standard deviation. z: (found - due) over it.
    """

    row: str
    column: str
    step: bool
    index: tuple[int, ...]
    token: int | None
    expert: int | None
    found: float
    due: float
    noise: float
    z: float
    layer: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Clamped:
    """How a block's pre-activations meet the limit of its activation.

    Attributes:
        limit: of the activation. share: of the pre-activations beyond it.
        undecided: pre-activations within FAIL_MAX deviations of the limit, so that either gradient is right.
    """

    limit: float
    share: float
    undecided: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """How two sides routed the same tokens.

    Attributes:
        tokens: in all. equal: with the same set of experts.
        ties: that differ only in experts whose exact scores lie within each other's noise.
        unexplained: that differ otherwise. examples: a few of those tokens.
        counts: whether the verdict counts; else it is information.
    """

    tokens: int
    equal: int
    ties: int
    unexplained: int
    examples: tuple[int, ...] = ()
    counts: bool = True

    @property
    def verdict(self) -> str:
        """ "pass" where there are tokens and every difference is a tie."""
        return PASS if self.tokens > 0 and self.tokens == self.equal + self.ties else FAIL

    def __str__(self) -> str:
        parts = [f"{self.equal}"]
        parts += [f"{self.ties} ties"] if self.ties else []
        parts += [f"{self.unexplained} unexplained !"] if self.unexplained else []
        return " + ".join(parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """What was found in one layer.

    Attributes:
        index: of the layer. sides: names, in the order of the columns. columns: sides, then pairs.
        routing: column -> agreement on the experts; a side's with the reference, a pair's with each other.
        load: side -> tokens per expert, the reference's included.
        rows: stages in order, then gradients in the order of the backward pass, then those of parameters.
        clamped: None where the activation has no limit.
        worst: elements by falling |z|, a few of every tensor and column.
        notes: what a reader should know, in sentences. dropped: side -> routes that found no room, where there are any.
    """

    index: int
    sides: tuple[str, ...]
    columns: tuple[str, ...]
    routing: Mapping[str, Agreement]
    load: Mapping[str, tuple[int, ...]]
    rows: tuple[Row, ...]
    clamped: Clamped | None
    worst: tuple[Element, ...]
    notes: tuple[str, ...] = ()
    dropped: Mapping[str, int] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """The severest of routing and rows; "fail" where nothing was compared, or a route found no room."""
        if not self.rows or any(self.dropped.values()):
            return FAIL
        counted = [agreement.verdict for agreement in self.routing.values() if agreement.counts]
        return worst_of([*counted, *(row.verdict for row in self.rows)])

    def row(self, name: str) -> Row:
        """The row of that name; KeyError without one."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    @property
    def faults(self) -> list[str]:
        """Every warning and failure that counts, in words, in the order of the pass."""
        found = [
            f"dropped, {side}: {count} routes found no room; raise dispatcher_bound, or leave it out"
            for side, count in self.dropped.items()
        ]
        for column, agreement in self.routing.items():
            if agreement.counts and agreement.verdict == FAIL:
                found.append(f"ids, {column}: {agreement}, tokens {', '.join(map(str, agreement.examples))}")
        for row in self.rows:
            for kind, scores in (("", row.whole), (", this step alone", row.step)):
                for column, score in scores.items():
                    if score.counts and score.verdict != PASS:
                        bad = f", {score.bad} bad elements" if score.bad else ""
                        found.append(
                            f"{row.name}, {column}{kind}: {score.verdict}, z_rms {score.z_rms:.3g}, "
                            f"z_max {score.z_max:.3g}{bad}"
                        )
        return found
