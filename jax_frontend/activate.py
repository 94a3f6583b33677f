"""Step 6: activation times routing weight, one rounding."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import Array

from moebius.core import checks
from moebius.core.activations import Activation
from moebius.jax_frontend.dtypes import promoted

if TYPE_CHECKING:
    from jaxtyping import Float

_GELU_SCALE = math.sqrt(2.0 / math.pi)
_GELU_CUBIC = 0.044715


def activate(hidden_RU: Float[Array, "R U"], row_weights_R: Float[Array, " R"] | None, activation: Activation) -> Array:
    """curve(gate) * (up + offset) * weight, computed in promote_types(dtype, float32) and rounded once.

    Spec: core.reference.activate; the row of ACTIVATIONS names its source.

    Args:
        hidden_RU: [R, U] pre-activation.
        row_weights_R: [R] routing weights, None for ones.
        activation: a resolved row of core.ACTIVATIONS.
    Returns:
        [R, I], dtype of hidden_RU.
    """
    checks.hidden(hidden_RU, row_weights_R, activation.gated)
    return _keeping_inputs(hidden_RU, row_weights_R, activation)


def activated(
    hidden_RU: Float[Array, "R U"],
    row_weights_R: Float[Array, " R"] | None,
    activation: Activation,
    wide: Callable[[Array], Array] = promoted,
) -> Array:
    """`activate` without checks, and for its gradients everything kept: for a rule that keeps less by itself.

    Args:
        wide: dtypes.promoted, or dtypes.widened where that does.
    """
    gate_RI, up_RI = _halves(wide(hidden_RU), activation)
    if activation.limit is not None:
        gate_RI = _below(gate_RI, activation.limit)
    act_RI = _curve(gate_RI, activation)
    if up_RI is not None:
        if activation.limit is not None:
            up_RI = -_below(-_below(up_RI, activation.limit), activation.limit)
        act_RI = act_RI * (up_RI + activation.up_offset if activation.up_offset else up_RI)
    if row_weights_R is not None:
        act_RI = act_RI * row_weights_R[:, None]
    return act_RI.astype(hidden_RU.dtype)


# For the backward pass keep the inputs alone and compute the rest again: bfloat16 hidden_RU takes a fifth of what the
# float32 steps would, and measured on a CPU the time is the same.
_keeping_inputs = partial(jax.checkpoint, static_argnums=2)(activated)


def _halves(hidden_RU: Float[Array, "R U"], activation: Activation) -> tuple[Array, Array | None]:
    if not activation.gated:
        return hidden_RU, None
    # split, not slices: the gradient of a split is one concatenation, that of slices a sum of padded arrays.
    if activation.interleaved:
        gate_RI1, up_RI1 = jnp.split(hidden_RU.reshape(*hidden_RU.shape[:-1], hidden_RU.shape[-1] // 2, 2), 2, axis=-1)
        return gate_RI1[..., 0], up_RI1[..., 0]
    gate_RI, up_RI = jnp.split(hidden_RU, 2, axis=-1)
    return gate_RI, up_RI


def _below(value: Array, limit: float) -> Array:
    """min(value, limit), with gradient 1 at the limit and NaN kept: what both frameworks can say alike."""
    return jnp.where(value > limit, limit, value)


def _curve(gate_RI: Float[Array, "R I"], activation: Activation) -> Array:
    if activation.curve == "silu":
        return gate_RI * jax.nn.sigmoid(activation.alpha * gate_RI if activation.alpha != 1.0 else gate_RI)
    if activation.curve == "gelu_tanh":
        inner_RI = _GELU_SCALE * (gate_RI + _GELU_CUBIC * gate_RI**3)
        return 0.5 * gate_RI * (1.0 + jnp.tanh(inner_RI))
    return jax.nn.relu(gate_RI) ** 2
