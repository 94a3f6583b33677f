"""Step 2, logits to experts and weights, with the load and the bias that balances it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moebius.core.config import MoEConfig
from moebius.core.precision import EXACT, Arithmetic
from moebius.core.reference.activate import sigmoid
from moebius.core.routing import NORM_EPSILON, RoutingRule

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """What the router decided.

    Attributes:
        weights_TK: routing weights.
        ids_TK: int32, the experts, best first.
        scores_TE: every expert's score, normalised like the weights but not scaled; the auxiliary loss reads it.
    """

    weights_TK: Float[np.ndarray, "T K"]
    ids_TK: Int[np.ndarray, "T K"]
    scores_TE: Float[np.ndarray, "T E"]


def route(
    logits_TE: Float[np.ndarray, "T E"],
    config: MoEConfig,
    *,
    correction_bias_E: Float[np.ndarray, " E"] | None = None,
    ids_TK: Int[np.ndarray, "T K"] | None = None,
    arithmetic: Arithmetic = EXACT,
) -> Routing:
    """Choose K experts for each token and weight them, by the config's routing rule.

    Args:
        ids_TK: forced experts; the weights are still taken from the live scores. None to choose.
    """
    rule = config.routing_rule
    score_TE = score(logits_TE, rule, arithmetic)
    if ids_TK is None:
        ids_TK = top_k(_choice(logits_TE, score_TE, config, correction_bias_E), config.n_activated_experts)
    chosen_TK, scores_TE = _before_norm(logits_TE, score_TE, ids_TK, rule, correction_bias_E, arithmetic)
    if config.norm_topk_prob and config.n_activated_experts > 1:
        chosen_TK = normalised(chosen_TK, arithmetic)
        scores_TE = normalised(scores_TE, arithmetic)
    weights_TK = arithmetic.curve(chosen_TK * config.route_scale)
    return Routing(weights_TK=weights_TK, ids_TK=ids_TK.astype(np.int32), scores_TE=scores_TE)


def route_vjp(
    logits_TE: Float[np.ndarray, "T E"],
    config: MoEConfig,
    ids_TK: Int[np.ndarray, "T K"],
    dweights_TK: Float[np.ndarray, "T K"],
    dscores_TE: Float[np.ndarray, "T E"] | None = None,
    *,
    correction_bias_E: Float[np.ndarray, " E"] | None = None,
    arithmetic: Arithmetic = EXACT,
) -> np.ndarray:
    """Gradient of the logits; the choice itself (ids_TK) has none."""
    rule = config.routing_rule
    score_TE = score(logits_TE, rule, arithmetic)
    chosen_TK, scores_TE = _before_norm(logits_TE, score_TE, ids_TK, rule, correction_bias_E, arithmetic)
    dchosen_TK = dweights_TK * config.route_scale
    dscores_TE = np.zeros_like(logits_TE) if dscores_TE is None else dscores_TE
    if config.norm_topk_prob and config.n_activated_experts > 1:
        dchosen_TK = normalised_vjp(chosen_TK, dchosen_TK, arithmetic)
        dscores_TE = normalised_vjp(scores_TE, dscores_TE, arithmetic)
    tokens = np.arange(len(logits_TE))[:, None]
    dlogits_TE = np.zeros_like(logits_TE)
    if rule.weights_from == "chosen_logits":
        np.add.at(dlogits_TE, (tokens, ids_TK), softmax_vjp(chosen_TK, dchosen_TK, arithmetic))
        dscore_TE = dscores_TE
    else:
        dscore_TE = dscores_TE.copy()
        np.add.at(dscore_TE, (tokens, ids_TK), dchosen_TK)
    return arithmetic.curve(dlogits_TE + score_vjp(logits_TE, score_TE, dscore_TE, rule, arithmetic))


def expert_load(ids_TK: Int[np.ndarray, "T K"], token_mask_T: Bool[np.ndarray, " T"], n_experts: int) -> np.ndarray:
    """Tokens that chose each expert, `[E]` int64; a token counts once however often it names an expert."""
    load_E = np.zeros(n_experts, np.int64)
    for token in np.flatnonzero(token_mask_T):
        for expert in set(ids_TK[token].tolist()):
            if 0 <= expert < n_experts:
                load_E[expert] += 1
    return load_E


def updated_correction_bias(
    bias_E: Float[np.ndarray, " E"], load_E: Int[np.ndarray, " E"], factor: float
) -> np.ndarray:
    """The correction bias one step on: up for experts below the mean load, down for those above.

    Source: Wang et al., Auxiliary-Loss-Free Load Balancing, arXiv:2408.15664.
    """
    return bias_E + factor * np.sign(load_E.mean() - load_E)


def score(logits_TE: Float[np.ndarray, "T E"], rule: RoutingRule, arithmetic: Arithmetic = EXACT) -> np.ndarray:
    """[T, E]: every expert's score, neither biased nor normalised."""
    if rule.score == "softmax":
        return softmax(logits_TE, arithmetic)
    if rule.score == "sigmoid":
        return arithmetic.curve(sigmoid(logits_TE))
    return arithmetic.curve(np.sqrt(np.logaddexp(0.0, logits_TE)))


