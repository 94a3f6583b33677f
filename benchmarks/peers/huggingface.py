"""transformers' own experts, Qwen3Moe's, by its default implementation."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.gpu_problem import Candidate, Problem


def build(problem: Problem) -> Candidate:
    """Qwen3MoeExperts with "grouped_mm"; it stores every matrix output-major."""
    import transformers
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    s = problem.shape
    config = Qwen3MoeConfig(
        hidden_size=s.dim, moe_intermediate_size=s.inter, num_experts=s.n_experts, num_experts_per_tok=s.k
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    up, down = (nn.Parameter(weight.mT.contiguous()) for weight in (problem.up, problem.down))
    module.gate_up_proj, module.down_proj = up, down
    return Candidate(
        call=lambda x, weights, indices: module(x, indices, weights),
        parameters=(up, down),
        gradients=lambda expert: (up.grad[expert].mT, down.grad[expert].mT),  # type: ignore[index]
        note=f"transformers {transformers.__version__}",
    )
