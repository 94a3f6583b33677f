"""Modules on meshes whose axes are Explicit, as jax.make_mesh makes them: there JAX's types say how arrays lie.

JAX fixes the number of its devices when it starts, so all cases run in one interpreter of their own.
"""

import os
import pickle
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from sides import cached_problem, expected, rounded

from moebius.core import MoEConfig, layout, reference
from moebius.core.precision import EXACT
from moebius.core.tolerance import bounds, within

TOKENS, E = 8, 4
# The kind; its mesh, of one device or of four, None for parameters that lie whole on each of the four; how x is cut
# over that mesh, None for an array that was put nowhere; whether the mesh is in force.
EXPERTS = {
    "deepep on one device": ("GroupedExpertsDeepEP", "one", None, False),
    "te on one device in force": ("GroupedExpertsTE", "one", ("ep",), True),
    "four devices in force": ("GroupedExperts", "four", (("data", "ep"),), True),
    "replicated": ("GroupedExperts", None, ("data",), False),
    "replicated, rows cut, in force": ("GroupedExpertsDeepEP", None, (None, "data"), True),
}
LAYERS = {
    "linen on one device": ("linen.MoE", "one", None, False),
    "four devices in force": ("MoE", "four", ("data",), True),
    "replicated": ("MoE", None, (("data", "ep"),), False),
}
CALLS = [*EXPERTS, *(("layer", name) for name in LAYERS)]
WITHOUT_JIT = ("deepep on one device", "replicated")
MOE = MoEConfig(
    **{"n_routed_experts": E, "n_activated_experts": 2, "dim": 8, "moe_inter_dim": 4, "dtype": "float32"},
    **{"n_shared_experts": 1, "router_bias": True, "score_func": "sigmoid"},
)

