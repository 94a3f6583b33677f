"""Tokens over the ranks and back: two linear maps, each the other's adjoint.

`spread` copies a token to the ranks that want it, `collect` adds what they made of it. The gradient of one is the
other, over the same layout, so a layer's four transfers need one. What travels has the dtype that it is given in; the
ranks' parts are added promoted and rounded once. Both run inside of jax.shard_map, in reverse mode.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array, lax

from moebius.core.errors import ConfigError
from moebius.jax_frontend.dtypes import promoted
from moebius.jax_frontend.operators import alike

if TYPE_CHECKING:
    from jaxtyping import Float

Layout = Any  # a pytree of integer arrays


@runtime_checkable
class Transport(Protocol):
    """How rows travel; hashable, compared by value."""

    def send(self, x: Array, layout: Layout) -> Array:
        """[T, ...] to [S, ...], any dtype; zeros in rows of S that no token came to."""
        ...

    def back(self, y: Array, layout: Layout) -> Array:
        """[S, ...] to [T, ...] in y's accumulate dtype: each token's parts, added. `send`'s adjoint."""
        ...


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def spread(transport: Transport, x_TX: Float[Array, "T ..."], layout: Layout) -> Array:
    """[S, ...], dtype of x."""
    return transport.send(x_TX, layout)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def collect(transport: Transport, dtype: Any, y_SX: Float[Array, "S ..."], layout: Layout) -> Array:
    """[T, ...] in `dtype`; its gradient travels in that dtype."""
    return transport.back(y_SX, layout).astype(dtype)


def _spread_backward(transport: Transport, layout: Layout, dx_SX: Array) -> tuple[Array, None]:
    return collect(transport, dx_SX.dtype, dx_SX, layout), None


def _collect_forward(transport: Transport, dtype: Any, y_SX: Array, layout: Layout) -> tuple[Array, Any]:
    return collect(transport, dtype, y_SX, layout), (layout, jnp.zeros((), y_SX.dtype))


def _collect_backward(transport: Transport, dtype: Any, saved: Any, dy_TX: Array) -> tuple[Array, None]:
    layout, like = saved
    return spread(transport, dy_TX, layout).astype(like.dtype), None


spread.defvjp(lambda transport, x, layout: (spread(transport, x, layout), layout), _spread_backward)
collect.defvjp(_collect_forward, _collect_backward)


def axis_size(axis: str) -> int:
    """How many devices the mesh axis has.

    Raises:
        ConfigError: the caller is not inside of a shard_map over it.
    """
    try:
        return int(lax.axis_size(axis))
    except NameError:
        do = "call it inside of jax.shard_map over a mesh with that axis, or call a module that holds the mesh"
        raise ConfigError(f'experts over the mesh axis "{axis}"', "no such axis is in force here", do) from None


def varying(axis: str, *arrays: Array) -> list[Array]:
    """The arrays, inside of a shard_map that checks it marked to vary over `axis`, as what they meet does."""
    return alike(*arrays, lax.axis_index(axis))[:-1]


def swap(axis: str, blocks_nX: Array) -> Array:
    """Block d goes to rank d; what came from rank s is block s."""
    return lax.all_to_all(blocks_nX, axis, 0, 0)


def added(parts_nX: Array) -> Array:
    """The sum of the ranks' parts, promoted, in the order of the ranks."""
    return promoted(parts_nX).sum(0)
