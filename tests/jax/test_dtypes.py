"""dtypes by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moebius.core import ConfigError
from moebius.jax_frontend.dtypes import accumulate_dtype, as_dtype, promoted


@pytest.mark.parametrize("given", ["bf16", "torch.bfloat16", jnp.bfloat16, jnp.dtype("bfloat16")], ids=str)
def test_as_dtype_takes_a_name_or_any_dtype_object(given):
    assert as_dtype(given) == jnp.bfloat16


def test_as_dtype_of_an_integer_lists_the_choices():
    with pytest.raises(ConfigError, match=r"dtype 'int32'\nfound: the dtypes .*bfloat16"):
        as_dtype("int32")


def test_as_dtype_float64_without_64_bit_numbers_is_refused_not_narrowed():
    with pytest.raises(ConfigError, match=r"float64\nfound: .*\ndo: .*jax_enable_x64"):
        as_dtype("float64")
    with jax.enable_x64(True):
        assert as_dtype("float64") == np.float64


def test_accumulate_dtype_is_at_least_float32():
    found = [accumulate_dtype(dtype) for dtype in (jnp.bfloat16, jnp.float16, jnp.float32, np.float64)]
    assert found == ["float32", "float32", "float32", "float64"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_promoted_rounds_a_value_whose_own_rounding_was_left_out(dtype):
    """What XLA makes of a cast down and up, written out: the wide value posing as the narrow one's cast."""
    wide = jnp.asarray(np.random.default_rng(0).normal(size=1000) * 10.0 ** np.arange(-4, 4).repeat(125), jnp.float32)
    due = np.asarray(wide.astype(dtype).astype(jnp.float32))
    found = np.asarray(promoted(wide.astype(dtype)))
    np.testing.assert_array_equal(found, due)
    text = jax.jit(promoted).lower(wide.astype(dtype)).as_text()
    assert "reduce_precision" in text


def test_promoted_keeps_subnormal_float16_and_rounds_the_gradient():
    small = jnp.asarray([2.0**-24, 3 * 2.0**-24, 2.0**-15 + 2.0**-24], jnp.float16)
    np.testing.assert_array_equal(np.asarray(promoted(small)), np.asarray(small).astype(np.float32))
    _, pullback = jax.vjp(lambda value: promoted(value) * jnp.float32(1.0 + 2.0**-10), jnp.ones(1, jnp.bfloat16))
    assert "reduce_precision" in str(jax.make_jaxpr(pullback)(jnp.ones(1, jnp.float32)))


def test_promoted_of_wide_dtypes_is_the_value_itself():
    value = jnp.asarray([1.0 + 2.0**-23], jnp.float32)
    assert promoted(value).dtype == jnp.float32 and (promoted(value) == value).all()
    assert "reduce_precision" not in str(jax.make_jaxpr(promoted)(value))
