"""The router's losses by hand, and their gradients against differences of the function beside them."""

import warnings

import numpy as np
import pytest

from moebius.core import ROUTING_RULES, MoEConfig, MoEWarning, layout, reference

RULES = {name: {"score_func": name} for name in ROUTING_RULES} | {
    "softmax_before_topk": {"score_func": "softmax", "softmax_before_topk": True},
    "sigmoid_biased_weights": {"score_func": "sigmoid", "router_weight_uses_score_correction_bias": True},
}
every_rule = pytest.mark.parametrize("rule", RULES)
# Sequences of three: one whole, one with padding, one of padding alone.
MASK = np.array([True, True, True, True, False, True, False, False, False])
VALID = np.array([True] * 6)


def config(rule="softmax", **more):
    sizes = {"n_routed_experts": 4, "n_activated_experts": 2, "dim": 5, "moe_inter_dim": 3, "dtype": "float64"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MoEWarning)  # groups of a rule that ignores them
        return MoEConfig(**sizes, **RULES[rule], **more)


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def test_z_loss_of_equal_logits_is_the_square_of_what_each_adds():
    logits_TE = np.array([[0.0] * 4, [-2.0] * 4])
    wanted = (np.log(4) ** 2 + (np.log(4) - 2) ** 2) / 2
    assert reference.z_loss(logits_TE, np.array([True, True])) == pytest.approx(wanted, rel=1e-15)


def test_z_loss_of_huge_logits_is_finite():
    assert reference.z_loss(np.array([[1e4, -1e4]]), np.array([True])) == 1e8


def test_seq_aux_loss_by_hand():
    """Scores of 3/4 and 1/4 in the first token, 1/2 each in the second, which the tie gives to the first expert."""
    logits_TE = np.log(np.array([[3.0, 1.0], [1.0, 1.0], [1.0, 3.0], [1.0, 3.0]]))
    with_two = MoEConfig(n_routed_experts=2, n_activated_experts=1, dim=5, moe_inter_dim=3)
    # First sequence: shares 2 and 0 of 2 / 1, mean scores 5/8 and 3/8; second: 0 and 2, 1/4 and 3/4.
    assert reference.seq_aux_loss(logits_TE, np.ones(4, bool), with_two, n_sequences=2) == pytest.approx(
        (2 * 5 / 8 + 2 * 3 / 4) / 2
    )


@every_rule
def test_seq_aux_loss_of_one_sequence_is_the_aux_loss_of_normalised_scores_without_bias_and_groups(rule, rng):
    logits_TE, made = rng.normal(size=(6, 4)), config(rule, norm_topk_prob=True)
    routing = reference.route(logits_TE, made)
    load_E = reference.expert_load(routing.ids_TK, VALID, 4)
    wanted = reference.aux_loss(routing.scores_TE, load_E, VALID, 2)
    assert reference.seq_aux_loss(logits_TE, VALID, made) == pytest.approx(wanted, rel=1e-14)


@pytest.mark.parametrize("rule", [name for name, row in ROUTING_RULES.items() if row.uses_bias])
def test_seq_aux_loss_ranks_by_score_alone_whatever_bias_and_groups_choose(rule, rng):
    logits_TE, bias_E = rng.normal(size=(6, 4)), np.array([0.0, 0.0, 5.0, 4.0])
    grouped = config(rule, n_expert_groups=2, n_limited_groups=1)
    routing = reference.route(logits_TE, grouped, correction_bias_E=bias_E)
    assert (np.sort(routing.ids_TK) == [2, 3]).all()
    found = reference.losses(logits_TE, routing, VALID, grouped)["seq_aux_loss"]
    plain = reference.route(logits_TE, config(rule))
    assert found == reference.losses(logits_TE, plain, VALID, config(rule))["seq_aux_loss"]


def test_seq_aux_loss_of_several_sequences_is_their_mean(rng):
    logits_TE, made = rng.normal(size=(6, 4)), config()
    apart = [reference.seq_aux_loss(logits_TE[part], VALID[part], made) for part in (slice(0, 3), slice(3, 6))]
    together = reference.seq_aux_loss(logits_TE, VALID, made, n_sequences=2)
    assert together == pytest.approx(np.mean(apart), rel=1e-15) and together != pytest.approx(apart[0])


