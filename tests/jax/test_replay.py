"""Recording and replaying under JAX's transformations. What they mean: tests/cross/test_replay.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moebius.core import MoEConfig
from moebius.jax_frontend import Gate
from moebius.jax_frontend.replay import ReplayIds, collect, handles, record, replay

CONFIG = MoEConfig(
    n_routed_experts=6, n_activated_experts=2, dim=8, moe_inter_dim=4, dtype="float32", enable_routing_replay=True
)
MASK = jnp.ones(10, bool)
X = jnp.asarray(np.random.default_rng(0).normal(size=(10, 8)), jnp.float32)
FORCED = jnp.tile(jnp.array([[5, 1]], jnp.int32), (10, 1))


class Two(nnx.Module):
    """Two gates, one after the other; what they weigh, summed."""

    def __init__(self, build):
        self.first, self.second = build(Gate, CONFIG), build(Gate, CONFIG, scale=0.7)
        self.second.weight[...] = -self.second.weight[...]

    def __call__(self, x):
        return self.first(x, MASK)[0].sum() + (self.second(x, MASK)[0] ** 2).sum()


@pytest.fixture
def model(build):
    return Two(build)


call = nnx.jit(lambda module, x: module(x))


def test_record_and_replay_around_nnx_jit_carry_the_experts_out_and_in(model):
    wanted = [gate(X, MASK)[1] for gate in (model.first, model.second)]
    with record(model):
        y = call(model, X)
    for ids, due in zip(collect(model), wanted, strict=True):
        np.testing.assert_array_equal(ids, due)
    assert not np.array_equal(*wanted)
    with replay(model, collect(model)):
        np.testing.assert_array_equal(call(model, X), y)
    with replay(model, [FORCED, FORCED]):
        assert call(model, X) != y
    np.testing.assert_array_equal(call(model, X), y)


def test_replay_of_other_experts_compiles_once_for_each_mode(model):
    seen = []

    @nnx.jit
    def run(module, x):
        seen.append(None)
        return module(x)

    run(model, X)
    for shift in range(3):
        with replay(model, [(FORCED + shift) % 6] * 2):
            run(model, X)
    run(model, X)
    assert len(seen) == 2


def test_record_in_jax_jit_of_the_merged_module_is_returned(model):
    graph, state = nnx.split(model)

    @jax.jit
    def run(state, x):
        module = nnx.merge(graph, state)
        with record(module):
            y = module(x)
        return y, collect(module)

    @jax.jit
    def again(state, x, ids):
        module = nnx.merge(graph, state)
        with replay(module, ids):
            return module(x)

    y, ids = run(state, X)
    np.testing.assert_allclose(again(state, X, ids), y, rtol=1e-6)
    assert again(state, X, [FORCED, FORCED]) != y


@pytest.mark.parametrize("remat", [False, True])
def test_replay_under_grad_and_remat_trains_on_the_forced_experts(model, remat):
    forward = lambda module, x: module(x)  # noqa: E731
    run = nnx.jit(nnx.grad(nnx.remat(forward) if remat else forward))
    with replay(model, [FORCED, FORCED]):
        gradient = run(model, X).second.weight[...]
    assert gradient[jnp.array([1, 5])].any() and not gradient[jnp.array([0, 2, 3, 4])].any()


def test_record_under_remat_keeps_the_experts(model):
    wanted = [gate(X, MASK)[1] for gate in (model.first, model.second)]
    with record(model):
        nnx.jit(nnx.grad(nnx.remat(lambda module, x: module(x))))(model, X)
    for ids, due in zip(collect(model), wanted, strict=True):
        np.testing.assert_array_equal(ids, due)


def test_record_and_replay_of_layers_stacked_under_scan(build):
    gates = [build(Gate, CONFIG, scale=scale) for scale in (0.4, 0.7)]
    graph, states = nnx.split(gates[0])[0], [nnx.state(gate) for gate in gates]
    stacked = nnx.merge(graph, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))

    @nnx.jit
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def chain(x, gate):
        return x * gate(x, MASK)[0].sum()

    with record(stacked):
        y = chain(X, stacked)
    (ids,) = collect(stacked)
    assert ids.shape == (2, 10, 2)
    np.testing.assert_array_equal(ids[0], gates[0](X, MASK)[1])
    with replay(stacked, [ids]):
        np.testing.assert_array_equal(chain(X, stacked), y)


def test_what_is_recorded_is_neither_a_parameter_nor_part_of_a_gradient(model):
    with record(model):
        call(model, X)
    assert {path[-1] for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))} == {"weight"}
    assert len(nnx.to_flat_state(nnx.state(model, ReplayIds))) == 4
    assert [handle.n_experts for handle in handles(model)] == [6, 6]
