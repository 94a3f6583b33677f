"""The layer as an NNX module: transformations, state, padding. Values and gradients of every layer: tests/cross."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moebius.core import BackendConfig, MoEConfig
from moebius.jax_frontend import MoE, SharedExperts, parameters

SIZES = {"n_routed_experts": 4, "n_activated_experts": 2, "dim": 8, "moe_inter_dim": 6, "dtype": "float32"}
PLAIN = MoEConfig(**SIZES, norm_topk_prob=True)
FULL = MoEConfig(
    **SIZES,
    score_func="sigmoid",
    gate_bias_update_factor=0.1,
    aux_loss_coeff=0.1,
    router_bias=True,
    expert_bias=True,
    n_shared_experts=1,
    shared_expert_gate=True,
    moe_latent_size=5,
)
X = np.random.default_rng(0).normal(size=(3, 5, 8)).astype(np.float32)
PADDING = np.random.default_rng(1).random((3, 5)) < 0.3


@pytest.fixture(scope="module")
def layer(build):
    """layer(config): the same layer for the same config; not for tests that change it."""
    return cache(lambda config=PLAIN: build(MoE, config))


# A layer is an argument: layers of one config share one compilation.
call = jax.jit(lambda module, *args: module(*args))


def test_moe_as_an_argument_of_jit_closed_over_and_of_nnx_jit_are_one(layer):
    wanted = call(layer(), X)
    for run in (lambda m, x: jax.jit(lambda x: m(x))(x), nnx.jit(lambda m, x: m(x))):
        np.testing.assert_allclose(run(layer(), X), wanted, rtol=1e-5, atol=1e-6)


def test_moe_that_records_runs_as_an_argument_of_jit_and_keeps_its_own_state(build):
    module = build(MoE, FULL)
    call(module, X)
    assert not module.gate.cumulative_load[...].any()
    nnx.jit(lambda m, x: m(x))(module, X)
    assert module.gate.cumulative_load[...].sum() == 30


def test_moe_in_eval_can_be_closed_over_by_jit(build):
    module = build(MoE, FULL)
    module.eval()
    np.testing.assert_allclose(jax.jit(lambda x: module(x))(X), call(module, X), rtol=1e-5, atol=1e-6)


def test_moe_split_and_merged_is_the_same_layer(layer):
    graph, state = nnx.split(layer(FULL))
    merged = nnx.merge(graph, state)
    assert merged.config == FULL
    for name, value in parameters(merged).items():
        np.testing.assert_array_equal(value, parameters(layer(FULL))[name])


def test_two_layers_of_one_config_share_a_compilation(layer, build, traces):
    run, seen = traces(lambda m, x: m(x))
    run(layer(), X), run(build(MoE, PLAIN), X)
    assert len(seen) == 1


def test_moe_gradients_reach_every_parameter_and_nothing_else(build):
    module = build(MoE, FULL)
    module.eval()
    grads = nnx.jit(nnx.grad(lambda m, x: (m(x, PADDING) ** 2).sum()))(module, X)
    found = {".".join(path): leaf[...] for path, leaf in nnx.to_flat_state(grads)}
    assert found.keys() == parameters(module).keys()
    assert all(np.isfinite(grad).all() and np.abs(grad).max() > 0 for grad in found.values())


def test_moe_trains_under_nnx_jit_with_its_loss_its_load_and_its_bias(build):
    module = build(MoE, FULL)
    target = jnp.sin(X)

    @nnx.jit
    def step(module):
        loss, grads = nnx.value_and_grad(lambda m: ((m(X) - target) ** 2).mean())(module)
        moved = jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(module, nnx.Param), grads)
        nnx.update(module, moved)
        module.gate.update_bias()
        return loss

    losses = [float(step(module)) for _ in range(10)]
    assert losses[-1] < 0.9 * losses[0]
    assert module.gate.e_score_correction_bias[...].any() and module.gate.last_load[...].sum() == 30
    assert module.gate.last_aux_loss[...] > 0


@pytest.mark.parametrize("latent", [None, 5])
def test_moe_with_poison_in_padding_is_unchanged_elsewhere_bit_for_bit(build, latent):
    config = MoEConfig(**SIZES, router_bias=True, expert_bias=True, moe_latent_size=latent, aux_loss_coeff=0.1)
    graph, trained, rest = nnx.split(build(MoE, config), nnx.Param, ...)

    @jax.jit
    def run(trained, x, dy):
        call = lambda trained, x: nnx.merge(graph, trained, rest, copy=True)(x, PADDING)  # noqa: E731
        y, pull = jax.vjp(call, trained, x)
        return jnp.where(PADDING[..., None], 0, y), pull(dy)

    dy = np.cos(X)
    for poison in (np.nan, np.inf):
        poisoned = np.where(PADDING[..., None], np.float32(poison), X)
        jax.tree.map(np.testing.assert_array_equal, run(trained, poisoned, dy), run(trained, X, dy))


def test_moe_stacked_and_run_by_scan_is_the_chain_of_layers(build):
    layers = [build(MoE, PLAIN, scale=scale) for scale in (0.3, 0.4)]
    graph, states = nnx.split(layers[0])[0], [nnx.state(module) for module in layers]
    stacked = nnx.merge(graph, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def chain(x, module):
        return x + module(x)

    wanted = jnp.asarray(X)
    for module in layers:
        wanted = wanted + call(module, wanted)
    np.testing.assert_allclose(nnx.jit(chain)(jnp.asarray(X), stacked), wanted, rtol=1e-5, atol=1e-6)


def test_moe_in_float64_holds_and_computes_float64(build):
    with jax.enable_x64(True):
        module = build(MoE, MoEConfig(**{**SIZES, "dtype": "float64"}))
        y = call(module, jnp.asarray(X, jnp.float64))
    assert y.dtype == module.experts.down_projs.dtype == np.float64


@pytest.mark.parametrize("dtype, out", [(None, "bfloat16"), ("float32", "float32")])
def test_moe_computes_in_x_dtype_unless_dtype_is_given(build, dtype, out):
    module = build(MoE, PLAIN, dtype=dtype)
    assert jax.eval_shape(call, module, jnp.asarray(X, jnp.bfloat16)).dtype == out


def test_moe_and_shared_experts_take_numpys_float64_without_a_warning_where_jax_has_none(layer, build):
    wide = X.astype(np.float64)
    y = layer(FULL)(wide)
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y, layer(FULL)(X))
    shared = build(SharedExperts, FULL)
    np.testing.assert_array_equal(shared(wide[0]), shared(X[0]))


def test_sharding_metadata_of_a_layer_without_a_mesh_is_its_routed_experts_alone(build):
    module = build(MoE, FULL, kernel_metadata={"out_sharding": ("expert", None, None)})
    specs = nnx.to_flat_state(nnx.get_partition_spec(nnx.state(module, nnx.Param)))
    named = {path[-1] for path, leaf in specs if leaf.get_value() == jax.sharding.PartitionSpec("expert", None, None)}
    assert named == {"gate_and_up_projs", "down_projs"}
    assert call(module, X).shape == X.shape


def test_sharding_metadata_of_shared_experts_without_a_mesh_is_kept(build):
    module = build(SharedExperts, FULL, kernel_metadata={"out_sharding": ("hidden", None)})
    specs = nnx.get_partition_spec(nnx.state(module, nnx.Param))
    assert specs["up_proj"]["weight"].get_value() == jax.sharding.PartitionSpec("hidden", None)
    np.testing.assert_array_equal(call(module, X[0]), call(build(SharedExperts, FULL), X[0]))


def test_jax_grad_of_a_layer_takes_allow_int_and_is_nnx_grads(layer):
    module = layer(FULL)
    loss = lambda m: (m(X) ** 2).sum()  # noqa: E731
    with pytest.raises(TypeError, match="int"):
        jax.grad(loss)(module)
    found = jax.jit(jax.grad(loss, allow_int=True))(module)
    wanted = nnx.jit(nnx.grad(loss))(nnx.clone(module))
    wanted = {".".join(path): leaf[...] for path, leaf in nnx.to_flat_state(wanted)}
    for name, value in parameters(found).items():
        np.testing.assert_allclose(value, wanted[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_moe_draws_every_matrix_from_kernel_init_and_the_params_stream():
    ones = parameters(MoE(FULL, kernel_init=nnx.initializers.ones, rngs=nnx.Rngs(0)))
    assert all(np.all(np.asarray(value) == 1) for name, value in ones.items() if "bias" not in name)
    init = lambda key, shape, dtype: jnp.full(shape, jax.random.bits(key) % 997, dtype)  # noqa: E731
    made = [MoE(PLAIN, kernel_init=init, rngs=nnx.Rngs(params=seed)) for seed in (0, 0, 1)]
    a, b, c = (module.experts.down_projs[...] for module in made)
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)


def test_moe_init_weights_draws_all_anew(build):
    module = build(MoE, MoEConfig(**SIZES, expert_bias=True, router_bias=True))
    module.init_weights(0.1, rngs=nnx.Rngs(3))
    for name, value in parameters(module).items():
        if "bias" in name:
            assert not value.any(), name
        else:
            assert 0 < np.abs(value).max() < 0.6, name


def test_moe_with_a_fake_gate_has_no_router(build):
    module = build(MoE, PLAIN, BackendConfig(fake_balanced_gate=True))
    assert not any(name.startswith("gate.") for name in parameters(module))
    assert np.isfinite(call(module, X)).all()
