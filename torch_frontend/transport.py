"""Tokens over the ranks and back: two linear maps, each the other's adjoint.

`spread` copies a token to the ranks that want it, `collect` adds what they made of it. The gradient of one is the
other, over the same layout, so a layer's four transfers need one. What travels has the dtype that it is given in; the
ranks' parts are added promoted, in the order of the ranks, and rounded once. Every rank of the group makes the same
calls in the same order, backward passes included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from moebius.torch_frontend.dtypes import accumulate_dtype
from moebius.torch_frontend.liveness import collective

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Layout = Any  # of a transport


@runtime_checkable
class Transport(Protocol):
    """How rows travel."""

    def send(self, x: Tensor, layout: Layout) -> Tensor:
        """[T, ...] to [S, ...], any dtype."""
        ...

    def back(self, y: Tensor, layout: Layout) -> Tensor:
        """[S, ...] to [T, ...] in y's accumulate dtype: each token's parts, added. `send`'s adjoint."""
        ...


def spread(
    transport: Transport,
    layout: Layout,
    x_TD: Float[Tensor, "T D"],
    weights_TK: Float[Tensor, "T K"],
    ids_TK: Int[Tensor, "T K"],
    grads: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, weights and int32 ids of this rank as [S, D], [S, K], [S, K].

    Args:
        grads: whether any rank needs the gradient of x, and of the weights: both passes are collectives.
    """
    x_TD, weights_TK = _anchored(x_TD, grads[0]), _anchored(weights_TK, grads[1])
    x_SD, weights_SK, ids_SK = _Spread.apply(transport, layout, x_TD, weights_TK, ids_TK, grads)
    return x_SD, weights_SK, ids_SK


def collect(transport: Transport, layout: Layout, y_SX: Float[Tensor, "S ..."], dtype: torch.dtype) -> Tensor:
    """[T, ...] in `dtype`; its gradient travels in that dtype."""
    y_TX: Tensor = _Collect.apply(transport, layout, y_SX, dtype)
    return y_TX


def _anchored(value: Tensor, needed: bool) -> Tensor:
    """`value` in the autograd graph if any rank needs its gradient: backward is a collective too."""
    if not needed or value.requires_grad:
        return value
    return value.detach().requires_grad_()


class _Spread(Function):
    """One node for tokens, weights and ids, so that backward has one order on every rank."""

    @staticmethod
    def forward(
        ctx: Any,
        transport: Transport,
        layout: Layout,
        x_TD: Tensor,
        weights_TK: Tensor,
        ids_TK: Tensor,
        grads: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.transport, ctx.layout, ctx.grads = transport, layout, grads
        # As bytes, weights and ids share one collective.
        routes_T = torch.cat([_bytes(weights_TK), _bytes(ids_TK)], dim=1)
        routes_S = transport.send(routes_T, layout)
        weights_S, ids_S = routes_S.split([routes_T.shape[1] - 4 * ids_TK.shape[1], 4 * ids_TK.shape[1]], dim=1)
        ids_SK = ids_S.contiguous().view(torch.int32)
        ctx.mark_non_differentiable(ids_SK)
        return transport.send(x_TD, layout), weights_S.contiguous().view(weights_TK.dtype), ids_SK

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found = [
            collect(ctx.transport, ctx.layout, grad, grad.dtype) if wanted else None
            for grad, wanted in zip(grads[:2], ctx.grads, strict=True)
        ]
        return None, None, *found, None, None


class _Collect(Function):
    @staticmethod
    def forward(ctx: Any, transport: Transport, layout: Layout, y_SX: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.transport, ctx.layout, ctx.dtype = transport, layout, y_SX.dtype
        return transport.back(y_SX, layout).to(dtype)

    @staticmethod
    def backward(ctx: Any, dy_TX: Tensor) -> tuple[None, None, Tensor, None]:
        return None, None, _Sent.apply(ctx.transport, ctx.layout, dy_TX).to(ctx.dtype), None


class _Sent(Function):
    """`send` of one tensor, differentiable: what `_Collect`'s gradient is made of."""

    @staticmethod
    def forward(ctx: Any, transport: Transport, layout: Layout, x_TX: Tensor) -> Tensor:
        ctx.transport, ctx.layout = transport, layout
        return transport.send(x_TX, layout)

    @staticmethod
    def backward(ctx: Any, dx_SX: Tensor) -> tuple[None, None, Tensor]:
        return None, None, collect(ctx.transport, ctx.layout, dx_SX, dx_SX.dtype)


def exchange(rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    """Blocks of rows, one for each rank, for theirs; sizes in rows."""
    out = rows.new_empty(sum(received), *rows.shape[1:])
    collective(dist.all_to_all_single, out, rows.contiguous(), received, sent, group=group)
    return out


def added(parts_nX: Tensor) -> Tensor:
    """The sum of the ranks' parts, promoted, in the order of the ranks."""
    return parts_nX.sum(0, dtype=accumulate_dtype(parts_nX.dtype))


def _bytes(value: Tensor) -> Tensor:
    # clone, not contiguous: an empty tensor counts as contiguous whatever its strides, and then has no bytes to view.
    return value.clone(memory_format=torch.contiguous_format).view(torch.uint8)
