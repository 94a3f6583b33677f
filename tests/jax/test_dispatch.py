"""Steps 3 and 9 on one rank, and which dispatcher a name means over several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moebius.core import BackendConfig, ConfigError, MoEConfig, Unsupported, config
from moebius.core.registry import Problem
from moebius.jax_frontend import GroupedExperts, GroupedExpertsDeepEP, Local
from moebius.jax_frontend.dispatch import DISPATCHERS
from moebius.jax_frontend.dispatch_allgather import AllGather
from moebius.jax_frontend.dispatch_alltoall import AllToAll
from moebius.jax_frontend.dispatch_ragged import RaggedAllToAll
from moebius.jax_frontend.dispatch_ranks import choose_dispatcher


def test_local_turns_every_id_without_a_route_into_the_first_past_the_end():
    ids = jnp.array([[0, 3], [-1, 4], [2, -7], [1, 2**31 - 1]], jnp.int32)
    mask = jnp.array([True, True, False, True])
    sent, state = Local().dispatch(jnp.zeros((4, 2)), jnp.ones((4, 2)), ids, mask, 4)
    np.testing.assert_array_equal(sent.ids_SK, [[0, 3], [4, 4], [4, 4], [1, 4]])
    assert state is None and sent.ids_SK.dtype == jnp.int32


def test_local_compares_int64_ids_before_it_narrows_them():
    with jax.enable_x64(True):
        ids = jnp.array([[2**32, 2**32 + 1, 1]], jnp.int64)
        sent, _ = Local().dispatch(jnp.zeros((1, 2)), jnp.ones((1, 3)), ids, jnp.ones(1, bool), 4)
        np.testing.assert_array_equal(sent.ids_SK, [[4, 4, 1]])
        assert sent.ids_SK.dtype == jnp.int32


@pytest.mark.parametrize("x, weights, out", [("bfloat16", "bfloat16", "float32"), ("float16", "float32", "float32")])
def test_local_promotes_weights_and_returns_their_gradient_in_their_dtype(x, weights, out):
    args = jnp.zeros((3, 2), jnp.int32), jnp.ones(3, bool), 4

    def run(weights):
        sent, _ = Local().dispatch(jnp.zeros((3, 2), x), weights, *args)
        assert sent.weights_SK.dtype == out
        return sent.weights_SK.sum()

    assert jax.grad(run)(jnp.ones((3, 2), weights)).dtype == weights


def test_local_combine_returns_what_it_is_given():
    y = jnp.ones((3, 2))
    assert Local().combine(y, None) is y


def test_local_objects_are_equal_so_that_two_layers_share_a_compilation():
    assert Local() == Local() and hash(Local()) == hash(Local())


def problem(ranks):
    return Problem(device="cpu", dtype="float32", dim=2, inter_dim=2, n_experts=4, ranks=ranks)


@pytest.mark.parametrize("name", [name for name in DISPATCHERS.names if not DISPATCHERS[name].needs])
def test_dispatchers_of_one_rank_are_local(name):
    assert DISPATCHERS.implementation(DISPATCHERS.choose(name, problem(1)))(None, "float32") == Local()


@pytest.mark.parametrize(
    "name, kind", [("allgather", AllGather), ("alltoall", AllToAll), ("ragged_all_to_all", RaggedAllToAll)]
)
def test_dispatchers_over_ranks_are_made_of_their_axis_and_settings(name, kind):
    made = DISPATCHERS.implementation(DISPATCHERS.choose(name, problem(4)))
    assert made("ep", "float32") == kind("ep", "float32")


def test_alltoall_is_made_of_its_bound():
    made = DISPATCHERS.implementation(DISPATCHERS["alltoall"])
    assert made("ep", None, bound=3, on_overflow="count") == AllToAll("ep", None, 3, "count")


def test_local_over_ranks_is_refused():
    with pytest.raises(Unsupported, match="it moves nothing, and the experts lie on 2 ranks"):
        DISPATCHERS.choose("local", problem(2))


@pytest.mark.parametrize("name", sorted(set(config.DISPATCHERS) - set(DISPATCHERS.names) - {"torch"}))
@pytest.mark.parametrize("ranks", [1, 2])
def test_dispatchers_that_flax_does_not_have_are_refused_in_words(name, ranks):
    why = "does not have it yet" if name == "mok" else "it is PyTorch's alone"
    with pytest.raises(
        Unsupported, match=f"'{name}' of moebius.jax_frontend.*\n.*{why}\ndo: name another of .*allgather"
    ):
        DISPATCHERS.choose(name, problem(ranks))


# -------------------------------------------------------------------------------------------------------------- choice
def chosen(name, ranks=4, k=2, **backend):
    return choose_dispatcher(name, problem(ranks), k, "ep" if ranks > 1 else None, BackendConfig(**backend))


def test_none_is_local_on_one_rank_and_allgather_over_several_whatever_k():
    """Blocks of a static size move as much by alltoall without a bound, so it is not chosen unnamed."""
    assert chosen(None, ranks=1) == Local()
    assert {chosen(None, ranks, k) for ranks, k in [(2, 8), (8, 2), (64, 1)]} == {AllGather("ep")}


def test_a_bound_chooses_alltoall_and_is_its_own():
    bound = {"dispatcher_bound": 4, "dispatcher_on_overflow": "poison"}
    for name in (None, "alltoall"):
        assert chosen(name, **bound) == AllToAll("ep", None, 4, "poison")
    assert chosen(None, ranks=1, **bound) == Local()
    with pytest.raises(ConfigError, match="dispatcher_bound=4 with the dispatcher 'allgather'"):
        chosen("torch", **bound)


def test_the_originals_name_torch_means_allgather_and_settings_are_handed_on():
    assert chosen("torch", combine_dtype="float32") == AllGather("ep", "float32")
    assert chosen("alltoall") == AllToAll("ep")


SIZES = {"n_routed_experts": 4, "n_activated_experts": 2, "dim": 8, "moe_inter_dim": 6, "dtype": "float32"}


@pytest.mark.parametrize("module", [GroupedExperts, GroupedExpertsDeepEP])
def test_modules_told_what_of_an_overflow_that_cannot_be_refuse_when_built(module):
    backend = BackendConfig(experts="loop", dispatcher_on_overflow="count")
    with pytest.raises(ConfigError, match="dispatcher_on_overflow='count'\nfound: no dispatcher_bound"):
        module(MoEConfig(**SIZES), backend, rngs=nnx.Rngs(0))


def test_modules_with_a_bound_on_one_rank_refuse_as_soon_as_that_is_known():
    backend, words = BackendConfig(experts="loop", dispatcher_bound=4), "dispatcher_bound=4 on one rank\nfound: nothing"
    one = jax.make_mesh((1,), ("ep",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(ConfigError, match=words):
        GroupedExperts(MoEConfig(**SIZES), backend, mesh=one, rngs=nnx.Rngs(0))
    module = GroupedExpertsDeepEP(MoEConfig(**SIZES), backend, rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match=words):
        module.init_token_dispatcher(one)
    module = GroupedExperts(MoEConfig(**SIZES), backend, rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match=words):
        module(jnp.ones((2, 8)), jnp.ones(2, bool), jnp.ones((2, 2)), jnp.zeros((2, 2), jnp.int32))
