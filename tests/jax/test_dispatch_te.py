"""The dispatcher "te" over four devices, inside of shard_map, against the reference's list of ranks; what it refuses.

The library is a stand-in that refuses what the library does. All cases run in one interpreter of their own.
"""

import pickle
from functools import cache, partial
from pathlib import Path

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sides import cached_problem, reference_over_ranks

from moebius.core.errors import BackendUnavailable, Unsupported
from moebius.core.precision import EXACT
from moebius.core.registry import Problem
from moebius.core.tolerance import bounds, within
from moebius.jax_frontend import dispatch_te
from moebius.jax_frontend.dispatch import DISPATCHERS

RANKS, TOKENS, E = 4, 24, 8
SIZES = {"tokens": TOKENS, "n_experts": E, "dim": 16, "seed": 1, "dtype": "bfloat16"}
SETTINGS = {
    # A smooth one: at the kink of a clamped activation a rounding may turn a gradient off.
    "plain": {"expert_bias": True, "k": 2, "expert_activation": "geglu"},
    "k_1": {"k": 1},
    "k_8": {"k": 8},
}


def masked(p):
    mask = p.token_mask.copy()
    mask[1] = False
    return p.but(token_mask=mask)


def poison(p):
    """Token 1 is masked, and nothing of it is a number."""
    x, weights, dy = p.x.copy(), p.weights.copy(), p.dy.copy()
    x[1], weights[1], dy[1] = np.nan, np.inf, np.nan
    return masked(p).but(x=x, weights=weights, dy=dy)


def odd_ids(p):
    ids = p.ids.copy()
    ids[0], ids[1], ids[3, 0] = -1, [E, 1], -7
    return p.but(ids=ids)


