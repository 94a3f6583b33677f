"""The table of routing rules, and what `route` makes of each: choices, ties, groups, weights, load and losses."""

from dataclasses import FrozenInstanceError
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moebius.core import ROUTING_RULES, ConfigError, MoEConfig, reference
from moebius.core.routing import SCORE_FUNCTIONS, resolve

INF, NAN = float("inf"), float("nan")


def config(score_func="sigmoid", k=2, experts=4, **more):
    return MoEConfig(
        n_routed_experts=experts, n_activated_experts=k, dim=4, moe_inter_dim=4, score_func=score_func, **more
    )


def chosen(logits, made, bias=None):
    return reference.route(np.array(logits, float), made, correction_bias_E=bias).ids_TK.tolist()


# ------------------------------------------------------------------------------------------------------------ the table


@pytest.mark.parametrize("rule", ROUTING_RULES.values(), ids=lambda rule: rule.name)
def test_routing_rule_has_its_name_and_a_source_and_is_frozen(rule):
    assert ROUTING_RULES[rule.name] is rule
    assert len(rule.source) > 5
    with pytest.raises(FrozenInstanceError):
        rule.score = "softmax"


def test_score_functions_of_a_config_are_the_documented_ones():
    assert SCORE_FUNCTIONS == (
        "softmax",
        "softmax_with_bias",
        "softmax_with_groups",
        "sqrtsoftplus",
        "sigmoid_with_bias",
        "sigmoid",
    )


@pytest.mark.parametrize("name", SCORE_FUNCTIONS)
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_resolve_of_a_score_function_follows_its_own_flag_alone(name, early, biased):
    rule = resolve(name, SimpleNamespace(softmax_before_topk=early, router_weight_uses_score_correction_bias=biased))
    variants = {("softmax", True): "softmax_before_topk", ("sigmoid", True): "sigmoid_biased_weights"}
    assert rule.name == variants.get((name, early if name == "softmax" else biased), name)


@pytest.mark.parametrize("name", ["softmax_before_topk", "sigmoid_biased_weights", "top1", None])
def test_resolve_of_an_unknown_score_function_lists_the_known_ones(name):
    with pytest.raises(ConfigError, match="sqrtsoftplus"):
        resolve(name, SimpleNamespace())


# ------------------------------------------------------------------------------------------------------------- choices


@pytest.mark.parametrize("name", SCORE_FUNCTIONS)
def test_route_of_equal_logits_takes_the_lowest_ids(name):
    assert chosen([[0.5] * 4, [1.0, 2.0, 2.0, 2.0]], config(name)) == [[0, 1], [1, 2]]


@pytest.mark.parametrize("name", SCORE_FUNCTIONS)
@pytest.mark.parametrize("bias", [None, np.zeros(4)], ids=["plain", "bias"])
def test_route_counts_minus_zero_as_zero(name, bias):
    assert chosen([[-0.0, 0.0, -0.0, 0.0]], config(name), bias) == [[0, 1]]


def test_route_of_logits_that_saturate_the_score_still_ranks_by_the_logits():
    """sigmoid(40) and sigmoid(50) are both 1 in float32: without a bias the choice does not look at them."""
    assert chosen([[40.0, 60.0, 50.0, 30.0], [-800.0, -900.0, -850.0, -800.0]], config()) == [[1, 2], [0, 3]]


def test_route_of_nan_ranks_it_last_and_infinities_where_they_belong():
    logits = [[NAN, -INF, 0.0, NAN], [NAN, NAN, INF, 1.0], [NAN, NAN, NAN, NAN]]
    assert chosen(logits, config())[1:] == [[2, 3], [0, 1]]
    assert chosen(logits, config())[0][0] == 2


@pytest.mark.parametrize("name", [n for n in SCORE_FUNCTIONS if ROUTING_RULES[n].uses_bias])
def test_route_with_a_correction_bias_chooses_by_it_and_weights_without_it(name):
    logits, bias = np.array([[3.0, 2.0, 1.0, 0.0]]), np.array([0.0, 0.0, 0.0, 10.0])
    biased = reference.route(logits, config(name), correction_bias_E=bias)
    assert biased.ids_TK.tolist() == [[3, 0]]
    plain = reference.route(logits, config(name), ids_TK=np.array([[3, 0]]))
    np.testing.assert_array_equal(biased.weights_TK, plain.weights_TK)


@pytest.mark.parametrize("early", [False, True])
def test_route_of_softmax_ignores_a_correction_bias_and_groups(early):
    with pytest.warns(match="ignores"):
        made = config("softmax", softmax_before_topk=early, n_expert_groups=2, n_limited_groups=1)
    assert chosen([[3.0, 0.0, 2.0, 1.0]], made, np.array([0.0, 9.0, 0.0, 0.0])) == [[0, 2]]


