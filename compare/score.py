"""Errors into a score, region by region: no more than a block of a tensor is held at a time."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from moebius.compare.noise.layer import Index
from moebius.compare.verdict import Z_EDGES, Score

# Elements at a time: what is computed from them stays in a core's second cache.
_BLOCK = 1 << 16
_MOST = 20  # elements kept of each tensor


@dataclass(frozen=True, slots=True)
class Kept:
    """An element that is kept because it is far off: its region, flat position in it, values, deviation, z."""

    index: Index
    position: int
    found: float
    due: float
    noise: float
    z: float


@dataclass
class Tally:
    """What a Score is made of, summed up over the regions of one tensor.

    Attributes:
        counts: whether the verdict will count.
    """

    counts: bool = True
    n: int = 0
    bad: int = 0
    same: int = 0
    z_squares: float = 0.0
    z_max: float = 0.0
    squares: float = 0.0
    exact_squares: float = 0.0
    variances: float = 0.0
    largest: float = 0.0
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(len(Z_EDGES) - 1, np.int64))
    kept: list[Kept] = field(default_factory=list)

    def add(
        self,
        found: np.ndarray,
        due: np.ndarray,
        variance: np.ndarray | None,
        dtype: str,
        index: Index = (),
        *,
        histogram: bool = True,
        keep: bool = True,
    ) -> None:
        """Hold a region against what is due.

        Args:
            found, due: of one shape; another shape makes every element bad. variance: of due's shape, None for 0.
            dtype: that due is rounded to where equality is counted. index: of the region.
            histogram: sort |z| into bins; for large tensors it would take longer than all the rest.
            keep: remember the elements that are farthest off.
        """
        if found.shape != due.shape:
            self.n += due.size
            self.bad += due.size
            return
        flat = found.reshape(-1), due.reshape(-1), None if variance is None else variance.reshape(-1)
        for start in range(0, due.size, _BLOCK):
            part = slice(start, start + _BLOCK)
            block = flat[0][part].astype(np.float64), flat[1][part], None if flat[2] is None else flat[2][part]
            z_squares = self._block(*block, dtype, histogram)
            if keep:
                self._keep(z_squares, *block, index, start)

    def _block(
        self,
        found: np.ndarray,
        due: np.ndarray,
        variance: np.ndarray | None,
        dtype: str,
        histogram: bool,
    ) -> np.ndarray:
        """Add a block; returns its squared z, inf of elements that are no numbers."""
        squares, broken = np.square(found - due), None
        self.n += due.size
        self.same += int((found == _stored(due, dtype)).sum())
        total, noise = float(squares.sum()), 0.0 if variance is None else float(variance.sum())
        if not np.isfinite(total + noise):
            broken = ~np.isfinite(squares if variance is None else squares + variance)
            self.bad += int(broken.sum())
            squares[broken] = 0.0
            due, variance = np.where(broken, 0.0, due), None if variance is None else np.where(broken, 0.0, variance)
            total, noise = float(squares.sum()), 0.0 if variance is None else float(variance.sum())
        self.squares += total
        self.exact_squares += float(due @ due)
        self.variances += noise
        self.largest = max(self.largest, float(np.sqrt(squares.max(initial=0.0))))
        with np.errstate(divide="ignore", invalid="ignore"):
            z_squares = np.divide(squares, 0.0 if variance is None else variance)
        if variance is None or not variance.all():
            z_squares[squares == 0.0] = 0.0
        self.z_squares += float(z_squares.sum())
        self.z_max = max(self.z_max, float(np.sqrt(z_squares.max(initial=0.0))))
        if histogram:
            places = np.minimum(np.sqrt(z_squares) * 4.0, len(self.histogram) - 1).astype(np.int64)
            self.histogram += np.bincount(places, minlength=len(self.histogram))
        if broken is not None:
            z_squares[broken] = np.inf
        return z_squares

    def _keep(
        self,
        z_squares: np.ndarray,
        found: np.ndarray,
        due: np.ndarray,
        variance: np.ndarray | None,
        index: Index,
        start: int,
    ) -> None:
        least = abs(self.kept[-1].z) ** 2 if len(self.kept) == _MOST else 0.0
        places = np.flatnonzero(z_squares > least)
        if not places.size:
            return
        if places.size > _MOST:
            places = places[np.argpartition(-z_squares[places], _MOST - 1)[:_MOST]]
        for place in places:
            noise = 0.0 if variance is None else float(np.sqrt(variance[place]))
            z = float(np.copysign(np.sqrt(z_squares[place]), found[place] - due[place]))
            self.kept.append(Kept(index, start + int(place), float(found[place]), float(due[place]), noise, z))
        self.kept = sorted(self.kept, key=lambda kept: -abs(kept.z))[:_MOST]

    def score(self) -> Score:
        """The score of everything added; of nothing, a tensor without elements: it passes."""
        scale = np.sqrt(self.exact_squares) or 1.0
        return Score(
            n=self.n,
            bad=self.bad,
            z_rms=float(np.sqrt(self.z_squares / self.n)) if self.n else 0.0,
            z_max=self.z_max,
            relative=float(np.sqrt(self.squares) / scale),
            predicted=float(np.sqrt(self.variances) / scale),
            largest=self.largest,
            equal=self.same / self.n if self.n else 1.0,
            histogram=tuple(self.histogram.tolist()),
            counts=self.counts,
        )


def _stored(value: np.ndarray, dtype: str) -> np.ndarray:
    """The nearest numbers that `dtype` holds, in float64."""
    if dtype == "float64":
        return value
    if dtype == "float32":
        return value.astype(np.float32).astype(np.float64)
    rounded: np.ndarray = torch.from_numpy(np.ascontiguousarray(value)).to(getattr(torch, dtype)).double().numpy()
    return rounded
