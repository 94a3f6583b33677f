"""The modules over four devices: output and every gradient, against the reference's list of ranks.

JAX fixes the number of its devices when it starts, so all cases run in one interpreter of their own. The dispatchers
themselves, inside of shard_map: test_experts_ranks.py.
"""

import pickle
import re
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
from sides import cached_problem, reference_over_ranks, rounded

from moebius.core import MoEConfig, layout, reference
from moebius.core.precision import EXACT
from moebius.core.tolerance import bounds, within

TOKENS, E = 10, 8
SETTINGS = {
    "float32": {"expert_bias": True, "k": 2},
    "bfloat16": {"expert_bias": True, "k": 3, "dtype": "bfloat16", "expert_activation": "swigluoai"},
}


def unused(p):
    """Nobody asks for expert 5, and token 1 is masked."""
    mask = p.token_mask.copy()
    mask[1] = False
    return p.but(ids=np.where(p.ids == 5, 4, p.ids), token_mask=mask)


def poison(p):
    """As `unused`, and of token 1 nothing is a number."""
    x, weights, dy = p.x.copy(), p.weights.copy(), p.dy.copy()
    x[1], weights[1], dy[1] = np.nan, np.inf, np.nan
    return unused(p).but(x=x, weights=weights, dy=dy)


SITUATIONS = {
    "unused": unused,
    "poison": poison,
    "last_rank": lambda p: p.but(ids=np.full_like(p.ids, E - 1)),
    "all_masked": lambda p: p.but(token_mask=np.zeros_like(p.token_mask)),
}
# How many tokens each rank has: of each group of devices that share the experts.
FOUR, TWO_BY_TWO = ((3, 3, 3, 1),), ((3, 3), (3, 1))
# Name, of a row of MODULES below, and its groups.
MODULES = {
    "one_axis": FOUR,
    "alltoall": FOUR,
    "deepep": TWO_BY_TWO,
    "te": TWO_BY_TWO,
    "explicit": TWO_BY_TWO,
    "fsdp": TWO_BY_TWO,
    "inside": FOUR,
    "nested": TWO_BY_TWO,
    "scanned": FOUR,
    "nnx": FOUR,
}
CASES = [(module, "unused") for module in MODULES]
CASES += [("one_axis", name) for name in ("poison", "last_rank", "all_masked")]
CASES += [("alltoall", "bfloat16"), ("one_axis", "bfloat16"), ("deepep", "last_rank")]
LAYERS = {"moe": "one axis", "moe_linen": "two axes"}
MOE = MoEConfig(
    **{"n_routed_experts": E, "n_activated_experts": 2, "dim": 16, "moe_inter_dim": 8, "dtype": "float32"},
    **{"n_shared_experts": 1, "expert_bias": True, "router_bias": True},
)

