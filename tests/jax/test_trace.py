"""What is JAX's own about a trace: compilations, state, memory."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from moebius.core import BackendConfig, MoEConfig
from moebius.core.stages import untapped
from moebius.jax_frontend import MoE, trace
from moebius.jax_frontend.trace import tapped

SIZES = {"n_routed_experts": 4, "n_activated_experts": 2, "dim": 8, "moe_inter_dim": 6, "dtype": "float32"}
FULL = MoEConfig(
    **SIZES,
    score_func="sigmoid",
    gate_bias_update_factor=0.1,
    aux_loss_coeff=0.1,
    expert_bias=True,
    n_shared_experts=1,
    moe_latent_size=5,
)
X, DY = np.random.default_rng(0).normal(size=(2, 9, 8)).astype(np.float32)


@jax.jit
def run(layer, x, dy):
    y, pullback = jax.vjp(lambda layer, x: layer(x), layer, x)
    return y, *pullback(dy)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trace_has_the_bits_of_a_pass_and_of_its_gradients(build, cast, dtype) -> None:
    """Of gradients with every step on its own, as they are traced; by default some are summed in another order."""
    layer, (x, dy) = build(MoE, FULL, BackendConfig(double_backward=True)), cast(dtype, X, DY)
    assert np.array_equal(trace(layer, x)["output"], trace(build(MoE, FULL), x)["output"])
    y, dlayer, dx = run(layer, x, dy)
    forward, found = trace(layer, x), trace(layer, x, dy)
    leaves = nnx.to_flat_state(nnx.state(dlayer, nnx.Param))
    wanted = {"output": y, "grad.x": dx} | {"grad." + ".".join(path): leaf[...] for path, leaf in leaves}
    assert wanted.keys() <= found.keys() and len(leaves) > 10
    for name, value in [*wanted.items(), *forward.items()]:
        np.testing.assert_array_equal(np.asarray(found[name]).view("u1"), np.asarray(value).view("u1"), name)


def test_trace_leaves_the_layer_as_it_was(build) -> None:
    layer = build(MoE, FULL)
    nnx.jit(lambda module: module(X))(layer)
    before = jax.tree.map(np.asarray, nnx.state(layer))
    trace(layer, X, DY)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(layer), before)
    assert layer.gate.cumulative_load[...].sum() == 18
    assert layer.tap is layer.gate.tap is layer.experts.tap is untapped


def test_trace_of_two_layers_of_one_config_compiles_once(build, monkeypatch) -> None:
    first, other, calls = build(MoE, FULL), build(MoE, FULL, scale=0.1), []
    trace(first, X, DY)
    own = MoE.__call__
    monkeypatch.setattr(MoE, "__call__", lambda self, x: calls.append(None) or own(self, x))
    assert not np.array_equal(trace(other, X, DY)["up"], trace(first, X, DY)["up"])
    assert not calls
    trace(first, X[:3], DY[:3])
    assert calls


def test_trace_keeps_a_negative_zero(build) -> None:
    layer = build(MoE, MoEConfig(**SIZES))
    found = trace(layer, np.full_like(X, -0.0), DY)
    assert np.signbit(found["rows"]).all()


def test_trace_holds_no_second_copy_of_a_gradient(build) -> None:
    """XLA's own count: all that is no argument is little more than one gradient of each parameter."""
    layer = build(MoE, MoEConfig(**{**SIZES, "dim": 64, "moe_inter_dim": 64, "n_routed_experts": 16}))
    x = np.ones((2, 64), np.float32)
    memory = jax.jit(trace).lower(layer, x, x).compile().memory_analysis()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(layer, nnx.Param)))
    assert size < memory.temp_size_in_bytes + memory.output_size_in_bytes < 1.25 * size


def test_tapped_goes_on_with_what_the_tap_returns_and_is_undone_by_an_error(build) -> None:
    layer = build(MoE, FULL)
    layer.eval()

    def silence(name, value):
        return value * 0 if name in ("combine", "shared") else value

    with pytest.raises(ZeroDivisionError), tapped(layer, silence):
        silent = layer(X)
        raise ZeroDivisionError
    np.testing.assert_array_equal(silent, layer.fc2_latent_proj(np.zeros((9, 5), np.float32)))
    assert layer.tap is layer.gate.tap is layer.experts.tap is untapped


def test_tap_is_static_and_no_part_of_the_state(build) -> None:
    layer = build(MoE, FULL)
    graph, state = nnx.split(layer)
    assert not any("tap" in path for path, _ in nnx.to_flat_state(state))
    assert nnx.merge(graph, state).experts.tap is untapped