def test_route_of_sqrtsoftplus_ignores_groups():
    with pytest.warns(match="ignores"):
        made = config("sqrtsoftplus", n_expert_groups=2, n_limited_groups=1)
    assert chosen([[3.0, 0.0, 2.0, 1.0]], made) == [[0, 2]]


# Two groups of three, one allowed. The first holds the best single expert, the second the better two.
GROUPS = {"experts": 6, "n_expert_groups": 2, "n_limited_groups": 1}
UNEVEN = [[4.0, -4.0, -4.0, 3.0, 2.9, -4.0]]


@pytest.mark.parametrize("name", ["softmax_with_bias", "sigmoid_with_bias"])
def test_route_by_groups_takes_the_group_with_the_best_two(name):
    logits = [[1.0, -4.0, -4.0, 0.9, 0.8, -4.0]]
    assert chosen(logits, config(name, **GROUPS)) == [[3, 4]]


def test_route_by_groups_of_softmax_with_groups_takes_the_group_with_the_best_one():
    """And stays in it, whatever a correction bias says and though the other group's two are better than its second."""
    made = config("softmax_with_groups", **GROUPS)
    assert chosen(UNEVEN, made) == chosen(UNEVEN, made, np.array([-9.0, 0.0, 0.0, 9.0, 9.0, 9.0])) == [[0, 1]]
    assert chosen([[1.0, -4.0, -4.0, 0.9, 0.8, -4.0]], made) == [[0, 1]]


def test_route_by_groups_of_softmax_with_groups_chooses_by_logits_where_scores_underflow():
    """All scores but one are 0 here: a fill of 0 would tie with them and let the excluded group in."""
    logits = [[-3000.0, 0.0, -900.0, -800.0, -1000.0, -2000.0]]
    routing = reference.route(np.array(logits), config("softmax_with_groups", k=3, **GROUPS))
    assert routing.ids_TK.tolist() == [[1, 2, 0]] and routing.weights_TK.tolist() == [[1.0, 0.0, 0.0]]


