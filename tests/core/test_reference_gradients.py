"""Every vector-Jacobian product of the reference against fourth-order differences of the function beside it.

Inputs stay further from every kink (a clamp, relu at 0, a change of the choice) than the differences reach; what is
true on a kink is in test_reference.py.
"""

import warnings
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from moebius.core import ACTIVATIONS, ROUTING_RULES, MoEWarning, layout, reference

SCORE_SETTINGS = {
    "softmax_before_topk": {"score_func": "softmax", "softmax_before_topk": True},
    "sigmoid_biased_weights": {"score_func": "sigmoid", "router_weight_uses_score_correction_bias": True},
}
IDS = np.array([[0, 1], [2, 2], [-1, 0], [4, 1], [0, 3], [1, 0]])
MASK = np.array([True, True, True, True, False, True])
SIZES = np.array([2, 0, 3, 1])


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def drawn(rng, **shapes):
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


@pytest.fixture
def layer(small, rng):
    """layer(kind, **settings): a config and values for its parameters."""

    def make(kind, **settings):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MoEWarning)
            config = small(**settings)
        # Halved, so that no function here is curved much more sharply than its slope.
        return config, {row.name: 0.5 * rng.normal(size=row.shape) for row in kind(config)}

    return make


# ------------------------------------------------------------------------------------------------------------ route


@pytest.mark.parametrize(("norm", "bias", "groups"), list(product([False, True], repeat=3)))
@pytest.mark.parametrize("rule", ROUTING_RULES)
def test_route_vjp_of_every_rule_agrees_with_differences(rule, norm, bias, groups, layer, rng, check_gradients):
    settings = SCORE_SETTINGS.get(rule, {"score_func": rule}) | {"norm_topk_prob": norm, "route_scale": 2.5}
    settings |= {"n_expert_groups": 4, "n_limited_groups": 2} if groups else {}
    config, _ = layer(layout.gate, n_routed_experts=8, n_activated_experts=3, **settings)
    assert config.routing_rule.name == rule
    given = drawn(rng, logits=(5, 8), dweights=(5, 3), dscores=(5, 8))
    # Positive, so that no sum that weights are divided by comes near zero.
    bias_E = rng.random(8) if bias else None
    ids_TK = reference.route(given["logits"], config, correction_bias_E=bias_E).ids_TK

    def run(logits):
        routing = reference.route(logits, config, correction_bias_E=bias_E, ids_TK=ids_TK)
        return (routing.weights_TK * given["dweights"]).sum() + (routing.scores_TE * given["dscores"]).sum()

    dlogits_TE = reference.route_vjp(
        given["logits"], config, ids_TK, given["dweights"], given["dscores"], correction_bias_E=bias_E
    )
    check_gradients(run, {"logits": given["logits"]}, {"logits": dlogits_TE})


def test_route_vjp_of_forced_duplicate_ids_adds_their_gradients(small, rng, check_gradients):
    ids_TK, logits_TE, dweights_TK = np.array([[1, 1], [3, 0]]), rng.normal(size=(2, 4)), rng.normal(size=(2, 2))
    config = small(score_func="sigmoid", norm_topk_prob=True)

    def run(logits):
        return (reference.route(logits, config, ids_TK=ids_TK).weights_TK * dweights_TK).sum()

    dlogits_TE = reference.route_vjp(logits_TE, config, ids_TK, dweights_TK)
    check_gradients(run, {"logits": logits_TE}, {"logits": dlogits_TE})


def test_aux_loss_vjp_agrees_with_differences(rng, check_gradients):
    scores_TE, load_E = rng.random((6, 4)), reference.expert_load(IDS, MASK, 4)

    def run(scores):
        return 0.3 * reference.aux_loss(scores, load_E, MASK, 2)

    check_gradients(run, {"scores": scores_TE}, {"scores": reference.aux_loss_vjp(scores_TE, load_E, MASK, 2, 0.3)})


@pytest.mark.parametrize("rule", ROUTING_RULES)
def test_gate_vjp_of_every_rule_agrees_with_differences(rule, layer, rng, check_gradients):
    settings = SCORE_SETTINGS.get(rule, {"score_func": rule}) | {"norm_topk_prob": True, "router_bias": True}
    config, parameters = layer(layout.gate, aux_loss_coeff=0.5, **settings)
    given, bias_E = drawn(rng, x=(6, 6), dweights=(6, 2)), rng.random(4)
    logits_TE, routing = reference.gate(given["x"], parameters, config, correction_bias_E=bias_E)
    load_E = reference.expert_load(routing.ids_TK, MASK, 4)

    def run(x, **parameters):
        _, found = reference.gate(x, parameters, config, correction_bias_E=bias_E, ids_TK=routing.ids_TK)
        loss = reference.aux_loss(found.scores_TE, load_E, MASK, 2)
        return (found.weights_TK * given["dweights"]).sum() + config.aux_loss_coeff * loss

    dscores_TE = reference.aux_loss_vjp(routing.scores_TE, load_E, MASK, 2, config.aux_loss_coeff)
    dx_TD, grads = reference.gate_vjp(
        given["x"],
        logits_TE,
        routing.ids_TK,
        parameters,
        config,
        given["dweights"],
        dscores_TE,
        correction_bias_E=bias_E,
    )
    assert grads.keys() == parameters.keys()
    check_gradients(run, {"x": given["x"], **parameters}, {"x": dx_TD, **grads})


