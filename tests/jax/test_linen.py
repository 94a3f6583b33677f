"""The layers as Linen modules: the same numbers, names and gradients as NNX's, and what Linen's users rely on."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from moebius import jax_frontend
from moebius.core import (
    BackendConfig,
    CheckpointError,
    ConfigError,
    DTypeError,
    MoEConfig,
    ShapeError,
    Unsupported,
    layout,
)
from moebius.core.errors import MoEError
from moebius.jax_frontend import linen, load_state, parameters, state
from moebius.jax_frontend.grouped_experts import weighted_activation

SIZES = {"n_routed_experts": 4, "n_activated_experts": 2, "dim": 8, "moe_inter_dim": 6, "dtype": "float32"}
PLAIN = MoEConfig(**SIZES)
FULL = MoEConfig(
    **SIZES,
    score_func="sigmoid",
    gate_bias_update_factor=0.1,
    aux_loss_coeff=0.1,
    router_bias=True,
    expert_bias=True,
    n_shared_experts=1,
)
LOOP = BackendConfig(experts="loop")
X = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
MASK = np.arange(6) != 1
IDS = np.argsort(np.random.default_rng(1).random((6, 4)), -1)[:, :2].astype(np.int32)
WEIGHTS = np.random.default_rng(2).random((6, 2)).astype(np.float32)
# Name, arguments, inputs.
LAYERS = {
    "MoE": ((FULL, LOOP), (X,)),
    "Gate": ((FULL,), (X, MASK)),
    "GroupedExperts": ((FULL, LOOP), (X, MASK, WEIGHTS, IDS)),
    "GroupedExpertsDeepEP": ((FULL, LOOP), (X, MASK, WEIGHTS, IDS)),
    "GroupedExpertsTE": ((FULL, LOOP), (X, MASK, WEIGHTS, IDS)),
}
layers = pytest.mark.parametrize("name", LAYERS)
equal = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
close = partial(jax.tree.map, equal)
RECORDED = ["correction_bias", "routing_statistics"]


@pytest.fixture(scope="module")
def pair(build):
    """pair(name): (NNX module, Linen module, its variables with the NNX module's values)."""

    def make(name):
        arguments, inputs = LAYERS[name]
        module, layer = build(getattr(jax_frontend, name), *arguments), getattr(linen, name)(*arguments)
        if state(module):
            load_state(module, {key: np.linspace(-0.1, 0.1, 4) for key in state(module)})
        shapes = jax.eval_shape(layer.init, jax.random.key(0), *inputs)
        variables = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        variables = linen.load_state(linen.load_parameters(variables, parameters(module)), state(module))
        if "loss_scale" in variables:
            variables["loss_scale"] = jax.tree.map(jnp.ones_like, variables["loss_scale"])
        return module, layer, variables

    return cache(make)


def first(output):
    return output[0] if isinstance(output, tuple) else output


# ---------------------------------------------------------------------------------------------------------- values
@layers
def test_a_linen_layer_has_the_names_shapes_and_dtypes_of_the_layout(pair, name):
    module, _, variables = pair(name)
    assert isinstance(variables["params"], dict)
    found = {key: (value.shape, value.dtype) for key, value in linen.parameters(variables).items()}
    assert found == {key: (value.shape, value.dtype) for key, value in parameters(module).items()}
    if name == "MoE":
        assert found.keys() == {row.name for row in layout.moe(FULL)}
        assert variables["params"]["experts"]["down_projs"].shape == (4, 6, 8)


@layers
def test_a_linen_layer_has_the_outputs_and_gradients_of_the_nnx_module(pair, name):
    module, layer, variables = pair(name)
    inputs = LAYERS[name][1]
    loss = lambda output: (first(output) ** 2).sum()  # noqa: E731
    rest = {key: value for key, value in variables.items() if key != "params"}
    run = lambda params, *inputs: layer.apply({"params": params, **rest}, *inputs)  # noqa: E731
    both = jax.jit(lambda p, *xs: (run(p, *xs), jax.grad(lambda p, *xs: loss(run(p, *xs)), (0, 1))(p, *xs)))
    found, (dparams, dx) = both(variables["params"], *inputs)
    wanted, (dmodule, dwanted) = jax.jit(
        lambda m, *xs: (m(*xs), jax.grad(lambda m, *xs: loss(m(*xs)), (0, 1), allow_int=True)(m, *xs))
    )(module, *inputs)
    close(found, wanted)
    close((linen.parameters({"params": dparams}), dx), (parameters(dmodule), dwanted))


def test_init_draws_every_matrix_from_its_key():
    gate = linen.Gate(PLAIN)
    drawn = [gate.init(jax.random.key(seed), X, MASK)["params"]["weight"] for seed in (0, 0, 1)]
    assert 0.01 < np.std(drawn[0]) < 0.03
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])