def test_route_of_softmax_with_groups_weighs_as_softmax_before_topk():
    logits, made = np.random.default_rng(0).normal(size=(50, 6)), config("softmax_with_groups", **GROUPS)
    grouped = reference.route(logits, made)
    plain = config("softmax", softmax_before_topk=True, experts=6)
    np.testing.assert_array_equal(grouped.weights_TK, reference.route(logits, plain, ids_TK=grouped.ids_TK).weights_TK)
    assert (grouped.ids_TK // 3 == logits.argmax(-1)[:, None] // 3).all()


def test_route_of_softmax_with_groups_without_groups_is_softmax_before_topk():
    logits = np.random.default_rng(1).normal(size=(20, 6))
    plain, made = config("softmax", softmax_before_topk=True, experts=6), config("softmax_with_groups", experts=6)
    np.testing.assert_array_equal(reference.route(logits, made).ids_TK, reference.route(logits, plain).ids_TK)


def test_route_by_groups_of_sigmoid_takes_the_best_one_without_a_bias_and_the_best_two_with():
    made = config(**GROUPS)
    assert chosen(UNEVEN, made)[0][0] == 0
    assert chosen(UNEVEN, made, np.zeros(6)) == [[3, 4]]


def test_route_by_groups_with_negative_choices_leaves_the_group_only_where_it_fills_with_zero():
    """The two families differ: an excluded expert at 0 beats a negative one of the kept group, at -inf never."""
    bias = np.array([-0.5, -2.0, -2.0, -3.0, -3.0, -3.0])
    logits = [[0.0] * 6]
    assert chosen(logits, config("sigmoid_with_bias", **GROUPS), bias) == [[0, 1]]
    assert chosen(logits, config("sigmoid", **GROUPS), bias) == [[0, 3]]


def test_route_by_groups_with_equal_groups_takes_the_first():
    assert chosen([[0.0] * 6], config("sigmoid_with_bias", **GROUPS)) == [[0, 1]]


def test_route_by_groups_of_one_expert_each_takes_the_best_experts():
    made = config("sigmoid_with_bias", n_expert_groups=4, n_limited_groups=2)
    assert chosen([[0.0, 3.0, 1.0, 2.0]], made) == [[1, 3]]


# ------------------------------------------------------------------------------------------------------------- weights


def test_route_of_softmax_after_topk_is_a_softmax_over_the_chosen():
    routing = reference.route(np.array([[2.0, 0.0, 1.0, -1.0]]), config("softmax"))
    np.testing.assert_allclose(routing.weights_TK, [[np.e / (1 + np.e), 1 / (1 + np.e)]], rtol=1e-15)
    np.testing.assert_allclose(routing.scores_TE.sum(), 1.0, rtol=1e-15)


def test_route_of_biased_weights_takes_them_from_the_biased_scores():
    made = config(router_weight_uses_score_correction_bias=True)
    routing = reference.route(np.zeros((1, 4)), made, correction_bias_E=np.array([0.25, 0.0, 0.0, 0.5]))
    assert routing.ids_TK.tolist() == [[3, 0]] and routing.weights_TK.tolist() == [[1.0, 0.75]]


@pytest.mark.parametrize("name", SCORE_FUNCTIONS)
def test_route_with_norm_sums_to_the_scale(name):
    rng = np.random.default_rng(0)
    made = config(name, norm_topk_prob=True, route_scale=2.5)
    routing = reference.route(rng.normal(size=(5, 4)), made)
    np.testing.assert_allclose(routing.weights_TK.sum(-1), 2.5, rtol=1e-14)
    np.testing.assert_allclose(routing.scores_TE.sum(-1), 1.0, rtol=1e-14)


def test_route_of_one_expert_a_token_is_not_normalised():
    logits = np.array([[0.0, -1.0, -2.0, -3.0]])
    assert reference.route(logits, config(k=1, norm_topk_prob=True)).weights_TK.tolist() == [[0.5]]


def test_route_of_scores_of_zero_with_norm_stays_zero():
    routing = reference.route(np.full((1, 4), -1e4), config(norm_topk_prob=True))
    assert not routing.weights_TK.any() and not routing.scores_TE.any()


@pytest.mark.parametrize("name", SCORE_FUNCTIONS)
@pytest.mark.parametrize("norm", [False, True])
def test_route_with_forced_ids_of_its_own_choice_changes_nothing(name, norm):
    logits = np.random.default_rng(0).normal(size=(5, 4))
    made = config(name, norm_topk_prob=norm)
    free = reference.route(logits, made)
    forced = reference.route(logits, made, ids_TK=free.ids_TK.astype(np.int64))
    assert forced.ids_TK.dtype == np.int32
    np.testing.assert_array_equal(free.weights_TK, forced.weights_TK)


@settings(max_examples=60)
@given(
    logits_TE=arrays(np.float64, st.tuples(st.integers(0, 5), st.just(6)), elements=st.sampled_from([-2.0, 0.0, 0.5])),
    name=st.sampled_from(SCORE_FUNCTIONS),
    k=st.integers(1, 6),
)
def test_route_of_any_logits_chooses_the_best_in_order_each_once(logits_TE, name, k):
    routing = reference.route(logits_TE, config(name, k=k, experts=6))
    ranked = [sorted(range(6), key=lambda e: (-row[e], e))[:k] for row in logits_TE]
    assert routing.ids_TK.tolist() == ranked
    assert np.isfinite(routing.weights_TK).all() and (np.diff(routing.weights_TK, axis=-1) <= 1e-15).all()


# ------------------------------------------------------------------------------------------------------ load and losses


def test_expert_load_counts_a_token_once_for_each_of_its_experts():
    ids_TK = np.array([[0, 1], [1, 1], [-1, 4], [2, 0]])
    mask_T = np.array([True, True, True, False])
    assert reference.expert_load(ids_TK, mask_T, 4).tolist() == [1, 2, 0, 0]


@pytest.mark.parametrize("k", [1, 3])
def test_aux_loss_of_uniform_softmax_routing_is_one(k):
    load_E = np.full(6, k * 10)
    loss = reference.aux_loss(np.full((60, 6), 1 / 6), load_E, np.ones(60, bool), k)
    assert loss == pytest.approx(1.0)


def test_aux_loss_of_masked_tokens_counts_neither_them_nor_their_number():
    rng = np.random.default_rng(0)
    scores_TE, mask_T, load_E = rng.random((5, 4)), np.array([True, True, False, True, False]), np.array([3, 1, 0, 2])
    scores_TE[~mask_T] = np.nan
    loss = reference.aux_loss(scores_TE, load_E, mask_T, 2)
    assert loss == pytest.approx(reference.aux_loss(scores_TE[mask_T], load_E, np.ones(3, bool), 2))
    assert not reference.aux_loss_vjp(scores_TE, load_E, mask_T, 2, 1.0)[~mask_T].any()


def test_aux_loss_without_any_token_is_zero():
    for mask_T in (np.zeros(0, bool), np.zeros(3, bool)):
        scores_TE = np.ones((len(mask_T), 4))
        assert reference.aux_loss(scores_TE, np.zeros(4, int), mask_T, 2) == 0
        assert not reference.aux_loss_vjp(scores_TE, np.zeros(4, int), mask_T, 2, 1.0).any()


def test_updated_correction_bias_moves_each_expert_towards_the_mean_load():
    bias_E = np.array([0.5, 0.5, 0.5])
    moved_E = reference.updated_correction_bias(bias_E, np.array([1, 2, 3]), 0.125)
    assert moved_E.tolist() == [0.625, 0.5, 0.375] and bias_E.tolist() == [0.5] * 3
