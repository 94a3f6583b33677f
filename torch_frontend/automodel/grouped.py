"""The documented steps round the grouped matmul: bias, permutation, and the two products with an activation between."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moebius.core.errors import ShapeError
from moebius.torch_frontend.bias import add_bias
from moebius.torch_frontend.dispatch import Local
from moebius.torch_frontend.matmul import grouped_matmul
from moebius.torch_frontend.permute import sort_routes

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


def _apply_bias(
    value: Float[Tensor, "... F"],
    bias: Float[Tensor, "e F"] | Iterable[Tensor] | None,
    tokens_per_expert: Any,
    permuted_probs: Float[Tensor, "*N"] | None = None,
) -> Tensor:
    """value + bias of each row's expert, times the row's weight where weights are given; rounded once.

    A view of `add_bias` with counts instead of ids: the same rounding, the same deterministic gradients.

    Args:
        value: [..., F], rows sorted by expert in its leading axes, in order.
        bias: [experts, F], or one [F] an expert, or None to return `value` itself.
        tokens_per_expert: rows of each expert, a tensor of any dtype and device or a list; they sum to value's rows.
        permuted_probs: [rows, 1], or what broadcasts to it.
    Returns:
        Shape and dtype of value.
    Raises:
        ShapeError: counts that do not sum to the rows (on a GPU the device asserts it), or shapes that do not fit.
    """
    if bias is None:
        return value
    bias_eF = bias if isinstance(bias, Tensor) else torch.stack(list(bias))
    out_RF = value.reshape(-1, value.shape[-1])
    row_experts_R = _row_experts(tokens_per_expert, bias_eF.shape[0], out_RF)
    row_weights_R = None if permuted_probs is None else _column(permuted_probs, out_RF.shape[0])
    return add_bias(out_RF, bias_eF, row_experts_R, row_weights_R).view(value.shape)


def _permute_tokens_for_grouped_mm(
    indices: Int[Tensor, "T K"],
    weights: Float[Tensor, "T K"],
    token_mask: Bool[Tensor, " T"],
    n_local_experts: int,
    experts_start_idx: int,
    *,
    return_slot_ids: bool = False,
) -> tuple[Tensor, ...]:
    """Which token each row comes from, sorted by local expert, then token, then slot.

    A view of `permute` cut to the rows that are used, which fetches their number to the host.

    Args:
        indices: [T, K] int32 or int64, expert ids of all ranks; -1, other ranks' and impossible ids are dropped.
        weights: [T, K] floating. token_mask: [T] bool, True for a valid token.
        n_local_experts, experts_start_idx: this rank holds [start, start + n).
        return_slot_ids: also return t * K + k of each row.
    Returns:
        token ids [N] int64; slot ids [N] int64 if asked for; weights [N], promote_types(dtype, float32),
        differentiable; rows of each expert [n] int64; their running sum [n] int32.
    """
    ids_TK = indices - experts_start_idx
    sent, _ = Local().dispatch(weights, weights, ids_TK, token_mask, n_local_experts)
    order = sort_routes(sent.ids_SK, sent.weights_SK.detach(), n_local_experts)
    offs = order.group_sizes_e.cumsum(0, dtype=torch.int32)
    slots = order.slot_of_row_R[: int(order.group_sizes_e.sum())].long()
    tokens = slots // max(indices.shape[1], 1)
    row_weights = sent.weights_SK.flatten().index_select(0, slots)
    found = (tokens, slots) if return_slot_ids else (tokens,)
    return *found, row_weights, order.group_sizes_e.long(), offs


def _torch_mm_experts_fwd(
    hidden_states: Float[Tensor, "N D"],
    gate_and_up_projs: Float[Tensor, "e D U"],
    down_projs: Float[Tensor, "e I D"],
    tokens_per_expert: Int[Tensor, " e"],
    permuted_probs: Float[Tensor, "N 1"],
    activation_fn: Callable[[Tensor, Tensor], Tensor],
    use_mxfp8: bool = False,
) -> Tensor:
    """Both grouped products with the weighted activation between them, without biases.

    Args:
        hidden_states: [N, D], rows sorted by expert; float32, bfloat16 or float16.
        gate_and_up_projs: [e, D, U]. down_projs: [e, I, D]. Cast to the rows' dtype.
        tokens_per_expert: [e] rows of each expert. permuted_probs: [N, 1].
        activation_fn: f(hidden [N, U], permuted_probs) -> [N, I].
        use_mxfp8: multiply in MXFP8.
    Returns:
        [N, D], dtype of hidden_states, in the order of the rows; rows past the last expert's are zero.
    Raises:
        Unsupported, BackendUnavailable: `use_mxfp8` on a device that has none.
    """
    backend = "torch_mm_mxfp8" if use_mxfp8 else "grouped_mm"
    sizes_e = torch.as_tensor(tokens_per_expert, device=hidden_states.device).to(torch.int32)
    hidden = grouped_matmul(hidden_states, gate_and_up_projs.to(hidden_states.dtype), sizes_e, backend=backend)
    act = activation_fn(hidden, permuted_probs)
    return grouped_matmul(act, down_projs.to(act.dtype), sizes_e, backend=backend)


def _row_experts(counts: Any, n_experts: int, out_RF: Float[Tensor, "R F"]) -> Int[Tensor, " R"]:
    """int32: each row's expert, from the rows of each expert."""
    counts_e = torch.as_tensor(counts)
    if counts_e.device.type == "cpu" and not torch.compiler.is_compiling():
        sizes = [int(count) for count in counts_e.tolist()]
        if len(sizes) != n_experts or min(sizes, default=0) < 0 or sum(sizes) != out_RF.shape[0]:
            asked = f"{n_experts} counts, none below zero, that sum to the {out_RF.shape[0]} rows of value"
            raise ShapeError(asked, f"tokens_per_expert {sizes}", "count the rows of each expert anew")
    counts_e = counts_e.to(out_RF.device, torch.int64)
    experts_e = torch.arange(n_experts, dtype=torch.int32, device=out_RF.device)
    # With its size given it reads nothing back to the host, and asserts that size where it runs.
    return torch.repeat_interleave(experts_e, counts_e, output_size=out_RF.shape[0])


def _column(probs: Tensor, n_rows: int) -> Tensor:
    if tuple(probs.shape) not in ((), (1,), (1, 1), (n_rows, 1)):
        asked = f"permuted_probs of shape [{n_rows}, 1]"
        raise ShapeError(asked, f"shape {tuple(probs.shape)}", "give one weight per row, as a column")
    return probs.expand(n_rows, 1).reshape(n_rows)
