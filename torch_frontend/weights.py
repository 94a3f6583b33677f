"""The canonical parameters and state of a module: drawing, reading and writing them by the names of core.layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moebius.core import checks
from moebius.core.errors import CheckpointError
from moebius.core.layout import Parameter
from moebius.torch_frontend.dtypes import accumulate_dtype
from moebius.torch_frontend.sharding import matching


@torch.no_grad()
def draw(tensor: Tensor, parameter: Parameter, std: float = 0.02) -> None:
    """Fill `tensor` in place: N(0, std) from torch's generator, or zeros for a bias. Meta tensors are left alone."""
    if tensor.is_meta:
        return
    if parameter.zeros:
        tensor.zero_()
    elif tensor.dtype == accumulate_dtype(tensor.dtype):
        tensor.normal_(0.0, std)
    else:  # drawn promoted, one expert at a time: torch 2.11 draws 16-bit numbers too narrow, by 0.7 % of std
        for part in tensor if tensor.ndim > 2 else (tensor,):
            part.copy_(torch.empty_like(part, dtype=accumulate_dtype(part.dtype)).normal_(0.0, std))


def parameters(module: nn.Module) -> dict[str, Tensor]:
    """The module's parameters by dotted name, detached, sharing memory with the module."""
    return {name: value.detach() for name, value in module.named_parameters()}


def load_parameters(module: nn.Module, values: Mapping[str, Any]) -> None:
    """Copy `values` into the module's parameters, cast to their dtype; all of them or, on an error, none.

    Args:
        values: by dotted name, tensors or NumPy arrays in the layout's shapes; of all experts, of which each rank
            takes its own.

    Raises:
        CheckpointError: names are missing or unexpected; lists all of them.
        ShapeError: a tensor does not have the layout's shape.
    """
    _load(parameters(module), values, f"parameters of {type(module).__name__}")


def state(module: nn.Module) -> dict[str, Tensor]:
    """What the module holds beside its parameters and a checkpoint holds too, by the dotted names of core.layout.state.

    That is the correction bias, float32, sharing memory with the module; empty where the config holds none.
    """
    return {name: value.detach() for name, value in module.named_buffers()}


def load_state(module: nn.Module, values: Mapping[str, Any]) -> None:
    """Copy `values` into the module's state, as `load_parameters` does into its parameters.

    Args:
        values: by dotted name, tensors or NumPy arrays in the layout's shapes; empty where the module has no state.

    Raises:
        CheckpointError: names are missing or unexpected; lists all of them.
        ShapeError: a tensor does not have the layout's shape.
    """
    _load(state(module), values, f"state tensors of {type(module).__name__}")


@torch.no_grad()
def _load(own: Mapping[str, Tensor], values: Mapping[str, Any], what: str) -> None:
    missing, unexpected = sorted(own.keys() - values.keys()), sorted(values.keys() - own.keys())
    if missing or unexpected:
        found = f"missing: {', '.join(missing) or 'none'}; unexpected: {', '.join(unexpected) or 'none'}"
        raise CheckpointError(f"the {len(own)} {what}", found, "pass exactly these")
    for name, value in values.items():
        checks.parameter(name, value, tuple(own[name].shape))
    for name, value in values.items():
        own[name].copy_(matching(own[name], torch.as_tensor(value)))
