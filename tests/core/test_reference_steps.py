"""The steps of the reference one by one, and the whole layer: padding, clamps, shared experts, forced routing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moebius.core import ACTIVATIONS, MoEConfig, layout, reference

# --------------------------------------------------------------------------------------------------------- the steps


def test_permute_of_a_routing_sorts_by_expert_then_token_then_slot():
    ids_TK = np.array([[1, 0], [0, 0], [-1, 1], [1, 2], [0, 1]])
    x_TD, weights_TK = np.arange(5.0)[:, None], np.arange(10.0).reshape(5, 2)
    rows = reference.permute(x_TD, weights_TK, ids_TK, np.array([True, True, True, True, False]), 2)
    assert rows.tokens_R.tolist() == [0, 1, 1, 0, 2, 3]
    assert rows.slots_R.tolist() == [1, 0, 1, 0, 1, 0]
    assert rows.row_weights_R.tolist() == [1.0, 2.0, 3.0, 0.0, 5.0, 6.0]
    assert rows.rows_RD[:, 0].tolist() == [0.0, 1.0, 1.0, 0.0, 2.0, 3.0]
    assert rows.group_sizes_e.tolist() == [3, 3]


routings = arrays(np.int64, st.tuples(st.integers(0, 6), st.integers(1, 3)), elements=st.integers(-2, 5))


@settings(max_examples=50)
@given(ids_TK=routings, seed=st.integers(0, 9))
def test_unpermute_of_permuted_rows_counts_each_route_once(ids_TK, seed):
    rng = np.random.default_rng(seed)
    x_TD, mask_T = rng.normal(size=(len(ids_TK), 3)), rng.random(len(ids_TK)) < 0.7
    rows = reference.permute(x_TD, np.ones(ids_TK.shape), ids_TK, mask_T, 4)
    count_T = (mask_T[:, None] & (ids_TK >= 0) & (ids_TK < 4)).sum(-1)
    np.testing.assert_allclose(reference.unpermute(rows.rows_RD, rows), x_TD * count_T[:, None], atol=1e-12)
    assert rows.group_sizes_e.sum() == count_T.sum() == len(rows.rows_RD)


@settings(max_examples=50)
@given(sizes=st.lists(st.integers(0, 4), min_size=1, max_size=4), padding=st.integers(0, 3))
def test_grouped_matmul_of_any_sizes_is_one_product_a_group_and_zero_past_them(sizes, padding):
    rng, n_rows = np.random.default_rng(0), sum(sizes) + padding
    rows_RD, weight_eDF = rng.normal(size=(n_rows, 3)), rng.normal(size=(len(sizes), 3, 2))
    rows_RD[sum(sizes) :] = np.nan
    out_RF = reference.grouped_matmul(rows_RD, weight_eDF, np.array(sizes))
    expert_R = np.repeat(np.arange(len(sizes)), sizes)
    for row, expert in enumerate(expert_R):
        np.testing.assert_allclose(out_RF[row], rows_RD[row] @ weight_eDF[expert], rtol=1e-12)
    assert not out_RF[sum(sizes) :].any()


def test_add_bias_of_none_returns_the_same_array():
    out_RF = np.ones((2, 3))
    assert reference.add_bias(out_RF, None, np.array([2])) is out_RF


@pytest.mark.parametrize("name", ["swiglu_clamped", "swigluoai", "quick_geglu"])
def test_activate_vjp_on_a_limit_passes_and_beyond_it_stops(name):
    """A clamp's gradient is 1 on its boundary."""
    row = ACTIVATIONS[name]
    gate, up = np.array([7.0, 7.5, 1.0, 1.0, 1.0, 1.0]), np.array([1.0, 1.0, 7.0, -7.0, 7.5, -7.5])
    hidden_RU = np.stack([gate, up], -1).reshape(1, -1) if row.interleaved else np.concatenate([gate, up])[None]
    dhidden_RU, _ = reference.activate_vjp(hidden_RU, None, row, np.ones((1, 6)))
    dgate, dup = (
        (dhidden_RU[0, 0::2], dhidden_RU[0, 1::2]) if row.interleaved else (dhidden_RU[0, :6], dhidden_RU[0, 6:])
    )
    assert dgate[0] != 0 and dgate[1] == 0
    assert (dup[2:4] != 0).all() and (dup[4:] == 0).all()


def test_activate_of_quick_geglu_with_limit_zero_clamps_to_zero():
    config = MoEConfig(
        n_routed_experts=1,
        n_activated_experts=1,
        dim=1,
        moe_inter_dim=1,
        expert_activation="quick_geglu",
        activation_limit=0.0,
    )
    assert reference.activate(np.array([[3.0, 5.0]]), None, config.activation).tolist() == [[0.0]]
    assert reference.activate(np.array([[-1.0, 5.0]]), None, config.activation)[0, 0] == pytest.approx(
        -1 / (1 + np.exp(1.702))
    )


