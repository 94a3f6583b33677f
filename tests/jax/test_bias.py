"""Steps 5 and 7: each expert's bias."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moebius.core import reference
from moebius.jax_frontend import add_bias

SIZES, F, R = np.array([3, 0, 4, 2]), 5, 12
OWNER = np.repeat(np.arange(5), [*SIZES, R - SIZES.sum()])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_add_bias_and_its_gradients_agree_with_reference(agree, wide, cast, draws, dtype, weighted):
    draw, n, promoted = draws(0), int(SIZES.sum()), "float64" if dtype == "float64" else "float32"
    out, bias, dout = draw((R, F), dtype), draw((4, F), dtype), draw((R, F), dtype)
    weights = draw((R,), promoted)
    out[n:] = 0
    dout[n:] = np.nan
    with wide(dtype):
        args = [*cast(dtype, out, bias), *(cast(promoted, weights) if weighted else ())]

        @jax.jit
        def both(dout, *args):
            owner = jnp.asarray(OWNER, jnp.int32)
            value, pull = jax.vjp(lambda out, bias, *weights: add_bias(out, bias, owner, *weights), *args)
            return value, *pull(dout)

        value, _, dbias, *dweights = both(*cast(dtype, dout), *args)
    assert value.dtype == dtype and not value[n:].any(), "padding rows get no bias"
    given = weights[:n] if weighted else None

    def exact(arithmetic):
        slopes = reference.add_bias_vjp(bias, SIZES, dout[:n], given, arithmetic)
        exact_value = reference.add_bias(out[:n], bias, SIZES, given, arithmetic)
        return {"out": exact_value, "dbias": slopes[0]} | ({"dweights": slopes[1]} if weighted else {})

    found = {"out": value[:n], "dbias": dbias} | ({"dweights": dweights[0][:n]} if weighted else {})
    agree(found, exact, dtype)


def test_add_bias_gradient_of_bfloat16_rounds_once():
    dout = jnp.ones((258, 1), jnp.bfloat16)  # counted up in bfloat16 it would stop at 256
    owner = jnp.zeros(258, jnp.int32)
    run = lambda bias: add_bias(jnp.zeros((258, 1), jnp.bfloat16), bias, owner)  # noqa: E731
    (dbias,) = jax.jit(lambda bias, dout: jax.vjp(run, bias)[1](dout))(jnp.zeros((2, 1), jnp.bfloat16), dout)
    np.testing.assert_array_equal(dbias, [[258.0], [0.0]])


def test_add_bias_without_one_returns_the_rows_themselves():
    out = jnp.ones((3, 2))
    assert add_bias(out, None, jnp.zeros(3, jnp.int32)) is out
