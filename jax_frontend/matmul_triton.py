"""Backend "triton": the grouped products of core.kernels, for Hopper; lean_kernels.py fuses them with the activation.

The PyTorch frontend's kernels, with their bits. A weight is read as it lies, in either orientation. Rows past the last
group are never written, so they are set to zero.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from moebius.jax_frontend import launch


def product(rows: Array, weight: Array, group_sizes: Array, transposed: bool = False) -> Array:
    """[R, F]; see Kernels.product."""
    inside = jnp.arange(rows.shape[0], dtype=jnp.int32) < jnp.sum(group_sizes, dtype=jnp.int32)
    return jnp.where(inside[:, None], raw_product(rows, weight, group_sizes, transposed), 0)


def raw_product(rows: Array, weight: Array, group_sizes: Array, transposed: bool = False) -> Array:
    """[R, F]; see Kernels.raw."""
    tiles_Q4, _ = launch.list_tiles(group_sizes, rows.shape[0])
    return launch.grouped_product(rows, weight, tiles_Q4, transposed)


def weight_gradient(rows: Array, dout: Array, group_sizes: Array) -> Array:
    """[e, D, F]; see Kernels.weight_gradient."""
    _, starts_e = launch.list_tiles(group_sizes, rows.shape[0])
    return launch.grouped_weight_gradient(rows, dout, starts_e)
