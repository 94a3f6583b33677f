"""A value beside the variance of its error, and how the two pass through sums, products and roundings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moebius.core.precision import DTYPES, accumulate_dtype, dtype_name

# Roundings of one elementwise formula in the accumulate dtype, as units in the last place of its result. Measured:
# exp, tanh and log1p of both frameworks stay within 3 units; a formula strings a few of them together.
CURVE = 6.0


@dataclass(frozen=True, slots=True)
class Noisy:
    """A float64 value and how uncertain it is.

    Attributes:
        value: exact. own: variance of each element's own error; None for an exact value.
        common: [rows] variance of a relative error that all elements of a row share (its routing weight's): it does
            not average out in a sum along the row, and so is carried apart; None for none.
    """

    value: np.ndarray
    own: np.ndarray | None = None
    common: np.ndarray | None = None

    @property
    def variance(self) -> np.ndarray | None:
        """Of each element's whole error; None for an exact value."""
        if self.common is None:
            return self.own
        shared = self.common[:, None] * self.value**2
        return shared if self.own is None else self.own + shared

    def __getitem__(self, index: slice | np.ndarray) -> Noisy:
        """Rows of the value; a common error becomes part of each element's own."""
        variance = self.variance
        return Noisy(self.value[index], None if variance is None else variance[index])


def added(*variances: np.ndarray | float | None) -> np.ndarray | None:
    """The sum of independent variances; None where all are."""
    total = None
    for variance in variances:
        if variance is not None:
            total = variance if total is None else total + variance
    return None if total is None else np.asarray(total)


def scaled(variance: np.ndarray | None, factor: np.ndarray | float) -> np.ndarray | None:
    """The variance after a product with an exact factor."""
    return None if variance is None else variance * np.square(factor)


@dataclass(frozen=True, slots=True)
class Model:
    """Where a frontend rounds in one dtype.

    Attributes:
        dtype: of the tensors. accumulate: of sums and elementwise formulas.
    """

    dtype: str
    accumulate: str

    @classmethod
    def of(cls, dtype: object) -> Model:
        """The model of a dtype given by any framework's name."""
        return cls(dtype_name(dtype), accumulate_dtype(dtype))

    @property
    def unit(self) -> float:
        """Unit roundoff of the accumulate dtype."""
        return DTYPES[self.accumulate][0]

    def stored(self, noisy: Noisy, dtype: str | None = None) -> Noisy:
        """One rounding to the tensors' dtype, or to `dtype`."""
        return Noisy(noisy.value, added(noisy.own, rounding(noisy.value, dtype or self.dtype)), noisy.common)

    def dot(self, a: Noisy, b: Noisy) -> Noisy:
        """a @ b, accumulated: the inputs' errors, and a rounding of each partial sum.

        The n partial sums of uncorrelated terms walk to the root of their squares: n / 2 times those in all; terms that
        add up instead of averaging out drift to the result: n / 3 times its square.
        """
        length = max(a.value.shape[-1], 1)
        a_squared = np.square(a.value)
        own = a_squared * (self.unit**2 * length / 2)
        if a.own is not None:
            own += a.own
        value = a.value @ b.value
        variance = np.square(value)
        variance *= self.unit**2 * length / 3
        variance += own @ np.square(b.value)
        b_variance = b.variance
        if b_variance is not None:
            variance += a_squared @ b_variance
        return Noisy(value, variance, a.common)

    def total(self, noisy: Noisy, axis: int) -> Noisy:
        """The sum along an axis, accumulated; a common error becomes part of each element's own."""
        value, variance = noisy.value, noisy.variance
        length, total = max(value.shape[axis], 1), value.sum(axis)
        partial = (np.square(value).sum(axis) / 2 + np.square(total) / 3) * (self.unit**2 * length)
        return Noisy(total, added(partial, None if variance is None else variance.sum(axis)))

    def formula(self, magnitude: np.ndarray) -> np.ndarray:
        """Variance of an elementwise formula's own roundings; `magnitude` is the sum of its terms' absolute values."""
        return np.square(magnitude) * ((CURVE * self.unit) ** 2 / 3)


def rounding(value: np.ndarray, dtype: str) -> np.ndarray:
    """Variance of one rounding: uniform within a unit in the last place, taken as its upper end u |x|."""
    unit, granularity = DTYPES[dtype]
    return np.square(np.maximum(unit * np.abs(value), 0.5 * granularity)) / 3
