"""The Triton kernels of core.kernels on this framework's tensors.

Each function has the name, arguments and results of the torch formulas that it stands in for (permute.py, activate.py,
bias.py). Nothing here waits for the device and all memory comes from torch: a CUDA graph can capture every call.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moebius.core.activations import Activation
from moebius.core.kernels import plan, plan_grouped, plan_hopper, plan_portable
from moebius.core.kernels.plan_grouped import Device
from moebius.torch_frontend.play import run

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def serves(*tensors: Tensor | None) -> bool:
    """Whether the kernels can take these tensors; None and integers are taken wherever they lie with the others.

    They need triton, float32, bfloat16 or float16, and a CUDA device of compute capability 8.0 or more (or
    TRITON_INTERPRET=1, under which Triton runs its kernels on the CPU, slowly: for tests).
    """
    if not _has_triton():
        return False
    for tensor in tensors:
        if tensor is None:
            continue
        if (tensor.is_floating_point() and tensor.dtype not in _DTYPES) or not _device_serves(tensor.device):
            return False
    return True


def mask_routes(ids_TK: Int[Tensor, "T K"], token_mask_T: Bool[Tensor, " T"], n_experts: int, no_route: int) -> Tensor:
    """[T, K] int32: the ids, `no_route` for those of a masked token and those outside [0, n_experts)."""
    routed_TK, n_slots = ids_TK.new_empty(ids_TK.shape, dtype=torch.int32), ids_TK.numel()
    launch = plan.mask_routes(n_slots, ids_TK.shape[1], n_experts, no_route)
    run(launch, ids_TK.contiguous(), token_mask_T.contiguous(), n_slots, routed_TK)
    return routed_TK


def sort_routes(
    ids_SK: Int[Tensor, "S K"], weights_SK: Float[Tensor, "S K"], n_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The routes in the order of their experts, then slots; slots without a route (id n_experts) come last.

    Args:
        ids_SK: int32 in [0, n_experts]. weights_SK: routing weights, float32.
    Returns:
        The fields of permute.Order: slot_of_row_R, row_of_slot_SK, group_sizes_e, row_experts_R, row_weights_R.
    """
    ids_SK, weights_SK = ids_SK.contiguous(), weights_SK.contiguous()
    n_rows = ids_SK.numel()
    slot_of_row_R, row_experts_R, row_weights_R = (_empty(t, n_rows) for t in (ids_SK, ids_SK, weights_SK))
    row_of_slot_SK, group_sizes_e = torch.empty_like(ids_SK), _empty(ids_SK, n_experts)
    if n_rows <= plan.FEW:
        outputs = slot_of_row_R, row_of_slot_SK, group_sizes_e, row_experts_R, row_weights_R
        run(plan.sort_few_routes(n_experts), ids_SK, weights_SK, n_rows, *outputs)
        return outputs
    count, scan, place = plan.sort_routes(n_rows, n_experts)
    blocks = plan.slot_blocks(n_rows)
    counts_BN = _empty(ids_SK, blocks, plan.count_width(n_experts))
    before_BN = torch.empty_like(counts_BN)
    run(count, ids_SK, n_rows, counts_BN)
    run(scan, counts_BN, blocks, before_BN, group_sizes_e)
    written = slot_of_row_R, row_of_slot_SK, row_experts_R, row_weights_R
    run(place, ids_SK, weights_SK, before_BN, group_sizes_e, n_rows, *written)
    return slot_of_row_R, row_of_slot_SK, group_sizes_e, row_experts_R, row_weights_R


def gather_rows(x_SD: Float[Tensor, "S D"], slot_of_row_R: Int[Tensor, " R"], k: int) -> Tensor:
    """[R, D]: row r is x[slot_of_row[r] // k]."""
    rows_RD = _empty(x_SD, slot_of_row_R.shape[0], x_SD.shape[1])
    launch = plan.gather_rows(*rows_RD.shape[:1], k, x_SD.shape[1])
    run(launch, x_SD.contiguous(), slot_of_row_R.contiguous(), slot_of_row_R.shape[0], rows_RD)
    return rows_RD


