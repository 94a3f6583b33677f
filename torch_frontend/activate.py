"""Step 6: activation times routing weight, one rounding."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from moebius.core import checks
from moebius.core.activations import Activation
from moebius.torch_frontend.dtypes import promoted

if TYPE_CHECKING:
    from jaxtyping import Float

_GELU_SCALE = math.sqrt(2.0 / math.pi)
_GELU_CUBIC = 0.044715


def activate(
    hidden_RU: Float[Tensor, "R U"], row_weights_R: Float[Tensor, " R"] | None, activation: Activation
) -> Tensor:
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
    gate_RI, up_RI = _halves(promoted(hidden_RU), activation)
    if activation.limit is not None:
        gate_RI = _below(gate_RI, activation.limit)
    act_RI = _curve(gate_RI, activation)
    if up_RI is not None:
        if activation.limit is not None:
            up_RI = -_below(-_below(up_RI, activation.limit), activation.limit)
        act_RI = act_RI * (up_RI + activation.up_offset if activation.up_offset else up_RI)
    if row_weights_R is not None:
        act_RI = act_RI * row_weights_R[:, None]
    return act_RI.to(hidden_RU.dtype)


def _halves(hidden_RU: Float[Tensor, "R U"], activation: Activation) -> tuple[Tensor, Tensor | None]:
    if not activation.gated:
        return hidden_RU, None
    # unbind and chunk, not slices: their gradient is one concatenation, that of slices a sum of padded tensors.
    if activation.interleaved:
        gate_RI, up_RI = hidden_RU.unflatten(-1, (hidden_RU.shape[-1] // 2, 2)).unbind(-1)
        return gate_RI, up_RI
    gate_RI, up_RI = hidden_RU.chunk(2, dim=-1)
    return gate_RI, up_RI


def _below(value: Tensor, limit: float) -> Tensor:
    """min(value, limit), with gradient 1 at the limit and NaN kept: what both frameworks can say alike."""
    return torch.where(value > limit, limit, value)


def _curve(gate_RI: Float[Tensor, "R I"], activation: Activation) -> Tensor:
    if activation.curve == "silu":
        if activation.alpha == 1.0:
            return F.silu(gate_RI)  # one pass each way instead of two and three
        return gate_RI * torch.sigmoid(activation.alpha * gate_RI)
    if activation.curve == "gelu_tanh":
        inner_RI = _GELU_SCALE * (gate_RI + _GELU_CUBIC * gate_RI**3)
        return 0.5 * gate_RI * (1.0 + torch.tanh(inner_RI))
    return torch.relu(gate_RI) ** 2
