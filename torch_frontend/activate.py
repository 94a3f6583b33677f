"""Step 6: activation times routing weight, one rounding."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moebius.core import checks
from moebius.core.activations import Activation
from moebius.torch_frontend import launch
from moebius.torch_frontend.bias import biased
from moebius.torch_frontend.dtypes import accumulate_dtype, promoted
from moebius.torch_frontend.operators import call, differentiate

if TYPE_CHECKING:
    from jaxtyping import Float, Int

# What an operator takes of an Activation, in this order.
Fields = tuple[str, bool, bool, float, float | None, float]

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
    act_RI: Tensor = call(_activate, hidden_RU, row_weights_R, *fields(activation))
    return act_RI


def activate_rows(
    hidden_RU: Float[Tensor, "R U"],
    row_weights_R: Float[Tensor, " R"] | None,
    activation: Activation,
    *,
    bias_eU: Float[Tensor, "e U"] | None = None,
    row_experts_R: Int[Tensor, " R"] | None = None,
) -> Tensor:
    """`activate` of `add_bias`, in one kernel where there is one; no gradient."""
    if launch.serves(hidden_RU):
        return launch.activate_rows(hidden_RU, row_weights_R, activation, bias_eU=bias_eU, row_experts_R=row_experts_R)
    return _formula(biased(hidden_RU, bias_eU, row_experts_R), row_weights_R, activation)


def activate_rows_backward(
    dact_RI: Float[Tensor, "R I"],
    hidden_RU: Float[Tensor, "R U"],
    row_weights_R: Float[Tensor, " R"] | None,
    activation: Activation,
    *,
    bias_eU: Float[Tensor, "e U"] | None = None,
    row_experts_R: Int[Tensor, " R"] | None = None,
    in_place: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(dhidden_RU in hidden's dtype, drow_weights_R promoted or None) of `activate_rows`.

    Args:
        in_place: write dhidden_RU over hidden_RU.
    """
    if launch.serves(hidden_RU):
        return launch.activate_rows_backward(
            dact_RI,
            hidden_RU,
            row_weights_R,
            activation,
            bias_eU=bias_eU,
            row_experts_R=row_experts_R,
            in_place=in_place,
        )
    value_RU = biased(hidden_RU, bias_eU, row_experts_R)
    dhidden_RU, drow_weights_R = _formula_backward(dact_RI, value_RU, row_weights_R, activation)
    return (hidden_RU.copy_(dhidden_RU) if in_place else dhidden_RU), drow_weights_R


def fields(activation: Activation) -> Fields:
    """What an operator takes of `activation`: it knows strings and numbers, not records."""
    a = activation
    return a.curve, a.gated, a.interleaved, a.alpha, a.limit, a.up_offset


@lru_cache(maxsize=256)
def of_fields(
    curve: Any, gated: bool, interleaved: bool, alpha: float, limit: float | None, up_offset: float
) -> Activation:
    """The activation that `fields` took apart."""
    return Activation(
        name="of fields",
        source="an operator's arguments",
        curve=curve,
        gated=gated,
        interleaved=interleaved,
        alpha=alpha,
        limit=limit,
        up_offset=up_offset,
    )


def _formula(
    hidden_RU: Float[Tensor, "R U"], row_weights_R: Float[Tensor, " R"] | None, activation: Activation
) -> Tensor:
    gate_RI, up_RI = _halves(promoted(hidden_RU), activation)
    act_RI = _curve(_clamped_gate(gate_RI, activation), activation)
    if up_RI is not None:
        act_RI = act_RI * _offset_up(up_RI, activation)
    if row_weights_R is not None:
        act_RI = act_RI * row_weights_R[:, None]
    return act_RI.to(hidden_RU.dtype)


def _formula_backward(
    dact_RI: Float[Tensor, "R I"],
    hidden_RU: Float[Tensor, "R U"],
    row_weights_R: Float[Tensor, " R"] | None,
    activation: Activation,
) -> tuple[Tensor, Tensor | None]:
    gate_RI, up_RI = _halves(promoted(hidden_RU), activation)
    clamped_RI = _clamped_gate(gate_RI, activation)
    curve_RI = _curve(clamped_RI, activation)
    offset_RI = None if up_RI is None else _offset_up(up_RI, activation)
    dact_RI, drow_weights_R = promoted(dact_RI), None
    if row_weights_R is not None:
        act_RI = curve_RI if offset_RI is None else curve_RI * offset_RI
        drow_weights_R = (dact_RI * act_RI).sum(-1)
        dact_RI = dact_RI * row_weights_R[:, None]
    dgate_RI = _curve_backward(dact_RI if offset_RI is None else dact_RI * offset_RI, clamped_RI, activation)
    if activation.limit is not None:
        dgate_RI = dgate_RI.masked_fill(gate_RI > activation.limit, 0.0)
    if up_RI is None:
        return dgate_RI.to(hidden_RU.dtype), drow_weights_R
    dup_RI = dact_RI * curve_RI
    if activation.limit is not None:
        dup_RI = dup_RI.masked_fill(up_RI.abs() > activation.limit, 0.0)
    return _joined(dgate_RI, dup_RI, activation, hidden_RU.dtype), drow_weights_R


