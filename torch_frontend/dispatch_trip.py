"""Tokens' way out over a library's buffer and home again: one call's handle, and the gradients of both ways.

Out is copying, home is adding, so each is the other's adjoint over one handle. Out is two nodes of the autograd graph:
`set_off` sends, `arrive` waits. What is computed between them overlaps with the sending; in the backward pass `arrive`
sends gradients home and `set_off` waits for them, so the gradients of what was computed between overlap too.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moebius.core.errors import ConfigError
from moebius.core.liveness import Position
from moebius.torch_frontend.dispatch_pool import Generation
from moebius.torch_frontend.liveness import collective, peers


class Arrival(NamedTuple):
    """What a library returned: tensors that are there once `event` was waited for; None for at once."""

    tensors: tuple[Any, ...]
    event: Any = None

    def wait(self) -> tuple[Any, ...]:
        """The tensors, for the current stream."""
        if self.event is not None:
            self.event.current_stream_wait()
        return self.tensors


@runtime_checkable
class Ferry(Protocol):
    """How a library is called, by all ranks together."""

    group: Any

    def leave(self, x: Tensor, trip: Trip, weights: Tensor, ids: Tensor) -> Arrival:
        """Out: rows, their weights, and their ids or what the library has for them. Sets trip.handle."""
        ...

    def leave_again(self, x: Tensor, trip: Trip) -> Arrival:
        """Out by the same handle: the rows alone."""
        ...

    def come_home(self, y: Tensor, trip: Trip, weights: Tensor | None) -> Arrival:
        """Home: rows added, and their weights where there are some."""
        ...


class Trip:
    """One call's way out and home: belongs to that call's part of the autograd graph, to no layer.

    Args:
        by: the dispatcher. at: of which forward pass. generation: of the buffer that makes the handle.
        tokens: T. rows: those handed to the library, T or padded. n_experts: E. held: e. k: routes of a token.

    Attributes:
        handle: the library's. received: rows that came. homeward: gradients under way to `set_off`'s backward.
    """

    def __init__(
        self, by: Ferry, at: Position, generation: Generation, tokens: int, rows: int, n_experts: int, held: int, k: int
    ):
        self.by, self.at, self.tokens, self.rows = by, at, tokens, rows
        self.n_experts, self.held, self.k = n_experts, held, k
        self._generation = generation
        self.handle: Any = None
        self.received = 0
        self.outward: Arrival | None = None
        self.homeward: Arrival | None = None

    @property
    def buffer(self) -> Any:
        """The library's object.

        Raises:
            ConfigError: it was destroyed since.
        """
        if not self._generation.open:
            do = "close dispatchers after the last backward pass"
            raise ConfigError("a handle's way home", "its buffer was destroyed", do)
        return self._generation.buffer


def set_off(trip: Trip, x: Tensor, weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `Ferry.leave` returns, to be read after `arrive`; all of it in the graph if there is one.

    The backward pass is a collective: whoever needs no gradient takes part.
    """
    x_S, weights_S, ids_S = _SetOff.apply(trip, _anchored(x), _anchored(weights), ids)
    return x_S, weights_S, ids_S


def arrive(trip: Trip, x_SD: Tensor, weights_SK: Tensor) -> tuple[Tensor, Tensor]:
    """The same two, after the current stream waits for them."""
    x_SD, weights_SK = _Arrive.apply(trip, x_SD, weights_SK)
    return x_SD, weights_SK


def home(trip: Trip, y_SD: Tensor) -> Tensor:
    """The rows that went out, as the sums of what was made of them."""
    y_TD: Tensor = _Home.apply(trip, y_SD)
    return y_TD


def _anchored(value: Tensor) -> Tensor:
    if not torch.is_grad_enabled() or value.requires_grad:
        return value
    return value.detach().requires_grad_()


def _carried(trip: Trip, phase: str, way: Any, rows: Tensor, *rest: Any) -> Arrival:
    """way(rows, trip, *rest), watched: if a rank is missing the error, or the log, says so and in which layer."""
    found: list[Arrival] = []

    def call(rows: Tensor, *rest: Any, group: Any) -> None:
        found.append(way(rows, trip, *rest))

    # A recomputation's forward stays one.
    peers(trip.by.group).watch.at = trip.at._replace(phase=phase) if phase == "backward" else trip.at
    collective(call, rows.contiguous(), *rest, group=trip.by.group)
    return found[0]


class _SetOff(Function):
    @staticmethod
    def forward(ctx: Any, trip: Trip, x: Tensor, weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.trip = trip
        trip.outward = _carried(trip, "forward", trip.by.leave, x, weights, ids)
        x_SD, weights_SK, ids_SK = trip.outward.tensors
        trip.received = x_SD.shape[0]
        ctx.mark_non_differentiable(ids_SK)
        return x_SD, weights_SK, ids_SK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Any) -> tuple[Tensor | None, ...]:
        coming, ctx.trip.homeward = ctx.trip.homeward, None
        return None, *coming.wait(), None


class _Arrive(Function):
    @staticmethod
    def forward(ctx: Any, trip: Trip, x_SD: Tensor, weights_SK: Tensor) -> tuple[Tensor, Tensor]:
        ctx.trip, ctx.like = trip, [(value.shape, value.dtype, value.device) for value in (x_SD, weights_SK)]
        ctx.set_materialize_grads(False)
        assert trip.outward is not None
        trip.outward.wait()
        trip.outward = None
        return x_SD, weights_SK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, Tensor, Tensor]:
        trip: Trip = ctx.trip
        dx_SD, dweights_SK = (
            # Zeros, not nothing: the others are waiting.
            torch.zeros(shape, dtype=dtype, device=device) if grad is None else grad.to(dtype).contiguous()
            for grad, (shape, dtype, device) in zip(grads, ctx.like, strict=True)
        )
        trip.homeward = _carried(trip, "backward", trip.by.come_home, dx_SD, dweights_SK)
        # `_SetOff` does not read what it is handed: a gradient cannot change its shape on the way.
        return None, dx_SD, dweights_SK


class _Home(Function):
    @staticmethod
    def forward(ctx: Any, trip: Trip, y_SD: Tensor) -> Tensor:
        ctx.trip = trip
        y_TD: Tensor = _carried(trip, "forward", trip.by.come_home, y_SD, None).wait()[0]
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[None, Tensor]:
        dy_SD: Tensor = _carried(ctx.trip, "backward", ctx.trip.by.leave_again, dy_TD).wait()[0]
        return None, dy_SD
