"""Dispatcher "hybridep": DeepEP's `HybridEPBuffer`, whose rows come sorted by expert, one for each route.

It wants as many tokens from every rank, so each is padded to the longest with tokens that go nowhere, and a table of
all experts for each token. A row is a token with one route; what a token's routes to one rank gave is added on the way
home, so each of them is rounded to bfloat16 before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from moebius.core.errors import BackendUnavailable
from moebius.torch_frontend.dispatch import Options
from moebius.torch_frontend.dispatch_deepep import described
from moebius.torch_frontend.dispatch_longest import OverLongest
from moebius.torch_frontend.dispatch_trip import Arrival, Trip


class HybridEP(OverLongest):
    """Tokens by DeepEP's HybridEPBuffer.

    An expert that a token names twice gets it once, with the sum of the weights.

    Args:
        group, combine_dtype, options: see OverLongest. With max_tokens every rank gets ranks * max_tokens * min(K, e)
            rows. module: that holds HybridEPBuffer.

    Raises: as OverBuffer.
    """

    name = "hybridep"
    arrives = "routes"
    step = 64
    pads = True

    def __init__(self, group: Any, combine_dtype: str | None, options: Options, *, module: Any):
        self.module = module
        super().__init__(group, combine_dtype, options)

    def key(self) -> tuple[Any, ...]:
        """See OverBuffer."""
        return self.options.dim, self.options.n_experts, self.options.num_sms

    def make(self, sizes: tuple[int, ...]) -> Any:
        """See OverBuffer."""
        return self.module.HybridEPBuffer(
            self.group,
            hidden_dim=self.options.dim,
            max_num_of_tokens_per_rank=sizes[0],
            num_local_experts=self.options.n_experts // self.ranks,
            num_sms_dispatch_api=self.options.num_sms,
            num_sms_combine_api=self.options.num_sms,
        )

    def routes(self, trip: Trip, weights_TK: Tensor, ids_TK: Tensor) -> tuple[Tensor, Tensor]:
        """float32 weights and bool routes [T, E], for every expert."""
        slots_TK = torch.where(ids_TK < 0, trip.n_experts, ids_TK).to(torch.int64)
        # One column more takes what goes nowhere.
        like_TE = weights_TK.new_zeros(trip.rows, trip.n_experts + 1)
        weights_TE = like_TE.scatter_add(1, slots_TK, torch.where(ids_TK < 0, 0.0, weights_TK))
        routes_TE = like_TE.bool().scatter(1, slots_TK, True)
        return weights_TE[:, :-1].contiguous(), routes_TE[:, :-1].contiguous()

    def leave(self, x: Tensor, trip: Trip, weights: Tensor, ids: Tensor) -> Arrival:
        """See OverBuffer."""
        rows = None if self.reads_host else self.ranks * trip.rows * min(trip.k, trip.held)
        x_RD, weights_R, _, sizes_e, handle = trip.buffer.dispatch_with_permute(
            hidden=x,
            routing_map=ids,
            probs=weights,
            num_of_experts_per_rank=trip.held,
            num_permuted_tokens=rows,
            non_blocking=rows is not None,
        )
        trip.handle = handle, x_RD.shape[0]
        ends_e = sizes_e.to(x.device, torch.int64, non_blocking=True).cumsum(0)
        rows_R = torch.arange(x_RD.shape[0], device=x.device)
        # Past the last row: e.
        ids_R = torch.searchsorted(ends_e, rows_R, right=True, out_int32=True)
        return Arrival((x_RD, weights_R[:, None], ids_R[:, None]))

    def leave_again(self, x: Tensor, trip: Trip) -> Arrival:
        """See OverBuffer."""
        handle, rows = trip.handle
        x_RD, *_ = trip.buffer.dispatch_with_permute(
            hidden=x, handle=handle, num_permuted_tokens=rows, non_blocking=not self.reads_host
        )
        return Arrival((x_RD,))

    def come_home(self, y: Tensor, trip: Trip, weights: Tensor | None) -> Arrival:
        """See OverBuffer."""
        weights_R = None if weights is None else weights[:, 0].contiguous()
        return Arrival(trip.buffer.combine_with_unpermute(hidden=y, probs=weights_R, handle=trip.handle[0]))


def loaded(name: str) -> Callable[..., HybridEP]:
    """HybridEP with DeepEP's module.

    Raises:
        BackendUnavailable: the deep_ep that is here has no HybridEPBuffer.
    """
    module = import_module("deep_ep")
    if not hasattr(module, "HybridEPBuffer"):
        do = "build DeepEP's branch hybrid-ep"
        raise BackendUnavailable(f"dispatch backend {name!r}", described(module), do)
    return partial(HybridEP, module=module)


def says(name: str) -> str:
    """What was found, for `moebius doctor`."""
    return f"{described(import_module('deep_ep'))}; it compiles with nvcc at run time"
