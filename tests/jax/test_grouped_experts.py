"""The three modules of the experts under Flax's and JAX's transformations, and every word of a refusal.

Values and gradients of the function that they call: test_experts.py and tests/cross.
"""

import copy
import pickle
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import forget
from fakes import transformer_engine_jax as te
from flax import nnx
from jax.sharding import PartitionSpec

from moebius.core import BackendConfig, ConfigError, MoEConfig, Unsupported
from moebius.core.errors import BackendUnavailable, MoEError
from moebius.core.stages import untapped
from moebius.jax_frontend import (
    GroupedExperts,
    GroupedExpertsDeepEP,
    GroupedExpertsTE,
    Local,
    MoE,
    experts,
    grouped_experts,
    load_parameters,
    matmul,
    over_mesh,
    parameters,
)
from moebius.jax_frontend.grouped_experts import weighted_activation

CONFIG = MoEConfig(n_routed_experts=4, n_activated_experts=2, dim=8, moe_inter_dim=6, dtype="float32", expert_bias=True)
LOOP = BackendConfig(experts="loop")  # of GroupedExpertsTE, the default needs a GPU
KINDS = (GroupedExperts, GroupedExpertsDeepEP, GroupedExpertsTE)
DISPATCHED = KINDS[1:]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
dispatched = pytest.mark.parametrize("kind", DISPATCHED, ids=lambda kind: kind.__name__)
modes = pytest.mark.parametrize("graph", [True, False], ids=["graph", "tree"])
equal = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
# A module is an argument: those of one kind and config share a compilation.
apply = jax.jit(lambda m, args: m(*args))


def tokens(n=6, seed=0):
    """(x, token_mask, weights, indices) of random values; one token masked."""
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((n, 4)), -1)[:, :2]
    x, weights = rng.normal(size=(n, 8)), rng.random((n, 2))
    return jnp.float32(x), jnp.arange(n) != 1, jnp.float32(weights), jnp.int32(ids)


@pytest.fixture(scope="module")
def module(build):
    """module(kind): the same module for the same kind; not for tests that change it."""
    return cache(lambda kind: build(kind, CONFIG, LOOP))


@pytest.fixture(scope="module")
def wanted(module):
    """(output, gradients by name) of the sum of squares, by the function."""
    run = lambda p: experts(p, *tokens(), config=CONFIG, backend="loop")  # noqa: E731
    values = parameters(module(GroupedExperts))
    return jax.jit(lambda p: (run(p), jax.grad(lambda p: (run(p) ** 2).sum())(p)))(values)


def loss(module, args):
    return (module(*args) ** 2).sum()


# ---------------------------------------------------------------------------------------------------- transformations
@kinds
def test_modules_as_an_argument_of_jit_and_closed_over_are_the_function(module, wanted, kind):
    equal(apply(module(kind), tokens()), wanted[0])
    equal(jax.jit(lambda args: module(kind)(*args))(tokens()), wanted[0])


@modes
@kinds
def test_modules_under_nnx_jit_and_grad_are_the_function_in_both_modes(module, wanted, kind, graph):
    with nnx.set_graph_mode(graph), nnx.set_graph_updates(graph):
        found, grads = nnx.jit(lambda m, args: (m(*args), nnx.grad(loss)(m, args)))(module(kind), tokens())
    equal(found, wanted[0])
    flat = {".".join(path): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(grads, nnx.Param))}
    assert flat.keys() == wanted[1].keys()
    jax.tree.map(equal, flat, wanted[1])


@kinds
def test_jax_grad_of_a_module_is_a_module_of_gradients(module, wanted, kind):
    grads = jax.jit(jax.grad(loss))(module(kind), tokens())
    assert type(grads) is kind
    jax.tree.map(equal, parameters(grads), wanted[1])


@modes
@kinds
def test_modules_split_and_merged_are_the_same(module, wanted, kind, graph):
    graphdef, state = nnx.split(module(kind), graph=graph)
    merged = nnx.merge(graphdef, state)
    assert merged.config == CONFIG and merged.backend_name == "loop"
    equal(apply(merged, tokens()), wanted[0])


@kinds
def test_modules_of_one_config_share_a_compilation(module, build, traces, kind):
    run, seen = traces(lambda m, args: m(*args))
    run(module(kind), tokens()), run(build(kind, CONFIG, LOOP), tokens(seed=1))
    assert len(seen) == 1


