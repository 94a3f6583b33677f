"""Steps 4 and 8: tokens to rows sorted by expert, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from moebius.torch_frontend import launch
from moebius.torch_frontend.bias import biased
from moebius.torch_frontend.dispatch import Sent
from moebius.torch_frontend.dtypes import accumulate_dtype, promoted
from moebius.torch_frontend.operators import call, differentiate

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class PermuteState(NamedTuple):
    """Where each row came from and went. A slot is token * K + k.

    Attributes:
        slot_of_row_R: [R] int32. row_of_slot_SK: [S, K] int32, its inverse; -1 for a slot without a route.
    """

    slot_of_row_R: Int[Tensor, " R"]
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


class Order(NamedTuple):
    """`Permuted` without the rows, and without a gradient."""

    slot_of_row_R: Int[Tensor, " R"]
    row_of_slot_SK: Int[Tensor, "S K"]
    group_sizes_e: Int[Tensor, " e"]
    row_experts_R: Int[Tensor, " R"]
    row_weights_R: Float[Tensor, " R"]


def permute(sent: Sent, n_experts: int) -> Permuted:
    """Copy each token once per slot, in the order of its experts; slots without a route come last.

    Spec: core.reference.permute. R = S * K always, so nothing is fetched to the host.

    Args:
        sent: tokens with local ids in [0, n_experts], n_experts for no route.
        n_experts: e, experts held here.
    """
    # The operator's weights carry no gradient; these do.
    slot_of_row_R, row_of_slot_SK, group_sizes_e, row_experts_R, _ = _sort(
        sent.ids_SK, sent.weights_SK.detach(), n_experts
    )
    weights_R = sent.weights_SK.flatten().index_select(0, slot_of_row_R)
    # where, not a product: a NaN weight of a masked token must not survive.
    row_weights_R = torch.where(row_experts_R < n_experts, weights_R, 0.0)
    state = PermuteState(slot_of_row_R, row_of_slot_SK)
    rows_RD: Tensor = call(_gather, sent.x_SD, *state)
    return Permuted(rows_RD, row_weights_R, group_sizes_e, row_experts_R, state)


def unpermute(
    out_RD: Float[Tensor, "R D"],
    state: PermuteState,
    row_weights_R: Float[Tensor, " R"] | None = None,
    *,
    partial: bool = False,
) -> Tensor:
    """Sum each token's rows in promote_types(dtype, float32), weighted where weights are given, and round once.

    Spec: core.reference.unpermute.

    Args:
        out_RD: rows in the order of `permute`; padding rows are not read.
        row_weights_R: [R] weights to multiply by before the sum, None for none.
        partial: other ranks hold the rest of the sum: do not round yet.
    Returns:
        [S, D], dtype of out_RD, promoted where partial.
    """
    dtype = out_RD.dtype
    if row_weights_R is not None or partial:
        out_RD = promoted(out_RD)
    if row_weights_R is not None:
        out_RD = out_RD * row_weights_R[:, None]
    summed: Tensor = call(_sum_slots, out_RD, *state)
    return summed if partial else summed.to(dtype)


def sort_routes(ids_SK: Int[Tensor, "S K"], weights_SK: Float[Tensor, "S K"], n_experts: int) -> Order:
    """The order of `permute`, stable, without fetching anything to the host."""
    if launch.serves(weights_SK):
        return Order(*launch.sort_routes(ids_SK, weights_SK, n_experts))
    row_experts_R, slot_of_row_R = ids_SK.flatten().sort(stable=True)
    experts_e = torch.arange(n_experts + 1, dtype=torch.int32, device=ids_SK.device)
    group_sizes_e = torch.searchsorted(row_experts_R, experts_e, out_int32=True).diff()
    rows_R = torch.arange(slot_of_row_R.shape[0], dtype=torch.int32, device=ids_SK.device)
    here_R = row_experts_R < n_experts
    row_of_slot_SK = torch.empty_like(rows_R).scatter_(0, slot_of_row_R, torch.where(here_R, rows_R, -1))
    row_weights_R = torch.where(here_R, weights_SK.flatten().index_select(0, slot_of_row_R), 0.0)
    slot_of_row_R = slot_of_row_R.to(torch.int32)
    return Order(slot_of_row_R, row_of_slot_SK.view_as(ids_SK), group_sizes_e, row_experts_R, row_weights_R)


def gather_rows(x_SD: Float[Tensor, "S D"], slot_of_row_R: Int[Tensor, " R"], k: int) -> Tensor:
    """[R, D]: each row's token."""
    if launch.serves(x_SD):
        return launch.gather_rows(x_SD, slot_of_row_R, k)
    return x_SD.index_select(0, slot_of_row_R // max(k, 1))


def scatter_rows(
    x_SD: Float[Tensor, "S D"], slot_of_row_R: Int[Tensor, " R"], row_of_slot_SK: Int[Tensor, "S K"]
) -> Tensor:
    """[R, D]: `gather_rows` but for rows without a slot, which hold anything."""
    if launch.serves(x_SD):
        return launch.scatter_rows(x_SD, row_of_slot_SK)
    return gather_rows(x_SD, slot_of_row_R, row_of_slot_SK.shape[1])


def sum_dots(dots_RB: Float[Tensor, "R B"], row_of_slot_SK: Int[Tensor, "S K"]) -> Tensor:
    """[S, K]: the sum of each slot's row of dots; 0 for a slot without a row."""
    if launch.serves(dots_RB):
        return launch.sum_dots(dots_RB, row_of_slot_SK)
    if dots_RB.shape[0] == 0:
        return dots_RB.new_zeros(row_of_slot_SK.shape)
    taken_SK = dots_RB.sum(1).index_select(0, row_of_slot_SK.flatten().clamp(min=0)).view_as(row_of_slot_SK)
    return torch.where(row_of_slot_SK >= 0, taken_SK, 0.0)


def sum_slots(
    rows_RD: Float[Tensor, "R D"],
    row_of_slot_SK: Int[Tensor, "S K"],
    *,
    bias_eD: Float[Tensor, "e D"] | None = None,
    row_experts_R: Int[Tensor, " R"] | None = None,
    row_weights_R: Float[Tensor, " R"] | None = None,
    after: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """[S, D]: `add_bias` to the rows, then `unpermute` them to `dtype`, by default the rows'; no gradient.

    Args:
        row_weights_R: of the bias, or where `after` of the rows, bias included.
    """
    if launch.serves(rows_RD):
        return launch.sum_slots(
            rows_RD,
            row_of_slot_SK,
            bias_eD=bias_eD,
            row_experts_R=row_experts_R,
            row_weights_R=row_weights_R,
            after=after,
            dtype=dtype,
        )
    rounded = dtype or rows_RD.dtype
    rows_RD = biased(rows_RD, bias_eD, row_experts_R, None if after else row_weights_R)
    if after and row_weights_R is not None:
        rows_RD = promoted(rows_RD) * row_weights_R[:, None]
    absent_SK = row_of_slot_SK < 0
    slots = rows_RD.index_select(0, row_of_slot_SK.flatten().clamp(min=0)).view(*row_of_slot_SK.shape, rows_RD.shape[1])
    if absent_SK.device.type != "cpu" or absent_SK.any():
        slots.masked_fill_(absent_SK[..., None], 0.0)
    return slots.sum(1, dtype=accumulate_dtype(rows_RD.dtype)).to(rounded)


@torch.library.custom_op(
    "moebius::sort_routes",
    mutates_args=(),
    schema="(Tensor ids, Tensor weights, int n_experts) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _sort(ids: Tensor, weights: Tensor, n_experts: int) -> tuple[Tensor, ...]:
    return tuple(sort_routes(ids, weights, n_experts))


# The two are each other's transpose. Written out, both directions are gathers: no scatter, so nothing depends on the
# order of threads, and the gradient of x is summed promoted and rounded once. Operators, not autograd functions:
# compiled by torch 2.11, those lost the gradient in float32 (measured).
@torch.library.custom_op(
    "moebius::gather_rows", mutates_args=(), schema="(Tensor x, Tensor slot_of_row, Tensor row_of_slot) -> Tensor"
)
def _gather(x: Tensor, slot_of_row: Tensor, row_of_slot: Tensor) -> Tensor:
    return gather_rows(x, slot_of_row, row_of_slot.shape[1])


@torch.library.custom_op(
    "moebius::sum_slots", mutates_args=(), schema="(Tensor rows, Tensor slot_of_row, Tensor row_of_slot) -> Tensor"
)
def _sum_slots(rows: Tensor, slot_of_row: Tensor, row_of_slot: Tensor) -> Tensor:
    return sum_slots(rows, row_of_slot)


@_sort.register_fake
def _(ids: Tensor, weights: Tensor, n_experts: int) -> tuple[Tensor, ...]:
    rows = ids.shape[0] * ids.shape[1]
    of_rows, of_experts = (ids.new_empty(n, dtype=torch.int32) for n in (rows, n_experts))
    return (
        of_rows,
        ids.new_empty(ids.shape, dtype=torch.int32),
        of_experts,
        ids.new_empty(rows),
        weights.new_empty(rows),
    )


@_gather.register_fake
def _(x: Tensor, slot_of_row: Tensor, row_of_slot: Tensor) -> Tensor:
    return x.new_empty(slot_of_row.shape[0], x.shape[1])


@_sum_slots.register_fake
def _(rows: Tensor, slot_of_row: Tensor, row_of_slot: Tensor) -> Tensor:
    return rows.new_empty(row_of_slot.shape[0], rows.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _gather_backward(ctx: Any, drows: Tensor) -> tuple[Tensor, None, None]:
    return call(_sum_slots, drows.contiguous(), *ctx.saved_tensors), None, None


def _sum_slots_backward(ctx: Any, dsummed: Tensor) -> tuple[Tensor, None, None]:
    slot_of_row, row_of_slot = ctx.saved_tensors
    here = row_of_slot.flatten().index_select(0, slot_of_row) >= 0
    drows = call(_gather, dsummed.contiguous(), slot_of_row, row_of_slot)
    return torch.where(here[:, None], drows, 0.0), None, None


differentiate(_gather, _gather_backward, _save)
differentiate(_sum_slots, _sum_slots_backward, _save)
