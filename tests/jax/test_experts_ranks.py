"""The experts over four devices, inside of shard_map: output and every gradient, against the reference's list of ranks.

JAX fixes the number of its devices when it starts, so all cases run in one interpreter of their own.
"""

import os
import pickle
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
from sides import cached_problem, reference_over_ranks

from moebius.core.precision import EXACT
from moebius.core.tolerance import bounds, within

RANKS, TOKENS, E = 4, 24, 8
SIZES = {"tokens": TOKENS, "n_experts": E, "seed": 1}
SETTINGS = {
    "float32": {"expert_bias": True, "k": 3},
    "bfloat16": {"expert_bias": True, "k": 3, "dtype": "bfloat16", "expert_activation": "swigluoai"},
    "weight_after": {"expert_bias": True, "k": 3, "dtype": "float16", "apply_router_weight_after_down": True},
    "k_1": {"k": 1},
    "k_8": {"k": 8},
}


def poison(p):
    """Token 1 is masked, and nothing of it is a number."""
    x, weights, dy = p.x.copy(), p.weights.copy(), p.dy.copy()
    x[1], weights[1], dy[1] = np.nan, np.inf, np.nan
    return masked(p).but(x=x, weights=weights, dy=dy)


def masked(p):
    mask = p.token_mask.copy()
    mask[1] = False
    return p.but(token_mask=mask)


def odd_ids(p):
    ids = p.ids.copy()
    ids[0], ids[1], ids[2, 1], ids[3, 0] = -1, [E, 1, 0], 2**31 - 1, -7
    return p.but(ids=ids)


SITUATIONS = {
    "masked": masked,
    "poison": poison,
    "odd_ids": odd_ids,
    "last_rank": lambda p: p.but(ids=np.full_like(p.ids, E - 1)),
    "all_masked": lambda p: p.but(token_mask=np.zeros_like(p.token_mask)),
}
DISPATCHERS = ("AllGather", "AllToAll", "RaggedAllToAll")
# By every dispatcher; the rest by one, since each takes seconds to compile.
BY_ALL = ("float32", "bfloat16", *SITUATIONS)
# What is done to the experts inside of shard_map, of the first of SETTINGS.
MANNERS = ("unchecked", "checkpoint", "double_backward", "two_layers")
CASES = [(name, kind, "plain") for kind in DISPATCHERS for name in BY_ALL]
CASES += [(name, "AllToAll", "plain") for name in SETTINGS if name not in BY_ALL]
CASES += [("float32", "AllToAll", manner) for manner in MANNERS] + [("k_1", "RaggedAllToAll", "plain")]
CASES += [("float32", "RaggedAllToAll", "unchecked")]


@cache
def problem(name):
    p = cached_problem(**SIZES, **SETTINGS[name if name in SETTINGS else "float32"])
    return SITUATIONS[name](p) if name in SITUATIONS else p


CODE = """
import os, pickle
import jax, jax.numpy as jnp, numpy as np
from functools import partial
from jax.sharding import AxisType, PartitionSpec as P
from moebius.jax_frontend import experts
from moebius.jax_frontend.dispatch_allgather import AllGather
from moebius.jax_frontend.dispatch_alltoall import AllToAll
from moebius.jax_frontend.dispatch_ragged import RaggedAllToAll

mesh = jax.make_mesh((4,), ("ep",), axis_types=(AxisType.Auto,))
cases, found, compiled = pickle.load(open(os.environ["CASES"], "rb")), {}, {}

def over_ranks(dispatcher, manner, config):
    one = partial(experts, config=config, dispatcher=dispatcher, double_backward=manner == "double_backward")
    if manner == "checkpoint":
        one = jax.checkpoint(one)
    if manner == "two_layers":  # both dispatched before either is combined, and half of each
        single = one
        one = lambda p, x, *rest: (single(p, x, *rest) + single(p, x, *rest)) / 2
    return jax.shard_map(one, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"), check_vma=manner != "unchecked")

def train(run):
    def both(parameters, x, mask, weights, ids, dy):
        y, pull = jax.vjp(lambda p, x, w: run(p, x, mask, w, ids), parameters, x, weights)
        grads, dx, dweights = pull(dy)
        return {"y": y, "dx": dx, "dweights": dweights, **grads}
    return jax.jit(both)

for key, (config, arrays) in cases.items():
    name, kind, manner = key
    how = (config, kind, manner)
    if how not in compiled:
        compiled[how] = train(over_ranks(globals()[kind]("ep"), manner, config))
    dtype = config.dtype
    p, x, mask, weights, ids, dy = arrays
    p = {name: jnp.asarray(value, dtype) for name, value in p.items()}
    given = p, jnp.asarray(x, dtype), jnp.asarray(mask), jnp.asarray(weights, jnp.float32), jnp.asarray(ids, jnp.int32)
    out = compiled[how](*given, jnp.asarray(dy, dtype))
    found[key] = {name: np.asarray(value, np.float64) for name, value in out.items()}
pickle.dump(found, open(os.environ["FOUND"], "wb"))
"""


@pytest.fixture(scope="session")
def found(run_alone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    given = {}
    for name, kind, manner in CASES:
        p = problem(name)
        ids = np.where(np.abs(p.ids) < 2**31, p.ids, -1)
        given[name, kind, manner] = p.config, (p.parameters, p.x, p.token_mask, p.weights, ids, p.dy)
    (folder / "cases").write_bytes(pickle.dumps(given))
    places = {"CASES": str(folder / "cases"), "FOUND": str(folder / "found")}
    run_alone(CODE, XLA_FLAGS="--xla_force_host_platform_device_count=4", **places)
    return pickle.loads(Path(places["FOUND"]).read_bytes())


@cache
def expected(name):
    p = problem("masked" if name == "poison" else name)
    run = partial(reference_over_ranks, p, (TOKENS // RANKS,) * RANKS)
    exact = run(EXACT)
    return exact, bounds(run, exact, p.dtype)


@pytest.mark.parametrize("name, kind, manner", CASES, ids=str)
def test_experts_over_devices_agree_with_reference(found, name, kind, manner):
    exact, limits = expected(name)
    answer = found[name, kind, manner]
    assert answer.keys() == exact.keys()
    for key, value in answer.items():
        assert value.shape == exact[key].shape, key
        assert within(value, exact[key], limits[key]), key


@pytest.mark.parametrize("kind", DISPATCHERS)
def test_experts_over_devices_with_poison_in_a_masked_token_are_unchanged_bit_for_bit(found, kind):
    for key, value in found["masked", kind, "plain"].items():
        np.testing.assert_array_equal(found["poison", kind, "plain"][key], value)


@pytest.mark.parametrize("name", BY_ALL)
def test_dispatchers_over_devices_give_the_same_outputs_bit_for_bit(found, name):
    for kind in DISPATCHERS[1:]:
        np.testing.assert_array_equal(found[name, kind, "plain"]["y"], found[name, DISPATCHERS[0], "plain"]["y"])


def test_the_interpreter_was_given_four_devices(found):
    """Else every case above would be refused, and none compared."""
    assert found.keys() == set(CASES) and "device_count" not in os.environ.get("XLA_FLAGS", "")
