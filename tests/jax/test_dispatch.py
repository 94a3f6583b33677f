"""Steps 3 and 9 on one rank."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moebius.core import Unsupported
from moebius.core.registry import Problem
from moebius.jax_frontend import Local
from moebius.jax_frontend.dispatch import DISPATCHERS


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


@pytest.mark.parametrize("name", DISPATCHERS.names)
def test_dispatchers_over_several_ranks_are_refused_until_built(name):
    sizes = {"dtype": "float32", "dim": 2, "inter_dim": 2, "n_experts": 4}
    problem = Problem(device="cpu", **sizes)
    assert DISPATCHERS.implementation(DISPATCHERS.choose(name, problem)) is Local
    with pytest.raises(Unsupported, match="2 ranks"):
        DISPATCHERS.choose(name, Problem(device="cpu", ranks=2, **sizes))
