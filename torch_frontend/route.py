"""Step 2: logits to experts and weights, with the load and the bias that balances it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from moebius.core import checks
from moebius.core.config import MoEConfig
from moebius.core.routing import NORM_EPSILON, RoutingRule
from moebius.torch_frontend.dtypes import promoted

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class Routing(NamedTuple):
    """What the router decided.

    Attributes:
        weights_TK: routing weights, promote_types(logits.dtype, float32).
        ids_TK: int32, the experts, best first.
        scores_TE: every expert's score, normalised like the weights but not scaled; the auxiliary loss reads it.
    """

    weights_TK: Float[Tensor, "T K"]
    ids_TK: Int[Tensor, "T K"]
    scores_TE: Float[Tensor, "T E"]


def route(
    logits_TE: Float[Tensor, "T E"],
    config: MoEConfig,
    *,
    correction_bias_E: Float[Tensor, " E"] | None = None,
    ids_TK: Int[Tensor, "T K"] | None = None,
) -> Routing:
    """Choose K experts for each token and weight them, by the config's routing rule.

    Spec: core.reference.route. Equal logits give equal routing in both frontends, the lowest id winning a tie; with
    a correction bias or groups most rules choose by scores, whose exp() may round differently in the last place.

    Args:
        logits_TE: [T, E], any floating dtype; computed in promote_types(dtype, float32).
        config: names the rule, K, groups, normalisation and scale.
        correction_bias_E: [E], added to the scores for the choice alone.
        ids_TK: [T, K] forced experts; the weights are still taken from the live scores. None to choose.
    """
    checks.logits(logits_TE, config.n_routed_experts)
    rule = config.routing_rule
    logits_TE = promoted(logits_TE)
    score_TE = score(logits_TE, rule)
    if ids_TK is None:
        choice_TE = _choice(logits_TE.detach(), score_TE.detach(), config, correction_bias_E)
        ids_TK = top_k(choice_TE, config.n_activated_experts)
    chosen_TK, scores_TE = _before_norm(logits_TE, score_TE, ids_TK.long(), rule, correction_bias_E)
    if config.norm_topk_prob and config.n_activated_experts > 1:
        chosen_TK = normalised(chosen_TK)
        scores_TE = normalised(scores_TE)
    return Routing(chosen_TK * config.route_scale, ids_TK.to(torch.int32), scores_TE)


def quiet(x_TD: Float[Tensor, "T D"], token_mask_T: Bool[Tensor, " T"]) -> Tensor:
    """x with inf and NaN of masked tokens set to zero, so that no product with a zero gradient revives them.

    Spec: core.reference.quiet.
    """
    return torch.where(token_mask_T[:, None] | torch.isfinite(x_TD), x_TD, 0.0)


def expert_load(ids_TK: Int[Tensor, "T K"], token_mask_T: Bool[Tensor, " T"], n_experts: int) -> Tensor:
    """Tokens that chose each expert; a token counts once however often it names an expert.

    Spec: core.reference.expert_load.

    Returns:
        [n_experts] int32. Unit: tokens.
    """
    here_TK = (ids_TK >= 0) & (ids_TK < n_experts) & token_mask_T[:, None]
    chosen_TE = torch.zeros(len(ids_TK), n_experts + 1, dtype=torch.bool, device=ids_TK.device)
    # Out of place, so that torch.func.vmap takes it.
    chosen_TE = chosen_TE.scatter(1, torch.where(here_TK, ids_TK, n_experts).long(), True)
    return chosen_TE[:, :n_experts].sum(0, dtype=torch.int32)


def updated_correction_bias(bias_E: Float[Tensor, " E"], load_E: Int[Tensor, " E"], factor: float) -> Tensor:
    """The correction bias one step on: up for experts below the mean load, down for those above.

    Spec: core.reference.updated_correction_bias. Source: arXiv:2408.15664.
    """
    load_E = load_E.to(bias_E.dtype)
    return bias_E + factor * torch.sign(load_E.mean() - load_E)


def score(logits_TE: Float[Tensor, "T E"], rule: RoutingRule) -> Tensor:
    """[T, E]: every expert's score, neither biased nor normalised. Spec: core.reference.score."""
    if rule.score == "softmax":
        return torch.softmax(logits_TE, dim=-1)
    if rule.score == "sigmoid":
        return torch.sigmoid(logits_TE)
    # Where softplus underflows the square root's slope is infinite and softplus' own is 0: their product is NaN.
    softplus_TE = torch.logaddexp(logits_TE, torch.zeros_like(logits_TE))
    positive_TE = softplus_TE > 0
    return torch.where(positive_TE, torch.where(positive_TE, softplus_TE, 1.0).sqrt(), softplus_TE)


def _choice(
    logits_TE: Float[Tensor, "T E"],
    score_TE: Float[Tensor, "T E"],
    config: MoEConfig,
    correction_bias_E: Float[Tensor, " E"] | None,
) -> Tensor:
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
    choice_TGM = choice_TE.unflatten(-1, (config.n_expert_groups, -1))
    best = {"top2": 2, "max": 1, "max_unless_bias": 1 if bias_E is None else 2}[rule.group_score]
    group_TG = choice_TGM.topk(min(best, choice_TGM.shape[-1]), dim=-1).values.sum(-1)
    kept_TG = torch.zeros_like(group_TG, dtype=torch.bool)
    kept_TG.scatter_(1, top_k(group_TG, config.n_limited_groups), True)
    return torch.where(kept_TG[..., None], choice_TGM, rule.group_fill).flatten(-2)


def top_k(choice_TE: Float[Tensor, "T E"], k: int) -> Tensor:
    """[T, k] int64, best first; ties to the lowest id, -0 equal to +0, NaN ranks as -inf."""
    ranked_TE = torch.where(choice_TE == 0, 0.0, choice_TE)
    ranked_TE = torch.where(ranked_TE.isnan(), -torch.inf, ranked_TE)
    # A stable sort, because torch.topk orders ties arbitrarily.
    return ranked_TE.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def _before_norm(
    logits_TE: Float[Tensor, "T E"],
    score_TE: Float[Tensor, "T E"],
    ids_TK: Int[Tensor, "T K"],
    rule: RoutingRule,
    correction_bias_E: Float[Tensor, " E"] | None,
) -> tuple[Tensor, Tensor]:
    """(chosen_TK, scores_TE): the chosen experts' raw weights and what the auxiliary loss reads."""
    if rule.weights_from == "chosen_logits":
        return torch.softmax(logits_TE.gather(1, ids_TK), dim=-1), score_TE
    if rule.weights_from == "biased_scores" and correction_bias_E is not None:
        score_TE = score_TE + correction_bias_E
    return score_TE.gather(1, ids_TK), score_TE


def normalised(value: Tensor) -> Tensor:
    """Each row over its sum."""
    return value / (value.sum(-1, keepdim=True) + NORM_EPSILON)
