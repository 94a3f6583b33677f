"""Backend "triton": the grouped products of core.kernels, lean_kernels.py has them fused with the activation.

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
    tiles_Q4, _ = _listed(rows, group_sizes, weight.shape[1 if transposed else 2])
    return launch.grouped_product(rows, weight, tiles_Q4, transposed)


def weight_gradient(rows: Array, dout: Array, group_sizes: Array) -> Array:
    """[e, D, F]; see Kernels.weight_gradient."""
    _, starts_e = _listed(rows, group_sizes, dout.shape[1])
    return launch.grouped_weight_gradient(rows, dout, starts_e)


def _listed(rows: Array, group_sizes: Array, width_out: int) -> tuple[Array, Array]:
    """(tiles, starts); see launch.list_tiles."""
    n_rows, width_in = rows.shape
    height = launch.height(rows, n_rows, group_sizes.shape[0], width_in, width_out)
    return launch.list_tiles(group_sizes, n_rows, height)
