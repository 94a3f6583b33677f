"""Tokens of a rank, sent by a dispatcher and back: what the tests of the libraries' dispatchers have in common."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moebius.core import MoEError

D, E, K = 32, 8, 2


def tokens(n: int = 3, dim: int = D, k: int = K, grad: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weights, ids and mask of this rank."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(n, dim, generator=generator).bfloat16().requires_grad_(grad)
    weights = torch.rand(n, k, generator=generator).requires_grad_(grad)
    return x, weights, torch.randint(0, E, (n, k), generator=generator), torch.ones(n, dtype=torch.bool)


def there_and_back(dispatcher: Any, sent: Any, n_experts: int = E) -> Tensor:
    """What comes back of each token, times its weights."""
    arrived, state = dispatcher.dispatch(*sent, n_experts)
    y: Tensor = dispatcher.combine(arrived.x_SD.float() * arrived.weights_SK.sum(1, keepdim=True), state)
    return y


def said(call: Any) -> str:
    """Name and words of the error of moebius' own that it raises."""
    try:
        call()
    except MoEError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def waits(function: Callable[[], Any]) -> tuple[Any, int]:
    """What it returns, and how often the host waits for the device in it, as PyTorch sees it."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            result = function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return result, sum("called a synchronizing" in str(warning.message) for warning in caught)
