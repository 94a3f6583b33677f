"""Backend "te" of route on a stand-in for Transformer Engine's fused router, and what it refuses."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import transformer_engine_jax as te
from flax import nnx

from moebius.core import BackendUnavailable, MoEConfig, Unsupported
from moebius.core.registry import Problem
from moebius.jax_frontend import Gate, route
from moebius.jax_frontend.route import ROUTERS

T, E, K = 33, 16, 4
SIZES = {"n_routed_experts": E, "n_activated_experts": K, "dim": 8, "moe_inter_dim": 4, "route_scale": 2.5}
# name -> (settings, with a correction bias, what the package is asked)
SERVED = {
    "softmax": ({}, False, ("SOFTMAX", False, (-1, -1))),
    "softmax normalised": ({"norm_topk_prob": True}, False, ("SOFTMAX", False, (-1, -1))),
    "softmax that ignores a bias": ({}, True, ("SOFTMAX", False, (-1, -1))),
    "before": ({"softmax_before_topk": True}, False, ("SOFTMAX", True, (-1, -1))),
    "before normalised": ({"softmax_before_topk": True, "norm_topk_prob": True}, False, ("SOFTMAX", True, (-1, -1))),
    "softmax groups": (
        {"score_func": "softmax_with_groups", "n_expert_groups": 8, "n_limited_groups": 4},
        False,
        ("SOFTMAX", True, (8, 4)),
    ),
    "sigmoid": ({"score_func": "sigmoid", "norm_topk_prob": True}, False, ("SIGMOID", False, (-1, -1))),
    "sigmoid bias": ({"score_func": "sigmoid", "norm_topk_prob": True}, True, ("SIGMOID", False, (-1, -1))),
    "sigmoid of one": ({"score_func": "sigmoid", "n_activated_experts": 1}, True, ("SIGMOID", False, (-1, -1))),
    "sigmoid groups": (
        {"score_func": "sigmoid", "norm_topk_prob": True, "n_expert_groups": 4, "n_limited_groups": 4},
        False,
        ("SIGMOID", False, (4, 4)),
    ),
    "deepseek": (
        {"score_func": "sigmoid_with_bias", "norm_topk_prob": True, "n_expert_groups": 4, "n_limited_groups": 2},
        True,
        ("SIGMOID", False, (4, 2)),
    ),
    "sqrtsoftplus": ({"score_func": "sqrtsoftplus", "norm_topk_prob": True}, True, ("SQRTSOFTPLUS", False, (-1, -1))),
}
GROUPS = {"n_expert_groups": 4, "n_limited_groups": 2}
# name -> (settings, with a correction bias, words)
REFUSED = {
    "softmax bias": ({"score_func": "softmax_with_bias"}, True, "bias for sigmoid and sqrtsoftplus alone"),
    "biased weights": (
        {"score_func": "sigmoid", "router_weight_uses_score_correction_bias": True, "norm_topk_prob": True},
        True,
        "scores without the bias",
    ),
    "sigmoid not normalised": ({"score_func": "sigmoid"}, False, "normalises the weights of sigmoid"),
    "sqrtsoftplus not normalised": ({"score_func": "sqrtsoftplus"}, True, "normalises the weights of sqrtsoftplus"),
    "group scores": ({"score_func": "softmax_with_groups", **GROUPS}, False, "its best 4/2 experts .* by its best 1"),
    "no whole number": (
        {"score_func": "sigmoid_with_bias", "norm_topk_prob": True, "n_expert_groups": 4, "n_limited_groups": 3},
        True,
        "its best 4/3 experts",
    ),
    "groups of one": (
        {"score_func": "sigmoid_with_bias", "norm_topk_prob": True, "n_routed_experts": 2, "n_expert_groups": 2}
        | {"n_limited_groups": 1, "n_activated_experts": 1},
        False,
        "its best 1/1 experts .* by its best 2",
    ),
    "negative scores": ({"score_func": "sigmoid", "norm_topk_prob": True, **GROUPS}, True, "excluded group"),
}


def config_of(settings):
    return MoEConfig(**(SIZES | settings))


@pytest.fixture
def calls(monkeypatch):
    """A backend "te" that serves a CPU; the calls of the stand-in."""
    found = te.fake(monkeypatch)
    monkeypatch.setitem(ROUTERS._rows, "te", replace(ROUTERS["te"], supports=lambda problem: None))
    monkeypatch.setattr(ROUTERS, "_loaded", {})
    return found


@pytest.mark.parametrize("case", SERVED)
def test_route_te_agrees_with_moebius_own(calls, draws, case):
    settings, biased, asked = SERVED[case]
    config, draw = config_of(settings), draws(0)
    logits, bias = jnp.float32(draw((T, E), scale=2.0)), jnp.float32(draw((E,), scale=0.1)) if biased else None
    slopes = jnp.float32(draw((T, config.n_activated_experts))), jnp.float32(draw((T, E)))

    def run(backend):
        def weighted(logits):
            found = route(logits, config, correction_bias_E=bias, backend=backend)
            return (found.weights_TK, found.scores_TE), found.ids_TK

        (weights, scores), pull, ids = jax.vjp(weighted, logits, has_aux=True)
        return weights, scores, *pull(slopes), ids

    *found, ids = run("te")
    *wanted, wanted_ids = run(None)
    np.testing.assert_array_equal(ids, wanted_ids, "best first, as moebius orders them")
    assert ids.dtype == jnp.int32
    for value, own in zip(found, wanted, strict=True):
        np.testing.assert_allclose(value, own, rtol=1e-4, atol=1e-5)
    assert [(call["router"], call["pre"], call["groups"]) for call in calls] == [asked]


@pytest.mark.parametrize("case", REFUSED)
def test_route_te_says_what_of_a_config_it_cannot_do(calls, case):
    settings, biased, words = REFUSED[case]
    config = config_of(settings)
    bias = jnp.zeros(config.n_routed_experts) if biased else None
    with pytest.raises(Unsupported, match=rf"route backend 'te'.*\nfound: the fused router .*{words}"):
        route(jnp.zeros((T, config.n_routed_experts)), config, correction_bias_E=bias, backend="te")
    assert not calls


def test_route_te_of_forced_experts_is_refused(calls):
    with pytest.raises(Unsupported, match="experts are forced here"):
        route(jnp.zeros((T, E)), config_of({}), ids_TK=jnp.zeros((T, K), jnp.int32), backend="te")


def test_gate_with_route_te_routes_by_it_and_refuses_at_construction(calls):
    config = config_of({"score_func": "sigmoid", "norm_topk_prob": True, "dtype": "float32"})
    gates = [Gate(config, rngs=nnx.Rngs(0), route_backend=name) for name in (None, "te")]
    x = jax.random.normal(jax.random.key(0), (T, 8))
    (own, own_ids, _), (weights, ids, _) = (gate(x, jnp.ones(T, bool)) for gate in gates)
    np.testing.assert_array_equal(ids, own_ids)
    np.testing.assert_allclose(weights, own, rtol=1e-5)
    assert len(calls) == 1
    for settings, words in (
        ({"score_func": "sigmoid"}, "norm_topk_prob is False"),
        ({"enable_routing_replay": True}, "experts are forced"),
        ({"score_func": "softmax_with_bias", "force_e_score_correction_bias": True}, "sqrtsoftplus alone"),
    ):
        with pytest.raises(Unsupported, match=words):
            Gate(config_of(settings), rngs=nnx.Rngs(0), route_backend="te")


def test_route_te_inside_shard_map_is_refused_where_it_is_checked_and_the_same_where_it_is_not(calls, draws):
    mesh, spec = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)), jax.sharding.PartitionSpec
    logits, config = jnp.float32(draws(1)((T, E))), config_of({})

    def run(logits):
        return route(logits, config, backend="te").weights_TK

    def inside(check_vma):
        specs = {"in_specs": spec("data"), "out_specs": spec("data"), "check_vma": check_vma}
        return jax.jit(jax.shard_map(run, mesh=mesh, **specs))(logits)

    with pytest.raises(Unsupported, match=r"route backend 'te' inside shard_map with check_vma=True\n.*\ndo: pass"):
        inside(True)
    assert not calls
    np.testing.assert_allclose(inside(False), run(logits), rtol=1e-6)


def test_route_te_says_what_it_does_not_serve():
    usual = Problem(device="cuda", dtype="float32", dim=2048, inter_dim=768, n_experts=128, capability=(9, 0))
    says = ROUTERS["te"].supports
    assert says(usual) is None
    assert "in float32" in says(replace(usual, dtype="float64"))
    assert "on CUDA, not on cpu" in says(replace(usual, device="cpu"))
    assert "at most 2304 experts, not 4096" in says(replace(usual, n_experts=4096))


def test_gate_with_route_te_without_the_package_is_refused_at_construction(monkeypatch):
    monkeypatch.setattr("moebius.core.registry._absent", lambda package: True)
    with pytest.raises(BackendUnavailable, match=r"route backend 'te'.*\nfound: not installed: transformer_engine"):
        Gate(config_of({"dtype": "float32"}), rngs=nnx.Rngs(0), route_backend="te")


def test_routers_default_is_moebius_own():
    logits, config = jnp.float32(np.eye(E)), config_of({})
    jax.tree.map(np.testing.assert_array_equal, route(logits, config), route(logits, config, backend="xla"))
    assert ROUTERS["te"].only_when_named
