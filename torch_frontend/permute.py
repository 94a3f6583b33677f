"""Steps 4 and 8: tokens to rows sorted by expert, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from moebius.torch_frontend.dispatch import Sent
from moebius.torch_frontend.dtypes import accumulate_dtype, promoted

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
    rows_RD: Tensor = _gather(sent.x_SD, *state)
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
        out_RD = promoted(out_RD) * row_weights_R[:, None]
    summed: Tensor = _sum_slots(out_RD, *state)
    return summed.to(dtype)


# The two are each other's transpose. Written out, both directions are gathers: no scatter, so nothing depends on the
# order of threads, and the gradient of x is summed promoted and rounded once. Operators, not autograd functions:
# compiled by torch 2.11, those lost the gradient in float32 (measured).
@torch.library.custom_op(
    "moebius::gather_rows", mutates_args=(), schema="(Tensor x, Tensor token_of_row, Tensor row_of_slot) -> Tensor"
)
def _gather(x: Tensor, token_of_row: Tensor, row_of_slot: Tensor) -> Tensor:
    return x.index_select(0, token_of_row)


@torch.library.custom_op(
    "moebius::sum_slots", mutates_args=(), schema="(Tensor rows, Tensor token_of_row, Tensor row_of_slot) -> Tensor"
)
def _sum_slots(rows: Tensor, token_of_row: Tensor, row_of_slot: Tensor) -> Tensor:
    slots = rows.index_select(0, row_of_slot.flatten()).view(*row_of_slot.shape, rows.shape[1])
    return slots.sum(1, dtype=accumulate_dtype(rows.dtype)).to(rows.dtype)


@_gather.register_fake
def _(x: Tensor, token_of_row: Tensor, row_of_slot: Tensor) -> Tensor:
    return x.new_empty(token_of_row.shape[0], x.shape[1])


@_sum_slots.register_fake
def _(rows: Tensor, token_of_row: Tensor, row_of_slot: Tensor) -> Tensor:
    return rows.new_empty(row_of_slot.shape[0], rows.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _gather_backward(ctx: Any, drows: Tensor) -> tuple[Tensor, None, None]:
    return _sum_slots(drows, *ctx.saved_tensors), None, None


def _sum_slots_backward(ctx: Any, dsummed: Tensor) -> tuple[Tensor, None, None]:
    return _gather(dsummed, *ctx.saved_tensors), None, None


_gather.register_autograd(_gather_backward, setup_context=_save)
_sum_slots.register_autograd(_sum_slots_backward, setup_context=_save)
