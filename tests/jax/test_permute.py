"""Steps 4 and 8: rows sorted by expert, and back."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moebius.core import reference
from moebius.jax_frontend import Local, permute, unpermute

T, K, E, D = 7, 3, 4, 5
MASK = np.arange(T) != 2
IDS = np.array([[1, 0, 3], [0, 0, 1], [0, 1, 2], [3, -1, 1], [4, 9, -5], [3, 1, 0], [1, 3, 0]])


@partial(jax.jit, static_argnums=4)
def sent_and_permuted(x, weights, ids, mask, n):
    return permute(Local().dispatch(x, weights, ids, mask, n)[0], n)


def test_permute_sorts_stably_by_expert_token_and_slot():
    """The example of NeMo Automodel's tests, specified in moebius' core: experts 1 and 2 of 4 are held here."""
    ids = np.array([[0, 1], [1, 2], [2, 3], [3, 0], [0, 2], [1, 3]]) - 1
    mask = jnp.array([True] * 5 + [False])
    found = sent_and_permuted(jnp.zeros((6, 2)), jnp.ones((6, 2)), jnp.asarray(ids, jnp.int32), mask, 2)
    np.testing.assert_array_equal(found.group_sizes_e, [2, 3])
    np.testing.assert_array_equal(found.state.slot_of_row_R[:5] // 2, [0, 1, 1, 2, 4])
    slot_of_row = np.argsort(np.asarray(found.state.row_of_slot_SK).reshape(-1))
    np.testing.assert_array_equal(slot_of_row[:5], [1, 2, 3, 4, 9])
    np.testing.assert_array_equal(found.row_experts_R, [0, 0, 1, 1, 1] + [2] * 7)
    np.testing.assert_array_equal(found.row_weights_R, [1] * 5 + [0] * 7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_permute_and_its_gradients_agree_with_reference(agree, wide, cast, draws, dtype):
    draw = draws(0)
    weights_dtype = "float64" if dtype == "float64" else "float32"
    x, weights, drows = draw((T, D), dtype), draw((T, K), weights_dtype), draw((T * K, D), dtype)
    dweights = draw((T * K,), weights_dtype)
    wanted = reference.permute(x, weights, IDS, MASK, E)
    n = len(wanted.rows_RD)
    drows[n:], dweights[n:] = 0, np.nan  # the contract of the matmul, and what a poisoned padding row gives

    def run(x, weights):
        found = sent_and_permuted(x, weights, jnp.asarray(IDS, jnp.int32), jnp.asarray(MASK), E)
        return (found.rows_RD, found.row_weights_R), found

    with wide(dtype):
        args = *cast(dtype, x), *cast(weights_dtype, weights)

        @jax.jit
        def both(args, grads):
            values, pull, found = jax.vjp(run, *args, has_aux=True)
            return *values, found, *pull(grads)

        rows, row_weights, found, dx, dweights_TK = both(args, (*cast(dtype, drows), *cast(weights_dtype, dweights)))
    np.testing.assert_array_equal(rows[:n], wanted.rows_RD)
    np.testing.assert_array_equal(row_weights[:n], wanted.row_weights_R)
    assert not row_weights[n:].any()
    np.testing.assert_array_equal(found.group_sizes_e, wanted.group_sizes_e)
    assert {str(a.dtype) for a in (*found.state, found.group_sizes_e, found.row_experts_R)} == {"int32"}

    def exact(arithmetic):
        names = ("dx", "dweights")
        return dict(zip(names, reference.permute_vjp(wanted, drows[:n], dweights[:n], arithmetic), strict=True))

    agree({"dx": dx, "dweights": dweights_TK}, exact, dtype)


def test_permute_gradient_of_bfloat16_tokens_rounds_once():
    """1 + 2^-8 + 2^-8 summed in bfloat16 steps stays 1."""
    ids = jnp.zeros((1, 3), jnp.int32)
    dout = jnp.array([[1.0], [2.0**-8], [2.0**-8]], jnp.bfloat16)
    rows = lambda x: sent_and_permuted(x, jnp.ones((1, 3)), ids, jnp.ones(1, bool), 1).rows_RD  # noqa: E731
    (dx,) = jax.jit(lambda x, dout: jax.vjp(rows, x)[1](dout))(jnp.ones((1, 1), jnp.bfloat16), dout)
    assert dx[0, 0] == 1 + 2.0**-7


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_unpermute_and_its_gradients_agree_with_reference(agree, wide, cast, draws, dtype, weighted):
    draw, promoted = draws(1), "float64" if dtype == "float64" else "float32"
    out, dy = draw((T * K, D), dtype), draw((T, D), dtype)
    weights = draw((T * K,), promoted)
    exact_state = reference.permute(np.zeros((T, D)), np.zeros((T, K)), IDS, MASK, E)
    n = len(exact_state.rows_RD)
    out[n:], weights[n:] = 0, 0
    with wide(dtype):
        ids = jnp.asarray(IDS, jnp.int32)
        state = sent_and_permuted(*cast(dtype, np.zeros((T, D)), np.zeros((T, K))), ids, jnp.asarray(MASK), E).state

        @jax.jit
        def both(dy, *args):
            y, pull = jax.vjp(lambda out, *weights: unpermute(out, state, *weights), *args)
            return y, *pull(dy)

        y, dout, *dweights = both(*cast(dtype, dy, out), *(cast(promoted, weights) if weighted else ()))
    assert y.dtype == dout.dtype == dtype
    given = weights[:n] if weighted else None

    def exact(arithmetic):
        value = reference.unpermute(out[:n], exact_state, given, arithmetic)
        slopes = reference.unpermute_vjp(out[:n], exact_state, dy, given, arithmetic)
        return {"y": value, "dout": slopes[0]} | ({"dweights": slopes[1]} if weighted else {})

    found = {"y": y, "dout": dout[:n]} | ({"dweights": dweights[0][:n]} if weighted else {})
    agree(found, exact, dtype)


@pytest.mark.parametrize("shape", [(0, 2), (3, 0)], ids=["no_tokens", "no_slots"])
def test_permute_and_unpermute_of_nothing_are_zero(shape):
    found = sent_and_permuted(
        jnp.ones((shape[0], D)), jnp.ones(shape), jnp.zeros(shape, jnp.int32), jnp.ones(shape[0], bool), E
    )
    assert found.rows_RD.shape == (0, D) and not found.group_sizes_e.any()
    y = unpermute(found.rows_RD, found.state)
    assert y.shape == (shape[0], D) and not y.any()
