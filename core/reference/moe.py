"""Steps 1 to 9 as one layer: gate, routed experts, shared experts, latent projections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moebius.core import activations
from moebius.core.activations import Activation
from moebius.core.config import MoEConfig
from moebius.core.precision import EXACT, Arithmetic
from moebius.core.reference.activate import activate, activate_vjp, sigmoid
from moebius.core.reference.experts import ExpertsTrace, experts, experts_vjp
from moebius.core.reference.losses import losses, losses_vjp
from moebius.core.reference.matmul import linear, linear_vjp
from moebius.core.reference.route import Routing, expert_load, route, route_vjp

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True, slots=True)
class MoETrace:
    """Every stage of one forward pass.

    Attributes:
        logits_TE, routing, load_E: of the gate.
        aux_loss, z_loss, seq_aux_loss: of the gate, not scaled by their coefficients.
        latent_TD: what the experts read. experts: their stages.
        shared_TD: shared experts' output, zero without any. y_TD: the result.
    """

    logits_TE: Float[np.ndarray, "T E"]
    routing: Routing
    load_E: Int[np.ndarray, " E"]
    aux_loss: float
    z_loss: float
    seq_aux_loss: float
    latent_TD: Float[np.ndarray, "T D"]
    experts: ExpertsTrace
    shared_TD: Float[np.ndarray, "T D"]
    y_TD: Float[np.ndarray, "T D"]


def quiet(x_TD: Float[np.ndarray, "T D"], token_mask_T: Bool[np.ndarray, " T"]) -> np.ndarray:
    """x with inf and NaN of masked tokens set to zero, so that no product with a zero gradient revives them."""
    return np.where(token_mask_T[:, None] | np.isfinite(x_TD), x_TD, 0.0)


def gate(
    x_TD: Float[np.ndarray, "T D"],
    parameters: Arrays,
    config: MoEConfig,
    *,
    correction_bias_E: Float[np.ndarray, " E"] | None = None,
    ids_TK: Int[np.ndarray, "T K"] | None = None,
    arithmetic: Arithmetic = EXACT,
) -> tuple[np.ndarray, Routing]:
    """(logits_TE, routing) from `weight` [E, D] and, with a router bias, `bias` [E]."""
    logits_TE = linear(x_TD, parameters["weight"], parameters.get("bias"), arithmetic)
    routing = route(logits_TE, config, correction_bias_E=correction_bias_E, ids_TK=ids_TK, arithmetic=arithmetic)
    if config.router_weights_fp32:
        return logits_TE, routing
    weights_TK = arithmetic.store(routing.weights_TK)
    return logits_TE, Routing(weights_TK=weights_TK, ids_TK=routing.ids_TK, scores_TE=routing.scores_TE)


def gate_vjp(
    x_TD: Float[np.ndarray, "T D"],
    logits_TE: Float[np.ndarray, "T E"],
    ids_TK: Int[np.ndarray, "T K"],
    parameters: Arrays,
    config: MoEConfig,
    dweights_TK: Float[np.ndarray, "T K"],
    dscores_TE: Float[np.ndarray, "T E"] | None = None,
    dlogits_TE: Float[np.ndarray, "T E"] | None = None,
    *,
    correction_bias_E: Float[np.ndarray, " E"] | None = None,
    arithmetic: Arithmetic = EXACT,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(dx_TD, gradients of the gate's parameters).

    Args:
        dscores_TE, dlogits_TE: of the losses, see `losses_vjp`; None for none.
    """
    routed_TE = route_vjp(
        logits_TE,
        config,
        ids_TK,
        dweights_TK,
        dscores_TE,
        correction_bias_E=correction_bias_E,
        arithmetic=arithmetic,
    )
    dlogits_TE = routed_TE if dlogits_TE is None else arithmetic.curve(routed_TE + dlogits_TE)
    dx_TD, dweight, dbias = linear_vjp(x_TD, parameters["weight"], arithmetic.store(dlogits_TE), arithmetic)
    return dx_TD, {"weight": dweight, "bias": dbias} if "bias" in parameters else {"weight": dweight}


def shared_experts(
    x_TD: Float[np.ndarray, "T D"], parameters: Arrays, config: MoEConfig, arithmetic: Arithmetic = EXACT
) -> np.ndarray:
    """The MLP that every token visits, times its sigmoid gate where there is one."""
    _, hidden_TU, act_TI, out_TD = _shared_stages(x_TD, parameters, config, arithmetic)
    del hidden_TU, act_TI
    if not config.shared_expert_gate:
        return out_TD
    opening_T1 = sigmoid(linear(x_TD, parameters["shared_expert_gate.weight"], arithmetic=arithmetic))
    return arithmetic.store(arithmetic.curve(out_TD * opening_T1))


