"""States of the modules saved and restored by orbax: bit for bit, into a template, and onto other devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from moebius.core import BackendConfig, MoEConfig
from moebius.jax_frontend import (
    GroupedExperts,
    GroupedExpertsDeepEP,
    GroupedExpertsTE,
    MoE,
    linen,
    load_state,
    parameters,
    state,
)

SIZES = {"n_routed_experts": 4, "n_activated_experts": 2, "dim": 8, "moe_inter_dim": 6}
CONFIG = MoEConfig(
    **SIZES,
    dtype="bfloat16",
    gate_dtype="float32",
    score_func="sigmoid",
    gate_bias_update_factor=0.1,
    router_bias=True,
    expert_bias=True,
    n_shared_experts=1,
)
LOOP = BackendConfig(experts="loop")
KINDS = (MoE, GroupedExperts, GroupedExpertsDeepEP, GroupedExpertsTE)
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def raw(dtype, shape, seed=0):
    """An array of random bytes: NaN payloads, infinities, subnormals and both zeros included."""
    dtype = jnp.dtype(dtype)
    data = np.random.default_rng(seed).integers(0, 256, int(np.prod(shape)) * dtype.itemsize, np.uint8)
    return data.view(dtype).reshape(shape)


def bits(tree):
    """The bytes of every leaf, by its path."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path): (leaf.dtype.name, np.asarray(leaf).tobytes()) for path, leaf in leaves}


@pytest.fixture
def saved(tmp_path):
    """saved(tree): the folder that orbax wrote it to."""

    def save(tree):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", tree)
        return tmp_path / "state"

    return save


def restored(folder, template):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder, template)


def abstract(kind, config=CONFIG):
    """(graphdef, state of shapes) of a module that takes no memory."""
    return nnx.split(nnx.eval_shape(lambda: kind(config, LOOP, rngs=nnx.Rngs(0))))


@kinds
def test_a_state_restored_into_a_template_has_every_bit(build, saved, kind):
    """Correction bias, statistics and scale of the losses are of the state, and are restored with it."""
    _, values = nnx.split(build(kind, CONFIG, LOOP))
    values = jax.tree.map(lambda leaf: jnp.asarray(raw(leaf.dtype, leaf.shape)), values)
    graphdef, template = abstract(kind)
    module = nnx.merge(graphdef, restored(saved(values), template))
    assert bits(nnx.state(module)) == bits(values)
    assert {value.dtype.name for value in parameters(module).values()} == (
        {"bfloat16", "float32"} if kind is MoE else {"bfloat16"}
    )
    if kind is MoE:
        assert state(module).keys() == {"gate.e_score_correction_bias"}


def test_a_restored_layer_computes_what_the_saved_one_did(build, saved):
    module = build(MoE, CONFIG, LOOP)
    load_state(module, {name: np.linspace(-1, 1, 4) for name in state(module)})
    graphdef, template = abstract(MoE)
    again = nnx.merge(graphdef, restored(saved(nnx.state(module)), template))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8)), jnp.bfloat16)
    run = jax.jit(lambda m, x: m(x))
    assert bits(run(again, x)) == bits(run(module, x))


def test_a_pure_dict_and_parameters_alone_are_restored_too(build, saved):
    """What other programs read: names and arrays, no class of moebius."""
    module = build(GroupedExperts, CONFIG, LOOP)
    tree = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    found = restored(saved(tree), jax.eval_shape(lambda: tree))
    assert found.keys() == {"gate_and_up_projs", "down_projs", "gate_up_proj_bias", "down_proj_bias"}
    assert bits(found) == bits(tree)


def test_a_linen_layers_variables_are_restored_and_are_those_of_the_nnx_layer(build, saved):
    module = build(MoE, CONFIG, LOOP)
    shapes = jax.eval_shape(linen.MoE(CONFIG, LOOP).init, jax.random.key(0), jnp.zeros((1, 8)))
    variables = linen.load_parameters({"params": shapes["params"]}, parameters(module))
    found = restored(saved(variables), {"params": shapes["params"]})
    assert bits(linen.parameters(found)) == bits(parameters(module))


RESTORE = """
import jax, jax.numpy as jnp, numpy as np, orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from moebius.core import BackendConfig, MoEConfig
from moebius.jax_frontend import GroupedExperts, MoE

mesh = jax.make_mesh((4,), ("expert",), axis_types=(AxisType.Auto,))

def placed(path, leaf):
    # Each device one expert's matrices and biases; router, shared experts and statistics everywhere.
    names = [getattr(key, "key", getattr(key, "name", "")) for key in path]
    own = leaf.shape[:1] == (4,) and any(name.startswith(("gate_and_up", "gate_up", "down_proj")) for name in names)
    spec = P("expert") if own and "shared_experts" not in names else P()
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

with np.load(folder + "/wanted.npz") as wanted:
    wanted = dict(wanted)
for kind in (MoE, GroupedExperts):
    module = nnx.eval_shape(lambda: kind(config, BackendConfig(experts="loop"), rngs=nnx.Rngs(0)))
    graphdef, template = nnx.split(module)
    template = jax.tree.map_with_path(placed, template)
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(folder + "/" + kind.__name__, template)
    for (path, leaf), asked in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(template), strict=True):
        assert leaf.sharding == asked.sharding, (path, leaf.sharding)
        key = kind.__name__ + jax.tree_util.keystr(path)
        assert np.asarray(leaf).tobytes() == wanted[key].tobytes(), key
    module = nnx.merge(graphdef, state)
    experts = module.experts if kind is MoE else module
    assert [shard.data.shape for shard in experts.down_projs[...].addressable_shards] == [(1, 6, 8)] * 4
    if kind is MoE:
        with jax.set_mesh(mesh):
            y = jax.jit(lambda m, x: m(x))(module, jnp.asarray(wanted["x"]))
        np.testing.assert_allclose(y, wanted["y"], rtol=1e-5, atol=1e-5)
print("restored")
"""