def test_init_takes_kernel_init_and_param_dtype():
    layer = linen.MoE(PLAIN, param_dtype="bfloat16", kernel_init=nn.initializers.ones)
    variables = layer.init(jax.random.key(0), X)
    for value in linen.parameters(variables).values():
        assert value.dtype == jnp.bfloat16 and (value == 1).all()
    assert jax.eval_shape(layer.apply, variables, X).dtype == X.dtype


def test_apply_draws_and_keeps_no_parameters_of_its_own(pair, equations):
    _, layer, variables = pair("MoE")
    names = {str(equation.primitive) for equation in equations(layer.apply, variables, X)}
    assert not names & {"random_bits", "erf_inv", "threefry2x32"}


# ----------------------------------------------------------------------------------------------------- collections
def test_a_layer_records_into_the_collections_that_may_change_and_into_no_other(pair):
    _, layer, variables = pair("MoE")
    assert variables.keys() == {"params", "correction_bias", "routing_statistics", "loss_scale"}
    y, changed = jax.jit(partial(layer.apply, mutable=["routing_statistics"]))(variables, X)
    assert changed.keys() == {"routing_statistics"}
    assert changed["routing_statistics"]["gate"]["last_load"].sum() == 12
    assert changed["routing_statistics"]["gate"]["last_aux_loss"] > 0
    again = jax.jit(layer.apply)(variables, X)
    np.testing.assert_array_equal(again, y)


def test_a_layer_outside_of_training_records_nothing_and_has_no_loss(pair):
    _, layer, variables = pair("MoE")
    run = lambda layer, **settings: layer.apply(variables, X, mutable=RECORDED, **settings)[1]  # noqa: E731
    for changed in (run(layer, deterministic=True), run(linen.MoE(FULL, LOOP, deterministic=True))):
        assert not changed["routing_statistics"]["gate"]["last_load"].any()
    fixed = linen.MoE(FULL, LOOP, deterministic=True)
    assert run(fixed, deterministic=False)["routing_statistics"]["gate"]["last_load"].any()


@pytest.mark.parametrize("name", ["MoE", "Gate"])
def test_routes_to_be_replayed_are_refused(name):
    layer = getattr(linen, name)(MoEConfig(**SIZES, enable_routing_replay=True))
    with pytest.raises(Unsupported, match=r"enable_routing_replay=True.*\n.*\ndo: replay the routes of NNX modules"):
        jax.eval_shape(layer.init, jax.random.key(0), *LAYERS[name][1])


def test_a_gate_hands_on_the_backend_of_the_routing():
    with pytest.raises(MoEError, match="route backend 'te'"):
        linen.Gate(PLAIN, route_backend="te").init(jax.random.key(0), X, MASK)


def test_a_gate_that_tracks_the_load_records_it_without_a_loss():
    gate = linen.Gate(PLAIN, track_load=True, kernel_init=nn.initializers.ones)
    _, changed = gate.apply(gate.init(jax.random.key(0), X, MASK), X, MASK, mutable=["routing_statistics"])
    assert changed["routing_statistics"]["last_load"].sum() == 10


@pytest.mark.parametrize("name", ["MoE", "Gate"])
def test_update_bias_moves_the_correction_bias_as_the_nnx_module_does(build, pair, name):
    _, layer, variables = pair(name)
    inputs = LAYERS[name][1]
    _, changed = layer.apply(variables, *inputs, mutable=RECORDED)
    _, moved = layer.apply({**variables, **changed}, method="update_bias", mutable=RECORDED)
    module = build(getattr(jax_frontend, name), *LAYERS[name][0])
    load_state(module, linen.state(variables))
    module(*inputs)
    getattr(module, "gate", module).update_bias()
    np.testing.assert_array_equal(*(next(iter(s.values())) for s in (linen.state(moved), state(module))))
    assert not np.array_equal(*(next(iter(linen.state(v).values())) for v in (moved, variables)))
    assert not any(leaf.any() for path, leaf in jax.tree.leaves_with_path(moved) if "cumulative" in str(path))


@pytest.mark.parametrize("mutable", [False, ["routing_statistics"]])
def test_update_bias_that_could_change_nothing_is_refused(pair, mutable):
    _, layer, variables = pair("MoE")
    with pytest.raises(ConfigError, match=r"correction_bias.*may not change\ndo: pass mutable="):
        layer.apply(variables, method="update_bias", mutable=mutable)


