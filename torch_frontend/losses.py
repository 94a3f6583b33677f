"""Step 2, the losses that balance the router: of its scores over a call, of its logits, of each sequence."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moebius.core import checks
from moebius.core.config import MoEConfig
from moebius.core.errors import ShapeError
from moebius.torch_frontend.dtypes import promoted
from moebius.torch_frontend.route import Routing, normalised, score, top_k

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


def aux_loss(
    scores_TE: Float[Tensor, "T E"],
    load_E: Int[Tensor, " E"],
    token_mask_T: Bool[Tensor, " T"],
    k: int,
    *,
    cp_mesh: Any = None,
) -> Tensor:
    """Load-balancing loss, a scalar in scores' dtype; 1 for uniform softmax routing. Not scaled by a coefficient.

    Spec: core.reference.aux_loss. Source: Switch Transformers, arXiv:2101.03961, equation 4.

    Args:
        load_E: of these tokens. cp_mesh: ranks whose tokens count too, see `sum_over_ranks`; None for these alone.
    """
    sum_E = _valid(scores_TE, token_mask_T).sum(0)
    n, load_E, sum_E = sum_over_ranks((token_mask_T.sum(), load_E, sum_E), cp_mesh)
    n = n.clamp(min=1).to(sum_E.dtype)
    share_E = load_E.to(sum_E.dtype) * load_E.shape[0] / (k * n)
    return (share_E * (sum_E / n)).sum()


def z_loss(logits_TE: Float[Tensor, "T E"], token_mask_T: Bool[Tensor, " T"], *, cp_mesh: Any = None) -> Tensor:
    """Mean over valid tokens of logsumexp(logits)^2, a scalar in the accumulate dtype; it keeps logits small.

    Spec: core.reference.z_loss. Source: ST-MoE, arXiv:2202.08906, equation 5.

    Args:
        cp_mesh: ranks whose tokens count too, see `sum_over_ranks`; None for these alone.
    """
    logsumexp_T = torch.logsumexp(_valid(promoted(logits_TE), token_mask_T), dim=-1)
    total = torch.where(token_mask_T, logsumexp_T.square(), 0.0).sum()
    n, total = sum_over_ranks((token_mask_T.sum(), total), cp_mesh)
    return total / n.clamp(min=1).to(total.dtype)


def seq_aux_loss(
    logits_TE: Float[Tensor, "T E"],
    token_mask_T: Bool[Tensor, " T"],
    config: MoEConfig,
    *,
    n_sequences: int = 1,
    best_TK: Int[Tensor, "T K"] | None = None,
    cp_mesh: Any = None,
) -> Tensor:
    """Sequence-wise load-balancing loss, a scalar in the accumulate dtype, averaged over sequences with a valid token.

    Spec: core.reference.seq_aux_loss. Source: DeepSeek-V3, arXiv:2412.19437, equations 17 to 20.

    Args:
        n_sequences: the tokens are those of so many sequences of equal length, one after the other.
        best_TK: each token's best K by score, where known; None to rank them here.
        cp_mesh: ranks that hold other parts of the same sequences, see `sum_over_ranks`; None for these alone.
    Raises:
        ShapeError: the sequences do not divide the tokens.
    """
    checks.logits(logits_TE, config.n_routed_experts)
    T, E, k = *logits_TE.shape, config.n_activated_experts
    if n_sequences < 1 or T % n_sequences:
        raise ShapeError(f"{n_sequences} sequences of equal length", f"{T} tokens", "pass a number that divides them")
    logits_TE = _valid(promoted(logits_TE), token_mask_T)
    best_TK = top_k(logits_TE.detach(), k) if best_TK is None else best_TK.long()
    best_TE = torch.zeros(T, E, dtype=torch.bool, device=logits_TE.device).scatter(1, best_TK, True)
    scores_TE = _valid(normalised(score(logits_TE, config.routing_rule)), token_mask_T)

    def per_sequence(value_T: Tensor) -> Tensor:
        return value_T.unflatten(0, (n_sequences, T // n_sequences)).sum(1)

    counted = (token_mask_T[:, None], best_TE & token_mask_T[:, None], scores_TE)
    n_B1, load_BE, sum_BE = sum_over_ranks([per_sequence(value) for value in counted], cp_mesh)
    share_BE = load_BE.to(sum_BE.dtype) * E / (k * n_B1.clamp(min=1).to(sum_BE.dtype))
    loss_B = (share_BE * (sum_BE / n_B1.clamp(min=1).to(sum_BE.dtype))).sum(-1)
    return loss_B.sum() / (n_B1 > 0).sum().clamp(min=1).to(sum_BE.dtype)


def losses(
    logits_TE: Float[Tensor, "T E"],
    routing: Routing,
    load_E: Int[Tensor, " E"] | None,
    token_mask_T: Bool[Tensor, " T"],
    config: MoEConfig,
    *,
    n_sequences: int = 1,
    best_TK: Int[Tensor, "T K"] | None = None,
    cp_mesh: Any = None,
) -> dict[str, Tensor]:
    """The losses that the config asks for, by name and before their coefficients. Spec: core.reference.losses.

    Args:
        load_E: of these tokens; read by the auxiliary loss alone. The others: see `seq_aux_loss`.
    """
    asked, found = config.losses, {}
    if "aux_loss" in asked and load_E is not None:
        k = config.n_activated_experts
        found["aux_loss"] = aux_loss(routing.scores_TE, load_E, token_mask_T, k, cp_mesh=cp_mesh)
    if "z_loss" in asked:
        found["z_loss"] = z_loss(logits_TE, token_mask_T, cp_mesh=cp_mesh)
    if "seq_aux_loss" in asked:
        found["seq_aux_loss"] = seq_aux_loss(
            logits_TE, token_mask_T, config, n_sequences=n_sequences, best_TK=best_TK, cp_mesh=cp_mesh
        )
    return found


def attach_aux_loss(weights_TK: Float[Tensor, "T K"], loss: Tensor, scale: Any) -> Tensor:
    """`weights_TK` unchanged; in backward `loss` receives the gradient `scale`, whatever the weights receive.

    Args:
        scale: a number, or a tensor of one.
    """
    attached: Tensor = _AttachAuxLoss.apply(weights_TK, loss, scale)
    return attached


def sum_over_ranks(values: Sequence[Tensor], cp_mesh: Any) -> list[Tensor]:
    """Each value summed over the ranks, in one collective; its gradient is that of this rank's part alone.

    The gradient of a loss that every rank computes alike from these sums is therefore a rank's own share of it: where
    the ranks' gradients are added up afterwards, the whole comes out once.

    Args:
        values: of equal shape on every rank.
        cp_mesh: DeviceMesh, over all of whose dimensions, or ProcessGroup; None for this rank alone.
    """
    if cp_mesh is None:
        return list(values)
    dtype = reduce(torch.promote_types, (value.dtype for value in values))
    flat = torch.cat([value.reshape(-1).to(dtype) for value in values])
    parts = _SumOverRanks.apply(flat, _groups(cp_mesh)).split([value.numel() for value in values])
    return [part.view(value.shape).to(value.dtype) for part, value in zip(parts, values, strict=True)]


class _AttachAuxLoss(torch.autograd.Function):
    generate_vmap_rule = True  # for torch.func

    @staticmethod
    def forward(weights_TK: Float[Tensor, "T K"], loss: Tensor, scale: Any) -> Tensor:
        return weights_TK.view_as(weights_TK)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Any], output: Tensor) -> None:
        _, loss, ctx.scale = inputs
        ctx.like = (loss.dtype, loss.device)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        dtype, device = ctx.like
        if isinstance(ctx.scale, Tensor):
            return grads[0], ctx.scale.detach().reshape(()).to(device, dtype), None
        return grads[0], torch.full((), ctx.scale, dtype=dtype, device=device), None


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(value: Tensor, groups: list[Any]) -> Tensor:
        total = value.clone()
        for group in groups:
            torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, list[Any]], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _groups(cp_mesh: Any) -> list[Any]:
    """The process groups of a mesh, one a dimension; of a group, itself."""
    if not hasattr(cp_mesh, "get_all_groups"):
        return [cp_mesh]
    groups: list[Any] = cp_mesh.get_all_groups()
    return groups


def _valid(value_TE: Float[Tensor, "T E"], token_mask_T: Bool[Tensor, " T"]) -> Tensor:
    """A masked token's values, whatever they are, replaced by zeros."""
    return torch.where(token_mask_T[:, None], value_TE, 0.0)