CODE = """
import os, pickle
import jax, jax.numpy as jnp, numpy as np
from contextlib import nullcontext
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from moebius import jax_frontend
from moebius.core import BackendConfig, MoEError
from moebius.jax_frontend import linen, load_parameters

MESHES = {"one": jax.make_mesh((1,), ("ep",)), "four": jax.make_mesh((2, 2), ("data", "ep"))}
MESHES[None] = MESHES["four"]
backend, given, found, facts = BackendConfig(experts="loop"), pickle.load(open(os.environ["CASES"], "rb")), {}, {}
assert {kind for mesh in MESHES.values() for kind in mesh.axis_types} == {AxisType.Explicit}

def force(mesh, holds):
    return jax.set_mesh(MESHES[mesh]) if holds else nullcontext()

def built(kind, config, values, mesh):
    takes = {"mesh": MESHES[mesh]} if kind in ("GroupedExperts", "MoE") and mesh else {}
    module = getattr(jax_frontend, kind)(config, backend, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0), **takes)
    if mesh and not takes:
        module.init_token_dispatcher(MESHES[mesh])
    load_parameters(module, values)
    if mesh is None:
        graph, state = nnx.split(module)
        module = nnx.merge(graph, jax.device_put(state, NamedSharding(MESHES["four"], P())))
    return module

def as_function(kind, config, values, mesh, args):
    if not kind.startswith("linen."):
        module = built(kind, config, values, mesh)
        graph, own, rest = nnx.split(module, nnx.Param, ...)
        return lambda own, *args: nnx.merge(graph, own, rest, copy=True)(*args), own, module
    kind = kind.removeprefix("linen.")
    layer = getattr(linen, kind)(config, backend, **{"mesh" if kind == "MoE" else "ep_mesh": MESHES[mesh]})
    variables = linen.load_parameters(jax.eval_shape(layer.init, jax.random.key(0), *args), values)
    rest = {key: value for key, value in variables.items() if key != "params"}
    return lambda own, *args: layer.apply({"params": own, **rest}, *args), variables["params"], None

def lie(mesh, cut, arrays):
    if cut is None:
        return arrays
    put = lambda value: jax.device_put(value, NamedSharding(MESHES[mesh], P(*cut[:value.ndim])))
    return [put(arrays[0]), *(jax.device_put(v, NamedSharding(MESHES[mesh], P(cut[0]))) for v in arrays[1:])]

def trained(kind, mesh, cut, in_force, config, values, dy, args, eager=False):
    with force(mesh, in_force):
        run, own, module = as_function(kind, config, values, mesh, args)
        args = lie(mesh, cut, args)

        @jax.jit
        def train(own, args):
            def loss(own, x, w):
                y = run(own, x, *([args[1], *w, args[3]] if w else []))
                return (y * dy).sum(), y
            (_, y), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(own, args[0], args[2:3])
            return y, gradients

        y, (dparameters, dx, dw) = train(own, args)
        # An array that was put on one device has to reach the mesh too.
        placed = args if cut else [jax.device_put(value, jax.devices()[0]) for value in args]
        alone = np.asarray(module(*placed)) if eager else None
    tree = dparameters if isinstance(dparameters, nnx.State) else nnx.State(dparameters)
    grads = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(tree)}
    answer = {"y": y, "dx": dx, **{"dweights": value for value in dw}, **grads}
    wanted = NamedSharding(MESHES[mesh], P(*(cut or ())))
    lies = y.sharding.is_equivalent_to(wanted, y.ndim) and dx.sharding.is_equivalent_to(args[0].sharding, y.ndim)
    return {key: np.asarray(value) for key, value in answer.items()}, {"lies": lies, "alone": alone}

config, values, x, mask, w, ids, dy = given["arrays"]
tokens = [jnp.float32(x), jnp.asarray(mask), jnp.float32(w), jnp.int32(ids)]
for name, case in given["experts"].items():
    found[name], facts[name] = trained(*case, config, values, jnp.float32(dy), tokens,
                                           name in given["eager"])
moe, moe_values, layer_x, layer_dy = given["moe"]
for name, case in given["layers"].items():
    answer = trained(*case, moe, moe_values, jnp.float32(layer_dy), [jnp.float32(layer_x)])
    found["layer", name], facts["layer", name] = answer

# ---------------------------------------------------------------------------------------------- records
layer = built("MoE", moe, moe_values, None)
layer.gate.track_load = True
(cut,) = lie("four", ("data",), [jnp.float32(layer_x)])
nnx.jit(lambda layer, x: layer(x))(layer, cut)
facts["load"] = np.asarray(layer.gate.last_load[...])
layer.gate.last_load.set_value(jnp.zeros_like(layer.gate.last_load[...]))
rest = [layer.gate.weight[...], layer.gate.aux_loss_scale[...], layer.gate.cumulative_load[...]]
layer(cut)
facts["again"] = np.asarray(layer.gate.last_load[...])
after = [layer.gate.weight[...], layer.gate.aux_loss_scale[...], layer.gate.cumulative_load[...]]
facts["kept"] = [old is new for old, new in zip(rest, after, strict=True)]
taps = []
one = built("GroupedExperts", config, values, "one")
one.tap = lambda name, value: taps.append(name) or value
jax.eval_shape(lambda: one(*tokens))
facts["taps"] = taps

# ----------------------------------------------------------------------------------------------- errors
def said(function, *args):
    try:
        function(*args)
    except MoEError as error:
        return type(error).__name__, str(error)
    return "", "nothing was raised"

replicated, spread = (built("GroupedExperts", config, values, mesh) for mesh in (None, "four"))
facts["errors"] = {
    "devices": said(replicated, jax.device_put(tokens[0], jax.devices()[1]), *tokens[1:]),
    "list": said(replicated, tokens[0], [True] * 8, *tokens[2:]),
}
with jax.set_mesh(jax.make_mesh((4,), ("data",))):
    facts["errors"]["mesh"] = said(spread, *tokens)
pickle.dump((found, facts), open(os.environ["FOUND"], "wb"))
"""


@cache
def problem():
    """Every token counts: what is asked here is where arrays lie."""
    p = cached_problem(tokens=TOKENS, n_experts=E, seed=1, k=2, expert_bias=True)
    return p.but(token_mask=np.ones_like(p.token_mask))


