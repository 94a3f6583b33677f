"""The documented activations of grouped experts: views of `activate` with the weights as a column.

Each computes in promote_types(x.dtype, float32), multiplies by the routing weights there and rounds once to x's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moebius.core import activations
from moebius.core.activations import ACTIVATIONS, Activation
from moebius.core.errors import ConfigError, ShapeError
from moebius.torch_frontend.activate import activate
from moebius.torch_frontend.dtypes import promoted

if TYPE_CHECKING:
    from jaxtyping import Float


def is_gated_activation(activation: str) -> bool:
    """Whether the first projection holds a gate and an up half (U = 2 I); any other name, known or not, does not."""
    return activations.is_gated(activation)


def get_expert_activation_for_deepep(config: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """f(x, permuted_probs) of the config's `expert_activation`, for every class and backend.

    Args:
        config: MoEConfig, or any object with `expert_activation`; `swiglu_limit`, `activation_alpha` and
            `activation_limit` apply where they are there.
    Returns:
        One of this module's functions, as a functools.partial where the config sets alpha or limit.
    Raises:
        ConfigError: no such activation.
    """
    row = activations.resolve(config.expert_activation, config)
    function, fields = _FUNCTIONS[row.name]
    settings = {keyword: getattr(config, field, getattr(row, keyword)) for keyword, field in fields.items()}
    if row.name == "quick_geglu":
        settings["linear_offset"] = row.up_offset
    return partial(function, **settings) if settings else function


def weighted_bias_swiglu_impl(input: Float[Tensor, "... U"], weights: Float[Tensor, "*N"]) -> Tensor:
    """silu(gate) * up * weight on concatenated halves [..., gate | up].

    Args:
        input: [..., 2 I], floating. weights: [..., 1], broadcast against the leading axes of `input`.
    Returns:
        [..., I], dtype of `input`, rounded once.
    Raises:
        ShapeError, DTypeError: an odd width, weights that do not broadcast, or no floating input.
    """
    return _weighted(input, weights, ACTIVATIONS["swiglu"])


def weighted_bias_geglu_impl(input: Float[Tensor, "... U"], weights: Float[Tensor, "*N"]) -> Tensor:
    """gelu_tanh(gate) * up * weight on concatenated halves; see `weighted_bias_swiglu_impl`."""
    return _weighted(input, weights, ACTIVATIONS["geglu"])


def swiglu_clamped_deepep(x: Float[Tensor, "... U"], permuted_probs: Float[Tensor, "*N"], limit: float) -> Tensor:
    """silu(gate) * up * weight on concatenated halves, gate clamped to at most `limit`, up to +-limit.

    Args:
        x: [..., 2 I], floating. permuted_probs: [..., 1], broadcast against the leading axes of x; [..., I] works too.
        limit: of the clamps, 0 or more; 0 clamps to 0.
    Returns:
        [..., I], dtype of x, rounded once.
    Raises:
        ShapeError, DTypeError: an odd width, weights that do not broadcast, or no floating x.
        ConfigError: a limit below zero.
    """
    return _weighted(x, permuted_probs, replace(ACTIVATIONS["swiglu_clamped"], limit=_limit(limit)))


def swiglu_oai_deepep(
    x: Float[Tensor, "... U"], permuted_probs: Float[Tensor, "*N"], alpha: float = 1.702, limit: float = 7.0
) -> Tensor:
    """gate * sigmoid(alpha * gate) * (up + 1) * weight on concatenated halves; no clamp with limit <= 0.

    Otherwise as `swiglu_clamped_deepep`.
    """
    row = replace(ACTIVATIONS["swigluoai"], alpha=float(alpha), limit=float(limit) if limit > 0 else None)
    return _weighted(x, permuted_probs, row)


def quick_geglu_deepep(
    x: Float[Tensor, "... U"],
    permuted_probs: Float[Tensor, "*N"],
    alpha: float = 1.702,
    limit: float = 7.0,
    linear_offset: float = 1.0,
) -> Tensor:
    """gate * sigmoid(alpha * gate) * (up + linear_offset) * weight; gate in the even, up in the odd columns.

    Otherwise as `swiglu_clamped_deepep`: it clamps with any limit, 0 included.
    """
    row = replace(ACTIVATIONS["quick_geglu"], alpha=float(alpha), limit=_limit(limit), up_offset=float(linear_offset))
    return _weighted(x, permuted_probs, row)


def relu2_deepep(x: Float[Tensor, "... U"], permuted_probs: Float[Tensor, "*N"]) -> Tensor:
    """max(x, 0)^2 * weight, of the one projection x [..., I]; otherwise as `swiglu_clamped_deepep`."""
    return _weighted(x, permuted_probs, ACTIVATIONS["relu2"])


# Row of ACTIVATIONS -> its function, and its keywords with the config's field for each.
_FUNCTIONS: dict[str, tuple[Callable[..., Tensor], dict[str, str]]] = {
    "swiglu": (weighted_bias_swiglu_impl, {}),
    "swiglu_clamped": (swiglu_clamped_deepep, {"limit": "swiglu_limit"}),
    "swigluoai": (swiglu_oai_deepep, {"alpha": "activation_alpha", "limit": "activation_limit"}),
    "quick_geglu": (quick_geglu_deepep, {"alpha": "activation_alpha", "limit": "activation_limit"}),
    "geglu": (weighted_bias_geglu_impl, {}),
    "relu2": (relu2_deepep, {}),
}


def _weighted(x: Tensor, probs: Tensor, activation: Activation) -> Tensor:
    shape = _result_shape(x, probs, activation)
    leading, rows = shape[:-1], math.prod(shape[:-1])
    hidden_RU = x.expand(*leading, x.shape[-1]).reshape(rows, x.shape[-1])
    if tuple(probs.shape[-1:]) in ((), (1,)):
        return activate(hidden_RU, probs.expand(*leading, 1).reshape(rows), activation).view(shape)
    act_RI = activate(promoted(hidden_RU), None, activation)  # one weight an element
    return (act_RI.view(shape) * probs).to(x.dtype)


def _result_shape(x: Tensor, probs: Tensor, activation: Activation) -> tuple[int, ...]:
    inter = x.shape[-1] // 2 if activation.gated else x.shape[-1]
    try:
        shape = tuple(torch.broadcast_shapes((*x.shape[:-1], inter), probs.shape))
    except RuntimeError:
        shape = ()
    if shape[-1:] != (inter,):
        asked = f"permuted_probs that broadcast against x of shape {tuple(x.shape)}"
        raise ShapeError(asked, f"shape {tuple(probs.shape)}", "give one weight per row, as a column [N, 1]")
    return shape


def _limit(limit: float) -> float:
    if limit < 0:
        raise ConfigError(f"limit={limit}", "a clamp to +-limit needs 0 or more", "use 0 or more")
    return float(limit)
