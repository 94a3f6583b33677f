"""Reading, writing and drawing parameters and state by name. Wrong names and shapes: tests/cross."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moebius.core import ConfigError, DTypeError, MoEConfig, ShapeError, layout
from moebius.jax_frontend import MoE, load_parameters, load_state, parameters, state
from moebius.jax_frontend.weights import draw, new_parameter

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


@pytest.mark.parametrize(
    "load, held, bad, error",
    [
        (load_parameters, parameters, lambda value: value.tolist(), DTypeError),
        (load_parameters, parameters, lambda value: np.full(value.shape, "x"), (TypeError, ValueError)),
        (load_state, state, lambda value: value.tolist(), DTypeError),
    ],
    ids=["parameters", "parameters that do not convert", "state"],
)
def test_loading_a_last_value_that_is_no_array_of_numbers_writes_nothing(build, load, held, bad, error):
    layer = build(MoE, FULL)
    before = held(layer)
    values = {name: np.ones(value.shape, np.float32) for name, value in before.items()}
    last = list(values)[-1]
    with pytest.raises(error):
        load(layer, {**values, last: bad(values[last])})
    assert all(value is before[name] for name, value in held(layer).items())


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


MATRIX = layout.Parameter(name="weight", axes=("out", "in"), shape=(2, 3), dtype="float32")


@pytest.mark.parametrize(
    "rngs, found", [(0, "type int"), (None, "type NoneType"), (nnx.Rngs(dropout=0), "no such stream")]
)
def test_draw_without_a_stream_of_random_numbers_says_what_to_pass(rngs, found):
    with pytest.raises(
        ConfigError, match=rf"rngs as flax\.nnx\.Rngs.*\nfound: {found}\ndo: pass flax\.nnx\.Rngs\(seed\)"
    ):
        draw(MATRIX, rngs)


def test_draw_takes_the_default_stream_where_there_is_no_other():
    np.testing.assert_array_equal(draw(MATRIX, nnx.Rngs(0)), draw(MATRIX, nnx.Rngs(params=0)))


def test_draw_of_another_shape_than_asked_for_is_refused():
    with pytest.raises(ShapeError, match=r"weight of shape \[2, 3\] from kernel_init\nfound: shape \[3, 2\]"):
        draw(MATRIX, nnx.Rngs(0), kernel_init=lambda key, shape, dtype: jnp.ones(shape[::-1], dtype))


def mesh():
    return jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))


def test_a_sharding_without_a_mesh_is_metadata_alone():
    """Also under a mesh that comes later: what is written then lies where it lay."""
    made = new_parameter(MATRIX, nnx.Rngs(0), kernel_metadata={"out_sharding": ("data", None), "role": "expert"})
    assert made.get_metadata("role") == "expert" and not made[...].committed
    assert nnx.get_partition_spec(made).get_value() == PartitionSpec("data", None)
    with jax.set_mesh(mesh()):
        made.set_value(made[...] + 1)
        copied = nnx.merge(*nnx.split(nnx.Dict(made=made))).made
    assert nnx.get_partition_spec(copied).get_value() == PartitionSpec("data", None)


@pytest.mark.parametrize(
    "metadata",
    [
        {"out_sharding": ("data", None), "mesh": mesh()},
        {"out_sharding": NamedSharding(mesh(), PartitionSpec("data", None))},
    ],
    ids=["mesh", "NamedSharding"],
)
def test_a_sharding_with_a_mesh_of_its_own_places_the_parameter(metadata):
    made = new_parameter(MATRIX, nnx.Rngs(0), kernel_metadata=metadata)
    assert made[...].sharding == NamedSharding(mesh(), PartitionSpec("data", None))


def test_a_sharding_inside_of_a_mesh_places_the_parameter():
    with jax.set_mesh(mesh()):
        made = new_parameter(MATRIX, nnx.Rngs(0), kernel_metadata={"out_sharding": PartitionSpec("data", None)})
    assert made[...].sharding == NamedSharding(mesh(), PartitionSpec("data", None))


def test_a_bias_has_no_metadata():
    row = layout.Parameter(name="bias", axes=("E",), shape=(3,), dtype="float32", zeros=True)
    made = new_parameter(row, nnx.Rngs(0), kernel_metadata={"out_sharding": ("data", None), "role": "expert"})
    assert not made.has_metadata("out_sharding") and not made.has_metadata("role")


def test_parameters_over_a_mesh_stay_there_when_drawn_anew_and_when_linen_loads_them(run_alone):
    code = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from moebius.core import MoEConfig
from moebius.jax_frontend import MoE, linen
c = MoEConfig(n_routed_experts=4, n_activated_experts=2, dim=8, moe_inter_dim=4, dtype="float32")
mesh = jax.make_mesh((2,), ("ep",))  # whose axes are Explicit
moe = MoE(c, mesh=mesh, rngs=nnx.Rngs(0))
before = moe.experts.down_projs.get_value()
moe.init_weights(rngs=nnx.Rngs(1))
after = moe.experts.down_projs.get_value()
assert after.sharding == before.sharding and (np.asarray(after) != np.asarray(before)).any()
variables = linen.MoE(c, mesh=mesh).init(jax.random.key(0), jnp.zeros((2, 8)))
own = linen.parameters(variables)
loaded = linen.parameters(linen.load_parameters(variables, {k: np.asarray(v) for k, v in own.items()}))
assert loaded["experts.down_projs"].sharding == own["experts.down_projs"].sharding
assert len(loaded["experts.down_projs"].sharding.device_set) == 2
"""
    run_alone(code, XLA_FLAGS="--xla_force_host_platform_device_count=2")
