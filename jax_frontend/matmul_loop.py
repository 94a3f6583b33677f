"""Backend "loop": walk the experts that have rows, and each one's rows in blocks of a fixed size.

XLA has no grouped matmul on a CPU: lax.ragged_dot multiplies every row by every expert. Here each block of rows meets
its own expert's matrix alone, so the cost follows the rows. Rows need no alignment and no padding per expert: a block
that runs past its expert's end, or was moved back to fit into the array, writes its own rows only.

Measured on a CPU: slicing an expert's matrix once instead of once per block saves a tenth to a third of the time.
XLA of jax 0.10 computes bfloat16 around the products in float32 copies and takes up to three times as long as for
float32; that of jax 0.11 does not.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from moebius.jax_frontend.dtypes import accumulate_dtype

_SMALLEST, _LARGEST = 16, 128


@partial(jax.jit, static_argnames="transposed")
def product(rows: Array, weight: Array, group_sizes: Array, transposed: bool = False) -> Array:
    """[R, F]; see Kernels.product."""
    n_rows, block = rows.shape[0], _block(rows.shape[0], weight.shape[0])
    starts, ends = _ranges(group_sizes)
    # Experts with rows first: an empty one costs nothing.
    walk = jnp.argsort(group_sizes == 0, stable=True).astype(jnp.int32)

    def visit(i: Array, out: Array) -> Array:
        expert = walk[i]
        start, end = starts[expert], ends[expert]
        matrix = lax.dynamic_index_in_dim(weight, expert, keepdims=False)

        def step(j: Array, out: Array) -> Array:
            first, inside = _place(start + j * block, end, block, n_rows)
            part = _dot(_rows(rows, first, block), matrix, (1, 1 if transposed else 0))
            kept = jnp.where(inside, part.astype(out.dtype), _rows(out, first, block))
            return lax.dynamic_update_slice_in_dim(out, kept, first, axis=0)

        return lax.fori_loop(jnp.int32(0), _blocks(start, end, block), step, out)

    # full_like, not zeros: inside shard_map the carry must vary over the mesh axes that rows vary over.
    out = lax.full_like(rows, 0, shape=(n_rows, weight.shape[1 if transposed else 2]))
    return lax.fori_loop(jnp.int32(0), jnp.sum(group_sizes > 0, dtype=jnp.int32), visit, out)


@jax.jit
def weight_gradient(rows: Array, dout: Array, group_sizes: Array) -> Array:
    """[e, D, F]; see Kernels.weight_gradient."""
    n_rows, block = rows.shape[0], _block(rows.shape[0], group_sizes.shape[0])

    def visit(_: None, expert: tuple[Array, Array]) -> tuple[None, Array]:
        start, end = expert

        def part(j: Array) -> Array:
            first, inside = _place(start + j * block, end, block, n_rows)
            # Both sides: the other rows may hold inf or NaN, which a zero on one side would turn into NaN.
            mine = jnp.where(inside, _rows(rows, first, block), 0)
            return _dot(mine, jnp.where(inside, _rows(dout, first, block), 0), (0, 0))

        # The first block always, for an empty expert a block of zeros: each matrix is then written once, never read.
        total = lax.fori_loop(
            jnp.int32(1), _blocks(start, end, block), lambda j, total: total + part(j), part(jnp.int32(0))
        )
        return None, total.astype(rows.dtype)

    return lax.scan(visit, None, _ranges(group_sizes))[1]


def _block(n_rows: int, n_experts: int) -> int:
    """Rows of a block: about those of one expert, since a block costs its full size, however few rows it serves."""
    size = _SMALLEST
    while size < min(_LARGEST, n_rows / n_experts):
        size *= 2
    return min(size, n_rows)


def _blocks(start: Array, end: Array, block: int) -> Array:
    return lax.div(end - start + jnp.int32(block - 1), jnp.int32(block))


def _ranges(group_sizes: Array) -> tuple[Array, Array]:
    """(first row, past the last row) of each expert; int32 with 64-bit numbers on, too."""
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    return ends - group_sizes.astype(jnp.int32), ends


def _place(start: Array, end: Array, block: int, n_rows: int) -> tuple[Array, Array]:
    """(first row of a block that fits into the array, [block, 1] which of its rows lie in start to end)."""
    first = jnp.minimum(start, jnp.int32(n_rows - block))
    row = first + jnp.arange(block, dtype=jnp.int32)
    return first, ((row >= start) & (row < end))[:, None]


def _rows(array: Array, first: Array, block: int) -> Array:
    return lax.dynamic_slice_in_dim(array, first, block, axis=0)


def _dot(a: Array, b: Array, axes: tuple[int, int]) -> Array:
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    accumulate = accumulate_dtype(a.dtype)
    return lax.dot_general(a, b, dimensions, precision="highest", preferred_element_type=accumulate)