# --------------------------------------------------------------------------------------------------- rows and matrices


def test_permute_vjp_agrees_with_differences(rng, check_gradients):
    given = drawn(rng, x=(6, 3), weights=(6, 2))
    state = reference.permute(given["x"], given["weights"], IDS, MASK, 4)
    drows_RD, drow_weights_R = rng.normal(size=state.rows_RD.shape), rng.normal(size=state.row_weights_R.shape)

    def run(x, weights):
        rows = reference.permute(x, weights, IDS, MASK, 4)
        return (rows.rows_RD * drows_RD).sum() + (rows.row_weights_R * drow_weights_R).sum()

    dx_TD, dweights_TK = reference.permute_vjp(state, drows_RD, drow_weights_R)
    check_gradients(run, given, {"x": dx_TD, "weights": dweights_TK})


@pytest.mark.parametrize("weighted", [False, True])
def test_unpermute_vjp_agrees_with_differences(weighted, rng, check_gradients):
    state = reference.permute(np.zeros((6, 3)), np.zeros((6, 2)), IDS, MASK, 4)
    n_rows, dy_TD = len(state.tokens_R), rng.normal(size=(6, 3))
    given = drawn(rng, out=(n_rows, 3), weights=(n_rows,))

    def run(out, weights):
        return (reference.unpermute(out, state, weights if weighted else None) * dy_TD).sum()

    weights_R = given["weights"] if weighted else None
    dout_RD, dweights_R = reference.unpermute_vjp(given["out"], state, dy_TD, weights_R)
    check_gradients(run, given, {"out": dout_RD, "weights": dweights_R})


def test_grouped_matmul_vjp_with_padding_rows_and_an_empty_expert_agrees_with_differences(rng, check_gradients):
    given, dout_RF = drawn(rng, rows=(8, 3), weight=(4, 3, 5)), rng.normal(size=(8, 5))
    assert SIZES.sum() < 8

    def run(rows, weight):
        return (reference.grouped_matmul(rows, weight, SIZES) * dout_RF).sum()

    drows_RD, dweight_eDF = reference.grouped_matmul_vjp(given["rows"], given["weight"], SIZES, dout_RF)
    assert not drows_RD[SIZES.sum() :].any()
    assert not dweight_eDF[SIZES == 0].any()
    check_gradients(run, given, {"rows": drows_RD, "weight": dweight_eDF})


def test_linear_vjp_agrees_with_differences(rng, check_gradients):
    given, dout_TF = drawn(rng, x=(4, 3), weight=(5, 3), bias=(5,)), rng.normal(size=(4, 5))

    def run(x, weight, bias):
        return (reference.linear(x, weight, bias) * dout_TF).sum()

    dx_TD, dweight_FD, dbias_F = reference.linear_vjp(given["x"], given["weight"], dout_TF)
    check_gradients(run, given, {"x": dx_TD, "weight": dweight_FD, "bias": dbias_F})


@pytest.mark.parametrize("weighted", [False, True])
def test_add_bias_vjp_agrees_with_differences(weighted, rng, check_gradients):
    given, dout_RF = drawn(rng, out=(6, 5), bias=(4, 5), weights=(6,)), rng.normal(size=(6, 5))

    def run(out, bias, weights):
        return (reference.add_bias(out, bias, SIZES, weights if weighted else None) * dout_RF).sum()

    weights_R = given["weights"] if weighted else None
    dbias_eF, dweights_R = reference.add_bias_vjp(given["bias"], SIZES, dout_RF, weights_R)
    check_gradients(run, given, {"out": dout_RF, "bias": dbias_eF, "weights": dweights_R})


# ------------------------------------------------------------------------------------------------------- activation


def off_kinks(rng, shape, limit):
    """Values on both sides of -limit, 0 and limit, none nearer to one of them than a twentieth of their spacing."""
    step = 1.0 if limit is None else max(limit, 0.5)
    return step * (rng.integers(-3, 3, size=shape) + rng.uniform(0.05, 0.95, size=shape))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("limit", [None, 7.0, 1.0, 0.0])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activate_vjp_of_every_row_agrees_with_differences(name, limit, weighted, rng, check_gradients):
    row = replace(ACTIVATIONS[name], limit=limit)
    given = {"hidden": off_kinks(rng, (4, row.up_width(6)), limit), "weights": rng.normal(size=4)}
    dact_RI = rng.normal(size=(4, 6))
    if limit:
        assert (given["hidden"] > limit).any() and (given["hidden"] < -limit).any()

    def run(hidden, weights):
        return (reference.activate(hidden, weights if weighted else None, row) * dact_RI).sum()

    dhidden_RU, dweights_R = reference.activate_vjp(
        given["hidden"], given["weights"] if weighted else None, row, dact_RI
    )
    gradients = {"hidden": dhidden_RU} | ({"weights": dweights_R} if weighted else {})
    check_gradients(run, given, gradients)


