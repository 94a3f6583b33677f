"""Steps 5 and 7: each expert's bias, on the way down times the routing weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from moebius.core import checks
from moebius.torch_frontend import launch
from moebius.torch_frontend.dtypes import accumulate_dtype, promoted
from moebius.torch_frontend.operators import call, differentiate

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def add_bias(
    out_RF: Float[Tensor, "R F"],
    bias_eF: Float[Tensor, "e F"] | None,
    row_experts_R: Int[Tensor, " R"],
    row_weights_R: Float[Tensor, " R"] | None = None,
) -> Tensor:
    """out + bias of the row's expert, times the row's weight where weights are given; rounded once.

    Spec: core.reference.add_bias. The bias' gradient is the float64 sum over the expert's rows, rounded.

    Args:
        out_RF: [R, F] rows sorted by expert.
        bias_eF: [e, F], dtype of out_RF, or None to add nothing.
        row_experts_R: [R] int32, each row's expert; e in padding rows, which get no bias.
        row_weights_R: [R] routing weights, None for ones.
    Returns:
        [R, F], dtype of out_RF; `out_RF` itself without a bias.
    """
    if bias_eF is None:
        return out_RF
    checks.bias(out_RF, bias_eF, row_experts_R, row_weights_R)
    return _added(out_RF, call(_of_rows, bias_eF, row_experts_R), row_weights_R)


def biased(
    out_RF: Float[Tensor, "R F"],
    bias_eF: Float[Tensor, "e F"] | None,
    row_experts_R: Int[Tensor, " R"] | None,
    row_weights_R: Float[Tensor, " R"] | None = None,
) -> Tensor:
    """`add_bias` without checks and gradients."""
    if bias_eF is None or row_experts_R is None:
        return out_RF
    return _added(out_RF, _take(bias_eF, row_experts_R), row_weights_R)


def sum_rows(
    values_RF: Float[Tensor, "R F"],
    group_sizes_e: Int[Tensor, " e"],
    row_weights_R: Float[Tensor, " R"] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """[e, F]: each expert's rows, times their weights (promoted) where given, added in float64, rounded to `dtype`.

    Rows past sum(group_sizes_e) are not read. `dtype` is that of values_RF by default.
    """
    dtype = dtype or values_RF.dtype
    if launch.serves(values_RF):
        return launch.sum_rows(values_RF, group_sizes_e, row_weights_R, dtype=dtype)
    end = int(group_sizes_e.sum()) if values_RF.device.type == "cpu" else values_RF.shape[0]
    values_RF = values_RF[:end]
    if row_weights_R is not None:
        values_RF = promoted(values_RF) * row_weights_R[:end, None]
    sizes = group_sizes_e.long()
    if values_RF.device.type != "cpu":  # the tail as one more group, so that nothing is fetched to the host
        sizes = torch.cat([sizes, (end - sizes.sum())[None]])
    summed = torch.segment_reduce(values_RF.double(), "sum", lengths=sizes, unsafe=True, initial=0.0)
    return summed[: group_sizes_e.shape[0]].to(dtype)


def dot_rows(
    values_RF: Float[Tensor, "R F"], bias_eF: Float[Tensor, "e F"], row_experts_R: Int[Tensor, " R"]
) -> Tensor:
    """[R] promoted: each row times its expert's bias, summed; 0 where row_experts_R is e."""
    if launch.serves(values_RF):
        return launch.dot_rows(values_RF, bias_eF, row_experts_R)
    here_R = row_experts_R < bias_eF.shape[0]
    return torch.where(here_R, (promoted(values_RF) * _take(bias_eF, row_experts_R)).sum(-1), 0.0)


def _take(bias_eF: Float[Tensor, "e F"], row_experts_R: Int[Tensor, " R"]) -> Tensor:
    return pad(promoted(bias_eF), (0, 0, 0, 1)).index_select(0, row_experts_R)


def _added(
    out_RF: Float[Tensor, "R F"], bias_RF: Float[Tensor, "R F"], row_weights_R: Float[Tensor, " R"] | None
) -> Tensor:
    if row_weights_R is not None:
        bias_RF = bias_RF * row_weights_R[:, None]
    return (promoted(out_RF) + bias_RF).to(out_RF.dtype)


# Each other's transpose, so that the gradient is a sum in a fixed order, not a scatter.
@torch.library.custom_op("moebius::bias_of_rows", mutates_args=(), schema="(Tensor bias, Tensor row_experts) -> Tensor")
def _of_rows(bias: Tensor, row_experts: Tensor) -> Tensor:
    return _take(bias, row_experts)


@torch.library.custom_op(
    "moebius::bias_of_rows_backward",
    mutates_args=(),
    schema="(Tensor values, Tensor row_experts, int n_experts, ScalarType dtype) -> Tensor",
)
def _of_rows_backward(values: Tensor, row_experts: Tensor, n_experts: int, dtype: torch.dtype) -> Tensor:
    experts_e = torch.arange(n_experts + 1, dtype=row_experts.dtype, device=row_experts.device)
    group_sizes_e = torch.searchsorted(row_experts, experts_e, out_int32=True).diff()
    return sum_rows(values, group_sizes_e, dtype=dtype)


@_of_rows.register_fake
def _(bias: Tensor, row_experts: Tensor) -> Tensor:
    return bias.new_empty(row_experts.shape[0], bias.shape[1], dtype=accumulate_dtype(bias.dtype))


@_of_rows_backward.register_fake
def _(values: Tensor, row_experts: Tensor, n_experts: int, dtype: torch.dtype) -> Tensor:
    return values.new_empty(n_experts, values.shape[1], dtype=dtype)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.shape, ctx.dtype = inputs[0].shape, inputs[0].dtype


def _backward(ctx: Any, drows: Tensor) -> tuple[Tensor, None]:
    return call(_of_rows_backward, drows.contiguous(), *ctx.saved_tensors, ctx.shape[0], ctx.dtype), None


def _save_backward(ctx: Any, inputs: tuple[Tensor, Tensor, int, torch.dtype], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward_backward(ctx: Any, dbias: Tensor) -> tuple[Tensor, None, None, None]:
    return call(_of_rows, dbias, *ctx.saved_tensors), None, None, None


differentiate(_of_rows, _backward, _save)
differentiate(_of_rows_backward, _backward_backward, _save_backward)