def shared_experts_vjp(
    x_TD: Float[np.ndarray, "T D"],
    parameters: Arrays,
    config: MoEConfig,
    dout_TD: Float[np.ndarray, "T D"],
    arithmetic: Arithmetic = EXACT,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(dx_TD, gradients of the shared experts' parameters)."""
    activation, hidden_TU, act_TI, out_TD = _shared_stages(x_TD, parameters, config, arithmetic)
    grads: dict[str, np.ndarray] = {}
    dx_TD = np.zeros_like(x_TD)
    if config.shared_expert_gate:
        opening_T1 = sigmoid(linear(x_TD, parameters["shared_expert_gate.weight"], arithmetic=arithmetic))
        dopening_T1 = arithmetic.sum(dout_TD * out_TD, axis=-1, keepdims=True) * opening_T1 * (1.0 - opening_T1)
        name = "shared_expert_gate.weight"
        dx_TD, grads[name], _ = linear_vjp(x_TD, parameters[name], arithmetic.store(dopening_T1), arithmetic)
        dout_TD = arithmetic.store(dout_TD * opening_T1)
    dact_TI = _project_vjp("shared_experts.down_proj", act_TI, parameters, dout_TD, grads, arithmetic)
    dhidden_TU, _ = activate_vjp(hidden_TU, None, activation, dact_TI, arithmetic)
    names = _first_projections(activation)
    for name, dhalf_TI in zip(names, np.split(dhidden_TU, len(names), axis=-1), strict=True):
        dx_TD = dx_TD + _project_vjp(name, x_TD, parameters, dhalf_TI, grads, arithmetic)
    return arithmetic.store(dx_TD), grads


def moe(
    x_TD: Float[np.ndarray, "T D"],
    token_mask_T: Bool[np.ndarray, " T"],
    parameters: Arrays,
    config: MoEConfig,
    *,
    correction_bias_E: Float[np.ndarray, " E"] | None = None,
    ids_TK: Int[np.ndarray, "T K"] | None = None,
    n_sequences: int = 1,
    best_TK: Int[np.ndarray, "T K"] | None = None,
    arithmetic: Arithmetic = EXACT,
) -> MoETrace:
    """The whole layer, with every stage on the way.

    Args:
        parameters: by the dotted names of `moebius.core.layout.moe`.
        ids_TK: forced experts; None to route by the logits.
        n_sequences, best_TK: see `seq_aux_loss`.
    """
    x_TD = quiet(x_TD, token_mask_T)
    logits_TE, routing = gate(
        x_TD,
        _part(parameters, "gate"),
        config,
        correction_bias_E=correction_bias_E,
        ids_TK=ids_TK,
        arithmetic=arithmetic,
    )
    load_E = expert_load(routing.ids_TK, token_mask_T, config.n_routed_experts)
    settings: dict[str, Any] = {"n_sequences": n_sequences, "best_TK": best_TK, "arithmetic": arithmetic}
    lost = losses(logits_TE, routing, token_mask_T, config, **settings)
    has_latent = config.moe_latent_size is not None
    latent_TD = _project("fc1_latent_proj", x_TD, parameters, arithmetic) if has_latent else x_TD
    trace = experts(
        latent_TD,
        token_mask_T,
        routing.weights_TK,
        routing.ids_TK,
        _part(parameters, "experts"),
        config,
        arithmetic,
    )
    y_TD = _project("fc2_latent_proj", trace.y_TD, parameters, arithmetic) if has_latent else trace.y_TD
    shared_TD = np.zeros_like(y_TD)
    if config.n_shared_experts:
        shared_TD = shared_experts(x_TD, parameters, config, arithmetic)
        y_TD = arithmetic.store(y_TD + shared_TD)
    return MoETrace(
        logits_TE=logits_TE,
        routing=routing,
        load_E=load_E,
        **lost,
        latent_TD=latent_TD,
        experts=trace,
        shared_TD=shared_TD,
        y_TD=y_TD,
    )


def moe_vjp(
    trace: MoETrace,
    x_TD: Float[np.ndarray, "T D"],
    token_mask_T: Bool[np.ndarray, " T"],
    parameters: Arrays,
    config: MoEConfig,
    dy_TD: Float[np.ndarray, "T D"],
    *,
    correction_bias_E: Float[np.ndarray, " E"] | None = None,
    aux_loss_scale: float = 1.0,
    n_sequences: int = 1,
    best_TK: Int[np.ndarray, "T K"] | None = None,
    arithmetic: Arithmetic = EXACT,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(dx_TD, gradient of every parameter) of sum(y * dy) + aux_loss_scale * sum(each loss times its coefficient)."""
    grads: dict[str, np.ndarray] = {}
    heard_TD = token_mask_T[:, None] | np.isfinite(x_TD)
    x_TD = quiet(x_TD, token_mask_T)
    dx_TD = np.zeros_like(x_TD)
    dlatent_TD = dy_TD
    if config.n_shared_experts:
        dx_TD, grads = shared_experts_vjp(x_TD, parameters, config, dy_TD, arithmetic)
    if config.moe_latent_size is not None:
        dlatent_TD = _project_vjp("fc2_latent_proj", trace.experts.y_TD, parameters, dy_TD, grads, arithmetic)
    dlatent_TD, dweights_TK, expert_grads = experts_vjp(
        trace.experts, _part(parameters, "experts"), config, dlatent_TD, arithmetic
    )
    grads |= {f"experts.{name}": value for name, value in expert_grads.items()}
    if config.moe_latent_size is not None:
        dlatent_TD = _project_vjp("fc1_latent_proj", x_TD, parameters, dlatent_TD, grads, arithmetic)
    settings: dict[str, Any] = {"n_sequences": n_sequences, "best_TK": best_TK, "arithmetic": arithmetic}
    of_losses = losses_vjp(trace.logits_TE, trace.routing, token_mask_T, config, scale=aux_loss_scale, **settings)
    dgate_TD, gate_grads = gate_vjp(
        x_TD,
        trace.logits_TE,
        trace.routing.ids_TK,
        _part(parameters, "gate"),
        config,
        dweights_TK,
        *of_losses,
        correction_bias_E=correction_bias_E,
        arithmetic=arithmetic,
    )
    grads |= {f"gate.{name}": value for name, value in gate_grads.items()}
    dx_TD = arithmetic.store(arithmetic.store(dx_TD + dlatent_TD) + dgate_TD)
    return np.where(heard_TD, dx_TD, 0.0), grads


def _shared_stages(
    x_TD: Float[np.ndarray, "T D"], parameters: Arrays, config: MoEConfig, arithmetic: Arithmetic
) -> tuple[Activation, np.ndarray, np.ndarray, np.ndarray]:
    """(activation, hidden_TU, act_TI, out_TD) of the shared experts' MLP."""
    activation = activations.resolve(config.shared_expert_activation, config)
    halves = [_project(name, x_TD, parameters, arithmetic) for name in _first_projections(activation)]
    hidden_TU = np.concatenate(halves, axis=-1)
    act_TI = activate(hidden_TU, None, activation, arithmetic)
    return activation, hidden_TU, act_TI, _project("shared_experts.down_proj", act_TI, parameters, arithmetic)


def _first_projections(activation: Activation) -> tuple[str, ...]:
    up = "shared_experts.up_proj"
    return ("shared_experts.gate_proj", up) if activation.gated else (up,)


def _project(name: str, x_TD: Float[np.ndarray, "T D"], parameters: Arrays, arithmetic: Arithmetic) -> np.ndarray:
    return linear(x_TD, parameters[f"{name}.weight"], parameters.get(f"{name}.bias"), arithmetic)


def _project_vjp(
    name: str,
    x_TD: Float[np.ndarray, "T D"],
    parameters: Arrays,
    dout_TF: Float[np.ndarray, "T F"],
    grads: dict[str, np.ndarray],
    arithmetic: Arithmetic,
) -> np.ndarray:
    """dx_TD of one dense projection; puts its parameters' gradients into `grads`."""
    dx_TD, grads[f"{name}.weight"], dbias_F = linear_vjp(x_TD, parameters[f"{name}.weight"], dout_TF, arithmetic)
    if f"{name}.bias" in parameters:
        grads[f"{name}.bias"] = dbias_F
    return dx_TD


def _part(parameters: Arrays, prefix: str) -> dict[str, np.ndarray]:
    cut = len(prefix) + 1
    return {name[cut:]: value for name, value in parameters.items() if name.startswith(prefix + ".")}