@kinds
def test_deepcopies_have_parameters_of_their_own(module, kind):
    copied = copy.deepcopy(module(kind))
    load_parameters(copied, jax.tree.map(jnp.zeros_like, parameters(copied)))
    assert all(np.any(value) for value in parameters(module(kind)).values())
    assert copied.config == CONFIG and type(copied) is kind


@kinds
def test_modules_and_their_states_can_be_pickled(module, wanted, kind):
    state = pickle.loads(pickle.dumps(nnx.to_pure_dict(nnx.state(module(kind)))))
    jax.tree.map(np.testing.assert_array_equal, state, parameters(module(kind)))
    loaded = pickle.loads(pickle.dumps(module(kind)))
    equal(apply(loaded, tokens()), wanted[0])


@kinds
def test_modules_can_be_built_without_memory_and_filled(module, kind):
    abstract = nnx.eval_shape(lambda: kind(CONFIG, LOOP, rngs=nnx.Rngs(0)))
    assert isinstance(abstract.down_projs.get_value(), jax.ShapeDtypeStruct)
    filled = nnx.merge(nnx.graphdef(abstract), nnx.state(module(kind)))
    jax.tree.map(np.testing.assert_array_equal, parameters(filled), parameters(module(kind)))


@kinds
@pytest.mark.parametrize(
    "asked, wanted",
    [
        ({}, {}),
        ({"experts": "ragged_dot", "remat": "full", "checks": "full"}, {"remat": "full", "check": True}),
        ({"double_backward": True}, {"double_backward": True}),
        ({"permute": "te"}, {"permute_backend": "te"}),
    ],
    ids=["default", "remat", "double_backward", "permute"],
)
def test_modules_take_their_settings_from_the_backend_config(build, monkeypatch, kind, asked, wanted):
    seen, asked = {}, {"experts": "loop", **asked}
    monkeypatch.setattr(over_mesh, "experts", lambda *args, **settings: seen.update(settings))
    monkeypatch.setattr(grouped_experts, "choose_permuter", lambda *args: None)
    build(kind, CONFIG, BackendConfig(**asked))(*tokens())
    default = {"remat": "act", "double_backward": False, "permute_backend": None, "check": False}
    wanted = {"backend": asked["experts"], **default, **wanted}
    assert {name: seen[name] for name in wanted} == wanted


@kinds
def test_modules_hand_on_what_was_assigned_to_them(build, monkeypatch, kind):
    seen, module = {}, build(kind, CONFIG, LOOP)
    monkeypatch.setattr(over_mesh, "experts", lambda *args, **settings: seen.update(settings))
    module(*tokens())
    assert seen["tap"] is untapped and seen["activation"] is None
    assert seen["config"] is module.config and seen["dispatcher"] == Local()
    module.tap = lambda name, value: value
    setattr(module, activation_of(kind), jnp.multiply)
    module(*tokens())
    assert seen["tap"] is module.tap and seen["activation"] is jnp.multiply


# ------------------------------------------------------------------------------------------------------------ training
@kinds
def test_a_step_with_donated_parameters_lets_the_old_ones_go_and_the_loss_falls(build, kind):
    graphdef, state = nnx.split(build(kind, CONFIG, LOOP))
    args, target = tokens(), jnp.cos(tokens()[0])

    @partial(jax.jit, donate_argnums=0)
    def step(state):
        error = lambda state: ((nnx.merge(graphdef, state)(*args) - target) ** 2).mean()  # noqa: E731
        loss, grads = jax.value_and_grad(error)(state)
        return jax.tree.map(lambda p, g: p - 0.2 * g, state, grads), loss

    losses = []
    for _ in range(8):
        before = jax.tree.leaves(state)
        state, loss = step(state)
        losses.append(float(loss))
        assert all(leaf.is_deleted() for leaf in before)
    assert all(later < earlier for earlier, later in pairwise(losses)) and losses[-1] < losses[0] / 2


@kinds
@pytest.mark.parametrize("x64", [False, True])
def test_modules_keep_their_dtype_whatever_the_x64_mode(kind, x64):
    with jax.enable_x64(x64):
        zeros = {"kernel_init": nnx.initializers.zeros, "rngs": nnx.Rngs(0)}
        narrow = kind(CONFIG, LOOP, **zeros)
        assert {value.dtype for value in parameters(narrow).values()} == {jnp.dtype("float32")}
        assert jax.eval_shape(lambda args: narrow(*args), tokens()).dtype == "float32"
        wide = partial(kind, replace(CONFIG, dtype="float64"), LOOP, **zeros)
        if x64:
            assert {value.dtype for value in parameters(wide()).values()} == {jnp.dtype("float64")}
            return
        with pytest.raises(ConfigError, match="float64"):
            wide()


