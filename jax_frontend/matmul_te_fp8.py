"""Backend "te" inside Transformer Engine's autocast: its grouped GEMM on operands with one FP8 scale an expert.

The recipe is Float8CurrentScaling: a scale is made of what it scales, so nothing has to be kept from step to step. The
package's `grouped_dense` quantises what each of its three products needs; of the two gradients of its backward pass
that one is taken which is asked for, and XLA leaves out what has no effect.

An FP8 GEMM wants a multiple of 16 rows an expert, and V1, which it always is, sizes that add up: rows are spread over
a buffer that fits any sizes, among zeros.
Source: jax/dense.py and jax/quantize of Transformer Engine 2.20.2.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moebius.core.errors import Unsupported
from moebius.jax_frontend.matmul_te import refuse_checked, row_experts

MULTIPLE = 16  # of rows an expert, and of both widths
_QUANTIZE = "transformer_engine.jax.quantize"
_DO = "transformer_engine.jax.autocast(recipe=Float8CurrentScaling()), autocast(enabled=False), or another backend"
_recipes: dict[str, Any] = {}


class Spread(NamedTuple):
    """Where rows lie among zeros.

    Attributes:
        n_rows: of the buffer, M. sizes_e: [e] int32, multiples of 16 that add up to it; the last expert's has the rest.
        place_R: [R] int32, of each row, M past the end.
    """

    n_rows: int
    sizes_e: Array
    place_R: Array


def asked() -> str:
    """Key of the recipe of the autocast around the caller, for `recipe_of`; "" outside, or without the package.

    It travels with the backend's name: the backward pass may run outside the autocast, and compiled code is kept by
    that name.

    Raises:
        Unsupported: the recipe is another than Float8CurrentScaling.
    """
    module = sys.modules.get(_QUANTIZE)  # an autocast is open only where this is loaded
    recipe = None if module is None else module.get_global_quantize_recipe()
    if recipe is None:
        return ""
    if not recipe.float8_current_scaling():
        found = "in Flax that backend quantises by Float8CurrentScaling alone; it has no place for a history of maxima"
        raise Unsupported(f"grouped_matmul backend 'te' with the recipe {type(recipe).__name__}", found, _DO)
    key = str(recipe)
    _recipes[key] = recipe
    return key


def recipe_of(key: str) -> Any:
    """The recipe that `asked` saw."""
    return _recipes[key]


def product(rows: Array, weight: Array, group_sizes: Array, transposed: bool = False, *, recipe: Any) -> Array:
    """[R, F]; see Kernels.product. `transposed` asks for the input gradient: rows are then quantised as a gradient.

    Raises:
        Unsupported: widths that are no multiples of 16; inside shard_map with check_vma=True.
    """
    _check(recipe, weight.shape[1:], rows, weight, group_sizes)
    spread = _spread(rows.shape[0], group_sizes)
    wide_rows, dense = _wide(rows, spread), _dense(spread, recipe)
    if transposed:
        forward_rows = jnp.zeros((spread.n_rows, weight.shape[1]), rows.dtype)
        (out,) = jax.vjp(lambda x: dense(x, weight), forward_rows)[1](wide_rows)
    else:
        out = dense(wide_rows, weight)
    return out.at[spread.place_R].get(mode="fill", fill_value=0)


def weight_gradient(rows: Array, dout: Array, group_sizes: Array, *, recipe: Any) -> Array:
    """[e, D, F]; see Kernels.weight_gradient.

    Raises:
        Unsupported: as `product`.
    """
    shape = (group_sizes.shape[0], rows.shape[1], dout.shape[1])
    _check(recipe, shape[1:], rows, dout, group_sizes)
    spread = _spread(rows.shape[0], group_sizes)
    wide_rows, dense = _wide(rows, spread), _dense(spread, recipe)
    (dweight,) = jax.vjp(lambda weight: dense(wide_rows, weight), jnp.zeros(shape, rows.dtype))[1](_wide(dout, spread))
    return dweight


def _dense(spread: Spread, recipe: Any) -> Callable[[Array, Array], Array]:
    """(rows [M, D], weight [e, D, F]) -> [M, F] with quantizers of the recipe."""
    from transformer_engine.jax.dense import grouped_dense
    from transformer_engine.jax.quantize import QuantizeMeta, QuantizeMetaSet, QuantizerFactory

    nothing_kept = QuantizeMetaSet(x=QuantizeMeta(), kernel=QuantizeMeta(), grad=QuantizeMeta())
    n_groups = spread.sizes_e.shape[0]
    quantizers = QuantizerFactory.create_set(fp8_recipe=recipe, quantize_meta_set=nothing_kept, n_groups=n_groups)

    def dense(rows: Array, weight: Array) -> Array:
        out: Array = grouped_dense(rows, weight, spread.sizes_e, quantizer_set=quantizers)
        return out

    return dense


def _spread(n_rows: int, group_sizes: Array) -> Spread:
    e = group_sizes.shape[0]
    n_wide = _up(n_rows + e * (MULTIPLE - 1))
    sizes_e = _up(group_sizes.astype(jnp.int32))
    added_e = sizes_e - group_sizes.astype(jnp.int32)
    before_e = jnp.append(jnp.cumsum(added_e, dtype=jnp.int32) - added_e, jnp.int32(0))
    experts_R = row_experts(n_rows, group_sizes)
    place_R = jnp.where(experts_R < e, jnp.arange(n_rows, dtype=jnp.int32) + before_e[experts_R], n_wide)
    return Spread(n_wide, sizes_e.at[-1].add(n_wide - sizes_e.sum(dtype=jnp.int32)), place_R)


def _up(n: Any) -> Any:
    return -(-n // MULTIPLE) * MULTIPLE


def _wide(rows: Array, spread: Spread) -> Array:
    wide = jnp.zeros((spread.n_rows, rows.shape[1]), rows.dtype)
    return wide.at[spread.place_R].set(rows, mode="drop")


def _check(recipe: Any, widths: tuple[int, ...], *arrays: Array) -> None:
    asked_for = f"grouped_matmul backend 'te' with the recipe {type(recipe).__name__}"
    refuse_checked(asked_for, *arrays)
    if any(width % MULTIPLE for width in widths):
        raise Unsupported(asked_for, f"matrices {list(widths)}; it takes multiples of {MULTIPLE}", _DO)
