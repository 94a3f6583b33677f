"""Routing rules as data: how logits become experts and weights.

    score      = score(logits)                        softmax over E, sigmoid or sqrt(softplus)
    choice     = score + correction bias              the bias takes part in the choice alone
    choice     = keep the best groups only            excluded experts get `group_fill`
    ids        = top K of choice, ties to the lowest id
    weights    = `weights_from` at ids, normalised to sum 1 where the config says so, times route_scale

Where no bias takes part, and no groups but those of a "max" rule, every score is monotone in the logit and the choice
is made by the logits themselves: exact, and the same in both frameworks whatever their exp() rounds to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from moebius.core.errors import ConfigError

# Added to the sum before a division: weights of an all-zero row stay zero.
NORM_EPSILON = 1e-20

# Losses of the router, by the names of the functions that compute them; MoEConfig has a `<name>_coeff` of each.
LOSSES = ("aux_loss", "z_loss", "seq_aux_loss")


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingRule:
    """One score function with its selection and weighting.

    Attributes:
        name: key in ROUTING_RULES.
        score: function of the logits.
        weights_from: "scores" at the chosen ids, "chosen_logits" (softmax over the K chosen logits), or
            "biased_scores" (scores plus correction bias).
        uses_bias: the correction bias takes part in the choice.
        group_fill: value an expert of an excluded group gets in the choice; None where groups are ignored.
        group_score: a group's score is the sum of its two best ("top2"), its best one ("max"), or its best one while
            there is no correction bias ("max_unless_bias").
        source: the paper or model that the row restates.
    """

    name: str
    score: Literal["softmax", "sigmoid", "sqrtsoftplus"]
    weights_from: Literal["scores", "chosen_logits", "biased_scores"]
    uses_bias: bool
    group_fill: float | None
    source: str
    group_score: Literal["top2", "max", "max_unless_bias"] = "top2"


_ROWS = (
    RoutingRule(
        name="softmax",
        score="softmax",
        weights_from="chosen_logits",
        uses_bias=False,
        group_fill=None,
        source="Mixtral, arXiv:2401.04088: top-k of the logits, softmax over the chosen; GPT-OSS",
    ),
    RoutingRule(
        name="softmax_before_topk",
        score="softmax",
        weights_from="scores",
        uses_bias=False,
        group_fill=None,
        source="Switch, arXiv:2101.03961: softmax over all, then top-k; Qwen3-MoE, OLMoE",
    ),
    RoutingRule(
        name="softmax_with_bias",
        score="softmax",
        weights_from="scores",
        uses_bias=True,
        group_fill=0.0,
        source="ERNIE 4.5, Mistral 4",
    ),
    RoutingRule(
        name="softmax_with_groups",
        score="softmax",
        weights_from="scores",
        uses_bias=False,
        # The model fills with 0: the same choice, since every score of a kept group is above it. Where scores
        # underflow to 0 only -inf keeps the choice inside of the kept groups, as ranking the logits needs anyway.
        group_fill=float("-inf"),
        group_score="max",
        source="DeepSeek-V2, arXiv:2405.04434, group_limited_greedy: a group ranks by its best score, no bias",
    ),
    RoutingRule(
        name="sqrtsoftplus",
        score="sqrtsoftplus",
        weights_from="scores",
        uses_bias=True,
        group_fill=None,
        source="DeepSeek-V4",
    ),
    RoutingRule(
        name="sigmoid_with_bias",
        score="sigmoid",
        weights_from="scores",
        uses_bias=True,
        group_fill=float("-inf"),
        source="DeepSeek-V3, arXiv:2412.19437, excluded groups at -inf; MiMo-V2",
    ),
    RoutingRule(
        name="sigmoid",
        score="sigmoid",
        weights_from="scores",
        uses_bias=True,
        group_fill=0.0,
        group_score="max_unless_bias",
        source="DeepSeek-V3, arXiv:2412.19437, excluded groups at 0; GLM-4.5, MiniMax-M2",
    ),
    RoutingRule(
        name="sigmoid_biased_weights",
        score="sigmoid",
        weights_from="biased_scores",
        uses_bias=True,
        group_fill=0.0,
        group_score="max_unless_bias",
        source="Kimi Linear: weights taken from the biased scores",
    ),
)

ROUTING_RULES: dict[str, RoutingRule] = {row.name: row for row in _ROWS}

# What a config may name; the two other rows are variants that a flag of the config selects.
SCORE_FUNCTIONS = (
    "softmax",
    "softmax_with_bias",
    "softmax_with_groups",
    "sqrtsoftplus",
    "sigmoid_with_bias",
    "sigmoid",
)
_VARIANTS = (
    ("softmax", "softmax_before_topk", "softmax_before_topk"),
    ("sigmoid", "router_weight_uses_score_correction_bias", "sigmoid_biased_weights"),
)


def resolve(score_func: str, settings: Any) -> RoutingRule:
    """The row that `score_func` means under a config's flags.

    Raises:
        ConfigError: no such score function.
    """
    if score_func not in SCORE_FUNCTIONS:
        raise ConfigError(f"score_func {score_func!r}", f"the score functions {SCORE_FUNCTIONS}", "name one of them")
    for name, flag, variant in _VARIANTS:
        if score_func == name and getattr(settings, flag, False):
            return ROUTING_RULES[variant]
    return ROUTING_RULES[score_func]
