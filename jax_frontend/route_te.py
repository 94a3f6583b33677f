"""Backend "te" of step 2: Transformer Engine's fused router, one kernel from logits to weights and choice.

It returns both as [T, E]; the experts are put in moebius' order here. Of experts with equal scores it may choose others
than the lowest ids. Its weights under a correction bias are the biased scores with the bias taken off again, which
rounds. The scores that a loss reads are moebius' own.
Source: jax/router.py and common/fused_router of Transformer Engine 2.20.2.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from moebius.core.config import MoEConfig
from moebius.jax_frontend.matmul_te import check_version, refuse_checked
from moebius.jax_frontend.route import Routing, normalised, score, top_k

# Best experts of a group whose scores add up to the group's, by RoutingRule.group_score without a bias, and with one.
_BEST = {"top2": (2, 2), "max": (1, 1), "max_unless_bias": (1, 2)}


def load() -> None:
    """Load the package.

    Raises:
        BackendUnavailable: it is too old. Otherwise whatever its import raises.
    """
    check_version()
    import transformer_engine.jax.router  # noqa: F401


def refusal(config: MoEConfig, biased: bool, forced: bool) -> str | None:
    """What the fused router cannot do, in words; None where it serves. See route.Router."""
    rule, biased = config.routing_rule, biased and config.routing_rule.uses_bias
    if forced:
        return "the fused router chooses by itself, and experts are forced here (routing replay)"
    if biased and rule.score == "softmax":
        return "the fused router has a correction bias for sigmoid and sqrtsoftplus alone"
    if biased and rule.weights_from == "biased_scores":
        return "the fused router takes the weights from the scores without the bias"
    if rule.score != "softmax" and config.n_activated_experts > 1 and not config.norm_topk_prob:
        return f"the fused router normalises the weights of {rule.score}, and norm_topk_prob is False"
    return _refusal_of_groups(config, biased) if _grouped(config) else None


def route(logits_TE: Array, config: MoEConfig, correction_bias_E: Array | None, ids_TK: Array | None) -> Routing:
    """See route.Router; `ids_TK` is None.

    Raises:
        Unsupported: inside shard_map with check_vma=True.
    """
    refuse_checked("route backend 'te'", logits_TE)
    from transformer_engine.jax.router import fused_topk_with_score_function

    rule = config.routing_rule
    bias_E = None if correction_bias_E is None or not rule.uses_bias else correction_bias_E.astype(logits_TE.dtype)
    score_TE = score(logits_TE, rule)
    normalises, scale = config.norm_topk_prob and config.n_activated_experts > 1, float(config.route_scale)
    after = normalises and rule.score == "softmax"  # which the kernel does not normalise
    weights_TE, map_TE = fused_topk_with_score_function(
        logits_TE,
        config.n_activated_experts,
        use_pre_softmax=rule.score == "softmax" and rule.weights_from == "scores",
        scaling_factor=1.0 if after else scale,
        score_function=rule.score,
        expert_bias=bias_E,
        **_groups(config),
    )
    choice_TE = lax.stop_gradient(logits_TE if bias_E is None else score_TE + bias_E)
    ids_TK = top_k(jnp.where(map_TE, choice_TE, -jnp.inf), config.n_activated_experts)
    weights_TK = jnp.take_along_axis(weights_TE, ids_TK, axis=1)
    if after:
        weights_TK = normalised(weights_TK) * scale
    return Routing(weights_TK, ids_TK.astype(jnp.int32), normalised(score_TE) if normalises else score_TE)


def _grouped(config: MoEConfig) -> bool:
    return config.routing_rule.group_fill is not None and config.n_expert_groups > 1


def _groups(config: MoEConfig) -> dict[str, Any]:
    if not _grouped(config):
        return {}
    return {"num_groups": config.n_expert_groups, "group_topk": config.n_limited_groups}


def _refusal_of_groups(config: MoEConfig, biased: bool) -> str | None:
    K, limited = config.n_activated_experts, config.n_limited_groups
    wanted = _BEST[config.routing_rule.group_score][biased]
    if K != wanted * limited:
        return (
            f"the fused router scores a group by its best {K}/{limited} experts (n_activated_experts over "
            f"n_limited_groups), and score_func {config.score_func!r} by its best {wanted}"
        )
    if biased and config.routing_rule.group_fill == 0:
        return "the fused router never chooses from an excluded group, and this score_func does by negative scores"
    return None