def test_losses_count_no_padding_and_no_sequence_of_padding_alone(rng):
    """What padding holds, NaN too, neither changes a loss nor receives a gradient."""
    made = config("sigmoid", aux_loss_coeff=0.5, z_loss_coeff=0.5, seq_aux_loss_coeff=0.5)
    logits_TE, best_TK = rng.normal(size=(9, 4)), np.tile([0, 1], (9, 1))
    logits_TE[~MASK] = np.nan
    settings = {"n_sequences": 3, "best_TK": best_TK}
    routing = reference.route(logits_TE, made, ids_TK=best_TK)
    found = reference.losses(logits_TE, routing, MASK, made, **settings)
    kept = [
        reference.seq_aux_loss(logits_TE[p][MASK[p]], MASK[p][MASK[p]], made, best_TK=best_TK[p][MASK[p]])
        for p in (slice(0, 3), slice(3, 6))
    ]
    assert found["z_loss"] == pytest.approx(reference.z_loss(logits_TE[MASK], MASK[MASK]), rel=1e-15)
    assert found["seq_aux_loss"] == pytest.approx(np.mean(kept), rel=1e-15)
    for gradient_TE in reference.losses_vjp(logits_TE, routing, MASK, made, **settings):
        assert np.isfinite(gradient_TE).all() and gradient_TE[MASK].any() and not gradient_TE[~MASK].any()


@pytest.mark.parametrize("tokens", [0, 4])
def test_losses_without_a_valid_token_are_zero_with_zero_gradients(tokens):
    made = config(aux_loss_coeff=0.5, z_loss_coeff=0.5, seq_aux_loss_coeff=0.5)
    logits_TE, mask_T = np.ones((tokens, 4)), np.zeros(tokens, bool)
    routing = reference.route(logits_TE, made)
    assert set(reference.losses(logits_TE, routing, mask_T, made, n_sequences=2).values()) == {0.0}
    for gradient_TE in reference.losses_vjp(logits_TE, routing, mask_T, made, n_sequences=2):
        assert gradient_TE.shape == (tokens, 4) and not gradient_TE.any()


def test_losses_vjp_without_a_coefficient_has_no_gradient_of_the_logits(rng):
    logits_TE = rng.normal(size=(6, 4))
    dscores_TE, dlogits_TE = reference.losses_vjp(logits_TE, reference.route(logits_TE, config()), VALID, config())
    assert dlogits_TE is None and not dscores_TE.any()


def test_z_loss_vjp_agrees_with_differences(rng, check_gradients):
    logits_TE = rng.normal(size=(9, 4))
    gradient_TE = reference.z_loss_vjp(logits_TE, MASK, 0.3)
    check_gradients(lambda x: 0.3 * reference.z_loss(x, MASK), {"x": logits_TE}, {"x": gradient_TE})


@every_rule
def test_seq_aux_loss_vjp_of_every_rule_agrees_with_differences(rule, rng, check_gradients):
    logits_TE, made = rng.normal(size=(9, 4)), config(rule)

    def run(x):
        return 0.3 * reference.seq_aux_loss(x, MASK, made, n_sequences=3)

    gradient_TE = reference.seq_aux_loss_vjp(logits_TE, MASK, made, 0.3, n_sequences=3)
    check_gradients(run, {"x": logits_TE}, {"x": gradient_TE})


@every_rule
def test_moe_vjp_with_every_loss_and_a_scale_agrees_with_differences(rule, rng, check_gradients):
    """The scale multiplies every loss, the coefficient its own, and neither touches the layer's output."""
    made = config(
        rule, norm_topk_prob=True, router_bias=True, aux_loss_coeff=0.2, z_loss_coeff=0.3, seq_aux_loss_coeff=0.5
    )
    parameters = {row.name: 0.5 * rng.normal(size=row.shape) for row in layout.moe(made)}
    x_TD, dy_TD = rng.normal(size=(9, 5)), rng.normal(size=(9, 5))
    bias_E = rng.random(4) if made.routing_rule.uses_bias else None
    trace = reference.moe(x_TD, MASK, parameters, made, correction_bias_E=bias_E, n_sequences=3)
    names = [name for name in parameters if name.startswith("gate.")]

    def run(x, **router):
        ids_TK, values = trace.routing.ids_TK, parameters | router
        found = reference.moe(x, MASK, values, made, correction_bias_E=bias_E, ids_TK=ids_TK, n_sequences=3)
        losses = 0.2 * found.aux_loss + 0.3 * found.z_loss + 0.5 * found.seq_aux_loss
        return (found.y_TD * dy_TD).sum() + 4.0 * losses

    settings = {"correction_bias_E": bias_E, "aux_loss_scale": 4.0, "n_sequences": 3}
    dx_TD, grads = reference.moe_vjp(trace, x_TD, MASK, parameters, made, dy_TD, **settings)
    check_gradients(
        run,
        {"x": x_TD, **{name: parameters[name] for name in names}},
        {"x": dx_TD, **{name: grads[name] for name in names}},
    )