# ----------------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("after", [False, True], ids=["before_down", "after_down"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("name", ["swiglu", "swigluoai", "quick_geglu", "geglu", "relu2"])
def test_experts_vjp_agrees_with_differences(name, bias, after, layer, rng, check_gradients):
    config, parameters = layer(
        layout.experts, expert_activation=name, expert_bias=bias, apply_router_weight_after_down=after
    )
    given, dy_TD = drawn(rng, x=(6, 6), weights=(6, 2)), rng.normal(size=(6, 6))

    def run(x, weights, **parameters):
        return (reference.experts(x, MASK, weights, IDS, parameters, config).y_TD * dy_TD).sum()

    trace = reference.experts(given["x"], MASK, given["weights"], IDS, parameters, config)
    while name == "relu2" and np.abs(trace.hidden_RU).min() < 0.02:  # its second derivative jumps at 0
        given["x"] = rng.normal(size=(6, 6))
        trace = reference.experts(given["x"], MASK, given["weights"], IDS, parameters, config)
    dx_TD, dweights_TK, grads = reference.experts_vjp(trace, parameters, config, dy_TD)
    assert grads.keys() == parameters.keys()
    check_gradients(run, given | parameters, {"x": dx_TD, "weights": dweights_TK, **grads})


@pytest.mark.parametrize("gate", [False, True], ids=["plain", "gate"])
@pytest.mark.parametrize("settings", [{}, {"swiglu_limit": 3.0}, {"shared_expert_activation": "relu2"}], ids=str)
def test_shared_experts_vjp_agrees_with_differences(settings, gate, layer, rng, check_gradients):
    config, parameters = layer(
        layout.moe, n_shared_experts=2, shared_expert_gate=gate, expert_bias=True, shared_expert_inter_dim=3, **settings
    )
    parameters = {name: value for name, value in parameters.items() if name.startswith("shared_expert")}
    x_TD, dy_TD = rng.normal(size=(4, 6)), rng.normal(size=(4, 6))

    def run(x, **parameters):
        return (reference.shared_experts(x, parameters, config) * dy_TD).sum()

    dx_TD, grads = reference.shared_experts_vjp(x_TD, parameters, config, dy_TD)
    assert grads.keys() == parameters.keys()
    check_gradients(run, {"x": x_TD, **parameters}, {"x": dx_TD, **grads})


MOE_SETTINGS = {
    "plain": {},
    "latent": {"moe_latent_size": 3, "expert_bias": True},
    "shared": {"n_shared_experts": 1, "shared_expert_gate": True},
    "everything": {
        "moe_latent_size": 3,
        "n_shared_experts": 2,
        "shared_expert_gate": True,
        "expert_bias": True,
        "router_bias": True,
        "score_func": "sigmoid_with_bias",
        "norm_topk_prob": True,
        "route_scale": 2.5,
        "force_e_score_correction_bias": True,
        "aux_loss_coeff": 0.25,
        "apply_router_weight_after_down": True,
    },
}


@pytest.mark.parametrize("name", MOE_SETTINGS)
def test_moe_vjp_agrees_with_differences(name, layer, rng, check_gradients):
    config, parameters = layer(layout.moe, **MOE_SETTINGS[name])
    x_TD, dy_TD = rng.normal(size=(6, 6)), rng.normal(size=(6, 6))
    bias_E = rng.normal(size=4) if config.has_correction_bias else None
    trace = reference.moe(x_TD, MASK, parameters, config, correction_bias_E=bias_E)

    def run(x, **parameters):
        found = reference.moe(x, MASK, parameters, config, correction_bias_E=bias_E, ids_TK=trace.routing.ids_TK)
        return (found.y_TD * dy_TD).sum() + config.aux_loss_coeff * found.aux_loss

    dx_TD, grads = reference.moe_vjp(trace, x_TD, MASK, parameters, config, dy_TD, correction_bias_E=bias_E)
    assert grads.keys() == parameters.keys() == {row.name for row in layout.moe(config)}
    check_gradients(run, {"x": x_TD, **parameters}, {"x": dx_TD, **grads})


def test_check_gradients_of_a_wrong_gradient_fails(check_gradients):
    value = np.array([1.0, 2.0])
    with pytest.raises(AssertionError, match="gradient of value"):
        check_gradients(lambda value: (value**2).sum(), {"value": value}, {"value": 2 * value + 1e-8})