# ---------------------------------------------------------------------------------------------------------- activation
def activation_of(kind):
    return "expert_activation_grouped" if kind is GroupedExperts else "expert_activation"


@kinds
def test_an_activation_assigned_after_construction_is_computed_until_none_is(build, wanted, kind):
    other = replace(CONFIG, expert_activation="geglu")
    changed, made = build(kind, CONFIG, LOOP), build(kind, other, LOOP)
    setattr(changed, activation_of(kind), weighted_activation(other))
    found = apply(changed, tokens())
    equal(found, apply(made, tokens()))
    assert np.abs(found - wanted[0]).max() > 0.01
    setattr(changed, activation_of(kind), None)
    equal(apply(changed, tokens()), wanted[0])


@kinds
def test_the_activation_that_is_read_is_the_configs_times_the_weights(module, draws, kind):
    hidden, weights = jnp.float32(draws(0)((5, 12))), jnp.float32(draws(1)((5, 1)))
    found = getattr(module(kind), activation_of(kind))(hidden, weights)
    equal(found, weights * jax.nn.silu(hidden[:, :6]) * hidden[:, 6:])


@kinds
def test_the_activation_by_the_other_classes_name_is_refused(build, kind):
    name = {"expert_activation", "expert_activation_grouped"} - {activation_of(kind)}
    with pytest.raises(ConfigError, match=f"do: assign {activation_of(kind)}$"):
        setattr(build(kind, CONFIG, LOOP), name.pop(), None)


# ---------------------------------------------------------------------------------------------------------- dispatchers
def mesh_of(**axes):
    """A mesh without devices."""
    return jax.sharding.AbstractMesh(tuple(axes.values()), tuple(axes))


def test_dispatched_modules_have_the_documented_defaults(module):
    for kind in DISPATCHED:
        m = module(kind)
        assert (m.dispatcher_backend, m.dispatcher_num_sms) == (None, 20)  # the original's "deepep" is PyTorch's
        assert m.dispatcher_share_token_dispatcher is True and m.dispatcher_async_dispatch is False
        assert (m.ep_size, m.ep_rank, m.token_dispatcher) == (1, 0, None)
    assert module(GroupedExpertsTE).moe_mesh is None


@dispatched
@pytest.mark.parametrize("name", ["deepep", "hybridep", "uccl_ep", "allgather", "ragged_all_to_all"])
@pytest.mark.parametrize("mesh", [mesh_of(ranks=1), mesh_of(data=4, ep=1)], ids=["one axis", "ep"])
def test_any_dispatcher_over_one_rank_is_local(build, kind, name, mesh):
    module = build(kind, CONFIG, LOOP, name)
    module.init_token_dispatcher(mesh)
    assert module.token_dispatcher == Local() and (module.ep_size, module.ep_rank) == (1, 0)


@dispatched
def test_modules_with_a_dispatcher_still_split_copy_and_share_a_compilation(build, wanted, traces, kind):
    run, seen = traces(lambda m, args: m(*args))
    made = [build(kind, CONFIG, LOOP) for _ in range(2)]
    for one in made:
        one.init_token_dispatcher(jax.make_mesh((1,), ("ep",), axis_types=(jax.sharding.AxisType.Auto,)))
    for one in (*made, copy.deepcopy(made[0]), nnx.merge(*nnx.split(made[1]))):
        equal(run(one, tokens()), wanted[0])
    assert len(seen) == 1


def test_te_keeps_the_mesh_that_it_is_given(build):
    module = build(GroupedExpertsTE, CONFIG, LOOP)
    module.init_token_dispatcher(mesh_of(ep=1), mesh_of(ep_shard=2, ep=1))
    assert module.moe_mesh == mesh_of(ep_shard=2, ep=1)
    module.set_moe_mesh(None)
    assert module.moe_mesh is None


@dispatched
@pytest.mark.parametrize("name", ["deepep", "hybridep", "uccl_ep", "local", "te"])
@pytest.mark.parametrize("mesh", [mesh_of(ranks=2), mesh_of(data=2, ep=2)], ids=["one axis", "ep"])
def test_a_dispatcher_that_does_not_serve_more_ranks_is_refused_by_its_name(build, kind, name, mesh):
    module = build(kind, CONFIG, LOOP, name)
    # Transformer Engine's serves ranks, but of GPUs and where it is installed.
    error = BackendUnavailable if name == "te" else Unsupported
    with pytest.raises(error, match=f"dispatch backend '{name}' of moebius.jax_frontend"):
        module.init_token_dispatcher(mesh)
    assert module.token_dispatcher is None and module.ep_size == 1 and module.ep_mesh is None


