"""Step 2: logits to experts and weights, with the load and the bias that balances it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from moebius.core import checks
from moebius.core.config import MoEConfig
from moebius.core.errors import Unsupported
from moebius.core.registry import Backend, Problem, Registry
from moebius.core.routing import NORM_EPSILON, RoutingRule
from moebius.jax_frontend.dtypes import promoted
from moebius.jax_frontend.matmul import device_of

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class Routing(NamedTuple):
    """What the router decided.

    Attributes:
        weights_TK: routing weights, promote_types(logits.dtype, float32).
        ids_TK: int32, the experts, best first.
        scores_TE: every expert's score, normalised like the weights but not scaled; the auxiliary loss reads it.
    """

    weights_TK: Float[Array, "T K"]
    ids_TK: Int[Array, "T K"]
    scores_TE: Float[Array, "T E"]


class Router(NamedTuple):
    """One backend.

    Attributes:
        route: (promoted logits [T, E], config, correction bias [E] or None, forced ids [T, K] or None) -> Routing.
        refusal: (config, biased, forced) -> what of a config it does not serve, in words; None where it does.
            `biased`: the gate has a correction bias. `forced`: experts may be forced.
    """

    route: Callable[[Array, MoEConfig, Array | None, Array | None], Routing]
    refusal: Callable[[MoEConfig, bool, bool], str | None]


def route(
    logits_TE: Float[Array, "T E"],
    config: MoEConfig,
    *,
    correction_bias_E: Float[Array, " E"] | None = None,
    ids_TK: Int[Array, "T K"] | None = None,
    backend: str | None = None,
) -> Routing:
    """Choose K experts for each token and weight them, by the config's routing rule.

    Spec: core.reference.route. Equal logits give equal routing in both frontends, the lowest id winning a tie; with
    a correction bias or groups most rules choose by scores, whose exp() may round differently in the last place.

    Args:
        logits_TE: [T, E], any floating dtype; computed in promote_types(dtype, float32).
        config: names the rule, K, groups, normalisation and scale.
        correction_bias_E: [E], added to the scores for the choice alone.
        ids_TK: [T, K] forced experts; the weights are still taken from the live scores. None to choose.
        backend: a registered name, or None for moebius' own.
    Raises:
        ShapeError, DTypeError: logits do not fit.
        ConfigError, BackendUnavailable, Unsupported: `backend` was named and cannot serve; says why.
    """
    checks.logits(logits_TE, config.n_routed_experts)
    logits_TE = promoted(logits_TE)
    name = choose_router(backend, logits_TE, config, correction_bias_E is not None, ids_TK is not None).name
    return _router(name).route(logits_TE, config, correction_bias_E, ids_TK)


def choose_router(backend: str | None, logits: Array, config: MoEConfig, biased: bool, forced: bool) -> Backend:
    """The registry row that serves promoted `logits` [T, E] and this config; see Registry.choose and Router.refusal.

    Raises:
        ConfigError, BackendUnavailable, Unsupported: it was named and cannot serve; says why.
    """
    device, capability = device_of(logits)
    size: dict[str, Any] = {"dim": config.dim, "inter_dim": config.moe_inter_dim, "n_experts": config.n_routed_experts}
    problem = Problem(device=device, dtype=str(logits.dtype), capability=capability, **size)
    chosen = ROUTERS.choose(backend, problem)
    refusal = _router(chosen.name).refusal(config, biased, forced)
    if refusal is not None:
        asked = f"route backend {backend!r} of moebius.jax_frontend for score_func {config.score_func!r}"
        raise Unsupported(asked, refusal, "leave the backend out, for moebius' own")
    return chosen


def _route(logits_TE: Array, config: MoEConfig, correction_bias_E: Array | None, ids_TK: Array | None) -> Routing:
    rule = config.routing_rule
    score_TE = score(logits_TE, rule)
    if ids_TK is None:
        choice_TE = _choice(lax.stop_gradient(logits_TE), lax.stop_gradient(score_TE), config, correction_bias_E)
        ids_TK = top_k(choice_TE, config.n_activated_experts)
    chosen_TK, scores_TE = _before_norm(logits_TE, score_TE, ids_TK, rule, correction_bias_E)
    if config.norm_topk_prob and config.n_activated_experts > 1:
        chosen_TK = normalised(chosen_TK)
        scores_TE = normalised(scores_TE)
    return Routing(chosen_TK * config.route_scale, ids_TK.astype(jnp.int32), scores_TE)


def quiet(x_TD: Float[Array, "T D"], token_mask_T: Bool[Array, " T"]) -> Array:
    """x with inf and NaN of masked tokens set to zero, so that no product with a zero gradient revives them.

    Spec: core.reference.quiet.
    """
    return jnp.where(token_mask_T[:, None] | jnp.isfinite(x_TD), x_TD, 0)


def expert_load(ids_TK: Int[Array, "T K"], token_mask_T: Bool[Array, " T"], n_experts: int) -> Array:
    """Tokens that chose each expert; a token counts once however often it names an expert.

    Spec: core.reference.expert_load.

    Returns:
        [n_experts] int32. Unit: tokens.
    """
    here_TK = (ids_TK >= 0) & (ids_TK < n_experts) & token_mask_T[:, None]
    ids_TK = jnp.where(here_TK, ids_TK, n_experts).astype(jnp.int32)
    tokens_T1 = jnp.arange(ids_TK.shape[0], dtype=jnp.int32)[:, None]
    chosen_TE = jnp.zeros((ids_TK.shape[0], n_experts), bool).at[tokens_T1, ids_TK].set(True, mode="drop")
    return chosen_TE.sum(0, dtype=jnp.int32)


def updated_correction_bias(bias_E: Float[Array, " E"], load_E: Int[Array, " E"], factor: float) -> Array:
    """The correction bias one step on: up for experts below the mean load, down for those above.

    Spec: core.reference.updated_correction_bias. Source: arXiv:2408.15664.
    """
    load_E = load_E.astype(bias_E.dtype)
    return bias_E + factor * jnp.sign(load_E.mean() - load_E)


def score(logits_TE: Float[Array, "T E"], rule: RoutingRule) -> Array:
    """[T, E]: every expert's score, neither biased nor normalised. Spec: core.reference.score."""
    if rule.score == "softmax":
        return jax.nn.softmax(logits_TE, axis=-1)
    if rule.score == "sigmoid":
        return jax.nn.sigmoid(logits_TE)
    # Where softplus underflows the square root's slope is infinite and softplus' own is 0: their product is NaN.
    softplus_TE = jax.nn.softplus(logits_TE)
    positive_TE = softplus_TE > 0
    return jnp.where(positive_TE, jnp.sqrt(jnp.where(positive_TE, softplus_TE, 1)), softplus_TE)