def test_apply_of_the_parameters_alone_takes_no_correction_and_a_scale_of_one(pair):
    _, layer, variables = pair("MoE")
    zeros = {**variables, "correction_bias": jax.tree.map(jnp.zeros_like, variables["correction_bias"])}
    run = jax.jit(jax.value_and_grad(lambda v: (layer.apply(v, X) ** 2).sum(), allow_int=True))
    found, wanted = run({"params": variables["params"]}), run(zeros)
    equal(found[0], wanted[0])
    close(found[1]["params"], wanted[1]["params"])


def test_apply_without_a_parameter_names_it(pair):
    _, layer, variables = pair("MoE")
    params = {key: value for key, value in variables["params"].items() if key != "gate"}
    with pytest.raises(CheckpointError, match=r"missing: gate\.bias, gate\.weight"):
        layer.apply({**variables, "params": params}, X)


def test_apply_with_a_parameter_that_the_layer_lacks_names_it(pair):
    _, _, variables = pair("MoE")
    layer = linen.MoE(replace(FULL, router_bias=False, n_shared_experts=0), LOOP)
    named = r"missing: none; unexpected: gate\.bias, shared_experts\.down_proj\.bias, .*\ndo: .*`init`"
    with pytest.raises(CheckpointError, match=named):
        layer.apply(variables, X)


# --------------------------------------------------------------------------------------------------- in larger models
class Model(nn.Module):
    """Two layers in a Linen model, and a Dense between them."""

    @nn.compact
    def __call__(self, x):
        x = x + linen.MoE(PLAIN, kernel_init=nn.initializers.ones)(x)
        return linen.MoE(PLAIN, kernel_init=nn.initializers.zeros, name="last")(nn.Dense(8)(x))


def test_layers_in_a_linen_model_have_names_and_variables_of_their_own():
    params = jax.eval_shape(Model().init, jax.random.key(0), X)["params"]
    assert params.keys() == {"MoE_0", "Dense_0", "last"}
    assert params["last"]["experts"]["down_projs"].shape == params["MoE_0"]["experts"]["down_projs"].shape


class Block(nn.Module):
    """One layer of a stack, recomputed in the backward pass."""

    @nn.compact
    def __call__(self, x, _):
        return x + nn.remat(linen.MoE)(PLAIN, LOOP, name="moe")(x), None


def test_layers_stacked_by_linens_scan_and_remat_are_the_chain_of_layers(build):
    axes = {"params": 0, "routing_statistics": 0, "loss_scale": 0}
    stack = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=2)()
    modules = [build(jax_frontend.MoE, PLAIN, LOOP, scale=scale) for scale in (0.3, 0.4)]
    shapes = jax.eval_shape(stack.init, jax.random.key(0), X, None)["params"]
    stacked = jax.tree.map(lambda *values: jnp.stack(values), *map(parameters, modules))
    params = {"moe": linen.load_parameters({"params": shapes["moe"]}, stacked)["params"]}
    run = lambda params, x: stack.apply({"params": params}, x, None)[0]  # noqa: E731
    chain = lambda modules, x: x + modules[0](x) + modules[1](x + modules[0](x))  # noqa: E731
    found = jax.jit(jax.grad(lambda p: (run(p, X) ** 2).sum()))(params)
    wanted = jax.jit(jax.grad(lambda m: (chain(m, X) ** 2).sum(), allow_int=True))(modules)
    found = linen.parameters({"params": found["moe"]})
    for number, module in enumerate(wanted):
        close({name: value[number] for name, value in found.items()}, parameters(module))


def test_a_linen_layer_trains_with_its_collections_carried_along(pair):
    _, layer, variables = pair("MoE")
    target = jnp.sin(X)

    @jax.jit
    def step(variables):
        params, rest = variables["params"], {k: v for k, v in variables.items() if k != "params"}

        def loss(params):
            y, changed = layer.apply({"params": params, **rest}, X, mutable=RECORDED)
            return ((y - target) ** 2).mean(), changed

        (value, changed), grads = jax.value_and_grad(loss, has_aux=True)(params)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        variables = {**rest, **changed, "params": params}
        return {**variables, **layer.apply(variables, method="update_bias", mutable=RECORDED)[1]}, value

    losses = []
    for _ in range(10):
        variables, value = step(variables)
        losses.append(float(value))
    assert losses[-1] < 0.9 * losses[0]
    assert not np.allclose(linen.state(variables)["gate.e_score_correction_bias"], np.linspace(-0.1, 0.1, 4))


