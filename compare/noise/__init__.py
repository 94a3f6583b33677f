"""The noise model: how far rounding moves each element of each stage of a correct run, forward and backward.

Beside every float64 value stands the variance of its rounding error, propagated as independent variances from stage to
stage. One file a step, under the names of `moebius.core.reference`, whose values it repeats; `layer.walk` strings them
together. Sources: Higham and Mary, A New Approach to Probabilistic Rounding Error Analysis, 2019, for sums; the rest is
first-order error propagation. docs/numerics.md writes the formulas down and shows how well they hold.
"""

from moebius.compare.noise.layer import Expected, walk
from moebius.compare.noise.noisy import Model, Noisy

__all__ = ["Expected", "Model", "Noisy", "walk"]
