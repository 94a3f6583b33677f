"""Checks of devices and, where they are switched on, of values. Shapes and dtypes: core.checks.

While JAX traces there are neither devices nor values: both are looked at only outside jit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import Array

from moebius.core import checks, layout
from moebius.core.config import MoEConfig
from moebius.core.errors import DTypeError, RoutingError, ShapeError


def check_arrays(**arrays: Any) -> None:
    """All are arrays of this framework, or NumPy's, which JAX takes as they are.

    Raises:
        DTypeError: one is something else; names it.
    """
    for name, value in arrays.items():
        if not isinstance(value, Array | np.ndarray):
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            do = "use jax.numpy.asarray for lists, moebius.compare.to_jax for PyTorch"
            raise DTypeError(f"{name} as a jax.Array", kind, do)


def check_experts(
    parameters: Mapping[str, Array],
    x: Array,
    token_mask: Array,
    weights: Array,
    indices: Array,
    config: MoEConfig,
    ranks: int,
) -> None:
    """The shapes, dtypes and devices of what `experts` takes, on one of `ranks` ranks.

    Raises:
        ShapeError, DTypeError: one does not fit.
    """
    check_arrays(x=x, token_mask=token_mask, weights=weights, indices=indices)
    checks.tokens(x, config.expert_dim)
    checks.token_mask(token_mask, x.shape[0])
    checks.routes(weights, indices, x.shape[0])
    checks.parameters(parameters, layout.experts(config, ranks))
    check_devices(x=x, token_mask=token_mask, weights=weights, indices=indices, **parameters)


def check_devices(**arrays: Array) -> None:
    """All arrays that were put on devices lie on the same ones; JAX moves the others by itself.

    Raises:
        ShapeError: they lie on different devices; names each.
    """
    placed = {name: array for name, array in arrays.items() if _concrete(array) and getattr(array, "committed", False)}
    devices = {name: sorted(map(str, array.devices())) for name, array in placed.items()}
    if len(set(map(tuple, devices.values()))) > 1:
        found = ", ".join(f"{name} on {' and '.join(at)}" for name, at in devices.items())
        raise ShapeError("all arrays on the same devices", found, "move them with jax.device_put")


def check_values(weights: Array, indices: Array, token_mask: Array, n_experts: int) -> None:
    """Weights of unmasked tokens are finite and their ids lie in [-1, n_experts). Reads the values.

    Raises:
        RoutingError: names the first token.
    """
    if not _concrete(weights, indices, token_mask):
        return
    mask_T, weights_TK, ids_TK = np.asarray(token_mask), np.asarray(weights, np.float64), np.asarray(indices)
    bad_T = mask_T & ~np.isfinite(weights_TK).all(-1)
    if bad_T.any():
        token = int(bad_T.nonzero()[0][0])
        raise RoutingError("finite weights", f"{weights_TK[token].tolist()} at token {token}", "look at the router")
    bad_T = mask_T & ((ids_TK < -1) | (ids_TK >= n_experts)).any(-1)
    if bad_T.any():
        token = int(bad_T.nonzero()[0][0])
        found = f"{ids_TK[token].tolist()} at token {token}"
        raise RoutingError(f"ids in [-1, {n_experts})", found, "use -1 for no route")


def check_group_sizes(group_sizes: Array, n_rows: int) -> None:
    """Group sizes are >= 0 and sum to at most n_rows; looked at only with MOEBIUS_CHECKS=full.

    Raises:
        RoutingError: they are not.
    """
    if checks.environment() != "full" or not _concrete(group_sizes):
        return
    sizes = np.asarray(group_sizes).tolist()
    if min(sizes, default=0) < 0 or sum(sizes) > n_rows:
        raise RoutingError(f"group sizes >= 0 that sum to at most {n_rows}", str(sizes), "count the rows anew")


def _concrete(*arrays: Any) -> bool:
    return not any(isinstance(array, jax.core.Tracer) for array in arrays)