def score_vjp(
    logits_TE: Float[np.ndarray, "T E"],
    score_TE: Float[np.ndarray, "T E"],
    dscore_TE: Float[np.ndarray, "T E"],
    rule: RoutingRule,
    arithmetic: Arithmetic,
) -> np.ndarray:
    """Gradient of the logits from that of the scores."""
    if rule.score == "softmax":
        return softmax_vjp(score_TE, dscore_TE, arithmetic)
    if rule.score == "sigmoid":
        return dscore_TE * score_TE * (1.0 - score_TE)
    return dscore_TE * sigmoid(logits_TE) / (2.0 * score_TE)


def _choice(
    logits_TE: Float[np.ndarray, "T E"],
    score_TE: Float[np.ndarray, "T E"],
    config: MoEConfig,
    correction_bias_E: Float[np.ndarray, " E"] | None,
) -> np.ndarray:
    """What the top K are taken of."""
    rule = config.routing_rule
    bias_E = correction_bias_E if rule.uses_bias else None
    grouped = rule.group_fill is not None and config.n_expert_groups > 1
    if bias_E is not None:
        choice_TE = score_TE + bias_E
    else:
        choice_TE = score_TE if grouped and rule.group_score != "max" else logits_TE
    if rule.group_fill is None or not grouped:
        return choice_TE
    n_tokens, groups = len(choice_TE), config.n_expert_groups
    choice_TGM = choice_TE.reshape(n_tokens, groups, -1)
    best = {"top2": 2, "max": 1, "max_unless_bias": 1 if bias_E is None else 2}[rule.group_score]
    group_TG = np.sort(choice_TGM, axis=-1)[..., -best:].sum(-1)
    kept_TL = top_k(group_TG, config.n_limited_groups)
    kept_TG = np.zeros((n_tokens, groups), bool)
    kept_TG[np.arange(n_tokens)[:, None], kept_TL] = True
    return np.where(kept_TG[:, :, None], choice_TGM, rule.group_fill).reshape(n_tokens, -1)


def top_k(choice_TE: Float[np.ndarray, "T E"], k: int) -> np.ndarray:
    """The k best, best first; ties to the lowest id, -0 equal to +0, NaN ranks as -inf."""
    ranked_TE = np.where(np.isnan(choice_TE), -np.inf, np.where(choice_TE == 0, 0.0, choice_TE))
    return np.argsort(-ranked_TE, axis=-1, kind="stable")[:, :k]


def _before_norm(
    logits_TE: Float[np.ndarray, "T E"],
    score_TE: Float[np.ndarray, "T E"],
    ids_TK: Int[np.ndarray, "T K"],
    rule: RoutingRule,
    correction_bias_E: Float[np.ndarray, " E"] | None,
    arithmetic: Arithmetic,
) -> tuple[np.ndarray, np.ndarray]:
    """(chosen_TK, scores_TE): the chosen experts' raw weights and what the auxiliary loss reads."""
    if rule.weights_from == "chosen_logits":
        return softmax(np.take_along_axis(logits_TE, ids_TK, axis=-1), arithmetic), score_TE
    if rule.weights_from == "biased_scores" and correction_bias_E is not None:
        score_TE = score_TE + correction_bias_E
    return np.take_along_axis(score_TE, ids_TK, axis=-1), score_TE


def normalised(value: np.ndarray, arithmetic: Arithmetic) -> np.ndarray:
    """Each row over its sum."""
    return arithmetic.curve(value / (arithmetic.sum(value, axis=-1, keepdims=True) + NORM_EPSILON))


def normalised_vjp(value: np.ndarray, grad: np.ndarray, arithmetic: Arithmetic) -> np.ndarray:
    """Gradient of the rows from that of the normalised ones."""
    total = value.sum(-1, keepdims=True) + NORM_EPSILON
    mean = arithmetic.sum(grad * (value / total), axis=-1, keepdims=True)
    return arithmetic.curve(grad - mean) / total


def softmax(value: np.ndarray, arithmetic: Arithmetic) -> np.ndarray:
    """Of each row."""
    power = arithmetic.curve(np.exp(value - value.max(-1, keepdims=True)))
    return arithmetic.curve(power / power.sum(-1, keepdims=True))


def softmax_vjp(power: np.ndarray, grad: np.ndarray, arithmetic: Arithmetic) -> np.ndarray:
    """Gradient of the rows from that of their softmax, whose value is `power`."""
    return power * (grad - arithmetic.sum(grad * power, axis=-1, keepdims=True))
