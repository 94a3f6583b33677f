"""Step 2: logits to routing weights, and the gradient of the weights to that of the logits."""

from __future__ import annotations

import numpy as np

from moebius.compare.noise.noisy import Model, Noisy, added, rounding
from moebius.core import reference
from moebius.core.config import MoEConfig

_STEP = 2.0**-12  # of the central differences over the logits


def weights(
    model: Model, logits_TE: Noisy, ids_TK: np.ndarray, config: MoEConfig, correction_bias_E: np.ndarray | None
) -> Noisy:
    """[T, K]: the routing weights of the chosen experts, rounded to the dtype that the gate returns.

    Exact in the logits' errors to first order: each weight's row of the Jacobian is one backward pass of the reference.
    """
    routing = reference.route(logits_TE.value, config, correction_bias_E=correction_bias_E, ids_TK=ids_TK)
    variance_TK = model.formula(routing.weights_TK)
    logits_variance = added(logits_TE.variance, _argument(model, logits_TE.value, config, correction_bias_E))
    if logits_variance is not None:
        for slot in range(ids_TK.shape[1]):
            one_TK = np.zeros(ids_TK.shape)
            one_TK[:, slot] = 1.0
            jacobian_TE = reference.route_vjp(
                logits_TE.value, config, ids_TK, one_TK, correction_bias_E=correction_bias_E
            )
            variance_TK[:, slot] += (np.square(jacobian_TE) * logits_variance).sum(-1)
    return model.stored(Noisy(routing.weights_TK, variance_TK), weights_dtype(model, config))


def logits_gradient(
    model: Model,
    logits_TE: Noisy,
    ids_TK: np.ndarray,
    config: MoEConfig,
    dweights_TK: Noisy,
    correction_bias_E: np.ndarray | None,
) -> Noisy:
    """[T, E]: the gradient of the logits, rounded to their dtype."""

    def vjp(logits: np.ndarray, dweights: np.ndarray) -> np.ndarray:
        return reference.route_vjp(logits, config, ids_TK, dweights, correction_bias_E=correction_bias_E)

    dlogits_TE = vjp(logits_TE.value, dweights_TK.value)
    variance_TE = model.formula(_magnitude(logits_TE.value, ids_TK, config, dweights_TK.value, correction_bias_E))
    if dweights_TK.variance is not None:
        for slot in range(ids_TK.shape[1]):
            one_TK = np.zeros(ids_TK.shape)
            one_TK[:, slot] = 1.0
            variance_TE += np.square(vjp(logits_TE.value, one_TK)) * dweights_TK.variance[:, slot, None]
    logits_variance = added(logits_TE.variance, _argument(model, logits_TE.value, config, correction_bias_E))
    if logits_variance is not None:
        tokens = np.arange(len(ids_TK))
        for experts_T in _that_matter(ids_TK, config):
            step_TE = np.zeros_like(dlogits_TE)
            step_TE[tokens, experts_T] = _STEP
            above = vjp(logits_TE.value + step_TE, dweights_TK.value)
            below = vjp(logits_TE.value - step_TE, dweights_TK.value)
            variance_TE += np.square((above - below) / (2 * _STEP)) * logits_variance[tokens, experts_T][:, None]
    return model.stored(Noisy(dlogits_TE, variance_TE))


def weights_dtype(model: Model, config: MoEConfig) -> str:
    """What the gate returns its weights in."""
    return model.accumulate if config.router_weights_fp32 else model.dtype