def one_device_has_none(p):
    mask = p.token_mask.copy()
    mask[: TOKENS // RANKS] = False
    return p.but(token_mask=mask)


SITUATIONS = {
    "masked": masked,
    "poison": poison,
    "odd_ids": odd_ids,
    "uneven": one_device_has_none,
    "duplicates": lambda p: p.but(ids=p.ids[:, :1].repeat(2, axis=1)),
    "last_rank": lambda p: p.but(ids=np.full_like(p.ids, E - 1)),
    "all_masked": lambda p: p.but(token_mask=np.zeros_like(p.token_mask)),
}
# Each manner takes seconds to compile.
CASES = [(name, "plain") for name in ("plain", *SITUATIONS)]
CASES += [("k_1", "unchecked"), ("plain", "two layers, checkpointed"), ("k_8", "module")]


@cache
def problem(name):
    p = cached_problem(**SIZES, **SETTINGS[name if name in SETTINGS else "plain"])
    return SITUATIONS[name](p) if name in SITUATIONS else p


CODE = """
import os, pickle, sys
sys.path.insert(0, os.environ["SUPPORT"])
import jax, jax.numpy as jnp, numpy as np
from functools import partial
from flax import nnx
from fakes import transformer_engine_ep_jax as library
from jax.sharding import AxisType, PartitionSpec as P
from moebius.core import BackendConfig, MoEError
from moebius.jax_frontend import GroupedExpertsTE, MoE, dispatch_te, experts, load_parameters

library.install()
dispatch_te.supports = lambda problem: None  # of the CPU too
dispatch_te.load()
mesh = jax.make_mesh((4,), ("ep",), axis_types=(AxisType.Auto,))
with open(os.environ["CASES"], "rb") as file:
    cases, found, compiled, facts = pickle.load(file), {}, {}, {}

def said(call):
    try:
        call()
    except MoEError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"

def over_ranks(manner, config):
    one = partial(experts, config=config, dispatcher=dispatch_te.TE("ep"))
    if manner == "two layers, checkpointed":  # both dispatched before either is combined, and half of each
        single = one
        one = jax.checkpoint(lambda p, x, *rest: (single(p, x, *rest) + single(p, x, *rest)) / 2)
    return jax.shard_map(one, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"), check_vma=manner != "unchecked")

def train(run):
    def both(parameters, x, mask, weights, ids, dy):
        y, pull = jax.vjp(lambda p, x, w: run(p, x, mask, w, ids), parameters, x, weights)
        grads, dx, dweights = pull(dy)
        return {"y": y, "dx": dx, "dweights": dweights, **grads}
    return jax.jit(both)

def of_module(config):
    zeros = {"kernel_init": nnx.initializers.zeros, "rngs": nnx.Rngs(0)}
    module = GroupedExpertsTE(config, BackendConfig(experts="loop"), dispatcher_backend="te", **zeros)
    module.init_token_dispatcher(mesh)
    backend = BackendConfig(experts="loop", dispatcher="te")
    layer = nnx.eval_shape(lambda: MoE(config, backend, mesh=mesh, rngs=nnx.Rngs(0)))
    facts["modules"] = [repr(module.token_dispatcher), repr(layer.experts._dispatcher())]
    graph, own, rest = nnx.split(module, nnx.Param, ...)
    def run(parameters, *tokens):
        called = nnx.merge(graph, own, rest, copy=True)
        load_parameters(called, parameters)
        return called(*tokens)
    return run

def boot(k, **changes):
    dispatch_te.bootstrap(mesh, **{"n_experts": 8, "k": k, "dim": 16, "max_tokens": 6, **changes})

def sent(dtype="bfloat16", dim=16, k=8, tokens=24, n_experts=8):
    x, ids = jnp.zeros((tokens, dim), dtype), jnp.zeros((tokens, k), "int32")
    dispatch = lambda *given: dispatch_te.TE("ep").dispatch(*given, n_experts)[0]
    over = jax.shard_map(dispatch, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
    jax.eval_shape(over, x, jnp.zeros((tokens, k)), ids, jnp.ones(tokens, bool))

facts["before"] = said(sent)
made_for = None
for key in sorted(cases, key=lambda key: cases[key][1][4].shape[1]):
    config, (p, x, mask, weights, ids, dy) = cases[key]
    if ids.shape[1] != made_for:
        if made_for is not None:
            dispatch_te.finalize()
            compiled.clear()
        made_for = ids.shape[1]
        boot(made_for)
    how = config, key[1]
    if how not in compiled:
        compiled[how] = train(of_module(config) if key[1] == "module" else over_ranks(key[1], config))
    p = {name: jnp.asarray(value, "bfloat16") for name, value in p.items()}
    given = p, jnp.asarray(x, "bfloat16"), jnp.asarray(mask), jnp.asarray(weights, "float32"), jnp.asarray(ids, "int32")
    library.CALLS.clear()
    out = compiled[how](*given, jnp.asarray(dy, "bfloat16"))
    if key == ("plain", "plain"):
        facts["calls"] = [call for call in library.CALLS]
    found[key] = {name: np.asarray(value, np.float64) for name, value in out.items()}

for name, value in {"dtype": "float32", "dim": 24, "k": 2, "tokens": 36, "n_experts": 16}.items():
    facts[f"sent {name}"] = said(lambda: sent(**{name: value}))
facts["sent"] = said(sent)

def there_and_back(x, weights, ids):
    sent, state = dispatch_te.TE("ep").dispatch(x, weights, ids, jnp.ones(len(x), bool), 8)
    return dispatch_te.TE("ep").combine(sent.x_SD * sent.weights_SK, state)

over = jax.shard_map(there_and_back, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
none = jnp.zeros((0, 16), "bfloat16"), jnp.zeros((0, 8)), jnp.zeros((0, 8), "int32")
gradients = jax.jit(lambda *given: jax.vjp(lambda x, weights: over(x, weights, given[2]), *given[:2])[1](given[0]))
facts["no token"] = [value.shape for value in gradients.lower(*none).out_info]
facts["twice"] = said(lambda: boot(8))
dispatch_te.finalize()
for name, change in {"dim": {"dim": 12}, "power": {"n_experts": 12}}.items():
    facts[f"made {name}"] = said(lambda: boot(2, **change))
facts["made k"] = said(lambda: boot(9))
mesh = jax.make_mesh((1,), ("ep",), axis_types=(AxisType.Auto,))
facts["made alone"] = said(lambda: boot(2))
with open(os.environ["FOUND"], "wb") as file:
    pickle.dump((found, facts), file)
"""


@pytest.fixture(scope="session")
def outcome(run_alone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("te")
    given = {}
    for name, manner in CASES:
        p = problem(name)
        given[name, manner] = p.config, (p.parameters, p.x, p.token_mask, p.weights, p.ids, p.dy)
    (folder / "cases").write_bytes(pickle.dumps(given))
    places = {"CASES": str(folder / "cases"), "FOUND": str(folder / "found")}
    places["SUPPORT"] = str(Path(fakes.__file__).parents[1])
    run_alone(CODE, XLA_FLAGS="--xla_force_host_platform_device_count=4", **places)
    return pickle.loads(Path(places["FOUND"]).read_bytes())


@cache
def expected(name):
    p = problem("masked" if name == "poison" else name)
    run = partial(reference_over_ranks, p, (TOKENS // RANKS,) * RANKS)
    exact = run(EXACT)
    return exact, bounds(run, exact, p.dtype)


@pytest.mark.parametrize("name, manner", CASES, ids=str)
def test_experts_over_devices_by_te_agree_with_reference(outcome, name, manner):
    exact, limits = expected(name)
    answer = outcome[0][name, manner]
    assert answer.keys() == exact.keys()
    for key, value in answer.items():
        assert value.shape == exact[key].shape, key
        assert within(value, exact[key], limits[key]), key


def test_gradients_go_by_the_handle_of_the_forward_pass(outcome):
    assert outcome[1]["calls"] == ["prepare", "dispatch", "combine", "combine_bwd", "dispatch_bwd"]


def test_modules_whose_dispatcher_is_named_te_send_by_it(outcome):
    assert outcome[1]["modules"] == ["TE(axis='ep', combine_dtype=None)"] * 2


def test_no_token_on_any_device_has_empty_gradients(outcome):
    assert outcome[1]["no token"] == [(0, 16), (0, 8)]


@pytest.mark.parametrize(
    "name, words",
    [
        (
            "before",
            "ConfigError: asked: dispatch backend 'te' of [6, 16], E=8, K=8, 4 ranks\nfound: Transformer Engine's",
        ),
        ("sent dtype", "DTypeError: asked: dispatch backend 'te' of [6, 16], E=8, K=8, 4 ranks in bfloat16"),
        (
            "sent dim",
            "found: it was made for D=16, E=8, K=8, 4 ranks, 8 tokens\ndo: call moebius.jax_frontend.dispatch",
        ),
        ("sent k", "dispatch backend 'te' of [6, 16], E=8, K=2, 4 ranks\nfound: it was made for D=16, E=8, K=8"),
        ("sent tokens", "dispatch backend 'te' of [9, 16], E=8, K=8, 4 ranks\nfound: it was made for D=16, E=8, K=8"),
        ("sent n_experts", "of [6, 16], E=16, K=8, 4 ranks\nfound: it was made for D=16, E=8, K=8"),
        ("sent", "nothing was raised"),
        ("twice", "found: it was made before, once for this process\ndo: call finalize() first"),
        ("made dim", "Unsupported: asked: Transformer Engine's EP for D=12, E=8, K=2, 4 ranks\nfound: it takes hidden"),
        ("made power", "found: it takes a power of two of experts on a rank, not 3"),
        ("made k", "found: it takes K up to 8, not 9"),
        ("made alone", "found: it takes 2 ranks or more, not 1"),
    ],
)
def test_what_the_library_was_not_made_for_is_refused_in_words(outcome, name, words):
    assert words in outcome[1][name], outcome[1][name]


def on_gpus(**changes):
    usual = {"device": "cuda", "dtype": "bfloat16", "dim": 64, "inter_dim": 32, "n_experts": 4, "ranks": 2}
    return Problem(**{**usual, **changes})


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"device": "cpu"}, "Transformer Engine's EP needs CUDA, not cpu"),
        ({"dtype": "float32"}, "it sends bfloat16 alone"),
        ({"capability": (8, 0)}, "it needs compute capability 9.0"),
        ({"dim": 68}, "it takes hidden sizes that are multiples of 8, not 68"),
        ({"n_experts": 6}, "it takes a power of two of experts on a rank, not 6"),
        ({"n_experts": 1}, "it takes numbers of experts that are multiples of 4, not 2"),
    ],
)
def test_supports_names_the_limit(changes, words):
    assert dispatch_te.supports(on_gpus()) is None
    assert dispatch_te.supports(on_gpus(ranks=1, device="cpu", dim=7)) is None
    assert dispatch_te.supports(on_gpus(**changes)) == words


