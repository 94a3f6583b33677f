"""Dispatcher "deepep_elastic": DeepEP's `ElasticBuffer`, over NCCL's symmetric windows.

A dispatcher of its own beside "deepep": it takes other sizes (hidden sizes of which 256 is a divisor, and no largest),
other numbers of ranks, and needs an NCCL of its own. Rows come in an order that may change from run to run unless they
are sorted; they are, since activation checkpointing sends them twice and expects the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebius.core.errors import BackendUnavailable
from moebius.torch_frontend.dispatch import Options
from moebius.torch_frontend.dispatch_deepep import described
from moebius.torch_frontend.dispatch_longest import OverLongest
from moebius.torch_frontend.dispatch_trip import Arrival, Trip

_NO_GIN = "EP_DISABLE_GIN"
_INFINIBAND = Path("/sys/class/infiniband")


class Elastic(OverLongest):
    """Tokens by DeepEP's ElasticBuffer.

    Args:
        group, combine_dtype, options: see OverLongest. module: that holds ElasticBuffer.

    Raises: as OverBuffer.
    """

    name = "deepep_elastic"

    def __init__(self, group: Any, combine_dtype: str | None, options: Options, *, module: Any):
        self.module = module
        super().__init__(group, combine_dtype, options)

    def key(self) -> tuple[Any, ...]:
        """See OverBuffer."""
        return self.options.dim, self.options.k

    def make(self, sizes: tuple[int, ...]) -> Any:
        """See OverBuffer."""
        return self.module.ElasticBuffer(
            self.group,
            num_max_tokens_per_rank=sizes[0],
            hidden=self.options.dim,
            num_topk=self.options.k,
            deterministic=True,
            explicitly_destroy=True,
        )

    def routes(self, trip: Trip, weights_TK: Tensor, ids_TK: Tensor) -> tuple[Tensor, Tensor]:
        """See OverBuffer."""
        return weights_TK.contiguous(), ids_TK.to(getattr(self.module, "topk_idx_t", torch.int64)).contiguous()

    def leave(self, x: Tensor, trip: Trip, weights: Tensor, ids: Tensor) -> Arrival:
        """See OverBuffer."""
        x_SD, ids_SK, weights_SK, trip.handle, event = trip.buffer.dispatch(
            x,
            topk_idx=ids,
            topk_weights=weights,
            num_experts=trip.n_experts,
            num_sms=self.options.num_sms,
            do_cpu_sync=self.reads_host,
            async_with_compute_stream=self.options.asynchronous,
        )
        return self._arrival(event, x_SD, weights_SK, ids_SK)

    def leave_again(self, x: Tensor, trip: Trip) -> Arrival:
        """See OverBuffer."""
        # num_sms=0 would ask an estimate that does not know a handle's number of experts.
        x_SD, *_, event = trip.buffer.dispatch(
            x,
            handle=trip.handle,
            num_sms=trip.handle.num_sms,
            async_with_compute_stream=self.options.asynchronous,
        )
        return self._arrival(event, x_SD)

    def come_home(self, y: Tensor, trip: Trip, weights: Tensor | None) -> Arrival:
        """See OverBuffer."""
        y_TD, weights_TK, event = trip.buffer.combine(
            y,
            trip.handle,
            topk_weights=weights,
            num_sms=trip.handle.num_sms,
            async_with_compute_stream=self.options.asynchronous,
        )
        return self._arrival(event, y_TD, weights_TK)

    def local(self, trip: Trip, ids: Tensor) -> Tensor:
        """See OverBuffer. Rows past the last are not marked by the library where the host knows no number of them."""
        ids_SK = super().local(trip, ids)
        if self.reads_host:
            return ids_SK
        rows_S = torch.arange(ids.shape[0], device=ids.device)
        here_S = rows_S < trip.handle.psum_num_recv_tokens_per_scaleup_rank[-1]
        return torch.where(here_S[:, None], ids_SK, trip.held)

    def _arrival(self, event: Any, *tensors: Any) -> Arrival:
        return Arrival(tensors, event if self.options.asynchronous else None)


def loaded(name: str) -> Callable[..., Elastic]:
    """Elastic with DeepEP's module.

    Sets EP_DISABLE_GIN=1 where nobody set it and there is no InfiniBand, without which the library fails there.

    Raises:
        BackendUnavailable: the deep_ep that is here has no ElasticBuffer.
    """
    if not _has_infiniband():
        os.environ.setdefault(_NO_GIN, "1")
    module = import_module("deep_ep")
    if not hasattr(module, "ElasticBuffer"):
        do = "build DeepEP 2.1, with NCCL 2.30.4 or later in torch"
        raise BackendUnavailable(f"dispatch backend {name!r}", described(module), do)
    return partial(Elastic, module=module)


def says(name: str) -> str:
    """What was found, for `moebius doctor`."""
    gin = os.environ.get(_NO_GIN)
    network = "InfiniBand" if _has_infiniband() else f"no InfiniBand, {_NO_GIN}={gin}"
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "none"
    return f"{described(import_module('deep_ep'))}; {network}; NCCL {nccl}, 2.30.4 is needed"


def _has_infiniband() -> bool:
    return _INFINIBAND.is_dir() and any(_INFINIBAND.iterdir())
