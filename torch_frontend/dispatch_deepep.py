"""Dispatchers "deepep" and "uccl_ep": DeepEP's `Buffer` within a node, and UCCL's class of the same interface.

A token travels once to each rank that wants it, with its weights and ids; rows come in the order of the source rank,
then of the token. The library's handle, plain tensors, serves both directions of both passes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

from torch import Tensor

from moebius.core.errors import BackendUnavailable
from moebius.torch_frontend.dispatch import Options
from moebius.torch_frontend.dispatch_buffer import WIRE, OverBuffer
from moebius.torch_frontend.dispatch_trip import Arrival, Trip

# Ranks -> NVLink chunks (send, receive) of dispatch and of combine. Source: Buffer.get_dispatch_config and
# get_combine_config of v1.2.1, which also read a number of multiprocessors that is set for the whole process.
_CHUNKS = {2: ((24, 256), (10, 256)), 4: ((6, 256), (9, 256)), 8: ((6, 256), (4, 256))}
_RDMA_CHUNKS = (6, 128)  # of other nodes: not used within one
# UCCL has shipped its Python class under three names; the last of them takes DeepEP's.
_MODULES = {"deepep": ("deep_ep",), "uccl_ep": ("uccl.ep", "uccl_ep", "deep_ep")}
_CLASSES = ("Buffer", "ElasticBuffer", "HybridEPBuffer")


class DeepEP(OverBuffer):
    """Tokens by DeepEP's Buffer, over NVLink.

    Args:
        group, combine_dtype, options: see OverBuffer. With max_tokens every rank gets ranks * max_tokens rows.
        module: that holds Buffer and Config. name: "deepep" or "uccl_ep".

    Raises: as OverBuffer.
    """

    def __init__(self, group: Any, combine_dtype: str | None, options: Options, *, module: Any, name: str = "deepep"):
        self.module, self.name = module, name
        super().__init__(group, combine_dtype, options)
        configs = self._configs()
        self.config, self.combine_config = configs

    def sizes(self) -> tuple[int, ...]:
        """Bytes that the peers may write to."""
        row = self.options.dim * WIRE.itemsize
        return (max(config.get_nvl_buffer_size_hint(row, self.ranks) for config in self._configs()),)

    def make(self, sizes: tuple[int, ...]) -> Any:
        """See OverBuffer."""
        buffer = self.module.Buffer
        here = {"is_intranode": True} if "is_intranode" in inspect.signature(buffer).parameters else {}
        return buffer(self.group, *sizes, 0, explicitly_destroy=True, **here)

    def leave(self, x: Tensor, trip: Trip, weights: Tensor, ids: Tensor) -> Arrival:
        """See Ferry."""
        buffer, flies = trip.buffer, self.options.asynchronous
        ready = buffer.capture() if flies else None
        *layout, known = buffer.get_dispatch_layout(ids, trip.n_experts, previous_event=ready, async_finish=flies)
        most = self.options.max_tokens
        x_SD, ids_SK, weights_SK, _, trip.handle, event = buffer.dispatch(
            x,
            num_tokens_per_rank=layout[0],
            num_tokens_per_rdma_rank=layout[1],
            num_tokens_per_expert=layout[2],
            is_token_in_rank=layout[3],
            topk_idx=ids,
            topk_weights=weights,
            num_worst_tokens=0 if most is None else self.ranks * max(1, most),
            config=self.config,
            previous_event=known if flies else None,
            async_finish=flies,
        )
        return Arrival((x_SD, weights_SK, ids_SK), event if flies else None)

    def leave_again(self, x: Tensor, trip: Trip) -> Arrival:
        """See OverBuffer."""
        x_SD, *_, event = trip.buffer.dispatch(x, handle=trip.handle, config=self.config, **self._flight(trip))
        return Arrival((x_SD,), event if self.options.asynchronous else None)

    def come_home(self, y: Tensor, trip: Trip, weights: Tensor | None) -> Arrival:
        """See OverBuffer."""
        y_TD, weights_TK, event = trip.buffer.combine(
            y, trip.handle, topk_weights=weights, config=self.combine_config, **self._flight(trip)
        )
        return Arrival((y_TD, weights_TK), event if self.options.asynchronous else None)

    def _flight(self, trip: Trip) -> dict[str, Any]:
        if not self.options.asynchronous:
            return {}
        return {"previous_event": trip.buffer.capture(), "async_finish": True}

    def _configs(self) -> tuple[Any, Any]:
        sms = self.options.num_sms
        out, home = (self.module.Config(sms, *chunks, *_RDMA_CHUNKS) for chunks in _CHUNKS[self.ranks])
        return out, home


def loaded(name: str) -> Callable[..., OverBuffer]:
    """DeepEP with the module of that dispatcher.

    Raises:
        BackendUnavailable: none of that name has it; says what was found.
    """
    found = []
    for module in modules(name):
        if isinstance(module, str):
            found.append(module)
        # The extension alone has a Buffer too, of another interface.
        elif hasattr(module, "Config") and hasattr(getattr(module, "Buffer", None), "get_dispatch_config"):
            return partial(DeepEP, module=module, name=name)
        else:
            found.append(described(module))
    raise BackendUnavailable(f"dispatch backend {name!r}", "; ".join(found), "build the one that has Buffer")


def modules(name: str) -> Iterator[ModuleType | str]:
    """The modules in which that dispatcher may be, imported; why in words where one does not import."""
    for place in _MODULES[name]:
        try:
            module = import_module(place)
        except ModuleNotFoundError as error:
            yield f"no module {error.name}"
            continue
        if name == "uccl_ep" and place == "deep_ep" and not _of_uccl(module):
            yield "deep_ep is DeepEP's own"
            continue
        yield module


def described(module: ModuleType) -> str:
    """A module's version, and which of DeepEP's three classes it has: they come from three code bases."""
    try:
        number = version(module.__name__.split(".")[0])
    except PackageNotFoundError:
        number = getattr(module, "__version__", "of unknown version")
    has = [name for name in _CLASSES if hasattr(module, name)]
    whose = ", UCCL's" if _of_uccl(module) else ""
    return f"{module.__name__} {number}{whose} has {' and '.join(has) or 'no buffer'}"


def says(name: str) -> str:
    """What was found, for `moebius doctor`."""
    return "; ".join(module if isinstance(module, str) else described(module) for module in modules(name))


def _of_uccl(module: ModuleType) -> bool:
    return str(getattr(getattr(module, "Config", None), "__module__", "")).startswith("uccl")