def scatter_rows(x_SD: Float[Tensor, "S D"], row_of_slot_SK: Int[Tensor, "S K"]) -> Tensor:
    """[S * K, D]: row row_of_slot[s, k] is x[s]; rows without a slot hold anything."""
    S, K = row_of_slot_SK.shape
    rows_RD = _empty(x_SD, S * K, x_SD.shape[1])
    run(plan.scatter_rows(S, K, x_SD.shape[1]), x_SD.contiguous(), row_of_slot_SK.contiguous(), S, rows_RD)
    return rows_RD


def sum_dots(dots_RB: Float[Tensor, "R B"], row_of_slot_SK: Int[Tensor, "S K"]) -> Tensor:
    """[S, K] float32: the sum of each slot's row of dots, in their order; 0 for a slot without a row."""
    sums_SK = torch.empty(row_of_slot_SK.shape, dtype=torch.float32, device=dots_RB.device)
    launch = plan.sum_dots(row_of_slot_SK.numel(), dots_RB.shape[1])
    run(launch, dots_RB, row_of_slot_SK.contiguous(), row_of_slot_SK.numel(), sums_SK)
    return sums_SK


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
    """[S, D]: the sum of each token's rows in the order of its slots, in float32, rounded once.

    Args:
        rows_RD: rows of the tail are never read.
        row_of_slot_SK: int32, -1 for no row.
        bias_eD: added to each row by its expert (row_experts_R), times row_weights_R unless `after`; rounded.
        row_weights_R: float32 weights of the bias or, with `after`, of the rows. dtype: of the result.
    """
    weighted = row_weights_R is not None
    weight_bias = bias_eD is not None and weighted and not after
    (S, K), D = row_of_slot_SK.shape, rows_RD.shape[1]
    y_SD = torch.empty(S, D, dtype=dtype or rows_RD.dtype, device=rows_RD.device)
    rows_RD, row_of_slot_SK = rows_RD.contiguous(), row_of_slot_SK.contiguous()
    launch = plan.sum_slots(S, K, D, bias_eD is not None, weight_bias, weighted and after)
    run(launch, rows_RD, row_of_slot_SK, *_given(rows_RD, bias_eD, row_experts_R, row_weights_R), S, y_SD)
    return y_SD


def activate_rows(
    hidden_RU: Float[Tensor, "R U"],
    row_weights_R: Float[Tensor, " R"] | None,
    activation: Activation,
    *,
    bias_eU: Float[Tensor, "e U"] | None = None,
    row_experts_R: Int[Tensor, " R"] | None = None,
) -> Tensor:
    """[R, I]: activation times weight in float32, rounded once; hidden plus its bias is rounded first."""
    hidden_RU = hidden_RU.contiguous()
    n_rows, inter_dim = hidden_RU.shape[0], hidden_RU.shape[1] // activation.up_width(1)
    act_RI = _empty(hidden_RU, n_rows, inter_dim)
    launch = plan.activate_rows(n_rows, inter_dim, activation, _count(bias_eU), row_weights_R is not None)
    run(launch, hidden_RU, *_given(hidden_RU, bias_eU, row_experts_R, row_weights_R), n_rows, act_RI)
    return act_RI