def choice(
    model: Model, logits_TE: Noisy, config: MoEConfig, correction_bias_E: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """(what the best K are taken of before groups are masked, variance of each): scores with bias, or logits."""
    rule = config.routing_rule
    bias_E = correction_bias_E if rule.uses_bias else None
    logits_variance = logits_TE.variance
    assert logits_variance is not None  # a projection rounds
    grouped = rule.group_fill is not None and config.n_expert_groups > 1
    if bias_E is None and not (grouped and rule.group_score != "max"):
        return logits_TE.value, logits_variance
    score_TE = reference.score(logits_TE.value, rule)
    above, below = (reference.score(logits_TE.value + step, rule) for step in (_STEP, -_STEP))
    slope_TE = (above - below) / (2 * _STEP)
    if rule.score == "softmax":  # a step of one logit alone; the sum over all experts moves with it
        slope_TE = score_TE * (1.0 - score_TE)
    variance_TE = np.square(slope_TE) * logits_variance + model.formula(score_TE)
    if bias_E is None:
        return score_TE, variance_TE
    return score_TE + bias_E, variance_TE + rounding(score_TE + bias_E, model.accumulate)


def _that_matter(ids_TK: np.ndarray, config: MoEConfig) -> list[np.ndarray]:
    """Experts [T] whose logits take part in a token's weights, one array a step: the chosen, or with softmax all."""
    rule = config.routing_rule
    normalised = config.norm_topk_prob and config.n_activated_experts > 1
    if normalised or rule.weights_from == "chosen_logits" or rule.score != "softmax":
        return [ids_TK[:, slot] for slot in range(ids_TK.shape[1])]
    return [np.full(len(ids_TK), expert) for expert in range(config.n_routed_experts)]


def _argument(
    model: Model, logits_TE: np.ndarray, config: MoEConfig, correction_bias_E: np.ndarray | None
) -> np.ndarray | None:
    """Roundings inside the rule as a variance of the logits, where a result may be small against its terms.

    In a softmax that of exp's argument, logit - max; where weights are score + bias, that of the two and of their sum,
    which may cancel.
    """
    rule = config.routing_rule
    if rule.score == "softmax":
        return rounding(logits_TE - logits_TE.max(-1, keepdims=True), model.accumulate)
    if rule.weights_from != "biased_scores" or correction_bias_E is None:
        return None
    score_TE = reference.score(logits_TE, rule)
    slope_TE = score_TE * (1.0 - score_TE)
    variance_TE = model.formula(score_TE) + rounding(score_TE + correction_bias_E, model.accumulate)
    return np.divide(variance_TE, np.square(slope_TE), out=np.zeros_like(slope_TE), where=slope_TE > 1e-30)


def _magnitude(
    logits_TE: np.ndarray,
    ids_TK: np.ndarray,
    config: MoEConfig,
    dweights_TK: np.ndarray,
    correction_bias_E: np.ndarray | None,
) -> np.ndarray:
    """dlogits with the absolute values of all terms added, as differences of gradients cancel."""
    rule = config.routing_rule
    score_TE = reference.score(logits_TE, rule)
    chosen_TK = np.take_along_axis(score_TE, ids_TK, axis=-1)
    grad_TK = np.abs(dweights_TK * config.route_scale)
    if rule.weights_from == "chosen_logits":
        chosen_TK = chosen_TK / chosen_TK.sum(-1, keepdims=True)
    elif config.norm_topk_prob and config.n_activated_experts > 1:
        divisor_TK = chosen_TK
        if rule.weights_from == "biased_scores" and correction_bias_E is not None:
            divisor_TK = chosen_TK + correction_bias_E[ids_TK]
        total_T1 = divisor_TK.sum(-1, keepdims=True)
        grad_TK = (grad_TK + (grad_TK * np.abs(divisor_TK / total_T1)).sum(-1, keepdims=True)) / np.abs(total_T1)
    own_TK = chosen_TK * grad_TK
    out_TE = np.zeros_like(score_TE)
    if rule.weights_from == "chosen_logits":
        own_TK = own_TK + chosen_TK * own_TK.sum(-1, keepdims=True)
    elif rule.score == "softmax":
        out_TE += score_TE * own_TK.sum(-1, keepdims=True)
    np.add.at(out_TE, (np.arange(len(ids_TK))[:, None], ids_TK), own_TK)
    return out_TE
