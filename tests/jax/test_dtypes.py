"""dtypes by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moebius.core import ConfigError
from moebius.jax_frontend.dtypes import accumulate_dtype, as_dtype


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
