"""Steps 5 and 7: each expert's bias, on the way down times the routing weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.functional import pad

from moebius.core import checks
from moebius.torch_frontend.dtypes import accumulate_dtype, promoted

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def add_bias(
    out_RF: Float[Tensor, "R F"],
    bias_eF: Float[Tensor, "e F"] | None,
    row_experts_R: Int[Tensor, " R"],
    row_weights_R: Float[Tensor, " R"] | None = None,
) -> Tensor:
    """out + bias of the row's expert, times the row's weight where weights are given; rounded once.

    Spec: core.reference.add_bias.

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
    accumulate = accumulate_dtype(out_RF.dtype)
    bias_RF = pad(bias_eF.to(accumulate), (0, 0, 0, 1)).index_select(0, row_experts_R)
    if row_weights_R is not None:
        bias_RF = bias_RF * row_weights_R[:, None]
    return (promoted(out_RF) + bias_RF).to(out_RF.dtype)