CODE = """
import copy, os, pickle
import jax, jax.numpy as jnp, numpy as np
from dataclasses import replace
from flax import nnx
from functools import partial
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from moebius.core import BackendConfig, MoEConfig, MoEError
from moebius.jax_frontend import (GroupedExperts, GroupedExpertsDeepEP, GroupedExpertsTE, MoE, experts, linen,
                                  load_parameters, parameters, shard_experts)

def mesh_of(*sizes, names, kind=AxisType.Auto):
    return jax.make_mesh(sizes, names, axis_types=(kind,) * len(sizes))

MESHES = {
    "one axis": mesh_of(4, names=("devices",)),
    "two axes": mesh_of(2, 2, names=("data", "ep")),
    "ep first": mesh_of(2, 2, names=("ep", "data")),
    "explicit": jax.make_mesh((2, 2), ("data", "ep")),
}
given, found, facts = pickle.load(open(os.environ["CASES"], "rb")), {}, {}
ZEROS = {"kernel_init": nnx.initializers.zeros, "rngs": nnx.Rngs(0)}

def backend(**settings):
    return BackendConfig(experts="loop", **settings)

def made(kind, config, mesh, dispatcher=None, **settings):
    if kind is GroupedExperts:
        return kind(config, backend(dispatcher=dispatcher), mesh=MESHES[mesh], **ZEROS, **settings)
    module = kind(config, backend(), dispatcher, **ZEROS)
    module.init_token_dispatcher(MESHES[mesh])
    return module

def fsdp(config):
    with jax.set_mesh(MESHES["two axes"]):
        return made(GroupedExperts, config, "two axes", kernel_metadata={"out_sharding": ("ep", "data", None)})

MODULES = {
    "one_axis": lambda c: made(GroupedExperts, c, "one axis"),
    "alltoall": lambda c: made(GroupedExperts, c, "one axis", "alltoall"),
    "deepep": lambda c: made(GroupedExpertsDeepEP, c, "two axes"),
    "te": lambda c: made(GroupedExpertsTE, c, "ep first", "ragged_all_to_all"),
    "explicit": lambda c: made(GroupedExperts, c, "explicit"),
    "fsdp": fsdp,
    "inside": lambda c: made(GroupedExperts, c, "one axis", "alltoall"),
    "nested": lambda c: made(GroupedExperts, c, "two axes"),
    "scanned": lambda c: made(GroupedExperts, c, "one axis"),
    "nnx": lambda c: made(GroupedExperts, c, "one axis"),
}

def named(module):
    return {name: np.asarray(value, np.float64) for name, value in parameters(module).items()}

def plain(m, x, w, mask, ids):
    return m(x, mask, w, ids)

def inside(m, x, w, mask, ids):
    graph, state = nnx.split(m)
    each = lambda state, args: plain(nnx.merge(graph, state), *args)
    axes = MESHES["one axis"]
    args = [jnp.pad(v, [(0, 2), *[(0, 0)] * (v.ndim - 1)]) for v in (x, w, mask, ids)]
    return jax.shard_map(each, mesh=axes, in_specs=P("devices"), out_specs=P("devices"))(state, args)[:-2]

def nested(m, x, w, mask, ids):
    graph, state = nnx.split(m)
    each = lambda state, args: plain(nnx.merge(graph, state), *args)
    mapped = jax.shard_map(each, mesh=MESHES["two axes"], in_specs=(P(), P("data")), out_specs=P("data"),
                           axis_names={"data"}, check_vma=False)
    return mapped(state, [jnp.pad(v, [(0, 2), *[(0, 0)] * (v.ndim - 1)]) for v in (x, w, mask, ids)])[:-2]

def scanned(m, x, w, mask, ids):
    # Two layers of the same values, half of each, computed again for the gradients.
    graph, state = nnx.split(m)
    stack = jax.tree.map(lambda v: jnp.stack([v, v]), state)
    layer = jax.checkpoint(lambda state, x: plain(nnx.merge(graph, state), x, w, mask, ids))
    return jax.lax.scan(lambda y, state: (y + layer(state, x) / 2, None), jnp.zeros_like(x), stack)[0]

MANNERS = {"inside": inside, "nested": nested, "scanned": scanned}

@partial(jax.jit, static_argnames="manner")
def train(m, x, mask, w, ids, dy, manner):
    y, pull = jax.vjp(lambda m, x, w: MANNERS.get(manner, plain)(m, x, w, mask, ids), m, x, w)
    return y, *pull(dy)

@nnx.jit
def by_nnx(m, x, mask, w, ids, dy):
    loss = lambda m, x, w: jnp.where(mask[:, None], m(x, mask, w, ids) * dy, 0).sum()
    return m(x, mask, w, ids), *nnx.grad(loss, argnums=(0, 1, 2))(m, x, w)

for name, situation in given["experts"]:
    config, arrays = given["experts"][name, situation]
    p, x, mask, w, ids, dy = arrays
    module = MODULES[name](config)
    load_parameters(module, p)
    x, dy = jnp.asarray(x, config.dtype), jnp.asarray(dy, config.dtype)
    args = x, jnp.asarray(mask), jnp.float32(w), jnp.int32(ids), dy
    y, dm, dx, dw = by_nnx(module, *args) if name == "nnx" else train(module, *args, name if name in MANNERS else None)
    grads = {path[-1]: leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(dm, nnx.Param))}
    out = {"y": y, "dx": dx, "dweights": dw, **grads}
    found[name, situation] = {key: np.asarray(value, np.float64) for key, value in out.items()}
    facts.setdefault("lies", {})[name] = {
        name: (tuple(v.sharding.spec), sorted({s.data.shape for s in v.addressable_shards}))
        for name, v in parameters(module).items()
    }

# ---------------------------------------------------------------------------------------------- layers
config, values, x, dy, padding = given["moe"]
x, dy, padding = jnp.float32(x), jnp.float32(dy), jnp.asarray(padding)
moe = MoE(config, backend(), mesh=MESHES["one axis"], **ZEROS)
load_parameters(moe, values)
graph, state = nnx.split(moe)

@jax.jit
def layer(state, x):
    y, pull, ids = jax.vjp(lambda s, x: forward(s, x), state, x, has_aux=True)
    return y, ids, *pull(dy)

def forward(state, x):
    m = nnx.merge(graph, state, copy=True)
    ids = m.gate(x.reshape(-1, 16), ~padding.reshape(-1))[1]
    return m(x, padding), ids

y, ids, dstate, dx = layer(state, x)
grads = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.filter_state(dstate, nnx.Param))}
found["moe"] = {"ids": np.asarray(ids), "y": y, "dx": dx, **grads}

bridge = linen.MoE(config, backend(), mesh=MESHES["two axes"])
shapes = jax.eval_shape(bridge.init, jax.random.key(0), x)
variables = linen.load_parameters(shapes, values)
rest = {key: value for key, value in variables.items() if key != "params"}

@jax.jit
def of_linen(params, x):
    y, pull = jax.vjp(lambda p, x: bridge.apply({"params": p, **rest}, x, padding), params, x)
    return y, *pull(dy)

y, dparams, dx = of_linen(variables["params"], x)
found["moe_linen"] = {"ids": np.asarray(ids), "y": y, "dx": dx, **linen.parameters({"params": dparams})}
for name in ("moe", "moe_linen"):
    found[name] = {key: np.asarray(value) for key, value in found[name].items()}

# ----------------------------------------------------------------------------------------------- facts
def said(function, *args):
    try:
        function(*args)
    except MoEError as error:
        return type(error).__name__, str(error)
    return "", "nothing was raised"

config, (p, x, mask, w, ids, dy) = given["experts"]["one_axis", "unused"]
tokens = jnp.float32(x), jnp.asarray(mask), jnp.float32(w), jnp.int32(ids)
module = MODULES["one_axis"](config)
load_parameters(module, p)
facts["eager"] = np.asarray(module(*tokens))
facts["none"] = module(*(value[:0] for value in tokens)).shape
facts["copies"] = [np.asarray(train(m, *tokens, jnp.float32(dy), None)[0]) for m in
                   (copy.deepcopy(module), nnx.merge(*nnx.split(module)))], train._cache_size()
facts["taps"] = []
module.tap = lambda name, value: facts["taps"].append((name, value.shape)) or value
jax.eval_shape(lambda: module(*tokens))
module.tap = lambda name, value: value

facts["two axes"] = tuple(shard_experts(module, MESHES["two axes"]).down_projs[...].sharding.spec), named(module)
rows = []
module.expert_activation_grouped = lambda hidden, weights: rows.append(len(hidden)) or hidden[:, :8] * weights
jax.eval_shape(lambda: module(*tokens))
facts["rows"] = rows
module.init_weights(rngs=nnx.Rngs(0))
facts["drawn"] = {tuple(value.sharding.spec) for value in parameters(module).values()}
spread = nnx.jit(lambda: GroupedExperts(config, backend(), mesh=MESHES["one axis"], rngs=nnx.Rngs(0)))()
facts["built under jit"] = {shard.data.shape for shard in spread.down_projs[...].addressable_shards}
with jax.set_mesh(MESHES["explicit"]):
    built = nnx.jit(lambda: GroupedExperts(config, backend(), mesh=MESHES["explicit"], rngs=nnx.Rngs(0)))()
facts["built under jit, explicit"] = {shard.data.shape for shard in built.down_projs[...].addressable_shards}
bare = nnx.eval_shape(lambda: GroupedExperts(config, backend(), rngs=nnx.Rngs(0)))
facts["bare"] = tuple(shard_experts(bare, MESHES["two axes"]).down_projs.get_value().sharding.spec)
stack = nnx.vmap(lambda key: GroupedExperts(config, backend(), kernel_init=ZEROS["kernel_init"], rngs=nnx.Rngs(key)))
stacked = shard_experts(stack(jax.random.split(jax.random.key(0), 3)), MESHES["one axis"])
facts["stack"] = {tuple(value.sharding.spec) for value in parameters(stacked).values()}

def bounded(bound, on_overflow):
    own = backend(dispatcher_bound=bound, dispatcher_on_overflow=on_overflow)
    module = GroupedExperts(config, own, mesh=MESHES["one axis"], **ZEROS)
    load_parameters(module, p)
    return module

tight, poisoned = bounded(1, "count"), bounded(1, "poison")
y = nnx.jit(lambda m: m(*tokens))(tight)
facts["dropped"] = np.asarray(tight.dropped(*tokens[1::2])), int(tight.last_dropped[...]), np.asarray(y)
facts["poisoned"] = np.isnan(np.asarray(poisoned(*tokens))).any(1), poisoned.last_dropped
by_linen = linen.GroupedExperts(config, tight.backend, mesh=MESHES["one axis"])
held = linen.load_parameters(jax.eval_shape(by_linen.init, jax.random.key(0), *tokens), p)
y, sown = jax.jit(lambda held: by_linen.apply(held, *tokens, mutable=["routing_statistics"]))(held)
facts["sown"] = int(sown["routing_statistics"]["last_dropped"]), np.asarray(y)
facts["roomy"] = np.asarray(MODULES["alltoall"](config).dropped(*tokens[1::2]))

elsewhere = GroupedExpertsDeepEP(config, backend(), **ZEROS)
elsewhere.init_token_dispatcher(MESHES["one axis"])
facts["dispatcher"] = str(elsewhere.token_dispatcher), elsewhere.ep_size, elsewhere.ep_rank
shard_experts(elsewhere, MESHES["two axes"])
unspread = shard_experts(GroupedExpertsDeepEP(config, backend(), **ZEROS), MESHES["one axis"])
other = mesh_of(2, names=("devices",))  # the name of the module's axis
wrong = lambda m: jax.shard_map(lambda x: m(x, *tokens[1:]), mesh=other, in_specs=P(), out_specs=P())(tokens[0])
both_axes = MODULES["nested"](config)
checked = jax.shard_map(lambda args: both_axes(*args), mesh=MESHES["two axes"], in_specs=P("data"),
                        out_specs=P("data"), axis_names={"data"})
three = replace(config, n_routed_experts=6)
facts["errors"] = {
    "no dispatcher": said(unspread, *tokens),
    "another mesh": said(elsewhere, *tokens),
    "no experts": said(shard_experts, moe, MESHES["one axis"]),
    "abstract": said(shard_experts, module, MESHES["one axis"].abstract_mesh),
    "6 over 4": said(shard_experts, GroupedExperts(three, backend(), **ZEROS), MESHES["one axis"]),
    "shape": said(spread, tokens[0], tokens[1][:-1], *tokens[2:]),
    "devices": said(spread, jax.device_put(tokens[0], jax.devices()[1]), *tokens[1:]),
    "values": said(GroupedExperts(config, backend(checks="full"), mesh=MESHES["one axis"], **ZEROS), *tokens[:2],
                   tokens[2].at[0].set(jnp.nan), tokens[3]),
    "length": said(wrong, spread),
    "checked": said(checked, tokens),
    "bound": said(partial(GroupedExperts, config, backend(dispatcher="allgather", dispatcher_bound=2),
                          mesh=MESHES["one axis"], **ZEROS)),
    "overflow": said(bounded(2, None), *tokens),
    **{name: said(partial(made, GroupedExpertsDeepEP, config, "one axis", name)) for name in
       ("deepep", "uccl_ep", "hybridep", "local", "mok")},
}

# ---------------------------------------------------------------------------------------------- the README
sizes = {"n_routed_experts": 8, "n_activated_experts": 2, "dim": 16, "moe_inter_dim": 8, "dtype": "float32"}
names = {"config": MoEConfig(**sizes), "GroupedExperts": GroupedExperts, "jax": jax, "nnx": nnx, "P": P}
names |= {"experts": experts, "partial": partial, "mesh": mesh_of(4, names=("ep",))}
names |= {name: value[:8] for name, value in zip(("x", "mask", "weights", "ids"), tokens)}
module_of, function_of = given["readme"]
exec(module_of, names)
by_module, names["parameters"] = names["y"], {name: value[...] for name, value in parameters(names["layer"]).items()}
exec(function_of, names)
facts["readme"] = (np.asarray(by_module), np.asarray(names["y"])), named(names["layer"]), names["config"]
pickle.dump((found, facts), open(os.environ["FOUND"], "wb"))
"""


