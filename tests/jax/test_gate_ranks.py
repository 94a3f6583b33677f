"""The gate over two devices: losses and the correction bias over a mesh axis, inside of shard_map and of vmap."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from moebius.core import MoEConfig, reference
from moebius.jax_frontend import Gate, set_aux_loss_scale

SIZES = {"n_routed_experts": 8, "n_activated_experts": 2, "dim": 16, "moe_inter_dim": 4, "dtype": "float32"}
BALANCED = MoEConfig(**SIZES, score_func="sigmoid", gate_bias_update_factor=0.125)
LOSS_COEFFICIENTS = {"aux_loss_coeff": 0.5, "z_loss_coeff": 0.25, "seq_aux_loss_coeff": 0.75}
WITH_LOSSES = MoEConfig(**SIZES, **LOSS_COEFFICIENTS, softmax_before_topk=True)
LOSSES = ("last_aux_loss", "last_z_loss", "last_seq_aux_loss")
# Two sequences of eight; each device has half of each.
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 16)), jnp.float32)
MASK = jnp.arange(16).reshape(2, 8) % 5 != 3
HALVES = tuple(jnp.stack(jnp.split(value, 2, axis=1)) for value in (X, MASK))


@pytest.fixture
def gate(build):
    """gate(config, cp_axis): (parameters, a function of them and of tokens -> weights without a value, statistics)."""

    def make(config, cp_axis=None):
        graph, parameters, rest = nnx.split(build(Gate, config), nnx.Param, ...)

        def run(parameters, x, mask):
            module = nnx.merge(graph, parameters, rest, copy=True)
            weights, *_ = module(x.reshape(-1, 16), mask.reshape(-1), cp_axis, n_sequences=2)
            return (weights * 0).sum(), [getattr(module, name)[...] for name in LOSSES]

        return parameters, jax.jit(jax.grad(run, has_aux=True)) if cp_axis is None else jax.grad(run, has_aux=True)

    return make


def test_losses_over_an_axis_are_those_of_all_tokens_and_the_gradients_add_up_to_theirs(gate):
    parameters, alone = gate(WITH_LOSSES)
    wanted, statistics = alone(parameters, X, MASK)
    parameters, run = gate(WITH_LOSSES, "cp")
    found, seen = jax.jit(jax.vmap(run, in_axes=(None, 0, 0), axis_name="cp"))(parameters, *HALVES)
    for value, due in zip(seen, statistics, strict=True):
        np.testing.assert_allclose(value, [due, due], rtol=1e-5)
    total, due = found.weight[...].sum(0), wanted.weight[...]
    np.testing.assert_allclose(total, due, rtol=1e-4, atol=1e-6)
    assert np.abs(found.weight[...][0] - found.weight[...][1]).max() > 0.01 < np.abs(due).max()


def test_losses_without_an_axis_are_each_devices_own(gate):
    parameters, run = gate(WITH_LOSSES)
    _, apart = run(parameters, *(value[0] for value in HALVES))
    _, whole = run(parameters, X, MASK)
    assert all(abs(a - b) > 1e-4 for a, b in zip(apart, whole, strict=True))


@pytest.mark.parametrize("axis_name", [None, "data"])
def test_update_bias_over_an_axis_takes_the_step_of_the_load_together(build, axis_name):
    graph, state = nnx.split(build(Gate, BALANCED))

    def run(x, mask):
        module = nnx.merge(graph, state, copy=True)
        module(x.reshape(-1, 16), mask.reshape(-1))
        load = module.cumulative_load[...]
        module.update_bias(axis_name)
        return module.e_score_correction_bias[...], load, module.cumulative_load[...]

    bias, load, cleared = jax.jit(jax.vmap(run, axis_name="data"))(*HALVES)
    due = load if axis_name is None else np.broadcast_to(load.sum(0), load.shape)
    wanted = [reference.updated_correction_bias(np.zeros(8), np.asarray(own), 0.125) for own in due]
    np.testing.assert_array_equal(bias, wanted)
    assert not cleared.any() and not np.array_equal(load[0], load[1])


IN_SHARD_MAP = """
import jax, jax.numpy as jnp, numpy as np
from functools import partial
from flax import nnx
from jax.sharding import AxisType, PartitionSpec as P
from moebius.core import MoEConfig
from moebius.jax_frontend import MoE
mesh = jax.make_mesh((2,), ("cp",), axis_types=(AxisType.Auto,))
rng = np.random.default_rng(0)
config = MoEConfig(n_routed_experts=4, n_activated_experts=2, dim=8, moe_inter_dim=6, dtype="float32",
                   score_func="sigmoid", gate_bias_update_factor=0.125,
                   aux_loss_coeff=0.5, z_loss_coeff=0.25, seq_aux_loss_coeff=0.75)