@pytest.mark.parametrize(
    ("name", "gate", "up", "expected"),
    [
        ("swiglu", 1.5, 2.0, 1.5 / (1 + np.exp(-1.5)) * 2.0),
        ("swiglu_clamped", 9.0, -9.0, 7.0 / (1 + np.exp(-7.0)) * -7.0),
        ("swiglu_clamped", -9.0, 9.0, -9.0 / (1 + np.exp(9.0)) * 7.0),
        ("swigluoai", 9.0, 9.0, 7.0 / (1 + np.exp(-1.702 * 7)) * 8.0),
        ("quick_geglu", 0.5, -9.0, 0.5 / (1 + np.exp(-1.702 * 0.5)) * -6.0),
        ("geglu", 1.0, 2.0, 2 * 0.8411919906082768),
        ("relu2", 3.0, None, 9.0),
        ("relu2", -3.0, None, 0.0),
    ],
)
def test_activate_of_a_row_gives_its_formula(name, gate, up, expected):
    hidden_RU = np.array([[gate]] if up is None else [[gate, up]])
    assert reference.activate(hidden_RU, np.array([0.5]), ACTIVATIONS[name])[0, 0] == pytest.approx(expected / 2)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activate_of_huge_inputs_stays_finite(name):
    row = ACTIVATIONS[name]
    hidden_RU = np.array([[-1e4, 1e4] * 2])[:, : row.up_width(2)]
    assert np.isfinite(reference.activate(hidden_RU, None, row)).all()
    assert all(np.isfinite(v).all() for v in reference.activate_vjp(hidden_RU, None, row, np.ones((1, 2))))


# ------------------------------------------------------------------------------------------------------- whole layers


T, D = 7, 6


def moe_layer(**settings):
    config = MoEConfig(n_routed_experts=4, n_activated_experts=2, dim=D, moe_inter_dim=5, dtype="float64", **settings)
    rng = np.random.default_rng(3)
    parameters = {row.name: rng.normal(size=row.shape) for row in layout.moe(config)}
    return config, parameters, rng.normal(size=(T, D)), rng.normal(size=(T, D))


def test_moe_of_padding_gets_the_shared_experts_and_no_routed_one():
    config, parameters, x_TD, _ = moe_layer(n_shared_experts=1)
    mask_T = np.arange(T) != 2
    trace = reference.moe(x_TD, mask_T, parameters, config)
    shared_TD = reference.shared_experts(x_TD, parameters, config)
    np.testing.assert_array_equal(trace.y_TD[2], shared_TD[2])
    assert not trace.experts.y_TD[2].any() and trace.load_E.sum() == (T - 1) * 2


def test_moe_of_padding_with_latent_projection_gets_its_bias():
    config, parameters, x_TD, _ = moe_layer(moe_latent_size=3, expert_bias=True)
    trace = reference.moe(x_TD, np.zeros(T, bool), parameters, config)
    np.testing.assert_array_equal(trace.y_TD, np.tile(parameters["fc2_latent_proj.bias"], (T, 1)))


def test_moe_of_no_token_returns_nothing_and_zero_gradients():
    config, parameters, x_TD, dy_TD = moe_layer(n_shared_experts=1, shared_expert_gate=True, aux_loss_coeff=0.1)
    trace = reference.moe(x_TD[:0], np.zeros(0, bool), parameters, config)
    dx_TD, grads = reference.moe_vjp(trace, x_TD[:0], np.zeros(0, bool), parameters, config, dy_TD[:0])
    assert trace.y_TD.shape == dx_TD.shape == (0, D)
    assert trace.aux_loss == 0 and grads.keys() == parameters.keys()
    assert not any(value.any() for value in grads.values())


def test_moe_with_forced_ids_takes_the_weights_from_the_live_scores():
    config, parameters, x_TD, _ = moe_layer(score_func="sigmoid")
    ids_TK = np.tile([3, 0], (T, 1))
    trace = reference.moe(x_TD, np.ones(T, bool), parameters, config, ids_TK=ids_TK)
    np.testing.assert_array_equal(trace.routing.ids_TK, ids_TK)
    logits_TE = x_TD @ parameters["gate.weight"].T
    np.testing.assert_allclose(trace.routing.weights_TK, 1 / (1 + np.exp(-logits_TE[:, [3, 0]])), rtol=1e-12)


def test_shared_experts_with_a_closed_gate_are_zero():
    config, parameters, x_TD, _ = moe_layer(n_shared_experts=1, shared_expert_gate=True)
    x_TD = np.abs(x_TD)
    parameters["shared_expert_gate.weight"][:] = -1e6
    assert not reference.shared_experts(x_TD, parameters, config).any()


def test_shared_experts_with_swiglu_limit_are_clamped():
    config, parameters, x_TD, _ = moe_layer(n_shared_experts=1, swiglu_limit=0.5)
    free, parameters_free, *_ = moe_layer(n_shared_experts=1)
    assert parameters.keys() == parameters_free.keys()
    clamped_TD = reference.shared_experts(x_TD, parameters, config)
    assert np.abs(clamped_TD - reference.shared_experts(x_TD, parameters, free)).max() > 0.1
