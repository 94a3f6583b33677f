"""Steps 4 and 8: tokens to rows sorted by expert, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from moebius.torch_frontend.dispatch import Sent
from moebius.torch_frontend.dtypes import accumulate_dtype

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class PermuteState(NamedTuple):
    """Where each row came from and went: token_of_row_R [R] and its inverse row_of_slot_SK [S, K], int64."""

    token_of_row_R: Int[Tensor, " R"]
    row_of_slot_SK: Int[Tensor, "S K"]


class Permuted(NamedTuple):
    """Rows sorted by expert; inside one expert by token, then slot. Rows past sum(group_sizes_e) are padding.

    Attributes:
        rows_RD: one row per (token, slot). row_weights_R: its routing weight, 0 in padding.
        group_sizes_e: int32, rows of each expert. row_experts_R: int32, each row's expert, e in padding.
        state: for `unpermute`.
    """

    rows_RD: Float[Tensor, "R D"]
    row_weights_R: Float[Tensor, " R"]
    group_sizes_e: Int[Tensor, " e"]
    row_experts_R: Int[Tensor, " R"]
    state: PermuteState


def permute(sent: Sent, n_experts: int) -> Permuted:
    """Copy each token once per slot, in the order of its experts; slots without a route come last.

    Spec: core.reference.permute. R = S * K always, so nothing is fetched to the host.

    Args:
        sent: tokens with local ids in [0, n_experts], n_experts for no route.
        n_experts: e, experts held here.
    """
    S, K = sent.ids_SK.shape
    row_experts_R, order_R = sent.ids_SK.flatten().sort(stable=True)
    experts_e = torch.arange(n_experts + 1, dtype=torch.int32, device=row_experts_R.device)
    group_sizes_e = torch.searchsorted(row_experts_R, experts_e, out_int32=True).diff()
    row_of_slot_SK = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(S * K, device=order_R.device))
    state = PermuteState(order_R // K, row_of_slot_SK.view(S, K))
    weights_R = sent.weights_SK.flatten().index_select(0, order_R)
    # where, not a product: a NaN weight of a masked token must not survive.
    row_weights_R = torch.where(row_experts_R < n_experts, weights_R, 0.0)
    rows_RD: Tensor = _Gather.apply(sent.x_SD, *state)
    return Permuted(rows_RD, row_weights_R, group_sizes_e, row_experts_R, state)


def unpermute(
    out_RD: Float[Tensor, "R D"], state: PermuteState, row_weights_R: Float[Tensor, " R"] | None = None
) -> Tensor:
    """Sum each token's rows in promote_types(dtype, float32), weighted where weights are given, and round once.

    Spec: core.reference.unpermute.

    Args:
        out_RD: rows in the order of `permute`; padding rows are zero.
        row_weights_R: [R] weights to multiply by before the sum, None for none.
    Returns:
        [S, D], dtype of out_RD.
    """
    dtype = out_RD.dtype
    if row_weights_R is not None:
        out_RD = out_RD.to(accumulate_dtype(dtype)) * row_weights_R[:, None]
    summed: Tensor = _SumSlots.apply(out_RD, *state)
    return summed.to(dtype)


def _gather(x_SD: Float[Tensor, "S D"], token_of_row_R: Int[Tensor, " R"]) -> Tensor:
    return x_SD.index_select(0, token_of_row_R)


def _sum_slots(rows_RD: Float[Tensor, "R D"], row_of_slot_SK: Int[Tensor, "S K"]) -> Tensor:
    slots_SKD = rows_RD.index_select(0, row_of_slot_SK.flatten()).view(*row_of_slot_SK.shape, rows_RD.shape[1])
    return slots_SKD.sum(1, dtype=accumulate_dtype(rows_RD.dtype)).to(rows_RD.dtype)


# The two are each other's transpose. Written out, both directions are gathers: no scatter, so nothing depends on the
# order of threads, and the gradient of x is summed promoted and rounded once.
class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        x_SD: Float[Tensor, "S D"], token_of_row_R: Int[Tensor, " R"], row_of_slot_SK: Int[Tensor, "S K"]
    ) -> Tensor:
        return _gather(x_SD, token_of_row_R)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _SumSlots.apply(grads[0], *ctx.saved_tensors), None, None


class _SumSlots(torch.autograd.Function):
    @staticmethod
    def forward(
        rows_RD: Float[Tensor, "R D"], token_of_row_R: Int[Tensor, " R"], row_of_slot_SK: Int[Tensor, "S K"]
    ) -> Tensor:
        return _sum_slots(rows_RD, row_of_slot_SK)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _Gather.apply(grads[0], *ctx.saved_tensors), None, None
