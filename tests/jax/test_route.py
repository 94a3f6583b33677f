"""Step 2: choice, weights, load and losses, against the reference."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moebius.core import MoEConfig, reference
from moebius.core.routing import SCORE_FUNCTIONS
from moebius.jax_frontend import aux_loss, expert_load, route, updated_correction_bias
from moebius.jax_frontend.losses import attach_aux_loss

T, E, K = 9, 8, 3
SIZES = {"n_routed_experts": E, "n_activated_experts": K, "dim": 4, "moe_inter_dim": 4}
RULES = {
    **{name: {"score_func": name} for name in SCORE_FUNCTIONS},
    "softmax_before_topk": {"score_func": "softmax", "softmax_before_topk": True},
    "sigmoid_biased_weights": {"score_func": "sigmoid", "router_weight_uses_score_correction_bias": True},
    "sigmoid_groups": {"score_func": "sigmoid", "n_expert_groups": 4, "n_limited_groups": 2},
    "sigmoid_with_bias_groups": {"score_func": "sigmoid_with_bias", "n_expert_groups": 2, "n_limited_groups": 1},
    "softmax_with_groups_groups": {"score_func": "softmax_with_groups", "n_expert_groups": 4, "n_limited_groups": 2},
    "softmax_with_bias_groups": {"score_func": "softmax_with_bias", "n_expert_groups": 4, "n_limited_groups": 3},
}


@cache
def config_of(rule, **more):
    return MoEConfig(**SIZES, **RULES[rule], **more)


routed = jax.jit(route, static_argnums=1)


@pytest.fixture(scope="module")
def computed(draws):
    """computed(biased, normed): (inputs, weights, scores, ids, dlogits by every rule); one compilation for all."""

    def one(config, logits, bias, dweights, dscores):
        def weighted(logits):
            routing = route(logits, config, correction_bias_E=bias)
            return (routing.weights_TK, routing.scores_TE), routing.ids_TK

        (weights, scores), pull, ids = jax.vjp(weighted, logits, has_aux=True)
        return weights, scores, ids, *pull((dweights, dscores))

    @cache
    def of(biased, normed):
        draw = draws(0)
        given = draw((T, E), scale=2.0), draw((E,)) if biased else None, draw((T, K)), draw((T, E))
        arrays = jax.tree.map(jnp.float32, given)
        rules = {rule: config_of(rule, norm_topk_prob=normed, route_scale=2.5) for rule in RULES}
        return given, jax.jit(lambda *args: {rule: one(config, *args) for rule, config in rules.items()})(*arrays)

    return of


@pytest.mark.parametrize("biased, normed", [(False, True), (True, False)], ids=["normed", "biased"])
@pytest.mark.parametrize("rule", RULES)
def test_route_by_every_rule_agrees_with_reference(agree, computed, rule, biased, normed):
    config = config_of(rule, norm_topk_prob=normed, route_scale=2.5)
    (logits, bias, dweights, dscores), found = computed(biased, normed)
    weights, scores, ids, dlogits = found[rule]
    assert ids.dtype == jnp.int32
    np.testing.assert_array_equal(ids, reference.route(logits, config, correction_bias_E=bias).ids_TK)

    def run(arithmetic):
        settings = {"correction_bias_E": bias, "arithmetic": arithmetic}
        routing = reference.route(logits, config, ids_TK=np.asarray(ids), **settings)
        dlogits = reference.route_vjp(logits, config, np.asarray(ids), dweights, dscores, **settings)
        return {"weights": routing.weights_TK, "scores": routing.scores_TE, "dlogits": dlogits}

    agree({"weights": weights, "scores": scores, "dlogits": dlogits}, run, "float32")


@pytest.mark.parametrize("dtype, out", [("bfloat16", "float32"), ("float16", "float32"), ("float64", "float64")])
def test_route_promotes_logits_and_returns_promoted_weights(wide, draws, dtype, out):
    config = config_of("softmax_before_topk")
    logits = draws(1)((T, E), dtype)
    with wide(dtype):
        routing = routed(jnp.asarray(logits, dtype), config)
        wanted = reference.route(logits, config)
        assert routing.weights_TK.dtype == routing.scores_TE.dtype == out and routing.ids_TK.dtype == jnp.int32
        np.testing.assert_array_equal(routing.ids_TK, wanted.ids_TK)
        rtol = 1e-6 if out == "float32" else 1e-14
        np.testing.assert_allclose(routing.weights_TK, wanted.weights_TK, rtol=rtol)


def test_route_of_ties_zeros_and_nan_takes_the_lowest_id_and_nan_last():
    nan = np.nan
    logits = np.array(
        [[1, 2, 2, 2, 2, 0, 0, 0], [-0.0, 0, -0.0, 0, -1, -1, -1, -1], [nan, -nan, -5, nan, nan, nan, -6, nan]]
    )
    ids = routed(jnp.float32(logits), config_of("softmax")).ids_TK
    np.testing.assert_array_equal(ids, [[1, 2, 3], [0, 1, 2], [2, 6, 0]])
    np.testing.assert_array_equal(ids, reference.route(logits, config_of("softmax")).ids_TK)


def test_route_of_forced_ids_takes_weights_from_live_scores(draws):
    config, logits = config_of("softmax"), draws(2)((T, E))
    ids = np.tile([7, 0, 3], (T, 1))
    found = jax.jit(lambda logits, ids: route(logits, config, ids_TK=ids))(jnp.float32(logits), jnp.int32(ids))
    wanted = reference.route(logits, config, ids_TK=ids)
    np.testing.assert_array_equal(found.ids_TK, ids)
    np.testing.assert_allclose(found.weights_TK, wanted.weights_TK, rtol=1e-6)


@pytest.mark.parametrize("logit", [-1e4, -np.inf])
def test_route_by_sqrtsoftplus_of_a_score_that_underflows_has_a_zero_gradient(logit):
    logits = jnp.full((1, E), logit, jnp.float32).at[0, :K].set(1.0)
    config = config_of("sqrtsoftplus")
    slope = jax.jit(jax.grad(lambda logits: route(logits, config).scores_TE.sum()))(logits)
    assert np.isfinite(slope).all() and not slope[0, K:].any()


def test_route_of_no_tokens_is_empty():
    routing = routed(jnp.zeros((0, E)), config_of("sigmoid_groups"))
    assert [value.shape for value in routing] == [(0, K), (0, K), (0, E)]


def test_expert_load_counts_a_token_once_per_expert_and_no_masked_or_foreign_one():
    ids = jnp.array([[0, 0, 5], [1, -1, 8], [2, 3, 4], [7, 2**30, 7]], jnp.int32)
    mask = jnp.array([True, True, False, True])
    load = jax.jit(expert_load, static_argnums=2)(ids, mask, E)
    assert load.dtype == jnp.int32
    np.testing.assert_array_equal(load, [1, 1, 0, 0, 0, 1, 0, 1])
    np.testing.assert_array_equal(load, reference.expert_load(np.asarray(ids), np.asarray(mask), E))


@pytest.mark.parametrize("masked", [False, True], ids=["some", "all_masked"])
def test_aux_loss_agrees_with_reference(agree, draws, masked):
    scores, mask = np.abs(draws(3)((T, E))), np.zeros(T, bool) if masked else np.arange(T) != 4
    load = reference.expert_load(np.argsort(-scores)[:, :K], mask, E)
    args = jnp.float32(scores), jnp.int32(load), jnp.asarray(mask), K
    loss, dscores = jax.jit(jax.value_and_grad(aux_loss), static_argnums=3)(*args)

    def run(arithmetic):
        slope = reference.aux_loss_vjp(scores, load, mask, K, 1.0)
        value = reference.aux_loss(scores, load, mask, K, arithmetic)
        return {"loss": np.asarray(value), "dscores": arithmetic.curve(slope)}

    agree({"loss": loss, "dscores": dscores}, run, "float32")


def test_attach_aux_loss_changes_only_the_gradient_of_the_loss(draws):
    weights = jnp.float32(draws(4)((T, K)))

    def run(weights, scores):
        attached = attach_aux_loss(weights, (scores**2).sum(), 0.25)
        return (attached * 3).sum(), attached

    (_, attached), grads = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))(weights, jnp.arange(4.0))
    np.testing.assert_array_equal(attached, weights)
    np.testing.assert_array_equal(grads[0], np.full((T, K), 3.0))
    np.testing.assert_allclose(grads[1], 0.25 * 2 * np.arange(4.0))


def test_updated_correction_bias_moves_each_expert_by_the_factor():
    bias, load = jnp.zeros(4), jnp.array([0, 4, 2, 2], jnp.int32)
    np.testing.assert_allclose(updated_correction_bias(bias, load, 0.5), [0.5, -0.5, 0, 0])
