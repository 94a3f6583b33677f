"""dtypes of this framework for the names that core uses, and the contexts that a dtype or a device hangs on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from moebius.core import precision


def as_dtype(dtype: Any) -> torch.dtype:
    """The torch.dtype of a name, or of any framework's dtype object.

    Raises:
        ConfigError: not one of the four floating dtypes.
    """
    found: torch.dtype = getattr(torch, precision.dtype_name(dtype))
    return found


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """promote_types(dtype, float32): where sums, activations and weights are computed."""
    return torch.promote_types(dtype, torch.float32)


def promoted(value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`value` in the accumulate dtype of `dtype`, by default of its own."""
    return value.to(accumulate_dtype(value.dtype if dtype is None else dtype))


def computed(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """`x` in the dtype that a module computes in: `dtype`, else autocast's (but float64 stays), else its own."""
    if dtype is None and x.dtype is not torch.float64 and autocast(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    return x if dtype is None else x.to(dtype)


def autocast(device: str) -> bool:
    """Whether an autocast region is open for devices of this kind; never for meta, which has none.

    torch 2.11 cannot trace torch.amp.is_autocast_available, so this does not ask.
    """
    return device != "meta" and torch.is_autocast_enabled(device)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """The context in which `device` is the current one, for packages that launch on the current one without asking."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
