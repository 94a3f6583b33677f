"""Checks of devices and values. The refusals that both frontends share are in tests/cross."""

import jax
import jax.numpy as jnp
import pytest

from moebius.core import RoutingError
from moebius.jax_frontend.checks import check_devices, check_values

MASK = jnp.array([True, True, False])


def test_check_values_names_the_first_bad_token():
    weights, ids = jnp.ones((3, 2)), jnp.array([[0, 1], [-1, 3], [9, 9]], jnp.int32)
    check_values(weights, ids, MASK, 4)
    with pytest.raises(RoutingError, match=r"finite weights\nfound: .*token 1"):
        check_values(weights.at[1, 0].set(jnp.nan), ids, MASK, 4)
    with pytest.raises(RoutingError, match=r"ids in \[-1, 3\)\nfound: \[-1, 3\] at token 1"):
        check_values(weights, ids, MASK, 3)


def test_check_values_reads_bfloat16():
    check_values(jnp.ones((3, 2), jnp.bfloat16), jnp.zeros((3, 2), jnp.int32), MASK, 4)


def test_check_values_while_tracing_has_no_values_and_says_nothing():
    ids = jnp.full((3, 2), 99, jnp.int32)

    def run(weights):
        check_values(weights, ids, MASK, 4)
        return weights

    jax.jit(run)(jnp.full((3, 2), jnp.nan))


def test_check_devices_passes_arrays_that_jax_may_still_move():
    here = jax.devices()[0]
    check_devices(x=jnp.ones(3), placed=jax.device_put(jnp.ones(3), here))
    jax.jit(lambda x: check_devices(x=x, y=x) or x)(jnp.ones(3))