@cache
def problem(name):
    p = cached_problem(tokens=TOKENS, n_experts=E, seed=1, **SETTINGS[name if name in SETTINGS else "float32"])
    return SITUATIONS[name](p) if name in SITUATIONS else p


@cache
def layer():
    """Parameters, x, dy and padding of an MoE."""
    rng = np.random.default_rng(0)
    values = {
        row.name: rounded(rng.normal(size=row.shape) * (0.3 if row.zeros else row.shape[-1] ** -0.5), "float32")
        for row in layout.moe(MOE)
    }
    x, dy = (rounded(rng.normal(size=(2, 5, 16)), "float32") for _ in range(2))
    return values, x, dy, rng.random((2, 5)) < 0.2


def readme():
    """The README's lines on several devices: by a module, and by the function inside of a shard_map."""
    text = (Path(__file__).parents[2] / "README.md").read_text()
    (block,) = [part.partition("```")[0] for part in text.split("```python\n")[1:] if "jax.shard_map(" in part]
    by_module, found, by_function = block.partition("from moebius.jax_frontend.dispatch_alltoall")
    assert found and "layer = " in by_module
    return by_module, found + by_function


@pytest.fixture(scope="session")
def ran(run_alone, tmp_path_factory):
    """(what each case returned, facts)."""
    folder = tmp_path_factory.mktemp("parallel")
    experts = {}
    for name, situation in CASES:
        p = problem(situation)
        experts[name, situation] = p.config, (p.parameters, p.x, p.token_mask, p.weights, p.ids, p.dy)
    (folder / "cases").write_bytes(pickle.dumps({"experts": experts, "moe": (MOE, *layer()), "readme": readme()}))
    places = {"CASES": str(folder / "cases"), "FOUND": str(folder / "found")}
    # Unoptimized it compiles in two thirds of the time.
    run_alone(CODE, XLA_FLAGS="--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0", **places)
    return pickle.loads(Path(places["FOUND"]).read_bytes())


