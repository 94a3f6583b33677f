"""moebius's own module, as a user calls it."""

from __future__ import annotations

import torch

from benchmarks.gpu_problem import Candidate, Problem

BIASES = ("gate_up_proj_bias", "down_proj_bias")


def build(problem: Problem, **backend: object) -> Candidate:
    """GroupedExperts with a BackendConfig of these fields."""
    from moebius.core import BackendConfig, MoEConfig
    from moebius.torch_frontend import GroupedExperts

    s = problem.shape
    config = MoEConfig(
        n_routed_experts=s.n_experts,
        n_activated_experts=s.k,
        dim=s.dim,
        moe_inter_dim=s.inter,
        expert_activation=problem.activation,
        expert_bias=problem.biases is not None,
        dtype=str(problem.up.dtype),
    )
    module = GroupedExperts(config, BackendConfig(**backend), device=problem.up.device)  # type: ignore[arg-type]
    with torch.no_grad():
        module.gate_and_up_projs.copy_(problem.up)
        module.down_projs.copy_(problem.down)
        for name, bias in zip(BIASES, problem.biases or (), strict=False):
            getattr(module, name).copy_(bias)
    parameters = [module.gate_and_up_projs, module.down_projs, *(getattr(module, n) for n in BIASES if problem.biases)]
    token_mask = torch.ones(s.tokens, dtype=torch.bool, device=problem.up.device)
    return Candidate(
        call=lambda x, weights, indices: module(x, token_mask, weights, indices),
        parameters=parameters,
        gradients=lambda expert: tuple(parameter.grad[expert] for parameter in parameters),
        note=f"backend {module.backend_name}",
    )