@cache
def layer():
    """Parameters, x and dy of an MoE."""
    rng = np.random.default_rng(0)
    values = {row.name: rounded(rng.normal(size=row.shape) * 0.4, "float32") for row in layout.moe(MOE)}
    return values, *(rounded(rng.normal(size=(4, 2, 8)), "float32") for _ in range(2))


@pytest.fixture(scope="session")
def ran(run_alone, tmp_path_factory):
    """(what each case returned, facts)."""
    folder, p = tmp_path_factory.mktemp("explicit"), problem()
    cases = {
        "arrays": (p.config, p.parameters, p.x, p.token_mask, p.weights, p.ids, p.dy),
        **{"moe": (MOE, *layer()), "experts": EXPERTS, "layers": LAYERS, "eager": WITHOUT_JIT},
    }
    (folder / "cases").write_bytes(pickle.dumps(cases))
    places = {"CASES": str(folder / "cases"), "FOUND": str(folder / "found")}
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    run_alone(CODE, XLA_FLAGS=f"{os.environ.get('XLA_FLAGS', '')} {flags}", **places)
    return pickle.loads(Path(places["FOUND"]).read_bytes())


@pytest.fixture
def found(ran):
    return ran[0]


@pytest.fixture
def facts(ran):
    return ran[1]


@cache
def expected_layer():
    values, x, dy = layer()
    args = x.reshape(-1, 8), np.ones(TOKENS, bool), values, MOE
    ids = reference.moe(*args).routing.ids_TK

    def run(arithmetic):
        trace = reference.moe(*args, ids_TK=ids, arithmetic=arithmetic)
        dx, grads = reference.moe_vjp(trace, *args, dy.reshape(-1, 8), arithmetic=arithmetic)
        return {"y": trace.y_TD.reshape(x.shape), "dx": dx.reshape(x.shape), **grads}

    exact = run(EXACT)
    return exact, bounds(run, exact, "float32"), ids


def assert_agrees(answer, exact, limits):
    assert answer.keys() == exact.keys()
    for key, value in answer.items():
        assert value.shape == exact[key].shape, key
        assert within(value, exact[key], limits[key]), key


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_on_an_explicit_mesh_agree_with_reference(found, name):
    assert_agrees(found[name], *expected(problem()))


@pytest.mark.parametrize("name", LAYERS)
def test_layers_on_an_explicit_mesh_agree_with_reference(found, name):
    assert_agrees(found["layer", name], *expected_layer()[:2])


@pytest.mark.parametrize("name", WITHOUT_JIT)
def test_a_call_without_jit_on_an_explicit_mesh_agrees_with_reference(facts, name):
    exact, limits = expected(problem())
    assert within(facts[name]["alone"], exact["y"], limits["y"])


@pytest.mark.parametrize("key", CALLS, ids=str)
def test_output_on_an_explicit_mesh_lies_as_the_tokens_do(facts, key):
    assert facts[key]["lies"]


def test_a_layer_on_an_explicit_mesh_records_its_load_and_leaves_the_rest(facts):
    load = np.bincount(expected_layer()[2].reshape(-1), minlength=E)
    np.testing.assert_array_equal(facts["load"], load)
    np.testing.assert_array_equal(facts["again"], load)
    assert all(facts["kept"])


def test_a_tap_on_an_explicit_mesh_of_one_device_sees_every_stage(facts):
    assert facts["taps"] == ["rows", "up", "activation", "down", "combine"]


def test_modules_on_an_explicit_mesh_refuse_what_lies_elsewhere(facts):
    errors = facts["errors"]
    assert errors["devices"][0] == "ShapeError" and "all arrays on the same devices" in errors["devices"][1]
    assert errors["list"][0] == "DTypeError" and "token_mask" in errors["list"][1]
    kind, message = errors["mesh"]
    assert kind == "ConfigError" and "{'data': 2, 'ep': 2}" in message and "{'data': 4} in force" in message