@dispatched
@pytest.mark.parametrize(
    "mesh, found, do",
    [
        (None, "a NoneType", "jax.make_mesh"),
        (("ep",), "a tuple", "jax.make_mesh"),
        (mesh_of(), "no axis", '"ep"'),
        (mesh_of(data=2, model=1), "2 axes named data, model", 'name it "ep"'),
    ],
    ids=["None", "tuple", "no axis", "no ep"],
)
def test_a_mesh_that_names_no_ranks_is_refused(module, kind, mesh, found, do):
    with pytest.raises(ConfigError) as caught:
        module(kind).init_token_dispatcher(mesh)
    assert caught.value.found == found and do in caught.value.do


# ------------------------------------------------------------------------------------------------------------- refusals
@dispatched
def test_an_unknown_dispatcher_backend_is_refused_with_the_known(kind):
    with pytest.raises(ConfigError, match=r"dispatcher='mpi'.*\n.*'deepep'"):
        kind(CONFIG, LOOP, "mpi", rngs=nnx.Rngs(0))


def test_te_without_a_named_backend_asks_for_te(monkeypatch):
    asked, choose = [], grouped_experts.choose
    monkeypatch.setattr(grouped_experts, "choose", lambda name, *args: asked.append(name) or choose("loop", *args))
    for kind, backend in ((GroupedExpertsTE, None), (GroupedExpertsTE, LOOP), (GroupedExpertsDeepEP, None)):
        kind(CONFIG, backend, rngs=nnx.Rngs(0))
    assert asked == ["te", "loop", None]


def test_te_where_transformer_engine_cannot_serve_says_why():
    with pytest.raises(MoEError, match=r"grouped_matmul backend 'te' of moebius\.jax_frontend") as caught:
        GroupedExpertsTE(CONFIG, rngs=nnx.Rngs(0))
    assert isinstance(caught.value, BackendUnavailable | Unsupported)


@pytest.fixture
def te_on_a_cpu(monkeypatch):
    """A stand-in for Transformer Engine, asked for its dtypes and widths and not for its device."""

    def renew():
        forget()
        matmul._choose.cache_clear()
        matmul.BACKENDS._loaded.pop("te", None)
        matmul.BACKENDS._broken.pop("te", None)

    te.fake(monkeypatch)
    monkeypatch.setattr(matmul, "_cuda", lambda *args: None)
    renew()
    yield
    renew()


@kinds
@pytest.mark.parametrize("inter, refused", [(12, "D=12, I=16"), (10, "D=16, I=20"), (16, None)])
def test_a_width_that_the_backend_does_not_take_is_refused_at_construction(te_on_a_cpu, kind, inter, refused):
    """Of a gated activation the down projection alone has the width I, the other twice of it."""
    config = replace(CONFIG, dim=16, moe_inter_dim=inter, dtype="bfloat16", expert_bias=False)
    make = partial(kind, config, BackendConfig(experts="te"), kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0))
    if refused is None:
        assert make().backend_name == "te"
        return
    with pytest.raises(Unsupported, match=f"not {refused}"):
        make()


@kinds
def test_the_backends_name_is_the_plain_one_inside_of_an_autocast_too(te_on_a_cpu, kind):
    te.STATE.recipe = te.Float8CurrentScaling()
    config = replace(CONFIG, dim=16, moe_inter_dim=16, dtype="bfloat16")
    settings = {"kernel_init": nnx.initializers.zeros, "rngs": nnx.Rngs(0)}
    assert "+" in matmul.choose("te", jnp.zeros((0, 16), jnp.bfloat16), (4, 16, 32)).name
    assert kind(config, BackendConfig(experts="te"), **settings).backend_name == "te"


@kinds
def test_a_backend_of_permute_that_cannot_serve_is_refused_at_construction(kind):
    with pytest.raises(MoEError, match=r"permute backend 'te' of moebius\.jax_frontend"):
        kind(CONFIG, BackendConfig(experts="loop", permute="te"), rngs=nnx.Rngs(0))


@kinds
def test_an_fp8_recipe_is_refused(kind):
    with pytest.raises(Unsupported, match=r"te_fp8='recipe'\n.*autocast alone\ndo: .*transformer_engine\.jax\.auto"):
        kind(CONFIG, BackendConfig(te_fp8="recipe", experts="te"), rngs=nnx.Rngs(0))
    with pytest.raises(Unsupported, match=r"dispatcher_max_tokens=8\n.*shapes are static"):
        kind(CONFIG, BackendConfig(dispatcher_max_tokens=8), rngs=nnx.Rngs(0))


