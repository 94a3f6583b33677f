"""The gate in both frontends: what its documentation promises of weights, choice and the fake one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sides import Side, rounded

from moebius.core import MoEConfig, reference
from moebius.core.precision import EXACT
from moebius.core.tolerance import bounds, within

frontends = pytest.mark.parametrize("side", (Side("torch", "loop"), Side("jax", "loop")), ids=lambda s: s.framework)
SIZES = {"n_routed_experts": 8, "n_activated_experts": 2, "dim": 16, "moe_inter_dim": 4, "dtype": "float32"}
X = rounded(np.random.default_rng(0).normal(size=(32, 16)), "bfloat16")
MASK = np.arange(32) % 7 != 3
GROUPS = {"n_expert_groups": 4, "n_limited_groups": 2}


def gate(side: Side, config: MoEConfig, seed: int = 1, **settings: Any):
    """(gate, its parameters, its correction bias)."""
    rng = np.random.default_rng(seed)
    weight = rounded(rng.normal(size=(8, 16)) * 0.5, "bfloat16")
    bias = rounded(rng.normal(size=8) * 0.2, "float32") if config.has_correction_bias else None
    if side.framework == "torch":
        made = side.module.Gate(config, **settings)
    else:
        from flax import nnx

        made = side.module.Gate(config, rngs=nnx.Rngs(0), **settings)
    side.module.load_parameters(made, {"weight": side.array(weight, "float32")})
    if bias is not None:
        made.e_score_correction_bias[...] = side.array(bias, "float32")
    return made, {"weight": weight}, bias


def routed(side: Side, made: Any, dtype: str = "float32") -> list[np.ndarray]:
    return [side.numpy(value) for value in made(side.array(X, dtype), side.array(MASK))[:2]]


@frontends
def test_gate_of_softmax_after_the_choice_gives_weights_that_sum_to_one(side: Side) -> None:
    weights, ids = routed(side, gate(side, MoEConfig(**SIZES))[0])
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    assert (ids[:, 0] != ids[:, 1]).all()


@frontends
@pytest.mark.parametrize("groups", [{}, GROUPS], ids=["", "groups"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("rule", ["sigmoid_with_bias", "softmax_with_bias", "sqrtsoftplus", "sigmoid"])
@pytest.mark.filterwarnings("ignore:.*ignores")
def test_gate_of_every_biased_rule_agrees_with_reference(side: Side, rule: str, bias: bool, groups) -> None:
    config = MoEConfig(
        **SIZES, score_func=rule, norm_topk_prob=True, route_scale=2.5, force_e_score_correction_bias=bias, **groups
    )
    made, parameters, correction = gate(side, config)
    found = dict(zip(("weights", "ids"), routed(side, made), strict=True))

    def wanted(arithmetic):
        _, routing = reference.gate(
            X, parameters, config, correction_bias_E=correction, ids_TK=ids, arithmetic=arithmetic
        )
        return {"weights": routing.weights_TK}

    ids = reference.gate(X, parameters, config, correction_bias_E=correction)[1].ids_TK
    np.testing.assert_array_equal(found["ids"], ids)
    exact = wanted(EXACT)
    assert within(found["weights"], exact["weights"], bounds(wanted, exact, "float32")["weights"])
    np.testing.assert_allclose(found["weights"].sum(-1), 2.5, rtol=1e-6)


@frontends
def test_gate_correction_bias_moves_the_choice_and_not_the_weights(side: Side) -> None:
    config = MoEConfig(**SIZES, score_func="sqrtsoftplus", force_e_score_correction_bias=True)
    made, parameters, _ = gate(side, config)
    made.e_score_correction_bias[...] = side.array(np.where(np.arange(8) < 2, 100.0, 0.0), "float32")
    weights, ids = routed(side, made)
    assert (np.sort(ids) == [0, 1]).all()
    score = np.sqrt(np.logaddexp(0, X @ parameters["weight"].T))
    np.testing.assert_allclose(weights, np.take_along_axis(score, ids, axis=1), rtol=1e-5)


@frontends
def test_gate_of_biased_weights_adds_the_bias_to_them(side: Side) -> None:
    """sigmoid(0) + 10."""
    config = MoEConfig(
        **SIZES,
        score_func="sigmoid",
        router_weight_uses_score_correction_bias=True,
        force_e_score_correction_bias=True,
    )
    made, *_ = gate(side, config)
    side.module.load_parameters(made, {"weight": side.array(np.zeros((8, 16)), "float32")})
    made.e_score_correction_bias[...] = side.array(np.where(np.arange(8) == 5, 10.0, 0.0), "float32")
    weights, ids = routed(side, made)
    assert (ids[:, 0] == 5).all() and (weights[:, 0] == 10.5).all() and (weights[:, 1] == 0.5).all()


@frontends
@pytest.mark.parametrize("precision", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("fp32", [False, True], ids=["", "fp32"])
def test_gate_returns_weights_in_x_dtype_whatever_its_precision_unless_told_float32(side, precision, fp32) -> None:
    made, *_ = gate(side, MoEConfig(**SIZES, router_weights_fp32=fp32), gate_precision=precision)
    weights, ids, loss = made(side.array(X, "bfloat16"), side.array(MASK))
    assert str(weights.dtype).endswith("float32" if fp32 else "bfloat16")
    assert str(ids.dtype).endswith("int32") and loss is None


@frontends
@pytest.mark.parametrize("rule", ["softmax", "sigmoid_with_bias"])
def test_gate_routes_bit_for_bit_as_route_of_its_logits(side: Side, rule: str) -> None:
    config = MoEConfig(**SIZES, score_func=rule, force_e_score_correction_bias=rule != "softmax", norm_topk_prob=True)
    made, *_ = gate(side, config)
    seen: list[Any] = []
    made.tap = lambda name, value: seen.append(value) or value
    weights, ids = routed(side, made)
    bias = None if made.e_score_correction_bias is None else made.e_score_correction_bias[...]
    wanted = side.module.route(seen[0], config, correction_bias_E=bias)
    np.testing.assert_array_equal(weights, side.numpy(wanted.weights_TK))
    np.testing.assert_array_equal(ids, side.numpy(wanted.ids_TK))


@frontends
@pytest.mark.parametrize("skip", [0, 3])
def test_fake_gate_cycles_evenly_over_the_experts_it_may_use(side: Side, skip: int) -> None:
    made = side.module.FakeBalancedGate(MoEConfig(**SIZES), skip)
    weights, ids, loss = made(side.array(X, "bfloat16"), side.array(MASK))
    np.testing.assert_array_equal(side.numpy(ids), np.arange(64).reshape(32, 2) % (8 - skip) + skip)
    assert (side.numpy(weights) == 0.5).all() and str(weights.dtype).endswith("bfloat16") and loss is None
    assert made.update_bias() is None and made.bias_update_factor == 0.0
    assert not side.module.parameters(made)


@frontends
def test_fake_gate_with_noise_is_in_range_unique_summed_to_one_uneven_and_repeats_itself(side: Side) -> None:
    made = side.module.FakeBalancedGate(MoEConfig(**SIZES), 2, noise=1.0)
    x = np.random.default_rng(2).normal(size=(4000, 16))
    mask = side.array(np.ones(4000, bool))
    weights, ids = [side.numpy(value) for value in made(side.array(x, "float32"), mask)[:2]]
    again, same = [side.numpy(value) for value in made(side.array(x, "float32"), mask)[:2]]
    other = side.numpy(made(side.array(x + 1, "float32"), mask)[1])
    np.testing.assert_array_equal(weights, again)
    np.testing.assert_array_equal(ids, same)
    assert (ids != other).any() and ids.min() == 2 and ids.max() == 7 and (ids[:, 0] != ids[:, 1]).all()
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-3)
    load = np.bincount(ids.ravel(), minlength=8)[2:]
    assert load.std() / load.mean() > 0.06  # each expert's popularity is drawn: 0.025 would come of the tokens alone
