"""Step 6: activation times routing weight, one rounding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moebius.core.activations import Activation
from moebius.core.precision import EXACT, Arithmetic

if TYPE_CHECKING:
    from jaxtyping import Float

_GELU_SCALE = np.sqrt(2.0 / np.pi)
_GELU_CUBIC = 0.044715


def activate(
    hidden_RU: Float[np.ndarray, "R U"],
    row_weights_R: Float[np.ndarray, " R"] | None,
    activation: Activation,
    arithmetic: Arithmetic = EXACT,
) -> np.ndarray:
    """[R, I]: curve(gate) * (up + offset) * weight; None for weights of one."""
    act_RI = _act(hidden_RU, activation, arithmetic)
    if row_weights_R is not None:
        act_RI = act_RI * row_weights_R[:, None]
    return arithmetic.store(act_RI)


def activate_vjp(
    hidden_RU: Float[np.ndarray, "R U"],
    row_weights_R: Float[np.ndarray, " R"] | None,
    activation: Activation,
    dact_RI: Float[np.ndarray, "R I"],
    arithmetic: Arithmetic = EXACT,
) -> tuple[np.ndarray, np.ndarray]:
    """(dhidden_RU, drow_weights_R)."""
    weights_R1 = np.ones((len(hidden_RU), 1)) if row_weights_R is None else row_weights_R[:, None]
    drow_weights_R = arithmetic.sum(dact_RI * _act(hidden_RU, activation, arithmetic), axis=-1)
    gate_RI, up_RI = halves(hidden_RU, activation)
    low_RI, inside_RI, up_inside_RI = clamped(gate_RI, up_RI, activation)
    dgate_RI = slope(low_RI, activation) * inside_RI
    if not activation.gated:
        return arithmetic.store(arithmetic.curve(dact_RI * weights_R1 * dgate_RI)), drow_weights_R
    assert up_RI is not None
    factor_RI = bounded(up_RI, activation) + activation.up_offset
    dgate_RI = arithmetic.curve(dact_RI * weights_R1 * dgate_RI * factor_RI)
    dup_RI = arithmetic.curve(dact_RI * weights_R1 * curve(low_RI, activation) * up_inside_RI)
    return arithmetic.store(joined(dgate_RI, dup_RI, activation)), drow_weights_R


def _act(hidden_RU: Float[np.ndarray, "R U"], activation: Activation, arithmetic: Arithmetic) -> np.ndarray:
    gate_RI, up_RI = halves(hidden_RU, activation)
    low_RI, _, _ = clamped(gate_RI, up_RI, activation)
    act_RI = arithmetic.curve(curve(low_RI, activation))
    if up_RI is not None:
        act_RI = arithmetic.curve(act_RI * (bounded(up_RI, activation) + activation.up_offset))
    return act_RI


def halves(hidden_RU: Float[np.ndarray, "R U"], activation: Activation) -> tuple[np.ndarray, np.ndarray | None]:
    if not activation.gated:
        return hidden_RU, None
    if activation.interleaved:
        return hidden_RU[:, 0::2], hidden_RU[:, 1::2]
    half = hidden_RU.shape[-1] // 2
    return hidden_RU[:, :half], hidden_RU[:, half:]


def joined(gate_RI: Float[np.ndarray, "R I"], up_RI: Float[np.ndarray, "R I"], activation: Activation) -> np.ndarray:
    if activation.interleaved:
        return np.stack([gate_RI, up_RI], axis=-1).reshape(len(gate_RI), 2 * gate_RI.shape[-1])
    return np.concatenate([gate_RI, up_RI], axis=-1)


def clamped(
    gate_RI: Float[np.ndarray, "R I"], up_RI: Float[np.ndarray, "R I"] | None, activation: Activation
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(gate below the limit, where gate passes, where up passes); a value at the limit passes."""
    if activation.limit is None:
        return gate_RI, np.ones_like(gate_RI), np.ones_like(gate_RI)
    inside = np.abs(up_RI) <= activation.limit if up_RI is not None else gate_RI <= activation.limit
    return np.minimum(gate_RI, activation.limit), gate_RI <= activation.limit, inside


def bounded(up_RI: Float[np.ndarray, "R I"], activation: Activation) -> np.ndarray:
    return up_RI if activation.limit is None else np.clip(up_RI, -activation.limit, activation.limit)


def curve(gate_RI: Float[np.ndarray, "R I"], activation: Activation) -> np.ndarray:
    if activation.curve == "silu":
        return gate_RI * sigmoid(activation.alpha * gate_RI)
    if activation.curve == "gelu_tanh":
        return 0.5 * gate_RI * (1.0 + np.tanh(_GELU_SCALE * (gate_RI + _GELU_CUBIC * gate_RI**3)))
    return np.maximum(gate_RI, 0.0) ** 2


def slope(gate_RI: Float[np.ndarray, "R I"], activation: Activation) -> np.ndarray:
    """Derivative of `curve`."""
    if activation.curve == "silu":
        s = sigmoid(activation.alpha * gate_RI)
        return s * (1.0 + activation.alpha * gate_RI * (1.0 - s))
    if activation.curve == "gelu_tanh":
        t = np.tanh(_GELU_SCALE * (gate_RI + _GELU_CUBIC * gate_RI**3))
        inner = _GELU_SCALE * (1.0 + 3.0 * _GELU_CUBIC * gate_RI**2)
        return 0.5 * (1.0 + t) + 0.5 * gate_RI * (1.0 - t * t) * inner
    return 2.0 * np.maximum(gate_RI, 0.0)


def sigmoid(value: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-value)), by the exponential that cannot overflow: with tanh the left tail would cancel."""
    small = np.exp(-np.abs(value))
    return np.where(value >= 0, 1.0, small) / (1.0 + small)