# ------------------------------------------------------------------------------------------------------------- sharding
SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from moebius.core import BackendConfig, MoEConfig
from moebius.jax_frontend import GroupedExperts, GroupedExpertsDeepEP, GroupedExpertsTE, load_parameters, parameters

config = MoEConfig(n_routed_experts=4, n_activated_experts=2, dim=8, moe_inter_dim=6, dtype="float32")
rng = np.random.default_rng(0)
ids = jnp.int32(np.argsort(rng.random((6, 4)), -1)[:, :2])
args = jnp.float32(rng.normal(size=(6, 8))), jnp.ones(6, bool), jnp.float32(rng.random((6, 2))), ids
run = jax.jit(lambda m, args: (m(*args), jax.grad(lambda m: (m(*args) ** 2).sum())(m)))
close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
mesh = jax.make_mesh((4,), ("expert",), axis_types=(AxisType.Auto,))
metadata = {"out_sharding": ("expert", None, None)}
settings = {"kernel_init": nnx.initializers.zeros, "rngs": nnx.Rngs(0)}
for kind in (GroupedExpertsDeepEP, GroupedExpertsTE, GroupedExperts):
    with jax.set_mesh(mesh):
        module = kind(config, BackendConfig(experts="loop"), kernel_metadata=metadata, **settings)
    values = {name: rng.normal(size=value.shape) for name, value in parameters(module).items()}
    load_parameters(module, values)
    for value in parameters(module).values():
        assert value.sharding.spec == P("expert", None, None), value.sharding
        assert {shard.data.shape[0] for shard in value.addressable_shards} == {1}
plain = GroupedExperts(config, BackendConfig(experts="loop"), **settings)
load_parameters(plain, values)
wanted = run(plain, args)
with jax.set_mesh(mesh):
    y, grads = run(module, args)
close(y, wanted[0])
jax.tree.map(close, parameters(grads), parameters(wanted[1]))
"""


def test_modules_built_under_a_mesh_lie_on_it_and_compute_the_same(run_alone):
    """Eager sharding: what kernel_metadata names holds from the first array on, and through load_parameters."""
    run_alone(SHARDED, XLA_FLAGS="--xla_force_host_platform_device_count=4")


@kinds
def test_sharding_metadata_without_a_mesh_is_kept_and_moves_nothing(build, wanted, kind):
    module = build(kind, CONFIG, LOOP, kernel_metadata={"out_sharding": ("expert", None, None)})
    equal(apply(module, tokens()), wanted[0])
    specs = nnx.get_partition_spec(nnx.state(module, nnx.Param))
    for name in ("gate_and_up_projs", "down_projs"):
        assert specs[name].get_value() == PartitionSpec("expert", None, None)
    assert specs["down_proj_bias"].get_value() == PartitionSpec()


@kinds
def test_modules_take_numpys_float64_without_a_warning_where_jax_has_none(module, wanted, kind):
    x, mask, weights, ids = (np.asarray(array) for array in tokens())
    y = module(kind)(x.astype(np.float64), mask, weights.astype(np.float64), ids.astype(np.int64))
    assert y.dtype == jnp.float32
    equal(y, wanted[0])


@kinds
def test_metadata_other_than_a_sharding_needs_no_mesh(kind):
    module = kind(CONFIG, LOOP, kernel_metadata={"role": "expert"}, rngs=nnx.Rngs(0))
    assert module.down_projs.get_metadata("role") == "expert"
    assert not module.down_proj_bias.has_metadata("role")


def test_moe_hands_its_backend_to_its_experts(build):
    asked = BackendConfig(experts="ragged_dot", remat="none")
    assert build(MoE, CONFIG, asked).experts.backend == asked


def test_moe_hands_the_backend_of_the_routing_to_its_gate(monkeypatch):
    asked = []
    monkeypatch.setattr("moebius.jax_frontend.gate.choose_router", lambda name, *args: asked.append(name))
    moe = MoE(CONFIG, BackendConfig(route="te"), kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0))
    assert asked == ["te"] and moe.gate.route_backend == "te"


def test_a_fake_gate_with_a_backend_of_the_routing_is_refused():
    backend = BackendConfig(route="te", fake_balanced_gate=True)
    with pytest.raises(ConfigError, match="route='te' with fake_balanced_gate=True\nfound: a fake gate"):
        MoE(CONFIG, backend, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0))