@pytest.fixture
def found(ran):
    return ran[0]


@pytest.fixture
def facts(ran):
    return ran[1]


def over_groups(p, groups, arithmetic):
    """Groups of ranks with all experts each: their tokens one after the other, the parameters' gradients added."""
    ends = np.cumsum([sum(lengths) for lengths in groups])
    parts = []
    for end, lengths in zip(ends, groups, strict=True):
        own = slice(end - sum(lengths), end)
        part = {name: getattr(p, name)[own] for name in ("x", "token_mask", "weights", "ids", "dy")}
        parts.append(reference_over_ranks(p.but(**part), lengths, arithmetic))
    added = {name: sum(part[name] for part in parts) for name in p.parameters}
    return {name: np.concatenate([part[name] for part in parts]) for name in ("y", "dx", "dweights")} | added


@cache
def expected(situation, groups):
    p = problem("unused" if situation == "poison" else situation)
    run = partial(over_groups, p, groups)
    exact = run(EXACT)
    return exact, bounds(run, exact, p.dtype)


@pytest.mark.parametrize("name, situation", CASES, ids=str)
def test_modules_over_devices_agree_with_reference(found, name, situation):
    exact, limits = expected(situation, MODULES[name])
    answer = found[name, situation]
    assert answer.keys() == exact.keys()
    for key, value in answer.items():
        assert value.shape == exact[key].shape, key
        assert within(value, exact[key], limits[key]), key


