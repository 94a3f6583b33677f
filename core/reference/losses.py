"""Step 2, the losses that balance the router: of its scores over a call, of its logits, of each sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moebius.core.config import MoEConfig
from moebius.core.precision import EXACT, Arithmetic
from moebius.core.reference.route import (
    Routing,
    expert_load,
    normalised,
    normalised_vjp,
    score,
    score_vjp,
    softmax,
    top_k,
)

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


def aux_loss(
    scores_TE: Float[np.ndarray, "T E"],
    load_E: Int[np.ndarray, " E"],
    token_mask_T: Bool[np.ndarray, " T"],
    k: int,
    arithmetic: Arithmetic = EXACT,
) -> float:
    """Load-balancing loss: sum over experts of (load share x E) * mean score; 1 for uniform softmax routing.

    Source: Fedus et al., Switch Transformers, arXiv:2101.03961, equation 4.
    """
    n = max(int(token_mask_T.sum()), 1)
    share_E = load_E * load_E.shape[0] / (k * n)
    mean_E = arithmetic.sum(np.where(token_mask_T[:, None], scores_TE, 0.0), axis=0) / n
    return float(arithmetic.curve(arithmetic.sum(share_E * mean_E)))


def aux_loss_vjp(
    scores_TE: Float[np.ndarray, "T E"],
    load_E: Int[np.ndarray, " E"],
    token_mask_T: Bool[np.ndarray, " T"],
    k: int,
    dloss: float,
) -> np.ndarray:
    """Gradient of the scores; the load is a count and has none."""
    n = max(int(token_mask_T.sum()), 1)
    share_E = load_E * load_E.shape[0] / (k * n)
    return np.where(token_mask_T[:, None], dloss * share_E / n, 0.0)


def z_loss(
    logits_TE: Float[np.ndarray, "T E"], token_mask_T: Bool[np.ndarray, " T"], arithmetic: Arithmetic = EXACT
) -> float:
    """Router z-loss: the mean over valid tokens of logsumexp(logits)^2, which keeps logits small.

    Source: Zoph et al., ST-MoE, arXiv:2202.08906, equation 5.
    """
    n = max(int(token_mask_T.sum()), 1)
    square_T = np.square(_logsumexp(_valid(logits_TE, token_mask_T), arithmetic)) * token_mask_T
    return float(arithmetic.curve(arithmetic.sum(square_T) / n))


def z_loss_vjp(
    logits_TE: Float[np.ndarray, "T E"],
    token_mask_T: Bool[np.ndarray, " T"],
    dloss: float,
    arithmetic: Arithmetic = EXACT,
) -> np.ndarray:
    """Gradient of the logits."""
    n, logits_TE = max(int(token_mask_T.sum()), 1), _valid(logits_TE, token_mask_T)
    dlogsumexp_T = 2.0 * dloss / n * _logsumexp(logits_TE, arithmetic) * token_mask_T
    return arithmetic.curve(dlogsumexp_T[:, None] * softmax(logits_TE, arithmetic))


def seq_aux_loss(
    logits_TE: Float[np.ndarray, "T E"],
    token_mask_T: Bool[np.ndarray, " T"],
    config: MoEConfig,
    *,
    n_sequences: int = 1,
    best_TK: Int[np.ndarray, "T K"] | None = None,
    arithmetic: Arithmetic = EXACT,
) -> float:
    """Sequence-wise load-balancing loss: that of each sequence alone, averaged over the sequences with a valid token.

    In a sequence, the sum over experts of (share of the tokens that have the expert among their best K, x E / K) *
    (mean score). Scores are normalised to sum 1, and they rank alone: neither correction bias nor groups take part.

    Source: DeepSeek-V3, arXiv:2412.19437, equations 17 to 20.

    Args:
        n_sequences: the tokens are those of so many sequences of equal length, one after the other.
        best_TK: each token's best K by score; None to rank them here.
    """
    share_BE, count_B = _shares(logits_TE, token_mask_T, config, n_sequences, best_TK)
    score_TE = score(_valid(logits_TE, token_mask_T), config.routing_rule, arithmetic)
    scores_TE = normalised(score_TE, arithmetic) * token_mask_T[:, None]
    mean_BE = arithmetic.sum(scores_TE.reshape(n_sequences, -1, scores_TE.shape[1]), axis=1)
    mean_BE = mean_BE / np.maximum(count_B, 1)[:, None]
    return float(arithmetic.curve(arithmetic.sum(share_BE * mean_BE) / max(int((count_B > 0).sum()), 1)))


def seq_aux_loss_vjp(
    logits_TE: Float[np.ndarray, "T E"],
    token_mask_T: Bool[np.ndarray, " T"],
    config: MoEConfig,
    dloss: float,
    *,
    n_sequences: int = 1,
    best_TK: Int[np.ndarray, "T K"] | None = None,
    arithmetic: Arithmetic = EXACT,
) -> np.ndarray:
    """Gradient of the logits; the ranking has none."""
    share_BE, count_B = _shares(logits_TE, token_mask_T, config, n_sequences, best_TK)
    of_each_BE = dloss * share_BE / (np.maximum(count_B, 1) * max(int((count_B > 0).sum()), 1))[:, None]
    dscores_TE = np.repeat(of_each_BE, len(logits_TE) // n_sequences, axis=0) * token_mask_T[:, None]
    logits_TE = _valid(logits_TE, token_mask_T)
    score_TE = score(logits_TE, config.routing_rule, arithmetic)
    dscore_TE = normalised_vjp(score_TE, dscores_TE, arithmetic)
    return arithmetic.curve(score_vjp(logits_TE, score_TE, dscore_TE, config.routing_rule, arithmetic))


def losses(
    logits_TE: Float[np.ndarray, "T E"],
    routing: Routing,
    token_mask_T: Bool[np.ndarray, " T"],
    config: MoEConfig,
    *,
    n_sequences: int = 1,
    best_TK: Int[np.ndarray, "T K"] | None = None,
    arithmetic: Arithmetic = EXACT,
) -> dict[str, float]:
    """Every loss of moebius.core.routing.LOSSES, before its coefficient and also where that is zero."""
    load_E = expert_load(routing.ids_TK, token_mask_T, config.n_routed_experts)
    settings: dict[str, Any] = {"n_sequences": n_sequences, "best_TK": best_TK, "arithmetic": arithmetic}
    return {
        "aux_loss": aux_loss(routing.scores_TE, load_E, token_mask_T, config.n_activated_experts, arithmetic),
        "z_loss": z_loss(logits_TE, token_mask_T, arithmetic),
        "seq_aux_loss": seq_aux_loss(logits_TE, token_mask_T, config, **settings),
    }


def losses_vjp(
    logits_TE: Float[np.ndarray, "T E"],
    routing: Routing,
    token_mask_T: Bool[np.ndarray, " T"],
    config: MoEConfig,
    *,
    scale: float = 1.0,
    n_sequences: int = 1,
    best_TK: Int[np.ndarray, "T K"] | None = None,
    arithmetic: Arithmetic = EXACT,
) -> tuple[np.ndarray, np.ndarray | None]:
    """(dscores_TE, dlogits_TE) of scale * (sum of every loss times its coefficient); what a frontend's gate attaches.

    dscores_TE is that of the auxiliary loss, which reads `routing.scores_TE`; dlogits_TE that of the two others, None
    where the config has neither.
    """
    load_E = expert_load(routing.ids_TK, token_mask_T, config.n_routed_experts)
    k, factor = config.n_activated_experts, {name: scale * value for name, value in config.losses.items()}
    dscores_TE = aux_loss_vjp(routing.scores_TE, load_E, token_mask_T, k, factor.get("aux_loss", 0.0))
    parts = []
    if "z_loss" in factor:
        parts.append(z_loss_vjp(logits_TE, token_mask_T, factor["z_loss"], arithmetic))
    if "seq_aux_loss" in factor:
        settings: dict[str, Any] = {"n_sequences": n_sequences, "best_TK": best_TK, "arithmetic": arithmetic}
        parts.append(seq_aux_loss_vjp(logits_TE, token_mask_T, config, factor["seq_aux_loss"], **settings))
    return dscores_TE, np.sum(parts, axis=0) if parts else None


def _shares(
    logits_TE: Float[np.ndarray, "T E"],
    token_mask_T: Bool[np.ndarray, " T"],
    config: MoEConfig,
    n_sequences: int,
    best_TK: Int[np.ndarray, "T K"] | None,
) -> tuple[np.ndarray, np.ndarray]:
    """(each expert's share [sequences, E] of its sequence's valid tokens, x E / K; how many those are [sequences])."""
    n_experts, k = logits_TE.shape[1], config.n_activated_experts
    best_TK = top_k(logits_TE, k) if best_TK is None else best_TK
    mask_BS = token_mask_T.reshape(n_sequences, -1)
    best_BSK, count_B = best_TK.reshape(*mask_BS.shape, k), mask_BS.sum(-1)
    load_BE = np.stack([expert_load(best_SK, m_S, n_experts) for best_SK, m_S in zip(best_BSK, mask_BS, strict=True)])
    return load_BE * n_experts / (k * np.maximum(count_B, 1))[:, None], count_B


def _valid(logits_TE: Float[np.ndarray, "T E"], token_mask_T: Bool[np.ndarray, " T"]) -> np.ndarray:
    """The logits, with a masked token's, whatever they are, replaced by zeros."""
    return np.where(token_mask_T[:, None], logits_TE, 0.0)


def _logsumexp(logits_TE: Float[np.ndarray, "T E"], arithmetic: Arithmetic) -> np.ndarray:
    largest_T = logits_TE.max(-1)
    total_T = arithmetic.curve(arithmetic.sum(np.exp(logits_TE - largest_T[:, None]), axis=-1))
    return arithmetic.curve(largest_T + arithmetic.curve(np.log(total_T)))