# -------------------------------------------------------------------------------------------------------- the others
@layers
def test_flaxs_own_bridge_makes_the_same_layer_with_the_same_gradients(pair, name):
    _, layer, variables = pair(name)
    arguments, inputs = LAYERS[name]
    bridged = nnx.bridge.to_linen(getattr(jax_frontend, name), *arguments, kernel_init=nnx.initializers.zeros)
    made = bridged.init(jax.random.key(0), *inputs)
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, variables)
    loss = lambda layer, p: (first(layer.apply({**variables, "params": p}, *inputs)) ** 2).sum()  # noqa: E731
    found, wanted = (
        jax.jit(jax.value_and_grad(partial(loss, layer)))(variables["params"]) for layer in (bridged, layer)
    )
    close(found, wanted)
    assert found[0] > 0


def test_flaxs_own_bridge_makes_a_fake_gate_that_routes_as_nnx_does():
    gate = nnx.bridge.to_linen(jax_frontend.FakeBalancedGate, PLAIN)
    assert gate.init(jax.random.key(0), X, MASK) == {}
    close(gate.apply({}, X, MASK), jax_frontend.FakeBalancedGate(PLAIN)(X, MASK))


def test_a_fake_gate_has_no_variables_and_routes_as_nnx_does():
    gate = linen.FakeBalancedGate(PLAIN, skip_first_n_experts=1)
    assert gate.init(jax.random.key(0), X, MASK) == {}
    close(gate.apply({}, X, MASK), jax_frontend.FakeBalancedGate(PLAIN, skip_first_n_experts=1)(X, MASK))


@pytest.mark.parametrize("name", ["GroupedExperts", "GroupedExpertsDeepEP", "GroupedExpertsTE"])
def test_an_activation_is_passed_to_the_constructor(pair, name):
    _, _, variables = pair(name)
    other = MoEConfig(**SIZES, expert_bias=True, expert_activation="geglu")
    field = "expert_activation_grouped" if name == "GroupedExperts" else "expert_activation"
    changed = getattr(linen, name)(FULL, LOOP, **{field: weighted_activation(other)})
    wanted = getattr(linen, name)(other, LOOP)
    inputs = LAYERS[name][1]
    equal(*(jax.jit(layer.apply)(variables, *inputs) for layer in (changed, wanted)))


def test_a_mesh_is_passed_to_the_constructor_and_refused_as_in_nnx(pair):
    _, _, variables = pair("GroupedExpertsDeepEP")
    inputs = LAYERS["GroupedExpertsDeepEP"][1]
    mesh = jax.sharding.AbstractMesh((2,), ("ep",))
    with pytest.raises(Unsupported, match="dispatch backend 'deepep'"):
        linen.GroupedExpertsDeepEP(FULL, LOOP, "deepep", ep_mesh=mesh).apply(variables, *inputs)
    one = jax.sharding.AbstractMesh((1,), ("ep",))
    assert linen.GroupedExpertsTE(FULL, LOOP, ep_mesh=one).apply(variables, *inputs).shape == X.shape


def test_sharding_metadata_becomes_linens_partitioned_boxes_with_and_without_a_mesh():
    metadata = {"out_sharding": ("expert", None, None)}
    layer = linen.GroupedExperts(PLAIN, LOOP, kernel_init=nn.initializers.ones, kernel_metadata=metadata)
    inputs = LAYERS["GroupedExperts"][1]
    abstract = jax.eval_shape(layer.init, jax.random.key(0), *inputs)
    mesh = jax.make_mesh((1,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    shardings = nn.get_sharding(abstract, mesh)
    assert shardings["params"]["down_projs"].spec == jax.sharding.PartitionSpec("expert", None, None)
    variables = jax.jit(layer.init, out_shardings=shardings)(jax.random.key(0), *inputs)
    assert isinstance(variables["params"]["down_projs"], nn.Partitioned)
    y, kept = layer.apply(variables, *inputs, mutable=True)
    assert jax.tree.structure(kept) == jax.tree.structure(variables)
    equal(y, linen.GroupedExperts(PLAIN, LOOP).apply(nn.meta.unbox(variables), *inputs))
    with jax.set_mesh(mesh):
        equal(jax.jit(layer.apply)(variables, *inputs), y)


def test_parameters_are_exchanged_out_of_and_into_boxes():
    metadata = {"out_sharding": ("expert", None, None)}
    layer = linen.GroupedExperts(PLAIN, LOOP, kernel_init=nn.initializers.ones, kernel_metadata=metadata)
    variables = layer.init(jax.random.key(0), *LAYERS["GroupedExperts"][1])
    loaded = linen.load_parameters(variables, {name: v + 1 for name, v in linen.parameters(variables).items()})
    assert isinstance(loaded["params"]["down_projs"], nn.Partitioned)
    assert (linen.parameters(loaded)["down_projs"] == 2).all()


# --------------------------------------------------------------------------------------------------------- exchange
def test_parameters_and_state_go_to_the_nnx_module_and_back(build, pair):
    _, _, variables = pair("MoE")
    module = jax_frontend.MoE(FULL, LOOP, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0))
    jax_frontend.load_parameters(module, linen.parameters(variables))
    load_state(module, linen.state(variables))
    back = linen.load_state(linen.load_parameters(variables, parameters(module)), state(module))
    assert jax.tree.structure(back) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, back, variables)