def test_modules_over_devices_with_poison_in_a_masked_token_are_unchanged_bit_for_bit(found):
    for key, value in found["one_axis", "unused"].items():
        np.testing.assert_array_equal(found["one_axis", "poison"][key], value)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_over_devices_agree_with_reference(found, name):
    values, x, dy, padding = layer()
    answer = dict(found[name])
    ids, mask = answer.pop("ids"), ~padding.reshape(-1)

    def run(arithmetic):
        settings = {"ids_TK": ids, "best_TK": ids, "n_sequences": 2, "arithmetic": arithmetic}
        args = x.reshape(-1, 16), mask, values, MOE
        trace = reference.moe(*args, **settings)
        settings.pop("ids_TK")
        dx, grads = reference.moe_vjp(trace, *args, dy.reshape(-1, 16), **settings)
        return {"y": trace.y_TD.reshape(x.shape), "dx": dx.reshape(x.shape), **grads}

    exact = run(EXACT)
    limits = bounds(run, exact, "float32")
    assert answer.keys() == exact.keys()
    for key, value in answer.items():
        assert within(value, exact[key], limits[key]), key


# ----------------------------------------------------------------------------------------------------------- placement
@pytest.mark.parametrize("name", MODULES)
def test_each_device_holds_its_own_experts_alone(facts, name):
    e = 2 if MODULES[name] == FOUR else 4
    axis = "devices" if MODULES[name] == FOUR else "ep"
    for key, (spec, shapes) in facts["lies"][name].items():
        cut = name == "fsdp" and key in ("gate_and_up_projs", "down_projs")
        assert [shape[0] for shape in shapes] == [e], key
        assert (*spec, None)[:2] == (axis, "data" if cut else None), key


