"""Steps 3 to 9 in JAX: transformations, precision, and the module's parameters. Situations and dtypes: tests/cross."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from moebius.core import BackendConfig, MoEConfig, layout
from moebius.core.vectors import compute, load
from moebius.jax_frontend import GroupedExperts, experts

CONFIG = MoEConfig(
    n_routed_experts=4, n_activated_experts=2, dim=16, moe_inter_dim=8, dtype="float32", expert_bias=True
)
NAMES = ("gate_and_up_projs", "down_projs", "gate_up_proj_bias", "down_proj_bias")


def inputs(n=12, k=2, seed=0, dtype="float32"):
    """(x, token_mask, weights, indices) of random values; about a fifth masked."""
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((n, 4)), -1)[:, :k]
    x, weights = jnp.asarray(rng.normal(size=(n, 16)), dtype), jnp.asarray(rng.random((n, k)), jnp.float32)
    return x, jnp.asarray(rng.random(n) < 0.8), weights, jnp.asarray(ids, jnp.int32)


@pytest.fixture(scope="module")
def layer(build):
    """layer(settings): the same module for the same settings."""
    return cache(lambda **settings: build(GroupedExperts, CONFIG, **settings))


def parameters_of(module):
    return {name: getattr(module, name)[...] for name in NAMES}


GOLDEN = [case for case in load() if case.kind == "experts"][::3]


@pytest.fixture(scope="module")
def golden():
    """(y, gradients) of every golden vector by name; one compilation for all."""

    def one(case, parameters, x, weights, dy):
        mask, ids = jnp.asarray(case.inputs["token_mask"]), jnp.asarray(case.inputs["ids"], jnp.int32)
        call = lambda p, x, w: experts(p, x, mask, w, ids, config=case.config)  # noqa: E731
        y, pull = jax.vjp(call, parameters, x, weights)
        grads, dx, dweights = pull(dy)
        return {"y": y, "dx": dx, "dweights": dweights} | {f"d{name}": value for name, value in grads.items()}

    given = {
        case.name: jax.tree.map(jnp.float32, (case.parameters, *(case.inputs[name] for name in ("x", "weights", "dy"))))
        for case in GOLDEN
    }
    return jax.jit(lambda given: {case.name: one(case, *given[case.name]) for case in GOLDEN})(given)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case.name)
def test_experts_agree_with_the_golden_vectors(agree, golden, case):
    found = golden[case.name]
    agree(found, partial(compute, case), "float32")
    for name, value in case.outputs.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-4 * np.abs(value).max())


def test_experts_with_float32_parameters_and_bfloat16_tokens_give_float32_gradients(layer):
    x, mask, weights, ids = inputs(dtype="bfloat16")
    run = jax.grad(lambda p, x, w: experts(p, x, mask, w, ids, config=CONFIG).sum().astype("float32"), (0, 1, 2))
    dparameters, dx, dweights = jax.jit(run)(parameters_of(layer()), x, weights)
    assert {str(grad.dtype) for grad in dparameters.values()} == {"float32"}
    assert dx.dtype == jnp.bfloat16 and dweights.dtype == jnp.float32


# Of weights after the down projection reverse mode alone: forward modes differentiate the same steps in another order.
@pytest.mark.parametrize("after, modes", [(False, ["fwd", "rev"]), (True, ["rev"])], ids=["before_down", "after_down"])
def test_experts_of_double_backward_have_first_and_second_derivatives_in_every_mode(after, modes):
    config = MoEConfig(
        n_routed_experts=3,
        n_activated_experts=2,
        dim=3,
        moe_inter_dim=2,
        dtype="float64",
        expert_bias=True,
        expert_activation="quick_geglu",
        apply_router_weight_after_down=after,
    )
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        parameters = {row.name: jnp.asarray(rng.normal(size=row.shape)) for row in layout.experts(config)}
        x, weights = jnp.asarray(rng.normal(size=(4, 3))), jnp.asarray(rng.random((4, 2)))
        ids, mask = jnp.asarray([[0, 2], [2, 2], [-1, 0], [0, 3]], jnp.int32), jnp.ones(4, bool)

        @jax.jit
        def run(parameters, x, weights):
            return experts(parameters, x, mask, weights, ids, config=config, backend="loop", double_backward=True)

        check_grads(run, (parameters, x, weights), order=2, modes=modes, rtol=1e-5, atol=1e-5)


def test_experts_first_derivatives_in_float64():
    settings = {"dim": 3, "moe_inter_dim": 2, "dtype": "float64", "expert_bias": True}
    config = MoEConfig(n_routed_experts=3, n_activated_experts=2, apply_router_weight_after_down=True, **settings)
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        parameters = {row.name: jnp.asarray(rng.normal(size=row.shape)) for row in layout.experts(config)}
        x, weights = jnp.asarray(rng.normal(size=(4, 3))), jnp.asarray(rng.random((4, 2)))
        ids, mask = jnp.asarray([[0, 2], [2, 2], [-1, 0], [0, 3]], jnp.int32), jnp.ones(4, bool)
        run = jax.jit(lambda parameters, x, weights: experts(parameters, x, mask, weights, ids, config=config))
        check_grads(run, (parameters, x, weights), order=1, modes=["rev"], rtol=1e-6, atol=1e-6)


def test_experts_take_numpy_arrays(layer):
    args = inputs()
    parameters = parameters_of(layer())
    found = experts(jax.tree.map(np.asarray, parameters), *map(np.asarray, args), config=CONFIG)
    wanted = jax.jit(lambda *args: experts(parameters, *args, config=CONFIG))(*args)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_grouped_experts_draw_each_expert_with_the_same_spread_and_zero_biases():
    config = MoEConfig(n_routed_experts=3, n_activated_experts=1, dim=64, moe_inter_dim=96, expert_bias=True)
    module = GroupedExperts(config, rngs=nnx.Rngs(1))
    for name in ("gate_and_up_projs", "down_projs"):
        weight = np.asarray(getattr(module, name)[...], np.float64)
        np.testing.assert_allclose(weight.reshape(3, -1).std(-1), 0.02, rtol=0.05)
        np.testing.assert_allclose(weight.reshape(3, -1).mean(-1), 0, atol=0.002)
    assert not module.gate_up_proj_bias[...].any() and not module.down_proj_bias[...].any()
    assert {str(getattr(module, name).dtype) for name in NAMES} == {"bfloat16"}
    before = module.down_projs[...]
    module.init_weights(0.5, rngs=nnx.Rngs(2))
    assert module.down_projs.dtype == before.dtype
    np.testing.assert_allclose(np.asarray(module.down_projs[...], np.float64).std(), 0.5, rtol=0.05)


def test_grouped_experts_kernel_init_sees_one_fan_in_per_expert_with_a_batch_axis():
    init = nnx.initializers.lecun_uniform(batch_axis=(0,))
    config = MoEConfig(n_routed_experts=4, n_activated_experts=1, dim=64, moe_inter_dim=256, dtype="float32")
    module = GroupedExperts(config, kernel_init=init, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(np.asarray(module.gate_and_up_projs[...]).std(), 64**-0.5, rtol=0.05)
    np.testing.assert_allclose(np.asarray(module.down_projs[...]).std(), 256**-0.5, rtol=0.05)


def test_grouped_experts_compute_in_x_dtype_unless_dtype_is_given(layer):
    x, mask, weights, ids = inputs(dtype="bfloat16")
    run = lambda module: jax.eval_shape(lambda x: module(x, mask, weights, ids), x).dtype  # noqa: E731
    assert run(layer()) == jnp.bfloat16 and run(layer(dtype="float32")) == jnp.float32
    assert layer(param_dtype=jnp.float16).down_projs.dtype == jnp.float16


def test_grouped_experts_without_biases_hold_none():
    config = MoEConfig(n_routed_experts=4, n_activated_experts=2, dim=16, moe_inter_dim=8)
    module = nnx.eval_shape(lambda: GroupedExperts(config, rngs=nnx.Rngs(0)))
    assert module.gate_up_proj_bias is None and module.down_proj_bias is None
    assert len(jax.tree.leaves(nnx.state(module, nnx.Param))) == 2


def test_grouped_experts_annotate_nothing_by_default_and_pass_metadata_on(layer):
    """An annotated parameter cannot be made without a mesh, so a library must not annotate unasked."""
    assert not layer().down_projs.has_metadata("out_sharding")
    mesh = jax.make_mesh((1,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        metadata = {"out_sharding": ("expert", None, None)}
        module = GroupedExperts(CONFIG, kernel_init=nnx.initializers.zeros, kernel_metadata=metadata, rngs=nnx.Rngs(0))
    assert module.down_projs.get_metadata("out_sharding") == ("expert", None, None)
    assert module.down_proj_bias.get_metadata().get("out_sharding") is None


def test_grouped_experts_can_be_built_without_memory():
    module = nnx.eval_shape(lambda: GroupedExperts(CONFIG, rngs=nnx.Rngs(0)))
    assert module.down_projs.shape == (4, 8, 16)


@pytest.mark.parametrize("backend", [None, "loop", "ragged_dot"])
def test_grouped_experts_name_the_backend_they_chose(layer, build, backend):
    module = build(GroupedExperts, CONFIG, BackendConfig(experts=backend))
    assert module.backend_name == (backend or "loop")
    run = jax.jit(lambda module, *args: module(*args))
    np.testing.assert_allclose(run(module, *inputs()), run(layer(), *inputs()), rtol=1e-4, atol=1e-5)