def test_load_parameters_casts_and_leaves_the_variables_that_it_was_given(pair):
    _, _, variables = pair("MoE")
    before = linen.parameters(variables)
    loaded = linen.load_parameters(variables, {name: np.ones(v.shape, np.float16) for name, v in before.items()})
    assert all(v.dtype == jnp.float32 and (v == 1).all() for v in linen.parameters(loaded).values())
    assert all(value is linen.parameters(variables)[name] for name, value in before.items())
    assert loaded["correction_bias"] is variables["correction_bias"]


def test_load_parameters_of_wrong_names_or_shapes_says_which(pair):
    _, _, variables = pair("GroupedExperts")
    values = linen.parameters(variables)
    with pytest.raises(CheckpointError, match=r"missing: down_projs; unexpected: w2"):
        renamed = {("w2" if name == "down_projs" else name): value for name, value in values.items()}
        linen.load_parameters(variables, renamed)
    with pytest.raises(ShapeError, match="down_projs"):
        linen.load_parameters(variables, {**values, "down_projs": values["down_projs"][:2]})
    with pytest.raises(DTypeError, match=r"down_projs as a jax\.Array\nfound: builtins\.list\n.*to_jax"):
        linen.load_parameters(variables, {**values, "down_projs": values["down_projs"].tolist()})
    assert linen.state(variables) == {} and linen.load_state(variables, {}) == variables


@pytest.mark.parametrize("state_first", [False, True])
def test_abstract_variables_take_parameters_and_state_in_either_order_and_can_be_applied(pair, state_first):
    """With a loss, whose scale nobody gave, and with a bias."""
    module, layer, variables = pair("MoE")
    found = jax.eval_shape(layer.init, jax.random.key(0), X)
    loads = [(linen.load_parameters, parameters(module)), (linen.load_state, state(module))]
    for load, values in reversed(loads) if state_first else loads:
        found = load(found, values)
    assert found.keys() == {"params", "correction_bias"}
    run = jax.jit(jax.value_and_grad(lambda v: (layer.apply(v, X) ** 2).sum(), allow_int=True))
    (y, grads), (wanted, wanted_grads) = run(found), run(variables)
    equal(y, wanted)
    close(grads["params"], wanted_grads["params"])


def test_abstract_variables_that_took_parameters_alone_have_a_correction_bias_of_zeros(pair):
    module, layer, variables = pair("MoE")
    found = linen.load_parameters(jax.eval_shape(layer.init, jax.random.key(0), X), parameters(module))
    np.testing.assert_array_equal(found["correction_bias"]["gate"]["e_score_correction_bias"], np.zeros(4, np.float32))
    alone = {"params": variables["params"]}
    equal(*(jax.jit(layer.apply)(v, X) for v in (found, alone)))


def test_abstract_parameters_stay_where_the_state_alone_is_loaded(pair):
    module, layer, _ = pair("MoE")
    abstract = jax.eval_shape(layer.init, jax.random.key(0), X)
    found = linen.load_state(abstract, state(module))
    assert found["params"] == abstract["params"]
    close(linen.state(found), state(module))


@pytest.mark.parametrize("read", [linen.parameters, linen.state, partial(linen.load_parameters, values={})])
def test_a_collection_in_place_of_the_variables_is_refused(pair, read):
    _, _, variables = pair("MoE")
    with pytest.raises(
        CheckpointError, match=r"found: the keys .*experts.*\ndo: pass the variables that `init` returned"
    ):
        read(variables["params"])


def test_parameters_for_variables_without_any_are_refused(pair):
    with pytest.raises(CheckpointError, match=r"the 0 arrays.*\n.*\ndo: pass the variables that `init` returned"):
        linen.load_parameters({}, parameters(pair("Gate")[0]))
    assert linen.parameters({}) == linen.state({}) == {}


def test_importing_the_frontend_does_not_import_linen_layers(run_alone):
    out = run_alone("import sys, moebius.jax_frontend; print('moebius.jax_frontend.linen' in sys.modules)")
    assert out.strip() == "False"