def test_shard_experts_over_another_mesh_moves_every_bit(facts):
    spec, values = facts["two axes"]
    assert spec == ("ep", None, None)
    for name, value in problem("unused").parameters.items():
        np.testing.assert_array_equal(values[name], np.float32(value))


def test_init_weights_leaves_the_parameters_on_the_mesh(facts):
    assert facts["drawn"] == {("ep", None, None), ("ep", None)}


def test_modules_built_under_jit_or_without_memory_or_as_a_stack_lie_on_the_mesh(facts):
    assert facts["built under jit"] == {(2, 8, 16)} and facts["built under jit, explicit"] == {(4, 8, 16)}
    assert facts["bare"] == ("ep", None, None)
    assert {spec[:2] for spec in facts["stack"]} == {(None, "devices")}


# --------------------------------------------------------------------------------------------------------------- calls
def test_a_call_without_jit_is_the_jitted_one(facts, found):
    np.testing.assert_array_equal(facts["eager"], found["one_axis", "unused"]["y"])


def test_a_call_without_tokens_returns_none(facts):
    assert facts["none"] == (0, 16)


def test_copied_and_merged_modules_share_the_compilation(facts, found):
    copies, compilations = facts["copies"]
    for y in copies:
        np.testing.assert_array_equal(y, found["one_axis", "unused"]["y"])
    in_train = {(name, problem(situation).config) for name, situation in CASES if name != "nnx"}
    assert compilations == len(in_train)


def test_a_tap_over_a_mesh_sees_the_output_alone(facts):
    assert facts["taps"] == [("combine", (TOKENS, 16))]


def test_no_two_devices_compute_the_same_tokens(facts):
    """Two devices with 3 tokens each, of 12 with those that fill up, share the experts: room for 6 tokens of K = 2."""
    assert facts["rows"] == [6 * 2]


def test_deepep_over_a_mesh_chooses_a_dispatcher_that_flax_has(facts):
    assert facts["dispatcher"] == ("AllGather(axis='devices', combine_dtype=None)", 4, 0)


