"""Transformer Engine's grouped linear layer between its own permutation and its inverse."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu_problem import Candidate, Problem


def build(problem: Problem, *, compiled: bool = False) -> Candidate:
    """moe_permute_with_probs by a mask map, GroupedLinear, silu * up * probability, GroupedLinear, moe_unpermute.

    Args:
        compiled: the activation under torch.compile, one kernel each way.
    """
    import transformer_engine.pytorch as te

    n_experts = problem.shape.n_experts
    up, down = _linear(te, problem.up), _linear(te, problem.down)
    activate = torch.compile(_activate, dynamic=False, backend=problem.compiler) if compiled else _activate

    def call(x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Tensor:
        n_tokens, k = indices_TK.shape
        map_TE = torch.zeros(n_tokens, n_experts, dtype=torch.int32, device=x_TD.device).scatter_(1, indices_TK, 1)
        probs_TE = weights_TK.new_zeros(n_tokens, n_experts).scatter(1, indices_TK, weights_TK)
        sizes = map_TE.sum(0).tolist()
        rows_RD, probs_R, row_ids = te.moe_permute_with_probs(x_TD, probs_TE, map_TE, n_tokens * k)
        out_RD = down(activate(up(rows_RD, sizes), probs_R), sizes)
        y_TD: Tensor = te.moe_unpermute(out_RD, row_ids, restore_shape=x_TD.shape, map_type="mask")
        return y_TD

    def gradients(expert: int) -> tuple[Tensor, Tensor]:
        up_UD, down_DI = (getattr(layer, f"weight{expert}").grad for layer in (up, down))
        return up_UD.mT, down_DI.mT

    return Candidate(
        call=call,
        parameters=(*up.parameters(), *down.parameters()),
        gradients=gradients,
        note=f"transformer-engine {import_module('transformer_engine').__version__}",
    )


def _activate(hidden_RU: Tensor, probs_R: Tensor) -> Tensor:
    gate_RI, value_RI = hidden_RU.chunk(2, dim=-1)
    return F.silu(gate_RI) * value_RI * probs_R[:, None]


def _linear(te: Any, weight_EDF: Tensor) -> Any:
    """One GroupedLinear; it stores one output-major parameter an expert."""
    n_experts, n_in, n_out = weight_EDF.shape
    layer = te.GroupedLinear(
        n_experts, n_in, n_out, bias=False, params_dtype=weight_EDF.dtype, device=weight_EDF.device
    )
    with torch.no_grad():
        for expert in range(n_experts):
            getattr(layer, f"weight{expert}").copy_(weight_EDF[expert].mT)
    return layer
