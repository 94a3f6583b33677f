"""Checks of devices and, where they are switched on, of values. Shapes and dtypes: core.checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moebius.core import checks, layout
from moebius.core.config import MoEConfig
from moebius.core.errors import DTypeError, RoutingError, ShapeError
from moebius.torch_frontend.operators import unwatched


def check_arrays(**arrays: Any) -> None:
    """All are tensors of this framework.

    Raises:
        DTypeError: one is something else; names it.
    """
    for name, value in arrays.items():
        if not isinstance(value, Tensor):
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            do = "use torch.as_tensor for NumPy, moebius.compare.to_torch for JAX"
            raise DTypeError(f"{name} as a torch.Tensor", kind, do)


# Kind of what passed -> the config, whose id in the kind is no other's for as long as it is held here.
_passed: dict[tuple[Any, ...], MoEConfig] = {}
_KINDS = 1024  # held; then all are forgotten


def check_experts(
    parameters: Mapping[str, Tensor],
    x: Tensor,
    token_mask: Tensor,
    weights: Tensor,
    indices: Tensor,
    config: MoEConfig,
    ranks: int,
) -> None:
    """The shapes, dtypes and devices of what `experts` takes, on one of `ranks` ranks; of a kind that passed not again.

    Raises:
        ShapeError, DTypeError: one does not fit.
    """
    check_arrays(x=x, token_mask=token_mask, weights=weights, indices=indices)
    kind: tuple[Any, ...] = ()
    tensors = (x, token_mask, weights, indices, *parameters.values())
    if unwatched(*tensors):  # while something traces, sizes may be unknown
        kind = (id(config), ranks, *parameters, *[(t.shape, t.dtype, t.device) for t in tensors])
        if kind in _passed:
            return
    checks.tokens(x, config.expert_dim)
    checks.token_mask(token_mask, x.shape[0])
    checks.routes(weights, indices, x.shape[0])
    checks.parameters(parameters, layout.experts(config, ranks))
    check_devices(x=x, token_mask=token_mask, weights=weights, indices=indices, **parameters)
    if kind:
        if len(_passed) >= _KINDS:
            _passed.clear()
        _passed[kind] = config


def check_devices(**tensors: Tensor) -> None:
    """All tensors are plain tensors of one device.

    Raises:
        DTypeError: one is a DTensor. ShapeError: they lie on different devices; names each.
    """
    for name, tensor in tensors.items():
        if type(tensor).__name__ == "DTensor":
            raise DTypeError(f"{name} as a plain tensor", "a DTensor", f"pass {name}.to_local()")
    devices = {name: str(tensor.device) for name, tensor in tensors.items()}
    if len(set(devices.values())) > 1:
        found = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ShapeError("all tensors on one device", found, "move them with .to(device)")


def check_values(weights: Tensor, indices: Tensor, token_mask: Tensor, n_experts: int) -> None:
    """Weights of unmasked tokens are finite and their ids lie in [-1, n_experts). Reads the values.

    Raises:
        RoutingError: names the first token.
    """
    bad_T = token_mask & ~torch.isfinite(weights).all(-1)
    if bad_T.any():
        token = int(bad_T.nonzero()[0])
        raise RoutingError("finite weights", f"{weights[token].tolist()} at token {token}", "look at the router")
    bad_T = token_mask & ((indices < -1) | (indices >= n_experts)).any(-1)
    if bad_T.any():
        token = int(bad_T.nonzero()[0])
        found = f"{indices[token].tolist()} at token {token}"
        raise RoutingError(f"ids in [-1, {n_experts})", found, "use -1 for no route")


def check_group_sizes(group_sizes: Tensor, n_rows: int) -> None:
    """Group sizes are >= 0 and sum to at most n_rows; looked at only with MOEBIUS_CHECKS=full.

    Raises:
        RoutingError: they are not.
    """
    if checks.environment() != "full":
        return
    sizes = group_sizes.tolist()
    if min(sizes, default=0) < 0 or sum(sizes) > n_rows:
        raise RoutingError(f"group sizes >= 0 that sum to at most {n_rows}", str(sizes), "count the rows anew")