def activate_rows_backward(
    dact_RI: Float[Tensor, "R I"],
    hidden_RU: Float[Tensor, "R U"],
    row_weights_R: Float[Tensor, " R"] | None,
    activation: Activation,
    *,
    bias_eU: Float[Tensor, "e U"] | None = None,
    row_experts_R: Int[Tensor, " R"] | None = None,
    in_place: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(dhidden_RU, rounded once; drow_weights_R in float32, None without weights).

    in_place: dhidden is written over hidden, where that is contiguous.
    """
    dact_RI, hidden_RU = dact_RI.contiguous(), hidden_RU.contiguous()
    n_rows, inter_dim = dact_RI.shape
    dhidden_RU = hidden_RU if in_place else torch.empty_like(hidden_RU)
    drow_weights_R = None if row_weights_R is None else torch.empty_like(row_weights_R, dtype=torch.float32)
    launch = plan.activate_rows_backward(n_rows, inter_dim, activation, _count(bias_eU), row_weights_R is not None)
    inputs = dact_RI, hidden_RU, *_given(hidden_RU, bias_eU, row_experts_R, row_weights_R)
    run(launch, *inputs, n_rows, dhidden_RU, *_given(hidden_RU, drow_weights_R))
    return dhidden_RU, drow_weights_R


def sum_rows(
    values_RF: Float[Tensor, "R F"],
    group_sizes_e: Int[Tensor, " e"],
    row_weights_R: Float[Tensor, " R"] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """[e, F]: each expert's rows, times their weights in float32 where given, added in float64, rounded to `dtype`.

    Rows past sum(group_sizes_e) are not read. `dtype` is that of values_RF by default.
    """
    values_RF, group_sizes_e = values_RF.contiguous(), group_sizes_e.contiguous()
    (n_rows, F), n_experts = values_RF.shape, group_sizes_e.shape[0]
    sums_eF = torch.empty(n_experts, F, dtype=dtype or values_RF.dtype, device=values_RF.device)
    parts_PG = _empty(group_sizes_e, plan.parts(n_rows, n_experts), 2 * F)
    sum_parts, join_parts = plan.sum_rows(n_rows, n_experts, F, row_weights_R is not None)
    run(sum_parts, values_RF, group_sizes_e, *_given(values_RF, row_weights_R), parts_PG)
    run(join_parts, parts_PG, group_sizes_e, sums_eF)
    return sums_eF


def dot_rows(
    values_RF: Float[Tensor, "R F"], bias_eF: Float[Tensor, "e F"], row_experts_R: Int[Tensor, " R"]
) -> Tensor:
    """[R] float32: each row times the bias of its expert; 0 for rows without one, which are not read."""
    dots_R = torch.empty(values_RF.shape[0], dtype=torch.float32, device=values_RF.device)
    launch = plan.dot_rows(values_RF.shape[0], *bias_eF.shape)
    inputs = values_RF.contiguous(), bias_eF.contiguous(), row_experts_R.contiguous()
    run(launch, *inputs, values_RF.shape[0], dots_R)
    return dots_R


def list_tiles(group_sizes_e: Int[Tensor, " e"], n_rows: int, height: int) -> tuple[Tensor, Tensor]:
    """(tiles, starts) of kernels.tiles.list_tiles for n_rows rows; tiles have `height` rows."""
    e = group_sizes_e.shape[0]
    if e == 0:
        return group_sizes_e.new_zeros(1, 4), group_sizes_e.new_zeros(1)
    tiles_Q4 = _empty(group_sizes_e, 1 + plan_portable.tiles(n_rows, e, height), 4)
    starts_e = _empty(group_sizes_e, e + 1)
    run(plan_portable.list_tiles(e, height), group_sizes_e.contiguous(), tiles_Q4, starts_e)
    return tiles_Q4, starts_e


def height(like: Tensor, n_rows: int, n_experts: int, width_in: int, width_out: int) -> int:
    """Rows of a tile of such a product, for `list_tiles`.

    Args:
        like: of the dtype, and on the device, of the rows.
    """
    return plan_grouped.height(n_rows, n_experts, width_in, width_out, *_where(like))


def grouped_product(
    rows_RD: Float[Tensor, "R D"], weight: Float[Tensor, "e a b"], tiles_Q4: Int[Tensor, "Q 4"], transposed: bool
) -> Tensor:
    """[R, F]: each row times its expert's matrix; rows past the end hold anything.

    Args:
        rows_RD, weight: contiguous, at addresses that are multiples of 16 bytes. weight is [e, D, F], or [e, F, D]
            where `transposed`. tiles_Q4: of `list_tiles`, of the product's `height`.
    """
    (R, D), F = rows_RD.shape, weight.shape[1 if transposed else 2]
    out_RF = _empty(rows_RD, R, F)
    launch = plan_grouped.product(R, weight.shape[0], D, F, transposed, *_where(rows_RD))
    run(launch, rows_RD, weight, tiles_Q4, out_RF)
    return out_RF


def grouped_weight_gradient(
    rows_RD: Float[Tensor, "R D"], dout_RF: Float[Tensor, "R F"], starts_e: Int[Tensor, " starts"]
) -> Tensor:
    """[e, D, F]: each expert's rows^T @ dout; operands as in `grouped_product`, starts of `list_tiles`."""
    e, D, F = len(starts_e) - 1, rows_RD.shape[1], dout_RF.shape[1]
    dweight_eDF = _empty(rows_RD, e, D, F)
    run(plan_grouped.weight_gradient(e, D, F, *_where(rows_RD)), rows_RD, dout_RF, starts_e, dweight_eDF)
    return dweight_eDF


def fuses(down_eID: Float[Tensor, "e I D"]) -> bool:
    """Whether `activated_product` and `differentiated_product` compute experts like these."""
    _, I, D = down_eID.shape
    return plan_grouped.fuses(*_where(down_eID), D, I)


def activated_product(
    rows_RD: Float[Tensor, "R D"],
    up_eDU: Float[Tensor, "e D U"],
    tiles_Q4: Int[Tensor, "Q 4"],
    row_weights_R: Float[Tensor, " R"] | None,
    activation: Activation,
    bias_eU: Float[Tensor, "e U"] | None = None,
) -> tuple[Tensor, Tensor]:
    """(`grouped_product` plus its bias, its `activate_rows`); see `fuses`."""
    (R, D), U = rows_RD.shape, up_eDU.shape[2]
    I = U // activation.up_width(1)
    hidden_RU, act_RI = _empty(rows_RD, R, U), _empty(rows_RD, R, I)
    processors = _device(rows_RD.device).processors
    few = plan_hopper.few(R, up_eDU.shape[0], U, processors)
    told = D, I, activation, bias_eU is not None, row_weights_R is not None
    launch = plan_hopper.activated_product(processors, *told, few)
    run(launch, rows_RD, up_eDU, *_given(rows_RD, bias_eU, row_weights_R), tiles_Q4, hidden_RU, act_RI)
    return hidden_RU, act_RI


def differentiated_product(
    dout_RD: Float[Tensor, "R D"],
    down_eID: Float[Tensor, "e I D"],
    tiles_Q4: Int[Tensor, "Q 4"],
    hidden_RU: Float[Tensor, "R U"],
    row_weights_R: Float[Tensor, " R"],
    activation: Activation,
    *,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden, act, dots): `activate_rows_backward` of the transposed product, and the activation of hidden.

    hidden is that of `activated_product`, with its bias.

    dots [R, B] float32 are the parts of the routing weights' gradients; see `sum_dots`.

    Args:
        in_place: dhidden is written over hidden.
    """
    (R, D), I = dout_RD.shape, down_eID.shape[1]
    dhidden_RU = hidden_RU if in_place else torch.empty_like(hidden_RU)
    act_RI = _empty(dout_RD, R, I)
    dots_RB = torch.empty(R, plan_hopper.dots(I), dtype=torch.float32, device=dout_RD.device)
    processors = _device(dout_RD.device).processors
    launch = plan_hopper.differentiated_product(processors, D, I, activation)
    read = dout_RD, down_eID, hidden_RU, row_weights_R.contiguous(), tiles_Q4
    run(launch, *read, dhidden_RU, act_RI, dots_RB)
    return dhidden_RU, act_RI, dots_RB


def _where(operand: Tensor) -> tuple[str, Device]:
    return _DTYPES[operand.dtype], _device(operand.device)


@cache
def _device(device: torch.device) -> Device:
    if device.type == "cpu":
        return plan_grouped.INTERPRETER
    found = torch.cuda.get_device_properties(device)
    return Device((found.major, found.minor), found.multi_processor_count)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@cache
def _device_serves(device: torch.device) -> bool:
    if plan_grouped.interpreted():
        return True
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def _empty(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape)


def _count(bias: Tensor | None) -> int | None:
    return None if bias is None else len(bias)


def _given(stand_in: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """The tensors, contiguous; for one that is left out any pointer, which the kernel does not read."""
    return [stand_in if tensor is None else tensor.contiguous() for tensor in tensors]