def test_a_state_of_one_device_is_restored_over_four_and_computes_the_same(build, saved, tmp_path, run_alone):
    """Values in bfloat16, products in float32: what the forward pass then differs by is the order of its sums."""
    x = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    wanted = {"x": x}
    for kind in (MoE, GroupedExperts):
        module = build(kind, CONFIG, LOOP)
        if kind is MoE:
            load_state(module, {name: np.linspace(-1, 1, 4) for name in state(module)})
            wanted["y"] = jax.jit(lambda m, x: m(x))(module, x)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / kind.__name__, nnx.state(module))
        for path, leaf in jax.tree.leaves_with_path(nnx.state(module)):
            value = np.asarray(leaf)
            wanted[kind.__name__ + jax.tree_util.keystr(path)] = value.reshape(-1).view(np.uint8)
    np.savez(tmp_path / "wanted.npz", **wanted)
    first, rest = RESTORE.split("\n\n", 1)
    code = f"{first}\nfolder, config = {str(tmp_path)!r}, {CONFIG!r}\n{rest}"
    assert run_alone(code, plain=True, XLA_FLAGS="--xla_force_host_platform_device_count=4").endswith("restored\n")


RESHARD = """
import jax, jax.numpy as jnp, numpy as np, orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P, SingleDeviceSharding
from safetensors.flax import load_file, save_file
from moebius.core import BackendConfig
from moebius.jax_frontend import MoE, load_parameters, parameters, shard_experts

LOOP = BackendConfig(experts="loop")
kind = (AxisType.Auto,) * 2
MESHES = {1: None, 2: jax.make_mesh((2, 2), ("data", "ep"), axis_types=kind),
          4: jax.make_mesh((4, 1), ("ep", "data"), axis_types=kind)}

def template(n):
    # (graphdef, shapes with their places); what is no expert's lies everywhere.
    layer = nnx.eval_shape(lambda: MoE(config, LOOP, rngs=nnx.Rngs(0)))
    here = SingleDeviceSharding(jax.devices()[0])
    if n > 1:
        shard_experts(layer.experts, MESHES[n])
        here = NamedSharding(MESHES[n], P())
    graphdef, shapes = nnx.split(layer)
    lie = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or here)
    return graphdef, jax.tree.map(lie, shapes)

def check(layer, n):
    assert [len(value.sharding.device_set) for value in parameters(layer.experts).values()] == [4 if n > 1 else 1] * 4
    assert {shard.data.shape[0] for shard in layer.experts.down_projs[...].addressable_shards} == {4 // n}
    for name, value in parameters(layer).items():
        assert np.asarray(value).tobytes() == wanted[name].tobytes(), name

with np.load(folder + "/wanted.npz") as wanted:
    wanted = dict(wanted)
for n in (4, 2, 1):
    layer = MoE(config, LOOP, mesh=MESHES[n], kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0))
    before = {name: value.dtype for name, value in parameters(layer).items()}
    load_parameters(layer, {name: jnp.asarray(wanted[name].view(dtype).reshape(value.shape))
                            for (name, dtype), value in zip(before.items(), parameters(layer).values())})
    check(layer, n)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(f"{folder}/{n}", nnx.state(layer))
    save_file(parameters(layer), f"{folder}/{n}.safetensors")
for saved, onto in ((4, 2), (2, 4), (4, 1), (1, 2)):
    graphdef, shapes = template(onto)
    with ocp.StandardCheckpointer() as checkpointer:
        layer = nnx.merge(graphdef, checkpointer.restore(f"{folder}/{saved}", shapes))
    check(layer, onto)
    layer = MoE(config, LOOP, mesh=MESHES[onto], kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0))
    load_parameters(layer, load_file(f"{folder}/{saved}.safetensors"))
    check(layer, onto)
print("restored")
"""


def test_experts_over_devices_are_saved_and_restored_over_other_numbers_of_them(tmp_path, run_alone):
    """By orbax and by safetensors, with every bit."""
    _, shapes = nnx.split(nnx.eval_shape(lambda: MoE(CONFIG, LOOP, rngs=nnx.Rngs(0))), nnx.Param, ...)[:2]
    leaves = {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(shapes)}
    wanted = {
        name: raw(leaf.dtype, leaf.shape, seed).view(np.uint8) for seed, (name, leaf) in enumerate(leaves.items())
    }
    np.savez(tmp_path / "wanted.npz", **wanted)
    first, rest = RESHARD.split("\n\n", 1)
    prelude = f"from moebius.core import MoEConfig\nfolder, config = {str(tmp_path)!r}, {CONFIG!r}"
    code = f"{first}\n{prelude}\n{rest}"
    assert run_alone(code, plain=True, XLA_FLAGS="--xla_force_host_platform_device_count=4").endswith("restored\n")
