"""What a comparison says: records of numbers and verdicts, free of any framework."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# The pairs that are held against each other, in the order of the table's columns.
PAIRS = ("torch~reference", "flax~reference", "torch~flax")


@dataclass(frozen=True, kw_only=True, slots=True)
class Error:
    """How far one tensor is from where it should be.

    Attributes:
        relative, bound: Euclidean norm of the difference over that of the exact tensor (over 1 where that is zero),
            and what is allowed.
        largest, largest_bound: the largest element of the difference, absolute, and what is allowed.
        passed: both are inside, and the bounds are finite.
    """

    relative: float
    bound: float
    largest: float
    largest_bound: float
    passed: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One tensor and its error for each of some pairs; without any it has not passed."""

    name: str
    errors: Mapping[str, Error]

    @property
    def passed(self) -> bool:
        """Whether every error is inside its bound."""
        return bool(self.errors) and all(error.passed for error in self.errors.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Clamped:
    """How a block's pre-activations meet the limit of its activation.

    Attributes:
        limit: of the activation. share: of the pre-activations beyond it.
        noise: how far a pre-activation near the limit may be off in this dtype.
        undecided: pre-activations that lie within the noise of the limit, so that either gradient is right.
    """

    limit: float
    share: float
    noise: float
    undecided: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """How two sides routed the same tokens.

    Attributes:
        tokens: in all. equal: with the same set of experts.
        ties: that differ only in experts whose exact scores lie within each other's noise.
        unexplained: that differ otherwise.
    """

    tokens: int
    equal: int
    ties: int
    unexplained: int

    @property
    def passed(self) -> bool:
        """Whether there are tokens and every difference is a tie."""
        return self.tokens > 0 and self.tokens == self.equal + self.ties

    def __str__(self) -> str:
        parts = [f"{self.equal}"]
        parts += [f"{self.ties} ties"] if self.ties else []
        parts += [f"{self.unexplained} unexplained !"] if self.unexplained else []
        return " + ".join(parts)