def _choice(
    logits_TE: Float[Array, "T E"],
    score_TE: Float[Array, "T E"],
    config: MoEConfig,
    correction_bias_E: Float[Array, " E"] | None,
) -> Array:
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
    per_group = choice_TE.shape[1] // config.n_expert_groups
    choice_TGM = choice_TE.reshape(-1, config.n_expert_groups, per_group)
    best = {"top2": 2, "max": 1, "max_unless_bias": 1 if bias_E is None else 2}[rule.group_score]
    group_TG = lax.top_k(choice_TGM, min(best, per_group))[0].sum(-1)
    kept_TL = top_k(group_TG, config.n_limited_groups)
    kept_TG = (kept_TL[:, :, None] == jnp.arange(config.n_expert_groups, dtype=jnp.int32)).any(1)
    return jnp.where(kept_TG[..., None], choice_TGM, rule.group_fill).reshape(choice_TE.shape)


def top_k(choice_TE: Float[Array, "T E"], k: int) -> Array:
    """[T, k] int32, best first; ties to the lowest id, -0 equal to +0, NaN ranks as -inf."""
    # lax.top_k takes the lowest index of equal values, but ranks +0 above -0 and NaN first.
    ranked_TE = jnp.where(choice_TE == 0, 0, choice_TE)
    ranked_TE = jnp.where(jnp.isnan(ranked_TE), -jnp.inf, ranked_TE)
    return lax.top_k(ranked_TE, k)[1]


def _before_norm(
    logits_TE: Float[Array, "T E"],
    score_TE: Float[Array, "T E"],
    ids_TK: Int[Array, "T K"],
    rule: RoutingRule,
    correction_bias_E: Float[Array, " E"] | None,
) -> tuple[Array, Array]:
    """(chosen_TK, scores_TE): the chosen experts' raw weights and what the auxiliary loss reads."""
    if rule.weights_from == "chosen_logits":
        return jax.nn.softmax(jnp.take_along_axis(logits_TE, ids_TK, axis=1), axis=-1), score_TE
    if rule.weights_from == "biased_scores" and correction_bias_E is not None:
        score_TE = score_TE + correction_bias_E
    return jnp.take_along_axis(score_TE, ids_TK, axis=1), score_TE


def normalised(value: Array) -> Array:
    """Each row over its sum."""
    return value / (value.sum(-1, keepdims=True) + NORM_EPSILON)


def _router(name: str) -> Router:
    found: Router = ROUTERS.implementation(ROUTERS[name])
    return found


def _load_te() -> Router:
    from moebius.jax_frontend import route_te as backend

    backend.load()
    return Router(backend.route, backend.refusal)


def _te_supports(problem: Problem) -> str | None:
    if problem.dtype == "float64":
        return "Transformer Engine's router computes in float32"
    if problem.device != "cuda":
        return f"Transformer Engine routes on CUDA, not on {problem.device}"
    if problem.n_experts > 2304:
        return f"Transformer Engine's router takes at most 2304 experts, not {problem.n_experts}"
    return None


ROUTERS = Registry("moebius.jax_frontend", "route")
ROUTERS.add(
    name="xla",
    load=lambda: Router(_route, lambda config, biased, forced: None),
    note="every score function; equal scores choose the lowest id",
)
ROUTERS.add(
    name="te",
    load=_load_te,
    needs=("transformer_engine",),
    install="pip install --no-build-isolation 'transformer-engine[jax]>=2.20.2'",
    supports=_te_supports,
    only_when_named=True,
    note="Transformer Engine's fused router; not every score function; equal scores choose any; reverse mode alone",
)
