"""dtypes of this framework for the names that core uses."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moebius.core import precision
from moebius.core.errors import ConfigError


def as_dtype(dtype: Any) -> np.dtype:
    """The NumPy dtype, which JAX uses, of a name or of any framework's dtype object.

    Raises:
        ConfigError: not one of the four floating dtypes, or float64 where JAX would narrow it to float32.
    """
    name = precision.dtype_name(dtype)
    if jax.dtypes.canonicalize_dtype(name) != name:
        raise ConfigError(
            "dtype float64", "jax without 64-bit numbers", 'jax.config.update("jax_enable_x64", True) first'
        )
    found: np.dtype = jnp.dtype(name)
    return found


def accumulate_dtype(dtype: Any) -> np.dtype:
    """promote_types(dtype, float32): where sums, activations and weights are computed."""
    promoted: np.dtype = jnp.promote_types(dtype, jnp.float32)
    return promoted
