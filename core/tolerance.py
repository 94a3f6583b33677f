"""How far a correct run may be from the float64 reference: computed, never picked by hand.

The reference is run a few times with `precision.Noise`, which perturbs it wherever a frontend rounds. The spread of
those runs is the error that the dtype, the reduction lengths and the data themselves explain, whatever cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moebius.core.precision import Arithmetic, Noise

# A correct run is one more draw of the same noise; the norm of a draw stays well within this many times the
# root mean square of eight others, also for a tensor of one element.
FACTOR = 6.0
SAMPLES = 8


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
    errors: dict[str, list[np.ndarray]] = {name: [] for name in exact}
    for seed in range(samples):
        for name, value in run(Noise(dtype, seed)).items():
            errors[name].append(value - exact[name])
    return {name: _bound(exact[name], draws, factor) for name, draws in errors.items()}


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


def _bound(exact: np.ndarray, draws: Sequence[np.ndarray], factor: float) -> Bound:
    norms = np.array([np.linalg.norm(draw) for draw in draws])
    largest = max((float(np.abs(draw).max()) for draw in draws if draw.size), default=0.0)
    return Bound(
        norm=factor * float(np.sqrt((norms**2).mean())),
        largest=factor * largest,
        scale=float(np.linalg.norm(exact)),
    )


def _ratio(difference: float, scale: float) -> float:
    if difference == 0.0:
        return 0.0
    return difference / scale if scale > 0 else float("inf")