module = MoE(config, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0))
graph, weights, rest = nnx.split(module, nnx.Param, ...)
weights = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.4, jnp.float32), weights)
x = jnp.asarray(rng.normal(size=(2, 6, 8)), jnp.float32)
padding = jnp.arange(12).reshape(2, 6) % 5 == 3

def step(weights, x, padding, axis):
    layer = nnx.merge(graph, weights, rest, copy=True)
    y, gate = layer(x, padding, axis), layer.gate
    gate.update_bias(axis)
    losses = [gate.last_aux_loss[...], gate.last_z_loss[...], gate.last_seq_aux_loss[...]]
    return y, (losses, gate.e_score_correction_bias[...])

def total(run, weights, x):
    y, seen = run(weights, x, padding)
    return (y ** 2).sum(), seen

whole = partial(step, axis=None)
wanted, due = jax.jit(jax.grad(partial(total, whole), (0, 1), has_aux=True))(weights, x)
for check_vma in (True, False):
    parts = jax.shard_map(partial(step, axis="cp"), mesh=mesh, in_specs=(P(), P(None, "cp"), P(None, "cp")),
                          out_specs=(P(None, "cp"), P()), check_vma=check_vma)
    found, seen = jax.jit(jax.grad(partial(total, parts), (0, 1), has_aux=True))(weights, x)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), (found, seen), (wanted, due))
"""


def test_moe_in_shard_map_over_its_sequences_is_the_whole_with_and_without_check_vma(run_alone):
    run_alone(IN_SHARD_MAP, XLA_FLAGS="--xla_force_host_platform_device_count=2")


def test_gate_makes_no_empty_arrays_inside_shard_map(build, equations):
    """One that is moved out of the region, as the indices of `variable[...] = value`, crashes XLA of jaxlib 0.11.2."""
    settings = {"score_func": "sigmoid", "gate_bias_update_factor": 0.125, **LOSS_COEFFICIENTS}
    graph, state = nnx.split(build(Gate, MoEConfig(**SIZES, **settings)))

    def run(x, mask, scale):
        module = nnx.merge(graph, state, copy=True)
        set_aux_loss_scale(module, scale)
        module(x.reshape(-1, 16), mask.reshape(-1), "cp", n_sequences=2)
        module.update_bias("cp")
        return nnx.state(module)

    mesh = jax.make_mesh((1,), ("cp",), axis_types=(jax.sharding.AxisType.Auto,))
    run = jax.shard_map(run, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    found = [var.aval.shape for e in equations(run, X, MASK, 2.0) for var in (*e.invars, *e.outvars)]
    assert len(found) > 100 and not [shape for shape in found if 0 in shape]


def test_moe_takes_the_axis_of_its_attribute_where_a_call_names_none(gate, build):
    from moebius.jax_frontend import MoE

    graph, state = nnx.split(build(MoE, WITH_LOSSES))

    def run(by_attribute, x, mask):
        module = nnx.merge(graph, state, copy=True)
        module.cp_axis = "cp" if by_attribute else None
        module(x, ~mask, None if by_attribute else "cp")
        return module.gate.last_z_loss[...]

    found = [jax.jit(jax.vmap(partial(run, by), axis_name="cp"))(*HALVES) for by in (True, False)]
    np.testing.assert_array_equal(*found)
    assert found[0][0] == found[0][1]