# --------------------------------------------------------------------------------------------------------------- bound
def due_to_drop(bound):
    """[T] routes that find no room where each of four devices sends each `bound` tokens."""
    p, e = problem("unused"), E // 4
    dropped = np.zeros(TOKENS, int)
    for start, end in ((0, 3), (3, 6), (6, 9), (9, 10)):
        for rank in range(4):
            routes = ((p.ids[start:end] // e == rank) & p.token_mask[start:end, None]).sum(1)
            late = np.cumsum(routes > 0) > bound
            dropped[start:end] += routes * late
    return dropped


def test_a_module_with_too_small_a_bound_counts_and_records_what_it_drops(facts):
    dropped, recorded, y = facts["dropped"]
    np.testing.assert_array_equal(dropped, due_to_drop(1))
    assert recorded == due_to_drop(1).sum() > 0
    exact, limits = expected("unused", FOUR)
    kept = dropped == 0
    assert within(y[kept], exact["y"][kept], limits["y"]) and not np.isnan(y).any()


def test_a_linen_module_with_too_small_a_bound_sows_what_it_drops(facts):
    sown, y = facts["sown"]
    assert sown == facts["dropped"][1] > 0
    np.testing.assert_array_equal(y, facts["dropped"][2])


def test_a_module_that_poisons_makes_what_it_drops_nan_and_records_nothing(facts):
    lost, recorded = facts["poisoned"]
    np.testing.assert_array_equal(lost, due_to_drop(1) > 0)
    assert recorded is None


def test_a_module_without_a_bound_drops_nothing(facts):
    np.testing.assert_array_equal(facts["roomy"], np.zeros(TOKENS))


# ------------------------------------------------------------------------------------------------------------ refusals
REFUSALS = {
    "no dispatcher": ("ConfigError", r"over the mesh \{'devices': 4\}", "call init_token_dispatcher"),
    "another mesh": ("ConfigError", r"over the mesh \{'data': 2, 'ep': 2\}", "call init_token_dispatcher"),
    "no experts": ("ConfigError", "the experts of a MoE", "pass the experts module, as moe.experts"),
    "abstract": ("ConfigError", "an AbstractMesh, which has none", "pass a jax.sharding.Mesh"),
    "6 over 4": ("ConfigError", "6 experts over 4 ranks", "divides the experts"),
    "shape": ("ShapeError", r"token_mask of shape \[10\]", "one entry per token"),
    "devices": ("ShapeError", "x on ", "jax.device_put"),
    "values": ("RoutingError", "nan.* at token 0", "look at the router"),
    "length": ("ConfigError", "a shard_map over 2 devices of that name", "shard_experts"),
    "checked": ("Unsupported", "inside of a shard_map over data", "check_vma=False"),
    "bound": ("ConfigError", "dispatcher_bound=2 with the dispatcher 'allgather'", 'name "alltoall"'),
    "overflow": ("ConfigError", "bound=2 of 3 tokens", "set on_overflow"),
    "deepep": ("Unsupported", "it is PyTorch's alone", "name another of .*'allgather', 'alltoall'"),
    "uccl_ep": ("Unsupported", "it is PyTorch's alone", "name another of"),
    "hybridep": ("Unsupported", "it is PyTorch's alone", "name another of"),
    "local": ("Unsupported", "the experts lie on 4 ranks", "name another of"),
    "mok": ("Unsupported", "this version does not have it yet", "name another of"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_a_mesh_cannot_do_is_refused_in_words(facts, name):
    kind, words, do = REFUSALS[name]
    found, text = facts["errors"][name]
    assert found == kind, text
    assert re.search(words, text) and re.search(f"do: .*{do}", text), text


def test_the_lines_of_the_readme_run_and_agree_with_reference(facts):
    outputs, values, config = facts["readme"]
    p = problem("unused")
    own = {name: getattr(p, name)[:8] for name in ("x", "token_mask", "weights", "ids", "dy")}
    p = p.but(**own, parameters=values, config=config)
    run = partial(reference_over_ranks, p, (2, 2, 2, 2))
    exact = run(EXACT)
    limit = bounds(run, exact, "float32")["y"]
    assert np.abs(exact["y"]).max() > 0
    for y in outputs:
        assert within(y.astype(float), exact["y"], limit)
