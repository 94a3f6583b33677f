"""How far a correct run may be from the float64 reference: computed, never picked by hand.

The reference is run a few times with `precision.Noise`, which perturbs it wherever a frontend rounds. The spread of
those runs is the error that the dtype, the reduction lengths and the data themselves explain, whatever cancels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moebius.core.precision import Arithmetic, Noise

SAMPLES = 8
# How many times the draws' spread an error may reach. A correct run is one more draw of the same noise, but noise has
# rare large parts: a pre-activation so near a clamp that rounding moves it across. Measured: with 3 such runs fail.
FACTOR = 6.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """Bounds of one tensor's error, absolute.

    Attributes:
        norm: of the Euclidean norm of (value - exact).
        largest: of its largest element.
        scale: Euclidean norm of the exact tensor, to make errors relative.
    """

    norm: float
    largest: float
    scale: float

    def relative(self) -> float:
        """The norm bound over the scale; infinite for a tensor of zeros with a bound above zero."""
        return _ratio(self.norm, self.scale)


def bounds(
    run: Callable[[Arithmetic], dict[str, np.ndarray]],
    exact: dict[str, np.ndarray],
    dtype: Any,
    *,
    samples: int = SAMPLES,
    factor: float = FACTOR,
) -> dict[str, Bound]:
    """Error bounds of every tensor that `run` returns.

    Args:
        run: computes the tensors under a given arithmetic; `exact` is what it returns under EXACT.
        dtype: of the implementation that is to be judged.
        samples: runs of the noise. factor: how many times their spread is allowed.
    """
    squares, largest = dict.fromkeys(exact, 0.0), dict.fromkeys(exact, 0.0)
    for seed in range(samples):  # one draw at a time: the gradients of a real layer are gigabytes
        for name, value in run(Noise(dtype, seed)).items():
            difference = value - exact[name]
            squares[name] += float(np.vdot(difference, difference))
            largest[name] = max(largest[name], float(np.abs(difference).max(initial=0.0)))
    limits = {}
    for name, value in exact.items():
        norm = float(factor * np.sqrt(squares[name] / samples))
        limits[name] = Bound(norm=norm, largest=factor * largest[name], scale=float(np.linalg.norm(value)))
    return limits


def relative_error(value: np.ndarray, exact: np.ndarray) -> float:
    """Euclidean norm of the difference over that of `exact`; nan anywhere gives inf."""
    difference = float(np.linalg.norm(np.asarray(value, np.float64) - exact))
    return float("inf") if np.isnan(difference) else _ratio(difference, float(np.linalg.norm(exact)))


def within(value: np.ndarray, exact: np.ndarray, bound: Bound) -> bool:
    """Whether a computed tensor stays inside its bounds; nan and inf do not."""
    difference = np.abs(np.asarray(value, np.float64) - exact)
    if difference.size == 0:
        return True
    return bool(np.linalg.norm(difference) <= bound.norm and difference.max() <= bound.largest)


def _ratio(difference: float, scale: float) -> float:
    if difference == 0.0:
        return 0.0
    return difference / scale if scale > 0 else float("inf")
