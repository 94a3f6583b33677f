"""Backend "ragged_dot": jax.lax.ragged_dot, for comparison and for platforms where XLA has a kernel for it.

On a CPU, and by default on NVIDIA GPUs, XLA multiplies every row by every expert and masks afterwards: the cost grows
with the number of experts, and NaN or inf in one expert's matrix becomes NaN in every row.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from moebius.jax_frontend.dtypes import accumulate_dtype


def product(rows: Array, weight: Array, group_sizes: Array, transposed: bool = False) -> Array:
    """[R, F]; see Kernels.product."""
    inside = _inside(rows, group_sizes)
    out = _ragged_dot(jnp.where(inside, rows, 0), weight, group_sizes, ((1,), (2 if transposed else 1,)), group=(0,))
    return jnp.where(inside, out, 0)


def weight_gradient(rows: Array, dout: Array, group_sizes: Array) -> Array:
    """[e, D, F]; see Kernels.weight_gradient."""
    inside = _inside(rows, group_sizes)
    return _ragged_dot(jnp.where(inside, rows, 0), jnp.where(inside, dout, 0), group_sizes, ((0,), (0,)), group=())


def _inside(rows: Array, group_sizes: Array) -> Array:
    return (jnp.arange(rows.shape[0], dtype=jnp.int32) < jnp.sum(group_sizes, dtype=jnp.int32))[:, None]


def _ragged_dot(
    a: Array, b: Array, group_sizes: Array, contracted: tuple[tuple[int], tuple[int]], group: tuple[int, ...]
) -> Array:
    dimensions = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(contracted, ((), ())), lhs_ragged_dimensions=(0,), rhs_group_dimensions=group
    )
    accumulate = accumulate_dtype(a.dtype)
    out = lax.ragged_dot_general(
        a, b, group_sizes, dimensions, precision=lax.Precision.HIGHEST, preferred_element_type=accumulate
    )
    # Behind a barrier, so that its rounding stays: see Kernels.
    rounded: Array = lax.optimization_barrier(out.astype(a.dtype))
    return rounded
