"""Reading, writing and drawing parameters and state by name. Wrong names and shapes: tests/cross."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moebius.core import MoEConfig, layout
from moebius.jax_frontend import MoE, load_parameters, load_state, parameters, state
from moebius.jax_frontend.weights import draw

FULL = MoEConfig(
    n_routed_experts=4,
    n_activated_experts=2,
    dim=8,
    moe_inter_dim=6,
    dtype="bfloat16",
    gate_dtype="float32",
    score_func="sigmoid",
    gate_bias_update_factor=0.1,
    router_bias=True,
    expert_bias=True,
    n_shared_experts=1,
    shared_expert_gate=True,
    moe_latent_size=5,
)


def test_parameters_have_the_names_shapes_and_dtypes_of_the_layout(build):
    found = parameters(build(MoE, FULL))
    wanted = {row.name: (row.shape, row.dtype) for row in layout.moe(FULL)}
    assert {name: (value.shape, str(value.dtype)) for name, value in found.items()} == wanted


def test_load_parameters_casts_to_the_modules_dtypes_and_changes_the_output(build, draws):
    layer, draw = build(MoE, FULL), draws(0)
    values = {name: draw(value.shape) for name, value in parameters(layer).items()}
    load_parameters(layer, values)
    for name, value in parameters(layer).items():
        np.testing.assert_array_equal(value, jnp.asarray(values[name], value.dtype), err_msg=name)
        assert value.dtype == (jnp.float32 if name.startswith("gate.") else jnp.bfloat16)


def test_load_state_changes_the_correction_bias_alone_and_keeps_it_in_float32(build):
    layer = build(MoE, FULL)
    before, (row,) = parameters(layer), layout.state(FULL)
    load_state(layer, {row.name: np.arange(4.0)})
    assert {name: (v.shape, str(v.dtype)) for name, v in state(layer).items()} == {row.name: (row.shape, row.dtype)}
    np.testing.assert_array_equal(layer.gate.e_score_correction_bias[...], np.arange(4.0))
    for name, value in parameters(layer).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)


def test_load_parameters_keeps_a_parameter_on_the_devices_it_was_placed_on(build):
    layer = build(MoE, FULL)
    weight = layer.experts.down_projs
    mesh = jax.make_mesh((1,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("expert"))
    weight.set_value(jax.device_put(weight[...], sharding))
    load_parameters(layer, {name: np.ones(value.shape) for name, value in parameters(layer).items()})
    assert weight[...].sharding == sharding and (weight[...] == 1).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_draw_has_the_spread_and_the_tails_of_a_normal_in_every_dtype(dtype):
    row = layout.Parameter(name="weight", axes=("out", "in"), shape=(200, 500), dtype=dtype)
    value = np.asarray(draw(row, nnx.Rngs(0), 0.5), np.float64)
    np.testing.assert_allclose(value.std(), 0.5, rtol=0.02)
    assert 4 * 0.5 < np.abs(value).max() < 6 * 0.5


def test_draw_of_a_bias_is_zero_and_takes_no_random_number():
    row = layout.Parameter(name="bias", axes=("E",), shape=(3,), dtype="float32", zeros=True)
    rngs = nnx.Rngs(0)
    assert not draw(row, rngs).any()
    assert rngs.params.count[...] == 0
