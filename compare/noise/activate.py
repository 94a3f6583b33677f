"""Step 6: how a clamp, a curve and a product pass errors on, forward and backward."""

from __future__ import annotations

import numpy as np

from moebius.compare.noise.matmul import times_rows
from moebius.compare.noise.noisy import Model, Noisy, added, scaled
from moebius.compare.verdict import FAIL_MAX
from moebius.core.activations import Activation
from moebius.core.reference.activate import bounded, clamped, curve, halves, joined, sigmoid, slope

# Where exp overflows in float32, a sigmoid is zero that is this small at most.
_VANISHED = 2.0**-126
_STEP = 2.0**-13  # of the central difference that bends the slope
_RAREST = 2.0 / FAIL_MAX**2  # probability of a crossing: a jump is then FAIL_MAX / sqrt(2) deviations at most


def activate(model: Model, hidden_RU: Noisy, row_weights_R: Noisy | None, activation: Activation) -> Noisy:
    """[R, I]: curve(gate) * (up + offset) * weight, rounded once; the weight's error is common to a row."""
    act_RI = unweighted(model, hidden_RU, activation)
    return model.stored(act_RI if row_weights_R is None else times_rows(act_RI, row_weights_R))


def activate_vjp(
    model: Model, hidden_RU: Noisy, row_weights_R: Noisy | None, activation: Activation, dact_RI: Noisy
) -> tuple[Noisy, Noisy]:
    """(dhidden_RU, drow_weights_R); the second is not rounded yet."""
    act_RI = unweighted(model, hidden_RU, activation)
    products = Noisy(
        dact_RI.value * act_RI.value,
        added(scaled(dact_RI.variance, act_RI.value), scaled(act_RI.variance, dact_RI.value)),
    )
    drow_weights_R = model.total(products, axis=-1)
    weighted_RI = dact_RI if row_weights_R is None else times_rows(dact_RI, row_weights_R)
    parts = _gate_and_up_vjp(model, hidden_RU, activation, Noisy(weighted_RI.value, weighted_RI.own))
    values, owns = [part.value for part in parts], [part.own for part in parts]
    if not activation.gated:
        return model.stored(Noisy(values[0], owns[0], weighted_RI.common)), drow_weights_R
    value_RU = joined(values[0], values[1], activation)
    assert owns[0] is not None and owns[1] is not None  # formulas round
    return model.stored(Noisy(value_RU, joined(owns[0], owns[1], activation), weighted_RI.common)), drow_weights_R


def unweighted(model: Model, hidden_RU: Noisy, activation: Activation) -> Noisy:
    """[R, I]: curve(gate) * (up + offset), in the accumulate dtype."""
    gate_RI, up_RI = _noisy_halves(hidden_RU, activation)
    low_RI, gate_passes, up_passes = _passing(gate_RI, up_RI, activation)
    f_RI, slope_RI, _ = _steepness(low_RI, gate_RI, activation)
    factor_RI = 1.0 if up_RI is None else bounded(up_RI.value, activation) + activation.up_offset
    variance = model.formula(_magnitude(low_RI, activation) * factor_RI)
    variance += np.square(_argument(model, low_RI, activation) * slope_RI * factor_RI)
    variance += np.square(_VANISHED * low_RI * factor_RI)
    if gate_RI.own is not None:
        variance += gate_RI.own * gate_passes * np.square(slope_RI * factor_RI)
    if up_RI is not None and up_RI.own is not None:
        variance += up_RI.own * up_passes * np.square(f_RI)
    return Noisy(f_RI * factor_RI, variance)


def undecided(hidden_RU: Noisy, activation: Activation) -> np.ndarray:
    """[R, U] bool: pre-activations whose error may carry them across the limit."""
    gate_RI, up_RI = _noisy_halves(hidden_RU, activation)
    gate_near, up_near = _near(gate_RI, activation), None if up_RI is None else _near(up_RI, activation, both=True)
    return gate_near if up_near is None else joined(gate_near, up_near, activation)


def beyond(hidden_RU: np.ndarray, activation: Activation) -> np.ndarray:
    """[R, U] bool: pre-activations that the limit cuts."""
    gate_RI, up_RI = halves(hidden_RU, activation)
    _, gate_inside, up_inside = clamped(gate_RI, up_RI, activation)
    return (joined(gate_inside, up_inside, activation) if activation.gated else gate_inside) == 0


def _gate_and_up_vjp(model: Model, hidden_RU: Noisy, activation: Activation, dout_RI: Noisy) -> list[Noisy]:
    """The gradients of gate and, where there is one, of up, before their rounding."""
    gate_RI, up_RI = _noisy_halves(hidden_RU, activation)
    low_RI, gate_passes, up_passes = _passing(gate_RI, up_RI, activation)
    _, gate_inside, up_inside = clamped(gate_RI.value, None if up_RI is None else up_RI.value, activation)
    f_RI, slope_RI, bend_RI = _steepness(low_RI, gate_RI, activation)
    factor_RI = np.ones_like(f_RI) if up_RI is None else bounded(up_RI.value, activation) + activation.up_offset
    d_RI = dout_RI.value
    variance = added(
        model.formula(d_RI * _slope_magnitude(low_RI, activation) * factor_RI),
        np.square(_argument(model, low_RI, activation) * d_RI * bend_RI * factor_RI),
        np.square(_VANISHED * d_RI * (1.0 + np.abs(low_RI)) * factor_RI),
        scaled(dout_RI.own, slope_RI * factor_RI),
        _times(gate_RI.own, np.square(d_RI * bend_RI * factor_RI)),
        None if up_RI is None else _times(up_RI.own, up_passes * np.square(d_RI * slope_RI)),
    )
    jump = np.square(d_RI * slope_RI * factor_RI) * _crossing(gate_RI, activation)
    assert variance is not None
    value_RI = d_RI * slope(low_RI, activation) * gate_inside * factor_RI
    parts = [Noisy(value_RI, variance * gate_passes + jump)]
    if up_RI is not None:
        variance = added(
            model.formula(d_RI * _magnitude(low_RI, activation)),
            np.square(_argument(model, low_RI, activation) * d_RI * slope_RI),
            np.square(_VANISHED * d_RI * low_RI),
            scaled(dout_RI.own, f_RI),
            _times(gate_RI.own, gate_passes * np.square(d_RI * slope_RI)),
        )
        assert variance is not None
        jump = np.square(d_RI * f_RI) * _crossing(up_RI, activation, both=True)
        parts.append(Noisy(d_RI * f_RI * up_inside, variance * up_passes + jump))
    return parts


