"""Steps 4 to 8: the routed experts on one rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moebius.core.config import MoEConfig
from moebius.core.precision import EXACT, Arithmetic
from moebius.core.reference.activate import activate, activate_vjp
from moebius.core.reference.bias import add_bias, add_bias_vjp
from moebius.core.reference.matmul import grouped_matmul, grouped_matmul_vjp
from moebius.core.reference.permute import Permuted, permute, permute_vjp, unpermute, unpermute_vjp

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsTrace:
    """Every stage of one forward pass.

    Attributes:
        permuted: rows, row weights and where they came from.
        hidden_RU: pre-activation, bias included. act_RI: activation times weight.
        out_RD: down projection, bias included. y_TD: the result.
    """

    permuted: Permuted
    hidden_RU: Float[np.ndarray, "R U"]
    act_RI: Float[np.ndarray, "R I"]
    out_RD: Float[np.ndarray, "R D"]
    y_TD: Float[np.ndarray, "T D"]


def experts(
    x_TD: Float[np.ndarray, "T D"],
    token_mask_T: Bool[np.ndarray, " T"],
    weights_TK: Float[np.ndarray, "T K"],
    ids_TK: Int[np.ndarray, "T K"],
    parameters: Mapping[str, np.ndarray],
    config: MoEConfig,
    arithmetic: Arithmetic = EXACT,
    *,
    partial: bool = False,
) -> ExpertsTrace:
    """The experts' output for each token, with every stage on the way.

    Args:
        parameters: `gate_and_up_projs` [E, D, U], `down_projs` [E, I, D] and, with biases, `gate_up_proj_bias` [E, U]
            and `down_proj_bias` [E, D].
        partial: other ranks hold the rest of the sum: `combine` rounds it.
    """
    permuted = permute(x_TD, weights_TK, ids_TK, token_mask_T, config.n_routed_experts)
    sizes, before, after = permuted.group_sizes_e, *_placed(permuted, config)
    hidden_RU = grouped_matmul(permuted.rows_RD, parameters["gate_and_up_projs"], sizes, arithmetic)
    hidden_RU = add_bias(hidden_RU, parameters.get("gate_up_proj_bias"), sizes, arithmetic=arithmetic)
    act_RI = activate(hidden_RU, before, config.activation, arithmetic)
    out_RD = grouped_matmul(act_RI, parameters["down_projs"], sizes, arithmetic)
    out_RD = add_bias(out_RD, parameters.get("down_proj_bias"), sizes, before, arithmetic)
    y_TD = unpermute(out_RD, permuted, after, arithmetic, partial=partial)
    return ExpertsTrace(permuted=permuted, hidden_RU=hidden_RU, act_RI=act_RI, out_RD=out_RD, y_TD=y_TD)


def experts_vjp(
    trace: ExpertsTrace,
    parameters: Mapping[str, np.ndarray],
    config: MoEConfig,
    dy_TD: Float[np.ndarray, "T D"],
    arithmetic: Arithmetic = EXACT,
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """(dx_TD, dweights_TK, gradient of every parameter)."""
    permuted, grads = trace.permuted, {}
    sizes, before, after = permuted.group_sizes_e, *_placed(permuted, config)
    dout_RD, drow_weights_R = unpermute_vjp(trace.out_RD, permuted, dy_TD, after, arithmetic)
    if config.expert_bias:
        grads["down_proj_bias"], more_R = add_bias_vjp(parameters["down_proj_bias"], sizes, dout_RD, before, arithmetic)
        drow_weights_R = drow_weights_R + more_R
    dact_RI, grads["down_projs"] = grouped_matmul_vjp(
        trace.act_RI, parameters["down_projs"], sizes, dout_RD, arithmetic
    )
    dhidden_RU, more_R = activate_vjp(trace.hidden_RU, before, config.activation, dact_RI, arithmetic)
    if before is not None:
        drow_weights_R = drow_weights_R + more_R
    if config.expert_bias:
        grads["gate_up_proj_bias"], _ = add_bias_vjp(
            parameters["gate_up_proj_bias"], sizes, dhidden_RU, arithmetic=arithmetic
        )
    drows_RD, grads["gate_and_up_projs"] = grouped_matmul_vjp(
        permuted.rows_RD, parameters["gate_and_up_projs"], sizes, dhidden_RU, arithmetic
    )
    dx_TD, dweights_TK = permute_vjp(permuted, drows_RD, drow_weights_R, arithmetic)
    return dx_TD, dweights_TK, grads


def _placed(permuted: Permuted, config: MoEConfig) -> tuple[np.ndarray | None, np.ndarray | None]:
    """(row weights before the down projection, row weights after it): one of them is None."""
    if config.apply_router_weight_after_down:
        return None, permuted.row_weights_R
    return permuted.row_weights_R, None