def test_te_adds_nothing_but_bfloat16_and_is_chosen_only_where_it_is_named():
    with pytest.raises(Unsupported, match="combine_dtype='float32'\nfound: 'te' adds bfloat16 alone"):
        dispatch_te.TE("ep", "float32")
    assert DISPATCHERS["te"].only_when_named


@pytest.mark.parametrize(
    "can, words",
    [(lambda: False, "2.20.2: no NCCL EP, or NCCL is too old"), (lambda: True, "2.20.2 has no EpPrepare, EpDispatch,")],
)
def test_load_of_a_package_that_lacks_something_says_what(monkeypatch, can, words):
    parts = (
        "transformer_engine.jax",
        "transformer_engine.jax.cpp_extensions",
        "transformer_engine.jax.cpp_extensions.ep",
    )
    package = {"__version__": "2.20.2", "is_nccl_ep_available": can}
    fakes.install(monkeypatch, {"transformer_engine": package, **{name: {} for name in parts}})
    with pytest.raises(BackendUnavailable) as caught:
        dispatch_te.load()
    assert words in str(caught.value)


def test_once_each_adds_the_weights_of_an_expert_named_twice_and_drops_those_that_go_nowhere():
    weights = jnp.array([[1.0, 2.0, 4.0], [jnp.nan, jnp.inf, 3.0], [5.0, 6.0, 7.0]])
    ids = jnp.array([[2, 0, 2], [-1, -1, 1], [3, 3, 3]])
    found, pull = jax.vjp(lambda weights: dispatch_te.once_each(weights, ids)[0], weights)
    assert dispatch_te.once_each(weights, ids)[1].tolist() == [[2, 0, -1], [-1, -1, 1], [3, -1, -1]]
    assert found.tolist() == [[5, 2, 0], [0, 0, 3], [18, 0, 0]]
    (grad,) = pull(jnp.array([[1.0, 10.0, jnp.nan], [jnp.nan, jnp.nan, 7.0], [9.0, jnp.nan, jnp.nan]]))
    assert grad.tolist() == [[1, 10, 1], [0, 0, 7], [9, 9, 9]]
