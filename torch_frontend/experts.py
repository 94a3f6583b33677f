"""Steps 3 to 9: the routed experts as a function. As modules: grouped_experts.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from moebius.core import checks
from moebius.core.config import MoEConfig
from moebius.core.dispatchers import routed_share
from moebius.core.registry import of_layer
from moebius.core.stages import Tap, untapped
from moebius.torch_frontend.activate import activate
from moebius.torch_frontend.bias import add_bias
from moebius.torch_frontend.checks import check_experts, check_values
from moebius.torch_frontend.dispatch import Dispatcher, Local, Sent
from moebius.torch_frontend.lean import lean
from moebius.torch_frontend.matmul import grouped_matmul
from moebius.torch_frontend.permute import permute, unpermute

# (pre-activation [R, U], routing weights [R, 1]) -> [R, I], the product with the weights included.
WeightedActivation = Callable[[Tensor, Tensor], Tensor]


def experts(
    parameters: Mapping[str, Tensor],
    x: Tensor,
    token_mask: Tensor,
    weights: Tensor,
    indices: Tensor,
    *,
    config: MoEConfig,
    backend: str | None = None,
    dispatcher: Dispatcher | None = None,
    activation: WeightedActivation | None = None,
    double_backward: bool = False,
    check: bool = False,
    tap: Tap = untapped,
) -> Tensor:
    """The routed experts' output for each token.

    Spec: core.reference.experts. A masked token, -1 and any id outside [0, E) is no route: zero output, zero
    gradient, and whatever it holds touches nothing. An expert named twice by one token counts twice.

    Args:
        parameters: `gate_and_up_projs` [e, D, U], `down_projs` [e, I, D] and, with config.expert_bias,
            `gate_up_proj_bias` [e, U], `down_proj_bias` [e, D] of the experts held here; cast to x.dtype at use.
        x: [T, D], floating. token_mask: [T] bool, True for a valid token.
        weights: [T, K] floating routing weights, promoted on entry. indices: [T, K] int32 or int64 expert ids.
        config: what to compute. backend: of the grouped matmul, None to choose. dispatcher: None for one rank.
        activation: computed in place of the config's: (hidden [R, U], weights [R, 1]) -> [R, I], the product with
            the weights included; ones where the config weights after the down projection. None for the config's.
        double_backward: gradients have gradients, at the price of memory.
        check: look at the values too, as MOEBIUS_CHECKS=full does.
        tap: called as tap(name, value) at the stages "rows" to "combine" of moebius.core.stages; returns the value
            to go on with.
    Returns:
        [T, D], dtype of x.
    Raises:
        ShapeError, DTypeError: an input does not fit. ConfigError, BackendUnavailable, Unsupported: see Registry.
    """
    dispatcher = dispatcher or Local()
    check_experts(parameters, x, token_mask, weights, indices, config, dispatcher.ranks)
    if check or checks.environment() == "full":
        check_values(weights, indices, token_mask, config.n_routed_experts)
    p = {name: value.to(x.dtype) for name, value in parameters.items()}

    sent, dispatched = dispatcher.dispatch(x, weights, indices, token_mask, config.n_routed_experts)
    partial = dispatcher.ranks > 1
    arrives = getattr(dispatcher, "arrives", "tokens")  # a user's own may not say it
    backend = of_layer(backend, config, routed_share(arrives, dispatcher.ranks, weights.shape[1]))
    if activation is None and not double_backward and tap is untapped:
        y_SD = lean(p, sent, config, backend, partial)
    else:
        y_SD = steps(p, sent, config, backend, partial, activation, tap)
    return tap("combine", dispatcher.combine(y_SD, dispatched))


def steps(
    p: Mapping[str, Tensor],
    sent: Sent,
    config: MoEConfig,
    backend: str | None = None,
    partial: bool = False,
    activation: WeightedActivation | None = None,
    tap: Tap = untapped,
) -> Tensor:
    """Steps 4 to 8, one after the other: [S, D], each token's rows summed, promoted where `partial`; see `experts`."""
    backend = of_layer(backend, config)
    rows_RD, row_weights_R, group_sizes_e, row_experts_R, permuted = permute(sent, p["down_projs"].shape[0])
    rows_RD = tap("rows", rows_RD)
    before_R, after_R = (None, row_weights_R) if config.apply_router_weight_after_down else (row_weights_R, None)
    hidden_RU = grouped_matmul(rows_RD, p["gate_and_up_projs"], group_sizes_e, backend=backend)
    hidden_RU = tap("up", add_bias(hidden_RU, p.get("gate_up_proj_bias"), row_experts_R))
    if activation is None:
        act_RI = tap("activation", activate(hidden_RU, before_R, config.activation))
    else:
        given_R1 = (torch.ones_like(row_weights_R) if before_R is None else before_R)[:, None]
        act_RI = tap("activation", activation(hidden_RU, given_R1).to(hidden_RU.dtype))
    out_RD = grouped_matmul(act_RI, p["down_projs"], group_sizes_e, backend=backend)
    out_RD = tap("down", add_bias(out_RD, p.get("down_proj_bias"), row_experts_R, before_R))
    return unpermute(out_RD, permuted, after_R, partial=partial)