def _noisy_halves(hidden_RU: Noisy, activation: Activation) -> tuple[Noisy, Noisy | None]:
    gate_RI, up_RI = halves(hidden_RU.value, activation)
    variance = hidden_RU.variance
    gate_own, up_own = (None, None) if variance is None else halves(variance, activation)
    return Noisy(gate_RI, gate_own), None if up_RI is None else Noisy(up_RI, up_own)


def _passing(gate_RI: Noisy, up_RI: Noisy | None, activation: Activation) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(gate below the limit, where gate's error passes, where up's does): inside, or too near the limit to tell."""
    low_RI, gate_inside, up_inside = clamped(gate_RI.value, None if up_RI is None else up_RI.value, activation)
    gate_passes = (gate_inside > 0) | _near(gate_RI, activation)
    up_passes = up_inside > 0
    if up_RI is not None:
        up_passes = up_passes | _near(up_RI, activation, both=True)
    return low_RI, gate_passes, up_passes


def _near(half_RI: Noisy, activation: Activation, both: bool = False) -> np.ndarray:
    """Where a value lies within FAIL_MAX deviations of the limit (with `both`, of either)."""
    return _deviations(half_RI, activation, both) <= FAIL_MAX


def _crossing(half_RI: Noisy, activation: Activation, both: bool = False) -> np.ndarray:
    """Probability that a value's error carries it across the limit, where its gradient jumps between 0 and whole.

    A limit is a number of the dtype: a value above it by less than half a unit in the last place is rounded onto it,
    and a value on the limit passes. Never less than what keeps a rare jump below FAIL_MAX: rounding explains it.
    """
    away = _deviations(half_RI, activation, both)
    tail = 1.0 / (1.0 + np.exp(np.minimum(1.702 * away, 50.0)))  # the logistic curve next to the normal one
    assert activation.limit is not None or np.isinf(away).all()
    above = (np.abs(half_RI.value) if both else half_RI.value) > (activation.limit or 0.0)
    tail = np.where(above & (away <= np.sqrt(3.0)), 1.0, tail)  # sqrt(3) deviations are half a unit
    return np.where(away <= FAIL_MAX, np.maximum(tail, _RAREST), 0.0)


def _deviations(half_RI: Noisy, activation: Activation, both: bool) -> np.ndarray:
    """Distance from the limit in standard deviations; infinite without a limit and for exact values."""
    if activation.limit is None or half_RI.own is None:
        return np.full(half_RI.value.shape, np.inf)
    distance = np.abs((np.abs(half_RI.value) if both else half_RI.value) - activation.limit)
    return distance / np.sqrt(half_RI.own)


def _times(variance: np.ndarray | None, squared: np.ndarray) -> np.ndarray | None:
    return None if variance is None else variance * squared


def _steepness(low_RI: np.ndarray, gate_RI: Noisy, activation: Activation) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(curve, slope, derivative of the slope) as errors meet them: at the kink of relu2 those of its steeper side."""
    slope_RI = slope(low_RI, activation)
    bend_RI = (slope(low_RI + _STEP, activation) - slope(low_RI - _STEP, activation)) / (2 * _STEP)
    if activation.curve == "relu2" and gate_RI.own is not None:
        deviation = np.sqrt(gate_RI.own)
        near = np.abs(low_RI) <= FAIL_MAX * deviation
        slope_RI = np.where(near, np.maximum(slope_RI, 2.0 * deviation), slope_RI)
        bend_RI = np.where(near, 2.0, bend_RI)
    return curve(low_RI, activation), slope_RI, bend_RI


def _magnitude(gate_RI: np.ndarray, activation: Activation) -> np.ndarray:
    """The curve with its terms' absolute values added: what its own roundings are relative to."""
    if activation.curve == "gelu_tanh":
        return np.abs(gate_RI)  # 0.5 g (1 + tanh) cancels where tanh nears -1
    return np.abs(curve(gate_RI, activation))


def _argument(model: Model, gate_RI: np.ndarray, activation: Activation) -> np.ndarray:
    """Deviation of the gate that stands for the rounding of the exponential's argument, alpha times the gate."""
    return (2.0 * model.unit) * np.abs(gate_RI)  # alpha's own rounding and the product's


def _slope_magnitude(gate_RI: np.ndarray, activation: Activation) -> np.ndarray:
    """The slope with its terms' absolute values added."""
    if activation.curve == "silu":  # s (1 + a g (1 - s))
        s = sigmoid(activation.alpha * gate_RI)
        return s * (1.0 + np.abs(activation.alpha * gate_RI))
    if activation.curve == "gelu_tanh":
        return 1.0 + np.abs(gate_RI)
    return np.abs(slope(gate_RI, activation))