def _halves(hidden_RU: Float[Tensor, "R U"], activation: Activation) -> tuple[Tensor, Tensor | None]:
    if not activation.gated:
        return hidden_RU, None
    if activation.interleaved:
        gate_RI, up_RI = hidden_RU.unflatten(-1, (hidden_RU.shape[-1] // 2, 2)).unbind(-1)
        return gate_RI, up_RI
    gate_RI, up_RI = hidden_RU.chunk(2, dim=-1)
    return gate_RI, up_RI


def _joined(
    gate_RI: Float[Tensor, "R I"], up_RI: Float[Tensor, "R I"], activation: Activation, dtype: torch.dtype
) -> Tensor:
    gate_RI, up_RI = gate_RI.to(dtype), up_RI.to(dtype)
    if activation.interleaved:
        return torch.stack([gate_RI, up_RI], -1).flatten(-2)
    return torch.cat([gate_RI, up_RI], -1)


def _clamped_gate(gate_RI: Float[Tensor, "R I"], activation: Activation) -> Tensor:
    return gate_RI if activation.limit is None else _below(gate_RI, activation.limit)


def _offset_up(up_RI: Float[Tensor, "R I"], activation: Activation) -> Tensor:
    if activation.limit is not None:
        up_RI = -_below(-_below(up_RI, activation.limit), activation.limit)
    return up_RI + activation.up_offset if activation.up_offset else up_RI


def _below(value: Tensor, limit: float) -> Tensor:
    """min(value, limit), with gradient 1 at the limit and NaN kept: what both frameworks can say alike."""
    return torch.where(value > limit, limit, value)


def _curve(gate_RI: Float[Tensor, "R I"], activation: Activation) -> Tensor:
    if activation.curve == "silu":
        if activation.alpha == 1.0:
            return F.silu(gate_RI)  # one pass instead of two
        return gate_RI * torch.sigmoid(activation.alpha * gate_RI)
    if activation.curve == "gelu_tanh":
        return F.gelu(gate_RI, approximate="tanh")
    return torch.relu(gate_RI) ** 2


def _curve_backward(dcurve_RI: Float[Tensor, "R I"], gate_RI: Float[Tensor, "R I"], activation: Activation) -> Tensor:
    if activation.curve == "silu":
        if activation.alpha == 1.0:
            return torch.ops.aten.silu_backward(dcurve_RI, gate_RI)
        opening_RI = torch.sigmoid(activation.alpha * gate_RI)
        return dcurve_RI * (opening_RI + activation.alpha * gate_RI * opening_RI * (1.0 - opening_RI))
    if activation.curve == "gelu_tanh":
        return torch.ops.aten.gelu_backward(dcurve_RI, gate_RI, approximate="tanh")
    return dcurve_RI * (2.0 * torch.relu(gate_RI))


_FIELDS = "str curve, bool gated, bool interleaved, float alpha, float? limit, float up_offset"


# An operator, so that compiled code cannot fuse across it: the rounding stays the same.
@torch.library.custom_op(
    "moebius::activate", mutates_args=(), schema=f"(Tensor hidden, Tensor? row_weights, {_FIELDS}) -> Tensor"
)
def _activate(hidden: Tensor, row_weights: Tensor | None, *of: Any) -> Tensor:
    return activate_rows(hidden, row_weights, of_fields(*of))


@torch.library.custom_op(
    "moebius::activate_backward",
    mutates_args=(),
    schema=f"(Tensor dact, Tensor hidden, Tensor? row_weights, {_FIELDS}) -> (Tensor, Tensor)",
)
def _activate_backward(dact: Tensor, hidden: Tensor, row_weights: Tensor | None, *of: Any) -> tuple[Tensor, Tensor]:
    dhidden, drow_weights = activate_rows_backward(dact, hidden, row_weights, of_fields(*of))
    return dhidden, hidden.new_empty(0) if drow_weights is None else drow_weights


@_activate.register_fake
def _(hidden: Tensor, row_weights: Tensor | None, curve: str, gated: bool, *of: Any) -> Tensor:
    return hidden.new_empty(hidden.shape[0], hidden.shape[1] // 2 if gated else hidden.shape[1])


@_activate_backward.register_fake
def _(dact: Tensor, hidden: Tensor, row_weights: Tensor | None, *of: Any) -> tuple[Tensor, Tensor]:
    rows = 0 if row_weights is None else hidden.shape[0]
    return torch.empty_like(hidden), hidden.new_empty(rows, dtype=accumulate_dtype(hidden.dtype))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    n_tensors = len(inputs) - len(Fields.__args__)  # type: ignore[attr-defined]
    ctx.save_for_backward(*inputs[:n_tensors])
    ctx.fields = inputs[n_tensors:]


def _backward(ctx: Any, dact: Tensor) -> tuple[Any, ...]:
    hidden, row_weights = ctx.saved_tensors
    dhidden, drow_weights = call(_activate_backward, dact.contiguous(), hidden, row_weights, *ctx.fields)
    return dhidden, None if row_weights is None else drow_weights, *(None for _ in ctx.fields)


def _backward_backward(ctx: Any, ddhidden: Tensor | None, ddrow_weights: Tensor | None) -> tuple[Any, ...]:
    """The gradient's gradient, by autograd of the formula."""
    dact, *saved = ctx.saved_tensors
    inputs = [value for value in saved if value is not None]

    def formula(hidden: Tensor, row_weights: Tensor | None = None) -> Tensor:
        return _formula(hidden, row_weights, of_fields(*ctx.fields))

    def first(dact: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        gradients: tuple[Tensor, ...] = torch.func.vjp(formula, *inputs)[1](dact)
        return gradients

    second = torch.func.vjp(first, dact, *inputs)[1]((ddhidden, ddrow_weights)[: len(inputs)])
    return *second, *(None for _ in range(3 - len(second))), *(None for _ in ctx.fields)


differentiate(_activate, _backward, _save)
differentiate(_activate_backward, _backward_backward, _save)
